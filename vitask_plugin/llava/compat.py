"""What upstream LLaVA 1.2.2 needs beside today's transformers, one named workaround each.

A workaround gives upstream back the behaviour that it was written for (transformers 4.37) and changes no number beyond
that: upstream with the workarounds is what a run without `--vitask True` is compared with. Its files stay as they are.

Three moments are LLaVA's: before upstream is imported, on upstream's classes, and on the names in its training script.
`prepare` makes the first two; it is safe at the top of that very script, while it is still being imported.
`patch_script` makes the third, on the script's globals, just before `train()` runs, and with it what any Trainer's
arguments need (`training.workarounds`).
"""

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vitask_plugin.errors import VITaskError
from vitask_plugin.model_folder import NON_LORA_FILE
from vitask_plugin.training.workarounds import MADE, TRAINER, Workaround, alias, extend, registering

_own: list[Workaround] = []
_SCRIPT_MARK = "__vitask_workarounds__"
_patch = registering(_own)


def prepare() -> list[str]:
    """Makes upstream LLaVA importable and its classes usable. Calling it again changes nothing.

    Returns:
        The names of the workarounds in force, in the order they were made.

    Raises:
        VITaskError: upstream LLaVA is absent or does not import; the sentence holds the first cause.
    """
    _make("import")
    _import_llava()
    _make("class")
    return [one.name for one in WORKAROUNDS if one.name in MADE]


def patch_script(namespace: dict[str, Any]) -> list[str]:
    """Patches the names in upstream's training script. Calling it again on the same namespace changes nothing.

    Args:
        namespace: globals of the module that defines `train` (`llava.train.train`, or `__main__`).

    Returns:
        The names of the workarounds in force in it.
    """
    made = namespace.setdefault(_SCRIPT_MARK, set())
    for one in WORKAROUNDS:
        if one.when in ("script", "arguments") and one.name not in made and one.needed():
            one.apply(namespace if one.when == "script" else namespace["TrainingArguments"])
            made.add(one.name)
    return [one.name for one in WORKAROUNDS if one.name in made]


def _make(when: str) -> None:
    for one in WORKAROUNDS:
        if one.when == when and one.name not in MADE and one.needed():
            one.apply()
            MADE.add(one.name)


def _import_llava() -> None:
    if importlib.util.find_spec("llava") is None:
        raise VITaskError(
            "upstream LLaVA is not installed; install it with `pip install --no-deps llava-torch==1.2.2.post1`"
        )
    before = _llava_modules()
    try:
        importlib.import_module("llava.model.language_model.llava_llama")
        importlib.import_module("llava.train.llava_trainer")
    except Exception as error:
        cause = _first_cause() or error
        for name in _llava_modules().keys() - before.keys():
            del sys.modules[name]  # a half imported one would hide the cause from the next attempt
        raise VITaskError(
            f"upstream LLaVA does not import ({type(cause).__name__}: {cause}); "
            "`vitask doctor` shows which versions were tested"
        ) from cause


def _first_cause() -> Exception | None:
    """Why upstream's model does not import: `llava.model` swallows that and fails later on a name it then lacks."""
    kept = _llava_modules()
    for name in kept:
        del sys.modules[name]
    try:
        path = importlib.util.find_spec("llava").submodule_search_locations
        # Packages without their __init__, so that the import below goes straight to the module.
        for name, folder in (("llava", ""), ("llava.model", "model")):
            sys.modules[name] = package = types.ModuleType(name)
            package.__path__ = [str(Path(each) / folder) for each in path]
        importlib.import_module("llava.model.language_model.llava_llama")
    except Exception as error:
        return error
    finally:
        for name in _llava_modules():
            del sys.modules[name]
        sys.modules.update(kept)
    return None


def _llava_modules() -> dict[str, types.ModuleType]:
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "llava"}


# Before upstream is imported ----------------------------------------------------------------------------------------


@_patch(
    "layernorm-list",
    "ImportError: cannot import name 'ALL_LAYERNORM_LAYERS' from 'transformers.trainer'",
    "import",
    ">=4.57",
)
def _layernorm_list() -> None:
    import transformers.trainer
    from transformers.pytorch_utils import ALL_LAYERNORM_LAYERS

    if not hasattr(transformers.trainer, "ALL_LAYERNORM_LAYERS"):
        transformers.trainer.ALL_LAYERNORM_LAYERS = list(ALL_LAYERNORM_LAYERS)


@_patch("rms-norm-decay", "silent: Llama's norms get weight decay", "import", ">=4.57")
def _rms_norm_decay() -> None:
    import transformers.trainer
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    layers = transformers.trainer.ALL_LAYERNORM_LAYERS
    if LlamaRMSNorm not in layers:
        layers.append(LlamaRMSNorm)


# On upstream's classes ----------------------------------------------------------------------------------------------


@_patch("sampler", "TypeError: _get_train_sampler() takes 1 positional argument but 2 were given", "class", ">=4.57")
def _sampler() -> None:
    from llava.train.llava_trainer import LLaVATrainer

    original = LLaVATrainer._get_train_sampler

    @functools.wraps(original)
    def _get_train_sampler(self: Any, train_dataset: Any = None) -> Any:
        return original(self)

    LLaVATrainer._get_train_sampler = _get_train_sampler


