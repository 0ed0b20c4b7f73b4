"""`vitask demo`: a tiny VLM is tuned with and without VITask by its host's script and judged by lmms-eval, on a CPU.

It is a recipe of `vitask run` (`demo_hosts.recipe_of`) with data drawn before and a page of its own behind; `logs/`
holds each command with its output. What is not obvious:

- Vanilla tuning and VITask start from the same weights and see the same images in batches of the same size, under the
  same optimizer, peak learning rate and kind of schedule. Vanilla has as many epochs as both stages together, in one
  run: that suited it better than two runs with two warm-ups.
- A host's settings were chosen on the val split over seeds 0, 1 and 2 (`benchmarks/LOG.md` has the figures), as those
  with the best model without EP whose answers with EP are not below the TSM's. The paper reports no learning rate.
- Many training labels of the drawn data are wrong (`tiny.DRAWN_NOISE`). That is where the two methods differ most: the
  exemplar-prompted branch reads the TSM's feature and soon answers as the images are, not as they are labelled, and RDA
  hands these answers to the plain branch; vanilla has only the labels. With right labels and long training a model
  this small catches up.
- The tiny models are made from random numbers, so nothing here speaks of the size of the gain on a real LLaVA.
"""

import argparse
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitask_plugin.data.dataset import LABELS_FILE
from vitask_plugin.data.drawn import DRAWN_NOISE, draw_dataset
from vitask_plugin.data.instructions import DRAWN, LabelSet, label_set
from vitask_plugin.demo_hosts import HOSTS, DemoHost, Settings, recipe_of
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import check_contents, check_creatable, check_replaceable, write_json
from vitask_plugin.formats.json_text import read_json
from vitask_plugin.options import LARGEST_SEED, check_number
from vitask_plugin.record.checkpoint import versions
from vitask_plugin.run.engine import CONTENTS_FILE, LOGS, STAGES_FILE, Engine
from vitask_plugin.run.judging_stages import ARMS, EVALUATION, REPORT_FILE, RESULTS_FILE
from vitask_plugin.run.lock import LOCK_FILE
from vitask_plugin.run.machine import check_commands
from vitask_plugin.run.plan import make_plan
from vitask_plugin.run.stage import Plan
from vitask_plugin.stages import Stages

if TYPE_CHECKING:
    from rich.console import Console

    from vitask_plugin.inference.metrics import Outcome

SPLITS = ("test", "val")
IMAGES_IN_REPORT = 12
COUNTS = ("unmapped", "n")  # of the table, beside the main metrics
DEMO_FILE, DRAWN_FILE = "demo.json", f"{DRAWN.flag}.npz"
# Row of the table -> "model" and "ep" of `results.json`.
ROWS = {
    "tsm": ("tsm", False),
    "vanilla": ("vanilla", False),
    "vitask": ("vitask", False),
    "vitask-ep": ("vitask", True),
}
# Tuning that is shown in the page -> its name there.
TUNED = {"vanilla": "vanilla", "vitask-stage1": "VITask, stage 1", "vitask": "VITask, stage 2"}


@dataclass(frozen=True)
class Judged:
    """One row of the table, and what the report shows of it.

    Attributes:
        name: for people. model, ep: as `results.json` says it.
        auc: None where it is not defined.
        outcomes, answers: by row of the split.
    """

    name: str
    model: str
    ep: bool
    auc: float | None
    outcomes: list["Outcome"]
    answers: list[str]

    def row(self) -> dict[str, Any]:
        from vitask_plugin.inference import metrics

        return {
            "model": self.model,
            "ep": self.ep,
            "accuracy": metrics.accuracy(self.outcomes),
            "macro_f1": metrics.macro_f1(self.outcomes),
            "auc": self.auc,
            "unmapped": metrics.unmapped(self.outcomes),
            "n": len(self.outcomes),
        }


