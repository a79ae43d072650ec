"""CLIP's image towers, as timm has them and as CLIP's configurations count them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import timm
import torch
from timm.models import VisionTransformer
from torch import nn

from triscale.errors import UsageError
from triscale.models.text import QuickGELU

RESNETS: dict[str, tuple[tuple[int, int, int, int], int]] = {
    "resnet50_clip": ((3, 4, 6, 3), 64),
    "resnet101_clip": ((3, 4, 23, 3), 64),
    "resnet50x4_clip": ((4, 6, 10, 6), 80),
    "resnet50x16_clip": ((6, 8, 18, 8), 96),
    "resnet50x64_clip": ((3, 15, 36, 10), 128),
}
"""timm's names of CLIP's ResNets, with blocks and width (Radford et al., arXiv 2103.00020, table 19)."""

MOST_LAYERS, MOST_WIDTH, MOST_TOKENS, MOST_IDS, MOST_PIXELS = 512, 65536, 65536, 1 << 24, 4096
"""Largest sizes that a configuration from elsewhere may ask for."""


CLIP_EPSILON, SIGLIP_EPSILON = 1e-5, 1e-6
"""Added to the variance by the LayerNorms of CLIP and of SigLIP."""


@dataclass(frozen=True, kw_only=True)
class VitSizes:
    """A vision transformer as CLIP has them: a class token, a norm before the blocks."""

    patch_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    activation: str
    """A key of `ACTIVATIONS`."""

    @property
    def mlp_ratio(self) -> float:
        """The ratio of which timm and open_clip take the whole part, times the width, as `mlp_width`."""
        ratio = self.mlp_width / self.width
        return ratio if int(self.width * ratio) == self.mlp_width else (self.mlp_width + 0.5) / self.width


_NAMED = {
    (32, 768, 12, 12, 3072): "vit_base_patch32_clip",
    (16, 768, 12, 12, 3072): "vit_base_patch16_clip",
    (14, 1024, 24, 16, 4096): "vit_large_patch14_clip",
}
_NAMED_ACTIVATIONS = {"gelu": "_224", "quick_gelu": "_quickgelu_224"}


def vit_settings(sizes: VitSizes) -> tuple[str, str]:
    """`image` and `image_options` of `ModelSettings` for a vision transformer of CLIP."""
    key = (sizes.patch_size, sizes.width, sizes.layers, sizes.heads, sizes.mlp_width)
    if key in _NAMED and sizes.activation in _NAMED_ACTIVATIONS:
        return _NAMED[key] + _NAMED_ACTIVATIONS[sizes.activation], "{}"
    return "vit_base_patch32_clip_224", _options(sizes)


def siglip_settings(sizes: VitSizes) -> tuple[str, str]:
    """The same for one of SigLIP, which has no class token and is pooled by attention."""
    return "vit_base_patch16_siglip_224", _options(sizes)


def _options(sizes: VitSizes) -> str:
    """Keyword arguments of timm's vision transformers, whose names of activations are ours."""
    options = {
        "patch_size": sizes.patch_size,
        "embed_dim": sizes.width,
        "depth": sizes.layers,
        "num_heads": sizes.heads,
        "mlp_ratio": sizes.mlp_ratio,
        "act_layer": sizes.activation,
    }
    return json.dumps(options)


def vit_sizes(backbone: nn.Module, *, class_token: bool) -> VitSizes | None:
    """The sizes of a timm model that is such a transformer; None of another."""
    if not isinstance(backbone, VisionTransformer) or not len(backbone.blocks):
        return None
    block, patch = backbone.blocks[0], backbone.patch_embed
    parts = {name.split(".")[0] for name, _ in backbone.named_parameters()}
    own = {"pos_embed", "patch_embed", "blocks", "norm"}
    if parts != own | ({"cls_token", "norm_pre"} if class_token else {"attn_pool"}):
        return None
    mlp = block.get_submodule("mlp.fc1")
    activation = activation_of(block.get_submodule("mlp.act"))
    epsilon = CLIP_EPSILON if class_token else SIGLIP_EPSILON
    if (
        block.get_submodule("norm1").eps != epsilon
        or activation is None
        or not isinstance(mlp, nn.Linear)
        or patch.patch_size[0] != patch.patch_size[1]
    ):
        return None
    attention = block.get_submodule("attn")
    heads = backbone.embed_dim // int(attention.head_dim)  # pyright: ignore[reportArgumentType]
    return VitSizes(
        patch_size=patch.patch_size[0],
        width=backbone.embed_dim,
        layers=len(backbone.blocks),
        heads=heads,
        mlp_width=mlp.out_features,
        activation=activation,
    )


def pooling_of(name: str) -> str:
    """timm's word for how the model of that name pools its features; "" where it has none, or there is no model."""
    if not timm.is_model(name.partition(".")[0]):
        return ""
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False, num_classes=0)
    parts = [part for path, part in model.named_modules() if path in ("", "head.global_pool", "global_pool", "head")]
    words = [getattr(part, word, None) for part in parts for word in ("global_pool", "pool_type")]
    return next((word for word in words if isinstance(word, str)), "")


def activation_of(module: nn.Module) -> str | None:
    """The key of `ACTIVATIONS` for an activation, ours, torch's or timm's; None for another function."""
    kind = type(module).__name__
    if isinstance(module, QuickGELU) or kind == "QuickGELU":
        return "quick_gelu"
    if kind == "GELUTanh" or (isinstance(module, nn.GELU) and module.approximate == "tanh"):
        return "gelu_tanh"
    return "gelu" if isinstance(module, nn.GELU) or kind == "GELU" else None


def take_size(config: Mapping[str, object], name: str, default: int | None, most: int) -> int:
    """A whole number from a configuration, from 1 to `most`; UsageError otherwise."""
    value = config.get(name, default)
    if type(value) is not int or not 1 <= value <= most:
        raise UsageError(f"its configuration says {name} {str(value)[:80]}: it must be a number from 1 to {most}")
    return value


def take_channels(
    config: Mapping[str, object], name: str, default: tuple[float, float, float]
) -> tuple[float, float, float]:
    """Three numbers from a configuration, of red, green and blue; UsageError otherwise."""
    values = config.get(name) or list(default)
    if not isinstance(values, list) or len(values) != 3 or not all(type(value) in (int, float) for value in values):
        raise UsageError(f"its preprocessing has {name} {str(values)[:60]}: it must be three numbers")
    return float(values[0]), float(values[1]), float(values[2])
