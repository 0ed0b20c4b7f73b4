"""`vitask export --to hf`: a LLaVA checkpoint as transformers' own LLaVA, for whatever serves that.

OUT/
    config.json, model*.safetensors        LlavaForConditionalGeneration, vision tower included
    processor and tokenizer files          images as in training, `<image>` as a token, the template as chat template
    generation_config.json                 what ends an answer
    vitask_connector.safetensors, vitask.json  of a VITask checkpoint: for exemplars
    vitask_export.json                     where it comes from, and how far its label scores are from there

Nothing is published that does not score labels as the checkpoint does (`export_check`).
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vitask_plugin import model_folder
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import atomic_directory, check_folder, write_json
from vitask_plugin.llava import compat, loading
from vitask_plugin.model_folder import check_output, saved_dtype
from vitask_plugin.reading import model_config
from vitask_plugin.record import checkpoint
from vitask_plugin.record.carried import carry
from vitask_plugin.tsm.device import as_device, memory_error_as

MARK_FILE = "vitask_export.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_STRATEGIES = {"patch": "default", "cls_patch": "full"}


def export(
    path: str | Path,
    output: str | Path,
    base: str | Path | None = None,
    *,
    dtype: str = "auto",
    device: str = "auto",
) -> dict[str, Any]:
    """Writes `output`, a folder that stock `AutoModelForImageTextToText` and `AutoProcessor` load.

    Args:
        path: a LLaVA 1.2.2 checkpoint, of VITask or not.
        base: of a LoRA checkpoint, the folder of the model it was trained from; the adapter is merged in float32.
        dtype: of the weights written; auto = as they were saved. device: where the check runs.

    Returns:
        What `vitask_export.json` says.

    Raises:
        VITaskError: a checkpoint that transformers' LLaVA cannot hold, or an export that scores labels differently.
            Nothing is left behind then.
    """
    check_output(output, MARK_FILE)
    check_folder(path, "checkpoint")
    check_base(path, base)
    _check_holds(model_config(str(path)), path)
    target = as_device(device)
    with memory_error_as(f"out of memory on {target}, where a model is in float32 to be compared; give --device cpu"):
        return _export(Path(path), Path(output), base, dtype, target)


def check_base(path: str | Path, base: str | Path | None) -> None:
    """Refuses a LoRA checkpoint without the folder of the model it was trained from, and one for another checkpoint."""
    if base is not None:
        check_folder(base, "--model-base")
    if model_folder.has_adapter(path) == (base is not None):
        return
    if base is None:
        raise VITaskError(
            f"{str(path)!r} is a LoRA checkpoint, which holds no whole weights; name the model it was trained from "
            "with --model-base"
        )
    raise VITaskError(f"{str(path)!r} holds no adapter, so --model-base has no part in it; leave that out")


def _check_holds(config: dict[str, Any], path: str | Path) -> None:
    """Refuses what `LlavaForConditionalGeneration` has no shape for. `config`: the checkpoint's `config.json`."""
    projector = config.get("mm_projector_type", "linear")
    if "mm_vision_tower" in config and projector != "mlp2x_gelu":
        raise VITaskError(
            f"the projector of {str(path)!r} is {projector!r}, and that of transformers' LlavaForConditionalGeneration "
            "is always mlp2x_gelu; such a checkpoint cannot be exported"
        )
    ratio, merge = config.get("image_aspect_ratio") or "square", config.get("mm_patch_merge_type") or "flat"
    if ratio not in ("square", "pad") or merge != "flat":
        raise VITaskError(
            f"{str(path)!r} takes several views of an image (image_aspect_ratio {ratio}, mm_patch_merge_type {merge}), "
            "and transformers' LlavaForConditionalGeneration takes one; such a checkpoint cannot be exported"
        )


def _export(path: Path, output: Path, base: str | Path | None, dtype: str, device: torch.device) -> dict[str, Any]:
    compat.prepare()
    from llava.conversation import conv_templates

    from vitask_plugin.llava import export_check, export_files
    from vitask_plugin.llava.chat_template import chat_template
    from vitask_plugin.llava.prompting import trained_template

    written = saved_dtype(base or path) if dtype == "auto" else dtype
    loaded = loading.load(path, base)
    model, config = loaded.model, loaded.model.config
    conversation = conv_templates[trained_template((loaded.record or {}).get("version"))]
    _round(model, DTYPES[written])
    tokenizer = export_files.fast_tokenizer(base or path)
    image = tokenizer.convert_tokens_to_ids(export_files.IMAGE_TOKEN)
    start_end = getattr(config, "mm_use_im_start_end", False)
    template = chat_template(conversation, loaded.tokenizer, tokenizer, start_end=start_end)
    words = model.get_input_embeddings().num_embeddings
    rows = max(words, len(tokenizer))
    strategy = _STRATEGIES[getattr(config, "mm_vision_select_feature", "patch")]
    with atomic_directory(output) as directory:
        export_files.save_config(model, strategy, image, rows, written, directory)
        export_files.save_generation_config(tokenizer, range(words, rows), directory)
        export_files.save_processor(loaded, strategy, tokenizer, template, directory)
        export_files.save_weights(model, rows, DTYPES[written], directory)
        loaded.model = model.to(device)
        expected = export_check.checkpoint_scores(loaded, conversation, image)
        del model, loaded  # both at once may not fit
        found = export_check.exported_scores(*export_check.load_exported(directory, device), words)
        compared = export_check.compare(expected, found, path)
        carry(path, directory)
        result = {
            "checkpoint": str(path),
            "model_base": base and str(base),
            "dtype": written,
            "largest_difference": compared.difference,
            "added_probability": compared.added,
            "stop": None if conversation.sep2 else conversation.sep,
            "versions": checkpoint.versions(),
        }
        write_json(directory / MARK_FILE, result)
    return result


@torch.no_grad()
def _round(model: Any, dtype: torch.dtype) -> None:
    """The weights as they will be written, in float32 again: what the check is about is not their rounding."""
    for weight in model.parameters():
        weight.copy_(weight.to(dtype))


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", help="a LLaVA 1.2.2 checkpoint, trained with VITask or without")
    add("out", metavar="OUT", help="folder to write")
    add("--to", required=True, choices=("hf",), help="hf: LlavaForConditionalGeneration with its processor")
    add("--model-base", metavar="BASE", help="the model that a LoRA checkpoint was trained from")
    add("--dtype", default="auto", choices=("auto", *DTYPES), help="of the weights (default auto: as they were saved)")
    add("--device", default="auto", help="where the check runs: auto (default), cpu, cuda, cuda:1, ...")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    done = export(args.checkpoint, args.out, args.model_base, dtype=args.dtype, device=args.device)
    tqdm.write(
        f"exported to {args.out} in {done['dtype']}: label scores of both models differ by "
        f"{done['largest_difference']:.1e} nats at most; tokens that only the export has get a probability of "
        f"{done['added_probability']:.1e} at most"
    )
    if done["stop"]:
        tqdm.write(f"its answers end with the text {done['stop']!r}, not with a token: give that to the server as stop")
