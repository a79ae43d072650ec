"""Rematerialised towers against the same towers without, same random numbers: gradients, bytes kept, statistics."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable

import pytest
import timm
import torch
from timm.models.convnext import ConvNeXt
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import reference
from triscale.errors import UsageError
from triscale.losses import InfoNCE
from triscale.models.image import build_image_tower
from triscale.models.presets import PRESETS
from triscale.models.text import TextTower
from triscale.training.memory import activation_bytes
from triscale.training.remat import blocks_of, rematerialise
from triscale.training.step import ContrastiveStep

MODES = ("block", "selective")
IMAGE_SIZE, TOKENS, EMBEDDING = 16, 8, 8


def text() -> nn.Module:
    return TextTower(
        vocabulary=20, tokens=TOKENS, width=16, layers=3, heads=2, embedding=EMBEDDING, dropout=0.2, drop_path=0.3
    )


def vit() -> nn.Module:
    return VisionTransformer(
        img_size=IMAGE_SIZE,
        patch_size=8,
        embed_dim=16,
        depth=2,
        num_heads=2,
        num_classes=EMBEDDING,
        proj_drop_rate=0.1,
        drop_path_rate=0.2,
    )


def resnet() -> nn.Module:
    return build_image_tower(dataclasses.replace(PRESETS["cpu-tiny"].model, embedding=EMBEDDING), 32)


def convnext() -> nn.Module:
    return ConvNeXt(depths=(1, 1, 2, 1), dims=(8, 8, 16, 16), num_classes=EMBEDDING, drop_path_rate=0.3)


def batch_norm() -> nn.Module:
    """BatchNorm, and ReLU in place."""
    return timm.create_model("resnet10t", channels=[8, 8, 16, 16], stem_width=8, num_classes=EMBEDDING)


def coatnet() -> nn.Module:
    return timm.create_model(
        "coatnet_pico_rw_224", img_size=64, embed_dim=(16, 32, 32, 32), stem_width=(8, 8), num_classes=EMBEDDING
    )


KINDS: dict[str, Callable[[], nn.Module]] = {
    kind.__name__: kind for kind in (text, vit, resnet, convnext, batch_norm, coatnet)
}


def build(kind: str, mode: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return rematerialise(KINDS[kind]().to(dtype).train(), mode)


def inputs_of(kind: str, rows: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if kind == "text":
        return torch.randint(0, 20, (rows, TOKENS), generator=generator)
    side = {"coatnet": 64, "resnet": 32}.get(kind, IMAGE_SIZE * 2 if kind in ("convnext", "batch_norm") else IMAGE_SIZE)
    return torch.rand(rows, 3, side, side, dtype=torch.float64, generator=generator).to(dtype)


def gradients(tower: nn.Module, inputs: Tensor, autocast: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """Embeddings and gradients, random numbers seeded and autocast closed before the backward pass."""
    torch.manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = tower(inputs)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    torch.manual_seed(99)
    (output * weights).sum().backward()
    found = reference.gradients({"tower": tower})
    tower.zero_grad(set_to_none=True)
    return output.detach(), found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_without_rematerialisation(kind: str, mode: str) -> None:
    """In float64, with dropout and stochastic depth; and in bfloat16 autocast, to the bit."""
    for dtype, autocast in ((torch.float64, False), (torch.float32, True)):
        inputs, tower = inputs_of(kind, 6, dtype), build(kind, "none", dtype)
        if mode == "selective":  # which switches off what works in place, and so changes the order of some sums
            for module in tower.modules():
                if getattr(module, "inplace", False):
                    module.inplace = False
        plain, expected = gradients(tower, inputs, autocast)
        output, found = gradients(build(kind, mode, dtype), inputs, autocast)
        assert torch.equal(output, plain)
        assert reference.largest_error(found, expected) < 1e-10
        if autocast:
            assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_keeps_less_than_selective_and_selective_less_than_autograd(kind: str) -> None:
    kept = []
    for mode in ("block", "selective", "none"):
        tower, inputs = build(kind, mode, torch.float32), inputs_of(kind, 6, torch.float32)
        kept.append(activation_bytes(tower, lambda tower=tower, inputs=inputs: tower(inputs), inputs))
    assert kept[0] < kept[1] < kept[2], kept


def test_bytes_kept_are_what_the_block_is_known_to_keep() -> None:
    """Of a 2-layer MLP block over (8, 16): its input; selective also both products; none the input and GELU's two."""

    def tower() -> nn.Module:
        block = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16), nn.Dropout(0.0))
        return nn.ModuleList([block])

    rows = torch.randn(8, 16, requires_grad=True)
    for mode, columns in (("none", 16 + 32 + 32), ("block", 16), ("selective", 16 + 32 + 16)):
        (block,) = rematerialise(tower(), mode, None)  # type: ignore[misc]
        assert activation_bytes(block, lambda block=block: block(rows + 0), rows) == 8 * columns * 4, mode


