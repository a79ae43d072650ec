"""What a recipe or the command line says about data. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class AugmentSettings:
    """Random changes of training images. Each is off at its default; probabilities are fractions of 1."""

    zoom: tuple[float, float] = (1.0, 1.0)
    """Smallest and largest magnification, drawn log-uniformly; below 1 the picture shrinks into its background."""
    stretch: float = 1.0
    """Largest factor between the magnifications of width and height, either way, drawn log-uniformly."""
    rotation: float = 0.0
    """Largest rotation, in degrees, either way."""
    shear: float = 0.0
    """Largest slant, in degrees, either way."""
    shift: float = 0.0
    """Largest displacement along each axis, as a fraction of the side, either way."""
    warp: float = 0.0
    """Largest displacement by each smooth wave that bends the picture, as a fraction of the side."""
    flip: float = 0.0
    """Probability of mirroring left and right."""
    fill: Literal["edge", "white"] = "edge"
    """What lies outside the picture: its outermost pixels repeated, or white."""
    brightness: float = 0.0
    """Largest brightness added or taken away, as a fraction of white."""
    contrast: float = 0.0
    """Largest relative change of contrast about mid-grey; 0.4 is a factor of 0.6 to 1.4."""
    saturation: float = 0.0
    """Largest relative change of saturation; 0.4 is a factor of 0.6 to 1.4."""
    hue: float = 0.0
    """Largest rotation of hue, in degrees, either way; 180 gives every hue."""
    grayscale: float = 0.0
    """Probability of a grey image, by a random mix of the channels."""
    outline: float = 0.0
    """Probability of dark outlines where colours change, over the picture or over white, as drawings have them."""
    two_tone: float = 0.0
    """Probability of a black and white image: black where tones are dark, in themselves or against what is around."""
    blur: float = 0.0
    """Probability of a blur of up to one pixel's standard deviation."""
    erase: float = 0.0
    """Probability of covering a rectangle, of sides up to half of the image's, with a random colour."""


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Where samples come from and what becomes of them on the way to the towers."""

    root: str = ""
    """Folder that `train` and `eval` are relative to, and paths in tables, which must not leave it."""
    train: str = ""
    """Training source: "scenes"; tar shards, CSV or Parquet files below `root` as paths, globs or brace ranges,
    separated by spaces ("train/*.tar", "{00..12}.tar", "pairs.csv", "*.parquet"); "folder:DIR" of images with KEY.txt
    beside them; "classes:DIR" of class folders; "hf:NAME[/CONFIG][:SPLIT]", a Hugging Face data set. See docs/data.md.
    """
    columns: tuple[str, ...] = ()
    """Columns of tables: "image=NAME", "caption=NAME" (several: all are candidates), "label=NAME". Usual names such as
    filepath, image, title, caption, text and label need not be told."""
    eval: tuple[str, ...] = ()
    """Evaluation sets: "scenes:NAME", or folders in CLIP_benchmark's layout as paths or globs below `root`."""
    shifts: tuple[str, ...] = ()
    """Names of the evaluation sets whose mean is `shift_mean`; the drop is measured from the first set of `eval`."""
    image_size: int = 32
    """Side, in pixels, of the images that the image tower sees."""
    canvas: int = 0
    """Side, in pixels, that images are decoded to before augmentation; 0 means `image_size`."""
    fit: Literal["crop", "pad"] = "crop"
    """How an image becomes square: "crop" its middle, or "pad" it with white."""
    tokens: int = 16
    """Length of a token row; longer captions are cut, shorter ones padded."""
    vocabulary: int = 8192
    """Largest number of sentencepiece tokens; it shrinks to what the captions allow."""
    tokenizer: str = ""
    """A sentencepiece model to use; empty: one is trained from the source's captions."""
    caption_fields: tuple[str, ...] = ("txt",)
    """Where captions come from; one is drawn per sample: "txt", or "json:NAME" for a field of the sidecar."""
    caption_templates: tuple[str, ...] = ()
    """Prompt templates with {c}; one is drawn and put around the caption. Empty: the caption as it is."""
    caption_part_dropout: float = 0.0
    """Probability that a comma-separated part of a caption, other than its first, is left out."""
    ids: Literal["none", "label", "caption"] = "none"
    """What makes two samples of a batch positives of each other: nothing, an equal `.cls`, or an equal caption."""
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    workers: int = 1
    """Processes that read, decode and augment; 0: the training process does it itself, and whenever a batch is too
    large to be held (see memory.host_gib)."""
    max_bad: float = 0.05
    """Largest fraction of bad samples before the run stops."""
