"""Upstream's trainer with a VITask step: attaches the connector, scales and logs the terms, saves what is ours."""

import logging
from pathlib import Path
from typing import Any

import torch
from llava.train.llava_trainer import LLaVATrainer, maybe_zero_3
from torch import Tensor, nn
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import get_last_checkpoint

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.connector import LEARNED, ExemplarConnector, LearnedPrefix, build_connector
from vitask_plugin.errors import VITaskError
from vitask_plugin.llava import checkpoint, memory
from vitask_plugin.llava.batch import ContrastiveSampler, VITaskCollator, VITaskDataset
from vitask_plugin.llava.layout import Branches
from vitask_plugin.llava.reading import readable
from vitask_plugin.tsm.device import is_out_of_memory
from vitask_plugin.tsm.features import FeatureStore, extract
from vitask_plugin.tsm.joint import Tasks

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
        self.vitask, self._version = vitask, version
        # Connectors live in the model and not in a wrapper, so that every branch goes through its one forward.
        self._llava = _unwrapped(model)
        self._llava.vitask_arguments = vitask
        # Not by set_attn_implementation(), which would change the vision tower's attention too.
        self._llava.config._attn_implementation = vitask.vitask_attention
        logger.info("attention: %s, engine: %s", vitask.vitask_attention, vitask.vitask_engine)
        if vitask.uses_tsm:
            with args.main_process_first(local=args.save_on_each_node, desc="TSM features"):
                store, tsm_tasks = _features(vitask, train_dataset, args.output_dir)
            train_dataset.attach(store, tsm_tasks)
        if vitask.uses_connector:
            self._llava.vitask_connector = _connector(vitask, train_dataset.features, self._llava, args)
        if vitask.vitask_connector_path is not None:
            _continue(model, self._llava.config.name_or_path, vitask.vitask_connector_path, args.lora_enable)
        data_collator.attach(train_dataset, image_tokens=_image_tokens(self._llava), seed=args.seed)
        super().__init__(model=model, args=args, train_dataset=train_dataset, data_collator=data_collator, **kwargs)
        # compute_loss divides by the response tokens of the whole accumulation step.
        self.model_accepts_loss_kwargs = True
        self._sums: dict[str, Tensor] = {}
        self._unanswered: set[int] = set()  # named already
        self._branches: Branches | None = None  # of the latest batch

    def _get_train_sampler(self, train_dataset: VITaskDataset | None = None) -> Any:
        if not self.vitask.uses_negatives:
            return super()._get_train_sampler(train_dataset)
        return ContrastiveSampler(
            self.train_dataset,
            self.args.train_batch_size,
            self.args.seed,
            by_modality=self.args.group_by_modality_length,
        )

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
                self.train_dataset.list_data_dict[index].get("id"),
                self.args.model_max_length,
                self._version,
            )
        self._unanswered.update(indices)

    def _check_answers(self, unanswered: float, samples: float) -> None:
        """Upstream trains on with a loss of 0 where an answer is cut off, or its tokens are not where it expects."""
        if 2 * unanswered > samples:
            raise VITaskError(
                f"{unanswered:.0f} of {samples:.0f} samples have no answer token left to learn: --model_max_length "
                f"{self.args.model_max_length} cuts them (image tokens count), or the tokenizer does not fit --version "
                f"{self._version} (look for 'tokenization mismatch' above)"
            )

    # Saving: the folder is upstream's, the connector lies beside its weights ------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        output_dir = output_dir or self.args.output_dir
        state_dict = self.model.state_dict() if state_dict is None else state_dict
        marker = f"{checkpoint.CONNECTOR_NAME}."
        connector = {name.split(marker)[1]: weight for name, weight in state_dict.items() if marker in name}
        super()._save(output_dir, {name: weight for name, weight in state_dict.items() if marker not in name})
        if self.args.should_save:
            self._write(output_dir, connector)

    def save_state(self) -> None:
        """Called by upstream's `train()` when training has ended, before it saves the model in its own way."""
        super().save_state()
        connector = self._llava.vitask_connector
        weights = {}
        if connector is not None:
            weights = {name: maybe_zero_3(weight, ignore_status=True) for name, weight in connector.named_parameters()}
            # Upstream puts all other trainable weights of a LoRA run in one file, which stock LLaVA loads by name.
            connector.requires_grad_(False)
        if self.args.should_save:
            self._write(self.args.output_dir, weights)

    def _write(self, directory: str, weights: dict[str, Tensor]) -> None:
        connector, store = self._llava.vitask_connector, self.train_dataset.features
        if connector is not None:
            checkpoint.save_connector(connector, weights, directory)
        tsm = None if store is None else {"hash": store.tsm_hash, "width": store.width}
        checkpoint.save_record(directory, self.vitask, connector, tsm, self.train_dataset.tasks, self._version)
        checkpoint.name_stock_architecture(directory)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As upstream; a checkpoint to resume from must be of the same stage and exemplar kind."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir)
        if resume_from_checkpoint:
            _check_resumed(resume_from_checkpoint, self.vitask)
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        except Exception as error:
            if self._branches is None or not is_out_of_memory(error):
                raise
            raise VITaskError(
                memory.sentence(self._llava.config, self._branches, self._llava.dtype, self.args)
            ) from error

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with readable("checkpoint", resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._llava.vitask_connector is not None:
            saved = checkpoint.load_connector(resume_from_checkpoint)
            self._llava.vitask_connector.load_state_dict(saved.state_dict())


def _unwrapped(model: nn.Module) -> nn.Module:
    """The LLaVA model under PEFT's wrapper, if there is one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _image_tokens(model: nn.Module) -> int:
    """Tokens that the vision tower makes of one image."""
    tower = model.get_vision_tower()
    return tower.num_patches + (tower.select_feature == "cls_patch")


def _features(vitask: VITaskArguments, dataset: VITaskDataset, output_dir: str) -> tuple[FeatureStore, Tasks]:
    """The feature store, extracted now if only a TSM is given; checked against TSM, images, and the flags.

    With it the tasks of the TSM, none where only features are given.
    """
    directory = vitask.vitask_features
    if directory is None:
        directory = Path(output_dir) / "vitask_features"
        if not directory.exists():
            logger.info("extracting TSM features into %s", directory)
            extract(
                vitask.vitask_tsm,
                [dataset.data_path],
                dataset.data_args.image_folder,
                directory,
                tokens=vitask.exemplar_tokens,
                device="cuda" if torch.cuda.is_available() else "cpu",
            )
    store = FeatureStore.open(directory)
    tasks: Tasks = {}
    if vitask.vitask_tsm is not None:
        from vitask_plugin.tsm.model import TSM

        tsm = TSM.load(vitask.vitask_tsm)
        store.check_tsm(tsm.hash)
        tasks = tsm.record["tasks"]
    if vitask.vitask_ep == "text":
        return store, tasks  # its logits are used, which every store has
    if store.tokens != vitask.exemplar_tokens:
        raise VITaskError(
            f"features {str(directory)!r} hold {store.tokens!r} tokens, --vitask_ep {vitask.vitask_ep} needs "
            f"{vitask.exemplar_tokens!r}; extract them with `vitask tsm extract --tokens {vitask.exemplar_tokens}`"
        )
    return store, tasks


def _connector(
    vitask: VITaskArguments, store: FeatureStore | None, model: nn.Module, args: Any
) -> ExemplarConnector | LearnedPrefix:
    """A new connector, or the earlier stage's; frozen in stage 2. Without a store: the learned prefix."""
    width = model.config.hidden_size
    kind, features = (LEARNED, 0) if store is None else (vitask.vitask_connector, store.width)
    if vitask.vitask_connector_path is None:
        # Its own generator: the weights must not depend on what was built before it, such as a TSM.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(args.seed)
            connector = build_connector(kind, features, width)
    else:
        connector = checkpoint.load_connector(vitask.vitask_connector_path)
        _check_earlier_stage(vitask, store, connector, width)
        if store is not None:
            vitask.vitask_connector = connector.kind
    if is_deepspeed_zero3_enabled():
        connector.to(model.dtype)  # ZeRO-3 gathers parameters of one dtype
    connector.requires_grad_(vitask.vitask_stage == 1)
    return connector.to(args.device)


def _check_earlier_stage(
    vitask: VITaskArguments, store: FeatureStore | None, connector: ExemplarConnector | LearnedPrefix, width: int
) -> None:
    path = vitask.vitask_connector_path
    record = checkpoint.read_record(path)
    if record is None or record["connector"] is None:
        raise VITaskError(f"{path!r} holds a connector but no {checkpoint.RECORD_FILE} of it; copy both")
    if record["ep"] != vitask.vitask_ep:
        raise VITaskError(
            f"the connector in {path!r} was trained with --vitask_ep {record['ep']}, this run has --vitask_ep "
            f"{vitask.vitask_ep}; use the same in both stages"
        )
    features = 0 if store is None else store.width
    if (connector.in_features, connector.out_features) != (features, width):
        raise VITaskError(
            f"the connector in {path!r} maps {connector.in_features} to {connector.out_features}, but the TSM's "
            f"features are {features} wide and the LLM {width}; use the TSM and the model of the earlier stage"
        )
    trained = store and record["tsm"]["hash"]
    if store is not None and trained != store.tsm_hash:
        raise VITaskError(
            f"the connector in {path!r} was trained with TSM {trained[:12]}, the features are of TSM "
            f"{store.tsm_hash[:12]}; use the same TSM in both stages"
        )


def _continue(model: nn.Module, start: str, earlier: str, lora: bool) -> None:
    """The LLM goes on from the earlier stage too: from its adapter, or by starting from its folder.

    Args:
        start: --model_name_or_path. earlier: --vitask_connector_path.
    """
    started_there = Path(start).resolve() == Path(earlier).resolve()
    if checkpoint.has_adapter(earlier) and lora:
        checkpoint.continue_adapter(model, earlier)
    elif checkpoint.has_adapter(earlier):
        raise VITaskError(
            f"{earlier!r} is the output of a LoRA run, and without --lora_enable True its adapter would be lost; "
            f"enable it, or merge it and put {checkpoint.CONNECTOR_FILE} and {checkpoint.RECORD_FILE} beside the result"
        )
    elif not started_there:
        raise VITaskError(
            f"--vitask_connector_path {earlier!r} holds a whole model, but --model_name_or_path {start!r} starts from "
            "another, which would lose what the earlier stage taught; give the same folder for both"
        )


def _check_resumed(directory: str, vitask: VITaskArguments) -> None:
    record = checkpoint.read_record(directory)
    found = record and (record["arguments"]["vitask_stage"], record["ep"])
    if found != (vitask.vitask_stage, vitask.vitask_ep):
        what = f"stage {found[0]} with --vitask_ep {found[1]}" if found else "a run without --vitask"
        raise VITaskError(
            f"{directory!r} is of {what}, this run is stage {vitask.vitask_stage} with --vitask_ep {vitask.vitask_ep}; "
            "resume with the same flags, or give another --output_dir"
        )