@_patch("tokenizer-argument", "TypeError: __init__() got an unexpected keyword argument 'tokenizer'", "class", ">=5")
def _tokenizer_argument() -> None:
    from llava.train.llava_trainer import LLaVATrainer

    original = LLaVATrainer.__init__

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if "tokenizer" in kwargs:
            kwargs["processing_class"] = kwargs.pop("tokenizer")
        original(self, *args, **kwargs)

    LLaVATrainer.__init__ = __init__


@_patch(
    "generation-config",
    "ValueError at the very end, on saving: GenerationConfig is invalid (do_sample=False with a temperature)",
    "class",
    ">=4.57",
)
def _generation_config() -> None:
    from llava.train.llava_trainer import LLaVATrainer
    from transformers import GenerationConfig

    sampling = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
    original = LLaVATrainer.__init__

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        config, default = getattr(self.model, "generation_config", None), GenerationConfig()
        if config is None or config.do_sample:
            return
        # Greedy decoding does not read these, so that what `generate` does by default stays as it is.
        for name in sampling:
            if hasattr(config, name):
                setattr(config, name, getattr(default, name))

    LLaVATrainer.__init__ = __init__


@_patch(
    "checkpoint-signature",
    "TypeError: _save_checkpoint() takes 3 positional arguments but 4 were given",
    "class",
    ">=4.57",
)
def _checkpoint_signature() -> None:
    from llava.train.llava_trainer import LLaVATrainer
    from transformers import Trainer

    original = LLaVATrainer._save_checkpoint

    @functools.wraps(original)
    def _save_checkpoint(self: Any, model: Any, trial: Any, metrics: Any = None) -> None:
        if getattr(self.args, "tune_mm_mlp_adapter", False):
            original(self, model, trial)
        else:
            Trainer._save_checkpoint(self, model, trial)

    LLaVATrainer._save_checkpoint = _save_checkpoint


@_patch(
    "lora-resume",
    "silent: a resumed LoRA run starts with a new projector, since its checkpoints hold the adapter alone",
    "class",
    ">=4.57",
)
def _lora_resume() -> None:
    import torch
    from llava.train.llava_trainer import LLaVATrainer
    from peft import PeftModel

    from vitask_plugin.reading import read_bin

    save, load = LLaVATrainer._save, LLaVATrainer._load_from_checkpoint

    def beside_lora(trainer: Any) -> dict[str, Any]:
        # DeepSpeed's checkpoints hold every trainable weight already.
        if not isinstance(trainer.model, PeftModel) or trainer.is_deepspeed_enabled:
            return {}
        return {name: p for name, p in trainer.model.named_parameters() if p.requires_grad and "lora_" not in name}

    @functools.wraps(save)
    def _save(self: Any, output_dir: str | None = None, state_dict: Any = None) -> None:
        save(self, output_dir, state_dict)
        weights = beside_lora(self)
        if weights and self.args.should_save:
            weights = {name: weight.detach().cpu() for name, weight in weights.items()}
            torch.save(weights, Path(output_dir or self.args.output_dir) / NON_LORA_FILE)

    @functools.wraps(load)
    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        load(self, resume_from_checkpoint, model)
        weights, path = beside_lora(self), Path(resume_from_checkpoint) / NON_LORA_FILE
        if not weights:
            return
        saved = read_bin(path) if path.exists() else {}
        if missing := sorted(weights.keys() - saved.keys()):
            raise VITaskError(
                f"cannot resume from {resume_from_checkpoint!r}: {NON_LORA_FILE} there lacks {missing[0]}, which would "
                "start anew; remove that checkpoint, or resume from one that was written with the same flags"
            )
        self.model.load_state_dict(saved, strict=False)

    LLaVATrainer._save, LLaVATrainer._load_from_checkpoint = _save, _load_from_checkpoint


@_patch(
    "empty-groups",
    "ValueError under ZeRO-2/3 with LoRA and --mm_projector_lr: zip() argument 2 is longer than argument 1",
    "class",
    "<5",
)
def _empty_groups() -> None:
    from llava.train.llava_trainer import LLaVATrainer

    original = LLaVATrainer.create_optimizer

    @functools.wraps(original)
    def create_optimizer(self: Any, *args: Any, **kwargs: Any) -> Any:
        optimizer = original(self, *args, **kwargs)
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    LLaVATrainer.create_optimizer = create_optimizer


@_patch(
    "cache-position", "TypeError in generate(): forward() got an unexpected argument 'cache_position'", "class", "<5.4"
)
def _cache_position() -> None:
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

    original = LlavaLlamaForCausalLM.forward

    # With its signature: generate() reads it to see which arguments the model takes.
    @functools.wraps(original)
    def forward(self: Any, *args: Any, cache_position: Any = None, **kwargs: Any) -> Any:
        return original(self, *args, **kwargs)

    LlavaLlamaForCausalLM.forward = forward


