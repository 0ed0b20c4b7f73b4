"""Tiny vision-language models in the format of Hugging Face transformers, made on the spot from random numbers.

A folder holds what a released model's folder holds (config, weights, processor, tokenizer, chat template), so that
stock `AutoModelForImageTextToText` and `AutoProcessor` load it. Nothing is downloaded. What a family does that a shared
prefix has to respect is there, in small: positions in three dimensions, features given to several decoder layers,
windows, image tokens that see each other, image-token counts that depend on the image's size.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

from vitask_plugin.data.drawn import add_task, texts_of
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import atomic_directory
from vitask_plugin.hf.tiny_families import TABLE, Sizes
from vitask_plugin.hf.tiny_templates import CHATS, ChatFormat
from vitask_plugin.options import COUNT, SEED

FAMILIES = ("llava", "llava_onevision", "internvl", "qwen2_5_vl", "qwen3_vl", "gemma3")
OTHERS = ("qwen3_5", "paligemma", "mistral_window")  # one shared prefix does not hold for them, or only with care

VOCABULARY = 1000  # at most; the tokens that PaliGemma's processor adds come on top


def make_tiny(
    directory: str | Path,
    *,
    family: str,
    texts: Iterable[str],
    seed: int,
    hidden_size: int = 64,
    layers: int = 2,
    image_size: int = 28,
) -> Path:
    """Writes `directory`: a random model of `family` in float32 with its processor and tokenizer.

    Args:
        directory: made anew; an existing one is replaced at the end.
        family: one of `FAMILIES` or `OTHERS`. An answer of `mistral_window` sees `layers` * 7 tokens back, so that an
            image before a long question has no part in it.
        texts: what the tokenizer is trained on. Words that are not in it still encode, byte by byte.
        seed: of all weights. The tokenizer is deterministic; the caller's random state is left as it was.
        hidden_size: width D of the decoder and of the vision tower, a multiple of 64.
        layers: of the decoder, at least 2: some families have layers of two kinds.
        image_size: pixels, a multiple of 4. A square image of this size gives 4 to 36 image tokens.

    Raises:
        VITaskError: a family that this file or the installed transformers does not know, or sizes that do not fit.
    """
    if family not in TABLE:
        raise VITaskError(f"family={family!r} is not known; use one of {', '.join(TABLE)}")
    if hidden_size % 64 or image_size % 4 or layers < 2:
        raise VITaskError(
            f"hidden_size={hidden_size} must be a multiple of 64, image_size={image_size} one of 4, "
            f"and layers={layers} at least 2"
        )
    import torch
    import transformers

    directory = Path(directory).resolve()
    sizes, chat, entry = Sizes(hidden_size, layers, image_size), CHATS[family], TABLE[family]
    if entry.model_type not in transformers.CONFIG_MAPPING:
        raise VITaskError(f"transformers {transformers.__version__} has no {entry.model_type!r}; install a newer one")
    with atomic_directory(directory) as temporary, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        processor_class = getattr(transformers, entry.processor_class)
        tokenizer = _tokenizer(chat, texts, processor_class)
        processor = processor_class(tokenizer=tokenizer, chat_template=chat.template, **entry.processor(sizes))
        processor.save_pretrained(temporary)
        config = transformers.AutoConfig.for_model(
            entry.model_type, **entry.config(sizes, tokenizer.convert_tokens_to_ids)
        )
        text_config = config.get_text_config()
        text_config.vocab_size = len(tokenizer)
        text_config.tie_word_embeddings = config.tie_word_embeddings  # transformers 4 looks there
        for name in ("bos", "eos", "pad"):
            setattr(text_config, f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        _draw_weights(model)
        model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(list(chat.ends))
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.save_pretrained(temporary)
    return directory


def _draw_weights(model) -> None:
    """Weights under which images, positions and words all move the logits: the classes' own start is next to zero.

    Matrices keep the size of what they are given, vectors (norms, biases) stay near to what the class sets.
    """
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


def _tokenizer(chat: ChatFormat, texts: Iterable[str], processor_class: type):
    """A byte-level BPE trained on `texts` and the template's words, with the special tokens of `chat`."""
    import tokenizers
    import transformers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    special = dict.fromkeys(filter(None, [chat.pad, chat.bos, chat.eos, *chat.special, *chat.named.values()]))
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([*texts, *chat.words], trainer)
    if chat.adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{chat.bos} $A",
            pair=f"{chat.bos} $A $B:1",
            special_tokens=[(chat.bos, backend.token_to_id(chat.bos))],
        )
    # Under transformers 4 some processors take only a tokenizer of the class that they name.
    name = getattr(processor_class, "tokenizer_class", "AutoTokenizer")
    name = "PreTrainedTokenizerFast" if name == "AutoTokenizer" else name[-1]
    return getattr(transformers, name)(
        tokenizer_object=backend,
        bos_token=chat.bos,
        eos_token=chat.eos,
        pad_token=chat.pad,
        extra_special_tokens=chat.named,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=2048,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def main() -> None:
    """`python -m vitask_plugin.hf.tiny`: a tiny model of one family for one task, to try things out with."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--family", required=True, choices=(*FAMILIES, *OTHERS), help="kind of model")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    add_task(parser)
    parser.add_argument("--seed", type=int, action=SEED, default=0, metavar="N", help="of the weights (default 0)")
    width = "of the decoder and of the vision tower, a multiple of 64 (default 64)"
    parser.add_argument("--hidden-size", type=int, action=COUNT, default=64, metavar="D", help=width)
    args = parser.parse_args()
    try:
        how = {"family": args.family, "seed": args.seed, "hidden_size": args.hidden_size}
        make_tiny(args.out, texts=texts_of(args), **how)
    except VITaskError as error:
        raise SystemExit(f"vitask: error: {error}") from None


if __name__ == "__main__":
    main()
