"""What is known of the model that was tuned: its name without the places of this machine, and its licence."""

import re
from pathlib import Path

import yaml
from huggingface_hub import metadata_load, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from vitask_plugin.sharing.facts import BaseModel, read_facts

# Where the Hub's own cache keeps a model.
_CACHED = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/")


def base_model(path: str) -> BaseModel:
    """Nothing is downloaded: the licence is that of the model's card in its folder, or in the Hub's cache.

    Args:
        path: a folder, or a name on the Hub, which is taken for one where the Hub's cache has it.
    """
    folder = Path(path)
    if folder.is_dir():
        earlier = read_facts(folder)  # an earlier stage, which was trained from something itself
        if earlier is not None:
            return earlier.base
        cached = _CACHED.search(f"{folder.absolute().as_posix()}/")
        hub = f"{cached['owner']}/{cached['name']}" if cached else None
        return BaseModel(hub or folder.resolve().name, hub, _license(folder / "README.md"))
    if folder.is_absolute() or path.count("/") != 1:
        return BaseModel(folder.name)
    try:
        # A folder `models/llava` that is not there from here looks like a name too.
        known, card = (try_to_load_from_cache(path, name) for name in ("config.json", "README.md"))
    except HFValidationError:
        return BaseModel(folder.name)
    if not isinstance(known, str):
        return BaseModel(folder.name)
    return BaseModel(path, path, _license(Path(card)) if isinstance(card, str) else None)


def _license(card: Path) -> str | None:
    """The Hub's word for it, None where there is no card, or it has none."""
    try:
        found = metadata_load(card) if card.is_file() else None
    except (ValueError, OSError, yaml.YAMLError):
        return None
    license = (found or {}).get("license")
    return license if isinstance(license, str) and license != "unknown" else None