class Demo:
    """One run in one folder.

    Args:
        labels: the task.
        out: an absolute path; everything that is made lies there.
        seed: of the drawn data, all weights and all orders.
        epochs: of each of the two stages; vanilla tuning has as many as both together.
        sizes: images per split of the drawn data; None = the default.
        split: that is judged, test or val. Its epochs were also chosen on val, so there the TSM looks a little better.
        settings: None = the host's.
    """

    def __init__(
        self,
        labels: LabelSet,
        out: Path,
        *,
        seed: int,
        epochs: int,
        console: "Console",
        host: DemoHost = HOSTS["llava"],
        sizes: Mapping[str, int] | None = None,
        split: str = SPLITS[0],
        settings: Settings | None = None,
    ) -> None:
        self.labels, self.out, self.seed, self.epochs, self.sizes = labels, out, seed, epochs, sizes
        self.host, self.split, self.settings = host, split, settings or host.settings
        self.console = console
        self.data = out / "data" / labels.flag

    @property
    def plan(self) -> Plan:
        """All commands."""
        how = {"seed": self.seed, "epochs": self.epochs, "split": self.split, "settings": self.settings}
        return make_plan(recipe_of(self.host, self.labels.flag, self.out, **how), self.out, "cpu", concluded=False)

    def run(self) -> dict[str, Any]:
        """Returns what `results.json` holds."""
        engine = Engine(self.plan, self.console, verbose=False)
        with engine.opened() as stages:
            if self.labels.flag == DRAWN.flag:
                with stages.stage("Images drawn"):
                    draw_dataset(self.out / DRAWN_FILE, seed=self.seed, sizes=self.sizes)
            engine.bring_up_to_date(stages)
            self._tell_duplicates(stages)
            judged = self.judged()
            with stages.stage("Report"):
                self._report(judged)
        results = {
            **self.host.record,
            "data": self.labels.flag,
            "split": self.split,
            "seed": self.seed,
            "settings": asdict(self.settings),
            "versions": versions(self.host.packages),
            "rows": [one.row() for one in judged],
        }
        write_json(self.out / RESULTS_FILE, results)
        self._show(judged)
        return results

    def _tell_duplicates(self, stages: Stages) -> None:
        file = self.data / LABELS_FILE
        duplicates = read_json(file, "label set").get("duplicates", [])
        if duplicates:
            stages.say(
                f"  [yellow]note[/yellow] {len(duplicates)} image(s) of {self.labels.flag}, as published, are in two "
                f"splits; they are kept (pairs: {file.relative_to(self.out)})"
            )

    def judged(self) -> list[Judged]:
        """The rows, as lmms-eval wrote them."""
        return [self.judged_arm(arm) for arm in ROWS]

    def judged_arm(self, arm: str) -> Judged:
        """One row."""
        from vitask_plugin.report import on_split, read_results

        results = read_results(self.out / EVALUATION / arm)
        tasks = self.labels.task, f"{self.labels.task}_score"
        answered, scored = (results[on_split(task, self.split)] for task in tasks)
        answers = [answer.text for answer in answered.answers.values()]
        return Judged(ARMS[arm], *ROWS[arm], scored.metrics["auc"], answered.outcomes, answers)

    def _image(self, sample: Mapping[str, Any]) -> Any:
        from PIL import Image

        with Image.open(self.data / "images" / sample["image"]) as image:
            return image.copy()

    # Results -----------------------------------------------------------------------------------------------------

    def _report(self, judged: list[Judged]) -> None:
        from vitask_plugin import report
        from vitask_plugin.data.instructions import read_samples
        from vitask_plugin.inference.metrics import confusion

        folders = {TUNED[stage.name]: stage.outputs[0] for stage in self.plan.stages if stage.name in TUNED}
        curves = {
            title: report.loss_curves(read_json(folder / "trainer_state.json", "training log")["log_history"])
            for title, folder in folders.items()
        }
        choices = self.labels.choices
        confusions = [report.Confusion(confusion(one.outcomes, len(choices)), choices, one.name) for one in judged]
        samples = []
        for index, sample in enumerate(read_samples(self.data / f"{self.split}.json")[:IMAGES_IN_REPORT]):
            answers = {one.name: one.answers[index] for one in judged}
            samples.append(report.Sample(self._image(sample), choices[sample["vitask"]["label"]], answers))
        notes = [
            f"{self.host.tuned.format(self.labels.flag)} and "
            f"judged by lmms-eval on the {self.split} split. Seed {self.seed}; {self.epochs} epoch(s) in each of "
            f"VITask's two stages, {2 * self.epochs} of vanilla tuning. EP: the exemplar of the task-specific model "
            "(TSM) is in the prompt.",
            *self._verdict(judged),
        ]
        if self.labels.flag == DRAWN.flag:
            notes.insert(
                1, f"{DRAWN_NOISE:.0%} of the training labels are replaced by random ones; val and test are clean."
            )
        report.write_report(
            self.out / REPORT_FILE,
            title=f"VITask demo: {self.labels.flag}",
            rows=[{"name": one.name, **one.row()} for one in judged],
            curves=curves,
            confusions=confusions,
            samples=samples,
            notes=notes,
        )

    def _show(self, judged: list[Judged]) -> None:
        from rich.table import Table

        from vitask_plugin.evaluation.metric_list import MAIN, METRICS, written

        table = Table(title=f"{self.host.title}{self.labels.flag}, {self.split} split, seed {self.seed}")
        table.add_column("model")
        for column in (*(METRICS[name].title for name in MAIN), *COUNTS):
            table.add_column(column, justify="right")
        for one in judged:
            row = one.row()
            cells = ["n/a" if row[name] is None else written(name, row[name]) for name in (*MAIN, *COUNTS)]
            table.add_row(one.name, *cells)
        self.console.print(table)
        for sentence in self._verdict(judged):
            self.console.print(sentence, highlight=False)
        self.console.print(f"{self.out / REPORT_FILE}\n{self.out / RESULTS_FILE}", highlight=False, soft_wrap=True)

    def _verdict(self, judged: list[Judged]) -> list[str]:
        """What the accuracies say, also where it is not what one hopes for."""
        tsm, vanilla, plain, prompted = (one.row()["accuracy"] for one in judged)
        return [
            f"VITask without EP {_against(plain, vanilla)} vanilla tuning ({plain:.3f} and {vanilla:.3f}).",
            f"VITask with EP {_against(prompted, vanilla)} vanilla tuning ({prompted:.3f} and {vanilla:.3f}), and "
            f"{_against(prompted, tsm)} the TSM alone ({tsm:.3f}).",
        ]


