"""A tiny LLaVA, made on the spot from random numbers: for the demo and the tests.

Everything is written in upstream's own formats, so that upstream's `train()`, `load_pretrained_model` and lmms-eval
read it as they read the real thing. Nothing is downloaded. The weights know nothing: what a tuned tiny LLaVA can do,
it learnt from the samples it was tuned on.
"""

import argparse
import contextlib
import io
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitask_plugin.data.drawn import add_task, texts_of
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import atomic_directory, write_json
from vitask_plugin.options import SEED


@dataclass(frozen=True)
class TinyLlava:
    """Where the parts of an untuned LLaVA lie, by the upstream flag that takes them."""

    base: Path  # --model_name_or_path: LlamaForCausalLM + sentencepiece tokenizer
    tower: Path  # --vision_tower: CLIPVisionModel + CLIPImageProcessor
    projector: Path  # --pretrain_mm_mlp_adapter: of --mm_projector_type mlp2x_gelu


def make_tiny_llava(
    directory: str | Path,
    *,
    texts: Iterable[str],
    seed: int,
    hidden_size: int = 128,
    layers: int = 2,
    image_size: int = 28,
    patch_size: int = 7,
    vision_hidden_size: int = 64,
    vision_layers: int = 2,
) -> TinyLlava:
    """Writes `directory`: base/ (a random Llama, its tokenizer), tower/ (a random CLIP vision tower), mm_projector.bin.

    Args:
        directory: made anew; an existing one is replaced at the end.
        texts: what the tokenizer is trained on; the system prompt of LLaVA's `v1` template is added. Words that are
            not in it still encode, byte by byte.
        seed: of all weights. The tokenizer is deterministic.
        hidden_size: width D of the LLM, a multiple of 32 (heads are 32 wide).
        image_size, patch_size: pixels; the tower gives (image_size // patch_size) ** 2 image tokens.
        vision_layers: at least 2, since LLaVA reads the layer before the last.
    """
    if hidden_size % 32 or vision_hidden_size % 32:
        raise VITaskError(
            f"hidden_size={hidden_size} and vision_hidden_size={vision_hidden_size} must be multiples of 32, "
            "the width of an attention head"
        )
    import torch
    import transformers

    directory = Path(directory).resolve()
    with atomic_directory(directory) as temporary, _seeded(seed):
        tokenizer = _train_tokenizer(temporary / "base", texts)
        model = transformers.LlamaForCausalLM(_llama(transformers.LlamaConfig, len(tokenizer), hidden_size, layers))
        model.save_pretrained(temporary / "base")
        _write_tower(temporary / "tower", image_size, patch_size, vision_hidden_size, vision_layers)
        layers_by_index = {
            0: torch.nn.Linear(vision_hidden_size, hidden_size),
            2: torch.nn.Linear(hidden_size, hidden_size),
        }
        torch.save(
            {
                f"model.mm_projector.{index}.{name}": weight
                for index, layer in layers_by_index.items()
                for name, weight in layer.state_dict().items()
            },
            temporary / "mm_projector.bin",
        )
    return TinyLlava(directory / "base", directory / "tower", directory / "mm_projector.bin")


def make_tiny_checkpoint(
    directory: str | Path,
    *,
    texts: Iterable[str],
    seed: int,
    tower: str | Path,
    hidden_size: int = 128,
    layers: int = 2,
) -> Path:
    """Writes a whole LLaVA checkpoint (`model_type` llava_llama, random LLM and projector) that stock
    `load_pretrained_model` loads, for tests that need no training.

    Args:
        directory: its name must contain "llava": upstream decides by it which class to load.
        tower: a vision tower written by `make_tiny_llava`; only its path goes into the checkpoint.
    """
    directory, tower = Path(directory).resolve(), Path(tower).resolve()
    if "llava" not in directory.name.lower():
        raise VITaskError(f"checkpoint folder {str(directory)!r} must have 'llava' in its name; upstream looks for it")
    from vitask_plugin.llava import compat

    compat.prepare()
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM

    with atomic_directory(directory) as temporary, _seeded(seed):
        tokenizer = _train_tokenizer(temporary, texts)
        config = _with_tower(_llama(LlavaConfig, len(tokenizer), hidden_size, layers), tower)
        LlavaLlamaForCausalLM(config).save_pretrained(temporary)
    return directory


