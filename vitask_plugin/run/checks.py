"""What is wrong with a recipe by itself, before any work: each with one sentence that names key and value."""

import contextlib
import difflib
import io
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.data.instructions import label_set
from vitask_plugin.data.medmnist import SIZES
from vitask_plugin.data.parts import IMAGES
from vitask_plugin.deepspeed.configs import NAMES, read_zero
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import check_folder
from vitask_plugin.formats.json_text import read_json
from vitask_plugin.record.host import HOSTS, TOWER, host_of
from vitask_plugin.run.plan import sources_of
from vitask_plugin.run.recipe import TINY, DataSet, Recipe, TsmSection, filled
from vitask_plugin.run.stage import trainer_flags
from vitask_plugin.run.training_stages import EVAL_DATA

SPLITS = ("val", "test")
PRECISIONS = ("bf16", "fp16", "float32")


def check(recipe: Recipe, out: Path) -> None:
    """Everything but what it asks of the machine (`machine.py`).

    Raises:
        VITaskError: the first thing that is wrong.
    """
    for name, hint in (("model", "--model DIR, or tiny"), ("out", "--out DIR"), ("data", "--images DIR")):
        if not getattr(recipe, name):
            raise VITaskError(f"recipe: {name} is not given; give {hint}")
    for name, path in (("model", recipe.model), ("tsm.folder", recipe.tsm.folder)):
        if path is not None and "," in path:
            raise VITaskError(f"recipe: {name} {path!r} holds a comma, which lmms-eval takes for the end of a path")
    for number, one in enumerate(recipe.data):
        _check_set(one, f"data.{number}")
    _check_names(recipe, out)
    _check_model(recipe)
    _check_tsm(recipe.tsm)
    _check_training(recipe)
    _one_of("launch.device", recipe.launch.device, ("auto", "cuda", "cpu"))
    for split in recipe.evaluate.splits:
        _one_of("evaluate.splits", split, SPLITS)
    if len(set(recipe.evaluate.splits)) != len(recipe.evaluate.splits):
        raise VITaskError(f"recipe: evaluate.splits is {recipe.evaluate.splits}; name each split once")
    launch = recipe.launch
    if launch.deepspeed is not None:
        if not Path(launch.deepspeed).is_file():
            _one_of("launch.deepspeed", launch.deepspeed, (*NAMES, "a JSON file"))
        read_zero(launch.deepspeed)
    if launch.at_once > 1 and (launch.nodes > 1 or (launch.deepspeed is not None and launch.processes == 1)):
        other = f"launch.nodes: {launch.nodes}" if launch.nodes > 1 else f"launch.deepspeed: {launch.deepspeed}"
        raise _contradicts(f"launch.at_once: {launch.at_once}", other, "two trainings would take the same port")


def _one_of(key: str, value: str | None, known: Collection[str]) -> None:
    if value not in known:
        near = difflib.get_close_matches(str(value), known, 1)
        hint = f"; the nearest is {near[0]!r}" if near else ""
        raise VITaskError(f"recipe: {key} is {value!r}; it must be one of {', '.join(known)}{hint}")


def _contradicts(key: str, other: str, why: str) -> VITaskError:
    return VITaskError(f"recipe: {key} and {other} contradict each other: {why}; leave one of them out")


def _check_set(one: DataSet, where: str) -> None:
    if one.images is not None and one.medmnist is not None:
        raise _contradicts(f"{where}.images", f"{where}.medmnist", "a set has one source")
    if one.images is None and one.medmnist is None:
        raise VITaskError(f"recipe: {where} has no images; give {where}.images or {where}.medmnist")
    if one.drop_duplicates and one.allow_duplicates:
        raise _contradicts(
            f"{where}.drop_duplicates", f"{where}.allow_duplicates", "one leaves out what the other keeps"
        )
    kind = "folder" if one.medmnist is None else "medmnist"
    _check_command_flags(one.flags, f"{where}.flags", ("data", kind), _own_data(where))
    if one.medmnist is not None:
        label_set(one.medmnist)
        if one.size is not None:
            _one_of(f"{where}.size", str(one.size), [str(size) for size in SIZES])
        for name in ("modality", "name", "labels", "group_pattern"):
            if getattr(one, name) is not None:
                raise _contradicts(f"{where}.{name}", f"{where}.medmnist", "MedMNIST says it itself")
        return
    if one.size is not None:
        raise _contradicts(f"{where}.size", f"{where}.images", "it is of MedMNIST; images take flags: {max_side: N}")
    if not Path(one.images).exists():
        raise VITaskError(f"recipe: {where}.images {one.images!r} does not exist; give a folder or a CSV file")
    if not one.modality:
        raise VITaskError(f'recipe: {where}.modality is not given; say what the images are, such as "brain MRI"')
    if one.val + one.test >= 1:
        raise VITaskError(
            f"recipe: {where}.val and {where}.test are {one.val:g} and {one.test:g}; leave something for the training"
        )


