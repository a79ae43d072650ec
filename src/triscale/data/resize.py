"""From any shape to a square: resizing and cropping of decoded images.

Resizing is torch's: antialiased bicubic of uint8 pixels, within 1 of Pillow's.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import UInt8

from triscale.data.crop import Box
from triscale.data.settings import Fit

EIGHTHS = 8
"""Sizes at which JPEGs are decoded are counted in eighths of the whole."""


def fit_square(image: UInt8[np.ndarray, "h w 3"], size: int, fit: Fit) -> UInt8[np.ndarray, "s s 3"]:
    """Make an image (size, size, 3): the same for training and evaluation. Antialiased bicubic.

    Args:
        image: uint8 RGB. One of (size, size, 3) is returned as it is.
        size: side in pixels.
        fit: "crop" takes the middle square; "pad" shows the whole image, centred on white; "squash" gives up its shape.
    """
    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    if fit == "squash":
        return resize(image, size, size)
    if fit == "crop":
        # Cropped before it is resized, or else a thin image would grow beyond all bounds.
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        return resize(image[top : top + side, left : left + side], size, size)
    scale = size / max(height, width)
    inner = resize(image, max(1, round(height * scale)), max(1, round(width * scale)))
    canvas = np.full((size, size, 3), 255, dtype=np.uint8)
    top, left = (size - inner.shape[0]) // 2, (size - inner.shape[1]) // 2
    canvas[top : top + inner.shape[0], left : left + inner.shape[1]] = inner
    return canvas


def crop_square(image: UInt8[np.ndarray, "h w 3"], box: Box, size: int) -> UInt8[np.ndarray, "s s 3"]:
    """A box of an image resized to (size, size, 3), antialiased bicubic."""
    return resize(cut(image, box), size, size)


def cut(pixels: UInt8[np.ndarray, "h w 3"], box: Box, eighths: int = EIGHTHS) -> UInt8[np.ndarray, "h2 w2 3"]:
    """The box of an image of which `pixels` are so many eighths, rounded to whole pixels, as a view."""
    left, top, right, bottom = (
        (edge * eighths + EIGHTHS // 2) // EIGHTHS
        for edge in (box.left, box.top, box.left + box.width, box.top + box.height)
    )
    return pixels[top:bottom, left:right]


def resize(image: UInt8[np.ndarray, "h w 3"], height: int, width: int) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Bicubic with a filter as wide as the reduction."""
    if image.shape[:2] == (height, width):
        return image
    # Without gaps and with the strides of a batch, or torch would resize, and give back, channel by channel.
    whole = np.ascontiguousarray(image) if image.flags.writeable else image.copy()
    pixels = torch.from_numpy(whole).view(1, *whole.shape).permute(0, 3, 1, 2)
    resized = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).contiguous().numpy()
