"""Does it work? Data sets x arms x seeds on real images, a row of figures for each run.

    python benchmarks/study.py --data-root DIR --model DIR [--tsm-weights FILE] [--work DIR] [--budget HOURS]
                               [--jobs N] [--sets busi,...] [--arms vanilla,...] [--seeds N] [--only DATA-ARM-SEED ...]

The model is a folder in HF format, such as `generalist.py` makes; the sets are those of `study_plan.SETS`, as archives
below --data-root. Every arm is trained and judged by the project's own commands. A run's rows are appended to
`benchmarks/results/study.jsonl` when it has ended: one for each of without and with EP, complete and incomplete
instructions, with the answer to each image. Runs that have rows of the same configuration are left out, so the same
command goes on after a kill; what several runs share lies in --work, out of git. `study_report.py` makes docs/STUDY.md.

Settings are chosen on val: `--val-only` does not read test, and `--set steps=300` tries others; these rows go to
`study_settings.jsonl`.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from measuring import append_line, end_with_a_sentence, machine
from study_plan import ARMS, SEEDS, SETS, Run, Settings, config_of, digest, plan, undone

from vitask_plugin.errors import VITaskError
from vitask_plugin.files import sha256_file

RESULTS = Path(__file__).resolve().parent / "results"
ROWS, SETTINGS_ROWS = RESULTS / "study.jsonl", RESULTS / "study_settings.jsonl"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows there are; a last line that was cut off is none."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


class Study:
    """Runs, and where their rows go."""

    def __init__(self, args: argparse.Namespace) -> None:
        from study_data import digest_of_set
        from study_training import Bench

        self.args, self.settings = args, args.settings
        self.rows_file = args.rows or (SETTINGS_ROWS if args.val_only else ROWS)
        sources = {"model": _digest_of_model(args.model), "tower": _digest_of_tower(args.model)}
        if args.tsm_weights:
            sources["tsm_weights"] = sha256_file(args.tsm_weights)[:16]
        self.bench = Bench(args.work, args.model, args.tsm_weights, self.settings, sources)
        self.sets = {name: digest_of_set(SETS[name], args.data_root) for name in args.sets}
        self.runs = [run for run in plan(args.sets, args.arms, args.seeds) if not args.only or run.name in args.only]
        self.configs = {run.name: self._config(run) for run in self.runs}

    def _config(self, run: Run) -> dict[str, Any]:
        return config_of(run, self.settings, {**self.bench.sources, "data": self.sets[run.data]})

    def go_on(self) -> list[str]:
        """Runs what there are no rows of, until the budget is spent; names of runs that failed."""
        from study_arms import folder_of

        keys = {name: digest(config) for name, config in self.configs.items()}
        rows = read_rows(self.rows_file)
        left = list(undone(self.runs, keys, rows))
        usual = _usual_seconds(rows)
        print(f"{len(self.runs)} runs, {len(left)} of them without rows", flush=True)
        end = time.monotonic() + self.args.budget * 3600
        running: dict[str, tuple[Run, Any]] = {}
        failed: list[str] = []
        fork = multiprocessing.get_context("fork")  # what was imported need not be imported again
        while left or running:
            for name, (run, process) in list(running.items()):
                if process.exitcode is not None:
                    del running[name]
                    if not self._take(run, keys[name]):
                        failed.append(name)
            ready = [run for run in left if not self._waits(run, [*left, *(one for one, _ in running.values())])]
            while ready and len(running) < self.args.jobs:
                run = ready.pop(0)
                if time.monotonic() + usual.get(run.arm, 0.0) > end:
                    left.remove(run)
                    continue
                left.remove(run)
                if (folder_of(self.bench, run, keys[run.name]) / "rows.json").is_file():
                    self._take(run, keys[run.name])
                    continue
                process = fork.Process(target=self._run, args=(run, keys[run.name]), daemon=True)
                process.start()
                running[run.name] = (run, process)
            if not ready and not running:
                break
            time.sleep(0.2)
        return failed

    def _waits(self, run: Run, others: Sequence[Run]) -> bool:
        """Whether it is made of a run that is still to come."""
        arm = ARMS[run.arm]
        return bool(arm.of) and any((one.data, one.arm, one.seed) == (run.data, arm.of, run.seed) for one in others)

    def _run(self, run: Run, key: str) -> None:
        """In a process of its own: what it prints goes to a log."""
        from study_arms import rows_of
        from study_data import written

        log = self.args.work / "logs" / f"{run.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        try:
            data = written(SETS[run.data], self.args.data_root, self.args.work)
            splits = ("val",) if self.args.val_only else ("val", "test")
            rows_of(self.bench, data, run, key, splits)
        except Exception:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)

    def _take(self, run: Run, key: str) -> bool:
        """Appends a run's rows; False if it left none."""
        from study_arms import folder_of

        file = folder_of(self.bench, run, key) / "rows.json"
        if not file.is_file():
            print(f"{run.name}: failed, see {self.args.work / 'logs' / run.name}.log", flush=True)
            return False
        about = {"data": run.data, "arm": run.arm, "seed": run.seed}
        made = {"config": self.configs[run.name], "digest": key, **machine("cpu", torch.get_num_threads())}
        for row in json.loads(file.read_text()):
            append_line(self.rows_file, {**about, **row, **made, "written": time.strftime("%Y-%m-%d")})
            said = " ".join(f"{split} {row[split]['accuracy']:.3f}" for split in ("val", "test") if split in row)
            ep = "with EP" if row["ep"] else "without EP"
            print(f"{run.name} {ep}, {row['instructions']}: {said} ({row['seconds']:.0f} s)", flush=True)
        return True


