"""`vitask merge`: an adapter and the model it was trained from become whole weights, in the checkpoint's own format.

OUT/
    what a full training run of that host writes: weights, configuration, tokenizer, processor
    vitask_connector.safetensors, vitask.json  of a VITask checkpoint
    vitask_merge.json                      where it comes from
"""

import argparse
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vitask_plugin.errors import VITaskError
from vitask_plugin.files import atomic_directory, check_folder, write_json
from vitask_plugin.model_folder import ADAPTER_CONFIG_FILE, check_output
from vitask_plugin.record import checkpoint
from vitask_plugin.record.carried import carry
from vitask_plugin.record.host import host_of

MARK_FILE = "vitask_merge.json"


def merge(path: str | Path, output: str | Path, base: str | Path | None = None) -> dict[str, Any]:
    """Writes `output`; the sum is taken in float32 and rounded once, to the dtype of the base.

    Args:
        path: output of a LoRA run of LLaVA 1.2.2, or a PEFT adapter of any `AutoModelForImageTextToText`.
        base: the model it was trained from; of a PEFT adapter by default the one that its configuration names.

    Returns:
        What `vitask_merge.json` says.

    Raises:
        VITaskError: no adapter, no base, or one that the adapter does not fit. Nothing is left behind then.
    """
    path = Path(path)
    check_output(output, MARK_FILE)
    check_folder(path, "checkpoint")
    if not (path / ADAPTER_CONFIG_FILE).is_file():
        raise VITaskError(
            f"{str(path)!r} holds no adapter ({ADAPTER_CONFIG_FILE}), so there is nothing to merge; its weights are "
            "whole already, or this is not the folder that a LoRA run wrote"
        )
    if host_of(path) == "llava":
        from vitask_plugin.llava import merge as host
    else:
        from vitask_plugin.hf import merge as host
    with atomic_directory(output) as directory:
        used = host.merge(path, base, directory)
        carry(path, directory)
        result = {"checkpoint": str(path), "model_base": used, "versions": checkpoint.versions()}
        write_json(directory / MARK_FILE, result)
    return result


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", help="output of a LoRA run, of LLaVA or of an HF model (a PEFT adapter)")
    add("out", metavar="OUT", help="folder to write; upstream LLaVA goes by its name, which should contain 'llava'")
    add("--model-base", metavar="BASE", help="the model it was trained from (of HF models: default as recorded)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    done = merge(args.checkpoint, args.out, args.model_base)
    tqdm.write(f"merged {args.checkpoint} into {done['model_base']}, as {args.out}")
