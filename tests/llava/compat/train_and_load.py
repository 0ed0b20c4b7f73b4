"""Upstream's `train()` with the workarounds and nothing else.

    python train_and_load.py whole WORK_DIR     trains full and LoRA, saving halfway
    python train_and_load.py rest WORK_DIR      resumes both from halfway, then loads and asks what was trained

WORK_DIR gets llava-full, llava-lora, llava-full-resumed, llava-lora-resumed, and answers.json:
    {kind: [generated, expected]}: token ids for two prompts of different lengths, as a batch, and alone without a cache
    {"refused": message}: the error on resuming from a LoRA checkpoint without its other trainable weights
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from upstream import LORA, arguments, train

from vitask_plugin.errors import VITaskError
from vitask_plugin.llava import compat

compat.prepare()
from llava.train import train as upstream_script  # noqa: E402

compat.patch_script(vars(upstream_script))
MODE, WORK = sys.argv[1], Path(sys.argv[2])
USUAL = ("--evaluation_strategy", "no", "--warmup_ratio", "0.03", "--gradient_accumulation_steps", "2")
KINDS = {"full": ("--gradient_checkpointing", "True"), "lora": LORA}
PRECISION = ("--bf16", "True")  # one for both: transformers 4 keeps it in the environment
NEW_TOKENS = 6


def run(kind: str, output: Path) -> None:
    train(vars(upstream_script), arguments(WORK, output, *USUAL, *PRECISION, *KINDS[kind]))


def answers(kind: str) -> tuple[list[list[int]], list[list[int]]]:
    from llava.model.builder import load_pretrained_model

    output = WORK / f"llava-{kind}"
    base = str(WORK / "base") if kind == "lora" else None
    _, model, processor, _ = load_pretrained_model(str(output), base, output.name, device_map="cpu", device="cpu")
    model.float().eval()
    images = processor.preprocess(pictures(), return_tensors="pt")["pixel_values"]
    prompts = [torch.tensor([1, -200, 20, 21, 22]), torch.tensor([1, -200, 30])]  # -200 stands for the image
    ids = torch.zeros(2, 5, dtype=torch.long)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)], mask[row, : len(prompt)] = prompt, True
    model.config.tokenizer_padding_side = "left"
    generated = model.generate(
        ids, images=images, attention_mask=mask, do_sample=False, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS
    )
    return generated.tolist(), [greedy(model, prompt, image) for prompt, image in zip(prompts, images, strict=True)]


@torch.no_grad()
def greedy(model: torch.nn.Module, prompt: torch.Tensor, image: torch.Tensor) -> list[int]:
    found: list[int] = []
    for _ in range(NEW_TOKENS):
        ids = torch.cat([prompt, torch.tensor(found, dtype=torch.long)])[None]
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), images=image[None], use_cache=False).logits
        logits[0, -1, 2] = -torch.inf  # min_new_tokens keeps the end token out
        found.append(int(logits[0, -1].argmax()))
    return found


def pictures() -> list:
    from PIL import Image

    return [Image.open(path) for path in sorted((WORK / "images").rglob("*.png"))[:2]]


for kind in KINDS:
    whole, rest = WORK / f"llava-{kind}", WORK / f"llava-{kind}-resumed"
    if MODE == "rest":
        shutil.copytree(whole / "checkpoint-2", rest / "checkpoint-2")
    run(kind, whole if MODE == "whole" else rest)
if MODE == "rest":
    found = {kind: answers(kind) for kind in KINDS}
    shutil.copytree(WORK / "llava-lora" / "checkpoint-2", WORK / "spoilt" / "checkpoint-2")
    (WORK / "spoilt" / "checkpoint-2" / compat.NON_LORA_FILE).unlink()
    try:
        run("lora", WORK / "spoilt")
    except VITaskError as error:
        found["refused"] = str(error)
    (WORK / "answers.json").write_text(json.dumps(found))
