"""BatchNorm in a finished module: found, and replaced by a norm that knows no batch and so fits any micro-batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from timm.layers.norm import LayerNorm2d
from timm.layers.norm_act import BatchNormAct2d, GroupNormAct, LayerNormAct2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from triscale.errors import UsageError

MOST_GROUPS = 32
FEWEST_CHANNELS = 8

# Forward passes that do nothing but BatchNorm, and for timm's dropout and activation behind it.
_KNOWN = (_BatchNorm.forward, nn.SyncBatchNorm.forward, BatchNormAct2d.forward)


def replace_batch_norm(module: nn.Module, replacement: Callable[[_BatchNorm], nn.Module]) -> nn.Module:
    """Put `replacement(layer)` in place of every BatchNorm, in place; one that is used in several places, once.

    Returns:
        The module, or its replacement where it is a BatchNorm itself.

    Raises:
        UsageError: a BatchNorm that computes something else besides.
    """
    replaced: dict[nn.Module, nn.Module] = {}
    for layer in module.modules():
        if isinstance(layer, _BatchNorm):
            if type(layer).forward not in _KNOWN:
                kind = type(layer).__name__
                raise UsageError(f"{kind} is BatchNorm with a forward pass of its own: replace it by hand")
            replaced[layer] = replacement(layer)
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):  # named_children() leaves out a second use
            if child is not None and child in replaced:
                setattr(parent, name, replaced[child])
    return replaced.get(module, module)


def convert_batch_norm(module: nn.Module, kind: Literal["group_norm", "layer_norm"] = "group_norm") -> nn.Module:
    """Replace every BatchNorm of a module by GroupNorm or LayerNorm, in place, and rows no longer depend on each other.

    Weights and biases, epsilon, device, data type, training mode, and the activation and dropout of timm's
    BatchNormAct2d are kept; running statistics are dropped. Works on the meta device. To be called on a new tower:
    trained weights would stand behind other statistics. timm's image towers are to be converted before they become
    part of an `ImageTower`, which chooses its memory format by the kind of norm.

    Groups are as many as divide the channels, up to 32 (Wu and He, *Group Normalization*, arXiv 1803.08494, section
    3.1; BiT, arXiv 1912.11370), with at least 8 channels each, because fewer cost accuracy and one, instance norm, a
    lot (Wu and He, table 3; timm's EfficientNets with GroupNorm have 8, too). LayerNorm is over the channels of each
    place, as in ConvNeXt. BatchNorm1d becomes for (m, c) LayerNorm either way.

    Returns:
        The module, or its replacement where it is a BatchNorm itself.

    Raises:
        UsageError: a BatchNorm that computes something else besides.
    """
    return replace_batch_norm(module, {"group_norm": _group_norm, "layer_norm": _layer_norm}[kind])


def groups_of(channels: int) -> int:
    """The largest divisor of `channels` up to 32 that leaves at least 8 channels a group; else 1."""
    most = min(MOST_GROUPS, channels // FEWEST_CHANNELS)
    return next((groups for groups in range(most, 1, -1) if channels % groups == 0), 1)


def _group_norm(layer: _BatchNorm) -> nn.Module:
    groups = 1 if isinstance(layer, nn.BatchNorm1d) else groups_of(layer.num_features)
    kind = GroupNormAct if isinstance(layer, BatchNormAct2d) else nn.GroupNorm
    # Keywords, because timm's and torch's constructors disagree in their order.
    return _taking_over(layer, kind(num_channels=layer.num_features, num_groups=groups, **_common(layer)))


def _layer_norm(layer: _BatchNorm) -> nn.Module:
    """Over the channels of each place; a vector's are all that it has."""
    if isinstance(layer, nn.BatchNorm1d):
        return _group_norm(layer)
    kind = LayerNormAct2d if isinstance(layer, BatchNormAct2d) else LayerNorm2d
    return _taking_over(layer, kind(layer.num_features, **_common(layer)))


def _common(layer: _BatchNorm) -> dict[str, Any]:
    return {"eps": layer.eps, "affine": layer.affine, "device": "meta"}


def _taking_over(layer: _BatchNorm, norm: nn.Module) -> nn.Module:
    """`norm`, made on no device, with what the layer has learned and does besides; device and data type stay."""
    norm.weight, norm.bias = layer.weight, layer.bias
    if isinstance(layer, BatchNormAct2d):
        norm.drop, norm.act = layer.get_submodule("drop"), layer.get_submodule("act")
    norm.training = layer.training
    return norm
