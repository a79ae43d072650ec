"""Scales and ticks: where a value lies on an axis, and which values are written beside it."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Maps values from `low` to `high` onto pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value; what lies outside lands on the nearer end; NaN for what is not finite."""
        if not math.isfinite(value):
            return math.nan
        low, high = self.low, self.high
        if self.log:
            value, low, high = (math.log(max(each, 1e-300)) for each in (value, low, high))
        share = (value - low) / (high - low)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)


def extent(values: Iterable[float], *, log: bool = False, zero: bool = False) -> tuple[float, float]:
    """The smallest and largest finite value, apart from each other; (0, 1), logarithmic (1, 10), where there is none.

    Args:
        log: only values above zero count.
        zero: the range is made to hold zero.
    """
    kept = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
    if not kept:
        return (1.0, 10.0) if log else (0.0, 1.0)
    low, high = min(kept), max(kept)
    if zero and not log:
        low, high = min(low, 0.0), max(high, 0.0)
    if log:
        return (low, high) if high > low * 1.0001 else (low / 2, high * 2)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        half = 0.05 * abs(low) or 0.5
        return low - half, high + half
    return low, high


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round values from `low` to `high`: multiples of 1, 2 or 5 times a power of ten."""
    step = _round_step((high - low) / max(count - 1, 1))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def widened(low: float, high: float, count: int = 5) -> tuple[float, float]:
    """The range, its ends moved out to ticks."""
    step = _round_step((high - low) / max(count - 1, 1))
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if step <= factor * power * 1.0001)


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, thinned where they are many; with their doubles and halves where they are fewer than three."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors in ((1.0,), (1.0, 2.0, 5.0)):
        every = max(1, (last - first) // 5) if len(factors) == 1 else 1
        ticks = [factor * 10.0**power for power in range(first, last + 1, every) for factor in factors]
        ticks = [tick for tick in ticks if low * 0.9999 <= tick <= high * 1.0001]
        if len(ticks) >= 3:
            break
    return ticks


def tick_texts(ticks: list[float], *, percent: bool = False) -> list[str]:
    """The ticks as text, all with as many decimals as the closest two need; thousands as k, millions as M."""
    if not ticks:
        return []
    scaled = [100 * tick for tick in ticks] if percent else list(ticks)
    largest = max(abs(tick) for tick in scaled)
    smallest = min((abs(tick) for tick in scaled if tick), default=1.0)
    if smallest < 1e-3 and not percent:
        return [_scientific(tick) for tick in scaled]
    unit, sign = next(((u, s) for u, s in ((1e9, "G"), (1e6, "M"), (1e4, "k")) if largest >= u), (1.0, ""))
    unit = 1e3 if sign == "k" else unit
    gaps = [abs(b - a) / unit for a, b in zip(scaled, scaled[1:], strict=False)] or [largest / unit or 1.0]
    decimals = max(0, -math.floor(math.log10(min(gaps)) + 1e-9))
    while decimals < 6 and any(abs(round(t / unit, decimals) - t / unit) > 1e-3 * min(gaps) for t in scaled):
        decimals += 1
    return [f"{tick / unit:,.{decimals}f}{sign if tick else ''}{' %' if percent else ''}" for tick in scaled]


def _scientific(value: float) -> str:
    if not value:
        return "0"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def text_width(text: str, size: float) -> float:
    """About how wide a text is in pixels, rather more than less, for system fonts."""
    return sum(_width(c) for c in text) * size


def _width(character: str) -> float:
    """Over the size of the letters: those of the East and emoji are twice as wide as small ones, capitals between."""
    if unicodedata.east_asian_width(character) in "WF" or character in "WM@":
        return 1.05
    return 0.75 if character.isupper() else 0.58


def fitted(text: str, size: float, room: float) -> str:
    """The text, or as much of its beginning as is about `room` pixels wide."""
    if text_width(text, size) <= room:
        return text
    kept, left = [], room - text_width("…", size)
    for character in text:
        left -= _width(character) * size
        if left < 0:
            break
        kept.append(character)
    return "".join(kept) + "…"


def spread(places: list[float], gap: float, low: float, high: float) -> list[float]:
    """`places` moved as little as a sweep in their order can, so that neighbours are `gap` apart within low to high.

    Where there is no room for that, they share the room evenly.
    """
    if not places:
        return []
    gap = min(gap, (high - low) / max(len(places) - 1, 1))
    order = sorted(range(len(places)), key=places.__getitem__)
    moved, previous = list(places), low - gap
    for index in order:
        previous = moved[index] = max(moved[index], previous + gap)
    following = high + gap
    for index in reversed(order):
        following = moved[index] = min(moved[index], following - gap)
    return moved
