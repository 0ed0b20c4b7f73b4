"""Upstream's trainer with a VITask step: attaches the connector, scales and logs the terms, saves what is ours."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from llava.train.llava_trainer import LLaVATrainer, maybe_zero_3
from torch import Tensor, nn
from transformers.integrations import is_deepspeed_zero3_enabled

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.errors import VITaskError
from vitask_plugin.llava import checkpoint, disk, flags, launch, memory, resuming, saving, starting, universal
from vitask_plugin.llava.batch import VITaskCollator, VITaskDataset
from vitask_plugin.llava.compat import NON_LORA_FILE
from vitask_plugin.llava.layout import Branches
from vitask_plugin.llava.reading import readable
from vitask_plugin.llava.zero import set_apart, weights_apart
from vitask_plugin.method.sampler import ContrastiveSampler, SeededByEpoch
from vitask_plugin.training import own_optimizer, precision, rates
from vitask_plugin.tsm.device import is_out_of_memory

logger = logging.getLogger(__name__)

# Name in the log -> (sum, count) of one step, both added up over ranks and accumulation.
LOGGED = {
    "loss_vanilla": ("vanilla", "vanilla_tokens"),
    "loss_ep": ("ep", "ep_tokens"),
    "loss_rda": ("rda", "ep_tokens"),
    "loss_crt": ("crt", "crt_tokens"),
    "response_accuracy": ("correct", "vanilla_tokens"),
    "response_accuracy_ep": ("correct_ep", "ep_tokens"),
    "in_batch_negatives": ("in_batch_negatives", "negatives"),
    "relaxed_negatives": ("relaxed_negatives", "negatives"),
    "cut_branches": ("cut_branches", "branches"),
    "unanswered": ("unanswered", "samples"),
}


class VITaskTrainer(LLaVATrainer):
    """Built by upstream's `train()` in place of its own trainer, after it set up the model, LoRA and the vision tower.

    Raises:
        VITaskError: features of another TSM or other images, a connector of another width, several GPUs in one process.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        args: Any,
        train_dataset: VITaskDataset,
        data_collator: VITaskCollator,
        vitask: VITaskArguments,
        version: str,
        **kwargs: Any,
    ) -> None:
        # What one rank meets ends all of them; between two such blocks they wait for each other.
        with launch.together():
            _check_flags(args, vitask)
            if args.deepspeed:
                _say_if_any(own_optimizer.take_over(args.hf_deepspeed_config.config))
            if args.lora_enable:
                words = _unwrapped(model).get_input_embeddings().weight
                loaded = flags.model_config(_unwrapped(model).config.name_or_path)
                flags.check_vocabulary(getattr(words, "ds_shape", words.shape)[0], loaded)
        self.vitask, self._version = vitask, version
        self._staging: str | None = None  # where a checkpoint is being written
        # Connectors live in the model and not in a wrapper, so that every branch goes through its one forward.
        self._llava = _unwrapped(model)
        self._llava.vitask_arguments = vitask
        # Not by set_attn_implementation(), which would change the vision tower's attention too.
        self._llava.config._attn_implementation = vitask.vitask_attention
        logger.info("attention: %s, engine: %s", vitask.vitask_attention, vitask.vitask_engine)
        launch.check_disk(args.output_dir, save_on_each_node=args.save_on_each_node)
        if vitask.uses_tsm:
            starting.extract_features(vitask, train_dataset, args)
        starting.see_images(vitask, train_dataset, args)
        with launch.together():
            if vitask.uses_tsm:
                train_dataset.attach(*starting.open_features(vitask, args.output_dir))
            if vitask.uses_connector:
                self._llava.vitask_connector = starting.make_connector(
                    vitask, train_dataset.features, self._llava, args
                )
        if not args.deepspeed:
            precision.train_in_float32(model)
        if vitask.vitask_connector_path is not None:
            starting.continue_stage(
                model, self._llava.config.name_or_path, vitask.vitask_connector_path, args.lora_enable
            )
        self._digests = train_dataset.digests()
        launch.check_data(self._digests)
        if vitask.uses_negatives:
            _name_relaxed(train_dataset)
        data_collator.attach(train_dataset, image_tokens=_image_tokens(self._llava))
        if is_deepspeed_zero3_enabled():
            set_apart(self._llava)
        super().__init__(model=model, args=args, train_dataset=train_dataset, data_collator=data_collator, **kwargs)
        if not args.deepspeed:
            precision.enable_half_on_cpu(self.accelerator)
        # compute_loss divides by the response tokens of the whole accumulation step.
        self.model_accepts_loss_kwargs = True
        self._sums: dict[str, Tensor] = {}
        self._unanswered: set[int] = set()  # named already
        self._branches: Branches | None = None  # of the latest batch
        self.add_callback(self._before_first_step())

    def _before_first_step(self) -> rates.BeforeFirstStep:
        """What is said of samples, steps and rates once they are known."""
        found = {"run": self.args.learning_rate}
        if self.args.mm_projector_lr is not None:
            found["projector"] = self.args.mm_projector_lr
        if self.vitask.trains_connector:
            found["connector"] = self.vitask.connector_rate or self.args.learning_rate
        return rates.BeforeFirstStep(
            len(self.train_dataset),
            found,
            teaches=self.vitask.trains_connector and self.vitask.vitask_connector_path is None,
            say=launch.say,
            warn=logger.warning,
        )

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As upstream, the connector at its own rate."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if is_new and self.vitask.connector_rate is not None:
            rates.give_own_rate(optimizer, self._llava.vitask_connector.parameters(), self.vitask.connector_rate)
        if is_new and self.is_deepspeed_enabled:
            _say_if_any(own_optimizer.keep_rates(self.accelerator.state.deepspeed_plugin.deepspeed_config, optimizer))
        return optimizer

    def _get_train_sampler(self, train_dataset: VITaskDataset | None = None) -> Any:
        args = self.args
        if self.vitask.uses_negatives:
            samples = self.train_dataset.list_data_dict
            self.train_dataset.sampler = ContrastiveSampler(
                self.train_dataset.negatives,
                args.train_batch_size * args.world_size * args.gradient_accumulation_steps,
                args.seed,
                text_only=[index for index, sample in enumerate(samples) if "image" not in sample],
                by_modality=args.group_by_modality_length,
            )
        elif args.group_by_modality_length:
            self.train_dataset.sampler = SeededByEpoch(super()._get_train_sampler(train_dataset), args.seed)
        else:
            return super()._get_train_sampler(train_dataset)
        return self.train_dataset.sampler

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        inputs["vitask"]["denominator"] = num_items_in_batch
        branches = inputs["vitask"]["branches"]
        self._name_unanswered(branches.unanswered)
        self._branches = branches
        outputs = model(**inputs)
        counts = {name: outputs.loss.new_tensor(count) for name, count in branches.counts.items()}
        for name, value in (outputs.sums | counts).items():
            self._sums[name] = self._sums.get(name, 0) + value.detach().double()
        loss = outputs.loss
        if self.args.average_tokens_across_devices:
            # The denominator counts all ranks' tokens; DDP and DeepSpeed then average the gradients over ranks.
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._sums:
            names = sorted(self._sums)
            total = self.accelerator.reduce(torch.stack([self._sums[name] for name in names]), reduction="sum")
            sums = dict(zip(names, total.tolist(), strict=True))
            self._check_answers(sums["unanswered"], sums["samples"])
            logs |= {name: sums[over] / sums[under] for name, (over, under) in LOGGED.items() if sums[under]}
            self._sums = {}
        super().log(logs, *args, **kwargs)

    def _name_unanswered(self, indices: list[int]) -> None:
        """Names each sample without an answer token once. It still goes through the step, where it adds 0."""
        for index in sorted(set(indices) - self._unanswered):
            logger.warning(
                "sample %r has no answer token left to learn: its image and question fill --model_max_length %d, or "
                "the tokenizer does not fit --version %s; it is trained on by nothing",
                self.train_dataset.list_data_dict[index].get("id", index),
                self.args.model_max_length,
                self._version,
            )
        self._unanswered.update(indices)

    def _check_answers(self, unanswered: float, samples: float) -> None:
        """Upstream trains on with a loss of 0 where an answer is cut off, or its tokens are not where it expects."""
        if 2 * unanswered > samples:
            raise launch.EveryRankError(
                f"{unanswered:.0f} of {samples:.0f} samples have no answer token left to learn: --model_max_length "
                f"{self.args.model_max_length} cuts them (image tokens count), or the tokenizer does not fit --version "
                f"{self._version} (look for 'tokenization mismatch' above)"
            )

    # Saving: the folder is upstream's, the connector lies beside its weights ------------------------------------

    _gathered: dict[str, Tensor] | None = None  # the connector's weights, while `save_model` runs

    def _save_checkpoint(self, model: nn.Module, trial: Any, metrics: Any = None) -> None:
        with saving.whole(self.args, self.model, self.state.global_step) as directory:
            self._staging = directory
            try:
                super()._save_checkpoint(model, trial)
                if self.is_deepspeed_enabled and self.args.should_save and not self.args.save_only_model:
                    universal.name_latest(Path(directory) / f"checkpoint-{self.state.global_step}")
            finally:
                self._staging = None

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As upstream, on all ranks, and an error of writing ends it."""
        if is_deepspeed_zero3_enabled() and self.args.save_on_each_node and not _internal_call:
            launch.say(f"ZeRO-3: the model is written into {output_dir} of the first node alone")
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
        marker = f"{checkpoint.CONNECTOR_NAME}."
        weights = {name: weight for name, weight in state_dict.items() if marker not in name}
        super()._save(output_dir, weights | weights_apart(self._llava))
        if not (self.args.lora_enable and self.args.should_save):
            return
        # What upstream writes beside the adapter after the last step, and not into a checkpoint.
        self._llava.config.save_pretrained(output_dir)
        if not self.is_deepspeed_enabled:
            return  # `compat` has written the rest, which such a run goes on from
        trained = {name for name, weight in self.model.named_parameters() if weight.requires_grad}
        other = {name: weight.cpu() for name, weight in weights.items() if name in trained and "lora_" not in name}
        torch.save(other, Path(output_dir) / NON_LORA_FILE)

    def _connector_weights(self) -> dict[str, Tensor]:
        """Whole, on the CPU. Under ZeRO-3 all ranks have to call it."""
        connector = self._llava.vitask_connector
        if connector is None:
            return {}
        return {name: maybe_zero_3(weight, ignore_status=True) for name, weight in connector.named_parameters()}

    def save_state(self) -> None:
        """Called by upstream's `train()` when training has ended, before it saves the model in its own way."""
        disk.check_room_for_weights(self.args, self.model)
        with self._ends_if_full():
            super().save_state()
        weights = self._connector_weights()
        precision.as_written(self.model)
        if self._llava.vitask_connector is not None:
            # Upstream puts all other trainable weights of a LoRA run in one file, which stock LLaVA loads by name.
            self._llava.vitask_connector.requires_grad_(False)
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
        connector, store = self._llava.vitask_connector, self.train_dataset.features
        if connector is not None:
            checkpoint.save_connector(connector, weights, directory)
        tsm = None if store is None else {"hash": store.tsm_hash, "width": store.width}
        run = self._run([group["weight_decay"] for group in self.optimizer.param_groups])
        data = self.train_dataset
        checkpoint.save_record(
            directory, self.vitask, connector, tsm, data.tasks, self._version, run=run, images=data.seen.images
        )
        checkpoint.name_stock_architecture(directory)

    def _run(self, weight_decays: list[float]) -> dict[str, Any]:
        return resuming.run_of(self.args, weight_decays, self._digests)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As upstream, but all ranks go on from one checkpoint, and from one that fits this run: see `resuming`."""
        # Upstream's checkpoints of the projector alone cannot be gone on from; the usual ones of LoRA hold it too.
        self.args.tune_mm_mlp_adapter = False
        directory = self._resumed(resume_from_checkpoint)
        disk.check_room_for_weights(self.args, self.model)  # rather now than after the last step
        try:
            return super().train(resume_from_checkpoint=directory and str(directory), **kwargs)
        except Exception as error:
            if self._branches is None or not is_out_of_memory(error):
                raise
            dtype = precision.compute_dtype(self.args, self._llava.dtype)
            raise VITaskError(memory.sentence(self._llava.config, self._branches, dtype, self.args)) from error

    def _inner_training_loop(self, batch_size: int | None = None, **kwargs: Any) -> Any:
        # transformers 4 goes on with the batch size of the checkpoint, of another number of processes perhaps.
        if not self.args.auto_find_batch_size:
            batch_size = self.args.train_batch_size
        return super()._inner_training_loop(batch_size=batch_size, **kwargs)

    def _resumed(self, asked: str | bool | None) -> Path | None:
        """The checkpoint that all ranks go on from. Upstream asks on each rank whether it sees any."""
        saving.clear(self.args)
        directory = Path(asked) if isinstance(asked, str) else None
        if directory is None and any(launch.gathered(bool(asked))):
            directory = resuming.newest(self.args.output_dir)
        run = self._run([])
        with launch.together():
            convert = directory is not None and resuming.check(directory, self.vitask, run)
        if self.is_deepspeed_enabled:
            config = self.accelerator.state.deepspeed_plugin.deepspeed_config
            universal.prepare(directory, self.args, config, convert=convert)
        self._converted = convert
        if directory is not None:
            others = resuming.changed(directory, self.vitask, run)
            launch.say(", ".join([f"going on from {directory}", *others]))
        return directory

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with readable("checkpoint", resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._llava.vitask_connector is not None:
            saved = checkpoint.load_connector(resume_from_checkpoint)
            self._llava.vitask_connector.load_state_dict(saved.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint_dir: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint_dir)
        if checkpoint_dir and self._converted and is_deepspeed_zero3_enabled():
            decays = checkpoint.read_record(checkpoint_dir)[checkpoint.RUN]["weight_decays"]
            universal.mend_optimizer(self.optimizer, self.lr_scheduler.get_last_lr(), decays)


def _check_flags(args: Any, vitask: VITaskArguments) -> None:
    """Refuses flags that do not go together, ours or upstream's."""
    if args.n_gpu > 1:
        raise VITaskError(
            f"one process sees {args.n_gpu} GPUs, and DataParallel cannot split a VITask batch; "
            "start with torchrun or deepspeed, or set CUDA_VISIBLE_DEVICES to one GPU"
        )
    if vitask.vitask_engine == "branches" and is_deepspeed_zero3_enabled():
        raise VITaskError(
            "--vitask_engine branches runs as many forwards as a rank's batch has branches, which differs between "
            "ranks and hangs ZeRO-3; use --vitask_engine packed"
        )
    if vitask.vitask_attention == "flex_attention" and args.device.type != "cuda":
        raise VITaskError(
            f"--vitask_attention flex_attention has no backward pass on {args.device}; use it on a GPU, or sdpa"
        )
    if getattr(args, "tune_mm_mlp_adapter", False) and not args.lora_enable:
        raise VITaskError(
            "--tune_mm_mlp_adapter True makes upstream write the projector alone, which is no checkpoint to "
            "evaluate or to go on from; add --lora_enable True, with which the projector alone is trained too"
        )


def _say_if_any(line: str | None) -> None:
    if line is not None:
        launch.say(line)


def _name_relaxed(dataset: VITaskDataset) -> None:
    """Says before the first step how many samples are contrasted with another question's image."""
    relaxed = dataset.negatives.relaxed
    if relaxed:
        asked = sum("vitask" in sample for sample in dataset.list_data_dict)
        launch.say(
            f"{len(relaxed)} of {asked} samples have a question that no sample of another answer has, such as "
            f"{dataset.list_data_dict[min(relaxed)].get('id')!r}; their negatives have the same task and another label"
        )


class _NotSavedError(Exception):
    """Around a ValueError of `_save`: upstream's `save_model` takes one for a config that does not gather weights."""


def _unwrapped(model: nn.Module) -> nn.Module:
    """The LLaVA model under PEFT's wrapper, if there is one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _image_tokens(model: nn.Module) -> int:
    """Tokens that the vision tower makes of one image."""
    tower = model.get_vision_tower()
    return tower.num_patches + (tower.select_feature == "cls_patch")
