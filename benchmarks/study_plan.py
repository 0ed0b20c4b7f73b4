"""What `study.py` runs: data sets, arms, settings, and in which order, so that a cut study is still balanced.

A run is one arm on one set with one seed. Round s holds seed s of the main arms on all sets, then that of all other
arms on `FEW_SETS`; the rounds of the others end after `FEW_SEEDS`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from vitask_plugin.files import digest_of

SEEDS, FEW_SEEDS = 5, 3


@dataclass(frozen=True)
class DataSet:
    """A set as it lies below --data-root.

    Attributes:
        file: a zip archive with `labels.csv` (image, label, group, split), or MedMNIST's npz.
        modality: of the instruction. labels: classes in order; none = by alphabet. flags: of `vitask data`.
        pictures: sets that show the same ones have the same word, and are never in one mean.
    """

    name: str
    file: str
    modality: str = ""
    labels: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    pictures: str = ""

    @property
    def medmnist(self) -> bool:
        return self.file.endswith(".npz")


_GRADES = tuple(f"Kellgren-Lawrence grade {grade}" for grade in range(5))
# Images that are in two splits, as they were published, stay there where an archive's own splits have them.
SETS = {
    one.name: one
    for one in (
        DataSet("busi", "busi.zip", "breast ultrasound", pictures="busi"),
        DataSet("malaria", "malaria.zip", "blood smear", flags=("--group", "group")),
        DataSet("blood", "blood_crops.zip", "blood cell microscopy", flags=("--group", "group")),
        DataSet("retina", "retinamnist.npz"),
        DataSet("knee", "knee.zip", "knee X-ray", _GRADES, ("--group", "group", "--ordinal")),
        DataSet("dermoscopy", "dermoscopy.zip", "dermoscopy"),
        DataSet("breast", "breastmnist.npz", pictures="busi"),
    )
}
FEW_SETS = ("malaria", "busi")


@dataclass(frozen=True)
class Arm:
    """What is done to the model, or in its place.

    Attributes:
        kind: tsm, linear_probe, untuned, vanilla, vitask, class_head, distilled (soft labels of the TSM), or average
            (of the probabilities of arm `of` and the TSM).
        first, second: flags of the two stages, or of vanilla's one run.
        folds: training images have the features of TSMs that have not seen them.
        compute: vanilla has as many steps as take as long as VITask's.
        exemplar: kind of exemplar.
    """

    kind: str
    first: Mapping[str, Any] = field(default_factory=dict)
    second: Mapping[str, Any] = field(default_factory=dict)
    folds: bool = False
    compute: bool = False
    exemplar: str = "none"
    of: str = ""


_NO_RDA, _NO_CRT = {"vitask_rda_weight": 0.0}, {"vitask_crt_weight": 0.0}


def _vitask(first: Mapping[str, Any] | None = None, second: Mapping[str, Any] | None = None, **more: Any) -> Arm:
    """Full VITask, and what is otherwise in its first and in its second stage."""
    own = first or {}
    return Arm("vitask", own, {**own, **(second or {})}, **{"exemplar": "cls", **more})


ARMS = {
    "tsm": Arm("tsm"),
    "linear_probe": Arm("linear_probe"),
    "untuned": Arm("untuned"),
    "vanilla": Arm("vanilla"),
    "vitask": _vitask(),
    "vitask_folds": _vitask(folds=True),
    "average": Arm("average", of="vanilla"),
    "class_head": Arm("class_head"),
    "soft_label_distillation": Arm("distilled"),
    "vanilla_compute": Arm("vanilla", compute=True),
    "ep": _vitask(_NO_RDA, _NO_CRT),
    "rda": _vitask({}, _NO_CRT),
    "crt": _vitask(_NO_RDA),
    "rda_3": _vitask({"vitask_rda_weight": 3.0}),
    "rda_attached": _vitask({"vitask_rda_detach": False}),
    "learned": _vitask(exemplar="learned"),
    "label_as_text": _vitask(exemplar="text"),
    "vanilla_frozen_projector": Arm("vanilla", {"freeze_projector": True}),
}
MAIN = ("tsm", "linear_probe", "untuned", "vanilla", "vitask", "vitask_folds", "average")
# Once a set, whatever the seed: nothing is drawn.
ONCE = ("linear_probe", "untuned")


@dataclass(frozen=True)
class Settings:
    """What all runs have alike; chosen on validation images."""

    steps: int = 150  # of each of the two stages; vanilla has both
    compute_ratio: float = 1.9  # what a step of VITask costs, in vanilla's (benchmarks/LOG.md)
    batch: int = 8
    learning_rate: float = 1e-3
    lora_r: int = 16
    lora_alpha: int = 32
    bf16: bool = True
    tsm_arch: str = "tf_efficientnet_lite0"
    tsm_image_size: int = 96
    tsm_epochs: int = 8
    tsm_batch: int = 16
    tsm_lr: float = 3e-4
    folds: int = 3
    judge_batch: int = 16

    def of_tsm(self) -> dict[str, Any]:
        """Those that a TSM without folds depends on."""
        return {name: value for name, value in asdict(self).items() if name.startswith("tsm_")}


@dataclass(frozen=True)
class Run:
    data: str
    arm: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.data}-{self.arm}-{self.seed}"


# Kinds of arms that not all sources, nor all settings, have a part in.
_PARTS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "tsm": (("tsm_weights", "data"), {}),
    "linear_probe": (("tower", "data"), {}),
}


def plan(sets: Sequence[str], arms: Sequence[str], seeds: int) -> list[Run]:
    """All runs in their order."""
    runs = []
    for seed in range(seeds):
        runs += [Run(data, arm, seed) for arm in MAIN if arm in arms for data in sets]
        if seed < FEW_SEEDS:
            few = [data for data in FEW_SETS if data in sets] or sets[:1]
            runs += [Run(data, arm, seed) for arm in arms if arm not in MAIN for data in few]
    return [run for run in runs if run.seed == 0 or run.arm not in ONCE]


def config_of(run: Run, settings: Settings, sources: Mapping[str, str]) -> dict[str, Any]:
    """What a run's figures depend on, but for versions and machine.

    Args:
        sources: digests of the `model`, of its `tower`, of the TSM's start (`tsm_weights`) and of the set (`data`).
    """
    arm = {name: value for name, value in asdict(ARMS[run.arm]).items() if value}
    parts, own = _PARTS.get(arm["kind"], (("model", "tsm_weights", "data"), asdict(settings)))
    if arm["kind"] == "tsm":
        own = settings.of_tsm()
    return {"arm": arm, "settings": own, **{name: sources[name] for name in parts if name in sources}}


def digest(config: Mapping[str, Any]) -> str:
    return digest_of(config)[:16]


def undone(runs: Sequence[Run], digests: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> Iterator[Run]:
    """Those without a row of the same digest. `digests`: by name of the run."""
    done = {(row["data"], row["arm"], row["seed"], row["digest"]) for row in rows}
    return (run for run in runs if (run.data, run.arm, run.seed, digests[run.name]) not in done)
