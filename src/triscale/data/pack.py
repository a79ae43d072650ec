"""Write samples as WebDataset shards and as evaluation sets. The same samples give the same bytes.

A folder is written under a temporary name beside its own and renamed when whole: it is there complete or not at all.
"""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from triscale.data import scenes
from triscale.data.decode import EncodedImage, image_extension
from triscale.data.entries import leaves_its_folder, sample_name
from triscale.data.resize import resize
from triscale.data.samples import BadSample, Sample, Source
from triscale.errors import RunError, UsageError

SAMPLES_PER_SHARD = 1000
JPEG_QUALITY = 95
"""Of images that are encoded anew; as img2dataset has it."""


def write_shards(
    source: Source,
    folder: str | Path,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    *,
    max_side: int | None = None,
    leave_out: Callable[[str, str], None] | None = None,
) -> list[Path]:
    """Write all samples of a source as `folder`/00000.tar, 00001.tar, ...; returns their paths.

    Images that the source gives as pixels become PNG; encoded ones keep their bytes. A key that would not be read back
    as it is, or that its shard has already, is replaced by the sample's number.

    Args:
        max_side: images whose longer side has more pixels are shrunk to it and encoded anew, see `shrunk`.
        leave_out: told key and reason of every sample that is bad, which is left out; None: the first one ends it.

    Raises:
        UsageError: the folder exists and is not empty, the source is empty, or a number is too small.
        RunError: a sample is bad or cannot be read, or all are bad.
    """
    if samples_per_shard < 1:
        raise UsageError(f"a shard needs at least 1 sample, not {samples_per_shard}")
    if max_side is not None and max_side < 1:
        raise UsageError(f"images need a side of at least 1 pixel, not {max_side}")
    if len(source) == 0:
        raise UsageError(f"{source.name} is empty: there is nothing to write")
    with _new_folder(Path(folder)) as partial:
        names = _write_tars(_samples(source, leave_out, max_side), partial, "{:05d}.tar", samples_per_shard)
        if not names:
            raise RunError(f"{source.name}: all {len(source)} samples are bad: nothing is written")
    return [Path(folder) / name for name in names]


