"""Image towers of timm's families at small size, and what is said of wrong names and options."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from step_errors import step_errors
from triscale.errors import UsageError
from triscale.models.image import ImageTower, build_image_tower
from triscale.models.settings import ModelSettings

FAMILIES = {
    "resnet": ("resnet10t", {"channels": [16, 32, 48, 64], "stem_width": 16}, 32),
    "convnext": ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [16, 24, 32, 48]}, 32),
    "vit": ("vit_tiny_patch16_224", {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4}, 32),
    "efficientnet": ("efficientnet_lite0", {}, 32),
    "swin": ("swin_tiny_patch4_window7_224", {"embed_dim": 24, "depths": [1, 1], "num_heads": [2, 4]}, 64),
    "maxvit": ("test_maxvit", {"embed_dim": [32, 32], "depths": [1, 1], "block_type": ["M", "M"], "stem_width": 8}, 32),
    "coatnet": (
        "coatnet_0_224",
        {"embed_dim": [16, 24, 32, 32], "depths": [1, 1, 1, 1], "stem_width": 8, "head_hidden_size": 32},
        32,
    ),
    "coatnet7": (
        "coatnet_7_224",
        {"embed_dim": [16, 16, 24, 32, 48], "depths": [1, 1, 1, 2, 1], "stem_width": 8, "dim_head": 16},
        64,
    ),
    "crossvit": (
        "crossvit_tiny_240",
        {"img_scale": [1, 1], "embed_dim": [24, 32], "depth": [[1, 2, 0]], "num_heads": [2, 2], "mlp_ratio": [2, 2, 1]},
        48,
    ),
    "nasnet": ("nasnetalarge", {"num_features": 96, "stem_size": 8}, 64),
    # Neither can be had smaller.
    "gcvit": ("gcvit_xxtiny", {}, 32),
    "volo": ("volo_d1_224", {}, 32),
    # Features wider than the last stage, and an image size that its class hides behind **kwargs.
    "mobilenet": ("mobilenetv3_small_050", {}, 32),
    "levit": ("levit_128s", {"embed_dim": [32, 48, 64], "num_heads": [2, 3, 4]}, 64),
}


def build(family: str = "resnet", **changes: float | str) -> tuple[ImageTower, int]:
    name, options, size = FAMILIES[family]
    torch.manual_seed(0)
    settings = ModelSettings(image=name, image_options=json.dumps(options), embedding=16, **changes)
    return build_image_tower(settings, size), size


def has_drop_path(family: str) -> bool:
    name, options, size = FAMILIES[family]
    settings = ModelSettings(image=name, image_options=json.dumps(options), drop_path=0.1)
    try:
        with torch.device("meta"):
            build_image_tower(settings, size)
    except UsageError:
        return False
    return True


def pixels(count: int, size: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("family", FAMILIES)
def test_any_timm_family_embeds_and_its_step_in_micro_batches_is_exact(family: str) -> None:
    """With stochastic depth and dropout where it has them, and BatchNorm over micro-batches."""
    tower, size = build(family, dropout=0.1, drop_path=0.2 if has_drop_path(family) else 0.0)
    embeddings = tower(pixels(2, size))
    assert embeddings.shape == (2, 16)
    assert embeddings.isfinite().all()
    texts = nn.Embedding(8, 16)
    inputs = {"image": pixels(4, size), "text": torch.arange(4)}
    errors = step_errors({"image": tower, "text": texts}, inputs, micro_batch=2)
    assert max(errors.values()) < 1e-10
    missing = [name for name, p in tower.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing


@pytest.mark.parametrize("norm", ["groupnorm", "groupnorm1"])
def test_uint8_images_embed_as_the_same_images_in_0_to_1(norm: str) -> None:
    settings = ModelSettings(
        image="resnet18", image_options=json.dumps({"channels": [32, 32, 64, 64], "norm_layer": norm}), embedding=16
    )
    tower = build_image_tower(settings, 32).eval()
    images = pixels(2, 32)
    assert torch.equal(tower(images), tower(images / 255))


def test_images_are_normalised_by_the_mean_and_deviation_of_each_channel() -> None:
    tower, size = build()
    seen: list[Tensor] = []
    tower.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    images = pixels(2, size)
    tower(images)
    for channel in range(3):
        expected = (images[:, channel] / 255 - tower.mean[channel]) / tower.std[channel]
        torch.testing.assert_close(seen[0][:, channel], expected)


def test_images_are_normalised_as_the_settings_say_and_the_projection_has_a_bias_where_they_say() -> None:
    settings = ModelSettings(
        image="resnet10t",
        embedding=16,
        image_mean=(0.1, 0.2, 0.3),
        image_std=(0.4, 0.5, 0.6),
        image_projection_bias=True,
    )
    tower = build_image_tower(settings, 32)
    assert tower.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert tower.std.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])
    assert tower.projection.bias is not None and not tower.projection.bias.any()


@pytest.mark.parametrize("kind", ["group_norm", "layer_norm"])
def test_without_batch_norm_a_coatnets_step_is_exact_though_batch_norm_is_refused(kind: str) -> None:
    tower, size = build("coatnet7", batch_norm=kind)
    assert not any(isinstance(module, _BatchNorm) for module in tower.modules())
    inputs = {"image": pixels(4, size), "text": torch.arange(4)}
    towers = {"image": tower, "text": nn.Embedding(8, 16)}
    assert max(step_errors(towers, inputs, micro_batch=1, batch_norm="refuse").values()) < 1e-10


def test_coatnet_7s_third_stage_widens_at_one_resolution_by_the_papers_sum() -> None:
    """x W + attention(norm(x)): what timm's block computes on the pooled input where it halves."""
    tower, _ = build("coatnet7")
    backbone = tower.backbone.eval()
    block, sides = backbone.stages[3].blocks[0], []
    for stage in backbone.stages:
        stage.register_forward_hook(lambda module, inputs, output: sides.append(output.shape[-1]))
    backbone(torch.zeros(1, 3, 64, 64))
    assert sides == [16, 8, 4, 4, 2]
    x = torch.randn(2, 24, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = block.shortcut.expand(x) + block.attn(block.norm1.norm(x))
    expected = expected + block.mlp(block.norm2(expected))
    torch.testing.assert_close(block(x), expected)


def test_a_float64_tower_computes_in_float64() -> None:
    tower, size = build()
    tower.double().eval()
    images = pixels(2, size)
    assert tower(images).dtype == torch.float64
    torch.testing.assert_close(tower(images), tower(images.double() / 255), rtol=1e-12, atol=1e-12)


def test_evaluation_is_deterministic_and_dropout_is_not() -> None:
    tower, size = build("convnext", dropout=0.5, drop_path=0.5)
    images = pixels(4, size)
    assert not torch.equal(tower(images), tower(images))
    tower.eval()
    assert torch.equal(tower(images), tower(images))


def test_stochastic_depth_is_off_unless_asked_for() -> None:
    """Swin's own default is 0.1."""
    tower, size = build("swin")
    images = pixels(2, size)
    assert torch.equal(tower(images), tower(images))


def test_initial_weights_are_a_function_of_the_default_generator() -> None:
    (one, _), (two, _) = build(), build()
    torch.manual_seed(1)
    other = build_image_tower(ModelSettings(image="resnet10t", embedding=16), 32)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(other.projection.weight[:, :64], one.projection.weight)


def test_the_normalisation_is_not_part_of_a_checkpoint() -> None:
    tower, _ = build()
    assert {name.partition(".")[0] for name in tower.state_dict()} == {"backbone", "projection"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"image": "resnet19"}, "resnet18"),
        ({"image": "zzzzzz"}, "list_models"),
        ({"image": "hf-hub:timm/resnet18.a1_in1k"}, "not a timm model"),
        ({"image": "local-dir:."}, "not a timm model"),
        ({"image_options": "{"}, "not JSON"),
        ({"image_options": "[" * 100_000}, "not JSON"),
        ({"image_options": "[1]"}, "JSON object"),
        ({"image_options": '{"colour": 1}'}, "colour"),
        ({"image_options": '{"channels": "many"}'}, "cannot build resnet18"),
        ({"image_options": '{"global_pool": ""}'}, "pooled"),
        ({"image": "vit_tiny_patch16_224", "image_options": '{"patch_size": 64}'}, "32 pixels|cannot build"),
        ({"image": "vgg11", "drop_path": 0.1}, "no stochastic depth"),
        ({"image": "crossvit_tiny_240"}, "32 pixels .timm made it for 240."),
        ({"image": "coatnet_7_224", "image_options": '{"depths": [1, 1]}'}, "5 numbers"),
    ],
)
def test_what_cannot_be_built_is_said_in_one_line(settings: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        build_image_tower(ModelSettings(**settings), 32)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "option", ["pretrained", "checkpoint_path", "pretrained_cfg_overlay", "num_classes", "img_size"]
)
def test_options_cannot_read_files_or_undo_what_the_tower_decides(option: str) -> None:
    with pytest.raises(UsageError, match=option):
        build_image_tower(ModelSettings(image_options=json.dumps({option: "x"})), 32)
