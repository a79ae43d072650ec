"""The two towers as one module."""

from __future__ import annotations

import pytest
import torch

from triscale.errors import UsageError
from triscale.models.dual_encoder import DualEncoder, build_dual_encoder
from triscale.models.settings import ModelSettings

SETTINGS = ModelSettings(
    image="resnet10t",
    image_options='{"channels": [16, 24, 32, 48], "stem_width": 16}',
    text_width=32,
    text_layers=1,
    embedding=16,
)


def build(seed: int = 0) -> DualEncoder:
    torch.manual_seed(seed)
    return build_dual_encoder(SETTINGS, image_size=32, vocabulary=20, tokens=6)


def test_a_checkpoint_names_the_towers_image_and_text() -> None:
    model = build()
    assert {name.partition(".")[0] for name in model.state_dict()} == {"image", "text"}
    assert model.towers() == {"image": model.image, "text": model.text}


def test_both_towers_embed_into_one_space() -> None:
    model = build()
    images, tokens = torch.zeros(3, 3, 32, 32, dtype=torch.uint8), torch.tensor([[4, 3, 0]])
    assert model.image(images).shape == (3, 16)
    assert model.text(tokens).shape == (1, 16)


def test_the_same_seed_gives_the_same_weights_and_another_others() -> None:
    one, same, other = build(0).state_dict(), build(0).state_dict(), build(1).state_dict()
    assert all(torch.equal(tensor, same[name]) for name, tensor in one.items())
    assert any(not torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_the_meta_device_takes_no_memory() -> None:
    with torch.device("meta"):
        model = build()
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.state_dict().keys() == build().state_dict().keys()


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"dropout": 1.0}, "dropout"), ({"drop_path": -0.1}, "drop-path"), ({"embedding": 0}, "embedding")],
)
def test_wrong_settings_are_named_in_one_line(changes: dict[str, float], word: str) -> None:
    with pytest.raises(UsageError, match=word) as caught:
        build_dual_encoder(ModelSettings(**changes), image_size=32, vocabulary=20, tokens=6)
    assert "\n" not in str(caught.value)
