"""Finished runs: their logged steps, their weights, and how far two of them are apart."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file


def history(output: Path) -> list[dict[str, float]]:
    """The logged steps of a run."""
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in log if "loss" in entry]


def weights(output: Path) -> dict[str, torch.Tensor]:
    """All saved weights of a full or a LoRA run, the connector's among them, by name."""
    found = {}
    for path in sorted(output.glob("*.safetensors")):
        found |= load_file(path)
    for path in sorted(output.glob("*.bin")):
        if path.name != "training_args.bin":
            found |= torch.load(path, weights_only=True)
    return found


@dataclass(frozen=True)
class Bound:
    """How far a run may be from its reference.

    Attributes:
        loss: largest difference of any term at any step, nats per response token.
        weight: largest difference of any weight. mean: mean difference over all weights.
        moved: difference of how far all trained weights moved, as a share of it, see `astray`.
    """

    loss: float
    weight: float
    mean: float
    moved: float


def apart(output: Path, reference: Path, steps: int | None = None) -> tuple[dict[str, float], float, float]:
    """The largest difference of each term over the steps, and of the weights the largest and the mean.

    The vision tower must not be apart at all, and does not count for the mean.

    Args:
        steps: how many of the first steps are compared; None = all, and both runs must have as many.
    """
    ours, theirs = history(output)[:steps], history(reference)[:steps]
    terms = {name for entry in theirs for name in entry if name.startswith("loss")}
    for entry, other in zip(ours, theirs, strict=True):
        assert {name for name in entry if name.startswith("loss")} == {n for n in other if n.startswith("loss")}
    losses = {
        name: max(abs(entry[name] - other[name]) for entry, other in zip(ours, theirs, strict=True) if name in other)
        for name in sorted(terms)
    }
    found, expected = weights(output), weights(reference)
    assert found.keys() == expected.keys()
    tower = {name for name in expected if "vision_tower" in name}
    assert all(torch.equal(found[name], expected[name]) for name in tower)
    differences = torch.cat(
        [(found[name].double() - expected[name].double()).abs().flatten() for name in expected.keys() - tower]
    )
    return losses, differences.max().item(), differences.mean().item()


def astray(run: Path, reference: Path) -> float:
    """||a - b|| / ||b||, where a and b are how far all trained weights moved: 0 = the same way.

    Args:
        run, reference: what `witness` wrote of them.
    """
    ours, theirs = (torch.load(path, weights_only=True) for path in (run, reference))
    assert ours.keys() == theirs.keys() and len(theirs) > 4
    apart = sum((ours[name] - move).double().square().sum() for name, move in theirs.items())
    moved = sum(move.double().square().sum() for move in theirs.values())
    assert moved > 0
    return (apart / moved).sqrt().item()


def assert_identical(output: Path, reference: Path) -> None:
    """Every term of every step, and every weight, bit for bit."""
    ours, theirs = history(output), history(reference)
    terms = {name for entry in theirs for name in entry if name.startswith("loss")}
    assert len(terms) >= 4
    for entry, expected in zip(ours, theirs, strict=True):
        assert {name: entry.get(name) for name in terms} == {name: expected.get(name) for name in terms}
    found, expected = weights(output), weights(reference)
    assert found.keys() == expected.keys() and len(expected) > 4
    assert all(torch.equal(found[name], expected[name]) for name in expected)
