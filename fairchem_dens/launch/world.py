"""World-size arithmetic: how many structures a step of a run sees, and how many its YAML was written for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_HEADER = re.compile(r"#\s*batch\s+(?P<batch>\d+) per GPU [×x] (?P<gpus>\d+) GPUs? = (?P<total>\d+)")


@dataclass(frozen=True, kw_only=True)
class World:
    """Ranks of a run and what each of them sees in a step.

    Attributes:
        nodes: machines.
        ranks_per_node: GPUs of each, or processes of a run on CPUs.
        batch_size: structures on each rank.

    Raises:
        ValueError: one of them is below 1; names its option.
    """

    nodes: int
    ranks_per_node: int
    batch_size: int

    def __post_init__(self) -> None:
        for option, value in (
            ("--num-nodes", self.nodes),
            ("--num-gpus", self.ranks_per_node),
            ("optim.batch_size", self.batch_size),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"'{option}' must be a whole number from 1, found {value!r}.")

    @property
    def ranks(self) -> int:
        """All processes of the run."""
        return self.nodes * self.ranks_per_node

    @property
    def global_batch(self) -> int:
        """Structures of one step."""
        return self.ranks * self.batch_size

    def arithmetic(self, rank: str = "GPU") -> str:
        """Return the sentence ``2 nodes × 8 GPUs × 4 structures = 64``."""
        return (
            f"{_counted(self.nodes, 'node')} × {_counted(self.ranks_per_node, rank)} × "
            f"{_counted(self.batch_size, 'structure')} = {self.global_batch}"
        )


@dataclass(frozen=True, kw_only=True)
class WrittenBatch:
    """The batch in the opening comment of a YAML: ``batch 4 per GPU × 16 GPUs = 64``."""

    batch_size: int
    gpus: int

    @property
    def global_batch(self) -> int:
        """Structures of one step."""
        return self.batch_size * self.gpus

    def warning(self, world: World) -> str | None:
        """Say that a run has another global batch than its YAML was written for, or return None."""
        wanted = self.global_batch
        if world.global_batch == wanted:
            return None
        said = (
            f"the global batch is {world.global_batch}, but the YAML was written for {self.batch_size} × "
            f"{self.gpus} GPUs = {wanted}, and so was its learning rate"
        )
        if wanted % world.ranks == 0:
            return f"{said}: --optim.batch_size={wanted // world.ranks} makes them equal"
        return f"{said}, which {world.ranks} ranks cannot have: take other --num-nodes or --num-gpus"


def written_batch(yml: Path) -> WrittenBatch | None:
    """Return the batch that the opening comment of a YAML states, or None if it states none."""
    for line in yml.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if found := _HEADER.match(line):
            return WrittenBatch(batch_size=int(found["batch"]), gpus=int(found["gpus"]))
    return None


def _counted(number: int, noun: str) -> str:
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun}es" if noun.endswith("s") else f"{number} {noun}s"
