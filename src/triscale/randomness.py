"""Random numbers as pure functions of what they are for.

Every random decision of a run is drawn from a generator seeded with the words that name the decision, such as
``("augment", seed, position, view, attempt)``. So workers, processes and resumes cannot change it.
"""

from __future__ import annotations

import hashlib
from typing import Any, cast

import numpy as np
from numpy.random.bit_generator import ISeedSequence


def derive_seed(*words: int | str) -> int:
    """Hash `words` into a seed, 0 <= seed < 2**63. Words of different kinds and groupings never collide by spelling."""
    spelled = "\0".join(f"{type(word).__name__}:{word}" for word in words)
    return int.from_bytes(hashlib.blake2b(spelled.encode(), digest_size=8).digest(), "little") >> 1


def generator(*words: int | str) -> np.random.Generator:
    """A numpy generator that is a pure function of `words`."""
    # numpy's annotations have no ISeedSequence there, its bit generators take any.
    return np.random.Generator(np.random.Philox(cast(Any, _Key(derive_seed(*words)))))


class _Key(ISeedSequence):
    """Gives Philox a key as `Philox(key=...)` takes it, which asks the system for entropy that it then throws away."""

    def __init__(self, key: int) -> None:
        self.key = key

    def generate_state(self, n_words: int, dtype: Any = np.uint64) -> np.ndarray:
        """The key as Philox's two words of 64 bits."""
        return np.array([self.key, 0], dtype=np.uint64)
