"""`vitask connector fit`: another TSM for a tuned VLM whose own TSM is gone, by training a new connector alone.

While the old TSM (or its features) is there, `vitask connector align` is better: it takes seconds, no labels and no
GPU. Without it, the new TSM needs a connector of its own: the VLM is frozen, and the connector learns by L_EP alone
(equation 2; the vanilla term of the logged loss has no gradient here). Written are the connector and `vitask.json`,
which names the checkpoint; the checkpoint itself is only read.
"""

import argparse
import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tqdm import tqdm

from vitask_plugin.arguments import CONNECTOR_KINDS, VITaskArguments
from vitask_plugin.data.comparison import Seen, check_all
from vitask_plugin.data.names import same_names
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import atomic_directory, check_folder, check_replaceable
from vitask_plugin.llava import compat, flags, loading
from vitask_plugin.options import COUNT, COUNT_OR_NONE, POSITIVE, SEED
from vitask_plugin.record import checkpoint
from vitask_plugin.tsm.device import as_device, is_out_of_memory
from vitask_plugin.tsm.model import read_tsm_record, trained_on
from vitask_plugin.tsm.trust import add_flag

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WARMUP = 0.03  # share of the steps, as in LLaVA's scripts


def fit(
    path: str | Path,
    tsm: str | Path,
    data: str | Path,
    image_folder: str | Path,
    output: str | Path,
    *,
    base: str | Path | None = None,
    features: str | Path | None = None,
    kind: str = "mlp2x_gelu",
    steps: int = 400,
    batch_size: int = 16,
    learning_rate: float = 1e-3,
    gradient_checkpointing: bool = False,
    workers: int = 0,
    seed: int = 42,
    dtype: str = "auto",
    device: str = "auto",
    trust_code: bool = False,
    any_image_size: bool = False,
) -> dict[str, Any]:
    """Fits a connector from the features of `tsm` to the VLM in `path` and writes it to `output`.

    Args:
        path: a VITask checkpoint that was trained with exemplars. base: the model it was trained from, with LoRA.
        data: LLaVA JSON. image_folder: what its image paths are relative to.
        features: of `tsm` on these images; None = extracted first, and not kept.
        steps: of the optimizer, whatever the size of the data. learning_rate: LLaVA's for a new projector.
        dtype: of the frozen VLM; auto = bfloat16 on a GPU, else float32. The connector is float32.
        trust_code: see `TSM.load`.
        any_image_size: go on if the images are of another size, or prepared in another way, than those of training.

    Returns:
        What `vitask.json` says of the fit.

    Raises:
        VITaskError: a checkpoint without a connector, data of other labels, and as `VITaskTrainer`. Nothing is left
            behind, and what was in `output` stays.
    """
    check_replaceable(output, (checkpoint.RECORD_FILE, checkpoint.CONNECTOR_FILE))
    check_folder(path, "checkpoint")
    record = _record(path)
    target = as_device(device)
    name = dtype if dtype != "auto" else "bfloat16" if target.type == "cuda" else "float32"
    vitask = VITaskArguments(
        vitask=True,
        vitask_tsm=str(tsm),
        vitask_trust_tsm_code=trust_code,
        vitask_features=features and str(features),
        vitask_ep=record["ep"],
        vitask_connector=kind,
        vitask_connector_lr=0.0,  # that of the run, which trains nothing else
        vitask_rda_weight=0.0,
    )
    compat.prepare()
    from transformers import set_seed

    set_seed(seed)
    loaded = loading.load(path, base, dtype=DTYPES[name])
    flags.one_view(vars(loaded.model.config), path)
    loaded.model.requires_grad_(False)
    with atomic_directory(output) as directory, _template(record["version"]):
        dataset, collator = _data(loaded, vitask, data, image_folder)
        _check_labels(path, record, data, dataset.tasks)
        if any_image_size:
            dataset.seen = Seen(dataset.seen.who, None)  # nor does the extraction compare them
        else:
            of_tsm = read_tsm_record(tsm)
            both = [checkpoint.trained_on(record, path), trained_on(of_tsm, str(of_tsm.get("sha256")))]
            check_all(both, dataset.seen)
        settings = {
            "max_steps": steps,
            "per_device_train_batch_size": batch_size,
            "learning_rate": learning_rate,
            "warmup_steps": int(WARMUP * steps),
            "logging_steps": max(1, steps // 20),
            "dataloader_num_workers": workers,
            "seed": seed,
            "bf16": name == "bfloat16",
            "use_cpu": target.type == "cpu",
        }
        if gradient_checkpointing:
            settings |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
        trainer = _trainer(loaded.model, vitask, record["version"], dataset, collator, directory / "run", settings)
        try:
            trainer.train()
        except VITaskError as error:
            if error.__cause__ is None or not is_out_of_memory(error.__cause__):
                raise
            raise VITaskError(
                f"out of memory with --batch-size {batch_size}; use a smaller one, or --gradient-checkpointing"
            ) from error
        connector = loaded.model.vitask_connector
        last = next(entry for entry in reversed(trainer.state.log_history) if "loss_ep" in entry)
        fitted = {
            "checkpoint": str(path),
            "identity": checkpoint.identity(path),
            "tsm": record["tsm"]["hash"],
            "samples": len(dataset),
            "steps": trainer.state.global_step,
            **{key: last[key] for key in ("loss_ep", "response_accuracy_ep", "response_accuracy")},
        }
        shutil.rmtree(directory / "run")
        checkpoint.save_connector(connector, connector.state_dict(), directory)
        identity = {"hash": dataset.features.tsm_hash, "width": dataset.features.width}
        checkpoint.save_record(directory, vitask, connector, identity, dataset.tasks, record["version"], fitted)
    return fitted


def _record(path: str | Path) -> dict[str, Any]:
    record = checkpoint.read_record(path)
    if record is None or record["connector"] is None or record["tsm"] is None:
        found = "no vitask.json" if record is None else f"--vitask_ep {record['ep']}"
        raise VITaskError(
            f"checkpoint {str(path)!r} has {found}, so no TSM's features were ever given to it; fit a connector to a "
            "checkpoint that was trained with --vitask_ep cls, all or replace"
        )
    return record


def _check_labels(path: str | Path, record: dict[str, Any], data: str | Path, tasks: dict[str, dict[str, Any]]) -> None:
    for task, entry in tasks.items():
        known = record["tasks"].get(task, entry["choices"])
        if not same_names(entry["choices"], known):
            raise VITaskError(
                f"data file {str(data)!r} has the labels {entry['choices']!r} for task {task!r}, but checkpoint "
                f"{str(path)!r} was trained on {known!r}; use data with those labels, or name the task otherwise"
            )


@contextlib.contextmanager
def _template(version: str) -> Iterator[None]:
    """The conversation template of the training run, where upstream's dataset looks for it."""
    from llava import conversation

    before = conversation.default_conversation
    # As in upstream's script: these keep the default, what is unknown is vicuna_v1.
    if version not in ("v0", "v0.5"):
        known = conversation.conv_templates
        conversation.default_conversation = known.get(version, known["vicuna_v1"])
    try:
        yield
    finally:
        conversation.default_conversation = before


def _data(loaded: loading.Loaded, vitask: VITaskArguments, data: str | Path, image_folder: str | Path) -> Any:
    """The data set and its collator, as in the checkpoint's own training."""
    from vitask_plugin.llava.batch import VITaskCollator, VITaskDataset

    config, tokenizer = loaded.model.config, loaded.tokenizer
    config.tokenizer_padding_side = tokenizer.padding_side = "right"
    config.use_cache = False
    tokenizer.model_max_length = config.tokenizer_model_max_length
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token
    how = SimpleNamespace(
        image_folder=str(image_folder),
        image_processor=loaded.image_processor,
        image_aspect_ratio=config.image_aspect_ratio,
        is_multimodal=True,
        mm_use_im_start_end=config.mm_use_im_start_end,
    )
    return VITaskDataset(str(data), tokenizer, how, vitask=vitask), VITaskCollator(tokenizer, vitask=vitask)


def _trainer(
    model: Any,
    vitask: VITaskArguments,
    version: str,
    dataset: Any,
    collator: Any,
    directory: Path,
    settings: dict[str, Any],
) -> Any:
    from llava.train.train import TrainingArguments

    from vitask_plugin.llava.trainer import VITaskTrainer

    arguments = TrainingArguments(
        output_dir=str(directory),
        lr_scheduler_type="cosine",
        save_strategy="no",
        report_to="none",
        **settings,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one process, one GPU: the first that is visible
    return VITaskTrainer(
        model=model, args=arguments, train_dataset=dataset, data_collator=collator, vitask=vitask, version=version
    )


def configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="the tuned VLM: a VITask checkpoint; it is only read")
    add("--model-base", metavar="DIR", help="the model a LoRA checkpoint was trained from")
    add("--tsm", required=True, metavar="DIR", help="the new TSM")
    add("--data", required=True, metavar="JSON", help="LLaVA JSON to fit on")
    add("--image-folder", required=True, metavar="DIR", help="folder the image paths are relative to")
    add("--out", required=True, metavar="DIR", help="folder to write: for connector=DIR in lmms-eval's --model_args")
    add("--features", metavar="DIR", help="the new TSM's features (default: extracted first, and not kept)")
    add("--connector", choices=CONNECTOR_KINDS, default="mlp2x_gelu", help="its shape (default mlp2x_gelu)")
    add(
        "--steps",
        type=int,
        action=COUNT,
        default=400,
        metavar="N",
        help="of the optimizer, whatever the data's size (default 400)",
    )
    add("--batch-size", type=int, action=COUNT, default=16, metavar="N", help="samples per step (default 16)")
    add(
        "--learning-rate",
        type=float,
        action=POSITIVE,
        default=1e-3,
        metavar="X",
        help="of AdamW, cosine (default 1e-3)",
    )
    add("--gradient-checkpointing", action="store_true", help="less memory, about a third more time")
    add(
        "--workers",
        type=int,
        action=COUNT_OR_NONE,
        default=0,
        metavar="N",
        help="processes that read images (default 0)",
    )
    add("--seed", type=int, action=SEED, default=42, metavar="N", help="of weights and order (default 42)")
    add("--dtype", choices=("auto", *DTYPES), default="auto", help="of the VLM (default: bfloat16 on a GPU)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="CUDA_VISIBLE_DEVICES chooses the GPU")
    add_flag(parser)
    add("--any-image-size", action="store_true", help="go on if the images are unlike those of training")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    fitted = fit(
        args.checkpoint,
        args.tsm,
        args.data,
        args.image_folder,
        args.out,
        base=args.model_base,
        features=args.features,
        kind=args.connector,
        steps=args.steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        gradient_checkpointing=args.gradient_checkpointing,
        workers=args.workers,
        seed=args.seed,
        dtype=args.dtype,
        device=args.device,
        trust_code=args.trust_tsm_code,
        any_image_size=args.any_image_size,
    )
    tqdm.write(
        f"connector fitted in {fitted['steps']} steps on {fitted['samples']} samples: response tokens right "
        f"{fitted['response_accuracy_ep']:.3f} with the new exemplar, {fitted['response_accuracy']:.3f} without; "
        f"evaluate with pretrained={args.checkpoint},connector={args.out},tsm={args.tsm}"
    )
