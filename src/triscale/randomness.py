"""Random numbers as pure functions of what they are for.

Every random decision of a run is drawn from a generator seeded with the words that name the decision, such as
``("augment", seed, position, view, attempt)``. So workers, processes and resumes cannot change it.
"""

from __future__ import annotations

import hashlib

import numpy as np


def derive_seed(*words: int | str) -> int:
    """Hash `words` into a seed, 0 <= seed < 2**63. Words of different kinds and groupings never collide by spelling."""
    spelled = "\0".join(f"{type(word).__name__}:{word}" for word in words)
    return int.from_bytes(hashlib.blake2b(spelled.encode(), digest_size=8).digest(), "little") >> 1


def generator(*words: int | str) -> np.random.Generator:
    """A numpy generator that is a pure function of `words`."""
    return np.random.Generator(np.random.Philox(key=derive_seed(*words)))
