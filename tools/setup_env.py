"""Makes the virtual environment, notices a broken one and repairs it. Standard library only.

    python3 tools/setup_env.py [--row transformers-5] [--venv .venv] [--check]

Any Python 3 may start it: it looks for a Python 3.10-3.12 itself. A row is a file of tested versions in constraints/.
When everything was installed, a stamp with the installed packages is left in the environment; the next run compares the
stamp, and every installed file's presence and size, with what is there, and installs nothing if they agree.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUPPORTED = ((3, 10), (3, 11), (3, 12))
PREFERRED = ("python3.11", "python3.12", "python3.10", "python3", "python")  # 3.11 is the one tested most
STAMP = "vitask-setup.json"
EXTRAS = ("all", "dev")
PINNED_EXTRAS = {"serve": "gradio"}  # installed where the row has a version of what they are about
UPSTREAM = "llava-torch"  # pins torch 2.0.1 and transformers 4.36.2, so its own requirements are not installed
ROOM = 8 << 30  # bytes that a fresh environment takes, a little more than was measured
# Settings of the caller that would lead an install out of the environment.
FOREIGN = ("PYTHONPATH", "PYTHONHOME", "PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_CONSTRAINT", "PIP_NO_DEPS")

PROBE = "import sys, venv, ensurepip; print(*sys.version_info[:3])"
PIN = re.compile(r'^([A-Za-z0-9._-]+)==([^\s;]+)\s*(?:;\s*python_version\s*(<|>=)\s*"(\d+)\.(\d+)")?$')


class SetupError(Exception):
    """What went wrong and what to do, in one sentence."""


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def read_pins(text: str, python: tuple[int, ...]) -> dict[str, str]:
    """`{name: version}` of the lines of a constraints file that hold for `python`.

    Only the form that tools/lock.py writes is read: `name==version`, with an optional bound on python_version.
    """
    pins = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        match = PIN.match(line)
        if not match:
            raise SetupError(f"line {number} of the constraints file is not name==version: {line!r}")
        name, version, relation, major, minor = match.groups()
        if relation:
            older = tuple(python[:2]) < (int(major), int(minor))
            if older != (relation == "<"):
                continue
        pins[normalized(name)] = version
    return pins


def extras_of(pins: dict[str, str]) -> str:
    """What a row installs of the project's extras, as pip takes them."""
    return ",".join([*EXTRAS, *(extra for extra, name in PINNED_EXTRAS.items() if name in pins)])


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in FOREIGN}


def probe(name: str) -> tuple[int, ...] | None:
    """Version of a Python that can make environments; None if it is absent or cannot."""
    try:
        done = subprocess.run(
            [name, "-I", "-c", PROBE],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment(),
            timeout=60,
        )
        return tuple(int(part) for part in done.stdout.split()) if done.returncode == 0 else None
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None


def find_python(wanted: str | None, candidates: tuple[str, ...] = PREFERRED) -> str:
    """Path or name of a Python 3.10-3.12 with venv and ensurepip: `wanted` if given, else the first that works."""
    names = [wanted] if wanted else [*candidates, sys.executable]
    seen = {}
    for name in names:
        version = probe(name)
        if version and version[:2] in SUPPORTED:
            return name
        if version or shutil.which(name):
            what = f"is {'.'.join(map(str, version))}" if version else "does not run or lacks the venv module"
            seen.setdefault(os.path.realpath(shutil.which(name) or name), f"{name} {what}")
    found = "; ".join(seen.values()) or "none was found"
    raise SetupError(
        f"Python 3.10, 3.11 or 3.12 with its venv module is needed ({found}); "
        "install one (Debian and Ubuntu: python3.11 and python3.11-venv) "
        "or name it: make setup PYTHON=/path/to/python3.11"
    )


