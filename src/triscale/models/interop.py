"""Tensors of our towers under the names and in the shapes of other packages, by one table for both directions.

A `Rule` tells where tensors of ours are in theirs. Names hold `*` for a number and `**` for the rest of a name. Where
the numbers of tensors differ, they are joined along the first dimension: one `qkv` of ours is their `q`, `k` and `v`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from triscale.data.settings import Fit
from triscale.errors import UsageError
from triscale.models.settings import ModelSettings

Form = Literal["same", "transposed", "unbatched", "vector"]
"""What becomes of a tensor: nothing, a matrix is transposed, leading dimensions of 1 go, or a number is a vector."""
SCALE = "loss.logit_scale"
BIAS = "loss.logit_bias"


@dataclass(frozen=True)
class Rule:
    """Tensors of ours, and the tensors of theirs that hold the same numbers."""

    ours: str | tuple[str, ...]
    theirs: str | tuple[str, ...]
    form: Form = "same"


@dataclass(frozen=True, kw_only=True)
class ForeignModel:
    """A model of another package, in our words."""

    model: ModelSettings
    """Towers that give the same embeddings."""
    image_size: int
    """Side of the images, in pixels."""
    fit: Fit
    """How an image becomes square."""
    tokens: int
    """Length of a token row."""
    vocabulary: int
    """Number of token ids."""
    rules: tuple[Rule, ...]
    """Where our tensors are in its weights."""
    bias: bool
    """Whether its loss has a `logit_bias` beside the scale."""
    ignored: tuple[str, ...] = ()
    """Names of tensors that need not be there and are not read: constants."""


class _Link(NamedTuple):
    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    form: Form


def to_theirs(rules: Sequence[Rule], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under their names, in their shapes; also on the meta device.

    Raises:
        UsageError: a tensor of ours has no place among theirs.
    """
    found: dict[str, Tensor] = {}
    for link in _links(rules, tensors):
        parts = [_formed(tensors[name], link.form) for name in link.ours]
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        pieces = (joined,) if len(link.theirs) == 1 else joined.chunk(len(link.theirs))
        found |= dict(zip(link.theirs, pieces, strict=True))
    return found


def to_ours(rules: Sequence[Rule], expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors under our names, in our shapes; floating-point ones in float32.

    Args:
        rules: of their format.
        expected: our tensors, on the meta device.
        tensors: theirs, whose names and shapes `check_fit` has found right.
    """
    found: dict[str, Tensor] = {}
    for link in _links(rules, expected):
        parts = [_as_float32(tensors[name]) for name in link.theirs]
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        wanted = [expected[name] for name in link.ours]
        pieces = (joined,) if len(wanted) == 1 else joined.split([tensor.shape[0] for tensor in wanted])
        for name, tensor, piece in zip(link.ours, wanted, pieces, strict=True):
            back = piece.T if link.form == "transposed" else piece
            found[name] = back.reshape(tensor.shape).contiguous()
    return found


def check_fit(
    rules: Sequence[Rule],
    expected: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    *,
    ignored: Sequence[str],
    where: str,
) -> None:
    """Raise UsageError, naming the first misfit and their number, unless `tensors` are the format's of our `expected`.

    Args:
        rules: of their format.
        expected: our tensors, on the meta device.
        tensors: theirs.
        ignored: names that are of no concern.
        where: their file, for the message.
    """
    wanted = to_theirs(rules, expected)
    misfits = [f"lacks {name}" for name in wanted if name not in tensors]
    for name, tensor in tensors.items():
        if name not in wanted and name not in ignored:
            misfits.append(f"has {name}, which the model has not")
        elif name in wanted and wanted[name].shape != tensor.shape and not wanted[name].numel() == tensor.numel() == 1:
            misfits.append(f"has {name} as {tuple(tensor.shape)}, the configuration says {tuple(wanted[name].shape)}")
        elif name in wanted and tensor.is_floating_point() != wanted[name].is_floating_point():
            misfits.append(f"has {name} as {tensor.dtype}, which is no weight")
    if misfits:
        more = f" (and {len(misfits) - 1} more that do not fit)" if len(misfits) > 1 else ""
        raise UsageError(f"{where} does not fit its configuration: it {misfits[0]}{more}")


def _links(rules: Sequence[Rule], names: Iterable[str]) -> list[_Link]:
    """What belongs together, in the order of our names."""
    compiled = [(_pattern(_names(rule.ours)[0]), rule) for rule in rules]
    links, placed, unplaced = [], set[str](), list[str]()
    for name in names:
        found = next(((match, rule) for pattern, rule in compiled if (match := pattern.fullmatch(name))), None)
        if found is None:
            unplaced.append(name)
            continue
        match, rule = found
        ours, theirs = (tuple(_filled(each, match) for each in _names(side)) for side in (rule.ours, rule.theirs))
        links.append(_Link(ours, theirs, rule.form))
        placed.update(ours)
    left = [name for name in unplaced if name not in placed]
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise UsageError(f"the format has no place for {left[0]}{more}")
    return links


def _names(side: str | tuple[str, ...]) -> tuple[str, ...]:
    return (side,) if isinstance(side, str) else side


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\*\*", "(.+)").replace(r"\*", r"(\d+)"))


def _filled(name: str, match: re.Match[str]) -> str:
    """The name with what the match found in place of its stars, one after the other."""
    groups = iter(match.groups())
    return re.sub(r"\*\*|\*", lambda _: next(groups), name)


def _formed(tensor: Tensor, form: Form) -> Tensor:
    if form == "transposed":
        return tensor.T.contiguous()
    if form == "vector":
        return tensor.reshape(-1)
    while form == "unbatched" and tensor.ndim > 1 and tensor.shape[0] == 1:
        tensor = tensor[0]
    return tensor


def _as_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32) if tensor.is_floating_point() else tensor
