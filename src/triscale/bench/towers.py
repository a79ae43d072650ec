"""Towers that the step's benchmark runs, with random inputs: a small ViT, the same by open_clip, or a recipe's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from triscale.assembly import make_model
from triscale.bench import peers
from triscale.errors import UsageError
from triscale.models.dual_encoder import build_dual_encoder
from triscale.models.settings import ModelSettings
from triscale.recipes import RECIPES
from triscale.training.lane import device_of, seeded

SIZE, PATCH, WIDTH, LAYERS, HEADS = 64, 8, 192, 6, 3
TOKENS, VOCABULARY = 32, 4096
COUNTED_ROWS = 8


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


def vit_tiny() -> Workload:
    """ViT of 6 layers, width 192, patch 8 at 64 pixels, and a text transformer of the same size over 32 tokens."""
    options = f'{{"patch_size": {PATCH}, "embed_dim": {WIDTH}, "depth": {LAYERS}, "num_heads": {HEADS}}}'
    settings = ModelSettings(
        image="vit_tiny_patch16_224",
        image_options=options,
        text_width=WIDTH,
        text_layers=LAYERS,
        text_heads=HEADS,
        embedding=WIDTH,
    )
    model = build_dual_encoder(settings, image_size=SIZE, vocabulary=VOCABULARY, tokens=TOKENS)
    return Workload(towers=model.towers(), draw=_uint8_images(SIZE, TOKENS, VOCABULARY))


def open_clip() -> Workload:
    """The towers of `vit_tiny` built from open_clip's own modules; images come in normalised."""
    if not peers.installed("open_clip"):
        raise UsageError(f"--towers open-clip: {peers.missing_line(['open_clip'])}")
    modules = import_module("open_clip.model")
    model = modules.CustomTextCLIP(
        embed_dim=WIDTH,
        vision_cfg=modules.CLIPVisionCfg(
            layers=LAYERS, width=WIDTH, head_width=WIDTH // HEADS, patch_size=PATCH, image_size=SIZE
        ),
        text_cfg=modules.CLIPTextCfg(
            context_length=TOKENS, vocab_size=VOCABULARY, width=WIDTH, heads=HEADS, layers=LAYERS
        ),
    )

    def draw(rows: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {
            "image": torch.randn(rows, 3, SIZE, SIZE, generator=generator),
            "text": torch.randint(1, VOCABULARY, (rows, TOKENS), generator=generator),
        }

    return Workload(towers={"image": model.visual, "text": model.text}, draw=draw)


def of_recipe(name: str) -> Workload:
    """The towers of a recipe without dropout and stochastic depth, its vocabulary full."""
    config = RECIPES[name]()
    config = replace(config, model=replace(config.model, dropout=0.0, drop_path=0.0))
    model, _ = make_model(config, config.data.vocabulary)
    data = config.data
    draw = _uint8_images(data.image_size, data.tokens, data.vocabulary)
    statistics = "refuse" if config.batch.batch_norm == "refuse" else "per_micro_batch"
    return Workload(towers=model.towers(), draw=draw, batch_norm=statistics)


BUILT: dict[str, Callable[[], Workload]] = {"vit-tiny": vit_tiny, "open-clip": open_clip}
NAMES = (*BUILT, *RECIPES)


def make_workload(name: str, device: torch.device) -> Workload:
    """The towers of that name with seeded weights, in training mode without randomness."""
    with seeded(0, torch.device("cpu")):
        workload = BUILT[name]() if name in BUILT else of_recipe(name)
    for tower in workload.towers.values():
        tower.to(device).train()
    return workload
