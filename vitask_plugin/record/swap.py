"""Which TSM may stand where a VLM was trained with another (plug-and-play), and what to do where it may not.

Two TSMs of one width are two feature spaces: a connector that was trained on one reads the other as noise, and the
answers get worse than without any exemplar, in silence. So another TSM comes with a connector of its own
(`vitask connector align`, or `fit`), or descends from the old one (`vitask tsm train --init`), or is forced.
"""

import shlex
from pathlib import Path
from typing import Any

from vitask_plugin.errors import VITaskError


def check_tsm(
    record: dict[str, Any],
    tsm: Any,
    *,
    checkpoint: str | Path = "CHECKPOINT",
    connector: str | Path | None = None,
    folder: str | Path = "NEW",
    force: bool = False,
) -> str | None:
    """Refuses a TSM whose features mean nothing to the connector in use.

    Args:
        record: `vitask.json`, or what `checkpoint.read_fitted` gives for a connector from elsewhere.
        tsm: a `vitask_plugin.tsm.model.TSM`, loaded from `folder`.
        checkpoint, connector: where the VLM and the connector come from, for the command in the message.
        force: take it all the same, if its features are as wide.

    Returns:
        What to warn of: a TSM of another feature space; None if there is nothing to say.

    Raises:
        VITaskError: naming both TSMs and the command that helps.
    """
    if record["tsm"] is None:
        raise VITaskError(
            f"this checkpoint was trained without a TSM (--vitask_ep {record['ep']}); evaluate it without one"
        )
    trained = record["tsm"]["hash"]
    if record["ep"] == "text" or tsm.hash == trained:  # words of any TSM fit
        return None
    both = f"TSM {tsm.hash[:12]} in {str(folder)!r} is not TSM {trained[:12]}, which the connector was made for"
    width = tsm.record["feature_width" if record["ep"] == "cls" else "patch_width"]
    advice = f"align it with `{command(record, checkpoint, connector, folder)}` and give connector=OUT, or if the old "
    advice += "TSM is gone use `vitask connector fit`"
    if width != record["connector"]["in"]:
        raise VITaskError(
            f"{both}, and its features are {width} wide where the connector takes {record['connector']['in']}; {advice}"
        )
    if trained in tsm.record.get("init", []):
        return (
            f"plug-and-play: {both}; it was trained from that one's weights (`vitask tsm train --init`), which keeps "
            "its feature space only roughly, so an aligned connector (`vitask connector align`) is better"
        )
    if force:
        return f"plug-and-play: {both}; swap=force: its features mean something else, so expect wrong answers"
    raise VITaskError(
        f"{both}, and features of another TSM mean nothing to it, whatever their width; {advice}; swap=force in "
        "--model_args takes it all the same"
    )


def command(record: dict[str, Any], checkpoint: str | Path, connector: str | Path | None, folder: str | Path) -> str:
    """`vitask connector align` for a checkpoint, the connector in use, and the new TSM in `folder`."""
    old = record["arguments"].get("vitask_tsm") or "OLD"
    words = ["--checkpoint", checkpoint, *(["--connector", connector] if connector else []), "--from-tsm", old]
    words += ["--tsm", folder, "--data", "JSON", "--image-folder", "DIR", "--out", "OUT"]
    return f"vitask connector align {shlex.join(map(str, words))}"
