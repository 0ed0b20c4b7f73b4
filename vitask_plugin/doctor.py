"""`vitask doctor`: what is installed, what is missing or of an untested version, and what to do about it.

Nothing is written twice: what is required comes from the package's own metadata, the tested versions from the
constraints files that `make setup` installs from, the workarounds from `llava/compat.py`.
"""

import argparse
import importlib
import importlib.metadata
import importlib.resources
import importlib.util
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vitask_plugin.errors import VITaskError

DISTRIBUTION = "vitask-plugin"
UPSTREAM = "llava-torch"
PRIMARY_ROW = "transformers-5"
NEEDED_FOR = {"eval": "evaluation with lmms-eval"}
# In a clone; whoever installed the wheel has no Makefile.
IN_CLONE = (Path(__file__).resolve().parents[1] / "Makefile").is_file()
REPAIR = "make setup" if IN_CLONE else f"pip install --upgrade '{DISTRIBUTION}[all]'"
OK, UNTESTED, MISSING, NOTE = "ok", "untested", "missing", "note"
STYLES = {OK: "green", UNTESTED: "yellow", MISSING: "bold red", NOTE: "dim"}


@dataclass(frozen=True)
class Finding:
    """One line of the table. `state` is ok, untested, missing or note; only a required `missing` fails the doctor."""

    subject: str
    found: str
    state: str
    remedy: str = ""
    required: bool = True


def tested_versions(python: str, transformers: str | None) -> tuple[str, dict[str, str]]:
    """The row of the compatibility table that fits the installed transformers, and its `{name: version}`.

    Args:
        python: version of Python, such as "3.11".
        transformers: installed version, or None for the primary row.

    Returns:
        The row's name and its pins, names normalised as pip does.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    rows: dict[str, dict[str, str]] = {}
    try:
        files = list(importlib.resources.files("vitask_plugin.constraints").iterdir())
    except ModuleNotFoundError:
        files = []
    for file in files:
        if not file.name.endswith(".txt"):
            continue
        lines = (line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
        pins = {}
        for requirement in (Requirement(line) for line in lines if line):
            if requirement.marker is None or requirement.marker.evaluate({"python_version": python}):
                pins[canonicalize_name(requirement.name)] = next(iter(requirement.specifier)).version
        rows[file.name.removesuffix(".txt")] = pins
    if PRIMARY_ROW not in rows:
        raise VITaskError(f"the tested versions are not installed with {DISTRIBUTION}; reinstall it ({REPAIR})")
    major = (transformers or rows[PRIMARY_ROW]["transformers"]).split(".")[0]
    for row, pins in sorted(rows.items()):
        if pins["transformers"].split(".")[0] == major:
            return row, pins
    return PRIMARY_ROW, rows[PRIMARY_ROW]


def installed_version(name: str) -> str | None:
    """Version of an installed distribution, None if there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_python() -> Finding:
    """The interpreter's version."""
    from packaging.specifiers import SpecifierSet

    version = platform.python_version()
    supported = importlib.metadata.metadata(DISTRIBUTION)["Requires-Python"]
    good = SpecifierSet(supported).contains(version, prereleases=True)
    return Finding("python", version, OK if good else MISSING, "" if good else f"use a Python {supported}")


def check_packages(pins: dict[str, str]) -> Iterator[Finding]:
    """Every requirement of the package's own metadata, the extras' too (`dev` aside): there, in range, tested?"""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    for text in importlib.metadata.requires(DISTRIBUTION) or []:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        extra = next((e for e in NEEDED_FOR if requirement.marker and requirement.marker.evaluate({"extra": e})), None)
        if name == DISTRIBUTION or (requirement.marker and extra is None):
            continue
        purpose = f" (needed for {NEEDED_FOR[extra]})" if extra else ""
        version = installed_version(name)
        tested = pins.get(name)
        if version is None:
            remedy = f"{REPAIR}, or: pip install '{name}=={tested}'{purpose}"
            yield Finding(name, "-", MISSING, remedy, required=extra is None)
        elif not requirement.specifier.contains(version, prereleases=True):
            remedy = f"{REPAIR}, or: pip install '{name}=={tested}' (it has to be {requirement.specifier})"
            yield Finding(name, version, MISSING, remedy, required=extra is None)
        else:
            yield judge_version(name, version, tested)


def judge_version(name: str, version: str, tested: str | None) -> Finding:
    """`version` beside the tested one; a local label such as `+cu130` makes no difference."""
    if tested is None or version.partition("+")[0] == tested:
        return Finding(name, version, OK)
    return Finding(name, version, UNTESTED, f"tested with {tested}; if something fails: pip install '{name}=={tested}'")


def check_upstream(pins: dict[str, str]) -> Finding:
    """LLaVA, from its wheel (llava-torch), from a checkout (dist `llava`) or from the path."""
    tested = pins[UPSTREAM]
    if importlib.util.find_spec("llava") is None:
        command = f"pip install --no-deps {UPSTREAM}=={tested}"
        remedy = f"{REPAIR}, or: {command}" if IN_CLONE else command
        remedy += " (its own pins are too old)"
        return Finding("llava", "-", MISSING, remedy)
    version = installed_version(UPSTREAM) or installed_version("llava")
    if version is None:
        return Finding("llava", "of unknown version", UNTESTED, f"tested with {UPSTREAM} {tested}")
    finding = judge_version(UPSTREAM, version, tested)
    return Finding("llava", version, finding.state, finding.remedy.replace("install '", "install --no-deps '"))


