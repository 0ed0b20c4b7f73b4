"""What each family of tiny vision-language models is made of: its configuration and its processor.

One pair of functions a family. What makes the family special is in its configuration, in small; word embeddings are
tied where a released model of the family ties them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

WINDOW = 8  # positions; smaller than a usual prompt
HEADS, KEY_HEADS = 4, 2

Token = Callable[[str], int]  # gives a token's id


@dataclass(frozen=True)
class Sizes:
    hidden: int
    layers: int
    side: int  # of an image or of one tile, in pixels

    @property
    def patch(self) -> int:
        return self.side // 4


@dataclass(frozen=True)
class Family:
    model_type: str
    config: Callable[[Sizes, Token], dict[str, Any]]
    processor_class: str
    processor: Callable[[Sizes], dict[str, Any]]  # what the class takes besides the tokenizer


def _decoder(sizes: Sizes, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": sizes.hidden,
        "intermediate_size": 2 * sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "max_position_embeddings": 2048,
        **more,
    }


def _tower(sizes: Sizes, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": sizes.hidden,
        "intermediate_size": 2 * sizes.hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "image_size": sizes.side,
        "patch_size": sizes.patch,
        **more,
    }


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def _llava_config(sizes: Sizes, token: Token, **decoder: Any) -> dict[str, Any]:
    return {
        "text_config": _decoder(sizes, **{"model_type": "llama", **decoder}),
        # One layer more than the others: the layer before the last is read.
        "vision_config": _tower(
            sizes, model_type="clip_vision_model", num_hidden_layers=3, projection_dim=sizes.hidden
        ),
        "image_token_index": token("<image>"),
        "image_seq_length": 16,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
    }


def _mistral_window_config(sizes: Sizes, token: Token) -> dict[str, Any]:
    return _llava_config(sizes, token, model_type="mistral", sliding_window=WINDOW)


def _llava_processor(sizes: Sizes) -> dict[str, Any]:
    import transformers

    size = {"shortest_edge": sizes.side}
    return {
        "image_processor": transformers.CLIPImageProcessor(size=size, crop_size=_square(sizes.side)),
        "patch_size": sizes.patch,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,  # the class token, which the strategy leaves out again
    }


def _grid(sizes: Sizes) -> list[list[int]]:
    """Heights and widths that an image may be brought to: one tile, or two beside or below each other."""
    return [[sizes.side, sizes.side], [sizes.side, 2 * sizes.side], [2 * sizes.side, sizes.side]]


def _llava_onevision_config(sizes: Sizes, token: Token) -> dict[str, Any]:
    return {
        "text_config": _decoder(sizes, model_type="qwen2"),
        "vision_config": _tower(sizes, model_type="siglip_vision_model", vision_use_head=False),
        "image_token_index": token("<image>"),
        "video_token_index": token("<video>"),
        "image_grid_pinpoints": _grid(sizes),
        "tie_word_embeddings": False,
    }


def _llava_onevision_processor(sizes: Sizes) -> dict[str, Any]:
    import transformers

    size = _square(sizes.side)
    return {
        "image_processor": transformers.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=_grid(sizes)),
        "video_processor": transformers.LlavaOnevisionVideoProcessor(size=size),
        "num_image_tokens": 16,  # of one tile
        "vision_feature_select_strategy": "full",
    }


def _internvl_config(sizes: Sizes, token: Token) -> dict[str, Any]:
    return {
        "text_config": _decoder(sizes, model_type="qwen2"),
        "vision_config": _tower(sizes, model_type="internvl_vision"),
        "image_token_id": token("<IMG_CONTEXT>"),
        "image_seq_length": 4,
        "tie_word_embeddings": True,
    }


def _internvl_processor(sizes: Sizes) -> dict[str, Any]:
    import transformers

    size = _square(sizes.side)
    tiles = {"crop_to_patches": True, "min_patches": 1, "max_patches": 4}
    return {
        "image_processor": transformers.GotOcr2ImageProcessor(size=size, **tiles),
        "video_processor": transformers.InternVLVideoProcessor(size=size),
        "image_seq_length": 4,  # of one tile: 16 patches, four of them in one token
    }


def _qwen_config(sizes: Sizes, token: Token, *, decoder: dict, tower: dict, tied: bool) -> dict[str, Any]:
    return {
        "text_config": _decoder(sizes, **decoder),
        "vision_config": {
            "hidden_size": sizes.hidden,
            "intermediate_size": 2 * sizes.hidden,
            "num_heads": HEADS,
            "patch_size": sizes.patch,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": sizes.hidden,
            **tower,
        },
        "image_token_id": token("<|image_pad|>"),
        "video_token_id": token("<|video_pad|>"),
        "vision_start_token_id": token("<|vision_start|>"),
        "vision_end_token_id": token("<|vision_end|>"),
        "tie_word_embeddings": tied,
    }


def _qwen2_5_vl_config(sizes: Sizes, token: Token) -> dict[str, Any]:
    eighth = sizes.hidden // HEADS // 16  # of the turned pairs of a head
    scaling = {"rope_type": "default", "mrope_section": [2 * eighth, 3 * eighth, 3 * eighth]}
    decoder = {"rope_theta": 1000000.0, "rope_scaling": scaling}
    # A window of one merged patch, and full attention in the second layer alone.
    tower = {"depth": 2, "window_size": 2 * sizes.patch, "fullatt_block_indexes": [1]}
    return _qwen_config(sizes, token, decoder=decoder, tower=tower, tied=False)


def _qwen3_positions(pairs: int) -> dict[str, Any]:
    """Time, height and width in turns over the `pairs` of a head's dimensions that are turned, a multiple of 4."""
    sections = [pairs // 2, pairs // 4, pairs // 4]
    scaling = {"rope_type": "default", "mrope_section": sections, "mrope_interleaved": True}
    return {"rope_theta": 500000.0, "rope_scaling": scaling}


def _qwen3_vl_config(sizes: Sizes, token: Token) -> dict[str, Any]:
    head = sizes.hidden // HEADS
    decoder = {"head_dim": head, **_qwen3_positions(head // 2)}
    # What the first two layers of the tower see goes into the first two of the decoder.
    tower = {"depth": 3, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    return _qwen_config(sizes, token, decoder=decoder, tower=tower, tied=True)


def _qwen3_5_config(sizes: Sizes, token: Token) -> dict[str, Any]:
    decoder = {
        "head_dim": 32,
        "partial_rotary_factor": 0.25,
        **_qwen3_positions(4),
        "layer_types": [("linear_attention", "full_attention")[index % 2] for index in range(sizes.layers)],
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    }
    tower = {"depth": 2, "num_position_embeddings": 64}
    return _qwen_config(sizes, token, decoder=decoder, tower=tower, tied=False)


def _qwen_processor(sizes: Sizes, video_processor: str = "Qwen3VLVideoProcessor") -> dict[str, Any]:
    import transformers

    patches = {"patch_size": sizes.patch, "merge_size": 2, "temporal_patch_size": 2}
    smallest, largest = sizes.side**2, 9 * sizes.side**2  # numbers of pixels
    size = {"shortest_edge": smallest, "longest_edge": largest}
    return {
        # Under transformers 4, `size` alone is lost when the processor is loaded again.
        "image_processor": transformers.Qwen2VLImageProcessor(min_pixels=smallest, max_pixels=largest, **patches),
        "video_processor": getattr(transformers, video_processor)(size=size, **patches),
    }


def _qwen2_5_vl_processor(sizes: Sizes) -> dict[str, Any]:
    return _qwen_processor(sizes, "Qwen2VLVideoProcessor")


def _gemma3_config(sizes: Sizes, token: Token) -> dict[str, Any]:
    return {
        "text_config": _decoder(
            sizes,
            head_dim=sizes.hidden // HEADS,
            query_pre_attn_scalar=sizes.hidden // HEADS,
            sliding_window=WINDOW,
            layer_types=[("sliding_attention", "full_attention")[index % 2] for index in range(sizes.layers)],
        ),
        # 64 patches, pooled to 16 tokens: more than the window.
        "vision_config": _tower(
            sizes, model_type="siglip_vision_model", image_size=8 * sizes.patch, vision_use_head=False
        ),
        "mm_tokens_per_image": 16,
        "boi_token_index": token("<start_of_image>"),
        "eoi_token_index": token("<end_of_image>"),
        "image_token_index": token("<image_soft_token>"),
        "tie_word_embeddings": True,
    }


def _gemma3_processor(sizes: Sizes) -> dict[str, Any]:
    import transformers

    return {
        "image_processor": transformers.Gemma3ImageProcessor(size=_square(8 * sizes.patch)),
        "image_seq_length": 16,
    }


def _paligemma_config(sizes: Sizes, token: Token) -> dict[str, Any]:
    return {
        "text_config": _decoder(sizes, model_type="gemma", head_dim=sizes.hidden // HEADS, num_key_value_heads=1),
        "vision_config": _tower(sizes, model_type="siglip_vision_model", vision_use_head=False),
        "image_token_index": token("<image>"),
        "projection_dim": sizes.hidden,
        "hidden_size": sizes.hidden,
        "tie_word_embeddings": True,
    }


def _paligemma_processor(sizes: Sizes) -> dict[str, Any]:
    import transformers

    image_processor = transformers.SiglipImageProcessor(size=_square(sizes.side))
    image_processor.image_seq_length = 16
    return {"image_processor": image_processor}


TABLE = {
    "llava": Family("llava", _llava_config, "LlavaProcessor", _llava_processor),
    "llava_onevision": Family(
        "llava_onevision", _llava_onevision_config, "LlavaOnevisionProcessor", _llava_onevision_processor
    ),
    "internvl": Family("internvl", _internvl_config, "InternVLProcessor", _internvl_processor),
    "qwen2_5_vl": Family("qwen2_5_vl", _qwen2_5_vl_config, "Qwen2_5_VLProcessor", _qwen2_5_vl_processor),
    "qwen3_vl": Family("qwen3_vl", _qwen3_vl_config, "Qwen3VLProcessor", _qwen_processor),
    "gemma3": Family("gemma3", _gemma3_config, "Gemma3Processor", _gemma3_processor),
    "qwen3_5": Family("qwen3_5", _qwen3_5_config, "Qwen3VLProcessor", _qwen_processor),
    "paligemma": Family("paligemma", _paligemma_config, "PaliGemmaProcessor", _paligemma_processor),
    "mistral_window": Family("llava", _mistral_window_config, "LlavaProcessor", _llava_processor),
}
