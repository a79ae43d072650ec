"""The classifier's loss against torch's own cross-entropy, whole and over ranks; were it wrong, phase one would be."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from ranks import run_ranks
from triscale import losses
from triscale.errors import UsageError
from triscale.losses import SoftmaxClassifier, classification
from triscale.training.step import ContrastiveStep

IDS = torch.tensor([7, 3, 11, 3, -1, 7, 5, 11, 3, 40, 7, 7, 3])
CLASSES = torch.tensor([11, 3, 7])
COUNTS = {1: [13], 2: [9, 4], 3: [3, 1, 9]}


def rows(dtype: torch.dtype) -> Tensor:
    return torch.randn(13, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)


def filled(dtype: torch.dtype, smoothing: float = 0.0) -> SoftmaxClassifier:
    loss = SoftmaxClassifier(6, CLASSES, label_smoothing=smoothing).to(dtype)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return loss


def plain(loss: SoftmaxClassifier, x: Tensor, smoothing: float) -> Tensor:
    """Torch's formula over the rows whose id is a class, class by class in order of the ids."""
    chosen = [row for row, one in enumerate(IDS.tolist()) if one in (3, 7, 11)]
    target = torch.tensor([(3, 7, 11).index(int(IDS[row])) for row in chosen])
    logits = x[chosen] @ loss.weight.T + loss.bias
    return nn.functional.cross_entropy(logits, target, label_smoothing=smoothing)


def every_rank(rank: int, world: int) -> dict[str, Tensor]:
    first = sum(COUNTS[world][:rank])
    mine = slice(first, first + COUNTS[world][rank])
    loss = filled(torch.float64, 0.1)
    x = rows(torch.float64)[mine].requires_grad_()
    value = loss(x, ids=IDS[mine])
    value.backward()
    assert x.grad is not None and loss.weight.grad is not None and loss.bias.grad is not None
    return {
        "loss": value.detach(),
        "x": x.grad,
        "weight": loss.weight.grad,
        "bias": loss.bias.grad,
        "accuracy": loss.metrics["accuracy"],
    }


@pytest.mark.parametrize(("world", "chunked"), [(1, False), (1, True), (2, False), (3, False)])
def test_it_is_torchs_cross_entropy_over_all_ranks(world: int, chunked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if chunked:
        monkeypatch.setattr(classification, "LOGITS_AT_ONCE", 7)
    parts = run_ranks(every_rank, world) if world > 1 else [every_rank(0, 1)]
    loss = filled(torch.float64, 0.1)
    x = rows(torch.float64).requires_grad_()
    wanted = plain(loss, x, 0.1)
    wanted.backward()
    assert x.grad is not None
    assert all(abs(float(part["loss"] - wanted.detach())) < 1e-12 for part in parts)
    assert torch.allclose(torch.cat([part["x"] for part in parts]), x.grad, rtol=0, atol=1e-12)
    for name in ("weight", "bias"):
        summed = torch.stack([part[name] for part in parts]).sum(0)
        assert torch.allclose(summed, getattr(loss, name).grad, rtol=0, atol=1e-12)
    guesses = CLASSES.sort().values[(x @ loss.weight.T + loss.bias).argmax(1)]
    known = torch.isin(IDS, CLASSES)
    assert all(
        float(part["accuracy"]) == pytest.approx(float((guesses == IDS)[known].double().mean())) for part in parts
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_in_the_step_it_gives_the_gradients_of_plain_autograd(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tower = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6)).to(dtype)
    loss = filled(dtype)
    modules = (tower, loss)
    plain(loss, tower(rows(dtype)), 0.0).backward()
    wanted = [parameter.grad for module in modules for parameter in module.parameters()]
    for module in modules:
        module.zero_grad()
    out = ContrastiveStep({"image": tower}, loss, micro_batch=4, keep=1)({"image": rows(dtype)}, ids=IDS)
    assert math.isfinite(out.loss) and "accuracy" in out.metrics
    limit = 1e-10 if dtype == torch.float64 else 1e-5
    for parameter, direct in zip((p for module in modules for p in module.parameters()), wanted, strict=True):
        assert parameter.grad is not None and direct is not None
        assert float((parameter.grad - direct).norm() / direct.norm()) < limit


def test_without_any_known_label_nothing_is_learnt_and_nothing_breaks() -> None:
    loss, x = filled(torch.float32), rows(torch.float32).requires_grad_()
    value = loss(x, ids=torch.full((13,), -1))
    value.backward()
    assert float(value.detach()) == 0 and x.grad is not None and not x.grad.any()


@pytest.mark.parametrize("classes", [[], [4], [4, 4], [-1, 2]])
def test_classes_that_are_none_are_refused(classes: list[int]) -> None:
    with pytest.raises(UsageError, match="two or more distinct ids"):
        SoftmaxClassifier(4, torch.tensor(classes, dtype=torch.int64))


def test_missing_labels_are_one_line() -> None:
    with pytest.raises(UsageError, match="--data.ids label"):
        filled(torch.float32)(rows(torch.float32))
    assert losses.SoftmaxClassifier is SoftmaxClassifier
