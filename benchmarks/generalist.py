"""A small real vision-language model to tune: SmolLM2 behind a frozen DINOv2, aligned on captioned pictures.

    python benchmarks/generalist.py OUT --models DIR --captions captions.zip [--layers 8] [--seed 0]

DIR holds `smollm2-135m` and `dinov2-small` as HF folders; the archive `captions.csv` (image, caption) and the pictures.
OUT becomes a `LlavaForConditionalGeneration` with its processor and chat template, which stock transformers loads.
Pictures are seen at 112 px: 64 image tokens, a third of a step of this size and as much as its text.

First the projector is trained on captions, then it and a LoRA of the decoder, which is merged. With `--layers N` the
decoder is SmolLM2's first N layers; what the others did has to be learnt again, so all of it is trained, at once with
the projector. 500 pictures are held out: `OUT/generalist.json` says what their captions cost with the right picture and
with another one's, and what the model writes about eight of them. The same command goes on where it was stopped.
"""

import argparse
import csv
import json
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from aligning import Aligner, Captioned, Stage
from measuring import end_with_a_sentence, machine
from PIL import Image
from safetensors.torch import load_file, save_file

from vitask_plugin.errors import VITaskError
from vitask_plugin.files import atomic_directory, write_json
from vitask_plugin.hf.tiny_templates import CHATS

LLM, TOWER = "smollm2-135m", "dinov2-small"
HELD_OUT, SHOWN = 500, 8
IMAGE = "<image>"
# As for LoRA of LLaVA: alpha twice the rank, the projector at a rate of its own.
LORA_RANK = 16


