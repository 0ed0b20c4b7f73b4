"""What each path saves is a LLaVA checkpoint: stock LLaVA loads it and answers as our loader does, and as the
reference's checkpoint does."""

import json
from pathlib import Path

import pytest
import torch
from cases import CASES, Case

PATHS = [
    Case("ddp", 2, "full", "whole", "packed", False, "fp32"),
    Case("ddp", 1, "lora", "accumulated", "branches", True, "fp32"),
    Case("zero2", 1, "full", "whole", "packed", False, "fp32"),
    Case("zero2", 2, "lora", "whole", "packed", True, "fp32"),
    Case("zero3", 2, "full", "accumulated", "packed", True, "fp32"),
    Case("zero3", 1, "lora", "whole", "packed", False, "fp32"),
]
GREEDY = {"do_sample": False, "max_new_tokens": 8}


def prompts(data: Path) -> list[tuple[str, Path]]:
    samples = [sample for sample in json.loads((data / "train.json").read_text()) if "vitask" in sample]
    return [(s["conversations"][0]["value"], data / "images" / s["image"]) for s in samples[2:5]]


def stock_answers(output: Path, base: Path | None, data: Path) -> list[list[int]]:
    """Stock LLaVA's loader and its own `generate`, in float32 after its rounding to float16 (slow on a CPU)."""
    from llava.model.builder import load_pretrained_model

    tokenizer, model, processor, _ = load_pretrained_model(
        str(output), base and str(base), output.name, device_map="cpu", device="cpu"
    )
    model.float().get_vision_tower().float()
    answers = []
    for ids, image in tokens(tokenizer, processor, model.config, data):
        answers.append(model.generate(ids, images=image, attention_mask=torch.ones_like(ids), **GREEDY)[0].tolist())
    return answers


def our_answers(output: Path, base: Path | None, data: Path) -> list[list[int]]:
    from vitask_plugin.llava.loading import load

    ours = load(output, base)
    ours.model.half().float()
    return [
        ours.model.vitask_generate(ours.model.vitask_prompts(ids, torch.ones_like(ids), image), **GREEDY)[0].tolist()
        for ids, image in tokens(ours.tokenizer, ours.image_processor, ours.model.config, data)
    ]


def tokens(tokenizer, processor, config, data: Path):
    from llava.conversation import conv_templates
    from llava.mm_utils import process_images, tokenizer_image_token
    from PIL import Image

    for question, path in prompts(data):
        conversation = conv_templates["v1"].copy()
        conversation.append_message("USER", question)
        conversation.append_message("ASSISTANT", None)
        ids = tokenizer_image_token(conversation.get_prompt(), tokenizer, return_tensors="pt")[None]
        yield ids, process_images([Image.open(path)], processor, config)


@pytest.mark.parametrize("case", PATHS, ids=lambda case: f"{case.parallel}-{case.tuning}")
def test_stock_llava_answers_alike(case, runs, mixture, tiny_llava):
    assert case in CASES  # its weights were compared with the reference's
    from vitask_plugin.llava import compat

    compat.prepare()
    base = tiny_llava.base if case.tuning == "lora" else None
    found = stock_answers(runs(case).output, base, mixture)
    assert all(len(answer) > 1 for answer in found)
    assert found == our_answers(runs(case).output, base, mixture)
    assert found == stock_answers(runs(case.reference).output, base, mixture)
