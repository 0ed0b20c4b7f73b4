"""MedMNIST v2 and MedMNIST+ (2D): each image is classified in words.

`medmnist.json` holds a row per set: what its images are, its classes, and whether an image has several. The images
come from the files of the `medmnist` package, which it downloads from Zenodo and checks by their MD5.
"""

import io
import os
import re
import statistics
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from accelerate import Accelerator
from PIL import Image

Label = int | list[int]
NO_FINDING = "no finding"


def instruction(modality: str, choices: Sequence[str] | None, *, multi_label: bool = False) -> str:
    """The paper's instruction; without `choices`, its incomplete form (no label set).

    Args:
        multi_label: also list "no finding", which is then one of the possible answers.
    """
    text = f"Analyze the given {modality} image."
    if choices is None:
        return text
    listed = [*choices, NO_FINDING] if multi_label else choices
    return f"{text} The possible diagnoses are: {', '.join(listed)}."


def response(choices: Sequence[str], label: Label) -> str:
    """The answer `{label}.`; several labels are joined by ", ", and none of them is "no finding."."""
    if isinstance(label, int):
        return f"{choices[label]}."
    return ", ".join(choices[index] for index in label) + "." if label else f"{NO_FINDING}."


_JOINERS = "\u200c\u200d"  # without width, yet they shape the letters of some scripts
# Fillers and variation selectors: seen as nothing, though not of the category Cf.
_BLANKS = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0") | {chr(code) for code in range(0xFE00, 0xFE10)}


@lru_cache(maxsize=4096)
def plain(name: str) -> str:
    """The name as it is written down: accents composed (NFC), single plain spaces, nothing that has no width.

    Two names with the same plain form differ in nothing that can be seen: they are one name.
    """
    if name.isascii() and name.isprintable():  # nothing to compose or to leave out; most names of a million are so
        return " ".join(name.split())
    composed = unicodedata.normalize("NFC", name)
    seen = [char for place, char in enumerate(composed) if not _invisible(composed, place)]
    # Composed once more: what stood between a letter and its accent may be gone.
    return unicodedata.normalize("NFC", " ".join("".join(seen).split()))


def _invisible(text: str, place: int) -> bool:
    char = text[place]
    if char in _JOINERS:
        neighbours = text[max(0, place - 1) : place] + text[place + 1 : place + 2]
        return len(neighbours) < 2 or any(ord(other) < 0x0590 for other in neighbours)
    if char in _BLANKS or unicodedata.category(char) == "Cf":
        return True
    return unicodedata.category(char) == "Cc" and not char.isspace()


_MARKS = str.maketrans(
    {
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\u02d7\ufe63\uff0d\u00ad", "-"),
        **dict.fromkeys("\u2018\u2019\u02bc\u2032\u00b4\u0060", "'"),
        **dict.fromkeys("\u201c\u201d\u2033", '"'),
    }
)


def readable(text: str) -> str:
    """`text` in the characters that a reader of answers knows: compatibility forms (NFKC), plain hyphens and quotes.

    "\uff26\uff4c\uff41\uff54" -> "Flat". Line breaks stay.
    """
    seen = "".join(char for place, char in enumerate(text) if char.isspace() or not _invisible(text, place))
    return unicodedata.normalize("NFKC", seen.translate(_MARKS))


