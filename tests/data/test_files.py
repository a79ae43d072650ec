"""Files that others name: were these to fail, a table could make us read what lies outside of the data's folder."""

from __future__ import annotations

import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triscale.data.files import PackedStrings, Recent, read_below
from triscale.data.samples import BadSample


def read(folder: Path, path: str, limit: int = 100) -> bytes:
    return read_below(os.path.realpath(folder), path, limit, key="k", field="image", too_large="image-too-large")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with a picture, beside it a secret, and links of every kind."""
    folder = tmp_path / "data"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "a.jpg").write_bytes(b"picture")
    (folder / "large.jpg").write_bytes(b"x" * 101)
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "data-too").mkdir()
    (tmp_path / "data-too" / "b.jpg").write_bytes(b"secret")
    (folder / "link.jpg").symlink_to(tmp_path / "secret")
    (folder / "within.jpg").symlink_to("inner/a.jpg")
    (folder / "out").symlink_to(tmp_path)
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe.jpg")
    return folder


@pytest.mark.parametrize("path", ["inner/a.jpg", "./inner//a.jpg", "inner/../inner/a.jpg", "within.jpg"])
def test_a_file_below_the_folder_is_read_however_it_is_spelled(data: Path, path: str) -> None:
    assert read(data, path) == b"picture"
    assert read(data, str(data / path)) == b"picture"


def test_a_folder_that_is_a_link_itself_is_no_way_out(data: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(data)
    assert read(tmp_path / "alias", "inner/a.jpg") == b"picture"


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("../secret", "image-path-outside"),
        ("/etc/passwd", "image-path-outside"),
        ("../data-too/b.jpg", "image-path-outside"),
        ("link.jpg", "image-path-outside"),
        ("out/secret", "image-path-outside"),
        ("inner/b.jpg", "image-missing"),
        ("inner/a.jpg/b", "image-missing"),
        ("nul\0.jpg", "image-missing"),
        ("n" * 5000, "image-missing"),
        ("loop", "image-missing"),
        ("inner", "image-not-a-file"),
        ("pipe.jpg", "image-not-a-file"),
        (".", "image-not-a-file"),
        ("large.jpg", "image-too-large"),
    ],
)
def test_what_leads_outside_or_is_no_file_is_a_bad_sample_that_is_named(data: Path, path: str, reason: str) -> None:
    with pytest.raises(BadSample) as bad:
        read(data, path)
    assert (bad.value.reason, bad.value.key) == (reason, "k")


@given(st.lists(st.text()))
def test_packed_strings_are_the_strings(strings: list[str]) -> None:
    strings = [s.encode("utf-8", "ignore").decode() for s in strings] + [os.fsdecode(b"caf\xe9")]
    packed = pickle.loads(pickle.dumps(PackedStrings.of(strings)))
    assert [packed[index] for index in range(len(packed))] == strings


class Made:
    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, number: int) -> str:
        self.asked.append(number)
        return "x" * number


def test_recent_things_are_kept_up_to_their_budget_and_the_last_whatever_its_size() -> None:
    make = Made()
    recent = Recent(make, 10, len)
    for number in (4, 5, 4, 3, 4, 5, 99, 99, 4):
        assert len(recent[number]) == number
    # 3 pushes 5 out, which was asked for before 4; 99 pushes out all.
    assert make.asked == [4, 5, 3, 5, 99, 4]


def test_threads_that_ask_at_once_get_one_thing_and_a_copy_for_another_process_starts_empty() -> None:
    make = Made()
    recent = Recent(make, 100)
    barrier = threading.Barrier(4)

    def ask(_: int) -> str:
        barrier.wait()
        return recent[7]

    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(ask, range(4))) == {"x" * 7}
    assert make.asked == [7] and len(recent) == 1
    copy = pickle.loads(pickle.dumps(recent))
    assert len(copy) == 0 and copy[2] == "xx"
