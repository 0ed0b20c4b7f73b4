"""A Trainer that watches a run on labelled validation data, and keeps the best checkpoint as transformers' own does.

What is scored is `validation_round`, what is made of it `validation_metrics`; when, which is best and when to stop
early are the Trainer's own, by its own flags.
"""

import dataclasses
import logging
import time
from pathlib import Path
from typing import Any

from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import speed_metrics

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.errors import VITaskError
from vitask_plugin.inference.asking import Asker
from vitask_plugin.inference.off_label import cause_of
from vitask_plugin.method.branches import LAYOUTS
from vitask_plugin.training import agreement, starting
from vitask_plugin.training.asked import out_of_training
from vitask_plugin.training.exemplars import Exemplars
from vitask_plugin.training.samples import TaskSamples
from vitask_plugin.training.validation_metrics import PREFIX, ValidationMetrics
from vitask_plugin.training.validation_round import scored_samples
from vitask_plugin.training.validation_samples import ValidationSamples
from vitask_plugin.tsm.features import FeatureStore

logger = logging.getLogger(__name__)

FEATURES_FOLDER = "vitask_eval_features"  # in the output folder, where --vitask_features has none of these images


@dataclasses.dataclass(frozen=True)
class Validation:
    """What a run is validated on."""

    samples: ValidationSamples
    exemplars: Exemplars
    metrics: ValidationMetrics


def read(vitask: VITaskArguments, train: TaskSamples, args: Any) -> tuple[ValidationSamples, ValidationMetrics] | None:
    """What a run is to be validated on, looked at before anything long; None without --vitask_eval_data. All ranks
    have to call it.

    Args:
        train: the training samples. args: the training arguments.

    Raises:
        VITaskError: on every rank; what `ValidationSamples` refuses, features that lack an image where no TSM is
            given, an unknown --metric_for_best_model.
    """
    if vitask.vitask_eval_data is None:
        return None
    with agreement.together():
        samples = ValidationSamples(vitask, train, args.seed)
        metrics = ValidationMetrics(samples.list_data_dict, samples.tasks, exemplars=vitask.uses_exemplar)
        _check_metric(args.metric_for_best_model, metrics.names, vitask.vitask_eval_data)
        if vitask.uses_tsm:
            _features_of(samples, vitask, args.output_dir)
    return samples, metrics


def prepare(
    samples: ValidationSamples, metrics: ValidationMetrics, vitask: VITaskArguments, exemplars: Exemplars, args: Any
) -> Validation:
    """Extracts what the samples' exemplars are made of, if need be. All ranks have to call it.

    Args:
        exemplars: of the training samples. args: the training arguments.

    Raises:
        VITaskError: on every rank; features that lack an image or are of another TSM than the training's.
    """
    directory, found = None, ()
    if vitask.uses_tsm:
        directory, extracts = _features_of(samples, vitask, args.output_dir)
        if extracts:
            starting.extract_into(directory, vitask, samples, args)
        with agreement.together():
            found = starting.open_store(directory, vitask)
            found[0].check_tsm(exemplars.features.tsm_hash)
            _check_whole(found[0], samples, directory)
    contents = starting.see_images(samples, directory, args)
    with agreement.together():
        own = Exemplars(vitask, samples, contents, *found)
    agreement.check_data(samples.digests())
    agreement.say(f"{len(samples)} validation samples of {', '.join(map(repr, metrics.kinds))}")
    return Validation(samples, own, metrics)


def _features_of(samples: ValidationSamples, vitask: VITaskArguments, output_dir: str) -> tuple[Path, bool]:
    """Where the samples' features are, and whether they have to be extracted into there first."""
    if vitask.vitask_features:
        given = FeatureStore.open(vitask.vitask_features)
        if all(image in given for image in samples.task_images()):
            return Path(vitask.vitask_features), False
    if vitask.vitask_tsm is None:
        raise VITaskError(
            f"--vitask_features {vitask.vitask_features!r} lacks images of --vitask_eval_data "
            f"{vitask.vitask_eval_data!r}; give --vitask_tsm DIR to have them extracted, or extract both files with "
            "`vitask tsm extract --data TRAIN_JSON VAL_JSON`"
        )
    return Path(output_dir) / FEATURES_FOLDER, True


def _check_whole(store: FeatureStore, samples: ValidationSamples, directory: Path) -> None:
    missing = next((image for image in samples.task_images() if image not in store), None)
    if missing is not None:
        raise VITaskError(
            f"features {str(directory)!r} of an earlier start hold nothing for the validation image {missing!r}; "
            "delete the folder to have them extracted again"
        )