def _own_data(where: str) -> dict[str, str]:
    keys = {name: name for name in DataSet.model_fields if name not in ("images", "medmnist", "name", "flags")}
    return {name: f"{where}.{key}" for name, key in {**keys, "task": "name", "out": "name"}.items()}


def _check_names(recipe: Recipe, out: Path) -> None:
    known: dict[str, int] = {}
    for number, one in enumerate(sources_of(recipe, out)):
        if one.name == IMAGES and len(recipe.data) > 1:  # which are merged
            raise VITaskError(
                f"recipe: data.{number} is called {IMAGES!r}, as the folder of all images is; "
                f"give it a name (data.{number}.name)"
            )
        if one.name in known:
            raise VITaskError(
                f"recipe: data.{known[one.name]} and data.{number} are both called {one.name!r}; give one a name"
            )
        known[one.name] = number


def _check_model(recipe: Recipe) -> None:
    if recipe.host is not None:
        _one_of("host", recipe.host, HOSTS)
    if recipe.model == TINY:
        return
    check_folder(recipe.model, "recipe: model")
    found = host_of(recipe.model)
    if found is None:
        raise VITaskError(
            f"recipe: model {recipe.model!r} is no vision-language model; give a LLaVA-1.5 or a model in HF format"
        )
    if recipe.host not in (None, found):
        raise _contradicts("host", "model", f"{recipe.model!r} is a model of host {found}, not of {recipe.host}")
    if found == "llava" and not read_json(Path(recipe.model) / "config.json", "model configuration").get(TOWER):
        raise VITaskError(
            f"recipe: model {recipe.model!r} names no vision tower ({TOWER} in config.json); give a LLaVA"
        )


def _check_tsm(tsm: TsmSection) -> None:
    _check_command_flags(tsm.flags, "tsm.flags", ("tsm", "train"), OWN_TSM)
    if tsm.folder is None:
        return
    check_folder(tsm.folder, "recipe: tsm.folder")
    for name in TsmSection.model_fields:
        if name != "folder" and getattr(tsm, name):
            raise _contradicts(f"tsm.{name}", "tsm.folder", "a TSM that is there is not trained")


def _check_command_flags(flags: Mapping[str, Any], where: str, words: Sequence[str], own: Mapping[str, str]) -> None:
    """Refuses flags that a command does not have by just this name, or that the recipe gives by a key of its own."""
    known = _options(words) if flags else ()  # the commands take seconds to import
    for given in flags:
        name = given.replace("-", "_")
        if name in own:
            raise _contradicts(f"{where}.{given}", own[name], "they say the same thing")
        if name not in known:
            raise _unknown(f"{where}.{given}", f"`vitask {' '.join(words)}`", name, known)


def _options(words: Sequence[str]) -> set[str]:
    """The options of one of `vitask`'s commands, with underscores: argparse itself takes the beginning of one too."""
    from vitask_plugin.cli import build_parser

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        build_parser(words).parse_args([*words, "--help"])
    return {name.replace("-", "_") for name in re.findall(r"^  (?:-\w, )?--([\w-]+)", said.getvalue(), re.MULTILINE)}


def _unknown(key: str, command: str, name: str, known: Collection[str]) -> VITaskError:
    near = difflib.get_close_matches(name, sorted(known), 1)
    hint = f"; the nearest known one is {near[0]!r}" if near else ""
    return VITaskError(f"recipe: {key} is no flag of {command}{hint}")


