"""What is known about a data set: what was read of it, and what is wrong."""

from __future__ import annotations

from dataclasses import dataclass, field

from fairchem_dens.data.source import Source
from fairchem_dens.data.statistics import Statistics


@dataclass(frozen=True)
class Record:
    """Something wrong at one place: ``index`` within ``file`` or, if None, the whole file."""

    file: str
    index: int | None
    text: str


@dataclass(frozen=True)
class Finding:
    """Something about a whole set. A problem breaks training or makes it wrong, a note does not."""

    problem: bool
    text: str


@dataclass
class Inspection:
    """What is known about one source.

    Attributes:
        source: what was read.
        files: number of LMDB files; 0 for other formats.
        total: number of structures.
        statistics: of those that were read.
        records: what is wrong with files and structures.
        findings: what is to be said about the whole.
    """

    source: Source
    files: int
    total: int
    statistics: Statistics
    records: list[Record] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether all structures were read."""
        return self.statistics.read == self.total

    @property
    def healthy(self) -> bool:
        """Whether nothing is wrong."""
        return not self.records and not any(finding.problem for finding in self.findings)
