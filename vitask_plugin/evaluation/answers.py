"""From an answer in words to labels: strictly, as the label was asked for, or flexibly. Knows no model and no harness.

A reading is a class index; of a multi-label answer it is the sorted list of class indices, empty for "no finding".
None: the answer names no label, or more than a single-label answer may.
"""

import re
from collections.abc import Sequence

from vitask_plugin.data.class_names import NO_FINDING
from vitask_plugin.data.instructions import Label
from vitask_plugin.data.names import plain, readable

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
    **{
        f"{side} {organ}": (f"{organ}-{side}", f"{organ} {side}")
        for side in ("left", "right")
        for organ in ("femur", "kidney", "lung")
    },
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
_PRESENT = frozenset(
    ["is", "are", "likely", "present", "seen", "visible", "evident", "found", "detected", "identified"]
)
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
    spans = [
        (start, start + len(name), name, index)
        for name, index in names
        for start in range(len(words) - len(name) + 1)
        if words[start : start + len(name)] == name
    ]
    # The "no" of a label such as "no diabetic retinopathy" denies nothing else.
    named = {place for start, end, _, _ in spans for place in range(start, end)}
    denied = {clauses[place] for place, word in enumerate(words) if word in _NEGATIONS and place not in named}
    healthy = {
        clauses[start] for start, _, _, index in spans if _HEALTHY.fullmatch([*choices, NO_FINDING][index].casefold())
    }
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
    return [
        (words, index)
        for index, choice in enumerate(choices)
        for name in (choice, *_SYNONYMS.get(choice, ()))
        if (name == choice or name not in choices) and (words := _words(name)[0])
    ]


def _continues_denial(
    words: list[str], clauses: list[int], clause: int, opening: str, named: set[int], denied: set[int]
) -> bool:
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


def _coordinated(
    words: list[str], clauses: list[int], start: int, name: list[str], names: list[tuple[list[str], int]]
) -> set[int]:
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
