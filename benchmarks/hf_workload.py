"""What `step_cost.py --host hf` measures on: a model of each family, scaled until its shares mean something.

The family's tiny model (`hf/tiny.py`) gives tokenizer, processor and configuration; decoder, vision tower and image are
then brought to the benchmark's sizes. How many tokens an image takes is the family's: one grid, tiles, or the image's
own size, always near `--image-tokens`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import AutoConfig, AutoProcessor
from workload import TEXTS, VARIANTS, Batches, Settings, Variant, Workload, lengthened, unlengthened, write_data

from vitask_plugin.hf import loading
from vitask_plugin.hf.batch import PlainBatches, VITaskCollator, VITaskDataset
from vitask_plugin.hf.conversation import Template
from vitask_plugin.hf.tiny import make_tiny

TILES = 4  # of an InternVL image, beside the one of the whole
WINDOW = 4  # tokens a side that see each other in Qwen2.5's tower, as in the released ones
MERGED = 2  # patches a side that Qwen and InternVL make one token of


@dataclass(frozen=True)
class Grid:
    """`side` x `side` image tokens, of patches of `patch` pixels a side."""

    side: int
    patch: int

    def tile(self, merged: int = 1) -> int:
        """Pixels a side where `merged` x `merged` patches give a token."""
        return self.side * merged * self.patch


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def _llava(config: Any, processor: Any, grid: Grid) -> int:
    config.vision_config.image_size, config.vision_config.patch_size = grid.tile(), grid.patch
    config.image_seq_length = grid.side**2
    processor.patch_size = grid.patch
    images = processor.image_processor
    images.size, images.crop_size = {"shortest_edge": grid.tile()}, _square(grid.tile())
    return grid.tile()


def _llava_onevision(config: Any, processor: Any, grid: Grid) -> int:
    """The whole image and one tile, half of the tokens each."""
    side = math.isqrt(grid.side**2 // 2)
    tile = side * grid.patch
    config.vision_config.image_size, config.vision_config.patch_size = tile, grid.patch
    config.image_grid_pinpoints = processor.image_processor.image_grid_pinpoints = [[tile, tile]]
    processor.image_processor.size = _square(tile)
    processor.num_image_tokens = side**2
    return tile


def _internvl(config: Any, processor: Any, grid: Grid) -> int:
    side = math.isqrt(grid.side**2 // (TILES + 1))
    tile = side * MERGED * grid.patch
    config.vision_config.image_size, config.vision_config.patch_size = [tile] * 2, [grid.patch] * 2
    config.image_seq_length = processor.image_seq_length = side**2
    processor.image_processor.size = _square(tile)
    return tile * math.isqrt(TILES)


def _qwen(config: Any, processor: Any, grid: Grid) -> int:
    pixels = grid.tile(MERGED) ** 2
    if hasattr(config.vision_config, "window_size"):
        config.vision_config.window_size = WINDOW * MERGED * grid.patch
    config.vision_config.patch_size = processor.image_processor.patch_size = grid.patch
    processor.image_processor.size = {"shortest_edge": pixels // 4, "longest_edge": 4 * pixels}
    return grid.tile(MERGED)


def _gemma3(config: Any, processor: Any, grid: Grid) -> int:
    """No pooling, and a window shorter than a sample."""
    config.vision_config.image_size, config.vision_config.patch_size = grid.tile(), grid.patch
    config.mm_tokens_per_image = processor.image_seq_length = grid.side**2
    processor.image_processor.size = _square(grid.tile())
    config.get_text_config().sliding_window = grid.side**2 // 2
    return grid.tile()


# Family -> what brings its image to a grid, and returns the pixels a side of such an image
SCALED: dict[str, Callable[[Any, Any, Grid], int]] = {
    "llava": _llava,
    "llava_onevision": _llava_onevision,
    "internvl": _internvl,
    "qwen2_5_vl": _qwen,
    "qwen3_vl": _qwen,
    "gemma3": _gemma3,
}
PATCH = 8  # pixels


@dataclass
class HfWorkload(Workload):
    """Files of one family. Its folder `model` holds no weights that are used."""

    family: str

    @property
    def config(self) -> Any:
        return AutoConfig.from_pretrained(self.directory / "model")

    def template(self) -> Template:
        return loading.load_template(str(self.directory / "model"), self.config)


def make_workload(settings: Settings, directory: Path, family: str) -> HfWorkload:
    """Writes a family's configuration and processor, and the data of `workload.write_data`."""
    workload, model = HfWorkload(directory, settings, family), directory / "model"
    make_tiny(model, family=family, texts=TEXTS, seed=0, hidden_size=settings.hidden, layers=settings.layers)
    config, processor = workload.config, AutoProcessor.from_pretrained(model)
    text, tower = config.get_text_config(), config.vision_config
    text.vocab_size, text.intermediate_size = settings.vocabulary, settings.intermediate
    text.max_position_embeddings = 4096
    tower.hidden_size, tower.intermediate_size = settings.vision_hidden, 2 * settings.vision_hidden
    side = SCALED[family](config, processor, Grid(math.isqrt(settings.image_tokens), PATCH))
    config.save_pretrained(model)
    processor.save_pretrained(model)
    template, image = workload.template(), Image.new("RGB", (side, side))

    def text_tokens(one: dict[str, Any]) -> int:
        found = template.encode(one["conversations"], [image])
        return len(found.ids) - found.end

    write_data(directory, lengthened(unlengthened(balanced=False), text_tokens, settings.continuation), side)
    return workload


class HfBatches(Batches):
    """Batches of one family."""

    workload: HfWorkload

    def make_dataset(self) -> VITaskDataset:
        workload = self.workload
        return VITaskDataset(
            str(workload.directory / "train.json"),
            str(workload.directory / "images"),
            workload.template(),
            4096,  # nothing is cut
            workload.arguments(VARIANTS["stage2_packed"]),
        )

    def collator(self, variant: Variant) -> Any:
        pad = self.dataset.tokenizer.pad_token_id
        if variant.stage is None:
            return PlainBatches(pad)
        return VITaskCollator(self.dataset, self.exemplars, self.workload.arguments(variant), pad=pad)

    def lengths(self, item: dict[str, Any]) -> tuple[int, int]:
        images = int((item["input_ids"] == self.dataset.template.image_id).sum())
        return item["end"] - images, len(item["input_ids"]) - item["end"]

    def geometry(self) -> dict[str, Any]:
        """As asked, and how many tokens an image has become."""
        images = int((self._items[0]["input_ids"] == self.dataset.template.image_id).sum())
        return {**super().geometry(), "image_tokens": images}
