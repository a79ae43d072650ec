"""A trained run, ready to use: embed images and texts, and classify images by names that nobody trained on.

    model = triscale.load("runs/scenes")
    model.classify(["photo.jpg"], ["a dog", "a cat"])   # (1, 2) probabilities

Of a run folder it reads resolved.json, preprocess.json, tokenizer.model and the newest good checkpoint: JSON,
sentencepiece and safetensors, none of which can execute anything.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from triscale.config import from_dict
from triscale.data.decode import decode_image
from triscale.data.samples import BadSample
from triscale.data.text import Tokenizer
from triscale.errors import UsageError
from triscale.evaluation.encoder import Encoder
from triscale.models.dual_encoder import DualEncoder, build_dual_encoder
from triscale.models.prompts import class_embeddings
from triscale.models.settings import ModelSettings
from triscale.training import checkpoint

BATCH_SIZE = 64
"""Images decoded and embedded at once; also texts."""
MAX_IMAGE_SIZE = 4096
"""Largest side in pixels that a run folder may ask for."""
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")

ImageLike = str | Path | Image.Image | np.ndarray
"""A path, a PIL image, or a uint8 array (h, w, 3)."""


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """preprocess.json: what becomes of an image before the image tower's first layer."""

    image_size: int
    """Side in pixels."""
    fit: Literal["crop", "pad"]
    """How an image becomes square."""
    mean: tuple[float, float, float]
    """Of the channels, in [0, 1]."""
    std: tuple[float, float, float]
    """Of the channels."""


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """What of resolved.json the towers are built from."""

    model: ModelSettings
    """The towers."""
    vocabulary: int
    """Number of token ids."""
    tokens: int
    """Length of a token row."""


@dataclass(frozen=True, kw_only=True)
class ZeroShotModel:
    """A trained dual encoder with everything around it; made by `load`. Gradients are off throughout."""

    model: DualEncoder
    """The towers, in evaluation mode."""
    tokenizer: Tokenizer
    """Texts to token rows."""
    encoder: Encoder
    """The same model as `triscale.evaluation` takes it."""
    logit_scale: float
    """The learned factor on cosines."""

    @torch.no_grad()
    def encode_image(self, images: Sequence[ImageLike] | UInt8[Tensor, "n 3 s s"]) -> Float[Tensor, "n d"]:
        """Embed images as rows of length 1.

        Args:
            images: paths, PIL images or uint8 arrays (h, w, 3), mixed as you like, of any size; or one uint8 tensor
                of images that have the run's size already.

        Raises:
            UsageError: an image that cannot be read, or is none of these.
        """
        if isinstance(images, Tensor):
            return self._encode_tensor(images)
        if isinstance(images, str):
            raise UsageError("encode_image takes a list of images: put the one that you have into brackets")
        chunks = [self.encoder.embed_images([_pixels(image) for image in chunk]) for chunk in _chunks(images)]
        return torch.cat(chunks) if chunks else self._no_rows()

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Float[Tensor, "n d"]:
        """Embed texts as rows of length 1; what is longer than the run's token rows is cut."""
        if isinstance(texts, str):
            raise UsageError("encode_text takes a list of texts: put the one that you have into brackets")
        return self.encoder.embed_texts(list(texts)) if texts else self._no_rows()

    @torch.no_grad()
    def classify(
        self,
        images: Sequence[ImageLike] | UInt8[Tensor, "n 3 s s"],
        labels: Sequence[str],
        templates: Sequence[str] = ("{c}",),
    ) -> Float[Tensor, "n k"]:
        """Probabilities of k labels for n images: the softmax of scaled cosines (CLIP, section 3.1.2).

        Args:
            images: as for `encode_image`.
            labels: any names.
            templates: prompts with `{c}` for the label; the embeddings of a label's prompts are averaged.

        Raises:
            UsageError: an unreadable image, no label, no template or one without `{c}`.
        """
        if isinstance(labels, str):
            raise UsageError("classify takes a list of labels, not one string")
        classifier = class_embeddings(self.encode_text, labels, templates)
        return (self.logit_scale * self.encode_image(images) @ classifier.T).softmax(dim=-1)

    def _encode_tensor(self, images: Tensor) -> Tensor:
        size = self.encoder.image_size
        if images.dtype != torch.uint8 or images.shape[1:] != (3, size, size):
            raise UsageError(
                f"a tensor of images must be uint8 (n, 3, {size}, {size}), not {images.dtype} {tuple(images.shape)}"
            )
        chunks = [self.encoder.image(chunk) for chunk in images.split(BATCH_SIZE) if len(chunk)]
        return torch.nn.functional.normalize(torch.cat(chunks).float(), dim=-1) if chunks else self._no_rows()

    def _no_rows(self) -> Tensor:
        return torch.empty(0, self.model.image.projection.out_features, device=self.encoder.device)


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def load(
    path: str | Path, device: str = "cpu", *, average: bool = True, report: Callable[[str], None] = _warn
) -> ZeroShotModel:
    """Load a run folder.

    Args:
        path: the run folder.
        device: where to embed, such as "cpu" or "cuda".
        average: take the moving average of the weights, where the run keeps one, rather than the last ones.
        report: called with one line for each newer checkpoint that is damaged and passed over.

    Raises:
        UsageError: the folder or one of its files is missing, damaged, or does not fit the others.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UsageError(f"no run folder {str(path)!r}: give the folder that `triscale train` wrote")
    resolved, preprocess = _read_resolved(folder / "resolved.json"), _read_preprocess(folder / "preprocess.json")
    tokenizer = Tokenizer(_read_bytes(folder / "tokenizer.model"), resolved.tokens)
    if tokenizer.vocabulary_size != resolved.vocabulary:
        raise UsageError(
            f"tokenizer.model of {str(path)!r} has {tokenizer.vocabulary_size} tokens, "
            f"resolved.json says {resolved.vocabulary}: one of them is another run's"
        )
    found = checkpoint.latest(folder, report=report, with_optimizer=False)
    if found is None:
        raise UsageError(f"run folder {str(path)!r} has no good checkpoint: train it first")
    try:
        tensors = (found.average() if average else None) or found.model()
    except (OSError, SafetensorError) as error:
        raise UsageError(f"checkpoint {str(found.path)!r} cannot be read: {_first_line(error)}") from error
    model = _build(resolved, preprocess, tensors).eval()
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {device!r} cannot be used here: {_first_line(error)}") from error
    return ZeroShotModel(
        model=model,
        tokenizer=tokenizer,
        encoder=_encoder(model, tokenizer, preprocess, device),
        logit_scale=_logit_scale(tensors, found.path),
    )


def _build(resolved: Resolved, preprocess: Preprocess, tensors: dict[str, Tensor]) -> DualEncoder:
    """The towers with the checkpoint's weights."""

    def build() -> DualEncoder:
        return build_dual_encoder(
            resolved.model,
            image_size=preprocess.image_size,
            vocabulary=resolved.vocabulary,
            tokens=resolved.tokens,
        )

    # First without memory: settings that ask for more than the checkpoint holds are refused before any is taken.
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing is copied there
        checkpoint.load_into(build().towers(), tensors)
    with torch.random.fork_rng(devices=[]):
        model = build()
    checkpoint.load_into(model.towers(), tensors)
    model.image.mean.copy_(torch.tensor(preprocess.mean).view(3, 1, 1))
    model.image.std.copy_(torch.tensor(preprocess.std).view(3, 1, 1))
    return model