def read_captions(archive: Path, folder: Path) -> list[tuple[Path, list[str]]]:
    """Pictures, unpacked into `folder`, and their captions, in the archive's order."""
    if not archive.is_file():
        raise VITaskError(f"no archive of captioned pictures at {str(archive)!r}; give one with --captions")
    if not (folder / "captions.csv").is_file():
        with zipfile.ZipFile(archive) as opened, atomic_directory(folder) as temporary:
            opened.extractall(temporary)
    captions: dict[str, list[str]] = {}
    with open(folder / "captions.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            captions.setdefault(row["image"], []).append(row["caption"])
    return [(folder / image, own) for image, own in captions.items()]


def build(models: Path, layers: int | None, side: int, seed: int) -> tuple[Any, Any]:
    """The model in float32, its projector drawn at random, and its processor."""
    import transformers as tf

    for name in (LLM, TOWER):
        if not (models / name / "config.json").is_file():
            raise VITaskError(f"{str(models)!r} holds no HF folder {name!r}; give the folder of both models (--models)")
    torch.manual_seed(seed)
    llm = tf.AutoModelForCausalLM.from_pretrained(models / LLM, dtype=torch.float32)
    tower = tf.AutoModel.from_pretrained(models / TOWER, dtype=torch.float32)
    whole = llm.config.num_hidden_layers
    if layers is not None and not 1 <= layers <= whole:
        raise VITaskError(f"--layers is {layers}; {LLM} has {whole}, so it must be from 1 to {whole}")
    llm.config.num_hidden_layers = layers or whole
    llm.model.layers = llm.model.layers[: layers or whole]
    tokenizer = tf.AutoTokenizer.from_pretrained(models / LLM, extra_special_tokens={"image_token": IMAGE})
    tokenizer.padding_side = "right"
    llm.resize_token_embeddings(-(-len(tokenizer) // 64) * 64, mean_resizing=False)
    config = tf.LlavaConfig(
        vision_config=tower.config,
        text_config=llm.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(side // tower.config.patch_size) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model = tf.LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(llm.model.state_dict())
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.tie_weights()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    pictures = tf.BitImageProcessor(
        size={"height": side, "width": side},  # the whole picture: what tells classes apart may be at its edge
        do_center_crop=False,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
        resample=3,
    )
    processor = tf.LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHATS["llava_onevision"].template,
    )
    return model, processor


@torch.no_grad()
def tower_features(model: Any, processor: Any, images: list[Path], file: Path, batch: int = 64) -> torch.Tensor:
    """[N, T, F] float16 features of the pictures as the projector is given them; kept in `file`."""
    if file.is_file():
        return load_file(file)["features"]
    model.eval()
    found = []
    for first in range(0, len(images), batch):
        opened = [Image.open(path).convert("RGB") for path in images[first : first + batch]]
        pixels = processor.image_processor(opened, return_tensors="pt").pixel_values
        with torch.autocast("cpu", torch.bfloat16):
            states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
        found.append(states[:, 1:].half())
        if first % (batch * 20) == 0:
            print(f"features {first}/{len(images)}", flush=True)
    features = torch.cat(found)
    part = file.with_suffix(".part")
    save_file({"features": features}, part)
    part.rename(file)
    return features


def stages_of(args: argparse.Namespace) -> list[Stage]:
    if args.layers:
        return [Stage("decoder and projector", sum(args.epochs), "full", args.learning_rate or 6e-4)]
    return [
        Stage("projector", args.epochs[0], "projector", 1e-3),
        Stage("LoRA and projector", args.epochs[1], "lora", args.learning_rate or 4e-4),
    ]


def written(out: Path, images: list[Path], question: str) -> list[dict[str, str]]:
    """What the finished folder, loaded by stock classes, writes about pictures."""
    import transformers as tf

    model = tf.AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32).eval()
    processor = tf.AutoProcessor.from_pretrained(out)
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    found = []
    for path in images:
        inputs = processor(images=[Image.open(path).convert("RGB")], text=[text], return_tensors="pt")
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        answer = processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        found.append({"image": path.name, "caption": answer.strip()})
    return found


def make(args: argparse.Namespace) -> None:
    work = args.out.with_name(f".{args.out.name}.aligning")  # what is kept between starts
    work.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    model, processor = build(args.models, args.layers, args.side, args.seed)
    pictures = read_captions(args.captions, args.cache / "captions")[: args.pictures]
    images = [path for path, _ in pictures]
    kept = args.cache / f"features-{args.side}-{len(images)}.safetensors"
    features = tower_features(model, processor, images, kept)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()
    held = order[: min(HELD_OUT, len(order) // 4)]  # the same ones whatever the seed
    data = Captioned(processor, features, [own for _, own in pictures], order[len(held) :], held)
    aligner = Aligner(model, data, work, batch=args.batch, seed=args.seed, rank=LORA_RANK)
    aligner.run(stages_of(args))
    figures = {
        "seed": args.seed,
        "layers": model.config.text_config.num_hidden_layers,
        "side": args.side,
        "image_tokens": model.config.image_seq_length,
        "parameters": sum(one.numel() for one in model.parameters()),
        "pictures": len(data.train),
        "held_out": len(held),
        "batch": args.batch,
        **aligner.figures,
        "seconds_of_this_start": round(time.monotonic() - begin, 1),
        **machine("cpu", torch.get_num_threads()),
    }
    with atomic_directory(args.out) as temporary:
        model.to(torch.bfloat16).save_pretrained(temporary)
        processor.save_pretrained(temporary)
        write_json(temporary / "generalist.json", figures)
    figures["written"] = written(args.out, [images[number] for number in held[:SHOWN]], data.questions[0])
    write_json(args.out / "generalist.json", figures)
    print(json.dumps(figures, indent=1))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the model, replaced at the end")
    parser.add_argument("--models", type=Path, required=True, metavar="DIR", help=f"holds {LLM} and {TOWER}")
    parser.add_argument("--captions", type=Path, required=True, metavar="ZIP", help="captioned pictures")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="pictures and features are kept here (OUT-cache)")
    parser.add_argument("--layers", type=int, metavar="N", help="of the decoder (default: all)")
    parser.add_argument("--side", type=int, default=112, metavar="PX", help="of a picture, a multiple of 14")
    parser.add_argument("--pictures", type=int, metavar="N", help="of the archive (default: all)")
    parser.add_argument("--epochs", type=int, nargs=2, default=(1, 3), metavar="N", help="of the two stages (1 3)")
    parser.add_argument("--learning-rate", type=float, metavar="LR", help="of the decoder (LoRA 4e-4, whole 6e-4)")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="(default 32)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and order (default 0)")
    args = parser.parse_args(argv)
    args.out = args.out.resolve()
    args.cache = (args.cache or args.out.with_name(f"{args.out.name}-cache")).resolve()
    args.cache.mkdir(parents=True, exist_ok=True)
    return args


if __name__ == "__main__":
    end_with_a_sentence(lambda: make(parse()))
