"""The training of one network: its epochs, the best of them by validation, and what an interrupted run goes on with.

Shapes: B = batch, S = image side, K_all = classes of all tasks side by side in the head.
"""

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from vitask_plugin.errors import VITaskError
from vitask_plugin.files import digest_of, sha256_file
from vitask_plugin.tsm.augmentation import augmentation, mirrored, mixing
from vitask_plugin.tsm.class_weights import balanced
from vitask_plugin.tsm.epoch_log import EpochLog
from vitask_plugin.tsm.joint import joint_loss
from vitask_plugin.tsm.model import preprocess
from vitask_plugin.tsm.optimization import make_optimizer, make_schedule
from vitask_plugin.tsm.processes import Processes
from vitask_plugin.tsm.progress import Progress
from vitask_plugin.tsm.samples import Batch, LabelledImage, batches, make_loader
from vitask_plugin.tsm.settings import Settings
from vitask_plugin.tsm.validation import Answers, answers, figures, joined

logger = logging.getLogger(__name__)


class Fit:
    """One network's training on some images.

    Args:
        network: on the device of `processes`. record: of the TSM, for the size and statistics of pixels and the tasks.
        folder: where the checkpoint and the log of this training lie.
        log: what each epoch is told. title: of this training, for the progress bar.

    Attributes:
        history: what is known of each epoch. best: the entry of the best one.
        stopped: finished, early or interrupted; None while it goes on.
    """

    def __init__(
        self,
        settings: Settings,
        network: nn.Module,
        record: Mapping[str, Any],
        images: Sequence[LabelledImage],
        val_images: Sequence[LabelledImage],
        processes: Processes,
        folder: Path,
        log: EpochLog,
        title: str = "TSM",
    ) -> None:
        self.settings, self.network, self.tasks, self.processes = settings, network, record["tasks"], processes
        self.device, self.log, self.title = processes.device, log, title
        pixels = {name: record[name] for name in ("image_size", "mean", "std")}
        self._preprocess, self._augment = partial(preprocess, **pixels), augmentation(settings, **pixels)
        self._order = torch.Generator().manual_seed(settings.seed)
        self._loader = self._make_loader(images, training=True)
        self._val_loader = self._make_loader(processes.share(val_images, "validation data"), training=False)
        self._mix = mixing(settings)
        weights = balanced(images, self.tasks) if settings.class_weights == "balanced" else None
        self._weights = weights and tuple(part.to(self.device) for part in weights)
        self._ema = _average(network, settings)
        self._optimizer = make_optimizer(network, settings)
        self._schedule = make_schedule(self._optimizer, settings, len(self._loader))
        self._model = processes.together(network)
        self._data = {"training data": _files_digest(images), "validation data": _files_digest(val_images)}
        self._progress = Progress(folder, _identity(settings, record, images, val_images, processes))
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        self.stopped: str | None = None
        self._best_weights: dict[str, Tensor] = {}

    def run(self, *, interruptible: bool) -> None:
        """Runs the epochs that are left and leaves the best weights in the network.

        Args:
            interruptible: an interrupt (Ctrl-C) ends the training with the best so far.

        Raises:
            VITaskError: the loss is no longer a number, or the checkpoint is another training's.
            KeyboardInterrupt: not `interruptible`, or before the first epoch was validated.
        """
        self._resume()
        if self.processes.is_main:
            self.log.begin(self.history)
        try:
            self._run_epochs()
        except BaseException as error:
            if not (isinstance(error, KeyboardInterrupt) and interruptible and self._best_weights):
                if self.processes.is_main and not self.history:
                    self._progress.drop()
                raise
            self.stopped = "interrupted"
        self.log.end()
        self.network.load_state_dict(self._best_weights)

    def answers(self) -> Answers:
        """What the network says of the validation images, in float32."""
        self.network.eval()
        return self._answers(self.network)

    def metrics(self) -> dict[str, Any]:
        """What `metrics.json` holds."""
        found = {"best": self.best, "stopped": self.stopped, "settings": self.settings.record()}
        return found | {"data": self._data, "processes": self.processes.count, "history": self.history}

    def _run_epochs(self) -> None:
        done, last = len(self.history), self.settings.epochs
        with tqdm(total=last, initial=done, desc=self.title, unit="epoch", disable=not self.processes.is_main) as bar:
            while self._goes_on():
                entry = self._epoch(len(self.history) + 1)
                bar.update()
                bar.set_postfix(val=f"{entry['val_accuracy']:.3f}", best=f"{self.best['val_accuracy']:.3f}")

    def _goes_on(self) -> bool:
        done, patience = len(self.history), self.settings.patience
        if done and patience and done - self.best["epoch"] >= patience:
            self.stopped = "early"
        elif done >= self.settings.epochs:
            self.stopped = "finished"
        return self.stopped is None

    def _epoch(self, epoch: int) -> dict[str, Any]:
        judged = self._ema.module if self._ema else self.network
        try:
            loss = self._train(epoch)
            found = self._judged(judged)
        except VITaskError:  # the same flags would only lead there again
            if self.processes.is_main:
                self._progress.drop()
            raise
        rate = max(group["lr"] for group in self._optimizer.param_groups)
        entry = {"epoch": epoch, "train_loss": loss, "lr": rate, **found}
        self.history.append(entry)
        if self.best is None or _rank(entry) > _rank(self.best):
            self.best = entry
            self._best_weights = {name: value.cpu().clone() for name, value in judged.state_dict().items()}
        logger.info("TSM %s", entry)
        self._keep()
        if self.processes.is_main:
            self.log.add(entry)
        return entry

    def _train(self, epoch: int) -> float:
        """One pass over the training images; the mean loss, of all processes."""
        self.network.train()
        self._model.train()
        total, count = 0.0, 0
        steps = (epoch - 1) * len(self._loader)
        reduced = torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16")
        for step, batch in enumerate(batches(self._loader, self.device, f"epoch {epoch}"), start=steps):
            batch = self._changed(batch, step)
            self._schedule(step)
            with reduced:
                logits = self._model(batch.pixels)
            loss = joint_loss(
                logits, batch.targets, batch.task, self.tasks, smoothing=self.settings.smoothing, weights=self._weights
            ).mean()
            if not math.isfinite(loss.item()):
                raise VITaskError(f"the TSM's loss is {loss.item()} in epoch {epoch}; lower --lr")
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()
            if self._ema:
                self._ema.update(self.network, step=step + 1)
            total, count = total + loss.item() * len(batch.task), count + len(batch.task)
        self.processes.share_buffers(self.network, *([self._ema.module] if self._ema else []))
        sums = self.processes.gathered((total, count))
        return sum(one for one, _ in sums) / sum(one for _, one in sums)

    def _changed(self, batch: Batch, step: int) -> Batch:
        # On the batch, not in the workers: what is drawn does not depend on how many workers there are.
        batch = replace(batch, pixels=mirrored(batch.pixels, self.settings.flips))
        if self._mix is None:
            return batch
        drawn = np.random.SeedSequence([self.settings.seed, step, self.processes.index]).generate_state(1)
        return self._mix(batch, int(drawn[0]))

    def _judged(self, network: nn.Module) -> dict[str, Any]:
        network.eval()
        return figures(self._answers(network), self.tasks)

    def _answers(self, network: nn.Module) -> Answers:
        return joined(self.processes.gathered(answers(network, self._val_loader, self.tasks, self.device)))

    def _make_loader(self, images: Sequence[LabelledImage], *, training: bool) -> DataLoader:
        return make_loader(
            images,
            self.tasks,
            self._preprocess,
            training=training,
            batch_size=self.settings.batch_size,
            workers=self.settings.workers,
            seed=self.settings.seed,
            augment=self._augment if training else None,
            order=self._order,
            share=(self.processes.index, self.processes.count) if training else (0, 1),
        )

    def _keep(self) -> None:
        drawn = self.processes.gathered(_random_state(self.device))
        if self.processes.is_main:
            self._progress.write(
                {
                    "network": self.network.state_dict(),
                    "optimizer": self._optimizer.state_dict(),
                    "ema": self._ema and self._ema.module.state_dict(),
                    "best": self.best,
                    "best_weights": self._best_weights,
                    "history": self.history,
                    "random": drawn,
                    "order": self._order.get_state(),
                }
            )

    def _resume(self) -> None:
        state = self._progress.read()
        if state is None:
            self._differ()
            return
        self.network.load_state_dict(state["network"])
        self._optimizer.load_state_dict(state["optimizer"])
        if self._ema:
            self._ema.module.load_state_dict(state["ema"])
        self.history, self.best, self._best_weights = state["history"], state["best"], state["best_weights"]
        self._order.set_state(state["order"])
        _set_random_state(state["random"][self.processes.index], self.device)
        if self.processes.is_main:
            tqdm.write(f"{self.title}: goes on after epoch {len(self.history)} of {self.settings.epochs}")

    def _differ(self) -> None:
        """Other processes than the first draw other flips and dropout than it does."""
        if self.processes.index:
            torch.manual_seed(self.settings.seed + self.processes.index)


