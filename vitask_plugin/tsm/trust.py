"""Whose code may run when a TSM folder is loaded: nobody's, unless who loads it says so at that moment.

A TSM of a timm architecture is weights and numbers. One of a Python module (`vitask tsm import --module`) names a
module and a function in `tsm.json`; loading it imports the one and calls the other. So the consent is never read from a
file: it is a flag of the command, of the training run, or of lmms-eval's `--model_args`.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitask_plugin.errors import VITaskError

FLAG = "--trust-tsm-code"


def add_flag(parser: argparse.ArgumentParser) -> None:
    """`--trust-tsm-code`, for a command that loads a TSM from a folder."""
    parser.add_argument(
        FLAG,
        action="store_true",
        help="import the Python code that a TSM's tsm.json names, if it names any (default: refuse)",
    )


def check_code(source: Mapping[str, Any], directory: str | Path, *, trusted: bool) -> None:
    """Refuses a TSM of a Python module that nobody vouched for, before anything is imported.

    Args:
        source: of the TSM's record. directory: the TSM's folder.

    Raises:
        VITaskError: saying what would be imported, and how to allow it.
    """
    if "module" not in source or trusted:
        return
    module, _, attribute = str(source["module"]).partition(":")
    raise VITaskError(
        f"TSM {str(directory)!r} is not of timm but of Python code: loading it would import module {module!r} and call "
        f"its {attribute!r}, and neither was done; if you trust that code, say so with {FLAG} (vitask commands), "
        "--vitask_trust_tsm_code True (training) or trust_tsm_code=True (lmms-eval's --model_args)"
    )
