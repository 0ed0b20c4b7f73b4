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
    r"(ground[ _-]?truths?|gts?|annotations?|segmentations?|(lesion|lung|infection)?[ _-]?masks?|thumbnails?|thumbs)"
)
# "benign (3)_mask_1", beside "benign (3)".
_COMPANION = re.compile(
    r"(?P<of>.+?)[ _-](mask|masks|segmentation|seg|superpixels|contour|gt|groundtruth|ground_truth|thumb|thumbnail)"
    r"([ _-]?\d+)?",
    re.IGNORECASE,
)


def is_leftover(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or left by a system, a server or a program."""
    return name.startswith(".") or any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in _LEFTOVERS)


def is_beside_images(name: str) -> bool:
    """Whether a folder in a class folder says by its name that it holds something about the images: masks, previews."""
    return _BESIDE_IMAGES.fullmatch(name.lower()) is not None


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
