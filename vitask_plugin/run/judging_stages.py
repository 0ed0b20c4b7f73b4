"""The last stages of a plan: every model on every set and split by lmms-eval, the page, the figures, the model card."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vitask_plugin import eval_tasks
from vitask_plugin.data.medmnist import ROOT
from vitask_plugin.report.results import RESULTS_ENDING
from vitask_plugin.run.data_stages import Source, medmnist_variables
from vitask_plugin.run.recipe import Recipe
from vitask_plugin.run.stage import Command, Stage, flags, trainer_flags
from vitask_plugin.run.training_stages import Model

EVALUATION = "evaluation"
RECIPE_FILE, RESULTS_FILE, CARD_FILE, REPORT_FILE = "recipe.yaml", "results.json", "README.md", "report.html"
# Arm -> what it is called; the folder of its results has the arm's name.
ARMS = {
    "tsm": "TSM alone",
    "untuned": "untuned",
    "vanilla": "vanilla",
    "vitask": "VITask without EP",
    "vitask-ep": "VITask with EP",
}


@dataclass(frozen=True)
class Judging:
    """What every arm has in common.

    Attributes:
        tsm: its folder. device: cpu or cuda.
    """

    recipe: Recipe
    model: Model
    sources: Sequence[Source]
    out: Path
    tsm: Path
    device: str

    def tsm_stage(self) -> Stage:
        """The TSM by itself."""
        commands = []
        for split in self.recipe.evaluate.splits:
            for one in self.sources:
                data = {"data": one.folder / f"{split}.json", "image_folder": one.folder / "images"}
                how = {"device": self.device, "limit": self.recipe.evaluate.limit}
                values = {"tsm": self.tsm, **data, **how, "out": self._folder("tsm")}
                commands.append(Command(("vitask", "tsm", "evaluate", *flags(values))))
        own = self.recipe.tsm.folder is None
        files = () if own else (self.tsm,)
        reads = (*self._data(), *(("tsm",) if own else ()))
        return self._stage("tsm", commands, reads, files)

    def stage(
        self, arm: str, checkpoint: Path, reads: Sequence[str], *, lora: bool = False, exemplar: str | None = None
    ) -> Stage:
        """A model by lmms-eval.

        Args:
            checkpoint: its folder. reads: the stages that made it. lora: the checkpoint is an adapter of the model.
            exemplar: its kind if there is one in the prompt.
        """
        arguments = {"pretrained": checkpoint}
        if lora and self.model.host == "llava":  # PEFT's own adapter names its base
            arguments["model_base"] = self.model.folder
        uses_tsm = exemplar not in (None, "learned")
        if exemplar:
            arguments |= {**({"tsm": self.tsm} if uses_tsm else {}), "ep": True}
        files = self.model.files
        model = () if self.model.stage is None else (self.model.stage,)
        own_tsm = uses_tsm and self.recipe.tsm.folder is None
        if uses_tsm and not own_tsm:
            files.append(self.tsm)
        given = ",".join(f"{name}={value}" for name, value in arguments.items())
        commands = [command for split in self.recipe.evaluate.splits for command in self._judged(arm, given, split)]
        return self._stage(arm, commands, (*self._data(), *model, *reads, *(("tsm",) if own_tsm else ())), files)

    def _judged(self, arm: str, arguments: str, split: str) -> list[Command]:
        """The commands of one split: all MedMNIST sets of a size together, own folders one by one."""
        commands = []
        sizes = sorted({one.size for one in self.sources if one.medmnist})
        for size in sizes:
            tasks = [one.medmnist.task for one in self.sources if one.size == size]
            environment = {**self._root(), "MEDMNIST_SIZE": str(size), "MEDMNIST_SPLIT": split}
            commands.append(self._lmms_eval(arm, arguments, tasks, environment))
        for one in self.sources:
            if one.medmnist is None:
                environment = {"VITASK_FOLDER": str(one.folder), "VITASK_SPLIT": split}
                commands.append(self._lmms_eval(arm, arguments, ["vitask_folder"], environment))
        return commands

    def _lmms_eval(self, arm: str, arguments: str, tasks: Sequence[str], environment: dict[str, str]) -> Command:
        given = self.recipe.evaluate
        names = [name for task in tasks for name in (task, f"{task}_score")]
        values = {
            "model": self.model.evaluated_by,
            "model_args": arguments,
            "include_path": next(iter(eval_tasks.__path__)),
            "tasks": ",".join(names),
            "batch_size": given.batch_size,
            "device": self.device,
            "limit": given.limit,
            "output_path": self._folder(arm),
        }
        words = [*trainer_flags(values), "--log_samples"]
        launch = self.recipe.launch
        start = ["lmms-eval"]
        if launch.processes > 1 and self.device != "cpu":
            start = ["torchrun", "--standalone", "--nproc_per_node", str(launch.processes), "-m", "lmms_eval"]
        # It ends with status 0 after most of its errors.
        leaves = (RESULTS_ENDING, *(f"_samples_{name}.jsonl" for name in names))
        return Command((*start, *words), environment, leaves)

    def _root(self) -> dict[str, str]:
        found = medmnist_variables(self.recipe)
        return {ROOT: found[ROOT]} if ROOT in found else {}

    def _folder(self, arm: str) -> Path:
        return self.out / EVALUATION / arm

    def _data(self) -> tuple[str, ...]:
        return tuple(f"data-{one.name}" for one in self.sources)

    def _stage(self, arm: str, commands: Sequence[Command], reads: Sequence[str], files: Sequence[Path]) -> Stage:
        bar = "(?:Answering|Scoring|TSM):"
        outputs = (self._folder(arm),)
        return Stage(
            f"judge-{arm}", f"{ARMS[arm]} judged", tuple(commands), outputs, tuple(reads), tuple(files), bar=bar
        )

    def conclusions(self, arms: Sequence[str], trainings: Sequence[Stage]) -> list[Stage]:
        """The page, with the curves of the trainings, then the figures and the card."""
        reads = tuple(f"judge-{arm}" for arm in arms)
        folders = [str(folder) for folder in (*map(self._folder, arms), *(one.outputs[0] for one in trainings))]
        own = [str(one.folder) for one in self.sources if one.medmnist is None]
        environment = {"VITASK_FOLDER": os.pathsep.join(own)} if own else {}
        if any(one.medmnist for one in self.sources):
            environment |= self._root()
        page = Command(("vitask", "report", *folders, "--out", str(self.out / REPORT_FILE)), environment)
        words = *("--arms", *arms), *("--digest", self.recipe.digest)
        figures = Command(("python", "-m", "vitask_plugin.run.results", str(self.out), *words))
        outputs = (self.out / RESULTS_FILE, self.out / CARD_FILE)
        return [
            Stage(
                "report",
                "Report written",
                (page,),
                (self.out / REPORT_FILE,),
                (*self._data(), *reads, *(one.name for one in trainings)),
            ),
            Stage(
                "results",
                "Figures and model card written",
                (figures,),
                outputs,
                (*self._data(), *reads),
                (self.out / RECIPE_FILE,),
            ),
        ]


def interpreter_folder() -> str:
    """Where the programs of the plan are: beside the Python that runs this."""
    return str(Path(sys.executable).parent)
