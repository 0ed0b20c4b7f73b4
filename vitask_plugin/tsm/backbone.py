"""Any classifier as (pooled feature, patch features, logits), and how one is built from its source.

timm models are asked through `forward_features` and `forward_head`; of any other module the input of the last linear
layer is the pooled feature and the last activation with a spatial extent gives the patches.

Shapes: B = batch, S = image side, F = pooled width, P = patch width, N = patches, K = classes.
"""

import difflib
import importlib
import inspect
import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from vitask_plugin.errors import VITaskError

TIMM_OPTIONS = {"img_size"}  # all that `timm_options` gives


class Backbone(nn.Module):
    """A classifier whose inside can be seen.

    Args:
        network: pixels [B, 3, S, S] -> logits [B, K] (a tensor, or an object with `.logits`).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._splits = _splits_its_head(network)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels [B, 3, S, S] -> pooled [B, F], patches [B, N, P] (N = 0 where there are none), logits [B, K]."""
        if self._splits:
            features = self.network.forward_features(pixels)
            pooled = self.network.forward_head(features, pre_logits=True)
            logits = self.network.forward_head(features)
        else:
            pooled, features, logits = self._watch(pixels)
        if not isinstance(features, Tensor):
            return pooled, pooled.new_zeros(len(pooled), 0, 0), logits
        return pooled, _patches(features, self.network), logits

    def _watch(self, pixels: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """One forward with hooks: the last linear layer that runs, and the last spatial activation before it."""
        seen: dict[str, Tensor] = {}
        spatial: list[Tensor] = []

        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if isinstance(module, nn.Linear) and inputs[0].ndim == 2:
                seen["pooled"] = inputs[0]
            if isinstance(output, Tensor) and _extent(output) > 1:
                spatial[:] = [output]

        handles = [
            module.register_forward_hook(hook) for module in self.network.modules() if module is not self.network
        ]
        try:
            output = self.network(pixels)
        finally:
            for handle in handles:
                handle.remove()
        logits = output["logits"] if isinstance(output, Mapping) and "logits" in output else output
        logits = getattr(logits, "logits", logits)
        if not isinstance(logits, Tensor):
            raise VITaskError(
                f"the TSM {type(self.network).__name__} gives a {type(logits).__name__}; expected logits [B, K], or an "
                "object with them under `logits`, so wrap it in a module that returns those"
            )
        if "pooled" not in seen:
            raise VITaskError(
                f"the TSM {type(self.network).__name__} has no linear layer that takes one vector per image, so its "
                "feature is unknown; give it forward_features(pixels) and forward_head(features, pre_logits=False)"
            )
        return seen["pooled"], spatial[0] if spatial else None, logits


def _splits_its_head(network: nn.Module) -> bool:
    head = getattr(network, "forward_head", None)
    return (
        hasattr(network, "forward_features") and head is not None and "pre_logits" in inspect.signature(head).parameters
    )


def _extent(activation: Tensor) -> int:
    """Places in an activation: H*W of [B, C, H, W], N of [B, N, C], 1 of anything else."""
    if activation.ndim == 4:
        return activation.shape[2] * activation.shape[3]
    return activation.shape[1] if activation.ndim == 3 else 1


def _patches(features: Tensor, network: nn.Module) -> Tensor:
    """Unpooled features of any layout -> [B, N, P], without class and register tokens."""
    if features.ndim == 4:
        # timm says where the channels are; everything else is taken as channels first.
        channels_last = str(getattr(network, "output_fmt", "NCHW")).endswith("NHWC")
        return features.flatten(1, 2) if channels_last else features.flatten(2).transpose(1, 2)
    if features.ndim == 3:
        return features[:, _prefix_tokens(features.shape[1], network) :]
    return features.new_zeros(len(features), 0, 0)


def _prefix_tokens(length: int, network: nn.Module) -> int:
    """How many tokens come before the patches: as the network says, else one if only then the patches form a square."""
    if hasattr(network, "num_prefix_tokens"):
        return network.num_prefix_tokens
    if getattr(network, "cls_token", None) is not None:
        return 1
    return int(round(length**0.5) ** 2 != length and round((length - 1) ** 0.5) ** 2 == length - 1)


def build_network(source: Mapping[str, Any], classes: int) -> nn.Module:
    """The untrained network of a source: {"timm": name, "options": {...}} or {"module": "pkg.mod:factory"}.

    Raises:
        VITaskError: if the name is unknown, or what it names is not a network.
    """
    if "timm" in source:
        return build_timm(source["timm"], classes, source.get("options", {}))
    return _build_module(source["module"])


def build_timm(name: str, classes: int, options: Mapping[str, Any], pretrained: bool = False) -> nn.Module:
    """A timm classifier with a fresh head of `classes` outputs.

    Raises:
        VITaskError: if timm has no such model, does not take the options, or cannot reach pretrained weights.
    """
    import timm

    if not timm.is_model(name):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() lists them"
        raise VITaskError(f"timm has no model {name!r}; {hint}")
    try:
        if pretrained and not timm.models.get_pretrained_cfg(name).has_weights:
            raise VITaskError(f"timm has no pretrained weights for {name!r}; leave --pretrained out")
        return timm.create_model(name, pretrained=pretrained, num_classes=classes, **options)
    except (TypeError, VITaskError):
        raise
    except Exception as error:
        if not pretrained:
            raise VITaskError(f"timm cannot build {name!r} with {dict(options)!r} ({_line(error)})") from error
        raise VITaskError(
            f"the pretrained weights of {name!r} cannot be had ({_line(error)}); connect to the network, "
            "or leave --pretrained out to train from scratch"
        ) from error


def head_names(network: nn.Module) -> list[str]:
    """Names of a timm network's last weights and biases, of which a class is a row; it need not have all of them."""
    names = network.pretrained_cfg.get("classifier") or ()
    return [f"{name}.{part}" for name in ([names] if isinstance(names, str) else names) for part in ("weight", "bias")]


def timm_options(name: str, classes: int, image_size: int | None) -> dict[str, int]:
    """The options under which `name` takes images of this size: `img_size` where the architecture has one.

    Raises:
        VITaskError: if the size is not a multiple of the patches.
    """
    if image_size is None:
        return {}
    options = {"img_size": image_size}
    try:
        network = build_timm(name, classes, options)
    except TypeError:  # convolutional networks take any size and no such option
        return {}
    patch = getattr(getattr(network, "patch_embed", None), "patch_size", None)
    side = patch[0] if isinstance(patch, (tuple, list)) else patch
    if side and image_size % side:
        raise VITaskError(
            f"{name!r} cuts images into patches of {side} pixels, which does not divide --image-size {image_size}; "
            f"use a multiple of {side}"
        )
    return options


def _build_module(path: str) -> nn.Module:
    name, _, attribute = path.partition(":")
    words = [*name.split("."), attribute]
    if not all(map(str.isidentifier, words)) or words[0] in sys.stdlib_module_names:
        raise VITaskError(f"TSM module {path!r} is not of the form package.module:factory")
    try:
        factory = getattr(importlib.import_module(name), attribute)
    except (ImportError, AttributeError) as error:
        raise VITaskError(
            f"TSM module {path!r} cannot be imported ({error}); install it or put its folder on PYTHONPATH"
        ) from None
    except Exception as error:  # of somebody else's code
        raise VITaskError(f"TSM module {path!r} ends with {_named(error)} when imported; fix it") from error
    try:
        network = factory()
    except Exception as error:
        raise VITaskError(
            f"TSM module {path!r} ends with {_named(error)}; it must give the network when called without arguments"
        ) from error
    if not isinstance(network, nn.Module):
        raise VITaskError(f"TSM module {path!r} gives a {type(network).__name__}, expected a torch.nn.Module")
    return network


def _named(error: Exception) -> str:
    return f"{type(error).__name__} ({_line(error)})"


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def pixel_statistics(network: nn.Module) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel (of pixels in 0..1) that a timm model was made for."""
    import timm

    config = timm.data.resolve_model_data_config(network)
    return list(config["mean"]), list(config["std"])


def native_image_size(network: nn.Module) -> int:
    """Side of the images a timm model was made for, in pixels."""
    return int(network.pretrained_cfg["input_size"][-1])