# What else a label is called, wherever a task has that label. Case, punctuation and a plural s need no entry.
_SYNONYMS: dict[str, tuple[str, ...]] = {
    NO_FINDING: ("normal", "none", "no abnormality", "no abnormalities", "no acute findings", "no disease", "healthy"),
    "normal": ("healthy", "no abnormality", "no abnormalities", "no finding"),
    # PathMNIST
    "adipose": ("adipose tissue", "fat", "fatty tissue"),
    "smooth muscle": ("muscularis propria",),
    "normal colon mucosa": ("normal mucosa",),
    "cancer-associated stroma": ("tumor stroma", "tumour stroma", "cancer stroma"),
    "colorectal adenocarcinoma epithelium": ("colorectal adenocarcinoma", "adenocarcinoma epithelium"),
    # ChestMNIST
    "cardiomegaly": ("enlarged heart", "cardiac enlargement"),
    "effusion": ("pleural effusion",),
    "infiltration": ("infiltrate",),
    "edema": ("oedema", "pulmonary edema", "pulmonary oedema"),
    # DermaMNIST
    "actinic keratoses and intraepithelial carcinoma": (
        "actinic keratosis",
        "actinic keratoses",
        "intraepithelial carcinoma",
        "actinic keratosis and intraepithelial carcinoma",
        "actinic keratoses or intraepithelial carcinoma",
        "Bowen's disease",
    ),
    "basal cell carcinoma": ("BCC",),
    "benign keratosis-like lesions": (
        "benign keratosis",
        "benign keratoses",
        "seborrheic keratosis",
        "seborrheic keratoses",
        "seborrhoeic keratosis",
        "seborrhoeic keratoses",
    ),
    "melanoma": ("malignant melanoma",),
    "melanocytic nevi": (
        *("melanocytic nevus", "melanocytic naevus", "melanocytic naevi"),
        *("nevus", "nevi", "naevus", "naevi"),
    ),
    # OCTMNIST
    "choroidal neovascularization": ("CNV", "choroidal neovascularisation"),
    "diabetic macular edema": ("DME", "diabetic macular oedema"),
    # RetinaMNIST: the scale's own names and its abbreviations
    "no diabetic retinopathy": (
        "no DR",
        "no apparent diabetic retinopathy",
        "no sign of diabetic retinopathy",
        "no signs of diabetic retinopathy",
        "no evidence of diabetic retinopathy",
        "absence of diabetic retinopathy",
    ),
    **{
        f"{grade} diabetic retinopathy": (
            f"{grade} DR",
            f"{grade} NPDR",
            f"{grade} nonproliferative diabetic retinopathy",
            f"{grade} non-proliferative diabetic retinopathy",
            f"{grade} nonproliferative DR",
            f"{grade} non-proliferative DR",
        )
        for grade in ("mild", "moderate", "severe")
    },
    "proliferative diabetic retinopathy": ("PDR", "proliferative DR"),
    # BreastMNIST: one class of two names
    "normal or benign": ("normal", "benign", "normal, benign", "benign or normal", "normal and benign"),
    # BloodMNIST
    "immature granulocyte": ("myelocyte", "metamyelocyte", "promyelocyte"),
    "erythroblast": ("nucleated red blood cell",),
    "platelet": ("thrombocyte",),
    # TissueMNIST
    "collecting duct or connecting tubule": (
        "collecting duct",
        "connecting tubule",
        "collecting duct, connecting tubule",
    ),
    "leukocytes": ("leucocyte", "white blood cell"),
    "proximal tubule segments": ("proximal tubule", "proximal convoluted tubule"),
    "thick ascending limb": ("thick ascending limb of Henle",),
    # OrganMNIST
    **{f"{side} {organ}": (f"{organ}-{side}", f"{organ} {side}") for side in ("left", "right") for organ in ("femur", "kidney", "lung")},
    "bladder": ("urinary bladder",),
}
# In the singular, as `_words` gives them. "pre": what is pre-malignant is not malignant.
_NEGATIONS = frozenset(
    (
        *("not", "no", "non", "pre", "nor", "neither", "never", "none", "without", "cannot", "unlikely", "absent"),
        *("absence", "negative", "exclude", "excluded", "excluding", "rule", "ruled", "ruling", "rather", "instead"),
        *("lack", "lacking", "free", "fail", "failed", "false", "hardly", "unable"),
    )
)
# Denials of several words, whose words alone deny nothing; "anything but" also has to be read before "but" is.
_NOT = re.compile(r"n['\u2019]t\b|\b(?:clear of|far from|less likely|anything but)\b")
# With a negation and nothing else they deny what was said before: "pneumonia: not seen".
_PRESENT = frozenset(["is", "are", "likely", "present", "seen", "visible", "evident", "found", "detected", "identified"])
# Where a negation no longer reaches: "cardiomegaly without effusion", "benign rather than malignant".
_CLAUSE_END = re.compile(
    r"([.,;:!?\n]+|[()\[\]]|\s[-\u2013]+\s|--+|\u2014|\b(?:but|however|although|though|while|yet)\b"
    r"|\b(?:and|with)\s+(?=(?:no|not)\b)|(?=\bwithout\b)|(?=\b(?:rather|instead)\b))"
)
_COORDINATIONS = frozenset(["and", "or", "to"])
_LIST_STARTS = frozenset(["and", "or", "nor"])
_LIST_WORDS = _LIST_STARTS | {"a", "an", "any", "the"}
# Labels that a denied finding leads to and no list of findings goes on with: "not malignant, normal or benign".
_HEALTHY = re.compile(r"no .*|normal|benign|healthy|normal or benign")
# One of these in a report of findings speaks of a part: "heart size is normal". It is "no finding" only by itself.
_BARE = frozenset(["normal", "healthy", "none"])
_ABOUT_THE_IMAGE = frozenset(
    (
        *("a", "an", "the", "this", "it", "is", "are", "appear", "look"),
        *("chest", "x", "ray", "xray", "image", "radiograph", "scan", "study"),
    )
)


