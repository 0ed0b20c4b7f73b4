"""`vitask demo`: a tiny VLM is tuned with and without VITask by its host's script and judged by lmms-eval, on a CPU.

Every stage is a command that a user could type; `logs/` holds each with its output. What is not obvious:

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
import importlib.metadata
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitask_plugin.data.drawn import DRAWN_NOISE, draw_dataset
from vitask_plugin.data.instructions import DRAWN, LabelSet, label_set
from vitask_plugin.demo_hosts import HOSTS, STAGE1, STAGE2, TINY, VANILLA, DemoHost, Settings, flags
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import check_contents, check_creatable, check_replaceable, read_json, write_json
from vitask_plugin.options import LARGEST_SEED, check_number
from vitask_plugin.stages import Stages, module

if TYPE_CHECKING:
    from rich.console import Console

    from vitask_plugin.evaluation.metrics import Outcome

TSM_SETTINGS = {"arch": "resnet10t", "image-size": 28, "epochs": 5, "batch-size": 32, "lr": 2e-3}
JUDGE_BATCH = 32
SPLITS = ("test", "val")
IMAGES_IN_REPORT = 12
COUNTS = ("unmapped", "n")  # of the table, beside the main metrics

# What an output folder holds; the first tells it from any other folder.
OUTPUT_FILES = (
    "demo.json",
    "drawn.npz",
    "data",
    TINY,
    "tsm",
    "features",
    VANILLA,
    STAGE1,
    STAGE2,
    "evaluation",
    "logs",
    "results.json",
    "report.html",
)


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
        from vitask_plugin.evaluation import metrics

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
    """One run in one folder, stage after stage.

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
        environment = {
            # Two commands run side by side, each on one thread: the sums are then in the same order on any machine.
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "MEDMNIST_SIZE": "28",  # as `vitask data medmnist` writes it
            "MEDMNIST_SPLIT": split,
        }
        if labels.flag == DRAWN.flag:
            environment["MEDMNIST_ROOT"] = str(out)
        self.stages = Stages(console, out / "logs", environment)

    def run(self) -> dict[str, Any]:
        """Returns what `results.json` holds."""
        with self.stages:
            self._make_data()
            vanilla, _ = self.stages.together(self._vanilla, self._vitask)
            plain, (tsm, prompted) = self.stages.together(
                lambda: self._judge("VITask without EP", "vitask", STAGE2, ep=False),
                lambda: (self._judge_tsm(), self._judge("VITask with EP", "vitask", STAGE2, ep=True)),
            )
            judged = [tsm, vanilla, plain, prompted]
            with self.stages.stage("Report"):
                self._report(judged)
        results = {
            **self.host.record,
            "data": self.labels.flag,
            "split": self.split,
            "seed": self.seed,
            "settings": asdict(self.settings),
            "versions": {name: importlib.metadata.version(name) for name in self.host.packages},
            "rows": [one.row() for one in judged],
        }
        write_json(self.out / "results.json", results)
        self._show(judged)
        return results

    # Stages ------------------------------------------------------------------------------------------------------

    def _make_data(self) -> None:
        """The images, and the untuned tiny model."""
        if self.labels.flag == DRAWN.flag:
            with self.stages.stage("Images drawn"):
                draw_dataset(self.out / "drawn.npz", seed=self.seed, sizes=self.sizes)
        write = ["--task", self.labels.flag, "--out", self.out / "data", "--allow-duplicates"]
        self.stages.command("LLaVA JSON written", "data", _vitask("data", "medmnist", *write))
        duplicates = read_json(self.out / "data/labels.json", "label set").get("duplicates", [])
        if duplicates:
            self.stages.say(
                f"  [yellow]note[/yellow] {len(duplicates)} image(s) of {self.labels.flag}, as published, are in two "
                "splits; they are kept (pairs: data/labels.json)"
            )
        self.stages.command("Tiny LLaVA made", TINY, self.host.make_tiny(self.out, self.labels.task, self.seed))

    def _vanilla(self) -> Judged:
        """Plain instruction tuning, for as many epochs as both stages of VITask together."""
        self._train("Vanilla tuning", VANILLA, TINY, 2 * self.epochs)
        return self._judge("vanilla", "vanilla", VANILLA, ep=False)

    def _vitask(self) -> None:
        """The TSM, its features, and the two stages."""
        out = self.out
        images = ["--image-folder", out / "data/images", "--device", "cpu"]
        settings = [*flags(TSM_SETTINGS), "--seed", self.seed]
        files = ["--data", out / "data/train.json", "--val", out / "data/val.json"]
        train = _vitask("tsm", "train", *files, *images, *settings, "--out", out / "tsm")
        self.stages.command("TSM trained", "tsm", train, bar="TSM:")
        extract = ["--tsm", out / "tsm", "--data", out / "data/train.json", *images, "--out", out / "features"]
        self.stages.command("TSM features extracted", "features", _vitask("tsm", "extract", *extract))
        weights = ["--vitask_rda_weight", self.settings.rda_weight, "--vitask_crt_weight", self.settings.crt_weight]
        weights += ["--vitask_connector_lr", self.settings.connector_lr]
        vitask = ["--vitask", True, "--vitask_tsm", out / "tsm", "--vitask_features", out / "features", *weights]
        self._train("VITask, stage 1", STAGE1, TINY, self.epochs, *vitask)
        self._train("VITask, stage 2", STAGE2, STAGE1, self.epochs, *vitask, "--vitask_stage", 2)

    def _train(self, title: str, name: str, start: str, epochs: int, *more: object) -> None:
        """The host's script, from the model in the folder `start` to the folder `name`."""
        arguments = {
            "data_path": self.out / "data/train.json",
            "image_folder": self.out / "data/images",
            "model_max_length": 1024,
            "use_cpu": True,
            "bf16": False,
            "num_train_epochs": epochs,
            "per_device_train_batch_size": self.settings.batch,
            "learning_rate": self.settings.learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_ratio": 0.03,
            "weight_decay": 0.0,
            "seed": self.seed,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "output_dir": self.out / name,
        }
        self.stages.command(title, name, [*self.host.train(self.out, start), *map(str, [*flags(arguments), *more])])

    def _judge_tsm(self) -> Judged:
        """The TSM by itself, on the images of the split."""
        import torch

        from vitask_plugin.data.instructions import read_samples
        from vitask_plugin.evaluation.metrics import Outcome, Probabilities, auc
        from vitask_plugin.tsm.model import TSM

        torch.set_num_threads(1)  # as in the commands
        with self.stages.stage("TSM judged"):
            tsm = TSM.load(self.out / "tsm")
            outcomes, items = [], []
            samples = read_samples(self.out / f"data/{self.split}.json")
            for start in range(0, len(samples), JUDGE_BATCH):
                batch = samples[start : start + JUDGE_BATCH]
                pixels = torch.stack([tsm.preprocess(self._image(sample)) for sample in batch])
                likely = tsm.probabilities(tsm(pixels).logits, self.labels.task).tolist()
                for sample, row in zip(batch, likely, strict=True):
                    label = sample["vitask"]["label"]
                    outcomes.append(Outcome(label, row.index(max(row))))
                    items.append(Probabilities(label, row, self.labels.kind))
        answers = [self.labels.choices[outcome.prediction] for outcome in outcomes]
        area = auc(items)
        return Judged("TSM alone", "tsm", False, area if math.isfinite(area) else None, outcomes, answers)

    def _judge(self, name: str, model: str, checkpoint: str, *, ep: bool) -> Judged:
        """A tuned model by lmms-eval: its answers, and the likelihood of each label for the AUC."""
        from vitask_plugin import eval_tasks
        from vitask_plugin.report import on_split, read_results

        folder = name.lower().replace(" ", "-")
        task, score = self.labels.task, f"{self.labels.task}_score"
        arguments = {
            "model": self.host.model,
            "model_args": f"pretrained={self.out / checkpoint}" + (f",tsm={self.out / 'tsm'}" if ep else ""),
            "tasks": f"{task},{score}",
            "include_path": eval_tasks.__path__[0],
            "batch_size": JUDGE_BATCH,
            "device": "cpu",
            "output_path": self.out / "evaluation" / folder,
        }
        command = module("lmms_eval", *flags(arguments), "--log_samples")
        self.stages.command(f"{name} judged", f"judge-{folder}", command, bar="(?:Answering|Scoring):")
        results = read_results(self.out / "evaluation" / folder)
        task, score = on_split(task, self.split), on_split(score, self.split)
        outcomes, answers = results[task].outcomes, [answer.text for answer in results[task].answers.values()]
        return Judged(name, model, ep, results[score].metrics["auc"], outcomes, answers)

    def _image(self, sample: Mapping[str, Any]) -> Any:
        from PIL import Image

        with Image.open(self.out / "data/images" / sample["image"]) as image:
            return image.copy()

    # Results -----------------------------------------------------------------------------------------------------

    def _report(self, judged: list[Judged]) -> None:
        from vitask_plugin import report
        from vitask_plugin.data.instructions import read_samples
        from vitask_plugin.evaluation.metrics import confusion

        runs = {"vanilla": VANILLA, "VITask, stage 1": STAGE1, "VITask, stage 2": STAGE2}
        curves = {
            title: report.loss_curves(
                read_json(self.out / folder / "trainer_state.json", "training log")["log_history"]
            )
            for title, folder in runs.items()
        }
        choices = self.labels.choices
        confusions = [report.Confusion(confusion(one.outcomes, len(choices)), choices, one.name) for one in judged]
        samples = []
        for index, sample in enumerate(read_samples(self.out / f"data/{self.split}.json")[:IMAGES_IN_REPORT]):
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
            self.out / "report.html",
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
        self.console.print(f"{self.out / 'report.html'}\n{self.out / 'results.json'}", highlight=False, soft_wrap=True)

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


