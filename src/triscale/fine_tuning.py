"""Recipes for any trained model: what its description puts into a run's config. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from triscale.config import RunConfig, flatten, to_dict
from triscale.data.settings import Fit
from triscale.errors import UsageError
from triscale.models.settings import ModelSettings

OF_THE_MODEL = ("image_size", "canvas", "fit", "tokens", "vocabulary")
"""Settings of data that follow from the model."""
_FREE = ("model.dropout", "model.drop_path")
"""Settings of towers that no weight's shape or meaning depends on."""
_FIXED = ("data.image_size", "data.tokens", "data.vocabulary", "data.tokenizer")


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """What a trained model asks of a run that goes on training it."""

    model: ModelSettings
    image_size: int
    """Side in pixels."""
    fit: Fit
    """How an image becomes square."""
    mean: tuple[float, float, float]
    """Of the channels, in [0, 1]."""
    std: tuple[float, float, float]
    """Of the channels."""
    tokens: int
    """Length of a token row."""
    vocabulary: int
    """Number of token ids."""
    logit_scale: float
    """The factor on cosines."""
    bias: bool
    """Whether its loss has a bias beside the factor: the sigmoid loss of SigLIP."""


@dataclass(frozen=True)
class FineTuning:
    """A recipe whose towers, tokenizer and preprocessing are those of the model that --train.init names.

    Args:
        of: what the run is made from besides; see `with_model`.
    """

    of: RunConfig


def with_model(config: RunConfig, described: ModelDescription) -> RunConfig:
    """The config with a trained model's towers, what they ask of the data, and its loss with its temperature.

    As with presets, a config.json then holds all of it. The loss is SigLIP's where the model has its bias, else the
    softmax loss. The factor's clamp goes where the model was trained without: SigLIP, and factors above it.
    """
    data = replace(
        config.data,
        image_size=described.image_size,
        canvas=0,
        fit=described.fit,
        tokens=described.tokens,
        vocabulary=described.vocabulary,
    )
    clamp = config.loss.max_logit_scale
    # ln 100 in float32, as CLIP's own weights hold it, may be a little more than ln 100.
    unclamped = described.bias or described.logit_scale > clamp * (1 + 1e-5)
    loss = replace(
        config.loss,
        name="sigmoid" if described.bias else "info_nce",
        logit_scale=described.logit_scale,
        max_logit_scale=0.0 if unclamped else clamp,
    )
    model = replace(described.model, image_mean=described.mean, image_std=described.std)
    return replace(config, model=model, data=data, loss=loss)


def as_begun(config: RunConfig, begun: RunConfig) -> RunConfig:
    """What `with_model` gave when the run began, whose config.json says `begun`: the model may be gone by now."""
    data = replace(config.data, **{name: getattr(begun.data, name) for name in OF_THE_MODEL})
    return replace(config, model=begun.model, data=data, loss=begun.loss)


def refuse_other_model(default: RunConfig, asked: RunConfig) -> None:
    """Raise UsageError where options ask for other towers, or another tokenizer, than the model's."""
    old, new = flatten(to_dict(default)), flatten(to_dict(asked))
    for name in new:
        fixed = name in _FIXED or (name.startswith("model.") and name not in _FREE)
        if fixed and new[name] != old[name]:
            raise UsageError(
                f"--{name.replace('_', '-')} {new[name]}: the model is that of --train.init, which has {old[name]!r}; "
                "only --model.dropout and --model.drop-path can be set"
            )
