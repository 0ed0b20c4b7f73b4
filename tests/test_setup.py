"""The script behind `make setup`, run for real on a small stand-in project: an own index folder, no network.

The stand-in needs nothing but a made-up `llava-torch` and builds itself, so that a whole install takes seconds.
"""

import base64
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
BACKEND = '''"""The stand-in's build backend: an editable wheel that holds a path."""
import zipfile
from pathlib import Path


def get_requires_for_build_editable(settings=None):
    return []


def build_editable(directory, settings=None, metadata=None):
    name = "vitask_plugin-0.1.0-py3-none-any.whl"
    info = "vitask_plugin-0.1.0.dist-info/"
    requires = "Requires-Dist: small-package\\nProvides-Extra: all\\nProvides-Extra: dev\\n"
    files = {
        "vitask_plugin.pth": str(Path.cwd()),
        info + "METADATA": "Metadata-Version: 2.1\\nName: vitask-plugin\\nVersion: 0.1.0\\n" + requires,
        info + "WHEEL": "Wheel-Version: 1.0\\nGenerator: stand-in\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
    }
    files[info + "RECORD"] = "".join(f"{path},,\\n" for path in files) + f"{info}RECORD,,\\n"
    with zipfile.ZipFile(Path(directory, name), "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return name
'''
PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""