def join_parts(parts: TinyLlava, directory: str | Path) -> Path:
    """Writes `parts` as one checkpoint: the same LLM, projector and tokenizer, so that tuning goes as from the parts.

    Args:
        directory: as of `make_tiny_checkpoint`. The checkpoint names the tower and does not hold it.
    """
    from vitask_plugin.llava import compat

    compat.prepare()
    import torch
    import transformers
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM

    directory = Path(directory).resolve()
    with atomic_directory(directory) as temporary:
        llm = transformers.LlamaForCausalLM.from_pretrained(parts.base)
        values = llm.config.to_dict()
        config = LlavaConfig(**{name: value for name, value in values.items() if name != "model_type"})
        model = LlavaLlamaForCausalLM(_with_tower(config, parts.tower))
        weights = {**llm.state_dict(), **torch.load(parts.projector, weights_only=True)}
        model.load_state_dict(weights, strict=True)
        model.save_pretrained(temporary)
        for name in _TOKENIZER_FILES:
            shutil.copyfile(parts.base / name, temporary / name)
    return directory


def _with_tower(config: Any, tower: str | Path) -> Any:
    """A LlavaConfig with what it says of the tower and the projector."""
    from transformers import CLIPVisionConfig

    for name, value in {
        "mm_vision_tower": str(tower),
        "mm_hidden_size": CLIPVisionConfig.from_pretrained(tower).hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "image_aspect_ratio": "square",
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": 2048,
    }.items():
        setattr(config, name, value)
    return config


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random weights from `seed`, with the caller's random state left as it was."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _llama(config_class: type, vocabulary: int, hidden_size: int, layers: int):
    return config_class(
        vocab_size=vocabulary,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 32,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        # Read by upstream's LlavaLlamaForCausalLM; no longer a default of LlamaConfig.
        pretraining_tp=1,
    )


_TOKENIZER_FILES = ("tokenizer.model", "tokenizer_config.json")


def _train_tokenizer(directory: Path, texts: Iterable[str]):
    """A sentencepiece model trained on `texts`, saved in `directory` in the form that released LLaVA checkpoints have.

    The options keep newlines and repeated spaces and give the space before an answer a piece of its own; upstream's
    `preprocess_v1` counts on both when it places the labels.
    """
    import sentencepiece
    import transformers

    from vitask_plugin.llava import compat

    compat.prepare()
    from llava.conversation import conv_templates

    template = conv_templates["v1"]
    user, assistant = template.roles
    # From the second turn on, preprocess_v1 takes "USER" after "</s>" to be one piece and " USER" to be two, as in the
    # vocabulary of Llama. Showing the word after other characters than a space gives the same here.
    roles = [f"{assistant}:", f"({user}:", f"/{user}:", f">{user}:"]
    model = io.BytesIO()  # with a file, its path would be part of the model
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([template.system, *roles, *texts]),
        model_writer=model,
        model_type="bpe",
        vocab_size=1024,
        hard_vocab_limit=False,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        byte_fallback=True,
        num_threads=1,
        minloglevel=2,
    )
    directory.mkdir(parents=True, exist_ok=True)
    model_file, config_file = _TOKENIZER_FILES
    (directory / model_file).write_bytes(model.getvalue())
    # Without add_bos_token, transformers 5 leaves the first token out.
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "model_max_length": 2048,
        "padding_side": "right",
    }
    write_json(directory / config_file, config)
    return transformers.AutoTokenizer.from_pretrained(directory, use_fast=False)


def _write_tower(directory: Path, image_size: int, patch_size: int, hidden_size: int, layers: int) -> None:
    import transformers

    config = transformers.CLIPVisionConfig(
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32,
        image_size=image_size,
        patch_size=patch_size,
        projection_dim=hidden_size,
    )
    transformers.CLIPVisionModel(config).save_pretrained(directory)
    transformers.CLIPImageProcessor(
        size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
    ).save_pretrained(directory)


CHECKPOINT, TOWER = "tiny-llava", "tower"  # what `--checkpoint` and every run writes into its folder


def main() -> None:
    """`python -m vitask_plugin.llava.tiny`: a tiny LLaVA for one task, to try things out with."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    add_task(parser)
    parser.add_argument("--seed", type=int, action=SEED, default=0, metavar="N", help="of the weights (default 0)")
    parser.add_argument(
        "--checkpoint", action="store_true", help=f"also write DIR/{CHECKPOINT}: the same as one checkpoint"
    )
    args = parser.parse_args()
    try:
        parts = make_tiny_llava(args.out, texts=texts_of(args), seed=args.seed)
        if args.checkpoint:
            join_parts(parts, Path(args.out) / CHECKPOINT)
    except VITaskError as error:
        raise SystemExit(f"vitask: error: {error}") from None


if __name__ == "__main__":
    main()
