"""What every test shares: shapes checked at run time, seeded randomness, and which tests run where."""

from __future__ import annotations

import fcntl
import os
import sys
import tempfile
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager

import hypothesis
import pytest
import torch
from jaxtyping import install_import_hook

# From here on the shapes and types in the package's signatures are checked at every call. Before anything imports it.
# As for type checkers, an int may stand where a float is asked for (PEP 484).
assert not any(name.split(".")[0] == "triscale" for name in sys.modules), "triscale was imported before its hook"
install_import_hook("triscale", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

# Without a card, kernels run in Triton's interpreter. Triton decides that as it is imported, whoever does so first.
if not torch.cuda.is_available():
    assert "triton" not in sys.modules, "triton was imported before its interpreter was asked for"
    os.environ["TRITON_INTERPRET"] = "1"

# The same examples on every machine, however slow it is.
hypothesis.settings.register_profile("same_everywhere", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("same_everywhere")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="run the tests marked slow, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skips = {}
    if not config.getoption("--run-slow"):
        skips["slow"] = pytest.mark.skip(reason="slow: runs with --run-slow (make test-slow)")
    if not torch.cuda.is_available():
        skips["gpu"] = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        for marker, skip in skips.items():
            if item.get_closest_marker(marker):
                item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Of several workers (pytest -n), none runs a test while another runs one that is marked `alone`."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return (yield)
    with ExitStack() as held:
        with locked("next", fcntl.LOCK_EX):  # else one that waits to be alone would wait for as long as others come
            alone = item.get_closest_marker("alone") is not None
            held.enter_context(locked("tests", fcntl.LOCK_EX if alone else fcntl.LOCK_SH))
        return (yield)


@contextmanager
def locked(name: str, how: int) -> Iterator[None]:
    """Hold a lock that all test workers of this user know."""
    path = os.path.join(tempfile.gettempdir(), f"triscale-tests-{os.getuid()}-{name}")
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(file, how)
        yield
        fcntl.flock(file, fcntl.LOCK_UN)  # whatever process a test may have forked
    finally:
        os.close(file)


@pytest.fixture
def rng() -> torch.Generator:
    """Randomness of a test: a freshly seeded CPU generator."""
    return torch.Generator().manual_seed(0)