@pytest.mark.parametrize("mode", MODES)
def test_bytes_kept_are_the_same_on_the_meta_device(mode: str) -> None:
    kept = []
    for device in ("cpu", "meta"):
        tower, images = build("resnet", mode, torch.float32).to(device), torch.zeros(4, 3, 32, 32, device=device)
        kept.append(activation_bytes(tower, lambda tower=tower, images=images: tower(images), images))
    assert kept[0] == kept[1] > 0


def direct(towers: dict[str, nn.Module], inputs: dict[str, Tensor], micro_batch: int, keep: int) -> dict[str, Tensor]:
    loss = InfoNCE().double()
    step = ContrastiveStep(towers, loss, micro_batch=micro_batch, keep=keep, seed=3, batch_norm="per_micro_batch")
    out = step(inputs)
    assert out.metrics["replay_error"] < 1e-12
    return reference.gradients({**towers, "loss": loss})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["vit", "resnet", "convnext", "batch_norm"])
def test_the_step_gives_the_same_gradients_and_statistics_with_any_keep(kind: str, mode: str) -> None:
    """Random numbers replay inside the replay of the step, and BatchNorm counts each micro-batch once."""
    inputs = {"image": inputs_of(kind, 6), "text": inputs_of("text", 6)}
    plain = {"image": build(kind, "none"), "text": build("text", "none")}
    expected = direct(plain, inputs, 2, keep=0)
    for keep in (0, 1, 99):
        towers = {"image": build(kind, mode), "text": build("text", mode)}
        assert reference.largest_error(direct(towers, inputs, 2, keep), expected) < 1e-10
        for lane, tower in towers.items():
            for buffer, other in zip(tower.buffers(), plain[lane].buffers(), strict=True):
                assert torch.allclose(buffer, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_names_stay_and_a_copy_rematerialises_its_own_blocks(mode: str) -> None:
    tower = build("vit", mode)
    assert list(tower.state_dict()) == list(build("vit", "none").state_dict())
    copied = copy.deepcopy(tower)
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.fill_(torch.nan)
    output, found = gradients(copied, inputs_of("vit", 3))
    plain, expected = gradients(build("vit", "none"), inputs_of("vit", 3))
    assert torch.equal(output, plain)
    assert reference.largest_error(found, expected) < 1e-10


@pytest.mark.parametrize("mode", MODES)
def test_a_block_that_is_used_twice_under_autocast_is_repeated_exactly(mode: str) -> None:
    """Shared layers: autocast casts a weight once in the first pass, and again when a block runs by itself."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.3), nn.Linear(8, 8))])

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = x + self.layers[0](x)
            return x

    found = []
    for each in ("none", mode):
        torch.manual_seed(0)
        found.append(gradients(rematerialise(Shared(), each), torch.ones(4, 8), autocast=True)[1])
    # Without autocast's cache the uses of a weight add up in float32, not in bfloat16.
    assert reference.largest_error(found[0], found[1]) < (1e-10 if mode == "block" else 1e-2)


class InPlace(nn.Module):
    """A block of a product and something in place on it, on its input, or on nothing that matters."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.linear, self.where = nn.Linear(8, 8), where
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor, shift: float = 0.0, *, gate: Tensor | None = None) -> Tensor:
        if self.where == "input":
            x = x.mul_(2)
        hidden = self.linear(x)
        if self.where == "module":
            hidden = self.act(hidden)
        if self.where == "product":
            hidden = hidden.view(-1).relu_().view_as(hidden)
        if self.where == "sum":
            hidden = (hidden + shift).relu_()
        return hidden if gate is None else hidden * gate


