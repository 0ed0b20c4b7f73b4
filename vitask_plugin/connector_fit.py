"""`vitask connector fit`: another TSM for a tuned VLM whose own TSM is gone; the host is the checkpoint's, see
`training/fit.py`."""

import argparse
from dataclasses import fields

from tqdm import tqdm

from vitask_plugin.arguments import CONNECTOR_KINDS
from vitask_plugin.options import COUNT, COUNT_OR_NONE, POSITIVE, SEED
from vitask_plugin.record.host import host_of
from vitask_plugin.training.fit import DTYPES, FitHost, FitSettings, fit
from vitask_plugin.tsm.trust import add_flag


def host_for(checkpoint: str) -> FitHost:
    """The host of a checkpoint; only its own modules are imported."""
    if host_of(checkpoint) == "hf":
        from vitask_plugin.hf.fit import HfFit

        return HfFit()
    from vitask_plugin.llava.fit import LlavaFit

    return LlavaFit()


def configure(parser: argparse.ArgumentParser) -> None:
    add, default = parser.add_argument, FitSettings
    add("--checkpoint", required=True, metavar="DIR", help="the tuned VLM: a VITask checkpoint; it is only read")
    add("--model-base", metavar="DIR", help="the model a LoRA checkpoint was trained from")
    add("--tsm", required=True, metavar="DIR", help="the new TSM")
    add("--data", required=True, metavar="JSON", help="LLaVA JSON to fit on")
    add("--image-folder", required=True, metavar="DIR", help="folder the image paths are relative to")
    add("--out", required=True, metavar="DIR", help="folder to write: for connector=DIR in lmms-eval's --model_args")
    add("--features", metavar="DIR", help="the new TSM's features (default: extracted first, and not kept)")
    shape = f"its shape (default {default.connector})"
    add("--connector", choices=CONNECTOR_KINDS, default=default.connector, help=shape)
    count = {"type": int, "metavar": "N"}
    steps = f"of the optimizer, whatever the data's size (default {default.steps})"
    add("--steps", action=COUNT, default=default.steps, help=steps, **count)
    batch = f"samples per step (default {default.batch_size})"
    add("--batch-size", action=COUNT, default=default.batch_size, help=batch, **count)
    rate = {"type": float, "action": POSITIVE, "metavar": "X"}
    add("--learning-rate", default=default.learning_rate, help="of AdamW, cosine (default 1e-3)", **rate)
    add("--gradient-checkpointing", action="store_true", help="less memory, about a third more time")
    workers = f"processes that read images (default {default.workers})"
    add("--workers", action=COUNT_OR_NONE, default=default.workers, help=workers, **count)
    add("--seed", action=SEED, default=default.seed, help=f"of weights and order (default {default.seed})", **count)
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="of the VLM (default: bfloat16 on a GPU)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="CUDA_VISIBLE_DEVICES chooses the GPU")
    add_flag(parser)
    add("--any-image-size", action="store_true", help="go on if the images are unlike those of training")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    settings = FitSettings(**{field.name: getattr(args, field.name) for field in fields(FitSettings)})
    fitted = fit(settings, host_for(settings.checkpoint))
    tqdm.write(
        f"connector fitted in {fitted['steps']} steps on {fitted['samples']} samples: response tokens right "
        f"{fitted['response_accuracy_ep']:.3f} with the new exemplar, {fitted['response_accuracy']:.3f} without; "
        f"evaluate with pretrained={args.checkpoint},connector={args.out},tsm={args.tsm}"
    )
