"""What lies in an image folder and is no image to learn from, told by its name.

File managers, notebooks, servers and archives leave files of their own; published sets hold masks, thumbnails and notes
beside the images.
"""

import fnmatch
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

# Names in lower case; whatever begins with a dot is left out too.
_LEFTOVERS = (
    *("thumbs.db", "thumbs.db:encryptable", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r", "*.lnk"),
    *("__macosx", "$recycle.bin", "system volume information", "recycler", "lost+found", "zbthumbnail.info"),
    *("@eadir", "@tmp", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "*@synoeastream", "*@synoresource"),
    *("__pycache__", "*~", "~$*", "*.tmp", "*.bak", "*.orig", "*.swp", "*.lock", "picasa.ini", "*:zone.identifier"),
    *("dicomdir",),  # an index
    *("*.part", "*.partial", "*.filepart", "*.crdownload", "*.download", "*.aria2"),
)
_TEXTS = frozenset(
    (
        *(".txt", ".md", ".rst", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".xmp", ".yaml", ".yml", ".html", ".htm"),
        *(".xls", ".xlsx", ".ods", ".doc", ".docx", ".pdf", ".rtf", ".bib", ".log", ".md5", ".sha1", ".sha256"),
        *(".py", ".ipynb", ".r", ".sh", ".bat"),
    )
)
_NOTES = frozenset(("license", "licence", "readme", "citation", "changelog", "makefile", "md5sums", "sha256sums"))
# Below a class folder; beside the classes each of these could be a class.
_BESIDE_IMAGES = re.compile(
    r"(ground[ _-]?truths?|annotations?|segmentations?|(lesion|lung|infection)?[ _-]?masks?|thumbnails?|thumbs)"
)
_INITIALS = re.compile(r"gts?")  # ground truth, or a patient's
_IMAGES = re.compile(r"(images?|imgs?|pictures?|photos?|scans?|originals?)")
# "benign (3)_mask_1", beside "benign (3)".
_COMPANION = re.compile(
    r"(?P<of>.+?)[ _-](mask|masks|segmentation|seg|superpixels|contour|gt|groundtruth|ground_truth|thumb|thumbnail)"
    r"([ _-]?\d+)?",
    re.IGNORECASE,
)


def is_leftover(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or left by a system, a server or a program."""
    return name.startswith(".") or any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in _LEFTOVERS)


def is_beside_images(folder: Path, beside: Sequence[Path]) -> bool:
    """Whether a folder in a class folder says by its name that it holds something about the images: masks, previews.

    Args:
        beside: what lies there with it. "GT" may be a patient, unless its files are named after images there.
    """
    name = folder.name.lower()
    if not _INITIALS.fullmatch(name):
        return _BESIDE_IMAGES.fullmatch(name) is not None
    places = [entry for entry in beside if entry.is_dir() and _IMAGES.fullmatch(entry.name.lower())]
    images = {entry.stem for entry in beside if not entry.is_dir()}
    images |= {file.stem for place in places for file in place.iterdir()}
    own = [file.stem for file in folder.iterdir() if not is_leftover(file.name)]
    return images.issuperset(found["of"] if (found := _COMPANION.fullmatch(stem)) else stem for stem in own)


def companions(files: Sequence[Path]) -> set[Path]:
    """Those of the files of one folder that are a mask or a thumbnail of another one there, by their names."""
    stems = {file.stem for file in files}
    return {file for file in files if (found := _COMPANION.fullmatch(file.stem)) and found["of"] in stems}


def is_text(path: Path) -> bool:
    """Whether a file says by its name that it is something about the images: notes, tables, annotations, programs."""
    return path.suffix.lower() in _TEXTS or path.name.lower() in _NOTES


def listed(names: Iterable[str], shown: int = 5) -> str:
    """The first of many names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
