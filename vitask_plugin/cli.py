"""`vitask ...`: a table of commands, each configured by the module that does the work. No logic of its own.

A command's module exposes `configure(parser)`, which adds its arguments and sets `run=function_of_namespace`.
Only the module of the command that was typed is imported, so `vitask --help` stays fast.
"""

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from vitask_plugin import __version__
from vitask_plugin.errors import VITaskError

COMMANDS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("run",), "vitask_plugin.run.command", "go from labelled images to a judged specialist, by a recipe"),
    (("data", "medmnist"), "vitask_plugin.data.medmnist", "write LLaVA JSON and images from a medmnist data set"),
    (("data", "folder"), "vitask_plugin.data.folder", "write LLaVA JSON and images from your own labelled images"),
    (("data", "merge"), "vitask_plugin.data.merge", "put several data sets, and general data, below one folder"),
    (("tsm", "train"), "vitask_plugin.tsm.train", "train the task-specific model (any timm classifier)"),
    (("tsm", "extract"), "vitask_plugin.tsm.features", "compute its features once, for training"),
    (("tsm", "import"), "vitask_plugin.tsm.imported", "use a classifier that was trained elsewhere"),
    (("tsm", "evaluate"), "vitask_plugin.judge_tsm", "judge it by itself, in the format of lmms-eval"),
    (("connector", "align"), "vitask_plugin.training.align", "align another TSM with the one a VLM was tuned with"),
    (("connector", "fit"), "vitask_plugin.connector_fit", "fit a new connector to another TSM, the old one being gone"),
    (("predict",), "vitask_plugin.specialist.command", "class probabilities of a tuned checkpoint for any images"),
    (("serve",), "vitask_plugin.serve.command", "serve a page on which images are dropped and judged"),
    (("export",), "vitask_plugin.llava.export", "write a LLaVA checkpoint as transformers' own LLaVA, to be served"),
    (("merge",), "vitask_plugin.merge", "merge a LoRA checkpoint into whole weights"),
    (("report",), "vitask_plugin.report.command", "make one page, Markdown or CSV of lmms-eval's results"),
    (("demo",), "vitask_plugin.demo", "make a tiny LLaVA, tune it with and without VITask, print one table"),
    (("doctor",), "vitask_plugin.doctor", "print what is installed, missing or untested, and what to do"),
    (("patch",), "vitask_plugin.llava.patch", "add the lines for --vitask to a LLaVA checkout"),
    (("deepspeed-config",), "vitask_plugin.deepspeed.configs", "print the path of a DeepSpeed configuration"),
    (("estimate-memory",), "vitask_plugin.estimate_memory", "estimate what DeepSpeed needs of GPU and host memory"),
    (("tasks-path",), "vitask_plugin.cli", "print the folder for lmms-eval's --include_path"),
)
GROUPS = {
    "data": "prepare training data",
    "tsm": "train, use or import the task-specific model",
    "connector": "bring another task-specific model to a tuned VLM",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """`vitask tasks-path`, the one command that is too small for a module."""
    parser.set_defaults(run=print_tasks_path)


def print_tasks_path(args: argparse.Namespace) -> None:
    # The folder is mapped into the package (package-dir), so only the import system knows where it lies.
    specification = importlib.util.find_spec("vitask_plugin.eval_tasks")
    if specification is None or not specification.submodule_search_locations:
        raise VITaskError("the eval_tasks folder is not installed; reinstall vitask-plugin")
    print(Path(specification.submodule_search_locations[0]).resolve())


def build_parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser for `words`: every command is listed, the one that was typed is configured."""
    parser = argparse.ArgumentParser(
        prog="vitask", description="Task-specific visual instruction tuning for LLaVA, judged by lmms-eval."
    )
    parser.add_argument("--version", action="version", version=f"vitask {__version__}")
    top = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    groups = {}
    for path, module, help_text in COMMANDS:
        parent = top
        if len(path) == 2:
            group = path[0]
            if group not in groups:
                group_parser = top.add_parser(group, help=GROUPS[group], description=GROUPS[group])
                groups[group] = group_parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
            parent = groups[group]
        command = parent.add_parser(path[-1], help=help_text, description=help_text[0].upper() + help_text[1:] + ".")
        if tuple(words[: len(path)]) == path:
            importlib.import_module(module).configure(command)
    return parser


def _check_empty(words: Sequence[str]) -> None:
    """No command takes an empty word: a path would be the working directory."""
    for before, word in zip(("vitask", *words), words, strict=False):
        if not word.strip() or (word.startswith("--") and word.endswith("=")):
            name = word or before
            raise VITaskError(f"nothing is given after {name!r}, perhaps an unset shell variable; give a value")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 if it went well, 1 with one sentence on bad input, 130 if interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        _check_empty(words)
        args = build_parser(words).parse_args(words)
        return args.run(args) or 0
    except VITaskError as error:
        print(f"vitask: error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        # Of a file that the user named, whatever the command does with it.
        if error.filename is None:
            raise
        print(f"vitask: error: {str(error.filename)!r}: {error.strerror}; check the path", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("vitask: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