def parse_strict(text: str, choices: Sequence[str], *, multi_label: bool = False) -> Label | None:
    """What `text` says letter for letter, as `instructions.response` words it, but for outer spaces, a full stop, and
    what cannot be seen (decomposed accents, kinds of spaces)."""
    text, choices = "\n".join(map(plain, text.strip().splitlines())), [plain(choice) for choice in choices]
    for said in (text, text.removesuffix(".")):
        if not multi_label:
            if said in choices:
                return choices.index(said)
        elif said == NO_FINDING:
            return []
        elif set(names := said.split(", ")) <= set(choices) and len(set(names)) == len(names):
            return sorted(choices.index(name) for name in names)
    return None


def parse_flexible(text: str, choices: Sequence[str], *, multi_label: bool = False) -> Label | None:
    """What a free-form answer names.

    The strict reading first. Else labels and their synonyms are looked for word by word, in any case and number and
    with any punctuation. Of names inside each other the longest counts. A name in a clause with a negation of its own
    does not count ("not malignant" is not "malignant"), nor do those that continue its list ("no nodule, mass, or
    effusion"). A single-label answer that names two different labels names none, and neither does a multi-label one
    that names "no finding" and a label, or has "normal" among other words ("heart size is normal").
    """
    strict = parse_strict(text, choices, multi_label=multi_label)
    if strict is not None:
        return strict
    choices = [plain(choice) for choice in choices]
    words, clauses, openings = _words(text)
    names = _names([*choices, NO_FINDING] if multi_label else choices)
    spans = [(start, start + len(name), name, index) for name, index in names for start in range(len(words) - len(name) + 1) if words[start : start + len(name)] == name]
    # The "no" of a label such as "no diabetic retinopathy" denies nothing else.
    named = {place for start, end, _, _ in spans for place in range(start, end)}
    denied = {clauses[place] for place, word in enumerate(words) if word in _NEGATIONS and place not in named}
    healthy = {clauses[start] for start, _, _, index in spans if _HEALTHY.fullmatch([*choices, NO_FINDING][index].casefold())}
    for clause, opening in openings.items():
        if clause not in healthy and _continues_denial(words, clauses, clause, opening, named, denied - healthy):
            denied.add(clause)
    found = set()
    for start, end, name, index in spans:
        inside_another = any(a <= start and end <= b and b - a > end - start for a, b, _, _ in spans)
        if not inside_another and denied.isdisjoint(clauses[start:end]):
            found |= {index, *_coordinated(words, clauses, start, name, names)}
    if not multi_label:
        return found.pop() if len(found) == 1 else None
    nothing = len(choices)
    if nothing in found:
        whole = any(index == nothing and not _BARE.issuperset(name) for _, _, name, index in spans)
        return [] if found == {nothing} and (whole or set(words) <= _BARE | _ABOUT_THE_IMAGE) else None
    return sorted(found) or None


def _names(choices: Sequence[str]) -> list[tuple[list[str], int]]:
    """(words, index) of each choice and of its synonyms, but for those without words or that name another choice."""
    return [(words, index) for index, choice in enumerate(choices) for name in (choice, *_SYNONYMS.get(choice, ())) if (name == choice or name not in choices) and (words := _words(name)[0])]


