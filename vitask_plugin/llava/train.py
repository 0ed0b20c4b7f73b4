"""`python -m vitask_plugin.llava.train ...`: upstream's training script with the VITask flags, under any launcher."""

from vitask_plugin.errors import VITaskError
from vitask_plugin.llava import compat
from vitask_plugin.llava.install import wrap
from vitask_plugin.training.running import stop


def main() -> None:
    """Runs upstream's `train()`; upstream's own flags and files are untouched."""
    try:
        compat.prepare()
    except VITaskError as error:
        stop(error)
    from llava.train.train import train

    wrap(train)()


if __name__ == "__main__":
    main()
