"""How files make samples: KEY.jpg and what stands beside it, in tar shards and in folders alike."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

Place = TypeVar("Place")

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MAX_IMAGE_BYTES = 256 * 2**20
MAX_SIDECAR_BYTES = 64 * 2**10

FIELDS = {extension: 0 for extension in IMAGE_EXTENSIONS} | {"txt": 1, "json": 2, "cls": 3}
"""Extension to field: image, text, metadata, label."""
LIMITS = (MAX_IMAGE_BYTES, MAX_SIDECAR_BYTES, MAX_SIDECAR_BYTES, MAX_SIDECAR_BYTES)
"""Most bytes of each field."""
TOO_LARGE = ("image-too-large", "caption-too-long", "metadata-too-large", "label-too-large")
"""What a sample is called whose field is larger."""


def sample_name(entry: str) -> tuple[str, str]:
    """Split an entry's name into (key, extension) as webdataset does: at the first dot of the file name.

    The extension is in lower case; both are empty where the entry is no part of a sample ("README", ".DS_Store").
    """
    while entry.startswith("./"):
        entry = entry[2:]
    folder, slash, file = entry.rpartition("/")
    stem, dot, extension = file.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and dot else ("", "")


def leaves_its_folder(entry: str) -> bool:
    """Whether an entry's name points outside the folder that it would be unpacked in."""
    return entry.startswith("/") or ".." in entry.split("/")


def gather(entries: Iterable[tuple[str, Place]]) -> tuple[dict[str, list[Place | None]], list[tuple[str, str]]]:
    """Gather entries to samples by key.

    Args:
        entries: (name, where it lies) in their order; those of no field's extension are passed over.

    Returns:
        Key to the places of its image, text, metadata and label (None where absent), of samples with an image; and
        (key, reason) of what is left out: second samples of a key, samples without an image.
    """
    samples: dict[str, list[Place | None]] = {}
    repeated: dict[str, None] = {}
    for name, place in entries:
        key, extension = sample_name(name)
        field = FIELDS.get(extension)
        if field is None or key in repeated:
            continue
        places = samples.setdefault(key, [None] * 4)
        if places[field] is None:
            places[field] = place
        else:
            repeated[key] = None  # and what follows under this key belongs to the second sample
    skipped = [(key, "key-duplicate") for key in repeated]
    skipped += [(key, "image-missing") for key, places in samples.items() if places[0] is None]
    return {key: places for key, places in samples.items() if places[0] is not None}, skipped
