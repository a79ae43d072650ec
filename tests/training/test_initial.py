"""What a run begins with: weights of another run by tower and part, and fresh ones where that has none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from triscale.errors import UsageError
from triscale.losses import InfoNCE, Sigmoid, SoftmaxClassifier
from triscale.training.checkpoint import module_tensors
from triscale.training.initial import take_weights


class Tower(nn.Module):
    def __init__(self, width: int = 4, normalised: bool = True) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width) if normalised else nn.Identity())
        self.projection = nn.Linear(width, 2)


def tensors(loss: nn.Module, **towers: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module_tensors({**towers, "loss": loss}).items()}


def classifier(*classes: int) -> SoftmaxClassifier:
    loss = SoftmaxClassifier(2, torch.tensor(classes))
    nn.init.normal_(loss.weight)
    return loss


def test_towers_and_loss_are_taken_whole() -> None:
    source, loss = tensors(InfoNCE(logit_scale=7.0), image=Tower(), text=Tower()), InfoNCE()
    towers = {"image": Tower(), "text": Tower()}
    assert take_weights(towers, loss, source) == []
    for name, tensor in tensors(loss, **towers).items():
        assert torch.equal(tensor, source[name]), name


def test_a_tower_or_part_that_the_checkpoint_lacks_stays_fresh_and_is_named() -> None:
    source = {name: tensor for name, tensor in tensors(InfoNCE(), image=Tower()).items() if "projection" not in name}
    towers = {"image": Tower(), "text": Tower()}
    fresh = tensors(InfoNCE(), **towers)
    lines = take_weights(towers, InfoNCE(), source)
    assert [line.split()[0] for line in lines] == ["image.projection", "text"]
    for name, tensor in module_tensors(towers).items():
        assert torch.equal(tensor, source.get(name, fresh[name])), name


def test_losses_share_their_temperature_and_a_classifier_goes_on_with_its_own_classes_alone() -> None:
    sigmoid = Sigmoid(batch_size=8)
    assert take_weights({}, sigmoid, tensors(InfoNCE(logit_scale=3.0))) == []
    assert float(sigmoid.logit_scale.detach().exp()) == pytest.approx(3.0)
    source = tensors(classifier(3, 5))
    same, other, contrastive = classifier(3, 5), classifier(3, 6), InfoNCE()
    assert take_weights({}, same, source) == []
    assert torch.equal(same.weight, source["loss.weight"])
    before = other.weight.clone()
    for loss in (other, contrastive):
        (line,) = take_weights({}, loss, source)
        assert line.startswith("loss begins with fresh weights")
    assert torch.equal(other.weight, before) and torch.equal(other.classes, torch.tensor([3, 6]))


@pytest.mark.parametrize(
    ("tower", "words"),
    [
        (Tower(width=5), r"image.backbone.0.weight is \(4, 3\) in the checkpoint, \(5, 3\) in the model"),
        (Tower(normalised=False), None),
    ],
)
def test_shapes_that_do_not_fit_are_named_with_the_first_tensor(tower: nn.Module, words: str | None) -> None:
    source = tensors(InfoNCE(), image=Tower())
    if words is None:
        assert take_weights({"image": tower}, InfoNCE(), source) == [], "what the tower has no use for is left"
        return
    before = module_tensors({"image": tower})["image.projection.weight"].clone()
    with pytest.raises(UsageError, match=words) as refused:
        take_weights({"image": tower}, InfoNCE(), source)
    assert "\n" not in str(refused.value)
    assert torch.equal(module_tensors({"image": tower})["image.projection.weight"], before)


def test_a_part_that_is_there_by_half_is_refused() -> None:
    source = tensors(InfoNCE(), image=Tower(normalised=False))
    with pytest.raises(UsageError, match="no image.backbone.1"):
        take_weights({"image": Tower()}, InfoNCE(), source)
