"""Presets: as large as the papers say, as docs/models.md says, and exact in micro-batches."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from step_errors import step_errors
from triscale.config import RunConfig, from_dict, to_dict, with_preset
from triscale.errors import UsageError
from triscale.models.dual_encoder import build_dual_encoder
from triscale.models.presets import PRESETS, Preset, find_preset
from triscale.models.settings import ModelSettings
from triscale.validation import validate

# The papers' figures in millions of parameters: image tower, text tower, both. None: not published.
PUBLISHED: dict[str, tuple[float | None, float | None, float | None]] = {
    "basic-s": (25, 108, None),
    "basic-m": (168, 184, None),
    "basic-l": (2440, 670, 3100),
    "clip-rn50": (None, None, 102.007137),
    "clip-vit-b32": (None, None, 151.277313),
    "clip-vit-b16": (None, None, 149.620737),
    "clip-vit-l14": (None, None, 427.616513),
    "align": (480, 340, 820),
    "lit-l16l": (307, 340, None),
}
DOCUMENT = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")

# Options that leave an image tower one block a stage; the widest stay at a tenth, and the text tower at one block.
REDUCED_IMAGES = {
    "coatnet_0_224": ("coatnet_0_224", {"depths": [1, 1, 1, 1], "embed_dim": [48, 96, 192, 384]}),
    "coatnet_3_224": ("coatnet_3_224", {"depths": [1, 1, 1, 1], "embed_dim": [48, 96, 192, 384]}),
    "coatnet_7_224": ("coatnet_7_224", {"depths": [1] * 5, "embed_dim": [32, 64, 128, 256, 384], "stem_width": 16}),
    "resnet50_clip": ("resnet50_clip", {}),
    "vit_base_patch32_clip_224": ("vit_base_patch32_clip_224", {"depth": 1}),
    "vit_base_patch16_clip_224": ("vit_base_patch16_clip_224", {"depth": 1}),
    "vit_large_patch14_clip_224": ("vit_large_patch14_clip_224", {"depth": 1, "embed_dim": 512, "num_heads": 8}),
    "tf_efficientnet_l2": ("tf_efficientnet_b0", {}),  # the same network at multipliers of 1
    "vit_large_patch16_224": ("vit_large_patch16_224", {"depth": 1, "embed_dim": 256, "num_heads": 4}),
}


def reduced(preset: Preset) -> Preset:
    """The same kinds of towers with as few blocks as there can be, for images of 64 pixels."""
    model = preset.model
    if model.image in REDUCED_IMAGES:
        image, options = REDUCED_IMAGES[model.image]
        model = replace(model, image=image, image_options=json.dumps(options))
    width = min(model.text_width, 512)
    model = replace(model, text_layers=1, text_width=width, text_heads=width // 64, embedding=64)
    return Preset(model=model, image_size=64 if "patch14" not in model.image else 56, tokens=8, vocabulary=100)


@cache
def parameters(name: str) -> tuple[int, int, int]:
    """Of the image tower, the text tower and both."""
    preset = PRESETS[name]
    with torch.device("meta"):
        model = build_dual_encoder(
            preset.model, image_size=preset.image_size, vocabulary=preset.vocabulary, tokens=preset.tokens
        )
    image, text = (sum(p.numel() for p in tower.parameters()) for tower in (model.image, model.text))
    return image, text, image + text


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_is_as_large_as_its_paper_says_within_2_percent(name: str) -> None:
    for ours, theirs in zip(parameters(name), PUBLISHED[name], strict=True):
        assert theirs is None or ours == pytest.approx(theirs * 1e6, rel=0.02)


@pytest.mark.parametrize("name", ["clip-rn50", "clip-vit-b32", "clip-vit-b16", "clip-vit-l14"])
def test_a_clip_has_exactly_open_clips_parameters_but_for_the_temperature_which_is_the_losss(name: str) -> None:
    published = PUBLISHED[name][2]
    assert published is not None and parameters(name)[2] == round(published * 1e6) - 1


@pytest.mark.parametrize("name", PRESETS)
def test_the_document_states_each_presets_parameters(name: str) -> None:
    row = next(line for line in DOCUMENT.splitlines() if line.startswith(f"| `{name}` |"))
    numbers = [int(number.replace(",", "")) for number in re.findall(r"\d{1,3}(?:,\d{3})+", row)]
    assert tuple(numbers) == parameters(name)


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_step_is_exact_in_micro_batches(name: str, rng: torch.Generator) -> None:
    """At reduced depth. BatchNorm, where a preset has it, takes its statistics from micro-batches."""
    preset = reduced(PRESETS[name])
    torch.manual_seed(0)
    model = build_dual_encoder(
        preset.model, image_size=preset.image_size, vocabulary=preset.vocabulary, tokens=preset.tokens
    )
    inputs = {
        "image": torch.randint(0, 256, (4, 3, preset.image_size, preset.image_size), dtype=torch.uint8, generator=rng),
        "text": torch.randint(1, preset.vocabulary, (4, preset.tokens), generator=rng),
    }
    assert max(step_errors(model.towers(), inputs, micro_batch=2).values()) < 1e-10


@pytest.mark.parametrize("name", ["basic-s", "basic-m", "basic-l", "cpu-tiny", "cpu-small"])
def test_no_row_of_these_depends_on_its_batch(name: str) -> None:
    preset = reduced(PRESETS[name])
    with torch.device("meta"):
        model = build_dual_encoder(preset.model, image_size=preset.image_size, vocabulary=100, tokens=8)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


@pytest.mark.parametrize("name", PRESETS)
def test_a_config_with_a_preset_holds_all_of_it_and_is_valid(name: str) -> None:
    config = with_preset(RunConfig(), name)
    preset = PRESETS[name]
    assert config.model == preset.model
    data = config.data
    assert (data.image_size, data.tokens, data.vocabulary) == (preset.image_size, preset.tokens, preset.vocabulary)
    validate(config)
    assert from_dict(RunConfig, to_dict(config)) == config


def test_an_unknown_preset_is_named_in_one_line_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown preset 'clip-vit-b-32': did you mean 'clip-vit-b32'") as caught:
        find_preset("clip-vit-b-32")
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="there are basic-s"):
        find_preset("zzzzzzzz")


def test_deviations_of_channels_must_be_above_zero() -> None:
    with pytest.raises(UsageError, match="image-std"):
        validate(RunConfig(model=ModelSettings(image_std=(0.2, 0.0, 0.2))))
