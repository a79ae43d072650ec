"""However many samples are drawn from however many shards, memory and open files do not grow."""

from __future__ import annotations

import gc
import multiprocessing
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from pictures import SETTINGS, make_reader, rules
from shards import write_shards
from triscale.data import canvases
from triscale.data.images import Pixels
from triscale.data.indexing import index_shards
from triscale.data.loader import batches
from triscale.data.order import Order
from triscale.data.rows import BatchReader
from triscale.data.shards import open_shards

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

BATCH = 500


def anonymous_bytes(process: int | None) -> int:
    """Memory that a process has to itself or shares since a fork: what it allocated. Mapped files, such as indexes of
    shards, do not count: their pages are the page cache's, which takes them back when it likes.
    """
    for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no such line")


def sizes_after(folder: Path, samples: list[int]) -> list[list[int]]:
    """Memory of this process and of its 2 workers after so many samples from the shards in `folder`."""
    reader = shard_reader(folder)
    sizes: list[list[int]] = []
    with closing(batches(reader, start=0, batch_size=BATCH, workers=2)) as made:
        processes = [os.getpid(), *sorted(worker.pid or 0 for worker in multiprocessing.active_children())]
        assert len(processes) == 3
        for drawn in range(BATCH, samples[-1] + 1, BATCH):
            batch = next(made)
            assert len(batch.ids) == BATCH and not batch.bad
            del batch
            if drawn in samples:
                gc.collect()
                sizes.append([anonymous_bytes(process) for process in processes])
    return sizes


def shard_reader(folder: str | Path) -> BatchReader:
    source = open_shards("*.tar", root=folder)
    order = Order([len(source)], seed=0)
    return BatchReader([source], [rules(SETTINGS)], order, make_reader().tokenizer, Pixels(SETTINGS, len(source)), 0)


@pytest.fixture
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoded images are not kept, as with any data set of a size that matters."""
    monkeypatch.setattr(canvases, "CACHE_BYTES", 0)


def test_memory_does_not_grow_with_the_samples_drawn(tmp_path: Path, nothing_kept: None) -> None:
    """24,000 more samples: a leak of 500 bytes a sample in a worker would be 6 MB."""
    write_shards(tmp_path, shards=20, samples=50)
    index_shards([str(path) for path in sorted(tmp_path.glob("*.tar"))])
    early, late = sizes_after(tmp_path, [8_000, 32_000])
    grown = [after - before for before, after in zip(early, late, strict=True)]
    assert max(grown) < 3 * 2**20, grown


@pytest.mark.slow
def test_memory_of_200_000_samples_is_that_of_the_first_20_000(tmp_path: Path, nothing_kept: None) -> None:
    write_shards(tmp_path, shards=20, samples=200, side=48)
    index_shards([str(path) for path in sorted(tmp_path.glob("*.tar"))])
    sizes = sizes_after(tmp_path, list(range(20_000, 200_001, 20_000)))
    for first, *later in zip(*sizes, strict=True):
        print([round(size / 2**20, 1) for size in (first, *later)])
        assert max(later) <= 1.05 * first


MANY = """
import os, resource, sys
sys.path[:0] = {paths!r}
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
import test_loader_memory
from triscale.data.loader import batches
if __name__ == "__main__":
    reader = test_loader_memory.shard_reader({folder!r})
    for workers in (0, 1):
        running = batches(reader, start=0, batch_size=1500, workers=workers, last=3000)
        print(sum(len(batch.ids) for batch in running), len(os.listdir("/proc/self/fd")) < 200)
    source = reader.sources[0]
    print(len({{source.file(index) for index in range(len(source))}}))
"""


@pytest.mark.parametrize("indexed", [True, False])
def test_a_thousand_shards_are_read_with_256_open_files(tmp_path: Path, indexed: bool) -> None:
    write_shards(tmp_path / "shards", shards=1000, samples=2)
    if indexed:
        index_shards([str(path) for path in sorted((tmp_path / "shards").glob("*.tar"))])
    here = Path(__file__).parent
    script = tmp_path / "many.py"
    paths = [str(here), str(here.parent)]
    script.write_text(MANY.format(paths=paths, folder=str(tmp_path / "shards")))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert done.stdout.split("\n")[:3] == ["3000 True", "3000 True", "1000"], done.stderr
