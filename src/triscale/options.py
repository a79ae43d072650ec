"""Options of the commands that take no recipe, as dataclasses; a field's docstring is its --help text."""

from __future__ import annotations

from dataclasses import dataclass

from tyro.conf import Positional

from triscale.data.scenes import SEED


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """triscale eval RUN"""

    run: Positional[str]
    """The run folder."""
    data: tuple[str, ...] = ()
    """Evaluation sets: folders or globs in CLIP_benchmark's layout or of class folders, or "scenes:NAME". None given:
    those of the run."""
    shifts: tuple[str, ...] = ()
    """Names of those sets whose distribution is shifted; their mean and the drop are given."""
    device: str = "cpu"
    """cpu, cuda or mps."""
    json: str = ""
    """File for the results as JSON."""


@dataclass(frozen=True, kw_only=True)
class ClassifyOptions:
    """triscale classify RUN --labels "a,b" IMAGE..."""

    run: Positional[str]
    """The run folder."""
    images: Positional[tuple[str, ...]]
    """Image files."""
    labels: str
    """The labels to choose from, separated by commas."""
    templates: tuple[str, ...] = ("{c}",)
    """Prompt templates; {c} is the label. A label's embedding is the mean over them."""
    device: str = "cpu"
    """cpu, cuda or mps."""
    json: str = ""
    """File for the probabilities as JSON."""


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """triscale data pack scenes DIR"""

    source: Positional[str]
    """What to write: scenes."""
    folder: Positional[str]
    """A new or empty folder."""
    size: int = 32
    """Side of the images in pixels."""
    seed: int = SEED
    """Other seeds give other scenes."""
    train_samples: int | None = None
    """Training samples. None: all."""
    eval_samples: int | None = None
    """Samples of each evaluation set. None: all."""


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions:
    """triscale data tokenizer SOURCE FILE"""

    source: Positional[str]
    """Training source: "scenes", or shards as a path or glob such as "DIR/train/*.tar"."""
    output: Positional[str]
    """File for the sentencepiece model; --data.tokenizer takes it."""
    vocabulary: int = 8192
    """Largest number of tokens; it shrinks to what the captions allow."""
    fields: tuple[str, ...] = ("txt",)
    """Where captions come from: "txt", or "json:NAME" for a field of the sidecar."""