def _encoder(model: DualEncoder, tokenizer: Tokenizer, preprocess: Preprocess, device: str) -> Encoder:
    @torch.no_grad()
    def image(images: Tensor) -> Tensor:
        return model.image(images.to(device))

    @torch.no_grad()
    def text(texts: list[str]) -> Tensor:
        return model.text(torch.from_numpy(tokenizer.encode(texts)).to(device))

    return Encoder(
        image=image,
        text=text,
        image_size=preprocess.image_size,
        fit=preprocess.fit,
        device=device,
        batch_size=BATCH_SIZE,
    )


def _logit_scale(tensors: dict[str, Tensor], path: Path) -> float:
    """The factor on cosines; a checkpoint holds its natural logarithm."""
    logarithm = tensors.get("loss.logit_scale")
    if logarithm is None or logarithm.numel() != 1 or not abs(float(logarithm)) < 50:
        raise UsageError(f"checkpoint {str(path)!r} holds no usable loss.logit_scale")
    return math.exp(float(logarithm))


def _read_resolved(path: Path) -> Resolved:
    values = _read_object(path, [field.name for field in dataclasses.fields(Resolved)])
    # The file also records what the towers don't depend on.
    resolved = from_dict(Resolved, {field.name: values[field.name] for field in dataclasses.fields(Resolved)})
    if resolved.vocabulary < 1 or resolved.tokens < 1:
        raise UsageError(f"{str(path)!r}: vocabulary and tokens must be at least 1")
    return resolved


def _read_preprocess(path: Path) -> Preprocess:
    values = _read_object(path, [field.name for field in dataclasses.fields(Preprocess)])
    preprocess = from_dict(Preprocess, values)
    if not 1 <= preprocess.image_size <= MAX_IMAGE_SIZE:
        raise UsageError(f"{str(path)!r}: image_size must be from 1 to {MAX_IMAGE_SIZE}, not {preprocess.image_size}")
    if not all(map(math.isfinite, preprocess.mean + preprocess.std)) or min(preprocess.std) <= 0:
        raise UsageError(f"{str(path)!r}: mean must be finite and std above 0")
    return preprocess


def _read_object(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """A JSON object that has at least the fields `names`."""
    try:
        values = json.loads(_read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{str(path)!r} is damaged: it is not JSON") from error
    missing = [name for name in names if name not in values] if isinstance(values, dict) else list(names)
    if missing:
        raise UsageError(f"{str(path)!r} is damaged: it lacks {', '.join(missing)}")
    return values


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"run folder is incomplete: {str(path)!r} cannot be read: {error.strerror}") from error


def _pixels(image: ImageLike) -> UInt8[np.ndarray, "h w 3"]:
    """RGB pixels of a path, a PIL image or an array."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise UsageError(f"an array must be uint8 (h, w, 3), not {image.dtype} {image.shape}")
        return image
    name = "a PIL image" if isinstance(image, Image.Image) else f"image {str(image)!r}"
    try:
        return decode_image(_as_png(image) if isinstance(image, Image.Image) else Path(image).read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"{name} cannot be read: {_first_line(error)}") from error
    except BadSample as error:
        raise UsageError(f"{name} cannot be read: {error}") from error


def _as_png(image: Image.Image) -> bytes:
    """A PIL image as the file that says the same, so that one decoder knows of alpha, palettes and orientation."""
    file = io.BytesIO()
    lossless = image if image.mode in _PNG_MODES else image.convert("RGB")
    lossless.save(file, "PNG", compress_level=0, exif=image.getexif())
    return file.getvalue()


def _chunks(images: Sequence[ImageLike]) -> Iterator[Sequence[ImageLike]]:
    for start in range(0, len(images), BATCH_SIZE):
        yield images[start : start + BATCH_SIZE]


def _first_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