def _continues_denial(words: list[str], clauses: list[int], clause: int, opening: str, named: set[int], denied: set[int]) -> bool:
    """Whether `clause` goes on with the list of a denied one, as "or effusion" does in "no nodule, mass, or effusion".

    `named`: places of label names. Only labels and what joins them, or labels after an "or", go on with a list.
    """
    places = [place for place, own in enumerate(clauses) if own == clause]
    items = [place for place in places if words[place] not in _LIST_WORDS]
    if not items or places[0] == 0 or items[0] not in named:
        return False
    before = places[0] - 1
    if clauses[before] not in denied or (opening == "," and before not in named):
        return False
    return named.issuperset(items) or words[places[0]] in _LIST_STARTS


def _coordinated(words: list[str], clauses: list[int], start: int, name: list[str], names: list[tuple[list[str], int]]) -> set[int]:
    """Indices of labels that share the rest of `name` at `start`: "mild" in "mild to moderate diabetic retinopathy"."""
    before = start - 1
    if before >= 0 and words[before] in _COORDINATIONS:
        before -= 1
    if before < 0 or clauses[before] != clauses[start] or len(name) < 2:
        return set()
    return {index for other, index in names if other == [words[before], *name[1:]]}


def _words(text: str) -> tuple[list[str], list[int], dict[int, str]]:
    """The words of `text` in lower case and singular, without punctuation, and the number of each word's clause.

    Third, what opens those clauses that a comma or a bracket opens, by number. After a closed bracket the clause before
    it goes on.
    """
    text = _NOT.sub(" not", re.sub(r"[ \t_]+", " ", readable(readable(text).casefold())))
    text = re.sub(r"\bgall[ -]bladder", "gallbladder", re.sub(r"['\u2019]s\b", "s", text))
    words: list[str] = []
    clauses: list[int] = []
    openings: dict[int, str] = {}
    outer: list[int] = []
    number = 0
    pieces = _CLAUSE_END.split(text)
    for place, (end, clause) in enumerate(zip(["", *pieces[1::2]], pieces[::2], strict=True)):
        if end in ("(", "["):
            outer.append(number)
        number = outer.pop() if end in (")", "]") and outer else place
        if end in ("(", "[", ","):
            openings[number] = end
        found = re.findall(r"\w+", clause)
        # "Malignant? No.": a clause that only denies speaks of the one before it.
        denies = _NEGATIONS.intersection(found) and set(found) <= _NEGATIONS | _PRESENT
        own = clauses[-1] if clauses and denies else number
        words += map(_singular, found)
        clauses += [own] * len(found)
    return words, clauses, openings


def _singular(word: str) -> str:
    """Without a plural s; the s of "mucus", "fibrosis" and "mass" is none."""
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith(("us", "is", "ss")) else word


class Outcome(NamedTuple):
    """One sample: its label, and the label that the answer was read as, None if it names none.

    A class index each; of a multi-label sample K zeros and ones each.
    """

    target: int | Sequence[int]
    prediction: int | Sequence[int] | None


def hit(outcome: Outcome) -> float:
    """How much of one answer is right: 0 or 1; of a multi-label sample the share of its labels."""
    target, prediction = outcome
    if prediction is None:
        return 0.0
    if isinstance(target, Sequence):
        return statistics.fmean(a == b for a, b in zip(target, prediction, strict=True))
    return float(target == prediction)


def macro_f1(outcomes: Sequence[Outcome]) -> float:
    """Unweighted mean of the F1 of each class that is some sample's label or answer; multi-label: of all K labels.

    scikit-learn's definition, with an F1 of 0 for a label that is never there and never named.
    """
    from sklearn.metrics import f1_score

    targets, predictions = columns(outcomes)
    if targets.shape[1] > 1:
        named = np.where(predictions < 0, 0, predictions)  # who names no label has found none
        return float(f1_score(targets, named, average="macro", zero_division=0))
    # -1 is no class of its own: it costs its target's recall and nobody's precision.
    classes = sorted({*targets.flat, *predictions.flat} - {-1})
    return float(f1_score(targets[:, 0], predictions[:, 0], labels=classes, average="macro", zero_division=0))


def columns(outcomes: Sequence[Outcome]) -> tuple[np.ndarray, np.ndarray]:
    """Labels and predictions, int64 [N, 1], multi-label [N, K]; -1 = the answer names no label."""
    targets = np.array([outcome.target for outcome in outcomes], dtype=np.int64).reshape(len(outcomes), -1)
    blank = -1 if targets.shape[1] == 1 else [-1] * targets.shape[1]
    predictions = [blank if prediction is None else prediction for _, prediction in outcomes]
    return targets, np.array(predictions, dtype=np.int64).reshape(targets.shape)


