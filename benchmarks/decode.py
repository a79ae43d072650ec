"""Which JPEG decoder is the fastest, and what an image costs from bytes to a square, beside open_clip's transform.

    python benchmarks/decode.py [--sizes 500x375 1024x768 4000x3000] [--qualities 75 85 95] [--side 224] [--rounds 7]
        [--json FILE]

One thread, the process's CPU time, contestants in turns; the median, and its share of open_clip's where that is
installed. Images are noise with the spectrum of photographs (amplitude falling as 1/f^1.3), encoded by Pillow. Decoders
that are not installed (cv2, turbojpeg) are left out. "to a square" crops the middle and resizes to `--side`: ours gives
uint8, open_clip's transform a random crop of 90 to 100 % as normalised float32, as each of them trains.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import statistics
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg

from triscale.data.decode import decode_image
from triscale.data.resize import fit_square

Decode = Callable[[bytes], Any]
IMAGES = {"small": 4, "large": 2}
LARGE_PIXELS = 4_000_000
ENOUGH = {2: "IMREAD_REDUCED_COLOR_2", 4: "IMREAD_REDUCED_COLOR_4", 8: "IMREAD_REDUCED_COLOR_8"}


def photograph(width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    """Noise with the spectrum of a photograph, (height, width, 3)."""
    spectrum = np.fft.rfft2(rng.standard_normal((height, width, 3)), axes=(0, 1))
    rows, columns = np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width)[None] * width
    spectrum /= np.maximum(np.hypot(rows, columns), 1.0)[..., None] ** 1.3
    image = np.fft.irfft2(spectrum, s=(height, width), axes=(0, 1))
    return np.clip((image - image.mean()) / image.std() * 48 + 120, 0, 255).astype(np.uint8)


def encoded(width: int, height: int, quality: int) -> list[bytes]:
    """Some photographs as JPEG files."""
    rng, files = np.random.default_rng(0), []
    for _ in range(IMAGES["large" if width * height > LARGE_PIXELS else "small"]):
        file = io.BytesIO()
        Image.fromarray(photograph(width, height, rng)).save(file, "JPEG", quality=quality)
        files.append(file.getvalue())
    return files


def pillow(data: bytes, side: int = 0) -> np.ndarray:
    """Pillow's decoder; with `side`, at 1/2, 1/4 or 1/8 where that is enough."""
    image = Image.open(io.BytesIO(data))
    if side:
        image.draft("RGB", (side, side))
    return np.array(image.convert("RGB"))


def reduced_by_opencv(data: bytes, side: int) -> np.ndarray:
    """OpenCV's decoder at the largest of 1/2, 1/4 and 1/8 that is enough."""
    cv2 = import_module("cv2")
    shorter = min(Image.open(io.BytesIO(data)).size)
    factor = max((k for k in ENOUGH if shorter // k >= side), default=1)
    flag = getattr(cv2, ENOUGH[factor]) if factor > 1 else cv2.IMREAD_COLOR
    return cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), flag), cv2.COLOR_BGR2RGB)


def decoders(side: int) -> dict[str, Decode]:
    """Those that are installed, by name; whole images and reduced ones."""
    found: dict[str, Decode] = {
        "Pillow": pillow,
        "Pillow, reduced": lambda data: pillow(data, side),
        "simplejpeg": simplejpeg.decode_jpeg,
        "simplejpeg, reduced": lambda data: simplejpeg.decode_jpeg(data, min_height=side, min_width=side, min_factor=2),
        "torchvision": lambda data: decode_jpeg(
            torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB
        ),
    }
    if importlib.util.find_spec("cv2"):
        import_module("cv2").setNumThreads(0)
        found["OpenCV, reduced"] = lambda data: reduced_by_opencv(data, side)
    if importlib.util.find_spec("turbojpeg"):
        found |= _of_pyturbojpeg()
    return found


def _of_pyturbojpeg() -> dict[str, Decode]:
    turbo = import_module("turbojpeg")
    try:
        library = turbo.TurboJPEG()
    except RuntimeError as error:  # the package brings no library of its own
        print(f"PyTurboJPEG is left out: {error}".splitlines()[0])
        return {}
    return {"PyTurboJPEG": lambda data: library.decode(data, pixel_format=turbo.TJPF_RGB)}


def to_a_square(side: int) -> dict[str, Decode]:
    """From bytes to what a batch holds."""
    found: dict[str, Decode] = {
        "to a square: ours": lambda data: fit_square(decode_image(data, min_side=side), side, "crop")
    }
    if importlib.util.find_spec("open_clip"):
        transform = import_module("open_clip.transform").image_transform(side, is_train=True)
        found["to a square: open_clip"] = lambda data: transform(Image.open(io.BytesIO(data)))
    return found


def in_turns(contestants: dict[str, Decode], files: list[bytes], rounds: int) -> dict[str, float]:
    """The median CPU seconds of an image, by contestant."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, decode in contestants.items():
            began = time.process_time()
            for data in files:
                decode(data)
            if number:  # the first round warms up
                seconds[name].append((time.process_time() - began) / len(files))
    return {name: statistics.median(values) for name, values in seconds.items()}


def distance(data: bytes, side: int) -> tuple[float, int]:
    """Root mean square and largest distance of our square from that of the whole image, resized by Pillow."""
    ours = fit_square(decode_image(data, min_side=side), side, "crop").astype(int)
    whole = Image.fromarray(pillow(data))
    edge = min(whole.size)
    left, top = (whole.width - edge) // 2, (whole.height - edge) // 2
    box = (left, top, left + edge, top + edge)
    reference = np.asarray(whole.resize((side, side), Image.Resampling.BICUBIC, box=box)).astype(int)
    return float(np.sqrt(((ours - reference) ** 2).mean())), int(np.abs(ours - reference).max())


def main() -> None:
    """Measure every size and quality, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["500x375", "1024x768", "4000x3000"], help="WIDTHxHEIGHT")
    parser.add_argument("--qualities", nargs="+", type=int, default=[75, 85, 95], help="of the JPEG files")
    parser.add_argument("--side", type=int, default=224, help="of the squares, in pixels")
    parser.add_argument("--rounds", type=int, default=7, help="of which the median counts")
    parser.add_argument("--json", default="", help="file for the figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    contestants = {**decoders(options.side), **to_a_square(options.side)}
    for size in options.sizes:
        width, height = map(int, size.split("x"))
        for quality in options.qualities:
            files = encoded(width, height, quality)
            seconds = in_turns(contestants, files, options.rounds)
            rms, largest = distance(files[0], options.side)
            kib = len(files[0]) / 1024
            print(f"{size}, quality {quality}, {kib:.0f} KiB: from the reference {rms:.2f} rms, {largest}")
            peer = seconds.get("to a square: open_clip")
            for name, value in seconds.items():
                times = "" if peer is None else f"{peer / value:>8.2f} x open_clip"
                print(f"  {name:<24} {1 / value:>8.0f} images/s/core{times}", flush=True)
                rows.append({"size": size, "quality": quality, "name": name, "seconds": value})
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
