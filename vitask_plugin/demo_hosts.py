"""The hosts that `vitask demo` shows, and the settings of each, as a recipe of `vitask run`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vitask_plugin.data.instructions import DRAWN
from vitask_plugin.data.medmnist import ROOT
from vitask_plugin.run.recipe import TINY, DataSet, EvaluateSection, LaunchSection, Recipe, TrainingSection, TsmSection

JUDGE_BATCH = 32


@dataclass(frozen=True)
class Settings:
    """What tuning depends on, of vanilla and of both stages of VITask. `benchmarks/demo_seeds.py` tries others.

    RDA weighs twice its default: a model that starts from random weights, on labels of which many are wrong, has more
    to learn from the exemplar branch than from them (on validation images .685 against .657, `benchmarks/LOG.md`).
    """

    batch: int = 16
    learning_rate: float = 1e-3
    rda_weight: float = 2.0
    crt_weight: float = 0.1
    connector_lr: float = 2e-3


@dataclass(frozen=True)
class DemoHost:
    """One host.

    Attributes:
        name: of the recipe's `host`. tuned: what is tuned and by what, as part of a sentence. title: of the table.
        packages: whose versions are reported. record: what else `results.json` says of the host.
    """

    name: str
    tuned: str
    packages: tuple[str, ...]
    title: str = ""
    record: Mapping[str, str] = field(default_factory=dict)
    settings: Settings = Settings()


_PACKAGES = ("lmms_eval", "transformers", "torch", "timm", "medmnist")
HOSTS = {
    "llava": DemoHost(
        "llava",
        "A tiny LLaVA, made from random numbers, tuned on {} with upstream's training script",
        ("vitask-plugin", "llava-torch", *_PACKAGES),
    ),
    "hf": DemoHost(
        "hf",
        "A tiny LlavaForConditionalGeneration, made from random numbers, tuned on {} with `python -m "
        "vitask_plugin.hf.train`",
        ("vitask-plugin", *_PACKAGES),
        title="HF host: ",
        record={"host": "hf"},
    ),
}


def recipe_of(
    host: DemoHost, data: str, out: Path, *, seed: int, epochs: int, split: str, settings: Settings | None
) -> Recipe:
    """The demo as a recipe; what it leaves open is as of any tiny model.

    Args:
        data: name of a medmnist set, or drawn, whose file is in `out`. epochs: of each of the two stages; vanilla
            tuning has as many as both. split: that is judged. settings: None = the host's.
    """
    settings = settings or host.settings
    weights = {"rda_weight": settings.rda_weight, "crt_weight": settings.crt_weight}
    own_flags = {f"vitask_{name}": value for name, value in {**weights, "connector_lr": settings.connector_lr}.items()}
    environment = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    if data == DRAWN.flag:
        environment[ROOT] = str(out)
    return Recipe(
        model=TINY,
        host=host.name,
        out=str(out),
        seed=seed,
        baseline=True,
        data=[DataSet(medmnist=data, allow_duplicates=True)],
        tsm=TsmSection(lr=2e-3),
        training=TrainingSection(
            stage1_epochs=float(epochs),
            stage2_epochs=float(epochs),
            batch_size=settings.batch,
            learning_rate=settings.learning_rate,
            max_length=1024,
            save_steps=None,
            flags=own_flags,
        ),
        evaluate=EvaluateSection(splits=[split], untuned=False, batch_size=JUDGE_BATCH),
        # Two commands side by side, each on one thread.
        launch=LaunchSection(device="cpu", at_once=2, environment=environment),
    )
