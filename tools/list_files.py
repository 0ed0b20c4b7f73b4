"""Writes docs/files.md: every file of the project and, in its own first words, what it is.

    python tools/list_files.py [--check]

The words are a file's own: the first sentence of a module's docstring or of the first comment, the title of a page, the
`description` or `title` of a JSON object. `WORDS` has those of files that cannot. Standard library only.
"""

from __future__ import annotations

import argparse
import ast
import fnmatch
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = Path("docs/files.md")
# A line for all files of a pattern: families of small files, and formats without comments.
WORDS = {
    ".github/ISSUE_TEMPLATE/*.yml": "What an issue has to say.",
    "benchmarks/results/*.jsonl": "What the benchmarks printed, a line per run.",
    "docs/files.md": "This page.",
    "docs/method.svg": "The picture of the method.",
    "docs/step_cost.svg": "What a step costs as sizes grow, drawn by benchmarks/growth_plot.py.",
    "eval_tasks/medmnist*.yaml": "A MedMNIST task, variant or group each: three lines, and what they include.",
    "eval_tasks/split.json": "A stand-in, since lmms-eval can only load a file.",
    "eval_tasks/upstream/lmms_eval/tasks/medmnist/_default_template_yaml": "What all sets have in common.",
    "eval_tasks/upstream/lmms_eval/tasks/medmnist/*.yaml": "A set at one size, or all of them with their mean.",
    "eval_tasks/upstream/lmms_eval/tasks/medmnist/medmnist.json": "What each set asks, a line each.",
    "eval_tasks/vitask_drawn*.yaml": "The same for the drawn data of `vitask demo`.",
    "eval_tasks/vitask_folder*.yaml": "The same for anybody's images, and external sets.",
    "eval_tasks/vitask_sets*.yaml": "Groups: every set of a merged folder, and the mean.",
    "LICENSE": "Apache-2.0.",
    "patches/llava-*.json": "The four lines that a LLaVA checkout of that version needs.",
    "vitask_plugin/deepspeed/zero*.json": "ZeRO-2 and ZeRO-3 for the Trainer, each with and without offloading.",
    "vitask_plugin/py.typed": "Says that the package carries types (PEP 561).",
    "vitask_plugin/report/page.html": "The template of the page.",
    "vitask_plugin/report/paper.json": "The paper's published numbers.",
    "vitask_plugin/serve/page.css": "How the page of `vitask serve` looks.",
    "vitask_plugin/serve/result.html": "The template of a judged image.",
}
HEADER = """# The files

Every file and its own first words. Written by `make files`; a test compares it with the tree.
[README.md](README.md) leads through the documents.
"""


def tracked(root: Path) -> list[str]:
    """Files as git sees them: tracked, or new and not ignored."""
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.split("\0")
    return sorted(name for name in {*listed} - {""} if (root / name).is_file())


def sentence(text: str) -> str:
    """The first sentence of the first paragraph, on one line."""
    paragraph = " ".join(re.split(r"\n\s*\n", text.strip())[0].split())
    first = re.split(r"(?<=[.?!])\s+(?=[A-Z`'\"(])", paragraph)[0].removesuffix(":")
    return first if not first or first[-1] in ".?!" else f"{first}."


def commented(text: str) -> str:
    """The first block of `#` lines; empty where the file opens with something else."""
    lines = [line for line in text.splitlines() if not line.startswith("#!")]
    block = []
    for line in lines:
        if not line.startswith("#"):
            break
        block.append(line.lstrip("#").strip())
    return "\n".join(block)


def own_words(path: Path) -> str:
    """What a file says of itself; empty where it says nothing."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return ast.get_docstring(ast.parse(text)) or ""
    if path.suffix == ".ipynb":
        return re.sub(r"^# ", "", "".join(json.loads(text)["cells"][0]["source"]))
    if path.suffix == ".json":
        value = json.loads(text)
        return str(value.get("description") or value.get("title") or "") if isinstance(value, dict) else ""
    if path.suffix == ".md":
        title = re.search(r"^# (.+)$", text, re.MULTILINE)
        return title[1] if title else re.sub(r"^<!-- (.+?) -->.*", r"\1", text, flags=re.DOTALL)
    if path.suffix in (".html", ".svg"):
        note = re.match(r"\s*(?:<[?!][^>]*>\s*)*<!--(.+?)-->", text, re.DOTALL)
        return note[1] if note else ""
    words = commented(text)
    if not words and path.suffix in (".yaml", ".yml"):
        task = re.search(r"^(task|group): *(\S+)$", text, re.MULTILINE)
        words = f"The lmms-eval {task[1]} `{task[2]}`" if task else ""
    return words


def page(root: Path = ROOT) -> str:
    """The text of docs/files.md.

    Raises:
        ValueError: for files that nothing is known about, by name.
    """
    folders: dict[str, list[str]] = {}
    about: dict[str, str] = {}
    silent = []
    for name in tracked(root):
        folder, _, base = name.rpartition("/")
        pattern = next((one for one in WORDS if fnmatch.fnmatchcase(name, one)), None)
        words = WORDS[pattern] if pattern else sentence(own_words(root / name))
        if base == "__init__.py":
            about[folder] = words
            continue
        if not words:
            silent.append(name)
        shown = (pattern or name).removeprefix(f"{folder}/")
        target = base if folder == "docs" else f"../{name}"
        link = f"[`{base}`]({target})" if shown == base else f"`{shown}`"
        lines = folders.setdefault(folder, [])
        lines += [line for line in [f"- {link}: {words}"] if line not in lines]
    if silent:
        raise ValueError(
            f"nothing is known about {', '.join(silent)}; give each a docstring, a first comment or a title, or its "
            "pattern a line in WORDS of tools/list_files.py"
        )
    parts = [HEADER]
    for folder in sorted(folders):
        intro = f"{about[folder]}\n\n" if about.get(folder) else ""
        parts.append(f"## {folder + '/' if folder else 'At the top'}\n\n{intro}" + "\n".join(folders[folder]) + "\n")
    return "\n".join(parts)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if the page is not what it should be")
    args = parser.parse_args(arguments)
    try:
        text = page()
    except ValueError as error:
        print(f"list_files: error: {error}", file=sys.stderr)
        return 1
    path = ROOT / PAGE
    if not args.check:
        if not path.exists():  # it names itself
            path.touch()
            text = page()
        path.write_text(text, encoding="utf-8")
        return 0
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        print(f"list_files: {PAGE} is out of date; run: make files", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