def check_torch() -> Finding:
    """torch and torchvision fit each other (a CPU build of one beside a default build of the other does not)."""
    try:
        import torch
        import torchvision
    except Exception as error:
        remedy = f"{REPAIR}; torch and torchvision have to be builds of one kind ({type(error).__name__}: {error})"
        return Finding("torch + torchvision", "do not import", MISSING, remedy)
    if torch.cuda.is_available():
        device = f"CUDA {torch.version.cuda}, {torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    else:
        device = "no CUDA device: training and evaluation run on the CPU"
    return Finding("torch + torchvision", f"{torch.__version__}, {torchvision.__version__}; {device}", OK)


def check_mends() -> Iterator[Finding]:
    """The workarounds that upstream LLaVA needs beside this transformers, and whether they could be made."""
    try:
        from vitask_plugin.llava import compat

        compat.prepare()
        importlib.import_module("llava.train.train")  # what the workarounds are for
    except Exception as error:
        remedy = f"{REPAIR} brings the tested versions ({type(error).__name__}: {error})"
        yield Finding("llava's training script", "does not import", MISSING, remedy)
        return
    needed = [one.name for one in compat.WORKAROUNDS if one.needed()]
    yield Finding("llava's training script", f"imports; workarounds in force: {', '.join(needed) or 'none needed'}", OK)


def check_harness() -> Finding:
    """lmms-eval's own registry finds our models, through the entry-point group `lmms_eval.models`."""
    name = "lmms-eval models vitask_hf, vitask_llava"
    if importlib.util.find_spec("lmms_eval") is None:
        return Finding(name, "lmms-eval is not installed", NOTE, required=False)
    try:
        # Not an import statement: the doctor has to start where lmms-eval is absent or broken.
        registry = importlib.import_module("lmms_eval.models")
        for model in ("vitask_llava", "vitask_hf"):
            registry.get_model_manifest(model)
    except Exception as error:
        remedy = f"reinstall {DISTRIBUTION} ({REPAIR}): lmms-eval says {type(error).__name__}: {error}"
        return Finding(name, "not registered", MISSING, remedy)
    return Finding(name, "registered", OK)


def check_data() -> Finding:
    """Where medmnist's files are looked for; a note, since tasks download what is absent."""
    root = Path(os.environ.get("MEDMNIST_ROOT") or Path.home() / ".medmnist")
    files = sorted(path.stem for path in root.glob("*.npz")) if root.is_dir() else []
    origin = "MEDMNIST_ROOT" if os.environ.get("MEDMNIST_ROOT") else "MEDMNIST_ROOT is not set"
    holds = ", ".join(files) if files else "no files yet; they are downloaded when a task needs them"
    return Finding("medmnist data", f"{root} ({origin}): {holds}", NOTE, required=False)


def examine() -> tuple[str, list[Finding]]:
    """Everything the doctor looks at.

    Returns:
        Name of the compatibility row that was compared with, and the findings in the order of the table.
    """
    row, pins = tested_versions(".".join(platform.python_version_tuple()[:2]), installed_version("transformers"))
    findings = [check_python(), *check_packages(pins), check_upstream(pins)]
    absent = {finding.subject for finding in findings if finding.state == MISSING}
    if not absent & {"torch", "torchvision"}:
        findings.append(check_torch())
    if not any(finding.state == MISSING and finding.required for finding in findings):
        findings.extend(check_mends())
    return row, [*findings, check_harness(), check_data()]


def configure(parser: argparse.ArgumentParser) -> None:
    """`vitask doctor` takes no arguments."""
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the table; 1 if something required is missing.

    Raises:
        VITaskError: if even the two packages that the doctor itself needs are missing.
    """
    try:
        importlib.import_module("packaging.requirements")
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
    except ImportError as error:
        raise VITaskError(f"{error.name} is not installed, and the doctor itself needs it; run {REPAIR}") from None

    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    with console.status("looking at what is installed"):
        row, findings = examine()
    table = Table(title=f"vitask doctor (tested versions: constraints/{row}.txt)", title_justify="left")
    table.add_column("what", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("found")
    table.add_column("what to do")
    for finding in findings:
        state = f"[{STYLES[finding.state]}]{finding.state}[/]"
        table.add_row(finding.subject, state, escape(finding.found), escape(finding.remedy))
    console.print(table)
    missing = [finding.subject for finding in findings if finding.state == MISSING and finding.required]
    untested = [finding.subject for finding in findings if finding.state == UNTESTED]
    optional = [finding.subject for finding in findings if finding.state == MISSING and not finding.required]
    if missing:
        alone = missing == ["llava"] and not IN_CLONE
        command = next(finding.remedy for finding in findings if finding.subject == "llava") if alone else REPAIR
        console.print(f"[bold red]Not usable yet:[/] {', '.join(missing)}. Repair all of it with: {escape(command)}")
        return 1
    if untested or optional:
        parts = [f"untested: {', '.join(untested)}"] * bool(untested)
        parts += [f"absent: {', '.join(optional)}"] * bool(optional)
        console.print(f"[yellow]Usable[/]; {'; '.join(parts)}.")
    else:
        console.print("[green]Everything is there, at tested versions.[/]")
    return 0