def _usual_seconds(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """How long the longest run of each arm took."""
    found: dict[str, float] = {}
    for row in rows:
        found[row["arm"]] = max(found.get(row["arm"], 0.0), row["seconds"])
    return found


def _digest_of_model(folder: Path) -> str:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise VITaskError(f"--model {str(folder)!r} holds no .safetensors file; give a folder in HF format")
    return ",".join(sha256_file(file)[:16] for file in files)


def _digest_of_tower(folder: Path) -> str:
    """Of the weights and the size of images, which a linear probe depends on."""
    from safetensors import safe_open

    digest = hashlib.sha256()
    for file in sorted(folder.glob("*processor*config.json")):
        digest.update(file.read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in sorted(key for key in opened.keys() if "vision_tower" in key):  # noqa: SIM118  (no mapping)
                digest.update(name.encode() + opened.get_tensor(name).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def settings_of(words: Sequence[str]) -> Settings:
    """The settings, with those that `name=value` words name.

    Raises:
        VITaskError: a name that is none, or a value of another type.
    """
    kinds = {one.name: type(one.default) for one in fields(Settings)}
    given: dict[str, Any] = {}
    for word in words:
        name, _, value = word.partition("=")
        if name not in kinds:
            raise VITaskError(f"--set {word}: there is no setting {name!r}; choose one of {', '.join(kinds)}")
        try:
            given[name] = value == "True" if kinds[name] is bool else kinds[name](value)
        except ValueError:
            raise VITaskError(f"--set {word}: {name} is a {kinds[name].__name__}; give one") from None
    return replace(Settings(), **given)


def _names(known: Mapping[str, Any]) -> Any:
    def parsed(text: str) -> list[str]:
        found = text.split(",")
        unknown = [name for name in found if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return found

    return parsed


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True, metavar="DIR", help="archives, here or a folder below")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="that is tuned, in HF format")
    parser.add_argument("--tsm-weights", type=Path, metavar="FILE", help="of the TSM's start (default: random)")
    parser.add_argument("--work", type=Path, default=Path("study-work"), metavar="DIR", help="of all that is made")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="where rows go (default benchmarks/results)")
    parser.add_argument("--budget", type=float, default=1e6, metavar="HOURS", help="no run starts that would end later")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs side by side (default 1)")
    sets = [name for name in SETS if name != "breast"]
    parser.add_argument("--sets", type=_names(SETS), default=sets, metavar="A,B", help=f"(default {','.join(sets)})")
    parser.add_argument("--arms", type=_names(ARMS), default=list(ARMS), metavar="A,B", help="(default all)")
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N", help=f"from 0 (default {SEEDS})")
    parser.add_argument("--only", nargs="+", metavar="RUN", help="these alone, as DATA-ARM-SEED")
    parser.add_argument("--val-only", action="store_true", help="to choose settings: test is not read")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="another setting")
    args = parser.parse_args(argv)
    args.settings = settings_of(args.set)
    args.work, args.model = args.work.resolve(), args.model.resolve()
    if args.tsm_weights:
        args.tsm_weights = args.tsm_weights.resolve()
    return args


def main() -> None:
    failed = Study(parse()).go_on()
    if failed:
        raise VITaskError(f"{len(failed)} run(s) failed: {', '.join(failed)}; the same command tries them again")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    end_with_a_sentence(main)
