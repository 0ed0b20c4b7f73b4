"""The recipe of `vitask run`: every setting with its default and what it means, and what contradicts what.

A setting that is null has a default that depends on the model; `filled` puts it in. Flags of the training scripts that
have no name of their own here go through `training.flags`, those of `vitask data` and `tsm train` through theirs.
"""

from typing import Any

from pydantic import ConfigDict, Field

from vitask_plugin.files import digest_of
from vitask_plugin.formats.schema import Schema
from vitask_plugin.options import LARGEST_SEED

TINY = "tiny"  # the model that is made on the spot
Plain = str | int | float | bool  # what a flag takes


class Section(Schema):
    """A part of the recipe: unknown keys and values of another type are refused, nothing is converted."""

    model_config = ConfigDict(extra="forbid")


class DataSet(Section):
    """One set of labelled images: `images`, or `medmnist`."""

    images: str | None = Field(None, description="class folders (DIR/CLASS/*.png), or a CSV with image,label[,split]")
    modality: str | None = Field(None, description='what the images are: "Analyze the given MODALITY image."')
    medmnist: str | None = Field(None, description="in place of images: a MedMNIST set such as breastmnist, or drawn")
    size: int | None = Field(None, ge=28, description="medmnist: side in pixels, 28, 64, 128 or 224 (null: 28)")
    name: str | None = Field(None, description="what the set is called (null: name of the folder, CSV or set)")
    labels: list[str] | None = Field(None, description="classes in order of their ids (null: those found)")
    val: float = Field(0.1, ge=0, lt=1, description="share of images for validation where no split is given")
    test: float = Field(0.1, ge=0, lt=1, description="share of images for the test where no split is given")
    seed: int = Field(0, ge=0, le=LARGEST_SEED, description="of the random split; not that of the training")
    group_pattern: str | None = Field(None, description="finds the patient in a file's name: stays in one split")
    drop_duplicates: bool = Field(False, description="an image in two splits is left out of train (val, if in test)")
    allow_duplicates: bool = Field(False, description="go on if one image is in two splits, and keep both")
    flags: dict[str, Plain] = Field({}, description="more flags of `vitask data folder` or `medmnist`")


class TsmSection(Section):
    """The task-specific model."""

    folder: str | None = Field(None, description="one that is there already, in place of training one")
    arch: str | None = Field(None, description="timm model (null: {tsm.arch})")
    pretrained: bool | str | None = Field(
        None, description="start from timm's weights, downloaded, or from those of a file (null: {tsm.pretrained})"
    )
    image_size: int | None = Field(None, ge=8, description="side in pixels (null: {tsm.image_size})")
    epochs: int | None = Field(None, ge=1, description="(null: {tsm.epochs})")
    batch_size: int | None = Field(None, ge=2, description="images (null: {tsm.batch_size})")
    lr: float | None = Field(None, gt=0, description="peak learning rate (null: 1e-4 with pretrained, else 1e-3)")
    flags: dict[str, Plain] = Field({}, description="more flags of `vitask tsm train`")


class TrainingSection(Section):
    """Tuning of the VLM: vanilla, stage 1, stage 2."""

    stage1_epochs: float | None = Field(None, gt=0, description="(null: {training.stage1_epochs})")
    stage2_epochs: float | None = Field(None, gt=0, description="(null: {training.stage2_epochs})")
    vanilla_epochs: float | None = Field(None, gt=0, description="of the baseline (null: both stages together)")
    batch_size: int | None = Field(None, ge=1, description="samples per process (null: {training.batch_size})")
    accumulation: int = Field(1, ge=1, description="batches per step")
    learning_rate: float | None = Field(None, gt=0, description="peak (null: {training.learning_rate})")
    lora: bool | None = Field(None, description="adapters in place of all weights (null: {training.lora})")
    lora_r: int = Field(128, ge=1, description="rank of the adapters")
    lora_alpha: int = Field(256, ge=1, description="their scale times rank")
    projector_lr: float | None = Field(None, gt=0, description="LoRA on host llava: of the projector (null: 2e-5)")
    precision: str | None = Field(None, description="bf16, fp16 or float32 (null: bf16 on a GPU, else float32)")
    gradient_checkpointing: bool | None = Field(
        None, description="less memory, more time (null: {training.gradient_checkpointing})"
    )
    max_length: int = Field(2048, ge=1, description="tokens of a sample, image tokens included")
    save_steps: int | None = Field(
        500, ge=1, description="steps between checkpoints, which a killed run goes on from (null: none, it starts anew)"
    )
    flags: dict[str, Plain] = Field(
        {}, description="more flags of the training script, such as vitask_rda_weight; vanilla leaves vitask_* out"
    )


