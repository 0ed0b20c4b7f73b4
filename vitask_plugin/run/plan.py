"""A recipe as a list of commands: data, TSM, features, vanilla, stage 1, stage 2, lmms-eval, report, figures, card."""

import os
from pathlib import Path

from vitask_plugin.run import data_stages
from vitask_plugin.run.data_stages import Source, Training
from vitask_plugin.run.judging_stages import Judging, interpreter_folder
from vitask_plugin.run.recipe import TINY, Recipe, filled
from vitask_plugin.run.stage import Plan, Stage
from vitask_plugin.run.training_stages import Tuning, model_of, tiny

# Kinds of exemplar that read extracted features, and which.
_TOKENS = {"cls": "cls", "all": "all", "replace": "all"}


def sources_of(recipe: Recipe, out: Path) -> list[Source]:
    """The data sets of a recipe and where each goes."""
    return [data_stages.source(given, out) for given in recipe.data]


def exemplar_kind(recipe: Recipe) -> str:
    """`--vitask_ep` of the recipe, or its default."""
    from vitask_plugin.arguments import VITaskArguments

    return str(recipe.training.flags.get("vitask_ep", VITaskArguments.vitask_ep))


def tokens_of(recipe: Recipe) -> str | None:
    """Which features the exemplar reads, None = none."""
    return _TOKENS.get(exemplar_kind(recipe))


def make_plan(recipe: Recipe, out: Path, device: str, *, concluded: bool = True) -> Plan:
    """The plan of a recipe that was checked.

    Args:
        out: absolute. device: cpu or cuda. concluded: with page, figures and card.
    """
    recipe = filled(recipe)
    sources = sources_of(recipe, out)
    stages: list[Stage] = [data_stages.written(one, recipe) for one in sources]
    data = Training(sources[0].folder, (f"data-{sources[0].name}",))
    if len(sources) > 1:
        stages.append(
            data_stages.merged(sources, out / "merged", allow_duplicates=recipe.allow_duplicates_between_sets)
        )
        data = Training(out / "merged", (*(stage.name for stage in stages[:-1]), "data"))
    model = model_of(recipe, out)
    if model.stage is not None:
        stages.append(tiny(recipe, sources, model, out))
    tsm = out / "tsm" if recipe.tsm.folder is None else Path(recipe.tsm.folder).absolute()
    if recipe.tsm.folder is None:
        stages.append(data_stages.tsm(recipe, data, tsm, device))
    features = None
    if (tokens := tokens_of(recipe)) is not None:
        features = out / "features"
        stages.append(data_stages.features(recipe, tsm, data, features, device, tokens))
    tuning = Tuning(recipe, model, data, out, device == "cpu", tsm, features)
    first, second = tuning.stages()
    vanilla = tuning.vanilla() if recipe.baseline else None
    trainings = [*([vanilla] if vanilla else []), first, second]
    stages += trainings
    judging = Judging(recipe, model, sources, out, tsm, device)
    lora, tuned = bool(recipe.training.lora), second.outputs[0]
    judged = [judging.tsm_stage()]
    if recipe.evaluate.untuned:
        judged.append(judging.stage("untuned", model.folder, ()))
    if vanilla:
        judged.append(judging.stage("vanilla", vanilla.outputs[0], (vanilla.name,), lora=lora))
    judged.append(judging.stage("vitask", tuned, (second.name,), lora=lora))
    if (exemplar := exemplar_kind(recipe)) != "none":
        judged.append(judging.stage("vitask-ep", tuned, (second.name,), lora=lora, exemplar=exemplar))
    arms = [stage.name.removeprefix("judge-") for stage in judged]
    stages += [*judged, *(judging.conclusions(arms, trainings) if concluded else [])]
    return Plan(out, tuple(stages), environment_of(recipe, device), recipe.launch.at_once)


def environment_of(recipe: Recipe, device: str) -> dict[str, str]:
    """Variables of every command; `PATH` begins where the programs of this environment are."""
    own: dict[str, str] = {}
    if device == "cpu":
        own["CUDA_VISIBLE_DEVICES"] = ""
    if recipe.model == TINY:
        # Sums in the same order on any machine; a model this small gains nothing by more threads.
        own |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    own["TOKENIZERS_PARALLELISM"] = "false"
    path = os.pathsep.join([interpreter_folder(), os.environ.get("PATH", "")]).rstrip(os.pathsep)
    return {"PATH": path, **own, **recipe.launch.environment}