def _check_training(recipe: Recipe) -> None:
    training = recipe.training
    if training.precision is not None:
        _one_of("training.precision", training.precision, PRECISIONS)
    if training.vanilla_epochs is not None and not recipe.baseline:
        raise _contradicts("training.vanilla_epochs", "baseline: false", "nothing is tuned without VITask")
    if not training.flags:
        return  # the scripts' own lists take seconds to import
    host = filled(recipe).host or host_of(recipe.model)
    known = {one.name for one in fields(VITaskArguments)}
    others = _host_flags(host)
    for name in training.flags:
        if name in OWN:
            raise _contradicts(f"training.flags.{name}", OWN[name], "they say the same thing")
        if name not in known | others:
            raise _unknown(f"training.flags.{name}", "the training script", name, known | others)
    _check_values(training.flags, host)
    watched = training.flags.get(EVAL_DATA)
    if watched is not None:
        path, out = Path(str(watched)).absolute(), Path(recipe.out or "").absolute()
        if not path.is_relative_to(out) and not path.is_file():
            raise VITaskError(f"recipe: training.flags.{EVAL_DATA} {str(watched)!r} is no file; give a JSON of samples")


def _check_values(given: Mapping[str, Any], host: str) -> None:
    """Refuses what stage 1 or 2 would not take, as far as that is seen without building anything."""
    from transformers import HfArgumentParser, TrainingArguments
    from transformers.trainer_utils import IntervalStrategy, SchedulerType

    from vitask_plugin.training import flags as training_flags

    for name, kind in (("eval_strategy", IntervalStrategy), ("lr_scheduler_type", SchedulerType)):
        if name in given:
            _one_of(f"training.flags.{name}", str(given[name]), [one.value for one in kind])
    own = {"vitask": True, "vitask_stage": 2, "vitask_tsm": "tsm", "output_dir": "out"}
    defaults = {"remove_unused_columns": False}  # of the scripts; transformers' own is another
    parser = HfArgumentParser((VITaskArguments, TrainingArguments), allow_abbrev=False)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parsed, _ = parser.parse_known_args(trainer_flags({**defaults, **given, **own}))
    except SystemExit:
        why = said.getvalue().strip().rpartition("error: ")[2]
        raise VITaskError(f"recipe: training.flags: the training script does not take it: {why}") from None
    try:
        VITaskArguments(**{one.name: getattr(parsed, one.name) for one in fields(VITaskArguments)})
        training_flags.check(parsed, _refused(host))
    except VITaskError as error:
        raise VITaskError(f"recipe: training.flags: {error}") from None


# Flags of `vitask tsm train` that the recipe gives by itself, and by which key.
OWN_TSM = {
    **{name: f"tsm.{name}" for name in ("arch", "pretrained", "image_size", "epochs", "batch_size", "lr")},
    **{"data": "data", "val": "data", "image_folder": "data"},
    **{"seed": "seed", "device": "launch.device", "out": "out"},
}

# Flags of the training scripts that the recipe gives by itself, and by which key.
OWN = {
    "vitask": "the run",
    "vitask_stage": "the run",
    "vitask_connector_path": "the run",
    "vitask_tsm": "tsm",
    "vitask_features": "tsm",
    "model_name_or_path": "model",
    "data_path": "data",
    "image_folder": "data",
    "output_dir": "out",
    "seed": "seed",
    "num_train_epochs": "training.stage1_epochs",
    "per_device_train_batch_size": "training.batch_size",
    "gradient_accumulation_steps": "training.accumulation",
    "gradient_checkpointing": "training.gradient_checkpointing",
    "learning_rate": "training.learning_rate",
    "mm_projector_lr": "training.projector_lr",
    "lora_enable": "training.lora",
    "lora_r": "training.lora_r",
    "lora_alpha": "training.lora_alpha",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "model_max_length": "training.max_length",
    "save_steps": "training.save_steps",
    "save_strategy": "the run",
    "use_cpu": "launch.device",
    "deepspeed": "launch.deepspeed",
}


def _host_flags(host: str) -> set[str]:
    if host == "hf":
        from vitask_plugin.hf.arguments import HONOURED
    else:
        from vitask_plugin.llava.flags import HONOURED
    return set(HONOURED) | set(_refused(host))


def _refused(host: str) -> Mapping[str, Any]:
    if host == "hf":
        from vitask_plugin.hf.arguments import REFUSED
    else:
        from vitask_plugin.llava.flags import REFUSED
    return REFUSED
