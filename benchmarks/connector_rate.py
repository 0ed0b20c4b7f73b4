"""Which learning rate the connector needs in stage 1, and how many steps: validation figures of a tiny LLaVA.

    python benchmarks/connector_rate.py [--rates 0 1e-4 ...] [--steps 120 240 ...] [--seed 0] [--out connector-rate]

A tiny LLaVA first learns how the task's answers are worded, by upstream's vanilla tuning, as a released LLaVA knows
words; its images it still tells apart poorly. From there stage 1 runs at LLaVA's own rates, full tuning at 2e-5 and
LoRA at 2e-4, with each rate of the connector, then at the default rate for other numbers of steps. Judged on the
validation split, with the exemplar: the loss of the answer, and the share of images whose whole answer greedy decoding
gets right. No test image is read. Four minutes on one core; appends one line to `results/connector_rate.jsonl`.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from measuring import append_line, end_with_a_sentence, machine
from rich.console import Console
from rich.table import Table

from vitask_plugin import cli
from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.data.contents import survey
from vitask_plugin.data.drawn import DRAWN_SIZES, draw_dataset, task_texts
from vitask_plugin.data.instructions import DRAWN
from vitask_plugin.errors import VITaskError
from vitask_plugin.llava import compat, loading
from vitask_plugin.llava.tiny import make_tiny_llava
from vitask_plugin.training.exemplars import Exemplars
from vitask_plugin.tsm.features import FeatureStore

DEFAULT = VITaskArguments.vitask_connector_lr
RATES = (0.0, 1e-4, 3e-4, 1e-3, 3e-3)  # 0 = the run's own
STEPS = (120, 240, 60, 30, 15)
BATCH = 16
# LLaVA's scripts: finetune.sh, and finetune_lora.sh.
TUNING = {
    "full": ["--learning_rate", "2e-5"],
    "LoRA": [
        *("--learning_rate", "2e-4", "--mm_projector_lr", "2e-5"),
        *("--lora_enable", "True", "--lora_r", "128", "--lora_alpha", "256"),
    ],
}


class Bench:
    """The data, the TSM, its features and the tiny LLaVA, all made in `out`."""

    def __init__(self, out: Path, *, seed: int, sizes: dict[str, int], tsm_epochs: int, first_steps: int) -> None:
        self.out, self.seed = out, seed
        draw_dataset(out / "drawn.npz", seed=seed, sizes=sizes)
        os.environ["MEDMNIST_ROOT"] = str(out)
        _vitask("data", "medmnist", "--task", DRAWN.flag, "--out", out / "data", "--allow-duplicates")
        self.tiny = make_tiny_llava(out / "tiny-llava", texts=task_texts(DRAWN), seed=seed)
        self.images = out / "data/images"
        files = {split: out / f"data/{split}.json" for split in ("train", "val")}
        common = ("--image-folder", self.images, "--device", "cpu")
        how = ("--arch", "resnet10t", "--image-size", 28, "--epochs", tsm_epochs, "--lr", 2e-3, "--seed", seed)
        _vitask("tsm", "train", "--data", files["train"], "--val", files["val"], *common, *how, "--out", out / "tsm")
        for split, file in files.items():
            _vitask("tsm", "extract", "--tsm", out / "tsm", "--data", file, *common, "--out", out / f"features-{split}")
        start = ["--pretrain_mm_mlp_adapter", self.tiny.projector, "--learning_rate", "1e-3"]
        self.worded = self._train("llava-worded", self.tiny.base, first_steps, start)

    def stage_1(self, tuning: str, rate: float, steps: int) -> dict[str, float]:
        """Runs stage 1; the connector's figures on the validation split."""
        features = ["--vitask_tsm", self.out / "tsm", "--vitask_features", self.out / "features-train"]
        flags = [*TUNING[tuning], "--vitask", "True", *features, "--vitask_connector_lr", rate]
        trained = self._train("llava-stage1", self.worded, steps, flags)
        loaded = loading.load(trained, self.worded if tuning == "LoRA" else None)
        shutil.rmtree(trained)
        return self._judge(loaded)

    def _train(self, name: str, start: Path, steps: int, flags: Sequence[object]) -> Path:
        """Upstream's `train()`, from the model in `start` to the folder `name`."""
        from llava.train.train import train

        from vitask_plugin.llava.install import wrap

        output = self.out / name
        command = [
            *("--model_name_or_path", start, "--version", "v1", "--output_dir", output, "--report_to", "none"),
            *("--data_path", self.out / "data/train.json", "--image_folder", self.images),
            *("--vision_tower", self.tiny.tower, "--mm_projector_type", "mlp2x_gelu", "--mm_vision_select_layer", -2),
            *("--mm_use_im_start_end", False, "--mm_use_im_patch_token", False, "--model_max_length", 1024),
            *("--use_cpu", True, "--bf16", False, "--max_steps", steps, "--per_device_train_batch_size", BATCH),
            *("--lr_scheduler_type", "cosine", "--warmup_ratio", 0.03, "--weight_decay", 0.0, "--seed", self.seed),
            *("--logging_steps", 20, "--save_strategy", "no", "--disable_tqdm", True),
            *flags,
        ]
        before, sys.argv = sys.argv, ["train.py", *map(str, command)]
        try:
            wrap(train)()
        finally:
            sys.argv = before
        return output

    @torch.no_grad()
    def _judge(self, loaded: loading.Loaded) -> dict[str, float]:
        """On val with the exemplar: `loss`, nats per response token; `accuracy`, the share of whole answers right."""
        from vitask_plugin.llava.batch import VITaskCollator, VITaskDataset

        model, tokenizer, vitask = loaded.model, loaded.tokenizer, loaded.model.vitask_arguments
        model.config.tokenizer_padding_side = tokenizer.padding_side = "right"
        tokenizer.pad_token = tokenizer.unk_token
        tokenizer.model_max_length = 1024
        how = SimpleNamespace(
            image_folder=str(self.images),
            image_processor=loaded.image_processor,
            image_aspect_ratio="square",
            is_multimodal=True,
            mm_use_im_start_end=False,
        )
        dataset = VITaskDataset(str(self.out / "data/val.json"), tokenizer, how, vitask=vitask)
        contents = survey(dataset.image_folder, dataset.images(), dataset.task_images())
        exemplars = Exemplars(vitask, dataset, contents, FeatureStore.open(self.out / "features-val"))
        image_tokens = model.get_vision_tower().num_patches
        collator = VITaskCollator(dataset, exemplars, vitask, image_tokens=image_tokens)
        loss, tokens, right = 0.0, 0, 0
        for index in range(len(dataset)):
            batch = collator([dataset[index]])
            batch["vitask"]["denominator"] = torch.tensor(1.0)
            sums = model(**batch).sums
            loss, tokens = loss + sums["ep"].item(), tokens + int(sums["ep_tokens"])
            right += int(sums["correct_ep"] == sums["ep_tokens"])  # then greedy decoding gives this very answer
        return {"loss": loss / tokens, "accuracy": right / len(dataset)}


