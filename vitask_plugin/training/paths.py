"""The paths of a training command, looked at before anything is loaded: one sentence for each that cannot be right."""

from collections.abc import Callable, Mapping
from pathlib import Path

from vitask_plugin.errors import VITaskError
from vitask_plugin.files import check_folder


def check(flags: Mapping[str, str], looks: Mapping[str, Callable[[str, str], None]]) -> None:
    """Refuses paths that lead to nothing, or to something else.

    Args:
        flags: `{flag: value}` of the command line, as typed. looks: flag -> what refuses a path.

    Raises:
        VITaskError: naming flag, path, and what was found there.
    """
    for name in ("data_path", "image_folder"):
        if not flags.get(name):
            kind = "JSON" if name == "data_path" else "DIR"
            raise VITaskError(f"--vitask True needs --{name} {kind}, and it is {_given(flags, name)}; give it")
    for name, look in looks.items():
        if name in flags:
            if not flags[name]:
                raise VITaskError(f"--{name} is empty, perhaps an unset shell variable; give a path or leave it out")
            look(f"--{name}", flags[name])


def _given(flags: Mapping[str, str], name: str) -> str:
    return "empty" if name in flags else "left out"


def file(flag: str, path: str) -> None:
    if not Path(path).is_file():
        found = "is a folder" if Path(path).is_dir() else "does not exist"
        raise VITaskError(f"{flag} {path!r} {found}; give a file")


def folder(flag: str, path: str) -> None:
    check_folder(path, flag)


def model(flag: str, path: str) -> None:
    """A folder with a configuration; a name that may be one of the Hub passes."""
    if Path(path).exists() or Path(path).is_absolute() or path.startswith(".") or path.count("/") > 1:
        check_folder(path, flag)
        if not (Path(path) / "config.json").is_file():
            raise VITaskError(f"{flag} {path!r} has no config.json, so it is no model; give the folder of one")
        if (Path(path) / "adapter_config.json").is_file():
            raise VITaskError(
                f"{flag} {path!r} is the output of a LoRA run, which holds an adapter and no model; give the model it "
                "was trained from, and this folder as --vitask_connector_path with --lora_enable True to resume from it"
            )


LOOKS: dict[str, Callable[[str, str], None]] = {
    "model_name_or_path": model,
    "data_path": file,
    "image_folder": folder,
    "vitask_tsm": folder,
    "vitask_features": folder,
    "vitask_connector_path": folder,
    "vitask_eval_data": file,
}
