"""BatchNorm replaced by GroupNorm: what it computes, what is kept of the layer, and that rows stand by themselves."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from triscale.errors import UsageError
from triscale.models.normalisation import convert_batch_norm, groups_of


@pytest.mark.parametrize(
    ("channels", "groups"),
    [
        (2048, 32),
        (256, 32),
        (128, 16),
        (64, 8),
        (96, 12),
        (48, 6),
        (40, 5),
        (24, 3),
        (1000, 25),
        (8, 1),
        (7, 1),
        (1, 1),
    ],
)
def test_groups_are_many_but_hold_eight_channels(channels: int, groups: int) -> None:
    assert groups_of(channels) == groups


def test_rows_do_not_depend_on_each_other_and_no_batch_norm_is_left(rng: torch.Generator) -> None:
    """ResNet has torch's BatchNorm, MobileNet timm's, with activation and dropout in one."""
    images = torch.rand(3, 3, 32, 32, dtype=torch.float64, generator=rng)
    for name, options in (
        ("resnet10t", {"channels": (8, 8, 16, 16), "stem_width": 8}),
        ("mobilenetv3_small_050", {}),
    ):
        tower = timm.create_model(name, num_classes=4, **options).double()
        layers = sum(isinstance(module, _BatchNorm) for module in tower.modules())
        assert convert_batch_norm(tower) is tower
        assert sum(isinstance(module, nn.GroupNorm) for module in tower.modules()) == layers > 0
        assert not any(isinstance(module, _BatchNorm) for module in tower.modules())
        assert not any("running" in key for key in tower.state_dict())
        alone = torch.cat([tower.eval()(image[None]) for image in images])
        torch.testing.assert_close(tower(images), alone, rtol=1e-9, atol=1e-12)


def test_weights_settings_activation_and_dropout_are_kept(rng: torch.Generator) -> None:
    x = torch.randn(3, 16, 4, 4, dtype=torch.float64, generator=rng)
    layer = BatchNormAct2d(16, eps=1e-3, act_layer=nn.SiLU, drop_layer=nn.Dropout, dtype=torch.float64).eval()
    nn.init.normal_(layer.weight, generator=rng)
    nn.init.normal_(layer.bias, generator=rng)
    weight, bias = layer.weight, layer.bias
    norm = convert_batch_norm(layer)
    assert norm.weight is weight and norm.bias is bias
    assert isinstance(norm.drop, nn.Dropout) and not norm.training
    torch.testing.assert_close(norm(x), F.silu(F.group_norm(x, 2, weight, bias, 1e-3)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_of_vectors_becomes_layer_norm(affine: bool, rng: torch.Generator) -> None:
    x = torch.randn(5, 12, dtype=torch.float64, generator=rng)
    norm = convert_batch_norm(nn.BatchNorm1d(12, affine=affine, dtype=torch.float64))
    torch.testing.assert_close(norm(x), F.layer_norm(x, (12,)), rtol=1e-12, atol=1e-12)
    assert len(list(norm.parameters())) == 2 * affine


def test_layer_norm_is_over_the_channels_of_each_place(rng: torch.Generator) -> None:
    x = torch.randn(3, 16, 4, 4, dtype=torch.float64, generator=rng)
    plain, active = nn.BatchNorm2d(16, eps=1e-3).double(), BatchNormAct2d(16, act_layer=nn.SiLU, dtype=torch.float64)
    for layer in (plain, active):
        nn.init.normal_(layer.weight, generator=rng)
        nn.init.normal_(layer.bias, generator=rng)
    for layer, after in ((plain, lambda y: y), (active, F.silu)):
        expected = F.layer_norm(x.movedim(1, -1), (16,), layer.weight, layer.bias, layer.eps).movedim(-1, 1)
        torch.testing.assert_close(convert_batch_norm(layer, "layer_norm")(x), after(expected), rtol=1e-12, atol=1e-12)


def test_in_coatnet_layer_norm_gives_what_timm_builds_with_it() -> None:
    sizes = {"embed_dim": (16, 24, 32, 32), "depths": (1, 1, 1, 1), "stem_width": 8, "head_hidden_size": 32}
    converted = convert_batch_norm(timm.create_model("coatnet_0_224", num_classes=0, **sizes), "layer_norm")
    built = timm.create_model("coatnet_0_224", num_classes=0, conv_norm_layer="layernorm2d", **sizes)
    built.load_state_dict(converted.state_dict())
    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(converted.eval()(images), built.eval()(images), rtol=1e-4, atol=1e-5)


def test_it_works_without_values() -> None:
    with torch.device("meta"):
        tower = convert_batch_norm(timm.create_model("resnet10t", num_classes=4))
        assert tower(torch.empty(2, 3, 32, 32)).shape == (2, 4)
    assert all(parameter.is_meta for parameter in tower.parameters())


def test_a_layer_in_several_places_stays_one() -> None:
    shared = nn.BatchNorm2d(8)
    tower = convert_batch_norm(nn.Sequential(shared, nn.ReLU(), shared, nn.Sequential(shared)))
    assert tower[0] is tower[2] is tower[3][0] and isinstance(tower[0], nn.GroupNorm)


def test_a_batch_norm_that_computes_something_else_is_refused_in_one_line() -> None:
    class Scaled(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    with pytest.raises(UsageError, match="Scaled") as caught:
        convert_batch_norm(nn.Sequential(nn.BatchNorm2d(4), Scaled(4)))
    assert "\n" not in str(caught.value)
