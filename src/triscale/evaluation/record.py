"""What is known of a run that is over: how it was trained, its scores, and what it answered."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from triscale.evaluation.matches import Matches
from triscale.evaluation.predictions import Predictions
from triscale.evaluation.suite import NOTHING, Results
from triscale.training.history import History

NO_RESULTS = NOTHING.results


@dataclass(frozen=True, kw_only=True)
class Part:
    """A run, or a phase of one, as it was trained."""

    name: str = ""
    """Of the phase; "" where there are none."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What it was made from: "section.field" to value."""
    resolved: Mapping[str, Any] = field(default_factory=dict)
    """What it became, as resolved.json holds it; empty where that is not there."""
    history: History = field(default_factory=History)
    quarantine: Mapping[str, int] = field(default_factory=dict)
    """Samples that were found bad or are never used, by reason."""

    @property
    def samples_seen(self) -> int:
        """Pairs or images drawn."""
        return self.history.steps * int(self.settings.get("batch.size", 0))

    @property
    def parameters(self) -> int:
        """Of all towers."""
        counts = self.resolved.get("parameters", {})
        return sum(int(count) for count in counts.values()) if isinstance(counts, dict) else 0


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run with its scores."""

    name: str
    """What tells it from others: its folder's name."""
    recipe: str = ""
    parts: tuple[Part, ...] = ()
    """One, or one for each phase that was begun; none for a model that we did not train."""
    results: Results = field(default_factory=lambda: NO_RESULTS)
    predictions: Mapping[str, Predictions] = field(default_factory=dict)
    """By name of a classification set."""
    matches: Mapping[str, Matches] = field(default_factory=dict)
    """By name of a retrieval set."""

    @property
    def seconds(self) -> float:
        """Wall time of training."""
        return math.fsum(part.history.seconds for part in self.parts)

    @property
    def steps(self) -> int:
        """Of all parts."""
        return sum(part.history.steps for part in self.parts)

    @property
    def samples_seen(self) -> int:
        """Of all parts."""
        return sum(part.samples_seen for part in self.parts)

    @property
    def parameters(self) -> int:
        """Of the towers that it ends with."""
        return self.parts[-1].parameters if self.parts else 0

    @property
    def settings(self) -> dict[str, Any]:
        """Of all parts, behind the phase's name where there are phases."""
        return {
            f"{part.name}.{key}" if part.name else key: value
            for part in self.parts
            for key, value in part.settings.items()
        }
