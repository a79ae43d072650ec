"""Every preset builds, trains and is as large as its module says."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from triscale.models import presets
from triscale.models.dual_encoder import build_dual_encoder
from triscale.models.presets import PRESETS

VOCABULARY, TOKENS = 100, 16


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_as_many_parameters_as_its_module_says(name: str) -> None:
    stated = re.search(rf"{name} +image +([\d,]+) +text +([\d,]+)", presets.__doc__ or "")
    assert stated, f"the module's docstring does not list {name}"
    with torch.device("meta"):
        model = build_dual_encoder(PRESETS[name], image_size=32, vocabulary=VOCABULARY, tokens=TOKENS)
    embeddings = (VOCABULARY + TOKENS) * PRESETS[name].text_width
    counted = [parameters(model.image), parameters(model.text) - embeddings]
    assert counted == [int(number.replace(",", "")) for number in stated.groups()]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_trains_on_micro_batches_of_any_size(name: str) -> None:
    model = build_dual_encoder(PRESETS[name], image_size=32, vocabulary=VOCABULARY, tokens=TOKENS)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    tokens = torch.randint(1, VOCABULARY, (2, TOKENS))
    (model.image(images) * model.text(tokens)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
