"""What a recipe or the command line says about the towers. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """A dual encoder: an image tower of timm and BASIC's text transformer, each with a linear projection."""

    image: str = "resnet18"
    """Any timm model name."""
    image_options: str = "{}"
    """Keyword arguments of timm.create_model, as JSON."""
    batch_norm: Literal["keep", "convert"] = "keep"
    """BatchNorm of the image tower: as it is, or converted to GroupNorm, which knows no batch."""
    text_width: int = 256
    """Width of the text transformer."""
    text_layers: int = 4
    """Blocks of the text transformer."""
    text_heads: int = 4
    """Attention heads of each block; must divide `text_width`."""
    embedding: int = 256
    """Width d of the embeddings that both towers give."""
    dropout: float = 0.0
    """Dropout of the text transformer's residual branches and of the image features."""
    drop_path: float = 0.0
    """Stochastic depth of both towers, growing linearly with depth up to this."""