class EvaluateSection(Section):
    """lmms-eval on every set."""

    splits: list[str] = Field(["val", "test"], min_length=1, description="val to choose by, test to report")
    untuned: bool = Field(True, description="also judge the model as it was before")
    batch_size: int = Field(8, ge=1, description="questions of a forward")
    limit: int | None = Field(None, ge=1, description="only so many images of each set and split, to try out")


class LaunchSection(Section):
    """Where it runs."""

    device: str = Field("auto", description="auto (a GPU if there is one), cuda or cpu")
    processes: int = Field(1, ge=1, description="training processes per node, one for each GPU")
    nodes: int = Field(1, ge=1, description="above 1: training commands are started by srun, inside of a Slurm job")
    deepspeed: str | None = Field(None, description="zero2, zero3, zero2_offload, zero3_offload, or a JSON file")
    at_once: int = Field(1, ge=1, description="stages side by side, where none reads another: vanilla and the TSM")
    hours: int = Field(24, ge=1, description="of the Slurm job that --slurm FILE writes")
    cpus_per_process: int = Field(4, ge=1, description="of the same")
    environment: dict[str, str] = Field({}, description="variables set for every command")


class Recipe(Section):
    """From images to a judged specialist."""

    model: str | None = Field(None, description="folder of a LLaVA-1.5, or of any VLM in HF format; tiny: made here")
    host: str | None = Field(None, description="llava or hf (null: as the model's folder says; tiny: llava)")
    out: str | None = Field(None, description="folder that all is written into")
    seed: int = Field(0, ge=0, le=LARGEST_SEED, description="of the TSM, the tiny model and the training")
    baseline: bool = Field(False, description="also tune without VITask (vanilla), on as many samples")
    data: list[DataSet] = Field([], description="one set of labelled images, or several")
    allow_duplicates_between_sets: bool = Field(
        False, description="several sets: go on if one is judged by training images of another"
    )
    tsm: TsmSection = Field(TsmSection(), description="the task-specific model, an image classifier")
    training: TrainingSection = Field(TrainingSection(), description="tuning of the model")
    evaluate: EvaluateSection = Field(EvaluateSection(), description="lmms-eval")
    launch: LaunchSection = Field(LaunchSection(), description="where it runs")

    @property
    def digest(self) -> str:
        """Hex SHA-256 of all that results may depend on: not of the folder they are written into."""
        return digest_of(self.model_dump(exclude={"out"}))


# "section.key": of a real model, of the tiny one (Python values; None = not given to the command).
DEFAULTS: dict[str, tuple[Any, Any]] = {
    "tsm.arch": ("vit_base_patch16_224.augreg_in21k", "resnet10t"),
    "tsm.pretrained": (True, False),
    "tsm.image_size": (None, 28),
    "tsm.epochs": (30, 5),
    "tsm.batch_size": (64, 32),
    "training.stage1_epochs": (4.0, 1.0),
    "training.stage2_epochs": (4.0, 1.0),
    "training.batch_size": (4, 16),
    "training.learning_rate": (2e-4, 1e-3),
    "training.lora": (True, False),
    "training.gradient_checkpointing": (True, False),
}
FULL_LEARNING_RATE = 2e-5  # of all weights of a real model
PROJECTOR_LR = 2e-5


def filled(recipe: Recipe) -> Recipe:
    """The recipe with its null settings decided, as far as the model decides them."""
    tiny = recipe.model == TINY
    values = recipe.model_dump()
    for path, choices in DEFAULTS.items():
        section, key = path.split(".")
        if values[section][key] is None:
            values[section][key] = choices[tiny]
    training = values["training"]
    if recipe.training.learning_rate is None and not tiny and not training["lora"]:
        training["learning_rate"] = FULL_LEARNING_RATE
    if training["vanilla_epochs"] is None:
        training["vanilla_epochs"] = training["stage1_epochs"] + training["stage2_epochs"]
    if values["host"] is None and tiny:
        values["host"] = "llava"
    return Recipe.model_validate(values)
