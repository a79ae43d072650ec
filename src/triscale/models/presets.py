"""Dual encoders of the literature, and two that train on a CPU, by name. Imports no torch.

docs/models.md compares their parameters with the papers' figures.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from triscale.errors import UsageError
from triscale.models.settings import ModelSettings


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A dual encoder and what of the data its towers are made for."""

    model: ModelSettings
    """The towers."""
    image_size: int
    """Side of the images, in pixels."""
    tokens: int
    """Length of a token row."""
    vocabulary: int
    """Number of token ids."""


def _basic(image: str, *, width: int, layers: int, heads: int) -> Preset:
    """Pham et al., arXiv 2111.10050, section on models.

    LayerNorm for BatchNorm, so that micro-batches of any size give the same gradient. Heads and the width of the
    embedding are no published figures.
    """
    model = ModelSettings(
        image=image,
        batch_norm="layer_norm",
        text_width=width,
        text_layers=layers,
        text_heads=heads,
        embedding=width,
    )
    return Preset(model=model, image_size=224, tokens=64, vocabulary=32_000)


CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Mean of red, green and blue over CLIP's images, from its code."""
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Their standard deviation."""


def _clip(image: str, *, width: int, embedding: int, bias: bool = False) -> Preset:
    """Radford et al., arXiv 2103.00020, tables 19 and 20; GELU as in open_clip, where OpenAI's have `quick_gelu`."""
    model = ModelSettings(
        image=image,
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
        image_projection_bias=bias,
        text_width=width,
        text_layers=12,
        text_heads=width // 64,
        text_pooling="last",
        embedding=embedding,
    )
    return Preset(model=model, image_size=224, tokens=77, vocabulary=49_408)


def _bert_large(image: str, *, embedding: int, image_size: int, tokens: int) -> Preset:
    """A tower of images beside a text transformer of BERT-large's size with its vocabulary (arXiv 1810.04805).

    The tokens' mean, not the state at [CLS], which only BERT's tokenizer puts first (`text_pooling` "first").
    """
    model = ModelSettings(image=image, text_width=1024, text_layers=24, text_heads=16, embedding=embedding)
    return Preset(model=model, image_size=image_size, tokens=tokens, vocabulary=30_522)


PRESETS: dict[str, Preset] = {
    "basic-s": _basic("coatnet_0_224", width=1024, layers=6, heads=16),
    "basic-m": _basic("coatnet_3_224", width=1024, layers=12, heads=16),
    "basic-l": _basic("coatnet_7_224", width=2048, layers=12, heads=16),
    "clip-rn50": _clip("resnet50_clip", width=512, embedding=1024, bias=True),
    "clip-vit-b32": _clip("vit_base_patch32_clip_224", width=512, embedding=512),
    "clip-vit-b16": _clip("vit_base_patch16_clip_224", width=512, embedding=512),
    "clip-vit-l14": _clip("vit_large_patch14_clip_224", width=768, embedding=768),
    # Jia et al., arXiv 2102.05918, section 4
    "align": _bert_large("tf_efficientnet_l2", embedding=640, image_size=289, tokens=64),
    # Zhai et al., arXiv 2111.07991; the published model L16L, whose image tower is trained beforehand and frozen
    "lit-l16l": _bert_large("vit_large_patch16_224", embedding=1024, image_size=224, tokens=16),
    "cpu-tiny": Preset(
        model=ModelSettings(
            image="resnet10t",
            image_options=(
                '{"stem_type": "deep", "stem_width": 16, "channels": [32, 64, 128, 256], "norm_layer": "groupnorm1"}'
            ),
            text_width=128,
            text_layers=2,
            text_heads=4,
            embedding=128,
        ),
        image_size=32,
        tokens=16,
        vocabulary=4096,
    ),
    "cpu-small": Preset(
        model=ModelSettings(
            image="resnet18",
            image_options='{"channels": [48, 96, 192, 384], "norm_layer": "groupnorm1"}',
            text_width=192,
            text_layers=4,
            text_heads=4,
            embedding=256,
        ),
        image_size=64,
        tokens=32,
        vocabulary=8192,
    ),
}


def find_preset(name: str) -> Preset:
    """The preset of that name; UsageError with the nearest one if there is none."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(PRESETS)}"
        raise UsageError(f"unknown preset {name!r}: {hint}")
    return PRESETS[name]
