"""Images a second of whole commands: `triscale eval` and CLIP_benchmark's, of the same model over the same JPEG files.

    python benchmarks/eval_speed.py [--models ViT-B-32 small] [--images 2000] [--classes 40] [--prompts 80]
        [--size 500x375] [--workers 0 1 2 4] [--rounds 3] [--threads 0] [--precision float32] [--json FILE]

Weights are random, which changes no time: of an architecture of open_clip by its name, or "small", a ViT of 3 layers of
width 128 at 64 pixels. Images are those of benchmarks/decode.py in shards as many as CLIP_benchmark's default of four
workers asks for; classes and prompts stand to images as ImageNet's 1,000 classes of 80 prompts to its 50,000 images.
Both run as a user runs them, `clip_benchmark eval` (`triscale[peers]`) with its defaults but for the precision, which
is the same on both sides, and the number of workers, of which the best is taken.

Commands take turns; a round runs each over the set and over its first shard's first images alone. What these take is
the start: imports, weights, class embeddings. The steady rate is that of the images beyond them. Ratios are those of
the rounds. CPU seconds are of the command and all its processes.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import peer_eval
import torch
from decode import photograph
from PIL import Image
from safetensors.torch import save_file

from triscale.bench.measure import Spread, this_machine

SHARDS = 4
FEW = 16
"""Images of each shard of the set that shows what starting takes."""
SMALL = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 64, "layers": 3, "width": 128, "head_width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 2},
}


@dataclass(frozen=True, kw_only=True)
class Side:
    """What one command came to over the rounds."""

    name: str
    seconds: list[float]
    """Of the command over the whole set."""
    start_seconds: list[float]
    """Of the command over a few images."""
    cpu_seconds: list[float]
    images: int
    few: int

    def rates(self) -> list[float]:
        """Images a second of each round, by the whole command."""
        return [self.images / seconds for seconds in self.seconds]

    def steady_rates(self) -> list[float]:
        """Images a second of each round beyond the start."""
        pairs = zip(self.seconds, self.start_seconds, strict=True)
        return [(self.images - self.few) / (seconds - start) for seconds, start in pairs]


def write_model(name: str, folder: Path) -> Path:
    """An architecture of open_clip with random weights, as open_clip writes models; returns its folder."""
    open_clip: Any = import_module("open_clip")
    config = SMALL if name == "small" else open_clip.get_model_config(name)
    if config is None:
        raise SystemExit(f"open_clip has no model {name!r}")
    preprocess = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    torch.manual_seed(0)
    sizes = {key: value for key, value in config.items() if key != "custom_text"}
    tensors = open_clip.model.CLIP(**sizes).state_dict()
    kept = {key: tensor.contiguous() for key, tensor in tensors.items() if key != "attn_mask"}
    save_file(kept, folder / "open_clip_model.safetensors")
    return folder


def write_set(folder: Path, files: Sequence[bytes], images: int, classes: int, prompts: int) -> Path:
    """A classification set of `images` images in `SHARDS` shards; returns its folder."""
    (folder / "test").mkdir(parents=True)
    (folder / "test" / "nshards.txt").write_text(f"{SHARDS}\n")
    (folder / "classnames.txt").write_text("".join(f"kind {number} of thing\n" for number in range(classes)))
    templates = "".join(f"a photo of a {{c}}, number {number}.\n" for number in range(prompts))
    (folder / "zeroshot_classification_templates.txt").write_text(templates)
    for shard in range(SHARDS):
        with tarfile.open(folder / "test" / f"{shard}.tar", "w") as tar:
            for number in range(shard, images, SHARDS):
                content = {"jpg": files[number % len(files)], "cls": str(number % classes).encode()}
                for extension, data in content.items():
                    entry = tarfile.TarInfo(f"{number:06d}.{extension}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    return folder


def photographs(size: str, quality: int = 85, count: int = 64) -> list[bytes]:
    """Some photographs as JPEG files."""
    width, height = map(int, size.split("x"))
    rng, files = np.random.default_rng(0), []
    for _ in range(count):
        file = io.BytesIO()
        Image.fromarray(photograph(width, height, rng)).save(file, "JPEG", quality=quality)
        files.append(file.getvalue())
    return files


def timed(command: Sequence[str | Path], threads: int) -> tuple[float, float]:
    """Wall and CPU seconds of a command, its processes among them."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    peer_eval.run(command, threads)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def theirs(model: Path, folder: Path, scratch: Path, workers: int, precision: str) -> list[str]:
    """CLIP_benchmark's command."""
    task, output = "zeroshot_classification", scratch / "theirs.json"
    words = peer_eval.arguments(model, folder, task, output, workers=workers, precision=precision)
    return [sys.executable, "-m", "clip_benchmark.cli", *words]


