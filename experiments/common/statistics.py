"""Means and spreads over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over seeds; the latter is nan for one seed."""

    mean: float
    std: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Summarise values, one for each seed."""
        values = list(values)
        return cls(fmean(values), stdev(values) if len(values) > 1 else math.nan, len(values))

    def text(self, digits: int = 1) -> str:
        """Return ``mean ± std``."""
        if math.isnan(self.std):
            return f"{self.mean:.{digits}f}"
        return f"{self.mean:.{digits}f} ± {self.std:.{digits}f}"


def select(records: Iterable[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    """Return the records in which all of these have the given value."""
    return [record for record in records if all(record.get(key) == value for key, value in wanted.items())]


def last(metric: str, scale: float = 1.0) -> Callable[[dict[str, Any]], float]:
    """Return a function that reads a metric of a run's last evaluation."""
    return lambda record: scale * float(record["history"][-1][metric])


def over_seeds(records: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> Spread:
    """Summarise a value of runs that differ in their seeds alone."""
    return Spread.of(value(record) for record in records)


def gains(
    records: Sequence[dict[str, Any]],
    others: Sequence[dict[str, Any]],
    value: Callable[[dict[str, Any]], float],
) -> Spread:
    """Return by how many percent a value is lower than in others, seed by seed.

    Weights and batches of two runs with the same seed have the same origin, so their difference spreads less
    than either.
    """
    base = {record["seed"]: value(record) for record in others}
    return Spread.of(100 * (1 - value(record) / base[record["seed"]]) for record in records)


def curve(
    records: Sequence[dict[str, Any]], metric: str, along: str, scale: float = 1.0
) -> tuple[list[float], list[float], list[float], list[float]]:
    """Return a learning curve over seeds: places, means, lowest and highest values.

    Args:
        records: runs that differ in their seeds alone.
        metric: of an evaluation.
        along: ``step`` or ``seconds``; seconds are averaged over the seeds.
        scale: factor of the metric.
    """
    histories = [record["history"] for record in records]
    columns = list(zip(*histories, strict=True))
    places = [fmean(line[along] for line in column) for column in columns]
    values = [[scale * line[metric] for line in column] for column in columns]
    return places, [fmean(v) for v in values], [min(v) for v in values], [max(v) for v in values]
