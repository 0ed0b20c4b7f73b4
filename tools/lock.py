"""Writes a row of tested versions, constraints/ROW.txt: what pip resolves on Python 3.10, 3.11 and 3.12 today.

    python tools/lock.py ROW --with transformers==5.23.0 --with pip==26.3 [--keep FILE] [--extra serve] \\
        python3.10 python3.11 python3.12

`--keep FILE` holds the versions of another file where they can be held. Nothing is installed. A row is tested only
after `make setup` and `make test` passed with it.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OWN = ("vitask-plugin",)


def resolve(
    python: str, requirements: list[str], keep: str | None, extras: Sequence[str]
) -> tuple[tuple[int, int], dict[str, str]]:
    """The Python's version, and `{name: version}` of what pip would install into an empty environment."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--dry-run",
            "--ignore-installed",
            "--report",
            str(report),
        ]
        command += ["-c", keep] if keep else []
        subprocess.run([*command, f"{ROOT}[{','.join(extras)}]", *requirements], check=True)
        found = json.loads(report.read_text(encoding="utf-8"))
    major, minor = found["environment"]["python_version"].split(".")
    names = {item["metadata"]["name"]: item["metadata"]["version"] for item in found["install"]}
    return (int(major), int(minor)), {re.sub(r"[-_.]+", "-", n).lower(): v for n, v in names.items() if n not in OWN}


def merge(found: dict[tuple[int, int], dict[str, str]]) -> list[str]:
    """Constraint lines that hold for every Python of `found`; a version that changes at some Python gets a marker.

    Raises:
        ValueError: for a package with three different versions, which one bound cannot tell apart.
    """
    lines = []
    for name in sorted({name for names in found.values() for name in names}):
        versions = [(python, names[name]) for python, names in sorted(found.items()) if name in names]
        changes = [python for (python, new), (_, old) in zip(versions[1:], versions, strict=False) if new != old]
        if not changes:
            lines.append(f"{name}=={versions[0][1]}")
        elif len(changes) == 1:
            bound = ".".join(map(str, changes[0]))
            lines.append(f'{name}=={versions[0][1]} ; python_version < "{bound}"')
            lines.append(f'{name}=={versions[-1][1]} ; python_version >= "{bound}"')
        else:
            raise ValueError(f"{name} has three versions: {versions}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("row")
    parser.add_argument("--with", dest="requirements", action="append", default=[], help="a further exact requirement")
    parser.add_argument("--without-dependencies", action="append", default=[], help="name==version, added as it is")
    parser.add_argument("--keep", help="a constraints file whose versions are held")
    parser.add_argument("--extra", dest="extras", action="append", default=["all", "dev"], help="beside all and dev")
    parser.add_argument("pythons", nargs="+")
    args = parser.parse_args()
    found = dict(resolve(python, args.requirements, args.keep, args.extras) for python in args.pythons)
    pythons = ", ".join(".".join(map(str, python)) for python in sorted(found))
    header = f"# Versions resolved together for Python {pythons} by tools/lock.py."
    lines = [header, *sorted([*merge(found), *args.without_dependencies]), ""]
    (ROOT / "constraints" / f"{args.row}.txt").write_text("\n".join(lines), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
