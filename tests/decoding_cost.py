"""Prints what decoding every bad and odd image takes, as JSON: processor seconds, and MiB above what stood before."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

from odd_images import BAD_IMAGES, LARGEST, ODD_IMAGES
from triscale.data.decode import decode_image
from triscale.data.samples import BadSample


def largest_mib() -> float:
    """The most memory that this process has had since it was last reset."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def cost(data: bytes) -> dict[str, float]:
    Path("/proc/self/clear_refs").write_text("5")
    before, began = largest_mib(), time.process_time()
    with contextlib.suppress(BadSample):
        decode_image(data)
    return {"seconds": time.process_time() - began, "mib": largest_mib() - before}


cases = {name: cost(case.data) for name, case in (BAD_IMAGES | ODD_IMAGES).items()}
print(json.dumps({"cases": cases, "largest": {name: cost(make()) for name, make in LARGEST.items()}}))