class Environment:
    """One virtual environment and the row of tested versions that it should hold."""

    def __init__(self, folder: Path, row: str, root: Path = ROOT) -> None:
        self.folder = folder
        self.root = root
        self.constraints = root / "constraints" / f"{row}.txt"
        if not self.constraints.is_file():
            rows = ", ".join(sorted(path.stem for path in (root / "constraints").glob("*.txt")))
            raise SetupError(f"there is no row {row!r} in constraints/; there are: {rows}")
        self.python = folder / "bin" / "python"
        self.stamp = folder / STAMP
        self.log = folder / "vitask-setup.log"

    def version(self) -> tuple[int, ...] | None:
        """Version of the environment's Python; None if the environment is missing or its Python does not run."""
        if not (self.folder / "pyvenv.cfg").is_file():
            return None
        return probe(str(self.python))

    def packages(self, version: tuple[int, ...]) -> Path:
        return self.folder / "lib" / f"python{version[0]}.{version[1]}" / "site-packages"

    def key(self, version: tuple[int, ...]) -> str:
        """What a finished environment depends on: the versions, the project's metadata, Python, and the two places."""
        digest = hashlib.sha256()
        for part in (
            self.constraints.read_bytes(),
            (self.root / "pyproject.toml").read_bytes(),
            repr((version, str(self.root), str(self.folder))).encode(),
        ):
            digest.update(hashlib.sha256(part).digest())
        return digest.hexdigest()

    def installed(self, version: tuple[int, ...]) -> dict[str, str]:
        found = {}
        for entry in self.packages(version).glob("*.dist-info"):
            name, _, number = entry.name[: -len(".dist-info")].rpartition("-")
            found[normalized(name)] = number
        return found

    def damage(self, version: tuple[int, ...]) -> dict[str, str]:
        """`{dist-info folder: the first thing wrong}`: a file that is missing or of another size than installed."""
        packages = str(self.packages(version))
        broken = {}
        for entry in Path(packages).glob("*.dist-info"):
            try:
                with open(entry / "RECORD", encoding="utf-8", newline="") as file:
                    rows = list(csv.reader(file))
            except OSError:
                broken[entry.name] = "was interrupted while it was installed"
                continue
            for row in rows:
                if len(row) != 3 or row[0].endswith(".pyc"):
                    continue
                try:
                    size = os.stat(os.path.join(packages, row[0])).st_size
                except OSError:
                    broken[entry.name] = f"{row[0]} is missing"
                    break
                if row[2] and size != int(row[2]):
                    broken[entry.name] = f"{row[0]} was changed or cut short"
                    break
        return broken

    def problems(self) -> list[str]:
        """What keeps this environment from being used; empty if it is as it was when the install ended well."""
        version = self.version()
        if version is None:
            return ["its Python does not run" if self.folder.exists() else "it does not exist yet"]
        try:
            stamp = json.loads(self.stamp.read_text(encoding="utf-8"))
            key, packages = stamp["key"], stamp["packages"]
        except FileNotFoundError:
            return ["the last install did not finish"]
        except (OSError, ValueError, KeyError, TypeError):
            return ["its stamp is not readable"]
        if key != self.key(version):
            return ["the tested versions, pyproject.toml, Python or the folder changed"]
        installed = self.installed(version)
        found = [
            f"{name} {number} is missing" if name not in installed else f"{name} is {installed[name]}, not {number}"
            for name, number in packages.items()
            if installed.get(name) != number
        ]
        found += [f"{name[: -len('.dist-info')]}: {what}" for name, what in self.damage(version).items()]
        return found

    def create(self, wanted: str | None) -> tuple[int, ...]:
        """A fresh environment in place of whatever half of one is there."""
        base = find_python(wanted)
        if self.folder.exists():
            files = (path for path in self.folder.rglob("*") if path.is_file())
            if not (self.folder / "pyvenv.cfg").is_file() and next(files, None):
                raise SetupError(f"{self.folder} is not a virtual environment; move it away and run this again")
            shutil.rmtree(self.folder)
        free = shutil.disk_usage(self.folder.parent).free
        if free < ROOM:
            raise SetupError(
                f"{self.folder.parent} has {free / 2**30:.1f} GB free and the environment needs about "
                f"{ROOM >> 30} GB (torch comes with its CUDA libraries); make room and run this again"
            )
        say(f"making {self.name} with {base}")
        done = subprocess.run(
            [base, "-I", "-m", "venv", str(self.folder)], env=environment(), stdout=subprocess.DEVNULL
        )
        version = self.version()
        if done.returncode or version is None:
            raise SetupError(f"{base} -m venv {self.folder} did not work; try another Python: make setup PYTHON=...")
        return version

    @property
    def name(self) -> str:
        return os.path.relpath(self.folder, self.root)

    def pip(self, what: str, *arguments: str) -> None:
        """One pip command: its output goes to the log, its progress to the screen."""
        command = [str(self.python), "-I", "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
        begin = time.monotonic()
        last = begin
        with open(self.log, "a", encoding="utf-8") as log:
            log.write(f"$ {' '.join(command)}\n")
            process = subprocess.Popen(
                command, cwd=self.root, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            assert process.stdout is not None
            lines = []
            for line in process.stdout:
                log.write(line)
                log.flush()
                lines.append(line.rstrip())
                step = re.match(r"\s*(Downloading|Building|Installing collected|Uninstalling) ?(\S*)", line)
                if not step:
                    continue
                collected = step[1] == "Installing collected"
                if collected or time.monotonic() - last > 10:
                    last = time.monotonic()
                    count = line.count(",") + 1
                    subject = f"{count} package{'s' * (count > 1)}" if collected else step[2].rsplit("/", 1)[-1]
                    say(f"  {last - begin:4.0f} s  {step[1].split()[0].lower()} {subject}")
        if process.wait():
            errors = [line for line in lines if line.startswith("ERROR")] or lines[-3:]
            raise SetupError(
                f"pip could not {what}: {' '.join(errors)[-500:]} (all of it: {self.log}); "
                "run the same command again, it resumes here"
            )

    def repair(self, wanted: str | None) -> None:
        """Installs what is missing, at the tested versions, and stamps the environment."""
        version = self.version()
        if version is None or not self.keepable(version):
            version = self.create(wanted)
            say(f"installing the versions of constraints/{self.constraints.name}: minutes, and about 7 GB")
        else:
            say(f"bringing it to the versions of constraints/{self.constraints.name}")
        self.stamp.unlink(missing_ok=True)
        packages = self.packages(version)
        # Without its dist-info pip takes a package for missing and installs it again, over whatever is left of it.
        for folder in [*self.damage(version), *(entry.name for entry in packages.glob("~*"))]:
            shutil.rmtree(packages / folder, ignore_errors=True)
        pins = read_pins(self.constraints.read_text(encoding="utf-8"), version)
        if self.installed(version).get("pip") != pins["pip"]:
            self.pip("install itself", "install", f"pip=={pins['pip']}")
        self.pip("install the requirements", "install", "-c", str(self.constraints), "-e", f".[{extras_of(pins)}]")
        if self.installed(version).get(UPSTREAM) != pins[UPSTREAM]:
            self.pip("install upstream LLaVA", "install", "--no-deps", f"{UPSTREAM}=={pins[UPSTREAM]}")
        installed = self.installed(version)
        wrong = [
            f"{name} is {installed[name]}, not {pins[name]}"
            for name in installed
            if name in pins and installed[name] != pins[name]
        ]
        wrong += [f"{name}: {what}" for name, what in self.damage(version).items()]
        if wrong:
            what = "; ".join(wrong[:3])
            raise SetupError(f"the install ended but is not right ({what}); delete {self.name} and run this again")
        temporary = self.stamp.with_suffix(".part")
        stamp = {"key": self.key(version), "packages": installed}
        temporary.write_text(json.dumps(stamp, indent=1), encoding="utf-8")
        os.replace(temporary, self.stamp)

    def keepable(self, version: tuple[int, ...]) -> bool:
        """Whether pip can repair it: it is of a supported Python, and pip itself is whole."""
        whole = not any(name.startswith("pip-") for name in self.damage(version))
        return version[:2] in SUPPORTED and whole and "pip" in self.installed(version)


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--row", default="transformers-5", help="a file of constraints/, without .txt")
    parser.add_argument("--venv", default=".venv", help="folder of the environment, below the project")
    parser.add_argument("--check", action="store_true", help="only say whether it is ready; exit 1 if not")
    args = parser.parse_args(arguments)
    try:
        place = Environment(ROOT / args.venv, args.row)
        lock = os.open(ROOT, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)  # two makes at once would repair each other's half-made environment
        problems = place.problems()
        if not problems:
            return 0
        shown = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        say(f"{place.name} is not ready: {shown}")
        if args.check:
            return 1
        begin = time.monotonic()
        place.repair(os.environ.get("PYTHON") or None)
        say(f"{place.name} is ready ({time.monotonic() - begin:.0f} s)")
        return 0
    except SetupError as error:
        print(f"setup: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("setup: interrupted; run the same command again, it resumes here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