def unmapped(outcomes: Sequence[Outcome]) -> int:
    """How many answers name no label."""
    return sum(prediction is None for _, prediction in outcomes)


def medmnist_process_docs(dataset: datasets.Dataset) -> datasets.Dataset:
    """The test images of the set that the task's `dataset_name` names: `breastmnist`, or with a size `breastmnist_224`.

    Args:
        dataset: the rows of `medmnist.json`.
    """
    flag, _, size = dataset.info.config_name.partition("_")
    row = next(row for row in dataset if row["flag"] == flag)
    images, values = _load(flag, int(size or 28))
    choices, several = row["choices"], row["multi_label"]
    question = instruction(row["modality"], choices, multi_label=several)
    docs = []
    for index, (image, value) in enumerate(zip(images, values, strict=True)):
        labels = np.flatnonzero(value).tolist() if several else [int(value[0])]
        answer = response(choices, labels if several else labels[0])
        docs.append(
            {
                "image": {"bytes": _png(image), "path": None},
                "index": index,
                "question": question,
                "answer": answer,
                "labels": labels,
                "choices": choices,
                "multi_label": several,
            }
        )
    return datasets.Dataset.from_list(docs, features=_features())


def _features() -> datasets.Features:
    text, number = datasets.Value("string"), datasets.Value("int64")
    return datasets.Features(
        {
            "image": datasets.Image(),
            "index": number,
            "question": text,
            "answer": text,
            "labels": datasets.Sequence(number),
            "choices": datasets.Sequence(text),
            "multi_label": datasets.Value("bool"),
        }
    )


def _load(flag: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Test images [N, H, W] or [N, H, W, 3] and labels [N, 1] or, of several labels, [N, K]."""
    try:
        import medmnist
    except ImportError:
        raise ImportError("The MedMNIST tasks read the files of the medmnist package: pip install medmnist") from None

    # $MEDMNIST_ROOT for files that are elsewhere than ~/.medmnist, as on machines without a network.
    root = Path(os.environ.get("MEDMNIST_ROOT") or "~/.medmnist").expanduser()
    data_class = getattr(medmnist, medmnist.INFO[flag]["python_class"])
    path = root / (f"{flag}.npz" if size == 28 else f"{flag}_{size}.npz")
    accelerator = Accelerator()
    if accelerator.is_local_main_process and not path.is_file():
        root.mkdir(parents=True, exist_ok=True)
        data_class(split="test", download=True, root=str(root), size=size)
    accelerator.wait_for_everyone()
    data = data_class(split="test", root=str(root), size=size)
    return data.imgs, data.labels


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).convert("RGB").save(buffer, format="PNG")
    return buffer.getvalue()


def medmnist_doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    return [doc["image"].convert("RGB")]


def medmnist_doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    kwargs = lmms_eval_specific_kwargs or {}
    return f"{kwargs.get('pre_prompt', '')}{doc['question']}{kwargs.get('post_prompt', '')}"


def medmnist_doc_to_messages(doc: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """The image, then the question: for models with a chat template."""
    content = [{"type": "image", "url": image} for image in medmnist_doc_to_visual(doc)]
    content.append({"type": "text", "text": medmnist_doc_to_text(doc, lmms_eval_specific_kwargs)})
    return [{"role": "user", "content": content}]


def medmnist_process_results(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
    """The values of one answer. An answer that names no label, or two of one, is wrong."""
    prediction = parse_flexible(results[0], doc["choices"], multi_label=doc["multi_label"])
    target = doc["labels"] if doc["multi_label"] else doc["labels"][0]
    outcome = Outcome(_members(doc, target), _members(doc, prediction))
    return {"accuracy": hit(outcome), "macro_f1": outcome, "unmapped": outcome}


def _members(doc: dict[str, Any], label: Label | None) -> int | list[int] | None:
    """A class index; of several labels zeros and ones."""
    if not isinstance(label, list):
        return label
    return [int(index in label) for index in range(len(doc["choices"]))]


def medmnist_macro_f1(results: list[Outcome]) -> float:
    return macro_f1(results)


def medmnist_unmapped(results: list[Outcome]) -> int:
    return unmapped(results)
