"""LLaVA's JSON, sample by sample, and the `vitask` block that a sample of a task has beside it."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from typing_extensions import NotRequired, TypedDict  # pydantic takes no other before Python 3.12

from vitask_plugin.data.class_names import IMAGE_TOKEN
from vitask_plugin.data.reserved import turn_problem
from vitask_plugin.errors import VITaskError
from vitask_plugin.formats.schema import STRICT, Count, Format, Name

Text = Annotated[str, Field(min_length=1)]
# One side's words.
Turn = TypedDict("Turn", {"from": Literal["human", "gpt"], "value": str})


class Block(TypedDict):
    """What makes a sample one of a task: `label` is an index of `choices`, or those of all classes that apply."""

    task: Name
    choices: list[str]
    label: Count | list[Count]
    group: NotRequired[str]


class Sample(TypedDict):
    """A conversation, about an image or not; `image` is relative to the image folder."""

    image: NotRequired[Text]
    conversations: Annotated[list[Turn], Field(min_length=1)]
    vitask: NotRequired[Block]


def _checked(sample: dict[str, Any]) -> dict[str, Any]:
    problem = _problem(sample["conversations"], sample.get("image"))
    if problem is None and "vitask" in sample:
        problem = _block_problem(sample, sample["vitask"])
    if problem is not None:
        raise VITaskError(problem)
    return sample


def _problem(turns: list[dict[str, str]], image: str | None) -> str | None:
    """What keeps a conversation from being learnt."""
    before, tokens, answered = "", 0, False
    for number, turn in enumerate(turns):
        speaker, held = turn["from"], turn["value"].count(IMAGE_TOKEN)
        if speaker == before:
            return f"turns {number - 1} and {number} are both from {speaker!r}; they alternate"
        if held and speaker == "gpt":
            return f"turn {number}, an answer, holds {IMAGE_TOKEN}; it belongs in a question"
        answered |= number > 0 and speaker == "gpt"
        before, tokens = speaker, tokens + held
    if not answered:
        return "no answer from 'gpt' to a question; there is nothing to learn"
    if tokens and image is None:
        return f"holds {IMAGE_TOKEN} but has no 'image'; add its path or remove {IMAGE_TOKEN}"
    if tokens > 1:
        return f"holds {tokens} {IMAGE_TOKEN} but one image; keep one"
    return None


def _block_problem(sample: dict[str, Any], block: dict[str, Any]) -> str | None:
    """What keeps a sample from being one of its task."""
    turns, label, last = sample["conversations"], block["label"], len(block["choices"]) - 1
    if "image" not in sample:
        return f"belongs to task {block['task']!r} but has no 'image'; add its path"
    if IMAGE_TOKEN not in turns[0]["value"]:
        return f"belongs to task {block['task']!r} but turn 0 has no {IMAGE_TOKEN}; put it there"
    indices = label if isinstance(label, list) else [label]
    if max(indices, default=0) > last:
        return f"label {max(indices)} is not the index of a choice (0 to {last}); correct it"
    if len(set(indices)) != len(indices):
        return f"label {label} names a class twice; leave one out"
    return turn_problem(turns)


for _part in (Turn, Block, Sample):
    _part.__pydantic_config__ = STRICT
SAMPLE = Format(
    Annotated[Sample, AfterValidator(_checked)],
    "this is not LLaVA's JSON with a 'vitask' block as `vitask data` writes it, so correct it",
)
