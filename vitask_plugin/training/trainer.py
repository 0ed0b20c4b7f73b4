"""transformers' Trainer with a VITask step: the connector at its own rate, the sampler, the loss, and what is logged.

A host's trainer inherits `VITaskTraining` before its own Trainer and fills in what depends on its model, see `Host`.
"""

import functools
import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.errors import VITaskError
from vitask_plugin.method.layout import Branches
from vitask_plugin.method.negatives import Negatives
from vitask_plugin.method.sampler import Contrasted, ContrastiveSampler, SeededByEpoch
from vitask_plugin.training import (
    agreement,
    balance,
    memory,
    own_optimizer,
    precision,
    rates,
    selftest,
    starting,
    validation,
)
from vitask_plugin.training.asked import out_of_training
from vitask_plugin.training.checkpoints import WholeCheckpoints
from vitask_plugin.training.exemplars import Exemplars, digests
from vitask_plugin.training.host import Host
from vitask_plugin.training.peers import EveryRankError
from vitask_plugin.training.samples import TaskSamples
from vitask_plugin.training.sharing import Shared
from vitask_plugin.training.validation import Validated
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


class VITaskTraining(Validated, WholeCheckpoints, Shared, Host):
    """See the module.

    Args:
        model: of the host, a `Connected` one; PEFT's wrapper may be around it.
        version: the conversation template, for the record and for messages.

    Raises:
        VITaskError: features of another TSM or other images, a connector of another width, several GPUs in one process.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        args: Any,
        train_dataset: TaskSamples,
        vitask: VITaskArguments,
        version: str,
        **kwargs: Any,
    ) -> None:
        self.vitask, self._version = vitask, version
        # Connectors live in the model and not in a wrapper, so that every branch goes through its one forward.
        self._vlm = model.get_base_model() if hasattr(model, "get_base_model") else model
        # What one rank meets ends all of them; between two such blocks they wait for each other.
        with agreement.together():
            _check_flags(args, vitask)
            if args.deepspeed:
                _say_if_any(own_optimizer.take_over(args.hf_deepspeed_config.config))
            self.check_model(args)
        self.choose_attention(vitask.vitask_attention)
        logger.info("attention: %s", vitask.vitask_attention)
        agreement.check_disk(args.output_dir, save_on_each_node=args.save_on_each_node)
        judged = validation.read(vitask, train_dataset, args)
        if vitask.uses_tsm:
            starting.extract_features(vitask, train_dataset, args)
        extracted = starting.features_directory(vitask, args.output_dir) if vitask.uses_tsm else None
        contents = starting.see_images(train_dataset, extracted, args)
        with agreement.together():
            features = starting.open_features(vitask, args.output_dir) if vitask.uses_tsm else ()
            self.exemplars = Exemplars(vitask, train_dataset, contents, *features)
            store, connector = self.exemplars.features, None
            if vitask.uses_connector:
                connector = starting.make_connector(vitask, store, self.width, self._vlm.dtype, args)
            self._vlm.connect(vitask, connector)
        if not args.deepspeed:
            precision.train_in_float32(model)
        if vitask.vitask_connector_path is not None:
            with agreement.together():
                self.continue_stage(model, args)
        self._digests = digests(train_dataset, contents, store)
        agreement.check_data(self._digests)
        if vitask.uses_negatives:
            _name_relaxed(train_dataset)
        self._balance = balance.balance_of(train_dataset.list_data_dict, vitask)
        if self._balance is not None:
            for line in balance.lines(self._balance):
                agreement.say(line)
        self.validation = None
        if judged is not None:
            self.validation = validation.prepare(*judged, vitask, self.exemplars, args)
            kwargs["eval_dataset"] = self.validation.samples
        self.last_changes()
        collator = self.collator(train_dataset, self.exemplars)
        super().__init__(model=model, args=args, train_dataset=train_dataset, data_collator=collator, **kwargs)
        if not args.deepspeed:
            precision.enable_half_on_cpu(self.accelerator)
        # compute_loss divides by the response tokens of the whole accumulation step.
        self.model_accepts_loss_kwargs = True
        self._sums: dict[str, Tensor] = {}
        self._unanswered: set[int] = set()  # named already
        self._branches: Branches | None = None  # of the latest batch
        self.add_callback(self._before_first_step())
        self.add_callback(_SelfTest(self))
        for callback in self.validating_callbacks():
            self.add_callback(callback)

    def _before_first_step(self) -> rates.BeforeFirstStep:
        """What is said of samples, steps and rates once they are known."""
        found = {"run": self.args.learning_rate, **self.own_rates()}
        if self.vitask.trains_connector:
            found["connector"] = self.vitask.connector_rate or self.args.learning_rate
        return rates.BeforeFirstStep(
            len(self.train_dataset),
            found,
            teaches=self.vitask.trains_connector and self.vitask.vitask_connector_path is None,
            say=agreement.say,
            warn=logger.warning,
        )

    def choose_engine(self) -> None:
        """Tries the engines on two samples, see `selftest`; all ranks have to call it."""
        name, dtype = str(self._vlm.config.name_or_path), precision.compute_dtype(self.args, self._vlm.dtype)
        with agreement.together(), out_of_training(self._vlm, self.accelerator):
            for pair in self.train_dataset.pairs(self.vitask.uses_negatives):
                reference = self.reference_logits(pair)
                if all(len(logits) for logits in reference.values()):
                    break  # else their answers are cut off, and would show nothing
            engine, line = selftest.choose(
                self.vitask.vitask_engine,
                name,
                functools.partial(self._differs, pair=pair, reference=reference),
                dtype,
            )
        # Where a figure lies at the bound, processes may differ.
        engine = "branches" if "branches" in agreement.gathered(engine) else engine
        with agreement.together():
            _check_engine(engine)
        self.data_collator.settle(engine)
        self.vitask = replace(self.vitask, vitask_engine=engine)  # as the record has it
        agreement.say(line)

    def _differs(self, engine: str, pair: list[Contrasted], reference: dict[str, Tensor]) -> float:
        """By how much an engine's logits of two samples differ from those of stock forwards."""
        if engine == "packed" and not self.may_pack(precision.compute_dtype(self.args, self._vlm.dtype)):
            return float("inf")
        self.data_collator.settle(engine)
        try:
            instances = [self.train_dataset[item if self.vitask.uses_negatives else item.index] for item in pair]
            batch = self._prepare_inputs(self.data_collator(instances))
            branches = self._branches = batch["vitask"]["branches"]  # what runs out of memory here is said as in a step
            logits = self.branch_logits(batch)
        except (RuntimeError, ValueError, TypeError, LookupError) as error:
            if isinstance(error, VITaskError) or is_out_of_memory(error):
                raise
            logger.warning("engine %s: the model does not take it (%s)", engine, error)
            return float("inf")
        places = {"plain": branches.plain, "prompted": branches.prompted, "negative": branches.negative}
        return max(selftest.difference(logits[places[kind]], expected) for kind, expected in reference.items())

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As the host, the connector at its own rate."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if is_new and self.vitask.connector_rate is not None:
            rates.give_own_rate(optimizer, self._vlm.vitask_connector.parameters(), self.vitask.connector_rate)
        if is_new and self.is_deepspeed_enabled:
            _say_if_any(own_optimizer.keep_rates(self.accelerator.state.deepspeed_plugin.deepspeed_config, optimizer))
        return optimizer

    def _get_train_sampler(self, train_dataset: TaskSamples | None = None) -> Any:
        args = self.args
        if self.vitask.uses_negatives or self._balance is not None:
            samples = self.train_dataset.list_data_dict
            return ContrastiveSampler(
                self.train_dataset.negatives or Negatives.of_nobody(len(samples)),
                args.train_batch_size * args.world_size * args.gradient_accumulation_steps,
                args.seed,
                text_only=[index for index, sample in enumerate(samples) if "image" not in sample],
                by_modality=args.group_by_modality_length,
                epoch=self.train_dataset.epoch,
                balance=self._balance,
            )
        if args.group_by_modality_length:
            return SeededByEpoch(super()._get_train_sampler(train_dataset), args.seed, self.train_dataset.epoch)
        return super()._get_train_sampler(train_dataset)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        branches = inputs["vitask"]["branches"]
        self._name_unanswered(branches.unanswered)
        self._branches = branches
        outputs = model(**{**inputs, "vitask": {**inputs["vitask"], "denominator": num_items_in_batch}})
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
                "sample %r has no answer token left to learn: its image and question fill --model_max_length %d%s; it "
                "is trained on by nothing",
                self.train_dataset.list_data_dict[index].get("id", index),
                self.args.model_max_length,
                self.no_answer,
            )
        self._unanswered.update(indices)

    def _check_answers(self, unanswered: float, samples: float) -> None:
        """A host trains on with a loss of 0 where an answer is cut off, or its tokens are not where it expects."""
        if 2 * unanswered > samples:
            raise EveryRankError(
                f"{unanswered:.0f} of {samples:.0f} samples have no answer token left to learn: --model_max_length "
                f"{self.args.model_max_length} cuts them (image tokens count){self.no_answer}"
            )

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As the host, resumed as `WholeCheckpoints` says, and a step that does not fit ends with what helps."""
        try:
            return super().train(resume_from_checkpoint, **kwargs)
        except Exception as error:
            if self._branches is None or not is_out_of_memory(error):
                raise
            dtype = precision.compute_dtype(self.args, self._vlm.dtype)
            raise VITaskError(memory.sentence(self.text_config, self._branches, dtype, self.args)) from error

    def _inner_training_loop(self, batch_size: int | None = None, **kwargs: Any) -> Any:
        # transformers 4 goes on with the batch size of the checkpoint, of another number of processes perhaps.
        if not self.args.auto_find_batch_size:
            batch_size = self.args.train_batch_size
        return super()._inner_training_loop(batch_size=batch_size, **kwargs)


def _check_flags(args: Any, vitask: VITaskArguments) -> None:
    """Refuses flags that do not go together, ours or transformers'."""
    if args.n_gpu > 1:
        raise VITaskError(
            f"one process sees {args.n_gpu} GPUs, and DataParallel cannot split a VITask batch; "
            "start with torchrun or deepspeed, or set CUDA_VISIBLE_DEVICES to one GPU"
        )
    _check_engine(vitask.vitask_engine)
    if vitask.vitask_attention == "flex_attention" and args.device.type != "cuda":
        raise VITaskError(
            f"--vitask_attention flex_attention has no backward pass on {args.device}; use it on a GPU, or sdpa"
        )


def _check_engine(engine: str) -> None:
    from transformers.integrations import is_deepspeed_zero3_enabled

    if engine == "branches" and is_deepspeed_zero3_enabled():
        raise VITaskError(
            "--vitask_engine branches runs as many forwards as a rank's batch has branches, which differs between "
            "ranks and hangs ZeRO-3; use --vitask_engine packed, or ZeRO-2 for a model that does not take it"
        )


class _SelfTest(TrainerCallback):
    """Chooses the engine when the model is on its device, and before any batch is made."""

    def __init__(self, trainer: VITaskTraining) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.choose_engine()


def _say_if_any(line: str | None) -> None:
    if line is not None:
        agreement.say(line)


def _name_relaxed(dataset: TaskSamples) -> None:
    """Says before the first step how many samples are contrasted with another question's image."""
    relaxed = dataset.negatives.relaxed
    if relaxed:
        asked = sum("vitask" in sample for sample in dataset.list_data_dict)
        agreement.say(
            f"{len(relaxed)} of {asked} samples have a question that no sample of another answer has, such as "
            f"{dataset.list_data_dict[min(relaxed)].get('id')!r}; their negatives have the same task and another label"
        )
