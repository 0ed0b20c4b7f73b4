"""`vitask ...`: its table of commands, its exit statuses, the folder of tasks, and the doctor."""

import importlib
import importlib.metadata
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from vitask_plugin import __version__, cli, doctor
from vitask_plugin.errors import VITaskError

ROOT = Path(__file__).resolve().parent.parent


def python(*arguments: str, **settings: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300, **settings)


def test_installed_command_tells_its_version() -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "vitask", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"vitask {__version__}\n"
    assert importlib.metadata.version("vitask-plugin") == __version__


@pytest.mark.parametrize(("words", "module", "help_text"), cli.COMMANDS)
def test_every_command_has_its_own_help(
    words: tuple[str, ...], module: str, help_text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert callable(importlib.import_module(module).configure)
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.main([*words, "--help"])
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: vitask {' '.join(words)} ")
    assert help_text[1:] in " ".join(shown.split())


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.main(["--help"])
    shown = capsys.readouterr().out
    assert {words[0] for words, _, _ in cli.COMMANDS} <= set(shown.split())


def test_help_imports_nothing_heavy() -> None:
    source = (
        "import sys\nfrom vitask_plugin import cli\ntry:\n    cli.main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print('HEAVY', sorted({'torch', 'transformers', 'llava', 'lmms_eval', 'timm', 'rich'} & set(sys.modules)))"
    )
    assert python("-c", source).stdout.splitlines()[-1] == "HEAVY []"


def test_bad_input_is_one_sentence_and_status_1(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["patch", str(tmp_path)]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("vitask: error: ")
    assert shown.err.count("\n") == 1
    assert str(tmp_path) in shown.err


def test_interrupt_is_one_line_and_status_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "print_tasks_path", interrupt)
    assert cli.main(["tasks-path"]) == 130
    assert capsys.readouterr().err == "vitask: interrupted\n"


@pytest.mark.parametrize("words", [[], ["data"], ["nonsense"], ["tasks-path", "extra"]])
def test_wrong_words_are_status_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        cli.main(words)
    assert "usage: vitask" in capsys.readouterr().err


def test_tasks_path_of_this_install(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tasks-path"]) == 0
    folder = Path(capsys.readouterr().out.removesuffix("\n"))
    assert folder == ROOT / "eval_tasks"
    assert list(folder.glob("medmnist_*.yaml"))


@pytest.fixture(scope="module")
def installed_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the project, built offline from a copy (a build leaves folders behind) and unpacked."""
    source = tmp_path_factory.mktemp("wheel") / "source"
    ignore = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "demo", "tests")
    shutil.copytree(ROOT, source, ignore=ignore)
    wheels = source.parent / "wheels"
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(wheels)]
    done = python("-m", "pip", "wheel", *options, str(source))
    assert done.returncode == 0, done.stderr
    (wheel,) = wheels.glob("*.whl")
    unpacked = source.parent / "site-packages"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    return unpacked


def test_wheel_carries_tasks_patches_and_tested_versions(installed_wheel: Path) -> None:
    for folder in ("eval_tasks", "patches", "constraints"):
        kept = {path.name for path in (ROOT / folder).iterdir() if path.is_file()}
        assert {path.name for path in (installed_wheel / "vitask_plugin" / folder).iterdir()} == kept
    found = [path for suffix in ("py", "json") for path in (ROOT / "vitask_plugin").rglob(f"*.{suffix}")]
    sources = {path.relative_to(ROOT) for path in found}
    assert {source for source in sources if not (installed_wheel / source).is_file()} == set()
    assert "License-Expression: Apache-2.0" in next(installed_wheel.glob("*.dist-info/METADATA")).read_text()
    assert "lmms_eval.models" in next(installed_wheel.glob("*.dist-info/entry_points.txt")).read_text()


def test_tasks_path_of_an_installed_wheel(installed_wheel: Path, tmp_path: Path) -> None:
    path = f"import sys; sys.path.insert(0, {str(installed_wheel)!r})"
    source = f"{path}; from vitask_plugin import cli; cli.main(['tasks-path'])"
    done = python("-I", "-c", source, cwd=tmp_path)
    assert done.stdout == f"{installed_wheel.resolve() / 'vitask_plugin' / 'eval_tasks'}\n", done.stderr


@pytest.mark.compat
def test_doctor_finds_this_install_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for name in (
        "torch",
        "llava",
        "lmms-eval",
        "deepspeed",
        "timm",
        "peft",
        "transformers",
        "medmnist",
        "sentencepiece",
    ):
        row = re.search(rf"^.\s*{name}\s+.\s+(\w+)\s", shown, re.MULTILINE)
        assert row, f"no row for {name}"
        assert row[1] in ("ok", "untested")
    assert re.search(r"vitask_llava\s+.\s+ok\s", shown)
    major = importlib.metadata.version("transformers").split(".")[0]
    assert f"constraints/transformers-{major}.txt" in shown


def test_doctor_names_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = doctor.installed_version
    monkeypatch.setattr(doctor, "installed_version", lambda name: None if name in ("peft", "deepspeed") else real(name))
    assert cli.main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert re.search(r"peft\s+.\s+missing", shown)
    assert "Not usable yet: deepspeed, peft. Repair all of it with: make setup" in shown


def test_doctor_does_not_fail_on_what_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor.installed_version
    monkeypatch.setattr(doctor, "installed_version", lambda name: None if name == "lmms-eval" else real(name))
    findings = {finding.subject: finding for finding in doctor.check_packages({})}
    assert findings["lmms-eval"].state == doctor.MISSING
    assert not findings["lmms-eval"].required
    assert "evaluation with lmms-eval" in findings["lmms-eval"].remedy
    assert "pytest" not in findings


def test_doctor_on_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed_version", lambda name: {"peft": "0.99.0", "timm": "0.1"}.get(name, "5.23.0"))
    findings = {finding.subject: finding for finding in doctor.check_packages({"peft": "0.21.2", "timm": "1.0.31"})}
    assert findings["peft"].state == doctor.UNTESTED
    assert "0.21.2" in findings["peft"].remedy
    assert findings["timm"].state == doctor.MISSING  # below the range of pyproject.toml
    assert "1.0.31" in findings["timm"].remedy
    assert doctor.judge_version("torch", "2.14.1+cu130", "2.14.1").state == doctor.OK


@pytest.mark.parametrize(
    ("python_version", "transformers"), [("3.10", "5.20.2"), ("3.11", "5.23.0"), ("3.12", "5.23.0")]
)
def test_tested_versions_by_python_and_transformers(python_version: str, transformers: str) -> None:
    row, pins = doctor.tested_versions(python_version, "5.0.0")
    assert (row, pins["transformers"]) == ("transformers-5", transformers)
    assert doctor.tested_versions(python_version, None) == (row, pins)
    row, pins = doctor.tested_versions(python_version, "4.57.1")
    assert (row, pins["transformers"]) == ("transformers-4", "4.57.6")
    assert pins["sentencepiece"] == "0.2.1"


@pytest.mark.parametrize("python_version", ["3.10", "3.11", "3.12"])
@pytest.mark.parametrize("transformers", ["4.57.6", "5.23.0"])
def test_tested_versions_meet_every_requirement(python_version: str, transformers: str) -> None:
    _, pins = doctor.tested_versions(python_version, transformers)
    requirements = [Requirement(text) for text in importlib.metadata.requires("vitask-plugin") or []]
    checked = [item for item in requirements if canonicalize_name(item.name) != "vitask-plugin"]
    if transformers.startswith("4."):  # whose huggingface-hub gradio does not take: the row has no [serve]
        assert "gradio" not in pins
        checked = [item for item in checked if 'extra == "serve"' not in str(item.marker)]
    assert len(checked) > 15
    assert [str(item) for item in checked if pins[canonicalize_name(item.name)] not in item.specifier] == []


def test_doctor_without_upstream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    finding = doctor.check_upstream({"llava-torch": "1.2.2.post1"})
    assert finding.state == doctor.MISSING
    assert "--no-deps llava-torch==1.2.2.post1" in finding.remedy


def test_doctor_of_a_wheel_names_the_one_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever installed `vitask-plugin[all]` lacks LLaVA alone, and has no Makefile."""
    real = doctor.importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name == "llava" else real(name))
    monkeypatch.setattr(doctor, "IN_CLONE", False)
    assert cli.main(["doctor"]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "Not usable yet: llava. Repair all of it with: pip install --no-deps llava-torch==1.2.2.post1" in shown
    assert "make setup" not in shown.partition("Not usable yet")[2]


def test_doctor_on_an_unsupported_python(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_python().state == doctor.OK
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.13.0")
    finding = doctor.check_python()
    assert finding.state == doctor.MISSING
    assert ">=3.10" in finding.remedy


def test_doctor_without_its_own_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(VITaskError, match=r"rich.* is not installed.*make setup"):
        doctor.run(None)
