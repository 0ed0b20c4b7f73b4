"""What `vitask calibrate` says to people."""

from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from vitask_plugin.record.calibration import Calibration, Rate

_TITLES = {"accuracy": "accuracy", "nll": "NLL (nats)", "ece": "ECE"}


def show(calibration: Calibration, about: dict[str, Any], console: Console) -> None:
    """One calibration: what was fitted, what it is worth, its thresholds.

    Args:
        about: as in `calibration.json`.
    """
    judged = about["judged_by"]
    where = f"on {judged['path']}" if judged else "on held-out folds of the same images"
    title = f"{calibration.task} {'with' if calibration.ep else 'without'} exemplars, {where}, with 95% intervals"
    console.print(title, markup=False, highlight=False, soft_wrap=True)
    table = Table(box=SIMPLE)
    table.add_column("")
    for name in ("before", "after", "difference"):
        table.add_column(name, justify="center", min_width=14)
    for name, own in about["figures"].items():
        cells = [_cell(own[side], own[f"{side}_ci95"]) for side in ("before", "after", "difference")]
        table.add_row(_TITLES[name], *cells)
    console.print(table)
    for line in _lines(calibration, about):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print()


def _cell(value: float, ends: list[float]) -> str:
    return f"{value:.3f}\n{ends[0]:.3f} to {ends[1]:.3f}"


def _lines(calibration: Calibration, about: dict[str, Any]) -> list[str]:
    choice, nll = about["choice"], about["figures"]["nll"]
    gain = f"{choice['gain']:.4f} ± {choice['error']:.4f} nats"
    lines = [f"Fitted on {about['images']} images of {about['data']['path']}; {about['training_data']}."]
    if choice["bias"]:
        named = zip(calibration.classes, calibration.bias, strict=False)
        lines.append(
            f"Temperature {calibration.temperature:.3f}; bias {', '.join(f'{name} {own:+.3f}' for name, own in named)} "
            f"(on held-out images it gains {gain}, more than one standard error)."
        )
    else:
        lines.append(
            f"Temperature {calibration.temperature:.3f}, which changes no answer; no bias (on held-out images it "
            f"gains {gain}, not more than one standard error)."
        )
    if nll["after"] >= nll["before"]:
        lines.append("On held-out images the NLL does not fall: these probabilities are better left as they are.")
    elif nll["difference_ci95"][1] >= 0:
        lines.append("On held-out images the NLL falls by no more than chance may give: its interval holds 0.")
    for one in calibration.thresholds:
        lines.append(
            f"{one.positive!r} from a probability of {one.value:.4f} on, for a {one.aim} of {one.wished:g}: "
            + _pair(("sensitivity", one.sensitivity), ("specificity", one.specificity))
            + "; held out: "
            + _pair(*one.held_out.items())
        )
    if calibration.abstention is not None:
        one = calibration.abstention
        lines.append(
            f"No answer below a probability of {one.value:.4f}, for at most {one.wished:g} of the answers wrong: "
            + _pair(("wrong", one.error), ("answered", one.answered))
            + "; held out: "
            + _pair(("wrong", one.held_out["error"]), ("answered", one.held_out["answered"]))
        )
    if calibration.thresholds or calibration.abstention is not None:
        lines.append(
            "Nothing applies these: `vitask predict`, `Specialist`, `vitask serve` and lmms-eval go on giving "
            f"{'the classes above 1/2' if calibration.multi_label else 'the likeliest class'}; compare their "
            "probabilities with them."
        )
    return lines


def _pair(*rates: tuple[str, Rate]) -> str:
    return ", ".join(f"{name} {_rate(rate)}" for name, rate in rates)


def _rate(rate: Rate) -> str:
    if rate.value is None:
        return "n/a (no image)"
    return f"{rate.value:.3f} [{rate.low:.3f}, {rate.high:.3f}] of {rate.images}"
