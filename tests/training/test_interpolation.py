"""Interpolated weights: exact at both ends, WiSE-FT's formula in between, and put back to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from triscale.errors import UsageError
from triscale.training.checkpoint import module_tensors
from triscale.training.interpolation import interpolate, with_weights


def module(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    built = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    built(torch.randn(8, 3))  # statistics and their counter move
    return built


def tensors(seed: int, steps: int = 1) -> dict[str, Tensor]:
    found = {name: tensor.clone() for name, tensor in module_tensors({"tower": module(seed)}).items()}
    found["tower.1.num_batches_tracked"].fill_(steps)
    return found


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_ends_are_bitwise_the_weights_and_statistics_of_either(share: float) -> None:
    first, last = tensors(0, 3), tensors(1, 9)
    found = interpolate(first, last, share)
    wanted = last if share else first
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    found["tower.0.weight"].zero_()
    assert wanted["tower.0.weight"].any(), "the result shares memory with what it was made from"


def test_in_between_every_tensor_is_the_weighted_mean_and_counters_are_the_trained_ones() -> None:
    first, last = tensors(0, 3), tensors(1, 9)
    last["tower.0.bias"] = first["tower.0.bias"].clone()  # as where it was frozen
    for share in (0.1, 0.5, 0.7):
        found = interpolate(first, last, share)
        for name in ("tower.0.weight", "tower.1.running_mean", "tower.1.running_var"):
            expected = (1 - share) * first[name].double() + share * last[name].double()
            torch.testing.assert_close(found[name].double(), expected, rtol=1e-6, atol=1e-7)
        assert torch.equal(found["tower.0.bias"], first["tower.0.bias"])
        assert int(found["tower.1.num_batches_tracked"]) == 9


def test_weights_of_another_model_are_refused() -> None:
    first, last = tensors(0), tensors(1)
    del first["tower.0.bias"]
    with pytest.raises(UsageError, match="not of the model that was trained"):
        interpolate(first, last, 0.5)


def test_a_module_holds_other_weights_within_the_context_alone() -> None:
    built = {"tower": module(0)}
    before = {name: tensor.clone() for name, tensor in module_tensors(built).items()}
    other = tensors(1, 9)
    with pytest.raises(KeyboardInterrupt), with_weights(built, other):
        assert all(torch.equal(tensor, other[name]) for name, tensor in module_tensors(built).items())
        raise KeyboardInterrupt
    assert all(torch.equal(tensor, before[name]) for name, tensor in module_tensors(built).items())
    with pytest.raises(UsageError, match="does not fit"), with_weights(built, {"tower.0.weight": torch.ones(1)}):
        pass
    assert all(torch.equal(tensor, before[name]) for name, tensor in module_tensors(built).items())
