"""The task-specific model: a frozen classifier of any architecture, and what is known about it.

Shapes: B = batch, S = image side in pixels, F = width of the pooled feature, P = width of a patch feature,
N = patches, K_all = columns of the shared head (see `joint`), K = classes of one task.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vitask_plugin.data.comparison import Seen
from vitask_plugin.data.images import to_rgb
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import atomic_path, write_json
from vitask_plugin.tsm.backbone import TIMM_OPTIONS, Backbone, build_network
from vitask_plugin.tsm.epoch_log import LOG_FILE
from vitask_plugin.tsm.joint import class_count, columns
from vitask_plugin.tsm.record_format import FORMAT, RECORD
from vitask_plugin.tsm.tensors import fault
from vitask_plugin.tsm.trust import check_code

RECORD_FILE = "tsm.json"
WEIGHTS_FILE = "tsm.safetensors"
METRICS_FILE = "metrics.json"
FOLDS = "folds"
OUTPUT_FILES = (RECORD_FILE, WEIGHTS_FILE, METRICS_FILE, LOG_FILE, FOLDS)
TOKENS = ("cls", "all")


class TSMOutput(NamedTuple):
    """What the TSM says about a batch, all float32.

    Attributes:
        pooled: [B, F], the input of the classifier's last layer.
        patches: [B, N, P], one feature per image region; N = 0 where the architecture shows none.
        logits: [B, K_all].
    """

    pooled: Tensor
    patches: Tensor
    logits: Tensor


class TSM(nn.Module):
    """A frozen classifier with its record. Always in evaluation mode, without gradients, in float32.

    Args:
        network: classifier, pixels [B, 3, S, S] -> logits [B, K_all].
        record: `source` ({"timm": name, "options": {...}} or {"module": "pkg.mod:factory"}), `image_size` (S),
            `mean`, `std` (per channel, of pixels in 0..1) and `tasks` (of `joint.arranged`: {task: {"choices",
            "multi_label", "first_column"}}; without the last, in the order of the head's columns); of a TSM trained
            here also `images`, what it was trained on (see `data.preparation`), `temperature` (of `temperature.fitted`)
            and, after `--folds`, `folds` (of `cross_fitting`). The widths are measured and added.

    Raises:
        VITaskError: if the head's width is not the number of classes, or a weight is none (see `tensors.fault`).
    """

    def __init__(self, network: nn.Module, record: Mapping[str, Any]) -> None:
        super().__init__()
        found = fault(network.state_dict(keep_vars=True))
        if found is not None:
            raise VITaskError(f"the TSM {_source_name(record['source'])} has a weight that cannot be used: {found}")
        self.backbone = Backbone(network.float())
        self.requires_grad_(False).eval()
        self.record: dict[str, Any] = {"format": FORMAT, **json.loads(json.dumps(record))}
        self._measure()

    def _measure(self) -> None:
        side = self.record["image_size"]
        try:
            output = self(torch.zeros(1, 3, side, side, device=self.device))
        except VITaskError:
            raise
        except Exception as error:
            raise VITaskError(
                f"the TSM {_source_name(self.record['source'])} cannot take a {side}x{side} RGB image "
                f"({str(error).splitlines()[0]}); give the --image-size it was made for"
            ) from error
        classes = class_count(self.record["tasks"])
        if output.logits.ndim != 2 or output.logits.shape[1] != classes:
            tasks = ", ".join(f"{name} ({len(task['choices'])})" for name, task in self.record["tasks"].items())
            raise VITaskError(
                f"the head of the TSM {_source_name(self.record['source'])} gives {_shape(output.logits)} logits, "
                f"but its tasks, {tasks}, have {classes} classes together; the two must be equal"
            )
        self.record["feature_width"] = output.pooled.shape[1]
        self.record["patch_count"] = output.patches.shape[1]
        self.record["patch_width"] = output.patches.shape[2]

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def hash(self) -> str:
        """Hex SHA-256 over the record and every tensor of the state: name, dtype, shape and bytes.

        `images` and `temperature` of the record do not count: they change nothing that it computes. `folds` do: they
        change what is extracted.

        Of a `module` TSM the record names the factory; the factory's code is not covered, so a change of it goes
        unnoticed as long as the weights still fit.
        """
        computing = {key: value for key, value in self.record.items() if key not in ("images", "temperature")}
        digest = hashlib.sha256(json.dumps(computing).encode())
        for name, tensor in sorted(self._state().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @property
    def trained_on(self) -> Seen:
        """The images of its training, for `data.comparison.check_prepared`."""
        return trained_on(self.record, self.hash)

    def train(self, mode: bool = True) -> "TSM":
        """Stays in evaluation mode, also when it is part of a model that is trained."""
        return super().train(False)

    def preprocess(self, image: Image.Image) -> Tensor:
        """Any PIL image -> normalised pixels [3, S, S] float32: RGB, the whole picture resized (bicubic), no crop."""
        return self.preprocessing()(image)

    def preprocessing(self) -> Callable[[Image.Image], Tensor]:
        """`preprocess` without the weights, for worker processes."""
        return partial(
            preprocess, image_size=self.record["image_size"], mean=self.record["mean"], std=self.record["std"]
        )

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> TSMOutput:
        """Pixels [B, 3, S, S] -> features and logits. An autocast around it has no effect: the features that were
        extracted for training and those of inference must agree."""
        with torch.autocast(pixels.device.type, enabled=False):
            output = self.backbone(pixels.to(next(self.parameters()).dtype))
        return TSMOutput(*(tensor.float() for tensor in output))

    def tokens(self, output: TSMOutput, kind: str) -> Tensor:
        """The features an exemplar is made of: `cls` -> [B, 1, F]; `all` -> [B, N, P].

        Raises:
            VITaskError: `all` of an architecture without patch features, or an unknown kind.
        """
        self.check_tokens(kind)
        return output.pooled[:, None] if kind == "cls" else output.patches

    def check_tokens(self, kind: str) -> None:
        """Refuses a kind of token that this TSM does not have."""
        if kind not in TOKENS:
            raise VITaskError(f"TSM tokens {kind!r} are unknown; choose one of {', '.join(TOKENS)}")
        if kind == "all" and not self.record["patch_count"]:
            raise VITaskError(
                f"the TSM {_source_name(self.record['source'])} shows no patch features, "
                "so 'all' is not possible with it; use 'cls'"
            )

    def columns(self, task: str) -> slice:
        """The columns of the shared head that belong to `task`.

        Raises:
            VITaskError: if the TSM was not made for this task.
        """
        return columns(self.record["tasks"], task)

    def probabilities(self, logits: Tensor, task: str, *, calibrated: bool = False) -> Tensor:
        """Class probabilities [B, K] from logits [B, K_all]: softmax over the task's own classes, or one sigmoid per
        class of a multi-label task.

        Args:
            calibrated: at the temperature that was fitted on the validation data.

        Raises:
            VITaskError: `calibrated`, of a TSM without a temperature.
        """
        if calibrated and "temperature" not in self.record:
            raise VITaskError(
                f"the TSM {_source_name(self.record['source'])} has no temperature; `vitask tsm train` fits one"
            )
        own = logits[:, self.columns(task)]
        if calibrated:
            own = own / self.record["temperature"]["value"]
        return own.sigmoid() if self.record["tasks"][task]["multi_label"] else own.softmax(dim=-1)

    def _state(self) -> dict[str, Tensor]:
        # Clones: safetensors refuses tensors that share memory (tied weights).
        return {name: value.detach().cpu().contiguous().clone() for name, value in self._network.state_dict().items()}

    @property
    def _network(self) -> nn.Module:
        return self.backbone.network

    def save(self, directory: str | Path) -> None:
        """Writes `tsm.safetensors` and `tsm.json` (record and hash) into `directory`."""
        directory = Path(directory)
        with atomic_path(directory / WEIGHTS_FILE) as path:
            save_file(self._state(), path)
        write_json(directory / RECORD_FILE, {**self.record, "sha256": self.hash})

    @classmethod
    def load(cls, directory: str | Path, device: str | torch.device = "cpu", *, trust_code: bool = False) -> "TSM":
        """The TSM that `save` wrote.

        Args:
            trust_code: import the Python module that the record of a `module` TSM names. The caller's word, never the
                folder's: give it for code that you have read or written.

        Raises:
            VITaskError: if a file is missing, truncated, or does not belong to the other, if the record has options
                for timm beyond the image size, or if it names Python code that is not trusted.
        """
        directory = Path(directory)
        record = read_tsm_record(directory)
        check_code(record["source"], directory, trusted=trust_code)
        options = record["source"].get("options", {})
        if not isinstance(options, dict) or not options.keys() <= TIMM_OPTIONS:
            # timm takes more, such as `checkpoint_path`, which makes it load any file.
            raise VITaskError(
                f"TSM record {str(directory / RECORD_FILE)!r} has the timm options {options!r}; "
                f"only {', '.join(TIMM_OPTIONS)} is allowed, so write the TSM again"
            )
        sha256 = record.pop("sha256", None)
        network = build_network(record["source"], class_count(record["tasks"]))
        weights = directory / WEIGHTS_FILE
        try:
            network.load_state_dict(load_file(weights))
        except FileNotFoundError:
            raise VITaskError(f"TSM weights {str(weights)!r} do not exist; copy the whole TSM folder") from None
        except (SafetensorError, OSError) as error:
            raise VITaskError(
                f"TSM weights {str(weights)!r} are damaged ({error}); copy or train the TSM again"
            ) from None
        except RuntimeError as error:
            raise VITaskError(
                f"TSM weights {str(weights)!r} do not fit {_source_name(record['source'])} "
                f"({' '.join(str(error).split())[:200]}); copy or train the TSM again"
            ) from None
        tsm = cls(network, record)
        if tsm.hash != sha256:
            raise VITaskError(
                f"TSM {str(directory)!r}: {RECORD_FILE} and {WEIGHTS_FILE} do not belong together or were changed "
                f"(hash {tsm.hash[:12]}, recorded {str(sha256)[:12]}); copy or train the TSM again"
            )
        return tsm.to(device)


def read_tsm_record(directory: str | Path) -> dict[str, Any]:
    """`tsm.json` of a TSM folder; nothing else is read, imported or built.

    Raises:
        VITaskError: absent, or not such a record.
    """
    return RECORD.read(Path(directory) / RECORD_FILE, "TSM record")


def trained_on(record: Mapping[str, Any], sha256: str) -> Seen:
    """See `TSM.trained_on`; of its record alone."""
    tasks = {task: entry["choices"] for task, entry in record["tasks"].items()}
    return Seen(f"TSM {sha256[:12]} was trained", record.get("images"), tasks)


def preprocess(image: Image.Image, image_size: int, mean: list[float], std: list[float]) -> Tensor:
    """See `TSM.preprocess`."""
    resized = to_rgb(image).resize((image_size, image_size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def _shape(logits: Tensor) -> str:
    return "x".join(str(size) for size in logits.shape[1:])


def _source_name(source: Mapping[str, Any]) -> str:
    return repr(source.get("timm") or source.get("module"))
