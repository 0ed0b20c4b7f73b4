"""The flags of `vitask tsm train` that are timm's: each does what it says, and by default nothing."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import PartialState
from pictures import picture, write_task
from timm.scheduler import CosineLRScheduler
from torch import nn

from vitask_plugin.cli import main
from vitask_plugin.errors import VITaskError
from vitask_plugin.tsm.augmentation import augmentation, drawn_from, mirrored, mixing
from vitask_plugin.tsm.class_weights import balanced
from vitask_plugin.tsm.epoch_log import check_tracker
from vitask_plugin.tsm.joint import arranged, joint_loss
from vitask_plugin.tsm.model import TSM, preprocess
from vitask_plugin.tsm.optimization import check_optimizer, make_optimizer, make_schedule
from vitask_plugin.tsm.samples import Batch, LabelledImage, batches, make_loader, read_labelled
from vitask_plugin.tsm.settings import Settings, check_precision
from vitask_plugin.tsm.train import train

STATISTICS = ([0.5, 0.4, 0.3], [0.2, 0.25, 0.3])
TASKS = arranged(
    {
        "one": {"choices": ["a", "b", "c"], "multi_label": False},
        "many": {"choices": ["p", "q"], "multi_label": True},
    }
)


def settings(**changes) -> Settings:
    return Settings(**({"arch": "test_resnet", "image_size": 32, "batch_size": 8, "device": "cpu"} | changes))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for split, count in (("train", 16), ("val", 8)):
        write_task(root, "two", ["red", "green"], count, split=split)
    return root


def run(data: Path, output: Path, **changes) -> TSM:
    files = [[data / f"two-{split}.json"] for split in ("train", "val")]
    return train(settings(**({"epochs": 1} | changes)), *files, [data / "images"], output)


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_by_default_nothing_is_changed():
    assert augmentation(settings(), 32, *STATISTICS) is None and mixing(settings()) is None
    pixels, state = torch.randn(4, 3, 8, 8), torch.get_rng_state()
    assert mirrored(pixels, settings().flips) is pixels and torch.equal(torch.get_rng_state(), state)


def test_without_a_crop_the_whole_picture_is_seen_as_outside_of_the_training():
    image = picture("red", 0, 40).resize((60, 40))
    augment = augmentation(settings(color_jitter=1e-9), 32, *STATISTICS)
    assert torch.allclose(augment(image, 3), preprocess(image, 32, *STATISTICS), atol=0.05)


@pytest.mark.parametrize(
    "changes", [{"color_jitter": 0.4}, {"aa": "rand-m9-mstd0.5"}, {"scale": (0.2, 0.5)}, {"reprob": 1.0}]
)
def test_what_is_drawn_follows_from_the_number_alone(changes):
    image, augment = picture("green", 1, 48), augmentation(settings(**changes), 32, *STATISTICS)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = [augment(image, seed) for seed in range(6)]
    torch.rand(3)
    assert all(torch.equal(augment(image, seed), one) for seed, one in enumerate(first))
    assert len({one.sum().item() for one in first}) > 3 and first[0].shape == (3, 32, 32)
    torch.set_rng_state(torch_state)
    augment(image, 0)
    assert torch.equal(torch.get_rng_state(), torch_state) and (np.random.get_state()[1] == numpy_state).all()


def test_workers_do_not_change_what_is_drawn(data):
    images = read_labelled([data / "two-train.json"], [data / "images"], training=True)
    tasks = arranged({"two": {"choices": ["red", "green"], "multi_label": False}})
    augment = augmentation(settings(color_jitter=0.4, scale=(0.3, 1.0)), 32, *STATISTICS)
    seen = []
    for workers in (0, 1):
        options = {"training": True, "batch_size": 8, "workers": workers, "seed": 0, "augment": augment}
        loader = make_loader(images, tasks, None, **options)
        epochs = [torch.cat([b.pixels for b in batches(loader, torch.device("cpu"), "")]) for _ in range(2)]
        assert not torch.equal(*epochs)
        seen.append(torch.cat(epochs))
    assert torch.equal(*seen)


def test_flips_are_shares(data):
    pixels = torch.arange(3 * 8 * 8.0).reshape(1, 3, 8, 8).repeat(400, 1, 1, 1)
    with drawn_from(0):
        found = mirrored(pixels, settings(vflip=0.25).flips)
    share = (found == pixels.flip(2)).flatten(1).all(1).float().mean().item()
    assert share == pytest.approx(0.25, abs=0.05)
    assert settings(flip="both").flips == (0.5, 0.5)
    with pytest.raises(VITaskError, match="--flip both and --hflip or --vflip say the same in two ways"):
        settings(flip="both", hflip=0.1)


@pytest.mark.parametrize("changes", [{"mixup": 0.8}, {"cutmix": 1.0}])
def test_images_are_mixed_within_their_task_alone_and_targets_with_them(changes):
    task = torch.tensor([0, 0, 0, 1, 1, 0])  # of the fourth "one" nothing is left to be mixed with but the others
    values = torch.tensor([1.0, 2.0, 3.0, 10.0, 20.0, 4.0])
    pixels, targets = values[:, None, None, None].expand(6, 3, 8, 8), torch.eye(6)[:, :5]
    batch = Batch(pixels, targets, task)
    found = mixing(settings(**changes))(batch, 5)
    assert torch.equal(batch.pixels, pixels)  # the batch itself stays
    for rows, low, high in (([0, 1, 2, 5], 1, 4), ([3, 4], 10, 20)):
        own = found.pixels[rows]
        assert own.min() >= low and own.max() <= high and not torch.equal(own, pixels[rows])
        # As much of each target as of its picture: the mean of the pixels says how much.
        weights = found.targets[rows] @ values[:5] + 4 * (1 - found.targets[rows].sum(1))
        assert torch.allclose(own.mean((1, 2, 3)), weights, atol=1e-4)


# --- loss -------------------------------------------------------------------------------------------------------------


def labelled(task: str, label) -> LabelledImage:
    return LabelledImage(Path("x"), {"task": task, "label": label}, "x")


def test_balanced_classes_weigh_the_same():
    images = [labelled("one", 0)] * 6 + [labelled("one", 1)] * 3 + [labelled("many", [0])] * 3 + [labelled("many", [])]
    weights = balanced(images, TASKS)
    assert weights.positive[0].tolist() == pytest.approx([0.75, 1.5, 0, 0, 0])  # 9 images, 2 classes that occur
    assert weights.positive[1].tolist() == pytest.approx([0, 0, 0, 4 / 6, 0])
    assert weights.negative[1].tolist() == pytest.approx([0, 0, 0, 2.0, 0.5])
    logits, task = torch.randn(2, 5), torch.tensor([0, 1])
    targets = torch.tensor([[0, 1.0, 0, 0, 0], [0, 0, 0, 1, 0]])
    found = joint_loss(logits, targets, task, TASKS, weights=weights)
    assert found[0].item() == pytest.approx(1.5 * F.cross_entropy(logits[:1, :3], torch.tensor([1])).item())
    yes, no = F.softplus(-logits[1, 3]), F.softplus(logits[1, 4])
    assert found[1].item() == pytest.approx(((4 / 6) * yes + 0.5 * no).item() / 2)


def test_smoothing():
    logits, task = torch.randn(2, 5), torch.tensor([0, 1])
    targets = torch.tensor([[0, 1.0, 0, 0, 0], [0, 0, 0, 1, 0]])
    found = joint_loss(logits, targets, task, TASKS, smoothing=0.3)
    wanted = F.cross_entropy(logits[:1, :3], torch.tensor([[0.1, 0.8, 0.1]]))
    assert found[0].item() == pytest.approx(wanted.item(), abs=1e-6)
    wanted = F.binary_cross_entropy_with_logits(logits[1, 3:], torch.tensor([0.85, 0.15]))
    assert found[1].item() == pytest.approx(wanted.item(), abs=1e-6)


# --- optimizer --------------------------------------------------------------------------------------------------------


def rates(steps: int, **changes) -> list[float]:
    own = settings(lr=0.1, **changes)
    optimizer = make_optimizer(nn.Linear(2, 2), own)
    schedule = make_schedule(optimizer, own, steps)
    found = []
    for step in range(own.epochs * steps):
        schedule(step)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_schedules_are_timms():
    found = rates(5, epochs=10, sched="cosine", warmup_epochs=2, min_lr=0.01)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    reference = CosineLRScheduler(
        optimizer, t_initial=50, warmup_t=10, warmup_lr_init=1e-4, lr_min=0.01, t_in_epochs=False
    )
    assert found == pytest.approx([reference._get_lr(step)[0] for step in range(50)])
    assert rates(5, epochs=10, sched="step", decay_epochs=4, decay_rate=0.5)[::20] == pytest.approx([0.1, 0.05, 0.025])
    assert rates(5, epochs=2, sched="constant") == [0.1] * 10
    assert rates(5, epochs=10, warmup_epochs=2)[10] == pytest.approx(max(found), rel=0.2)  # cosine, unless said
    with pytest.raises(VITaskError, match=r"--warmup-epochs 3 is longer than --epochs 2"):
        rates(5, epochs=2, warmup_epochs=3)


def test_layers_may_have_rates_of_their_own():
    import timm

    network = timm.create_model("test_vit", num_classes=3)
    own = settings(lr=0.1, layer_decay=0.5, epochs=1)
    optimizer = make_optimizer(network, own)
    make_schedule(optimizer, own, 1)(0)
    by_weight = {id(weight): group["lr"] for group in optimizer.param_groups for weight in group["params"]}
    assert by_weight[id(network.head.weight)] == pytest.approx(0.1)
    assert by_weight[id(network.blocks[-1].mlp.fc1.weight)] < 0.1
    assert by_weight[id(network.patch_embed.proj.weight)] < by_weight[id(network.blocks[-1].mlp.fc1.weight)]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"opt": "adamwhat"}, r"timm cannot make the optimizer --opt adamwhat \(.*\); give another"),
        ({"opt": "adahessian"}, r"--opt adahessian needs second derivatives"),
    ],
)
def test_an_optimizer_that_cannot_be_is_said_before_any_work(changes, sentence):
    state = torch.get_rng_state()
    with pytest.raises(VITaskError, match=sentence):
        check_optimizer(settings(**changes))
    check_optimizer(settings(opt="lamb"))
    assert torch.equal(torch.get_rng_state(), state)


# --- whole trainings --------------------------------------------------------------------------------------------------


def test_the_average_is_what_is_kept(data, tmp_path):
    """With a decay of nearly 1 the average stays where it was after the first step."""
    plain = run(data, tmp_path / "plain", lr=0.05)
    still = run(data, tmp_path / "still", lr=0.05, model_ema=True, model_ema_decay=0.9999)
    first = run(data, tmp_path / "first", lr=0.05, model_ema=True, model_ema_decay=0.0)
    name = "conv1.0.weight"
    weights = [tsm.backbone.network.state_dict()[name] for tsm in (plain, still, first)]
    assert torch.equal(weights[0], weights[2]) and not torch.allclose(weights[0], weights[1], atol=1e-3)


def test_dropout_is_of_the_training_alone(data, tmp_path):
    tsm = run(data, tmp_path / "tsm", arch="test_vit", drop=0.5, drop_path=0.5)
    assert tsm.record["source"]["options"] == {"img_size": 32}
    assert tsm.hash == TSM.load(tmp_path / "tsm").hash != run(data, tmp_path / "plain", arch="test_vit").hash
    with pytest.raises(VITaskError, match=r"^timm's 'vgg11' has no --drop-path; leave it out"):
        run(data, tmp_path / "none", arch="vgg11", drop_path=0.5)


def test_bf16_is_of_the_training_alone(data, tmp_path):
    tsm, plain = run(data, tmp_path / "tsm", mixed_precision="bf16"), run(data, tmp_path / "plain")
    ours, theirs = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("tsm", "plain"))
    assert all(value.dtype == torch.float32 for value in tsm.backbone.parameters())
    loss, other = (one["history"][0]["train_loss"] for one in (ours, theirs))
    assert loss != other and loss == pytest.approx(other, rel=0.02) and tsm.hash != plain.hash


def test_a_launcher_that_asks_for_fp16_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert settings().precision == "bf16" and settings(mixed_precision="no").precision == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(VITaskError, match=r"launched with --mixed_precision fp16; a TSM is trained in no or bf16"):
        check_precision(settings())


def test_two_processes_are_one_with_twice_the_batch(data, tmp_path):
    """A network without batch normalisation, float32: the same images in the same steps."""
    command = ["-m", "vitask_plugin.cli", "tsm", "train", "--arch", "test_vit", "--image-size", "32", "--epochs", "2"]
    command += ["--data", str(data / "two-train.json"), "--val", str(data / "two-val.json"), "--device", "cpu"]
    command += ["--image-folder", str(data / "images"), "--batch-size", "4", "--out", str(tmp_path / "two")]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(launch, capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stderr[-2000:]
    assert found.stdout.count("TSM ") == 1
    run(data, tmp_path / "one", arch="test_vit", epochs=2, batch_size=8)
    two, one = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("two", "one"))
    assert two["processes"] == 2 and len(two["history"]) == 2
    for ours, theirs in zip(two["history"], one["history"], strict=True):
        for key in ("train_loss", "lr", "val_loss", "val_accuracy", "val_auc"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key


def test_a_tracker_that_is_not_installed_is_said(monkeypatch):
    import accelerate.utils

    monkeypatch.setattr(accelerate.utils, "is_tensorboard_available", lambda: False)
    with pytest.raises(
        VITaskError, match=r"--report-to tensorboard needs the package tensorboard; install it with `pip"
    ):
        check_tracker("tensorboard")


def test_wandb_is_told_of_every_epoch(data, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    run(data, tmp_path / "tsm", epochs=2, report_to="wandb")
    PartialState._reset_state()
    (log,) = (tmp_path / "tsm.runs/wandb").glob("offline-run-*/*.wandb")
    written = log.read_bytes()
    assert b"val_accuracy/two" in written and b"train_loss" in written
    assert sorted(os.listdir(tmp_path)) == ["tsm", "tsm.runs"]


def test_the_augmentation_and_the_loss_are_reached_from_the_command(data, tmp_path):
    command = ["tsm", "train", "--arch", "test_resnet", "--image-size", "32", "--epochs", "1", "--device", "cpu"]
    command += ["--data", str(data / "two-train.json"), "--val", str(data / "two-val.json"), "--batch-size", "8"]
    command += ["--image-folder", str(data / "images")]
    base = run(data, tmp_path / "base").hash
    flags = ["--aa rand-m9", "--color-jitter 0.5", "--scale 0.3 0.6", "--reprob 0.9", "--mixup 0.5", "--cutmix 1"]
    flags += ["--smoothing 0.1", "--opt sgd", "--sched step --warmup-epochs 1", "--bf16"]
    hashes = {base}
    for flag in flags:
        assert main([*command, "--out", str(tmp_path / flag), *flag.split()]) == 0
        hashes.add(TSM.load(tmp_path / flag).hash)
    assert len(hashes) == len(flags) + 1
    assert main([*command, "--out", str(tmp_path / "x"), "--aa", "nonsense"]) == 1
    assert math.isfinite(json.loads((tmp_path / flags[0] / "metrics.json").read_text())["best"]["val_loss"])


def test_settings_are_whole_in_the_metrics(data, tmp_path):
    run(data, tmp_path / "tsm", class_weights="balanced")
    found = json.loads((tmp_path / "tsm/metrics.json").read_text())["settings"]
    assert set(found) == set(Settings.__dataclass_fields__)
    assert found["lr"] == 1e-3 and found["class_weights"] == "balanced"
    assert replace(settings(), pretrained=True).rate == replace(settings(arch=None, init="x")).rate == 1e-4
