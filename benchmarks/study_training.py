"""What the arms of `study.py` are made of, each by the project's own command: TSMs, their features, tuned models.

Whatever several arms share (a TSM, its features, a first stage) is made once and lies in the work folder.
"""

import json
import shutil
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from study_data import SPLITS, file_of
from study_plan import Arm, Run, Settings, digest
from study_work import command, made_once

from vitask_plugin.hf import train
from vitask_plugin.hf.arguments import TrainingArguments


@dataclass(frozen=True)
class Bench:
    """Where everything is.

    Attributes:
        work: folder of all that is made. model: that is tuned, a folder in HF format. weights: file of the TSM's start,
            None = random numbers. sources: digests of model and start.
    """

    work: Path
    model: Path
    weights: Path | None
    settings: Settings
    sources: Mapping[str, str]

    def tsm(self, data: Path, seed: int, folds: int) -> Path:
        """A TSM of a set, and with `folds` as many others that have not seen a part of the training images."""
        own, device = self.settings, _device()
        key = digest({**own.of_tsm(), "weights": self.sources.get("tsm_weights"), "folds": folds})
        out = self.work / "tsm" / f"{data.name}-{seed}-{'folds-' if folds else ''}{key}"
        with made_once(out) as missing:
            if missing:
                words = ["--arch", own.tsm_arch, "--image-size", own.tsm_image_size, "--epochs", own.tsm_epochs]
                words += ["--batch-size", own.tsm_batch, "--lr", own.tsm_lr, "--seed", seed, "--device", device]
                words += ["--folds", folds] if folds else []
                words += ["--pretrained", self.weights] if self.weights else []
                # Its early stop and its epoch are chosen on val, as a user would.
                words += ["--data", data / "train.json", "--val", data / "val.json", "--image-folder", data / "images"]
                command("tsm", "train", *words, "--allow-shared-groups", "--out", out)
        return out

    def features(self, data: Path, tsm: Path) -> Path:
        """Of the images of all splits; of training images out of fold, if the TSM has folds."""
        out = self.work / "features" / tsm.name
        with made_once(out) as missing:
            if missing:
                files = [file_of(data, split) for split in SPLITS]
                words = ["--tsm", tsm, "--image-folder", data / "images", "--device", _device(), "--out", out]
                command("tsm", "extract", "--data", *files, *words)
        return out

    def arguments(self, run: Run) -> TrainingArguments:
        """Of a peer that is trained without the host's command: as many steps, at the same rate, as vanilla has."""
        own = self.settings
        return TrainingArguments(
            output_dir=str(self.work / "peers" / run.name),
            max_steps=2 * own.steps,
            per_device_train_batch_size=own.batch,
            learning_rate=own.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, own.steps // 10),
            lora_enable=True,
            lora_r=own.lora_r,
            lora_alpha=own.lora_alpha,
            bf16=own.bf16,
            use_cpu=not torch.cuda.is_available(),
            seed=run.seed,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            label_names=[],
        )

    def vanilla(self, data: Path, run: Run, arm: Arm) -> tuple[Path, dict[str, Any]]:
        """Tuned on labels alone, in the same batches as the other arms, for as many images as both stages."""
        steps = 2 * self.settings.steps
        steps = round(steps * self.settings.compute_ratio) if arm.compute else steps
        flags = {"vitask": True, "vitask_ep": "none", **arm.first}
        return self._stage(data, run.seed, steps, flags, self.model)

    def vitask(self, data: Path, run: Run, arm: Arm) -> tuple[Path, dict[str, Any]]:
        """Both stages; the first is shared by the arms that have the same one."""
        flags: dict[str, Any] = {"vitask": True, "vitask_ep": arm.exemplar}
        if arm.exemplar != "learned":
            tsm = self.tsm(data, run.seed, self.settings.folds if arm.folds else 0)
            flags |= {"vitask_tsm": tsm, "vitask_features": self.features(data, tsm)}
        steps = self.settings.steps
        first, cost = self._stage(data, run.seed, steps, {**flags, "vitask_stage": 1, **arm.first}, self.model)
        more = {"vitask_stage": 2, "vitask_connector_path": first, **arm.second}
        second, other = self._stage(data, run.seed, steps, {**flags, **more}, self.model)
        return second, {name: {"stage1": cost[name], "stage2": other[name]} for name in cost}

    def _stage(
        self, data: Path, seed: int, steps: int, flags: Mapping[str, Any], start: Path
    ) -> tuple[Path, dict[str, Any]]:
        own = self.settings
        values = {
            "model_name_or_path": start,
            "data_path": data / "train.json",
            "image_folder": data / "images",
            "max_steps": steps,
            "per_device_train_batch_size": own.batch,
            "learning_rate": own.learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_ratio": 0.05,
            "lora_enable": True,
            "lora_r": own.lora_r,
            "lora_alpha": own.lora_alpha,
            "model_max_length": 1024,
            "bf16": own.bf16,
            "use_cpu": not torch.cuda.is_available(),
            "seed": seed,
            "logging_steps": max(1, min(10, steps // 3)),
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            **flags,
        }
        named = {name: str(value) for name, value in values.items()}
        place = digest({**named, **self.sources, "data": data.name})
        out = self.work / "tuned" / f"{data.name}-{seed}-{place}"
        with made_once(out) as missing:
            if missing:
                staging = out.with_name(f"{out.name}-staging")
                shutil.rmtree(staging, ignore_errors=True)
                words = [word for name, value in named.items() for word in (f"--{name}", value)]
                began, computed = time.monotonic(), time.process_time()
                train.train([*words, "--output_dir", str(staging)])
                spent = {"seconds": time.monotonic() - began, "cpu_seconds": time.process_time() - computed}
                history = json.loads((staging / "trainer_state.json").read_text())["log_history"]
                found = {name: round(value, 1) for name, value in spent.items()} | {"losses": _losses(history)}
                (staging / "spent.json").write_text(json.dumps(found))
                staging.rename(out)
        return out, json.loads((out / "spent.json").read_text())


def _losses(history: list[dict[str, Any]]) -> dict[str, float]:
    """The means of the last lines of the log: `loss`, and of VITask its terms."""
    logged = [one for one in history if "loss" in one][-3:]
    names = set(logged[-1]) - {"epoch", "step", "learning_rate"} if logged else ()
    return {name: round(statistics.fmean(float(one[name]) for one in logged), 4) for name in sorted(names)}


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
