"""Both ways into upstream's `train()` end here: our classes under the names that it looks up in its module."""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser, set_seed

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.errors import VITaskError
from vitask_plugin.llava import compat, flags, model_type, paths
from vitask_plugin.reading import model_config
from vitask_plugin.training import agreement, processes, ranges, running, starting

# What upstream's `train()` looks up in its module and finds ours under.
REPLACED = (
    "ModelArguments",
    "LlavaLlamaForCausalLM",
    "LazySupervisedDataset",
    "LLaVATrainer",
)
# Those of upstream's that may differ between nodes: where things lie.
LOCAL_FLAGS = ("vision_tower", "pretrain_mm_mlp_adapter")


def install(namespace: dict[str, Any], argv: list[str]) -> list[Any]:
    """Puts VITask into the namespace of upstream's training script.

    The flags are always there. Everything else is put in only with `--vitask True`, so that without it the run is
    upstream's own.

    Args:
        namespace: globals of the module that defines `train`.
        argv: the command line, without the program.

    Returns:
        The trainers that upstream's `train()` will have built, none of them as long as it has not run.

    Raises:
        VITaskError: flags that do not fit together, or stage 2 without a stage-1 connector.
    """
    compat.patch_script(namespace)
    namespace["ModelArguments"] = _with_flags(namespace["ModelArguments"])
    # Only our own flags are parsed here; the rest is upstream's to parse, and has side effects.
    parser = HfArgumentParser(VITaskArguments, allow_abbrev=False, add_help=False)
    vitask, _ = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    built: list[Any] = []
    if not vitask.vitask:
        return built
    # As upstream parses it, without building its classes, which has side effects.
    classes = [namespace[name] for name in ("ModelArguments", "DataArguments", "TrainingArguments")]
    upstream, left = HfArgumentParser(classes).parse_known_args(argv)
    flags.check_known(left, upstream)
    flags.check(upstream)
    ranges.check_warmup(processes.flags_of(argv))
    if upstream.vision_tower is None:
        raise VITaskError("--vitask True needs --vision_tower; give the one the model was trained with")
    config = model_config(upstream.model_name_or_path)
    model_type.check_llama(config, upstream.model_name_or_path)
    tower = model_config(upstream.vision_tower)
    model_type.check_tower(tower, upstream.vision_tower)
    flags.check_model(upstream, config)
    paths.check_projector(upstream, config, tower)
    starting.find_connector(vitask, upstream.model_name_or_path)
    # Upstream initialises projector and LoRA before its Trainer seeds; this makes them follow --seed too.
    set_seed(upstream.seed)
    from vitask_plugin.llava.batch import VITaskDataset
    from vitask_plugin.llava.model import VITaskLlavaLlamaForCausalLM
    from vitask_plugin.llava.trainer import VITaskTrainer

    namespace["LlavaLlamaForCausalLM"] = VITaskLlavaLlamaForCausalLM
    namespace["LazySupervisedDataset"] = _on_every_rank(VITaskDataset, vitask=vitask)

    def trainer(**kwargs: Any) -> VITaskTrainer:
        built.append(VITaskTrainer(vitask=vitask, version=upstream.version, **kwargs))
        return built[-1]

    namespace["LLaVATrainer"] = trainer
    return built


def wrap(train: Callable[..., None]) -> Callable[..., None]:
    """Upstream's `train`, with VITask installed in its module while it runs; bad input ends it with one sentence."""
    namespace = train.__globals__

    @functools.wraps(train)
    def run(*args: Any, **kwargs: Any) -> None:
        compat.patch_script(namespace)
        upstream = {name: namespace[name] for name in REPLACED}

        def work() -> None:
            with processes.checked(namespace["TrainingArguments"], sys.argv[1:], paths.check, LOCAL_FLAGS):
                trainers = install(namespace, sys.argv[1:])
                train(*args, **kwargs)
                for trainer in trainers:
                    trainer.finished()

        try:
            running.run(work, for_good=_nothing_follows(namespace))
        finally:
            namespace.update(upstream)

    return run


def _nothing_follows(namespace: dict[str, Any]) -> bool:
    """Whether the program is one of upstream's training scripts, or ours, which all end with `train()`."""
    program = getattr(sys.modules["__main__"], "__file__", None)
    scripts = (Path(file).resolve().parent for file in (namespace["__file__"], __file__))
    return program is not None and Path(program).resolve().parent in scripts


def _on_every_rank(build: Callable[..., Any], **ours: Any) -> Callable[..., Any]:
    """Builds what all ranks build; bad input that one of them meets ends all of them."""

    @functools.wraps(build, updated=())
    def built(*args: Any, **kwargs: Any) -> Any:
        with agreement.together():
            return build(*args, **ours, **kwargs)

    return built


def _with_flags(upstream: type) -> type:
    """Upstream's `ModelArguments` with the VITask flags beside its own."""

    @dataclass
    class ModelArguments(VITaskArguments, upstream):
        """LLaVA's model arguments and VITask's."""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.vitask:
                self.model_name_or_path = model_type.ModelPath(self.model_name_or_path)

    return ModelArguments