def load(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


setup_env = load("setup_env")
lock = load("lock")


def write_wheel(folder: Path, name: str, version: str, files: dict[str, str]) -> None:
    """A small real wheel, with hashes and sizes in its RECORD."""
    info = f"{name}-{version}.dist-info/"
    files = {
        **files,
        info + "METADATA": f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n",
        info + "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    lines = []
    for path, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        lines.append(f"{path},sha256={digest},{len(text.encode())}\n")
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, text in {**files, info + "RECORD": "".join(lines) + f"{info}RECORD,,\n"}.items():
            archive.writestr(path, text)


class Project:
    """A stand-in project with its Makefile and setup script."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.wheels = root / "wheels"
        self.venv = root / ".venv"
        (root / "tools").mkdir(parents=True)
        self.wheels.mkdir()
        shutil.copy(ROOT / "tools" / "setup_env.py", root / "tools")
        shutil.copy(ROOT / "Makefile", root)
        (root / "backend.py").write_text(BACKEND)
        (root / "pyproject.toml").write_text(PYPROJECT)
        (root / "constraints").mkdir()
        self.pin("1.0")
        for version in ("1.0", "2.0"):
            write_wheel(
                self.wheels, "small_package", version, {"small_package/__init__.py": f"version = '{version}'\n"}
            )
        write_wheel(self.wheels, "llava_torch", "1.2.2.post1", {"llava/__init__.py": "", "llava/extra.py": "x = 1\n"})

    def pin(self, version: str) -> None:
        pip = importlib.util.find_spec("ensurepip").submodule_search_locations[0]
        (bundled,) = Path(pip, "_bundled").glob("pip-*.whl")
        lines = [f"pip=={bundled.name.split('-')[1]}", "llava-torch==1.2.2.post1", f"small-package=={version}"]
        (self.root / "constraints" / "transformers-5.txt").write_text("# tested\n" + "\n".join(lines) + "\n")

    def environment(self, **settings: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "MAKE", "MFLAGS"))}
        local = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.wheels), "PIP_CONFIG_FILE": os.devnull}
        return {**kept, "PYTHON": sys.executable, **local, **settings}

    def setup(self, *arguments: str, **settings: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-I", str(self.root / "tools" / "setup_env.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, env=self.environment(**settings))

    def run(self, source: str) -> str:
        done = subprocess.run([self.venv / "bin" / "python", "-c", source], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else done.stderr.strip().splitlines()[-1]

    @property
    def packages(self) -> Path:
        return next((self.venv / "lib").glob("python*/site-packages"))

    @property
    def stamp(self) -> Path:
        return self.venv / setup_env.STAMP

    def works(self) -> bool:
        source = (
            "import small_package, llava.extra, backend; print(small_package.version, llava.extra.x, backend.__file__)"
        )
        return self.run(source) == f"1.0 1 {self.root / 'backend.py'}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A stand-in project after its first setup; tests that damage it have it repaired."""
    project = Project(tmp_path_factory.mktemp("project") / "clone")
    done = project.setup()
    assert done.returncode == 0, done.stdout + done.stderr
    assert ".venv is not ready: it does not exist yet" in done.stdout
    assert ".venv is ready" in done.stdout
    return project


def assert_repaired(project: Project, problem: str) -> None:
    """Setup names the problem, repairs it, and finds nothing to do afterwards."""
    checked = project.setup("--check")
    assert checked.returncode == 1
    assert problem in checked.stdout, checked.stdout
    done = project.setup()
    assert done.returncode == 0, done.stdout + done.stderr
    assert problem in done.stdout
    assert project.works()
    assert project.setup("--check").stdout == ""


def test_first_setup_installs_and_the_second_nothing(finished: Project) -> None:
    assert finished.works()
    before = {path: path.stat().st_mtime_ns for path in finished.packages.rglob("*") if path.suffix != ".pyc"}
    log = (finished.venv / "vitask-setup.log").read_bytes()
    done = finished.setup()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert {path: path.stat().st_mtime_ns for path in finished.packages.rglob("*") if path.suffix != ".pyc"} == before
    assert (finished.venv / "vitask-setup.log").read_bytes() == log


def test_make_setup_starts_the_script(finished: Project) -> None:
    environment = finished.environment(PYTHONPATH="/nonexistent")
    done = subprocess.run(["make", "setup"], cwd=finished.root, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_damage_is_named_and_repaired(finished: Project) -> None:
    """A deleted module, a truncated file, a package gone without a trace, and one of another version, in one repair."""
    shutil.rmtree(finished.packages / "small_package")
    assert "small_package-1.0: small_package/__init__.py is missing" in finished.setup("--check").stdout
    (finished.packages / "llava" / "extra.py").write_text("x")
    checked = finished.setup("--check").stdout
    assert "llava_torch-1.2.2.post1: llava/extra.py was changed or cut short" in checked
    assert "small_package/__init__.py is missing" in checked
    command = [
        finished.venv / "bin" / "python",
        "-m",
        "pip",
        "install",
        "-q",
        "--force-reinstall",
        "small-package==2.0",
    ]
    subprocess.run(command, check=True, env=finished.environment())
    assert "small-package is 2.0, not 1.0" in finished.setup("--check").stdout
    for info in finished.packages.glob("vitask_plugin-*.dist-info"):
        shutil.rmtree(info)
    assert_repaired(finished, "vitask-plugin 0.1.0 is missing")


def test_interrupted_install_is_noticed_and_repaired(finished: Project) -> None:
    # pip writes RECORD last: this is what is left when it is killed in the middle of a package.
    finished.stamp.unlink()
    next(finished.packages.glob("small_package-*.dist-info/RECORD")).unlink()
    (finished.packages / "small_package" / "__init__.py").unlink()
    assert_repaired(finished, "the last install did not finish")


def test_killed_setup_is_noticed_and_repaired(finished: Project) -> None:
    """Really killed, with its pip, at some moment of a real install."""
    shutil.rmtree(finished.venv)
    command = [sys.executable, "-I", str(finished.root / "tools" / "setup_env.py")]
    environment = finished.environment()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    until = time.monotonic() + 120
    while not (finished.venv / "vitask-setup.log").exists() and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not finished.stamp.exists()
    assert_repaired(finished, "the last install did not finish")


@pytest.mark.parametrize("damage", ["no python", "no pip"])
def test_half_made_environment_is_made_anew(finished: Project, damage: str) -> None:
    if damage == "no python":
        for path in (finished.venv / "bin").glob("python*"):
            path.unlink()
    else:
        shutil.rmtree(finished.packages / "pip")
    done = finished.setup()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "making .venv with" in done.stdout
    assert finished.works()


def test_changed_versions_are_installed(finished: Project) -> None:
    finished.pin("2.0")
    assert finished.setup().returncode == 0
    assert finished.run("import small_package; print(small_package.version)") == "2.0"
    finished.pin("1.0")
    assert_repaired(finished, "the tested versions, pyproject.toml, Python or the folder changed")


def test_moved_project_is_noticed_and_repaired(finished: Project, tmp_path: Path) -> None:
    moved = Project.__new__(Project)
    moved.root, moved.wheels, moved.venv = tmp_path / "moved", finished.wheels, tmp_path / "moved" / ".venv"
    shutil.copytree(finished.root, moved.root, symlinks=True)
    assert not moved.works()
    assert_repaired(moved, "the folder changed")


def test_failed_pip_is_one_sentence_and_leaves_no_stamp(finished: Project) -> None:
    finished.pin("3.0")
    done = finished.setup()
    assert done.returncode == 1
    assert done.stderr.startswith("setup: error: pip could not install the requirements: ERROR")
    assert done.stderr.count("\n") == 1
    assert "small-package==3.0" in (finished.venv / "vitask-setup.log").read_text()
    assert "run the same command again" in done.stderr
    assert not finished.stamp.exists()
    finished.pin("1.0")
    assert_repaired(finished, "the last install did not finish")


def test_unreadable_stamp_is_noticed_and_repaired(finished: Project) -> None:
    finished.stamp.write_text(json.dumps({"key": "x"})[:-3])
    assert_repaired(finished, "its stamp is not readable")


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path: Path) -> None:
    project = Project(tmp_path / "clone")
    project.venv.mkdir()
    (project.venv / "thesis.txt").write_text("mine")
    done = project.setup()
    assert done.returncode == 1
    assert "is not a virtual environment; move it away" in done.stderr
    assert (project.venv / "thesis.txt").read_text() == "mine"


def test_unknown_row_is_refused(tmp_path: Path) -> None:
    done = Project(tmp_path / "clone").setup("--row", "transformers-9")
    assert done.returncode == 1
    assert done.stderr == "setup: error: there is no row 'transformers-9' in constraints/; there are: transformers-5\n"


def fake_python(folder: Path, name: str, script: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_python_outside_the_range_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_python(tmp_path, "python3.11", "exit 127")  # such as a pyenv shim whose version is not selected
    fake_python(tmp_path, "python3.12", "echo 3 13 1")
    good = fake_python(tmp_path, "python3.10", "echo 3 10 4")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert setup_env.find_python(None) == "python3.10"
    good.unlink()
    monkeypatch.setattr(setup_env.sys, "executable", str(tmp_path / "python3.12"))
    with pytest.raises(setup_env.SetupError) as caught:
        setup_env.find_python(None)
    assert "Python 3.10, 3.11 or 3.12" in str(caught.value)
    assert "python3.12 is 3.13.1" in str(caught.value)
    assert "python3.11 does not run or lacks the venv module" in str(caught.value)


def test_named_python_is_the_only_one_tried(tmp_path: Path) -> None:
    old = fake_python(tmp_path, "old", "echo 3 9 2")
    with pytest.raises(setup_env.SetupError, match=r"old is 3\.9\.2"):
        setup_env.find_python(str(old))
    assert setup_env.find_python(sys.executable) == sys.executable


@pytest.mark.parametrize(("row", "extras"), [("transformers-4", "all,dev"), ("transformers-5", "all,dev,serve")])
def test_an_extra_is_installed_where_the_row_has_its_versions(row: str, extras: str) -> None:
    pins = setup_env.read_pins((ROOT / "constraints" / f"{row}.txt").read_text(encoding="utf-8"), (3, 11))
    assert setup_env.extras_of(pins) == extras
    assert ({"gradio", "fastapi", "uvicorn", "starlette"} <= pins.keys()) == ("serve" in extras)


@pytest.mark.parametrize("row", ["transformers-4", "transformers-5"])
@pytest.mark.parametrize("version", [(3, 10), (3, 11), (3, 12)])
def test_pins_are_read_as_pip_reads_them(row: str, version: tuple[int, int]) -> None:
    text = (ROOT / "constraints" / f"{row}.txt").read_text()
    requirements = [Requirement(line) for line in text.splitlines() if line and not line.startswith("#")]
    here = {"python_version": ".".join(map(str, version))}
    held = [item for item in requirements if item.marker is None or item.marker.evaluate(here)]
    expected = {canonicalize_name(item.name): str(item.specifier).removeprefix("==") for item in held}
    assert len(expected) == len(held) > 150
    assert setup_env.read_pins(text, version) == expected


@pytest.mark.parametrize("line", ["torch>=2", "torch", "-e .", 'torch==2 ; sys_platform == "linux"'])
def test_a_constraint_that_is_no_exact_version_is_refused(line: str) -> None:
    with pytest.raises(setup_env.SetupError, match="line 2"):
        setup_env.read_pins(f"# tested\n{line}\n", (3, 11))


def test_lock_merges_pythons_with_markers() -> None:
    lines = lock.merge(
        {(3, 12): {"a": "2", "b": "1"}, (3, 10): {"a": "1", "b": "1", "c": "7"}, (3, 11): {"a": "2", "b": "1"}}
    )
    assert lines == ['a==1 ; python_version < "3.11"', 'a==2 ; python_version >= "3.11"', "b==1", "c==7"]
    with pytest.raises(ValueError, match="three versions"):
        lock.merge({(3, 10): {"a": "1"}, (3, 11): {"a": "2"}, (3, 12): {"a": "3"}})