def _check_metric(metric: str | None, names: list[str], data: str) -> None:
    if metric is not None and f"{PREFIX}_{metric.removeprefix(PREFIX + '_')}" not in names:
        *known, last = (name.removeprefix(f"{PREFIX}_") for name in names)
        raise VITaskError(
            f"--metric_for_best_model {metric} is none of the metrics of --vitask_eval_data {data!r}; choose "
            f"{', '.join(known)} or {last}"
        )


class Validated:
    """Evaluation of a Trainer, before it in the order of inheritance; the rest is what `VITaskTraining` has.

    Attributes:
        validation: None without --vitask_eval_data.
    """

    vitask: VITaskArguments
    validation: Validation | None
    _vlm: nn.Module
    _asker: Asker | None = None
    _collapsed: frozenset[str] = frozenset()  # tasks that have been warned of
    _off_label: frozenset[tuple[str, bool]] = frozenset()  # (task, branch) of the latest round

    def validating_callbacks(self) -> list[TrainerCallback]:
        """What ends a run early, if it is asked for."""
        patience = self.vitask.vitask_early_stopping_patience
        if self.validation is None or not patience:
            return []
        stopping = EarlyStoppingCallback(patience)
        return [stopping, _PatienceGoesOn(stopping)]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """A round's metrics, logged; all ranks have to call it."""
        samples, metrics = self.validation.samples, self.validation.metrics
        self._asker = self._asker or self.make_asker()
        start = time.time()
        with out_of_training(self.model, self.accelerator):
            scored = scored_samples(
                samples,
                self.validation.exemplars,
                self._asker,
                self._vlm,
                layout=LAYOUTS["branches" if self.vitask.vitask_engine == "branches" else "packed"],
                batch_size=self.args.per_device_eval_batch_size,
                workers=self.args.dataloader_num_workers,
                ready=self._prepare_input,
            )
        found = metrics.of(scored) | speed_metrics(PREFIX, start, num_samples=len(samples))
        self._say_collapsed(metrics.collapsed(scored))
        self._say_off_label(metrics.off_label(scored))
        self.log(dict(found))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    def _say_collapsed(self, sentences: dict[str, str]) -> None:
        for task in sentences.keys() - self._collapsed:
            self._warn(sentences[task])
        self._collapsed |= sentences.keys()

    def _say_off_label(self, sentences: dict[tuple[str, bool], str]) -> None:
        """Once, and again where the answers had become labels in between."""
        if self.state.global_step == 0:
            return  # of an untuned model nothing else is to be expected
        cause = cause_of(self.vitask.flags())
        for key in sorted(sentences.keys() - self._off_label):
            self._warn(f"{sentences[key]}; {cause}" if cause else sentences[key])
        self._off_label = frozenset(sentences)

    def _warn(self, sentence: str) -> None:
        if agreement.rank() == 0:
            logger.warning("step %d: %s", self.state.global_step, sentence)

    # The best checkpoint -----------------------------------------------------------------------------------------

    def best_step(self) -> int | None:
        """The step of the best checkpoint that is there, or is being written."""
        if self.state.best_global_step == self.state.global_step:
            return self.state.global_step
        best = self.state.best_model_checkpoint
        return int(Path(best).name.rpartition("-")[2]) if best else None

    def name_best(self, staging: str) -> None:
        """Where the best checkpoint will be, in place of where it is being written."""
        best = self.state.best_model_checkpoint
        if best is None or Path(best).parent != Path(staging):
            return
        self.state.best_model_checkpoint = str(Path(self.args.output_dir) / Path(best).name)
        if self.args.should_save:
            self.state.save_to_json(str(Path(best) / TRAINER_STATE_NAME))

    def _load_best_model(self) -> None:
        """As the Trainer, and all that a checkpoint holds: the connector, and what is trained beside an adapter."""
        if self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint, self.model)
        agreement.say(
            f"the weights are those of {self.state.best_model_checkpoint}, the best by "
            f"--metric_for_best_model {self.args.metric_for_best_model}: {self.state.best_metric:.4f}"
        )


class _PatienceGoesOn(TrainerCallback):
    """A resumed run has been waiting for a better metric as long as the checkpoint says."""

    def __init__(self, stopping: EarlyStoppingCallback) -> None:
        self._stopping = stopping

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        before = state.stateful_callbacks.get(type(self._stopping).__name__)
        if isinstance(before, dict):
            self._stopping.early_stopping_patience_counter = before["attributes"]["early_stopping_patience_counter"]
