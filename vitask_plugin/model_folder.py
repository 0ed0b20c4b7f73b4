"""A folder with a whole model, as `vitask export` and `vitask merge` write it: which files it holds, whose it is."""

import shutil
from pathlib import Path

from vitask_plugin.errors import VITaskError
from vitask_plugin.files import check_contents, check_creatable, check_folder
from vitask_plugin.formats.json_text import read_json

CONFIG_FILE = "config.json"
NON_LORA_FILE = "non_lora_trainables.bin"  # what a LoRA run of LLaVA trained beside its adapter
ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
CONNECTOR_FILE = "vitask_connector.safetensors"
CALIBRATION_FILE = "calibration.json"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
)
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
_BESIDE = ("vitask.json", CONNECTOR_FILE, CALIBRATION_FILE)


def check_output(path: str | Path, mark: str) -> None:
    """Refuses an output folder that this command did not write itself.

    A model that somebody trained consists of files of the same names, so `mark`, a file that only the command writes,
    tells its own outputs from it.

    Raises:
        VITaskError: see `files.check_creatable` and `check_contents`.
    """
    check_creatable(path)
    weights = [found.name for pattern in _WEIGHTS for found in Path(path).glob(pattern)]
    own = (mark, CONFIG_FILE, "generation_config.json", *TOKENIZER_FILES, *PROCESSOR_FILES, *weights, *_BESIDE)
    check_contents(path, own)


def copy_files(source: str | Path, target: str | Path, names: tuple[str, ...]) -> None:
    """Copies those of the files that there are."""
    for name in names:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, Path(target) / name)


def saved_dtype(directory: str | Path) -> str:
    """The dtype that a model's `config.json` names for its weights; float32 where it names none."""
    path = Path(directory) / CONFIG_FILE
    config = read_json(path, "model configuration") if path.is_file() else {}
    return config.get("dtype") or config.get("torch_dtype") or "float32"


def has_adapter(directory: str | Path) -> bool:
    """Whether a folder is the output of a LoRA run."""
    return (Path(directory) / ADAPTER_CONFIG_FILE).is_file()


def check_checkpoint(directory: str | Path) -> None:
    """Refuses a folder with neither a model nor an adapter; of a `vitask run` it names the checkpoints in it.

    Raises:
        VITaskError: naming it; or there is no such folder.
    """
    check_folder(directory, "checkpoint")
    folder = Path(directory)
    if (folder / CONFIG_FILE).is_file() or has_adapter(folder):
        return
    inside = [path for path in sorted(folder.glob("*-vitask")) if (path / CONFIG_FILE).is_file() or has_adapter(path)]
    hint = " or ".join(repr(str(path)) for path in inside) or "the output folder of a training run"
    raise VITaskError(
        f"{str(directory)!r} is no checkpoint: it has no {CONFIG_FILE} and no {ADAPTER_CONFIG_FILE}; give {hint}"
    )


def base_of(directory: str | Path) -> str | None:
    """The model that an adapter names as its base; None without an adapter."""
    if not has_adapter(directory):
        return None
    found = read_json(Path(directory) / ADAPTER_CONFIG_FILE, "adapter configuration")
    return found.get("base_model_name_or_path") if isinstance(found, dict) else None