def in_place(where: str, mode: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    block = InPlace(where).double()
    rematerialise(nn.ModuleList([block]), mode, [block])
    return block, torch.randn(5, 8, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(("where", "mode"), [*itertools.product(["module", "sum"], MODES), ("product", "block")])
def test_what_works_in_place_inside_a_block_is_exact(where: str, mode: str) -> None:
    found = []
    for each in ("none", mode):
        block, x = in_place(where, each)
        gate = torch.full((5, 1), 2.0, dtype=torch.float64, requires_grad=True)
        block(x * 1, 0.1, gate=gate).pow(2).sum().backward()
        assert x.grad is not None and gate.grad is not None
        found.append(torch.cat([x.grad.reshape(-1), gate.grad.reshape(-1)]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("where", "mode", "message"), [("product", "selective", "out of place"), ("input", "block", "its own input")]
)
def test_what_cannot_be_repeated_is_refused_in_one_line(where: str, mode: str, message: str) -> None:
    block, x = in_place(where, mode)
    with pytest.raises(UsageError, match=message) as caught:
        block(x * 1)
    assert "\n" not in str(caught.value)
    with torch.no_grad():
        block(x * 1)


def test_mistakes_are_refused_in_one_line() -> None:
    vit_tower = build("vit", "none")
    for tower, mode, blocks, message in (
        (vit_tower, "some", None, "none, block, selective"),
        (nn.Linear(3, 3), "block", None, "pass blocks="),
        (build("vit", "block"), "selective", None, "pass blocks="),
        (vit_tower, "block", [nn.Linear(3, 3)], "no part of the tower"),
    ):
        with pytest.raises(UsageError, match=message) as caught:
            rematerialise(tower, mode, blocks)
        assert "\n" not in str(caught.value)
    assert rematerialise(vit_tower, "none") is vit_tower
    gradients(rematerialise(vit_tower, "block", [vit_tower.get_submodule("blocks.1")]), inputs_of("vit", 2))


def timm_blocks(name: str, **options: object) -> dict[str, int]:
    with torch.device("meta"):
        found = blocks_of(timm.create_model(name, num_classes=0, **options))
    return {kind: sum(type(block).__name__ == kind for block in found) for kind in {type(b).__name__ for b in found}}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit_tiny_patch16_224", {"Block": 12}),
        ("resnet50", {"Bottleneck": 16}),
        ("resnet10t", {"BasicBlock": 4}),
        ("convnext_tiny", {"ConvNeXtBlock": 18}),
        ("swin_tiny_patch4_window7_224", {"SwinTransformerBlock": 12}),
        ("efficientnet_b0", {"DepthwiseSeparableConv": 1, "InvertedResidual": 15}),
        ("coatnet_0_rw_224", {"MbConvBlock": 5, "TransformerBlock2d": 9}),
        ("dm_nfnet_f0", {"NormFreeBlock": 12}),
    ],
)
def test_the_innermost_repeated_blocks_of_timm_are_found(name: str, expected: dict[str, int]) -> None:
    assert timm_blocks(name) == expected


def test_our_text_towers_blocks_are_found_in_order() -> None:
    tower = text()
    assert blocks_of(tower) == list(tower.get_submodule("blocks").children())