@_patch(
    "load-dtype", "silent: without --bf16 the LLM is trained in the dtype of its files, not in float32", "class", ">=5"
)
def _load_dtype() -> None:
    import torch
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

    original = LlavaLlamaForCausalLM.from_pretrained.__func__

    @functools.wraps(original)
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        # Upstream's script passes None for the default, which was float32; quantized loading has its own.
        if "torch_dtype" in kwargs and kwargs["torch_dtype"] is None and "quantization_config" not in kwargs:
            kwargs["torch_dtype"] = torch.get_default_dtype()
        return original(cls, *args, **kwargs)

    LlavaLlamaForCausalLM.from_pretrained = classmethod(from_pretrained)


@_patch(
    "quantized-loading",
    "TypeError with --bits 4 or 8: __init__() got an unexpected keyword argument 'load_in_4bit'; then, as transformers "
    "5 quantizes the projector, RuntimeError: only Tensors of floating point and complex dtype can require gradients",
    "class",
    ">=4.57",
)
def _quantized_loading() -> None:
    # Upstream names the part "mm_projector"; transformers 5 compares from the start of a module's whole name. A list of
    # one's own also replaces transformers' default, which leaves the head as it is.
    left = ("model.mm_projector", "model.vision_tower", "lm_head")

    import llava.model
    from transformers import BitsAndBytesConfig

    def patch(model: type) -> None:
        original = model.from_pretrained.__func__

        @functools.wraps(original)
        def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
            asked = {name: kwargs.pop(name) for name in ("load_in_4bit", "load_in_8bit") if name in kwargs}
            # Upstream's script gives both these and a configuration that says the same.
            if any(asked.values()) and kwargs.get("quantization_config") is None:
                kwargs["quantization_config"] = BitsAndBytesConfig(**asked)
            skipped = getattr(kwargs.get("quantization_config"), "llm_int8_skip_modules", None) or []
            if "mm_projector" in skipped:
                skipped.extend(name for name in left if name not in skipped)
            return original(cls, *args, **kwargs)

        model.from_pretrained = classmethod(from_pretrained)

    for name in ("LlavaLlamaForCausalLM", "LlavaMistralForCausalLM", "LlavaMptForCausalLM"):
        if hasattr(llava.model, name):
            patch(getattr(llava.model, name))


@_patch("zero3-projector", "AssertionError under ZeRO-3 with --bf16: the projector is float32", "class", ">=4.57")
def _zero3_projector() -> None:
    from llava.model.llava_arch import LlavaMetaModel
    from transformers.integrations import is_deepspeed_zero3_enabled

    original = LlavaMetaModel.initialize_vision_modules

    @functools.wraps(original)
    def initialize_vision_modules(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if is_deepspeed_zero3_enabled():
            self.mm_projector.to(self.embed_tokens.weight.dtype)

    LlavaMetaModel.initialize_vision_modules = initialize_vision_modules


@_patch(
    "zero3-random",
    "silent: under ZeRO-3 loading the vision tower draws random numbers, so a new projector starts from other weights",
    "class",
    ">=4.57",
)
def _zero3_random() -> None:
    import torch
    from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
    from transformers.integrations import is_deepspeed_zero3_enabled

    original = CLIPVisionTower.load_model

    @functools.wraps(original)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        with torch.random.fork_rng(devices=[], enabled=is_deepspeed_zero3_enabled()):
            original(self, *args, **kwargs)

    CLIPVisionTower.load_model = load_model


# On the names in upstream's training script -------------------------------------------------------------------------


@_patch("evaluation-strategy", "ValueError: arguments are not used: --evaluation_strategy", "script", ">=4.57")
def _evaluation_strategy(namespace: dict[str, Any]) -> None:
    alias(namespace["TrainingArguments"], "eval_strategy", "evaluation_strategy")


@_patch(
    "one-writer",
    "several processes write the same files: all of them (transformers 5: local_rank stays -1) or one per node (4)",
    "script",
    ">=4.57",
)
def _one_writer(namespace: dict[str, Any]) -> None:
    def choose(args: Any) -> None:
        # Upstream writes where this is 0 or -1, and uses it for nothing else.
        args.local_rank = 0 if args.should_save else max(1, args.local_process_index)

    extend(namespace["TrainingArguments"], after=choose)


@_patch(
    "cuda-synchronize", "RuntimeError from torch.cuda.synchronize() on saving, DeepSpeed on CPUs", "script", ">=4.57"
)
def _cuda_synchronize(namespace: dict[str, Any]) -> None:
    name = "safe_save_model_for_hf_trainer"
    original = namespace[name]

    @functools.wraps(original)
    def save(*args: Any, **kwargs: Any) -> Any:
        with _without_cuda():
            return original(*args, **kwargs)

    namespace[name] = save


@contextlib.contextmanager
def _without_cuda() -> Iterator[None]:
    import torch

    if torch.cuda.is_available():
        yield
        return
    original, torch.cuda.synchronize = torch.cuda.synchronize, lambda *args: None
    try:
        yield
    finally:
        torch.cuda.synchronize = original


WORKAROUNDS: tuple[Workaround, ...] = (*_own, *TRAINER)
