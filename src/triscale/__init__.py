"""Contrastive learning of images and text, or of images alone, exact at any batch size.

What most programs need stands here and is imported when first used, so that ``import triscale`` costs nothing:

    from triscale import ContrastiveStep, losses   # the exact large-batch step, for anyone's own towers and loop
    model = triscale.load("runs/scenes")           # a trained model: encode_image, encode_text, classify
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from triscale import losses
    from triscale.inference import load
    from triscale.models.dual_encoder import DualEncoder
    from triscale.training.step import ContrastiveStep

__version__ = "0.1.0"
__all__ = ["ContrastiveStep", "DualEncoder", "load", "losses"]

_MODULE_OF = {
    "ContrastiveStep": "triscale.training.step",
    "DualEncoder": "triscale.models.dual_encoder",
    "load": "triscale.inference",
}


def __getattr__(name: str) -> object:
    """Import an exported name when it is first used (PEP 562)."""
    if name == "losses":
        return import_module("triscale.losses")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'triscale' has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(_MODULE_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
