"""The middle stages of a plan: the tiny model where that is asked for, vanilla tuning, both stages of VITask."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitask_plugin.deepspeed.configs import NAMES, config_path
from vitask_plugin.formats.json_text import read_json
from vitask_plugin.llava.tiny import CHECKPOINT, TOWER
from vitask_plugin.record.host import host_of
from vitask_plugin.run.data_stages import Source, Training
from vitask_plugin.run.recipe import PROJECTOR_LR, TINY, Recipe
from vitask_plugin.run.stage import Command, Stage, files_of, flags, trainer_flags

TINY_FOLDER = "tiny"
# How a LLaVA-1.5 is put together; its own configuration may say otherwise.
LLAVA_PARTS = {
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "image_aspect_ratio": "pad",
}

EVAL_DATA = "vitask_eval_data"
PARTS_FROM_FILES = ("pretrain_mm_mlp_adapter", "vision_tower")
# Flags that mean nothing without it.
WATCHING = (
    *("do_eval", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start"),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
)


@dataclass(frozen=True)
class Model:
    """The model that is tuned.

    Attributes:
        folder: where it lies, or will.
        host: llava or hf.
        parts: flags of the training script that say how it is put together.
        stage: name of the stage that makes it, None = it is there.
    """

    folder: Path
    host: str
    parts: Mapping[str, Any]
    stage: str | None = None

    @property
    def files(self) -> list[Path]:
        """What of it is there before the run: its folder, and its vision tower if that is no name of the Hub."""
        if self.stage is not None:
            return []
        tower = self.parts.get("vision_tower")
        is_file = tower and (Path(tower).is_absolute() or Path(tower).exists())
        return [self.folder, *([Path(tower).absolute()] if is_file else [])]

    @property
    def evaluated_by(self) -> str:
        return f"vitask_{self.host}"


def model_of(recipe: Recipe, out: Path) -> Model:
    """The model of a recipe that was checked."""
    if recipe.model == TINY:
        folder = out / TINY_FOLDER
        if recipe.host == "hf":
            return Model(folder, "hf", {}, TINY_FOLDER)
        parts = {"version": "v1", "vision_tower": folder / TOWER, **LLAVA_PARTS, "image_aspect_ratio": "square"}
        return Model(folder / CHECKPOINT, "llava", parts, TINY_FOLDER)
    folder = Path(recipe.model).absolute()
    host = recipe.host or host_of(folder)
    if host == "hf":
        return Model(folder, host, {})
    config = read_json(folder / "config.json", "model configuration")
    tower = config.get("mm_vision_tower")
    # A path there is relative to wherever the model was trained.
    if tower and (folder / tower).is_dir():
        tower = folder / tower
    parts = {name: config.get(name, value) for name, value in LLAVA_PARTS.items()}
    if parts["image_aspect_ratio"] not in ("pad", "square"):
        parts["image_aspect_ratio"] = LLAVA_PARTS["image_aspect_ratio"]  # 1.6's several views are not trained by 1.2.2
    return Model(folder, "llava", {"version": "v1", "vision_tower": tower, **parts})


def tiny(recipe: Recipe, sources: Sequence[Source], model: Model, out: Path) -> Stage:
    """The stage that makes the tiny model, with the words of all sets in its tokenizer."""
    values = {"out": out / TINY_FOLDER, "seed": recipe.seed, "data": [one.folder for one in sources]}
    own = {"family": "llava", "hidden_size": 128} if model.host == "hf" else {"checkpoint": True}
    command = Command(("python", "-m", f"vitask_plugin.{model.host}.tiny", *flags({**own, **values})))
    reads = tuple(f"data-{one.name}" for one in sources)
    return Stage(TINY_FOLDER, "Tiny model made", (command,), (out / TINY_FOLDER,), reads)


@dataclass(frozen=True)
class Tuning:
    """Everything that the three trainings of a recipe have in common.

    Attributes:
        tsm, features: folders; features is None where the exemplar needs none.
        data: what is trained on. cpu: without a GPU.
    """

    recipe: Recipe
    model: Model
    data: Training
    out: Path
    cpu: bool
    tsm: Path
    features: Path | None

    def folder(self, name: str) -> Path:
        """Where a training writes: upstream reads its kind from the folder's name."""
        return self.out / "-".join([self.model.host, *(["lora"] if self.recipe.training.lora else []), name])

    def vanilla(self) -> Stage:
        own = {name: value for name, value in self._flags().items() if not name.startswith("vitask_")}
        if EVAL_DATA in self.recipe.training.flags:  # without which nothing can be watched
            own = {name: value for name, value in own.items() if name not in WATCHING}
        epochs = self.recipe.training.vanilla_epochs
        return self._stage("vanilla", "Vanilla tuning", self.model.folder, epochs, own, ())

    def stages(self) -> list[Stage]:
        """Both stages of VITask."""
        training, start = self.recipe.training, self.model.folder
        features = () if self.features is None else ("features",)
        reads = (*(("tsm",) if self.recipe.tsm.folder is None else ()), *features)
        own = {"vitask": True, "vitask_tsm": self.tsm, "vitask_features": self.features, **self._flags()}
        first = {**own, "vitask_stage": 1}
        second = {**own, "vitask_stage": 2, "vitask_connector_path": self.folder("vitask-stage1")}
        if not training.lora:
            start = self.folder("vitask-stage1")
        one = self._stage("vitask-stage1", "VITask, stage 1", self.model.folder, training.stage1_epochs, first, reads)
        reads = (*reads, "vitask-stage1")
        return [one, self._stage("vitask", "VITask, stage 2", start, training.stage2_epochs, second, reads)]

    def _flags(self) -> dict[str, Any]:
        return dict(self.recipe.training.flags)

    def _stage(
        self, name: str, title: str, start: Path, epochs: float, own: Mapping[str, Any], reads: Sequence[str]
    ) -> Stage:
        saves = {} if self._resumes(name) else {"save_strategy": "no", "save_steps": None}
        values = {**self._common(start, epochs), **saves, "output_dir": self.folder(name), **own}
        words = self._launched(f"vitask_plugin.{self.model.host}.train", trainer_flags(values))
        model = () if self.model.stage is None else (self.model.stage,)
        files = [*self.model.files, *map(Path, self._deepspeed_file())]
        files += files_of(own, [EVAL_DATA])
        files += [path for path in files_of(own, PARTS_FROM_FILES) if path.exists()]  # or names of the Hub
        if self.recipe.tsm.folder is not None and reads:
            files.append(self.tsm)
        reads = (*self.data.reads, *model, *reads)
        outputs = (self.folder(name),)
        return Stage(name, title, (Command(tuple(words)),), outputs, reads, tuple(files), resumes=self._resumes(name))

    def _resumes(self, name: str) -> bool:
        """Not upstream LLaVA's own run with LoRA: its checkpoints hold the adapter and not the projector."""
        bare = name == "vanilla" and self.recipe.training.lora and self.model.host == "llava"
        return self.recipe.training.save_steps is not None and not bare

    def _deepspeed_file(self) -> list[str]:
        path = self._deepspeed()
        return [path] if path else []

    def _deepspeed(self) -> str | None:
        name = self.recipe.launch.deepspeed
        return name and str(config_path(name) if name in NAMES else Path(name).absolute())

    def _common(self, start: Path, epochs: float) -> dict[str, Any]:
        training = self.recipe.training
        precision = training.precision or ("float32" if self.cpu else "bf16")
        lora = {"lora_enable": True, "lora_r": training.lora_r, "lora_alpha": training.lora_alpha}
        if self.model.host == "llava":
            lora["mm_projector_lr"] = training.projector_lr or PROJECTOR_LR
        return {
            "model_name_or_path": start,
            **self.model.parts,
            "data_path": self.data.folder / "train.json",
            "image_folder": self.data.folder / "images",
            "model_max_length": training.max_length,
            **({"use_cpu": True} if self.cpu else {}),
            "bf16": precision == "bf16",
            **({"fp16": True} if precision == "fp16" else {}),
            **(lora if training.lora else {}),
            "num_train_epochs": f"{epochs:g}",
            "per_device_train_batch_size": training.batch_size,
            "gradient_accumulation_steps": training.accumulation,
            "gradient_checkpointing": training.gradient_checkpointing or None,
            "learning_rate": training.learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_ratio": 0.03,
            "weight_decay": 0.0,
            "seed": self.recipe.seed,
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": training.save_steps,
            "save_total_limit": 1,
            "report_to": "none",
            "deepspeed": self._deepspeed(),
        }

    def _launched(self, module: str, words: Sequence[str]) -> list[str]:
        launch = self.recipe.launch
        if launch.nodes > 1:
            start = (
                f"exec torchrun --nnodes {launch.nodes} --nproc_per_node {launch.processes} "
                '--node_rank "$SLURM_NODEID" '
                f'--master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" -m {module} "$@"'
            )
            nodes = ["--nodes", str(launch.nodes), "--ntasks-per-node", "1", "--kill-on-bad-exit=1"]
            return ["srun", *nodes, "bash", "-c", start, "task", *words]
        if launch.processes > 1:
            return ["torchrun", "--standalone", "--nproc_per_node", str(launch.processes), "-m", module, *words]
        return ["python", "-m", module, *words]
