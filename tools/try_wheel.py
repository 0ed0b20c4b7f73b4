"""Builds wheel and sdist into dist/, checks them, and starts what an empty environment gets from the wheel.

    python tools/try_wheel.py [--with-dependencies]

By default nothing is downloaded: the wheel is installed without its dependencies, by this environment's tools.
`--with-dependencies` installs `[all]` from the index (7 GB) and expects `vitask doctor` to miss LLaVA alone.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
# What neither an import nor a test would miss at once.
IN_WHEEL = (
    "vitask_plugin/py.typed",
    "vitask_plugin/report/page.html",
    "vitask_plugin/report/paper.json",
    "vitask_plugin/serve/page.css",
    "vitask_plugin/serve/result.html",
    "vitask_plugin/deepspeed/zero2.json",
    "vitask_plugin/eval_tasks/medmnist_breast.yaml",
    "vitask_plugin/constraints/transformers-5.txt",
    "vitask_plugin/patches/llava-1.2.2.json",
)


def run(*words: object, **more: object) -> str:
    """What a command printed; one that fails ends this one."""
    command = [str(word) for word in words]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more)
    if done.returncode:
        raise SystemExit(f"try_wheel: error: {' '.join(command)} ended with {done.returncode}:\n{done.stdout[-3000:]}")
    return done.stdout


def build() -> Path:
    """The wheel; sdist and wheel are made by this environment's setuptools, of the files that git knows."""
    shutil.rmtree(DIST, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        listed = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
        for name in names:
            if name and (ROOT / name).is_file():
                target = Path(folder, name)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, target)
        run(sys.executable, "-m", "build", "--no-isolation", "--outdir", DIST, folder)
    run(sys.executable, "-m", "twine", "check", "--strict", *sorted(DIST.iterdir()))
    (wheel,) = DIST.glob("*.whl")
    return wheel


def check_contents(wheel: Path) -> None:
    """Every module of the tree, and data files, are in the wheel; the sdist can make the wheel again."""
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "vitask_plugin").rglob("*.py")}
    missing = sorted({*modules, *IN_WHEEL} - names)
    if missing:
        raise SystemExit(f"try_wheel: error: not in {wheel.name}: {', '.join(missing)}")
    (sdist,) = DIST.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    if missing := sorted({*modules, "eval_tasks/medmnist_breast.yaml", "pyproject.toml"} - held):
        raise SystemExit(f"try_wheel: error: not in {sdist.name}: {', '.join(missing)}")


def install(wheel: Path, folder: Path, whole: bool) -> str:
    """What the empty environment in `folder` says when its `vitask` is started."""
    run(sys.executable, "-m", "venv", folder)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    pip = [folder / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if not whole:
        run(*pip, "--no-deps", "--no-index", wheel, env=clean, cwd=folder)
        return run(folder / "bin/vitask", "--help", env=clean, cwd=folder)
    run(*pip, f"{wheel}[all]", env=clean, cwd=folder)
    doctor = subprocess.run([folder / "bin/vitask", "doctor"], capture_output=True, text=True, env=clean, cwd=folder)
    return doctor.stdout + doctor.stderr


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--with-dependencies", action="store_true", help="install [all] and ask `vitask doctor`")
    args = parser.parse_args()
    wheel = build()
    check_contents(wheel)
    with tempfile.TemporaryDirectory() as folder:
        said = install(wheel, Path(folder), args.with_dependencies)
    if args.with_dependencies:
        print(said)
        if "llava-torch" not in said or "Not usable yet: llava." not in " ".join(said.split()):
            raise SystemExit("try_wheel: error: the doctor does not miss LLaVA alone")
    elif "doctor" not in said:
        raise SystemExit(f"try_wheel: error: `vitask --help` does not name its commands:\n{said}")
    print(f"try_wheel: {', '.join(path.name for path in sorted(DIST.iterdir()))}: built, checked, installed, started")
    return 0


if __name__ == "__main__":
    sys.exit(main())
