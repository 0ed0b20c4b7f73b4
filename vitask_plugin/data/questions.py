"""How each task of a data file was asked, for the record of a checkpoint: whoever uses it has to ask the same."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from vitask_plugin.data.instructions import question_text


def questions_of(samples: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """`{task: {"text": str, "multi_label": bool}}` of the samples with a `vitask` block, without the image token; of
    several wordings of one task the one that most of its samples have, the first of two that are as frequent.
    """
    counts: dict[str, Counter[str]] = {}
    several: dict[str, bool] = {}
    for sample in samples:
        if "vitask" in sample:
            task = sample["vitask"]["task"]
            counts.setdefault(task, Counter())[sample["conversations"][0]["value"]] += 1
            several[task] = isinstance(sample["vitask"]["label"], list)
    return {
        task: {"text": question_text(found.most_common(1)[0][0]), "multi_label": several[task]}
        for task, found in counts.items()
    }
