"""The commands of docs/launch.md, run as they stand there."""

import os
import re
import shlex
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"


def commands(mark: str) -> dict[str, str]:
    """{name: command} of the blocks behind `<!-- mark: name -->`; the marks are `tested` and `template`."""
    text = (DOCS / "launch.md").read_text(encoding="utf-8")
    return dict(re.findall(rf"^<!-- {mark}: (\S+) -->\n```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))


def script(name: str, flags: list[str]) -> str:
    """A tested block with the FLAGS that it ends in."""
    return f"FLAGS=({shlex.join(flags)})\n{commands('tested')[name]}"


def environment(port: int, **more: str) -> dict[str, str]:
    """What the page says to set, and this Python's commands first in the PATH. One process a node in place of GPUs."""
    paths = [str(Path(sys.executable).parent), os.environ["PATH"]]
    return {"PATH": os.pathsep.join(paths), "GPUS": "1", "MASTER_PORT": str(port), **more}