def shrunk(image: bytes | UInt8[np.ndarray, "h w 3"], max_side: int) -> bytes | UInt8[np.ndarray, "h2 w2 3"]:
    """An image whose longer side has at most `max_side` pixels; as it is where it has already.

    The ratio of the sides stays. Reduced by antialiased bicubic, upright, transparency over white; a PNG becomes a PNG
    and pixels stay pixels, so that what was lossless is so, anything else a JPEG of quality 95.

    Raises:
        BadSample: the image cannot be decoded; of one that is small enough only the header is read.
    """
    if not isinstance(image, bytes):
        return image if max(image.shape[:2]) <= max_side else _reduced(image, max_side)
    encoded = EncodedImage(image)
    if encoded.longer_side <= max_side:
        return image
    small, file = Image.fromarray(_reduced(encoded.decode(), max_side)), io.BytesIO()
    if image_extension(image) == "png":
        small.save(file, "PNG")
    else:
        small.save(file, "JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


def _reduced(pixels: UInt8[np.ndarray, "h w 3"], max_side: int) -> UInt8[np.ndarray, "h2 w2 3"]:
    longer = max(pixels.shape[:2])
    height, width = (max(1, round(side * max_side / longer)) for side in pixels.shape[:2])
    return resize(pixels, height, width)


def write_evaluation_set(
    folder: str | Path,
    classnames: Sequence[str],
    templates: Sequence[str],
    items: Iterable[Sample],
    samples_per_shard: int = 10_000,
) -> None:
    """Write a zero-shot classification set in CLIP_benchmark's webdataset layout.

    Args:
        folder: new, or empty.
        classnames: one a class; a label is an index into them.
        templates: prompt templates, each with `{c}` for the class name.
        items: samples with a label.
        samples_per_shard: `test/0.tar`, `test/1.tar`, ... hold this many each.

    Raises:
        UsageError: the folder is not empty, a class name or template is no line of its own, a label is missing or names
            no class, or there are no samples.
        RunError: a sample is bad.
    """
    for kind, lines in (("class name", classnames), ("template", templates)):
        for line in lines:
            if not line.strip() or "\n" in line or "\r" in line:
                raise UsageError(f"{kind} {line!r} cannot be a line of a file: it must be one line, and not empty")
    for template in templates:
        if "{c}" not in template:
            raise UsageError(f"template {template!r} has no {{c}} for the class name")
    with _new_folder(Path(folder)) as partial:
        _write_lines(partial / "classnames.txt", classnames)
        _write_lines(partial / "zeroshot_classification_templates.txt", templates)
        (partial / "test").mkdir()
        labelled = (_with_class(sample, len(classnames)) for sample in items)
        names = _write_tars(labelled, partial / "test", "{}.tar", samples_per_shard)
        if not names:
            raise UsageError(f"there are no samples to write to {folder}")
        _write_lines(partial / "test" / "nshards.txt", [str(len(names))])


def pack_scenes(
    folder: str | Path,
    *,
    size: int = 32,
    seed: int = scenes.SEED,
    train_samples: int | None = None,
    eval_samples: int | None = None,
) -> None:
    """Write the embedded data set as `folder`/train/*.tar and an evaluation set `folder`/wds_SPLIT a split.

    Args:
        folder: new, or empty.
        size: side of the images in pixels.
        seed: other seeds give other scenes.
        train_samples: number of training samples; None: the split's own.
        eval_samples: number of samples of each evaluation set; None: the split's own.

    Raises:
        UsageError: the folder is not empty, or a number is too small.
    """
    with _new_folder(Path(folder)) as partial:
        for split in scenes.SPLITS:
            samples = train_samples if split == "train" else eval_samples
            source = scenes.Scenes(split, size=size, seed=seed, samples=samples)
            if split == "train":
                write_shards(source, partial / "train")
            else:
                write_evaluation_set(partial / f"wds_{split}", scenes.CLASSNAMES, scenes.TEMPLATES, _samples(source))


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the name `folder` when the block ends well, and is removed when it does not."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists and is not an empty folder: name a new one")
    folder = folder.resolve()
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    try:
        partial.mkdir(parents=True)
        yield partial
        os.replace(partial, folder)
    except OSError as fault:
        raise RunError(f"cannot write {folder}: {fault.strerror or fault}") from fault
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _samples(
    source: Source, leave_out: Callable[[str, str], None] | None = None, max_side: int | None = None
) -> Iterator[Sample]:
    """The samples of a source in order. Raises RunError at one that cannot be read, or is bad and not left out."""
    for index in range(len(source)):
        key = str(index)
        try:
            sample = source.read(index)
            key = sample.key
            if leave_out is not None and isinstance(sample.image, bytes) and not image_extension(sample.image):
                raise BadSample("image-unreadable")
            if max_side is not None:
                sample = replace(sample, image=shrunk(sample.image, max_side))
        except BadSample as fault:
            if leave_out is None:
                raise RunError(f"{source.name}: sample {fault.key or key} is bad: {fault.reason}") from fault
            leave_out(fault.key or key, fault.reason)
            continue
        except OSError as fault:
            raise RunError(f"{source.name}: sample {index} cannot be read: {fault}") from fault
        yield sample


def _with_class(sample: Sample, classes: int) -> Sample:
    """The sample, after its label was found to name a class."""
    label = (sample.label or b"").strip()
    if not label.isdigit() or len(label) > 18 or int(label) >= classes:
        raise UsageError(f"sample {sample.key} has no label below {classes}, the number of class names")
    return sample


def _write_tars(samples: Iterable[Sample], folder: Path, name: str, samples_per_shard: int) -> list[str]:
    """Write `samples` to numbered shards; returns the shards' names."""
    names: list[str] = []
    numbered = enumerate(samples)
    while (first := next(numbered, None)) is not None:
        names.append(name.format(len(names)))
        with tarfile.open(folder / names[-1], "w", format=tarfile.PAX_FORMAT) as tar:
            used: set[str] = set()
            for number, sample in chain([first], islice(numbered, samples_per_shard - 1)):
                key = sample.key
                if key in used or not _survives(key):
                    key = f"{number:09d}"
                while key in used:
                    key += "-"
                used.add(key)
                _add_sample(tar, key, sample)
    return names


def _survives(key: str) -> bool:
    """Whether a shard's reader gives this key back as it is."""
    return sample_name(f"{key}.png") == (key, "png") and not leaves_its_folder(key) and "\0" not in key


def _add_sample(tar: tarfile.TarFile, key: str, sample: Sample) -> None:
    """Append a sample's files. Raises RunError where the image is of no known kind."""
    image = _png(sample.image) if isinstance(sample.image, np.ndarray) else sample.image
    extension = image_extension(image)
    if not extension:
        raise RunError(f"sample {sample.key} is neither a JPEG nor a PNG nor a WebP file")
    parts = {extension: image, "txt": sample.text, "json": sample.metadata, "cls": sample.label}
    for extension, data in parts.items():
        if data is not None:
            header = tarfile.TarInfo(f"{key}.{extension}")  # times and owners are 0
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))


def _png(pixels: np.ndarray) -> bytes:
    """Encode uint8 pixels (h, w, 3) without loss."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")
