"""A model of one's own that `DeNSTrainer` trains with DeNS: an equivariant network of scalars and vectors.

Each atom holds C scalars and C vectors. Neighbours send both, weighted by their distance; products of vectors
act on scalars, and scalars scale vectors. ``docs/new_model.md`` goes through what DeNS asks of a model.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from fairchem.core.common.registry import registry
from torch import Tensor, nn

from fairchem_dens import keys
from fairchem_dens.models.graph import Graph, build_graph
from fairchem_dens.models.inputs import prepared


class Message(nn.Module):
    """What neighbours tell an atom."""

    def __init__(self, channels: int, num_basis: int) -> None:
        super().__init__()
        self.content = nn.Sequential(
            nn.Linear(channels, channels), nn.SiLU(), nn.Linear(channels, 3 * channels)
        )
        self.by_distance = nn.Linear(num_basis, 3 * channels, bias=False)

    def forward(self, scalars: Tensor, vectors: Tensor, basis: Tensor, graph: Graph) -> tuple[Tensor, Tensor]:
        """Return what is added to scalars (N, C) and vectors (N, 3, C)."""
        source, target = graph.edge_index
        sent = self.content(scalars)[source] * self.by_distance(basis)
        of_scalars, of_vectors, along = sent[:, None].chunk(3, dim=-1)
        direction = (graph.vectors / graph.distances[:, None])[:, :, None]
        message = of_vectors * vectors[source] + along * direction
        return (
            torch.zeros_like(scalars).index_add(0, target, of_scalars[:, 0]),
            torch.zeros_like(vectors).index_add(0, target, message),
        )


class Update(nn.Module):
    """What an atom makes of it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mixed = nn.Linear(channels, 2 * channels, bias=False)
        self.gates = nn.Sequential(
            nn.Linear(2 * channels, channels), nn.SiLU(), nn.Linear(channels, 2 * channels)
        )

    def forward(self, scalars: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is added to scalars (N, C) and vectors (N, 3, C)."""
        one, other = self.mixed(vectors).chunk(2, dim=-1)
        of_scalars, of_vectors = self.gates(torch.cat([scalars, (one * other).sum(dim=1)], dim=-1)).chunk(
            2, dim=-1
        )
        return of_scalars, of_vectors[:, None] * one


class VectorHead(nn.Module):
    """One vector for each atom."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate = nn.Linear(channels, channels)
        self.sum = nn.Linear(channels, 1, bias=False)

    def forward(self, scalars: Tensor, vectors: Tensor) -> Tensor:
        """Return (N, 3)."""
        return self.sum(torch.sigmoid(self.gate(scalars))[:, None] * vectors)[..., 0]


@registry.register_model("scalars_and_vectors")
class ScalarsAndVectors(nn.Module):
    """A small direct force field with force conditioning and a noise head.

    Args:
        channels: C, scalars and vectors of an atom.
        num_layers: messages.
        num_basis: radial functions.
        cutoff: Å.
        max_neighbors: neighbours of an atom; more than there are, or which of equally far ones are kept would
            be chance.
        max_num_elements: atomic numbers below this are known.
        use_pbc: periodic boundary conditions.
        otf_graph: search neighbours in each forward pass; corrupted positions need it.
        use_force_encoding: False hides the forces (ablation).
        predict_noise: False keeps the noise head but neither evaluates nor trains it. The trainer sets it for
            runs without a loss on noise.
    """

    def __init__(
        self,
        channels: int = 32,
        num_layers: int = 3,
        num_basis: int = 16,
        cutoff: float = 5.0,
        max_neighbors: int = 100,
        max_num_elements: int = 90,
        use_pbc: bool = True,
        otf_graph: bool = True,
        use_force_encoding: bool = True,
        predict_noise: bool = True,
    ) -> None:
        super().__init__()
        self.cutoff, self.num_basis = cutoff, num_basis
        self.max_neighbors, self.max_num_elements = max_neighbors, max_num_elements
        self.use_pbc, self.otf_graph = use_pbc, otf_graph
        self.use_force_encoding, self.predict_noise = use_force_encoding, predict_noise
        self.elements = nn.Embedding(max_num_elements, channels)
        self.size_of_force = nn.Linear(1, channels)
        self.direction_of_force = nn.Linear(1, channels, bias=False)
        self.messages = nn.ModuleList(Message(channels, num_basis) for _ in range(num_layers))
        self.updates = nn.ModuleList(Update(channels) for _ in range(num_layers))
        self.energy_head = nn.Sequential(nn.Linear(channels, channels), nn.SiLU(), nn.Linear(channels, 1))
        self.force_head = VectorHead(channels)
        self.noise_head = VectorHead(channels).requires_grad_(predict_noise)

    def forward(self, data: Any) -> dict[str, Tensor]:
        """Predict, in normalised units.

        Args:
            data: batch with the fields of `fairchem_dens.keys`. It is not changed.

        Returns:
            ``energy`` (B,), ``forces`` (N, 3), and ``noise`` (N, 3) in units of σ if the batch carries
            ``condition_forces`` or the model is in training mode.
        """
        data = prepared(data, self.max_num_elements)
        graph = build_graph(
            data,
            cutoff=self.cutoff,
            max_neighbors=self.max_neighbors,
            strict=True,
            use_pbc=self.use_pbc,
            otf_graph=self.otf_graph,
        )
        basis = self._basis(graph.distances)
        scalars, vectors = self._embedded(data)
        for message, update in zip(self.messages, self.updates, strict=True):
            of_scalars, of_vectors = message(scalars, vectors, basis, graph)
            scalars, vectors = scalars + of_scalars, vectors + of_vectors
            of_scalars, of_vectors = update(scalars, vectors)
            scalars, vectors = scalars + of_scalars, vectors + of_vectors

        of_atoms = self.energy_head(scalars)[:, 0]
        energy = of_atoms.new_zeros(len(data[keys.NATOMS])).index_add(0, data[keys.BATCH], of_atoms)
        outputs = {keys.ENERGY: energy, keys.FORCES: self.force_head(scalars, vectors)}
        if self.predict_noise and (self.training or keys.CONDITION_FORCES in data):
            outputs[keys.NOISE] = self.noise_head(scalars, vectors)
        return outputs

    def _embedded(self, data: Any) -> tuple[Tensor, Tensor]:
        """Scalars know the element and the size of the conditioning force, vectors its direction.

        Without a force both linear layers see zeros, so that their parameters have a gradient in each batch.
        """
        forces = torch.zeros_like(data[keys.POS])
        if self.use_force_encoding and keys.CONDITION_FORCES in data:
            forces = data[keys.CONDITION_FORCES]
        size = torch.linalg.vector_norm(forces, dim=-1, keepdim=True)
        scalars = self.elements(data[keys.ATOMIC_NUMBERS]) + self.size_of_force(size)
        return scalars, self.direction_of_force(forces[:, :, None])

    def _basis(self, distances: Tensor) -> Tensor:
        """Sines that vanish, with their slope, at the cutoff."""
        order = torch.arange(1, self.num_basis + 1, device=distances.device)
        reduced = distances[:, None] / self.cutoff
        return (
            torch.sin(order * math.pi * reduced) / distances[:, None] * (1 + torch.cos(math.pi * reduced)) / 2
        )
