"""InfoNCE, dense and tiled, against the formula in loops and against plain autograd."""

from __future__ import annotations

import math

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import reference
from triscale.losses import InfoNCE, tiled

IDS = {
    "none": lambda n: None,
    "some": lambda n: torch.arange(n) % max(1, n // 3) - 1,
    "one": lambda n: torch.zeros(n).long(),
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles smaller than the batches here, and no divisor of them."""
    monkeypatch.setattr(tiled, "TILE_ROWS", 5)
    monkeypatch.setattr(tiled, "TILE_COLUMNS", 7)


def run(loss: InfoNCE, x: Tensor, y: Tensor, ids: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    value = loss(x, y, ids)
    value.backward()
    assert x.grad is not None and y.grad is not None and loss.logit_scale.grad is not None
    return value.detach(), {"x": x.grad, "y": y.grad, "logit_scale": loss.logit_scale.grad}


@pytest.mark.parametrize("form", [True, False], ids=["tiled", "dense"])
@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("rows", [1, 2, 5, 23])
def test_the_loss_is_the_formula_in_loops(form: bool, ids: str, rows: int, rng: torch.Generator) -> None:
    x, y = torch.randn(2, rows, 4, dtype=torch.float64, generator=rng)
    groups = IDS[ids](rows)
    loss = InfoNCE(form, logit_scale=20.0).double()
    factor = float(loss.logit_scale.detach().exp())
    expected = reference.info_nce_loop(x, y, factor, None if groups is None else groups.tolist())
    assert loss(x, y, groups).item() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("form", [True, False], ids=["tiled", "dense"])
@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_gradients_are_those_of_plain_autograd(
    form: bool, ids: str, dtype: torch.dtype, limit: float, rng: torch.Generator
) -> None:
    x, y = torch.randn(2, 37, 6, dtype=torch.float64, generator=rng)
    groups = IDS[ids](37)
    a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
    loss = InfoNCE(form, logit_scale=30.0).to(dtype)
    scale = loss.logit_scale.detach().double().requires_grad_()
    reference.info_nce(a, b, scale, groups).backward()
    expected = {"x": a.grad, "y": b.grad, "logit_scale": scale.grad}
    _, found = run(loss, x.to(dtype), y.to(dtype), groups)
    assert reference.largest_error(found, expected) < limit  # type: ignore[arg-type]


@pytest.mark.parametrize("form", [True, False], ids=["tiled", "dense"])
def test_the_loss_is_finite_at_any_scale(form: bool, rng: torch.Generator) -> None:
    x, y = torch.randn(2, 23, 4, generator=rng)
    for scale in (1e-3, 100.0, 1e4):
        value, gradients = run(InfoNCE(form, logit_scale=scale), x, y, None)
        assert value.isfinite() and all(g.isfinite().all() for g in gradients.values())


@pytest.mark.parametrize("form", [True, False], ids=["tiled", "dense"])
def test_closed_forms_on_degenerate_inputs(form: bool) -> None:
    same = torch.ones(9, 3)
    assert InfoNCE(form)(same, same).item() == pytest.approx(math.log(9), rel=1e-6)  # all alike: ln B
    assert InfoNCE(form)(same, same, torch.zeros(9).long()).item() == pytest.approx(math.log(9), rel=1e-6)
    axes = torch.eye(3)
    expected = math.log(1 + 2 * math.exp(-3.0))
    assert InfoNCE(form, logit_scale=3.0)(axes, axes).item() == pytest.approx(expected, rel=1e-5)


def test_low_precision_inputs_are_scored_in_float32(rng: torch.Generator) -> None:
    x, y = torch.randn(2, 23, 4, generator=rng).bfloat16()
    value, gradients = run(InfoNCE(), x, y, None)
    exact, _ = run(InfoNCE(), x.float(), y.float(), None)
    assert value.dtype == torch.float32 and gradients["x"].dtype == torch.bfloat16
    assert float(value) == float(exact)


def test_the_tiled_loss_makes_no_gradient_under_no_grad(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("the second sweep ran")

    monkeypatch.setattr(tiled, "_softmax_gradients", forbidden)
    with torch.no_grad():
        assert InfoNCE()(*torch.randn(2, 8, 4, generator=rng)).isfinite()


@pytest.mark.parametrize("form", [True, False], ids=["tiled", "dense"])
def test_the_accuracy_counts_any_positive_as_a_hit(form: bool) -> None:
    x = torch.eye(4)
    loss = InfoNCE(form)
    loss(x, x)
    assert float(loss.metrics["accuracy"]) == 1.0
    loss(x, x.flip(0))
    assert float(loss.metrics["accuracy"]) == 0.0
    loss(x, x.flip(0), torch.zeros(4).long())
    assert float(loss.metrics["accuracy"]) == 1.0


def test_the_clamp_holds_the_factor_at_its_maximum() -> None:
    loss = InfoNCE(logit_scale=500.0, max_logit_scale=100.0)
    loss.clamp_()
    assert float(loss.logit_scale.detach().exp()) == pytest.approx(100.0, rel=1e-6)
    free = InfoNCE(logit_scale=500.0, max_logit_scale=0.0)
    free.clamp_()
    assert float(free.logit_scale.detach().exp()) == pytest.approx(500.0, rel=1e-6)


@pytest.mark.parametrize(("x", "y", "ids"), [((0, 4), (0, 4), None), ((3, 4), (2, 4), None), ((3, 4), (3, 4), 2)])
def test_rows_that_do_not_match_are_refused(x: tuple[int, int], y: tuple[int, int], ids: int | None) -> None:
    with pytest.raises((ValueError, TypeCheckError)):
        InfoNCE()(torch.ones(x), torch.ones(y), None if ids is None else torch.zeros(ids).long())


def test_the_tiled_loss_never_holds_the_score_matrix(monkeypatch: pytest.MonkeyPatch, rng: torch.Generator) -> None:
    """No tensor of B*B elements is made: a dispatch mode sees every tensor that any operation returns."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    monkeypatch.setattr(tiled, "TILE_ROWS", 32)
    monkeypatch.setattr(tiled, "TILE_COLUMNS", 64)
    x, y = torch.randn(2, 512, 8, generator=rng)
    with Watch():
        run(InfoNCE(), x, y, None)
    assert largest <= tiled.ACCURACY_ROWS * 512 < 512 * 512
