"""Fitting a new connector to a tuned VLM whose own TSM is gone, whatever the host: `vitask connector fit`.

While the old TSM (or its features) is there, `vitask connector align` is better: it takes seconds, no labels and no
GPU. Without it, the new TSM needs a connector of its own: the VLM is frozen, and the connector learns by L_EP alone
(equation 2; the vanilla term of the logged loss has no gradient here). Written are the connector and `vitask.json`,
which names the checkpoint; the checkpoint itself is only read.
"""

import contextlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vitask_plugin import model_folder
from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.data.comparison import check_all
from vitask_plugin.data.names import same_names
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import atomic_directory, check_folder, check_replaceable
from vitask_plugin.record import checkpoint, connector_file
from vitask_plugin.training.samples import TaskSamples
from vitask_plugin.tsm.device import as_device, is_out_of_memory
from vitask_plugin.tsm.model import read_tsm_record, trained_on

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WARMUP = 0.03  # share of the steps, as in LLaVA's scripts


@dataclass(frozen=True)
class FitSettings:
    """What is fitted to what, and how. A field is the command's flag of that name.

    Attributes:
        checkpoint: a VITask checkpoint that was trained with exemplars. model_base: what it was trained from, with
            LoRA.
        tsm: the new TSM. features: its own on these images; None = extracted first, and not kept.
        data: LLaVA JSON. image_folder: what its image paths are relative to.
        out: folder to write. connector: its shape.
        steps: of the optimizer, whatever the size of the data. learning_rate: LLaVA's for a new projector.
        dtype: of the frozen VLM; auto = bfloat16 on a GPU, else float32. The connector is float32.
        trust_tsm_code: see `TSM.load`.
        any_image_size: go on if the images are of another size, or prepared in another way, than those of training.
    """

    checkpoint: str
    tsm: str
    data: str
    image_folder: str
    out: str
    model_base: str | None = None
    features: str | None = None
    connector: str = "mlp2x_gelu"
    steps: int = 400
    batch_size: int = 16
    learning_rate: float = 1e-3
    gradient_checkpointing: bool = False
    workers: int = 0
    seed: int = 42
    dtype: str = "auto"
    device: str = "auto"
    trust_tsm_code: bool = False
    any_image_size: bool = False

    def dtype_on(self, device: torch.device) -> str:
        return self.dtype if self.dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"

    def vitask(self, ep: str) -> VITaskArguments:
        """The flags of the run. `ep`: of the checkpoint."""
        return VITaskArguments(
            vitask=True,
            vitask_tsm=self.tsm,
            vitask_trust_tsm_code=self.trust_tsm_code,
            vitask_features=self.features,
            vitask_ep=ep,
            vitask_connector=self.connector,
            vitask_connector_lr=0.0,  # that of the run, which trains nothing else
            vitask_rda_weight=0.0,
        )

    def training(self, device: torch.device, output_dir: Path) -> dict[str, Any]:
        """transformers' training arguments."""
        own = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
        return {
            "output_dir": str(output_dir),
            "lr_scheduler_type": "cosine",
            "save_strategy": "no",
            "report_to": "none",
            "max_steps": self.steps,
            "per_device_train_batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "warmup_steps": int(WARMUP * self.steps),
            "logging_steps": max(1, self.steps // 20),
            "dataloader_num_workers": self.workers,
            "seed": self.seed,
            "bf16": self.dtype_on(device) == "bfloat16",
            "use_cpu": device.type == "cpu",
            **(own if self.gradient_checkpointing else {}),
        }


class FitHost:
    """What fitting asks of a host.

    Attributes:
        arguments, trainer: classes of the host, of transformers' training arguments and with `VITaskTraining`; asked
            for after `prepare`.
    """

    arguments: type
    trainer: type

    def prepare(self) -> None:
        """Imports the host's code base, and makes its workarounds."""

    def load(self, path: str, base: str | None, dtype: torch.dtype) -> Any:
        """The checkpoint, its VLM as `.model`."""
        raise NotImplementedError

    def speaking(self, version: str) -> contextlib.AbstractContextManager:
        """In the block conversations are written as in the run that `vitask.json` says the version of."""
        return contextlib.nullcontext()

    def data(self, loaded: Any, vitask: VITaskArguments, data: str, image_folder: str) -> TaskSamples:
        """The data set, as in the checkpoint's own training."""
        raise NotImplementedError


def fit(settings: FitSettings, host: FitHost) -> dict[str, Any]:
    """Fits a connector from the features of a TSM to a VLM, and writes it.

    Returns:
        What `vitask.json` says of the fit.

    Raises:
        VITaskError: a checkpoint without a connector, data of other labels, and as `VITaskTraining`. Nothing is left
            behind, and what was in `out` stays.
    """
    path, output = settings.checkpoint, settings.out
    check_replaceable(output, (checkpoint.RECORD_FILE, model_folder.CONNECTOR_FILE))
    check_folder(path, "checkpoint")
    record = _record(path)
    device, version = as_device(settings.device), record["version"]
    vitask = settings.vitask(record["ep"])
    host.prepare()
    from transformers import set_seed

    set_seed(settings.seed)
    loaded = host.load(path, settings.model_base, DTYPES[settings.dtype_on(device)])
    loaded.model.requires_grad_(False)
    with atomic_directory(output) as directory, host.speaking(version):
        dataset = host.data(loaded, vitask, settings.data, settings.image_folder)
        _check_labels(path, record, settings.data, dataset.tasks)
        _check_images(settings, record, dataset)
        arguments = host.arguments(**settings.training(device, directory / "run"))
        arguments._n_gpu = min(arguments.n_gpu, 1)  # one process, one GPU: the first that is visible
        trainer = host.trainer(
            model=loaded.model, args=arguments, train_dataset=dataset, vitask=vitask, version=version
        )
        try:
            trainer.train()
        except VITaskError as error:
            if error.__cause__ is None or not is_out_of_memory(error.__cause__):
                raise
            raise VITaskError(
                f"out of memory with --batch-size {settings.batch_size}; use a smaller one, or --gradient-checkpointing"
            ) from error
        connector = loaded.model.vitask_connector
        last = next(entry for entry in reversed(trainer.state.log_history) if "loss_ep" in entry)
        fitted = {
            "checkpoint": path,
            "identity": checkpoint.identity(path),
            "tsm": record["tsm"]["hash"],
            "samples": len(dataset),
            "steps": trainer.state.global_step,
            **{key: last[key] for key in ("loss_ep", "response_accuracy_ep", "response_accuracy")},
        }
        shutil.rmtree(directory / "run")
        connector_file.save_connector(connector, connector.state_dict(), directory)
        features = trainer.exemplars.features
        identity = {"hash": features.tsm_hash, "width": features.width}
        checkpoint.save_record(directory, trainer.vitask, connector, identity, dataset.tasks, version, fitted)
    return fitted


def _record(path: str) -> dict[str, Any]:
    record = checkpoint.read_record(path)
    if record is None or record["connector"] is None or record["tsm"] is None:
        found = "no vitask.json" if record is None else f"--vitask_ep {record['ep']}"
        raise VITaskError(
            f"checkpoint {path!r} has {found}, so no TSM's features were ever given to it; fit a connector to a "
            "checkpoint that was trained with --vitask_ep cls, all or replace"
        )
    return record


def _check_labels(path: str, record: dict[str, Any], data: str, tasks: dict[str, dict[str, Any]]) -> None:
    for task, entry in tasks.items():
        known = record["tasks"].get(task, entry["choices"])
        if not same_names(entry["choices"], known):
            raise VITaskError(
                f"data file {data!r} has the labels {entry['choices']!r} for task {task!r}, but checkpoint {path!r} "
                f"was trained on {known!r}; use data with those labels, or name the task otherwise"
            )


def _check_images(settings: FitSettings, record: dict[str, Any], dataset: TaskSamples) -> None:
    if settings.any_image_size:
        dataset.forget_sizes()  # nor does the extraction compare them
        return
    of_tsm = read_tsm_record(settings.tsm)
    trained = checkpoint.trained_on(record, settings.checkpoint)
    check_all([trained, trained_on(of_tsm, str(of_tsm.get("sha256")))], dataset.seen)
