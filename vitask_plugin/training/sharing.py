"""A Trainer whose output is ready for others: a model card at the end, and with --push_to_hub the folder on the Hub."""

from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from torch import nn

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.data.instructions import read_samples
from vitask_plugin.formats.json_text import read_json
from vitask_plugin.model_folder import has_adapter
from vitask_plugin.record.checkpoint import versions
from vitask_plugin.record.host import host_of
from vitask_plugin.sharing import hub
from vitask_plugin.sharing.base import base_model
from vitask_plugin.sharing.card import save_card
from vitask_plugin.sharing.facts import DataSet, Facts, class_counts, license_of, modality_of
from vitask_plugin.training import agreement
from vitask_plugin.training.exemplars import Exemplars
from vitask_plugin.training.samples import TaskSamples
from vitask_plugin.tsm.model import RECORD_FILE as TSM_FILE

# Said by lines of their own, or places.
_SAID = (
    *("vitask", "vitask_stage", "vitask_ep", "vitask_rda_weight", "vitask_crt_weight", "vitask_engine"),
    *("vitask_tsm", "vitask_features", "vitask_connector_path", "vitask_eval_data", "vitask_trust_tsm_code"),
)


class Shared:
    """What is pushed is the finished folder, once: a checkpoint's folder has files that others do not need."""

    vitask: VITaskArguments
    train_dataset: TaskSamples
    exemplars: Exemplars
    _vlm: nn.Module

    def finished(self) -> None:
        """Called on all ranks when the host has written its last file."""
        if self.args.should_save:
            save_card(self.facts(), self.args.output_dir)
        if self.args.push_to_hub and self.is_world_process_zero():
            given = {"token": self.args.hub_token, "revision": self.args.hub_revision}
            agreement.say(hub.push(self.args.output_dir, self.hub_model_id, say=agreement.say, **given))

    def facts(self) -> Facts:
        """What the card says."""
        folder = Path(self.args.output_dir)
        base = base_model(str(self._vlm.config.name_or_path))
        library = "llava" if host_of(folder) == "llava" else "peft" if has_adapter(folder) else "transformers"
        return Facts(
            title=f"{base.name}, tuned by VITask",
            library=library,
            base=base,
            data=tuple(self._data()),
            training=tuple(self._lines()),
            versions=versions(),
        )

    def _data(self) -> Iterator[DataSet]:
        counts = {"train": class_counts(self.train_dataset.list_data_dict)}
        if self.vitask.vitask_eval_data is not None:
            counts["val"] = class_counts(read_samples(self.vitask.vitask_eval_data))
        for task in counts["train"]:
            own = {split: found[task] for split, found in counts.items() if task in found}
            yield DataSet(task, modality_of(task), license_of(task), own)

    def _lines(self) -> Iterator[str]:
        args, vitask = self.args, self.vitask
        crt = f"{vitask.vitask_crt_weight:g}" if vitask.uses_negatives else "off"
        weights = f"RDA {vitask.vitask_rda_weight:g}, CRT {crt}"
        yield f"stage {vitask.vitask_stage}; exemplar: {vitask.vitask_ep}; weights: {weights}"
        features = self.exemplars.features
        if features is not None:
            known = "" if vitask.vitask_tsm is None else f"{_tsm(Path(vitask.vitask_tsm))}, "
            yield f"task-specific model: {known}SHA-256 {features.tsm_hash[:12]}, features of width {features.width}"
        lora = f"LoRA of rank {args.lora_r}, alpha {args.lora_alpha}, dropout {args.lora_dropout:g}"
        yield f"trained: {lora if args.lora_enable else 'the weights themselves'}, in {_precision(args)}"
        rate = f"learning rate {args.learning_rate:g}, {args.lr_scheduler_type.value}"
        yield f"{self.state.global_step} steps, {self.state.epoch or 0:g} epochs; {rate}"
        per_step = args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size
        yield "{} x {} x {} samples a step (batch, accumulation, processes)".format(*per_step)
        general = sum("vitask" not in sample for sample in self.train_dataset.list_data_dict)
        if general:
            yield f"{general} samples of general instruction data in the same run"
        more = [f"{name}={value}" for name, value in vitask.flags().items() if _is_told(name, value)]
        yield f"more flags: {', '.join(more) or 'none'}"
        yield f"seed: {args.seed}"

    # What transformers' Trainer does by itself ------------------------------------------------------------------------

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Before the first step, so that a run that cannot push does not begin."""
        args = self.args
        if self.is_world_process_zero():
            private = args.hub_private_repo if private is None else private
            name = args.hub_model_id or Path(args.output_dir).absolute().name
            self.hub_model_id = hub.create(name, private=private, token=token or args.hub_token)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: see `finished`."""

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Nothing: see `finished`."""


def _is_told(name: str, value: Any) -> bool:
    defaults = {field.name: field.default for field in fields(VITaskArguments) if field.default is not MISSING}
    return name not in _SAID and value != defaults[name]


def _precision(args: Any) -> str:
    return "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"


def _tsm(folder: Path) -> str:
    """Which network, or where that is not told the name of its folder."""
    path = folder / TSM_FILE
    source = read_json(path, "TSM record").get("source", {}) if path.is_file() else {}
    return source.get("timm") or folder.name