def _average(network: nn.Module, settings: Settings) -> Any:
    if not settings.model_ema:
        return None
    from timm.utils import ModelEmaV3

    return ModelEmaV3(network, decay=settings.model_ema_decay, use_warmup=settings.model_ema_warmup)


def _rank(entry: Mapping[str, Any]) -> tuple[float, float]:
    return entry["val_accuracy"], -entry["val_loss"]


def _identity(
    settings: Settings,
    record: Mapping[str, Any],
    images: Sequence[LabelledImage],
    val_images: Sequence[LabelledImage],
    processes: Processes,
) -> dict[str, Any]:
    """What has to be the same for a training to go on."""
    return {
        "flags": settings.decisive(),
        "training data": _digest(images),
        "validation data": _digest(val_images),
        "weights to start from": _start(settings, record),
        "number of processes": processes.count,
    }


def _start(settings: Settings, record: Mapping[str, Any]) -> str | None:
    """Hash of the weights that --init or the file of --pretrained holds, whatever their place; None without either."""
    if "init" in record:
        return record["init"][0]
    given = settings.pretrained
    return sha256_file(given) if isinstance(given, str) and os.path.isfile(given) else None


def _digest(images: Sequence[LabelledImage]) -> str:
    return digest_of([[str(image.path), image.path.stat().st_size, image.block] for image in images])


def _files_digest(images: Sequence[LabelledImage]) -> str:
    """Of the data files' content, wherever they lie."""
    return digest_of(sorted(sha256_file(path) for path in {image.source for image in images}))


def _random_state(device: torch.device) -> dict[str, Tensor]:
    found = {"cpu": torch.get_rng_state()}
    return found | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