def _vitask(*words: object) -> list[str]:
    return module("vitask_plugin.cli", *words)


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
    _clear(out)
    write_json(out / OUTPUT_FILES[0], {"data": labels.flag, "seed": seed, "epochs": epochs, **HOSTS[host].record})
    how = {"host": HOSTS[host], "sizes": sizes, "split": split, "settings": settings}
    return Demo(labels, out, seed=seed, epochs=epochs, console=console, **how).run()


def _require_task(labels: LabelSet) -> None:
    from vitask_plugin import eval_tasks

    if not Path(eval_tasks.__path__[0], f"{labels.task}.yaml").is_file():
        raise VITaskError(
            f"there is no lmms-eval task {labels.task!r} yet, so nothing could judge the models; choose other data"
        )


def _clear(out: Path) -> None:
    """Removes an earlier demo from `out`; refuses a folder that holds anything else."""
    if os.path.isdir(out):
        # What a killed run was writing: see `files.atomic_path`.
        unfinished = [
            entry.name for entry in out.iterdir() if entry.name.startswith(tuple(f".{n}." for n in OUTPUT_FILES))
        ]
        check_contents(out, [*OUTPUT_FILES, *unfinished])
        check_creatable(out / OUTPUT_FILES[0])
        for entry in sorted(out.iterdir(), key=lambda entry: entry.name == OUTPUT_FILES[0]):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    else:
        check_replaceable(out, OUTPUT_FILES)


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