def _against(one: float, other: float) -> str:
    return "is above" if one > other else "is below" if one < other else "is level with"


def demo(
    data: str,
    out: str | Path,
    *,
    seed: int = 0,
    epochs: int = 1,
    console: "Console",
    host: str = "llava",
    sizes: Mapping[str, int] | None = None,
    split: str = SPLITS[0],
    settings: Settings | None = None,
) -> dict[str, Any]:
    """Runs the whole demo and writes `results.json` and `report.html` into `out`.

    It starts afresh: what an earlier run left in `out`, finished or not, is removed first.

    Args:
        data: "drawn", or any name of a medmnist set for which there is an lmms-eval task.
        host: of `HOSTS`. sizes: images per split of the drawn data; None = `drawn.DRAWN_SIZES`.
        split: that is judged; val to choose settings by. settings: None = the host's.

    Raises:
        VITaskError: unknown data, an `out` that holds anything else, or a stage that failed.
    """
    labels, out = label_set(data), Path(out).resolve()
    check_number("--epochs", epochs, 1)
    check_number("--seed", seed, 0, LARGEST_SEED)
    if split not in SPLITS:
        raise VITaskError(f"--split is {split!r}; it must be one of {', '.join(SPLITS)}")
    if host not in HOSTS:
        raise VITaskError(f"--host is {host!r}; it must be one of {', '.join(HOSTS)}")
    if "," in str(out):
        raise VITaskError(
            f"--out {str(out)!r} holds a comma, which lmms-eval takes for the end of the path; choose another"
        )
    _require_task(labels)
    how = {"host": HOSTS[host], "sizes": sizes, "split": split, "settings": settings}
    run = Demo(labels, out, seed=seed, epochs=epochs, console=console, **how)
    check_commands(run.plan, dry=False)
    _clear(out)
    write_json(out / DEMO_FILE, {"data": labels.flag, "seed": seed, "epochs": epochs, **HOSTS[host].record})
    return run.run()


def output_files(host: DemoHost) -> list[str]:
    """What an output folder holds; the first tells it from any other folder."""
    plan = Demo(DRAWN, Path(os.sep), seed=0, epochs=1, console=None, host=host).plan
    made = {path.relative_to(os.sep).parts[0] for stage in plan.stages for path in stage.outputs}
    own = [DRAWN_FILE, STAGES_FILE, CONTENTS_FILE, LOCK_FILE, LOGS, RESULTS_FILE, REPORT_FILE]
    return [DEMO_FILE, *own, *sorted(made)]


def _require_task(labels: LabelSet) -> None:
    from vitask_plugin import eval_tasks

    if not Path(eval_tasks.__path__[0], f"{labels.task}.yaml").is_file():
        raise VITaskError(
            f"there is no lmms-eval task {labels.task!r} yet, so nothing could judge the models; choose other data"
        )


def _clear(out: Path) -> None:
    """Removes an earlier demo from `out`, of whichever host; refuses a folder that holds anything else."""
    own = list(dict.fromkeys(name for host in HOSTS.values() for name in output_files(host)))
    if os.path.isdir(out):
        # What a killed run was writing: see `files.atomic_path`.
        unfinished = [entry.name for entry in out.iterdir() if entry.name.startswith(tuple(f".{n}." for n in own))]
        check_contents(out, [*own, *unfinished])
        check_creatable(out / DEMO_FILE)
        for entry in sorted(out.iterdir(), key=lambda entry: entry.name == DEMO_FILE):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    else:
        check_replaceable(out, own)


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--data",
        default=DRAWN.flag,
        metavar="NAME",
        help="drawn (default), or a medmnist set: retinamnist, breastmnist, ...",
    )
    add("--host", choices=HOSTS, default="llava", help="whose training script: upstream LLaVA's (default), or hf")
    add("--out", default="demo", metavar="DIR", help="folder to write (default demo)")
    add("--seed", type=int, default=0, metavar="N", help="same seed, same table (default 0)")
    add(
        "--epochs", type=int, default=1, metavar="N", help="epochs of each stage; vanilla has twice as many (default 1)"
    )
    add("--split", choices=SPLITS, default=SPLITS[0], help="images to judge on (default test); val to choose by")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from rich.console import Console

    given = {"seed": args.seed, "epochs": args.epochs, "host": args.host, "split": args.split}
    demo(args.data, args.out, console=Console(), **given)
