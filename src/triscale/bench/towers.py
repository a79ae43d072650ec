"""Towers that the step's benchmarks run, with random inputs: a ViT, the same by open_clip, a preset's or a recipe's."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from triscale.bench import peers
from triscale.config import Phases, RunConfig, with_preset
from triscale.errors import UsageError
from triscale.fine_tuning import FineTuning
from triscale.model_assembly import make_model
from triscale.models.dual_encoder import build_dual_encoder
from triscale.models.presets import PRESETS
from triscale.models.settings import ModelSettings
from triscale.recipes import RECIPES
from triscale.training.lane import device_of, seeded
from triscale.training.settings import BatchSettings

COUNTED_ROWS = 8


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a ViT and of a text transformer, by the same names as open_clip's."""

    size: int
    """Side of the images, in pixels."""
    patch: int
    width: int
    layers: int
    heads: int
    tokens: int
    vocabulary: int
    text_width: int
    text_layers: int
    text_heads: int
    embedding: int


TINY = Shape(
    size=64,
    patch=8,
    width=192,
    layers=6,
    heads=3,
    tokens=32,
    vocabulary=4096,
    text_width=192,
    text_layers=6,
    text_heads=3,
    embedding=192,
)
B16 = Shape(
    size=224,
    patch=16,
    width=768,
    layers=12,
    heads=12,
    tokens=77,
    vocabulary=49408,
    text_width=512,
    text_layers=12,
    text_heads=8,
    embedding=512,
)
"""CLIP's ViT-B/16: Radford et al., arXiv 2103.00020, table 20; open_clip's ViT-B-16."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Towers by lane, and what draws `rows` random inputs for them from a generator."""

    towers: Mapping[str, nn.Module]
    draw: Callable[[int, torch.Generator], dict[str, Tensor]]
    batch_norm: Literal["refuse", "per_micro_batch"] = "refuse"

    def inputs(self, rows: int, device: torch.device) -> dict[str, Tensor]:
        """The same random rows at every call."""
        drawn = self.draw(rows, torch.Generator().manual_seed(rows))
        return {name: value.to(device) for name, value in drawn.items()}

    def forward_flops(self) -> dict[str, float]:
        """FLOPs of one sample in the forward pass of every tower, as torch counts them: products and convolutions."""
        flops = {}
        for name, tower in self.towers.items():
            inputs = self.inputs(COUNTED_ROWS, device_of(tower))[name]
            # Attention as plain products, because torch does not count the CPU's fused kernel.
            with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
                tower(inputs)
            flops[name] = counter.get_total_flops() / COUNTED_ROWS
        return flops


def _uint8_images(size: int, tokens: int, vocabulary: int) -> Callable[[int, torch.Generator], dict[str, Tensor]]:
    def draw(rows: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {
            "image": torch.randint(0, 256, (rows, 3, size, size), dtype=torch.uint8, generator=generator),
            "text": torch.randint(1, vocabulary, (rows, tokens), generator=generator),  # 0 would be padding
        }

    return draw


def vit(shape: Shape) -> Workload:
    """timm's ViT and this package's text transformer; every caption is of full length."""
    options = {"patch_size": shape.patch, "embed_dim": shape.width, "depth": shape.layers, "num_heads": shape.heads}
    settings = ModelSettings(
        image="vit_tiny_patch16_224",  # all that tells ViTs apart is in the options
        image_options=json.dumps(options),
        text_width=shape.text_width,
        text_layers=shape.text_layers,
        text_heads=shape.text_heads,
        embedding=shape.embedding,
    )
    model = build_dual_encoder(settings, image_size=shape.size, vocabulary=shape.vocabulary, tokens=shape.tokens)
    return Workload(towers=model.towers(), draw=_uint8_images(shape.size, shape.tokens, shape.vocabulary))


def open_clip(shape: Shape) -> Workload:
    """The towers of `vit` built from open_clip's own modules; images come in normalised."""
    if not peers.installed("open_clip"):
        raise UsageError(f"open_clip's towers: {peers.missing_line(['open_clip'])}")
    modules = import_module("open_clip.model")
    model = modules.CustomTextCLIP(
        embed_dim=shape.embedding,
        vision_cfg=modules.CLIPVisionCfg(
            layers=shape.layers,
            width=shape.width,
            head_width=shape.width // shape.heads,
            patch_size=shape.patch,
            image_size=shape.size,
        ),
        text_cfg=modules.CLIPTextCfg(
            context_length=shape.tokens,
            vocab_size=shape.vocabulary,
            width=shape.text_width,
            heads=shape.text_heads,
            layers=shape.text_layers,
        ),
    )

    def draw(rows: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {
            "image": torch.randn(rows, 3, shape.size, shape.size, generator=generator),
            "text": torch.randint(1, shape.vocabulary, (rows, shape.tokens), generator=generator),
        }

    return Workload(towers={"image": model.visual, "text": model.text}, draw=draw)


def of_config(config: RunConfig) -> Workload:
    """The towers of a config without dropout and stochastic depth, its vocabulary full."""
    config = replace(config, model=replace(config.model, dropout=0.0, drop_path=0.0))
    model, _ = make_model(config, config.data.vocabulary)
    data = config.data
    draw = _uint8_images(data.image_size, data.tokens, data.vocabulary)
    statistics = "refuse" if config.batch.batch_norm == "refuse" else "per_micro_batch"
    return Workload(towers=model.towers(), draw=draw, batch_norm=statistics)


def of_recipe(recipe: RunConfig | Phases | FineTuning) -> Workload:
    """The towers of a recipe, or of the last of its phases, which trains all of both; UsageError where it has none."""
    if isinstance(recipe, FineTuning):
        raise UsageError("a recipe for any model has no towers of its own: name another, or a preset")
    return of_config(recipe if isinstance(recipe, RunConfig) else list(recipe.of.values())[-1])


def of_preset(name: str) -> Workload:
    """The towers of a preset; BatchNorm takes its statistics from micro-batches."""
    return of_config(with_preset(RunConfig(batch=BatchSettings(batch_norm="per_micro_batch")), name))


BUILT: dict[str, Callable[[], Workload]] = {
    "vit-tiny": partial(vit, TINY),
    "vit-b16": partial(vit, B16),
    "open-clip": partial(open_clip, TINY),
    "open-clip-b16": partial(open_clip, B16),
}
NAMES = (*BUILT, *PRESETS, *RECIPES)


def make_workload(name: str, device: torch.device) -> Workload:
    """The towers of that name with seeded weights, in training mode without randomness."""
    with seeded(0, torch.device("cpu")):
        if name in BUILT:
            workload = BUILT[name]()
        else:
            workload = of_preset(name) if name in PRESETS else of_recipe(RECIPES[name]())
    for tower in workload.towers.values():
        tower.to(device).train()
    return workload
