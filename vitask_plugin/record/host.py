"""Which host a model's folder belongs to: its own files say it, never what the folder is called."""

from pathlib import Path

from vitask_plugin.formats.json_text import read_json
from vitask_plugin.model_folder import ADAPTER_CONFIG_FILE, CONFIG_FILE, NON_LORA_FILE

# LLaVA 1.2.2 writes one flat configuration that names a tower, transformers' own classes one for each part.
HOSTS = ("llava", "hf")
TOWER = "mm_vision_tower"
PARTS = ("vision_config", "text_config")


def host_of(path: str | Path) -> str | None:
    """`hf` or `llava`; None where the files do not tell, as those of an LLM alone.

    An adapter alone is the HF host's: upstream LLaVA writes more beside its own.
    """
    folder = Path(path)
    if (folder / NON_LORA_FILE).is_file():
        return "llava"
    if not (folder / CONFIG_FILE).is_file():
        return "hf" if (folder / ADAPTER_CONFIG_FILE).is_file() else None
    found = read_json(folder / CONFIG_FILE, "model configuration")
    if not isinstance(found, dict):
        return None
    if TOWER in found:
        return "llava"
    return "hf" if any(part in found for part in PARTS) else None
