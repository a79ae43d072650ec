"""Patterns: were these to fail, other files would be trained on than those that were named."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triscale.data.paths import expand_braces, matching_files, split_patterns
from triscale.errors import UsageError

NUMBER = st.integers(0, 30).flatmap(lambda n: st.sampled_from([f"{n}", f"{n:03d}"]))
WORD = st.text("ab.", max_size=2)
PATTERN = st.recursive(
    WORD | st.tuples(NUMBER, NUMBER).map(lambda ends: f"{{{ends[0]}..{ends[1]}}}"),
    lambda inner: (
        st.lists(inner, min_size=2, max_size=3).map("".join)
        | st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"{{{','.join(parts)}}}")
    ),
    max_leaves=4,
)


@given(PATTERN)
def test_braces_mean_what_they_mean_to_bash(pattern: str) -> None:
    said = subprocess.run(["bash", "-c", f"printf '%s\\n' x{pattern}"], capture_output=True, text=True, check=True)
    assert ["x" + path for path in expand_braces(pattern)] == said.stdout.splitlines()


@pytest.mark.parametrize("pattern", ["{a}", "{}", "a{b", "a}b", "{1..}", "{a..b}", "{-1..2}", "x"])
def test_braces_that_mean_nothing_stay_as_they_are(pattern: str) -> None:
    assert expand_braces(pattern) == [pattern]


@pytest.mark.parametrize("pattern", ["{0..99999999999}", "{0..99999}{0..99999}", "{{0..599999},{0..599999}}"])
def test_a_range_beyond_all_bounds_is_refused_before_it_is_made(pattern: str) -> None:
    with pytest.raises(UsageError, match="more than 1000000 paths"):
        expand_braces(pattern)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for name in ("00.tar", "01.tar", "02.tar", "my one.tar", "{a,b}.tar", "b.tar"):
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


def names(spec: str, root: Path) -> list[str]:
    return [Path(path).name for path in matching_files(split_patterns(spec, str(root)), str(root))]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("{00..02}.tar", ["00.tar", "01.tar", "02.tar"]),
        ("{02..00}.tar 01.tar", ["00.tar", "01.tar", "02.tar"]),
        ("0[12].tar {00,b}.tar", ["00.tar", "01.tar", "02.tar", "b.tar"]),
        ("my one.tar", ["my one.tar"]),
        ("my on?.tar", ["my one.tar"]),
        ("'my one.tar' b.tar", ["b.tar", "my one.tar"]),
        ("{a,b}.tar", ["{a,b}.tar"]),
    ],
)
def test_patterns_name_files_in_order_and_once_each(shards: Path, spec: str, expected: list[str]) -> None:
    assert names(spec, shards) == expected


def test_shards_that_are_missing_from_a_range_are_counted_and_the_first_is_named(shards: Path) -> None:
    with pytest.raises(UsageError, match=r"03\.tar \(and 6 more of the 10 that \{00\.\.09\}\.tar names\)"):
        names("{00..09}.tar", shards)


def test_an_open_quote_and_an_empty_list_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not closed"):
        split_patterns("'a.tar", str(tmp_path))
    with pytest.raises(UsageError, match="no path"):
        split_patterns("   ", str(tmp_path))