def _vitask(*words: object) -> None:
    if status := cli.main([str(word) for word in words]):
        raise VITaskError(f"vitask {words[0]} {words[1]} ended with status {status}")


def enough_steps(by_steps: dict[int, dict[str, float]], loss: float = 0.05) -> int:
    """The fewest steps whose accuracy is at most `loss` below that of the most steps."""
    best = by_steps[max(by_steps)]["accuracy"]
    return min(steps for steps, found in by_steps.items() if found["accuracy"] >= best - loss)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--rates", type=float, nargs="+", default=list(RATES))
    add("--steps", type=int, nargs="+", default=list(STEPS), help="the first with every rate, all at the default rate")
    add("--tuning", nargs="+", choices=list(TUNING), default=list(TUNING))
    add("--seed", type=int, default=0)
    add("--images", type=int, default=DRAWN_SIZES["train"], help="in the training split")
    add("--tsm-epochs", type=int, default=5)
    add("--first-steps", type=int, default=240, help="of vanilla tuning, which teaches the words")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--out", type=Path, default=Path("connector-rate"))
    add("--json", type=Path, default=Path(__file__).parent / "results/connector_rate.jsonl")
    args = parser.parse_args(words)
    torch.set_num_threads(args.threads)
    compat.prepare()
    shutil.rmtree(args.out, ignore_errors=True)
    sizes = {**DRAWN_SIZES, "train": args.images, "test": len(DRAWN.choices)}
    out = args.out.resolve()
    bench = Bench(out, seed=args.seed, sizes=sizes, tsm_epochs=args.tsm_epochs, first_steps=args.first_steps)
    table = Table(title=f"Validation, with the exemplar; {args.steps[0]} steps of {BATCH} unless said otherwise")
    for column in ("tuning", "connector's rate", "steps"):
        table.add_column(column)
    for column in ("loss_ep", "accuracy"):
        table.add_column(column, justify="right")
    rows: list[dict[str, Any]] = []
    for tuning in args.tuning:
        runs = [(rate, args.steps[0]) for rate in args.rates] + [(DEFAULT, steps) for steps in args.steps[1:]]
        for rate, steps in runs:
            found = bench.stage_1(tuning, rate, steps)
            rows.append({"tuning": tuning, "rate": rate, "steps": steps, **found})
            named = f"{rate:g}" if rate else f"the run's ({TUNING[tuning][1]})"
            table.add_row(tuning, named, str(steps), f"{found['loss']:.3f}", f"{found['accuracy']:.3f}")
    Console().print(table)
    enough = {}
    for tuning in args.tuning:
        at_default = [row for row in rows if row["tuning"] == tuning and row["rate"] == DEFAULT]
        if at_default:
            enough[tuning] = enough_steps({row["steps"]: row for row in at_default})
            Console().print(f"{tuning}: {enough[tuning]} steps are within .05 of the most at {DEFAULT:g}")
    append_line(
        args.json,
        {
            **machine("cpu", args.threads),
            "seed": args.seed,
            "sizes": sizes,
            "batch": BATCH,
            "rows": rows,
            "enough_steps": enough,
        },
    )


if __name__ == "__main__":
    end_with_a_sentence(main)
