"""A Trainer whose checkpoints are whole or absent, hold connector and `vitask.json`, and are resumed from safely."""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.integrations import is_deepspeed_zero3_enabled

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.reading import readable
from vitask_plugin.record import base, checkpoint, connector_file
from vitask_plugin.training import agreement, disk, precision, resuming, saving, universal
from vitask_plugin.training.exemplars import Exemplars
from vitask_plugin.training.samples import TaskSamples
from vitask_plugin.training.zero import gathered_weights


class WholeCheckpoints:
    """Saving and resuming; the folder is the host's, connector and record lie beside its weights."""

    vitask: VITaskArguments
    train_dataset: TaskSamples
    _vlm: nn.Module
    _version: str
    exemplars: Exemplars
    _digests: dict[str, str]
    _staging: str | None = None  # where a checkpoint is being written
    _gathered: dict[str, Tensor] | None = None  # the connector's weights, while `save_model` runs

    # Saving ----------------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any, metrics: Any = None) -> None:
        step, best = self.state.global_step, self.best_step()
        with saving.whole(self.args, self.model, step, best=best) as directory:
            self._staging = directory
            try:
                super()._save_checkpoint(model, trial)
                self.name_best(directory)
                if self.is_deepspeed_enabled and self.args.should_save and not self.args.save_only_model:
                    universal.name_latest(Path(directory) / f"checkpoint-{self.state.global_step}")
            finally:
                self._staging = None

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the host, on all ranks, and an error of writing ends it."""
        if is_deepspeed_zero3_enabled() and self.args.save_on_each_node and not _internal_call:
            agreement.say(f"ZeRO-3: the model is written into {output_dir} of the first node alone")
        self._gathered = self._connector_weights()  # `_save` is not called on all ranks
        refused = None
        try:
            super().save_model(output_dir, _internal_call)
        except _NotSavedError as error:
            refused = error.__cause__  # raised in here, it would have itself for a context
        finally:
            self._gathered = None
        if refused is not None:
            raise refused

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        output_dir = output_dir or self.args.output_dir
        connector = self._connector_weights() if self._gathered is None else self._gathered
        try:
            with self._ends_if_full():
                # ZeRO-3's are gathered on rank 0 alone; `model.state_dict()` would be empty tensors on the others.
                if state_dict is not None or not is_deepspeed_zero3_enabled():
                    self._save_weights(output_dir, self.model.state_dict() if state_dict is None else state_dict)
                if self.args.should_save:
                    self._write(output_dir, connector)
        except ValueError as error:
            if not self.is_deepspeed_enabled:
                raise
            raise _NotSavedError from error

    def _save_weights(self, output_dir: str, state_dict: dict[str, Tensor]) -> None:
        marker = f"{connector_file.CONNECTOR_NAME}."
        weights = {name: weight for name, weight in state_dict.items() if marker not in name}
        super()._save(output_dir, weights | self.weights_apart())

    def _connector_weights(self) -> dict[str, Tensor]:
        """Whole, on the CPU. Under ZeRO-3 all ranks have to call it."""
        connector = self._vlm.vitask_connector
        return {} if connector is None else gathered_weights(connector)

    def save_state(self) -> None:
        """Called when training has ended, before the host saves the model in its own way."""
        disk.check_room_for_weights(self.args, self.model)
        with self._ends_if_full():
            super().save_state()
        weights = self._connector_weights()
        precision.as_written(self.model)
        if self._vlm.vitask_connector is not None:
            # A host may put all other trainable weights of a LoRA run in one file, which its stock code loads by name.
            self._vlm.vitask_connector.requires_grad_(False)
        if self.args.should_save:
            with self._ends_if_full():
                self._write(self.args.output_dir, weights)

    @contextlib.contextmanager
    def _ends_if_full(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if self._staging is None:  # else `saving.whole` has to remove what is written first
                disk.check_written(error, self.args.output_dir, "the trained weights")
            raise

    def _write(self, directory: str, weights: dict[str, Tensor]) -> None:
        connector, data = self._vlm.vitask_connector, self.train_dataset
        if connector is not None:
            connector_file.save_connector(connector, weights, directory)
        features = self.exemplars.features
        tsm = None if features is None else {"hash": features.tsm_hash, "width": features.width}
        run = self._run([group["weight_decay"] for group in self.optimizer.param_groups])
        more = {"run": run, "images": data.seen.images, "questions": data.questions, "base": self._base}
        checkpoint.save_record(directory, self.vitask, connector, tsm, data.tasks, self._version, **more)
        self.finish_folder(directory)

    @functools.cached_property
    def _base(self) -> dict[str, str] | None:
        """What an adapter remembers of the weights it is trained on."""
        return base.sampled(self._vlm.config._name_or_path) if self.args.lora_enable else None

    # Resuming --------------------------------------------------------------------------------------------------------

    def _run(self, weight_decays: list[float]) -> dict[str, Any]:
        return resuming.run_of(self.args, weight_decays, self._digests)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As the host, but all ranks resume from one checkpoint, and from one that fits this run: see `resuming`."""
        directory = self._resumed(resume_from_checkpoint)
        disk.check_room_for_weights(self.args, self.model)  # rather now than after the last step
        return super().train(resume_from_checkpoint=directory and str(directory), **kwargs)

    def _resumed(self, asked: str | bool | None) -> Path | None:
        """The checkpoint that all ranks resume from. A host may ask on each rank whether it sees any."""
        saving.clear(self.args)
        directory = Path(asked) if isinstance(asked, str) else None
        if directory is None and any(agreement.gathered(bool(asked))):
            directory = resuming.newest(self.args.output_dir)
        run = self._run([])
        with agreement.together():
            convert = directory is not None and resuming.check(directory, self.vitask, run)
        if self.is_deepspeed_enabled:
            config = self.accelerator.state.deepspeed_plugin.deepspeed_config
            universal.prepare(directory, self.args, config, convert=convert)
        self._converted = convert
        if directory is not None:
            others = resuming.changed(directory, self.vitask, run)
            agreement.say(", ".join([f"resuming from {directory}", *others]))
        return directory

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with readable("checkpoint", resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._vlm.vitask_connector is not None:
            saved = connector_file.load_connector(resume_from_checkpoint)
            self._vlm.vitask_connector.load_state_dict(saved.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint_dir: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint_dir)
        if checkpoint_dir and self._converted and is_deepspeed_zero3_enabled():
            decays = checkpoint.read_record(checkpoint_dir)[checkpoint.RUN]["weight_decays"]
            universal.repair_optimizer(self.optimizer, self.lr_scheduler.get_last_lr(), decays)


class _NotSavedError(Exception):
    """Around a ValueError of `_save`: transformers' `save_model` takes one for a config that gathers no weights."""
