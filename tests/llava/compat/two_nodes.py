"""One of two processes that take themselves for the first of their node; started with torchrun's environment variables.

    python two_nodes.py ddp WORK_DIR        trains LoRA, and resumes it from halfway
    python two_nodes.py zero3 WORK_DIR      trains LoRA and full under ZeRO-3 with bf16

The last line printed is JSON: `written`, the files that this process wrote with `torch.save`, and `unpatched`, what
upstream's arguments were before the script was patched, and `compiled`, what DeepSpeed would have compiled.
"""

import importlib
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from upstream import LORA, arguments, train

from vitask_plugin.llava import compat

compiled: list[str] = []
importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: compiled.append("shm")
MODE, WORK = sys.argv[1], Path(sys.argv[2])
compat.prepare()
from llava.train import train as upstream_script  # noqa: E402

script = vars(upstream_script)
ZERO3 = {
    "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
}
zero3 = WORK / f"zero3-{os.environ['RANK']}.json"
zero3.write_text(json.dumps(ZERO3))
DEEPSPEED = ("--deepspeed", str(zero3), "--bf16", "True", "--save_strategy", "no")
written: list[str] = []
save = torch.save


def noted(value: object, path: object, *args: object, **kwargs: object) -> None:
    written.append(str(path))
    save(value, path, *args, **kwargs)


def parsed(*flags: str) -> dict:
    """Upstream's local_rank, and whether DeepSpeed knows of the other process."""
    import deepspeed
    import transformers

    classes = tuple(script[name] for name in ("ModelArguments", "DataArguments", "TrainingArguments"))
    parser = transformers.HfArgumentParser(classes)
    found = parser.parse_args_into_dataclasses(arguments(WORK, WORK / "parsed", *flags))[2]
    return {"local_rank": found.local_rank, "deepspeed": deepspeed.comm.is_initialized()}


unpatched = parsed(*(DEEPSPEED if MODE == "zero3" else ()))
compat.patch_script(script)
torch.save = noted
if MODE == "ddp":
    whole, rest = WORK / "llava-two-lora", WORK / "llava-two-lora-resumed"
    train(script, arguments(WORK, whole, *LORA))
    torch.distributed.barrier()
    if os.environ["RANK"] == "0":
        shutil.copytree(whole / "checkpoint-2", rest / "checkpoint-2")
    torch.distributed.barrier()
    train(script, arguments(WORK, rest, *LORA))
else:
    train(script, arguments(WORK, WORK / "llava-zero3-lora", *LORA, *DEEPSPEED))
    train(script, arguments(WORK, WORK / "llava-zero3-full", *DEEPSPEED))
torch.distributed.barrier()
sys.stdout.write(json.dumps({"unpatched": unpatched, "written": written, "compiled": compiled}) + "\n")
sys.stdout.flush()
# Under transformers 5 and ZeRO-3 the interpreter's own exit aborts now and then, long after everything is saved.
os._exit(0)
