"""Writes `eval_tasks/upstream/`: the MedMNIST tasks as lmms-eval's own repository has its tasks.

    python tools/upstream_tasks.py [--check]

`--check` writes nothing and ends with status 1 where the folder is not what would be written.
"""

import argparse
import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import medmnist

from vitask_plugin.data.instructions import DRAWN, LabelSet, label_sets
from vitask_plugin.data.medmnist import SIZES, license_of

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "eval_tasks" / "upstream" / "lmms_eval" / "tasks" / "medmnist"
SOURCE = "upstream_medmnist.py"  # beside this file
OWN = "vitask_plugin."
VERSION = 1.0
DATASET = "https://doi.org/10.5281/zenodo.10519652"
SETS = [known for known in label_sets().values() if known != DRAWN]
TABLE = ("<!-- sets -->\n", "<!-- /sets -->\n")

TEMPLATE = """\
dataset_path: json
dataset_kwargs:
  data_files:
    test: medmnist.json
test_split: test
process_docs: !function utils.medmnist_process_docs
output_type: generate_until
doc_to_visual: !function utils.medmnist_doc_to_visual
doc_to_text: !function utils.medmnist_doc_to_text
doc_to_messages: !function utils.medmnist_doc_to_messages
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 128
  temperature: 0
  do_sample: false
process_results: !function utils.medmnist_process_results
metric_list:
  - metric: accuracy
    aggregation: mean
    higher_is_better: true
  - metric: macro_f1
    aggregation: !function utils.medmnist_macro_f1
    higher_is_better: true
  - metric: unmapped
    aggregation: !function utils.medmnist_unmapped
    higher_is_better: false
lmms_eval_specific_kwargs:
  default:
    pre_prompt: ""
    post_prompt: ""
"""


def files() -> dict[str, str]:
    """{name: text} of the folder; of README.md the table alone is written by this."""
    written = {"_default_template_yaml": TEMPLATE, "utils.py": formatted(inlined(Path(__file__).with_name(SOURCE)))}
    rows = [_row(known) for known in SETS]
    written["medmnist.json"] = "".join(json.dumps(row) + "\n" for row in rows)
    for size in SIZES:
        ending = "" if size == 28 else f"_{size}"
        for known in SETS:
            written[f"{known.flag}{ending}.yaml"] = _task(known, ending)
        written[f"medmnist2d{ending}.yaml"] = _group(ending)
    before, _, rest = (FOLDER / "README.md").read_text(encoding="utf-8").partition(TABLE[0])
    written["README.md"] = f"{before}{TABLE[0]}{''.join(_table())}{TABLE[1]}{rest.partition(TABLE[1])[2]}"
    return written


def _row(known: LabelSet) -> dict[str, object]:
    words = {"flag": known.flag, "modality": known.modality, "choices": list(known.choices)}
    return {**words, "multi_label": known.multi_label}


def _license(known: LabelSet) -> str:
    return str(license_of(known)).lower().replace(" ", "-")


def _task(known: LabelSet, ending: str) -> str:
    name = f"{known.flag}{ending}"
    about = f"metadata:\n  version: {VERSION}\n  dataset: {DATASET}\n  license: {_license(known)}\n"
    return f"include: _default_template_yaml\ntask: {name}\ndataset_name: {name}\n{about}"


def _group(ending: str) -> str:
    tasks = "".join(f"  - {known.flag}{ending}\n" for known in SETS)
    means = "".join(
        f"  - metric: {name}\n    aggregation: mean\n    weight_by_size: false\n" for name in ("accuracy", "macro_f1")
    )
    about = f"metadata:\n  version: {VERSION}\n  dataset: {DATASET}\n"
    return f"group: medmnist2d{ending}\ntask:\n{tasks}aggregate_metric_list:\n{means}{about}"


def _table() -> Iterator[str]:
    yield "| Task | Images | Classes | Kind | Test images | License |\n|---|---|---:|---|---:|---|\n"
    for known in SETS:
        count = medmnist.INFO[known.flag]["n_samples"]["test"]
        cells = (known.modality, len(known.choices), known.kind, f"{count:,}", license_of(known))
        yield f"| `{known.flag}` | {' | '.join(map(str, cells))} |\n"


