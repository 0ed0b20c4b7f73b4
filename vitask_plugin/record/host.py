"""Which host a model's folder belongs to: its own `config.json` says it, never what the folder is called."""

from pathlib import Path

from vitask_plugin.files import read_json
from vitask_plugin.record.checkpoint import has_adapter

CONFIG = "config.json"
# LLaVA 1.2.2 writes one flat configuration, transformers' own classes one for each part.
PARTS = ("vision_config", "text_config")


def host_of(path: str | Path) -> str:
    """`hf` or `llava`; where nothing can be read it is the first host, which then says what is wrong.

    An adapter alone is the HF host's: upstream LLaVA writes its configuration beside its own.
    """
    config = Path(path) / CONFIG
    if not config.is_file():
        return "hf" if has_adapter(path) else "llava"
    found = read_json(config, "model configuration")
    return "hf" if isinstance(found, dict) and any(part in found for part in PARTS) else "llava"