def ours(model: Path, folder: Path, scratch: Path) -> list[str]:
    """Our command."""
    words = ["eval", model, "--data", folder, "--json", scratch / "ours.json"]
    return [sys.executable, "-m", "triscale", *map(str, words)]


def best_workers(command: Any, candidates: Sequence[int], threads: int) -> int:
    """The number of workers with which CLIP_benchmark is done first."""
    return min(candidates, key=lambda workers: timed(command(workers), threads)[0])


def measure(model: Path, whole: Path, few: Path, scratch: Path, options: argparse.Namespace) -> tuple[list[Side], int]:
    """Both sides over all rounds, and CLIP_benchmark's number of workers."""
    threads, precision = options.threads, options.precision

    def peer(workers: int, folder: Path = whole) -> list[str]:
        return theirs(model, folder, scratch, workers, precision)

    workers = best_workers(peer, options.workers, threads) if len(options.workers) > 1 else options.workers[0]
    commands = {
        "triscale eval": (ours(model, whole, scratch), ours(model, few, scratch)),
        "clip_benchmark eval": (peer(workers), peer(workers, few)),
    }
    sides = [
        Side(name=name, seconds=[], start_seconds=[], cpu_seconds=[], images=options.images, few=SHARDS * FEW)
        for name in commands
    ]
    for number in range(options.rounds):
        for side in sides[:: 1 if number % 2 else -1]:
            full, start = commands[side.name]
            side.start_seconds.append(timed(start, threads)[0])
            seconds, cpu = timed(full, threads)
            side.seconds.append(seconds)
            side.cpu_seconds.append(cpu)
    return sides, workers


def show(name: str, sides: Sequence[Side], workers: int) -> dict[str, Any]:
    """Print a model's lines, and give its figures."""

    def spread(values: Sequence[float]) -> str:
        found = Spread.of(values)
        return f"{found.median:.2f} ({found.smallest:.2f} to {found.largest:.2f})"

    mine, peer = sides
    print(f"{name}, {mine.images:,} images; CLIP_benchmark with {workers} workers")
    print(f"  {'':<20}{'images/s, whole command':<28}{'images/s beyond the start':<28}{'start, s':<26}CPU s")
    for side in sides:
        columns = (side.rates(), side.steady_rates(), side.start_seconds)
        cells = "".join(f"{spread(values):<{width}}" for values, width in zip(columns, (28, 28, 26), strict=True))
        print(f"  {side.name:<20}{cells}{spread(side.cpu_seconds)}")
    ratios = {
        "whole": [a / b for a, b in zip(mine.rates(), peer.rates(), strict=True)],
        "steady": [a / b for a, b in zip(mine.steady_rates(), peer.steady_rates(), strict=True)],
        "cpu": [b / a for a, b in zip(mine.cpu_seconds, peer.cpu_seconds, strict=True)],
    }
    widths = {"whole": 28, "steady": 54, "cpu": 0}
    print(f"  {'times':<20}" + "".join(f"{spread(ratios[key]):<{width}}" for key, width in widths.items()), flush=True)
    return {"model": name, "workers": workers, "sides": [asdict(side) for side in sides], "ratios": ratios}


def main() -> None:
    """Measure every model, and print its lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", default=["ViT-B-32", "small"], help="open_clip's architectures, or small"
    )
    parser.add_argument("--images", type=int, default=2000, help="of the set")
    parser.add_argument("--classes", type=int, default=40, help="of the set")
    parser.add_argument("--prompts", type=int, default=80, help="of each class")
    parser.add_argument("--size", default="500x375", help="of the images, WIDTHxHEIGHT")
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2, 4], help="CLIP_benchmark's, to be tried")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median counts")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each process")
    parser.add_argument("--precision", choices=peer_eval.PRECISIONS, default="float32", help="of both sides")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    if missing := peer_eval.missing():
        raise SystemExit(f"pip install 'triscale[peers]': it needs {', '.join(missing)}")
    torch.set_num_threads(options.threads)
    machine = this_machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    print(machine.line())
    found = []
    with tempfile.TemporaryDirectory() as folder:
        scratch, files = Path(folder), photographs(options.size)
        shape = (options.classes, options.prompts)
        whole = write_set(scratch / "wds_whole", files, options.images, *shape)
        few = write_set(scratch / "wds_few", files, SHARDS * FEW, *shape)
        for name in options.models:
            model = write_model(name, scratch / name)
            found.append(show(name, *measure(model, whole, few, scratch, options)))
    if options.json:
        options.json.write_text(json.dumps({"machine": asdict(machine), "models": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