# One module of several ----------------------------------------------------------------------------------------------


def inlined(path: Path) -> str:
    """A module's source with, in place of its imports of ours, the definitions that they stand for."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    found = _Definitions()
    own = [node for node in tree.body[1:] if not isinstance(node, (ast.Import, ast.ImportFrom))]
    found.take_imports(tree)
    parts = [_segment(source, node) for node in own]
    docstring = ast.get_source_segment(source, tree.body[0])
    # The formatter adds the lines that functions have between them.
    return "\n".join([docstring, "", found.import_lines(), "", *found.parts, *parts, ""])


class _Definitions:
    """Definitions of our modules in an order in which each comes after what it needs, and the imports of all of it."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self._imports: set[str] = set()
        self._done: dict[str, str] = {}

    def take_imports(self, tree: ast.Module) -> None:
        """What a module imports: of others as a line, of ours as definitions."""
        for name, line in _imported(tree).items():
            self._take_import(name, line)

    def _take_import(self, name: str, line: str) -> None:
        module = line.split()[1]
        if module.startswith(OWN):
            self._take(ROOT.joinpath(*module.split(".")).with_suffix(".py"), {name})
        else:
            self._imports.add(line)

    def _take(self, path: Path, names: set[str]) -> None:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
        defined = {name: node for node in tree.body for name in _names_of(node)}
        imported = _imported(tree)
        wanted, waiting = set(), list(names)
        while waiting:
            name = waiting.pop()
            if name in wanted:
                continue
            if name in imported:
                self._take_import(name, imported[name])
            elif name in defined:
                wanted.add(name)
                waiting += (node.id for node in ast.walk(defined[name]) if isinstance(node, ast.Name))
        for node in tree.body:
            new = [name for name in _names_of(node) if name in wanted]
            for name in new:
                if self._done.setdefault(name, str(path)) != str(path):
                    raise SystemExit(f"{name} is defined in {path} and in {self._done[name]}; rename one")
            segment = _segment(source, node)
            if new and segment not in self.parts:
                self.parts.append(segment)

    def import_lines(self) -> str:
        """Imports, those of the standard library first; the formatter puts them in order."""
        return "\n".join(sorted(self._imports))


def _names_of(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _imported(tree: ast.Module) -> dict[str, str]:
    """{name: the import line it comes from, alone} of a module's top level."""
    found = {}
    for node in tree.body:
        for alias in node.names if isinstance(node, (ast.Import, ast.ImportFrom)) else ():
            one = ast.Import([alias]) if isinstance(node, ast.Import) else ast.ImportFrom(node.module, [alias], 0)
            found[alias.asname or alias.name.partition(".")[0]] = ast.unparse(one)
    return found


def _segment(source: str, node: ast.stmt) -> str:
    """A definition with its decorators and the comment right above it."""
    lines = source.splitlines()
    first = min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", ()))]) - 1
    while lines[first - 1].startswith("# ") and not lines[first - 1].endswith("----"):
        first -= 1
    return "\n".join(lines[first : node.end_lineno])


def formatted(source: str) -> str:
    """As lmms-eval's own hooks leave it: imports in order, lines up to 240 characters."""
    ruff = [sys.executable, "-m", "ruff"]
    for words in (["check", "--isolated", "--select", "I", "--fix", "--quiet", "-"], ["format", "--isolated", "-"]):
        command = [*ruff, *words, "--line-length", "240", "--stdin-filename", "utils.py"]
        source = subprocess.run(command, input=source, capture_output=True, text=True, check=True).stdout
    return source


def differences() -> list[str]:
    """Names of the files that are not what would be written, are missing, or are there besides."""
    wanted = files()
    there = {path.name for path in FOLDER.iterdir() if path.is_file()}
    changed = {name for name in wanted.keys() & there if (FOLDER / name).read_text(encoding="utf-8") != wanted[name]}
    return sorted(changed | (wanted.keys() ^ there))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    if parser.parse_args().check:
        for name in (found := differences()):
            print(f"{FOLDER / name} is not what `python tools/upstream_tasks.py` writes")
        return bool(found)
    for path in FOLDER.glob("*.yaml"):
        path.unlink()
    for name, text in files().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
