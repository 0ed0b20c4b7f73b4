"""Makes the workarounds one by one, and writes what upstream did before each and after it.

    python one_by_one.py WORK_DIR RESULT.json

In a process of its own, since nothing may be patched at the start. RESULT.json: {workaround: [before, after]}, each
"fine" or what went wrong. A workaround that this transformers does not need is not made, and its two entries are of the
same upstream.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from upstream import LORA, arguments, train

from vitask_plugin.llava import compat

WORK, RESULT = Path(sys.argv[1]), Path(sys.argv[2])
WORKAROUNDS = {one.name: one for one in compat.WORKAROUNDS}
outcomes: dict[str, tuple[str, str]] = {}
runs = 0


def outcome(check: Callable[[], str | None]) -> str:
    try:
        return check() or "fine"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def step(name: str, check: Callable[[], str | None], *script: dict) -> None:
    """Tries upstream, makes the workaround if it is needed, and tries upstream again."""
    before = outcome(check)
    if WORKAROUNDS[name].needed():
        of_arguments = WORKAROUNDS[name].when == "arguments"
        WORKAROUNDS[name].apply(*([one["TrainingArguments"] for one in script] if of_arguments else script))
    outcomes[name] = (before, outcome(check))


def output() -> Path:
    """A new output folder: upstream resumes from what it finds in an old one."""
    global runs
    runs += 1
    return WORK / f"run-{runs}"


def importing() -> None:
    import llava.train.train  # noqa: F401


step("layernorm-list", importing)

import transformers  # noqa: E402
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM  # noqa: E402
from llava.train import llava_trainer  # noqa: E402
from llava.train import train as upstream_script  # noqa: E402

script = vars(upstream_script)
tiny = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}


def norms_without_decay() -> str | None:
    model = LlavaLlamaForCausalLM(LlavaConfig(**tiny))
    decayed = llava_trainer.get_parameter_names(model, llava_trainer.ALL_LAYERNORM_LAYERS)
    return ", ".join(name for name in decayed if "norm" in name)


def several_cpu_locations() -> None:
    torch.save(torch.zeros(2), WORK / "tensor.pt")
    torch.load(WORK / "tensor.pt", map_location=torch.device("cpu:0"), weights_only=True)


def parsing(*flags: str) -> Callable[[], None]:
    def check() -> None:
        classes = tuple(script[name] for name in ("ModelArguments", "DataArguments", "TrainingArguments"))
        parser = transformers.HfArgumentParser(classes)
        parser.parse_args_into_dataclasses(arguments(WORK, WORK / "parsed", *flags))

    return check


step("rms-norm-decay", norms_without_decay)
step("cpu-location", several_cpu_locations)
step("evaluation-strategy", parsing("--evaluation_strategy", "no"), script)
step("warmup-ratio", parsing("--warmup_ratio", "0.03"), script)

# One run meets these one after the other: what the one before patched is what lets it get to the next.
for name in ("tokenizer-argument", "sampler", "checkpoint-signature", "generation-config"):
    step(name, lambda: train(script, arguments(WORK, output())) and None)


def float32_without_bf16() -> str | None:
    dtype = LlavaLlamaForCausalLM.from_pretrained(WORK / "base16", torch_dtype=None).dtype
    return None if dtype == torch.float32 else str(dtype)


def lora_resumes() -> str | None:
    whole, rest = output(), output()
    train(script, arguments(WORK, whole, *LORA))
    shutil.copytree(whole / "checkpoint-2", rest / "checkpoint-2")
    train(script, arguments(WORK, rest, *LORA))
    ours, theirs = (torch.load(out / "non_lora_trainables.bin", weights_only=True) for out in (rest, whole))
    return None if all(torch.equal(ours[name], theirs[name]) for name in theirs) else "another projector"


def empty_groups() -> str | None:
    trainer = train(script, arguments(WORK, output(), *LORA, "--save_strategy", "no"))
    return None if all(group["params"] for group in trainer.optimizer.param_groups) else "an empty group"


def generates() -> None:
    model = LlavaLlamaForCausalLM(LlavaConfig(**tiny)).eval()
    ids = torch.ones(1, 3, dtype=torch.long)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)


step("load-dtype", float32_without_bf16)
step("lora-resume", lora_resumes)
step("empty-groups", empty_groups)
step("cache-position", generates)

finished = train(script, arguments(WORK, output(), "--save_strategy", "no"))
finished.deepspeed = True  # the path that upstream takes under DeepSpeed; saving itself is the Trainer's
step(
    "cuda-synchronize",
    lambda: script["safe_save_model_for_hf_trainer"](trainer=finished, output_dir=str(output())),
    script,
)

from transformers.integrations import HfDeepSpeedConfig  # noqa: E402

llava = finished.model.get_model().to(torch.bfloat16)
zero3 = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})  # in force as long as it is referenced


def projector_dtype() -> str | None:
    llava.mm_projector.float()  # as upstream makes it
    model_arguments = script["ModelArguments"](vision_tower=str(WORK / "tower"), mm_vision_select_layer=-2)
    llava.initialize_vision_modules(model_arguments)
    dtype = llava.mm_projector[0].weight.dtype
    return None if dtype == torch.bfloat16 else str(dtype)


def adapter_dtype() -> str | None:
    import peft

    model = LlavaLlamaForCausalLM(LlavaConfig(**tiny)).to(torch.bfloat16)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    dtypes = {weight.dtype for name, weight in adapted.named_parameters() if "lora_" in name}
    return None if dtypes == {torch.bfloat16} else str(dtypes)


step("zero3-projector", projector_dtype)
step("zero3-adapter", adapter_dtype)

RESULT.write_text(json.dumps(outcomes, indent=1))
