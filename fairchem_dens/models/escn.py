"""eSCN that is told about corrupted structures and predicts their noise.

The network is fairchem's, built by its own constructor; what is written here is the forward pass, where the
conditioning enters after the atom embedding and the noise has a head of its own. Argument and parameter names
are those of the paper's flat model.
"""

from __future__ import annotations

from typing import Any

import torch
from fairchem.core.models.equiformer_v2.so3 import SO3_Rotation
from fairchem.core.models.escn.escn import EnergyBlock, ForceBlock, eSCN
from fairchem.core.models.escn.so3 import CoefficientMapping, SO3_Embedding, SO3_Grid
from torch import Tensor, nn

from fairchem_dens import keys
from fairchem_dens.models.arguments import argument_names, check_degrees, check_resolution, require
from fairchem_dens.models.conditioning import ForceEmbedding, add_conditioning
from fairchem_dens.models.graph import build_graph, edge_frames, padded
from fairchem_dens.models.inputs import prepared
from fairchem_dens.models.state import ParametersOnly, make_buffers_transient
from fairchem_dens.validation import refuse_unknown_keys

ENERGY_SCALE = 0.001
"""eSCN starts from small energies."""
FORCE_EMBEDDING_BOUND = 0.001
"""The force embedding starts as small as eSCN's embeddings of the atoms of an edge."""


class ESCNDeNS(ParametersOnly, eSCN):
    """eSCN with force conditioning and a noise head.

    Energies, forces and noise are read off a finite set of points on the sphere, so that the network is
    equivariant up to what these points and the grid of the activation resolve.

    Args:
        use_pbc: periodic boundary conditions.
        regress_forces: build the force head and the noise head.
        otf_graph: search neighbours in each forward pass; corrupted positions need it.
        max_neighbors: neighbours per atom.
        cutoff: Å.
        max_num_elements: atomic numbers below this are known.
        num_layers: blocks.
        lmax_list, mmax_list: highest degree and order, each a list of one number.
        sphere_channels: channels C of the node features.
        hidden_channels: hidden channels of the SO(2) convolutions.
        edge_channels: channels of the edges' invariant features.
        use_grid: only True; there for the paper's configurations.
        num_sphere_samples: points on the sphere that the heads read.
        distance_function: ``gaussian``, ``sigmoid``, ``linearsigmoid`` or ``silu``.
        basis_width_scalar: width of a distance basis function, in units of their spacing.
        distance_resolution: spacing of the distance basis functions, Å.
        show_timing_info: accepted, without effect, as in the paper's code.
        resolution: points of the S2 grid along each angle; None for the smallest.
        enforce_max_neighbors_strictly: see `fairchem_dens.models.graph.build_graph`.
        use_force_encoding: False hides the forces (ablation).
        predict_noise: False keeps the noise head but neither evaluates nor trains it: for runs without a loss
            on the noise.

    Raises:
        ValueError: an argument that does not exist (with the nearest one) or whose value is not supported.
    """

    # Set by fairchem's constructor, out of mypy's sight.
    use_pbc: bool
    otf_graph: bool
    regress_forces: bool
    max_neighbors: int
    cutoff: float
    max_num_elements: int
    sphere_channels: int
    lmax_list: list[int]
    sphere_embedding: nn.Embedding
    SO3_grid: Any
    layer_blocks: nn.ModuleList
    energy_block: EnergyBlock
    force_block: ForceBlock
    sphere_points: nn.Parameter
    sphharm_weights: nn.ParameterList

    def __init__(
        self,
        use_pbc: bool = True,
        regress_forces: bool = True,
        otf_graph: bool = True,
        max_neighbors: int = 40,
        cutoff: float = 8.0,
        max_num_elements: int = 90,
        num_layers: int = 8,
        lmax_list: list[int] | None = None,
        mmax_list: list[int] | None = None,
        sphere_channels: int = 128,
        hidden_channels: int = 256,
        edge_channels: int = 128,
        use_grid: bool = True,
        num_sphere_samples: int = 128,
        distance_function: str = "gaussian",
        basis_width_scalar: float = 1.0,
        distance_resolution: float = 0.02,
        show_timing_info: bool = False,
        resolution: int | None = None,
        enforce_max_neighbors_strictly: bool = True,
        use_force_encoding: bool = True,
        predict_noise: bool = True,
        **unknown: Any,
    ) -> None:
        refuse_unknown_keys(unknown, argument_names(type(self)), "model")
        require("use_grid", use_grid, [True])
        require("distance_function", distance_function, ["gaussian", "sigmoid", "linearsigmoid", "silu"])
        lmax_list = [6] if lmax_list is None else lmax_list
        mmax_list = [2] if mmax_list is None else mmax_list
        check_degrees(lmax_list, mmax_list)
        (lmax,), (mmax,) = lmax_list, mmax_list
        check_resolution("resolution", resolution, lmax)
        super().__init__(
            use_pbc=use_pbc,
            regress_forces=regress_forces,
            otf_graph=otf_graph,
            max_neighbors=max_neighbors,
            cutoff=cutoff,
            max_num_elements=max_num_elements,
            num_layers=num_layers,
            lmax_list=list(lmax_list),
            mmax_list=list(mmax_list),
            sphere_channels=sphere_channels,
            hidden_channels=hidden_channels,
            edge_channels=edge_channels,
            num_sphere_samples=num_sphere_samples,
            distance_function=distance_function,
            basis_width_scalar=basis_width_scalar,
            distance_resolution=distance_resolution,
            resolution=resolution,
        )
        self.enforce_max_neighbors_strictly = enforce_max_neighbors_strictly
        self.use_force_encoding = use_force_encoding
        self.predict_noise = predict_noise and regress_forces

        # All blocks share this list; they use two of its grids.
        for order in {lmax, mmax}:
            self.SO3_grid[lmax][order] = _Grid(lmax, order, resolution)
        self.SO3_edge_rot = nn.ModuleList([_EdgeRotation(lmax, mmax)])
        self.coefficients = _Coefficients(lmax, mmax)
        # The order in which the two are made is the paper's: optimizer and EMA states of its checkpoints list
        # parameters by position.
        self.force_embedding = ForceEmbedding(lmax, sphere_channels, FORCE_EMBEDDING_BOUND)
        if regress_forces:
            head = ForceBlock(sphere_channels, num_sphere_samples, self.act)
            self.denoising_pos_block = head.requires_grad_(predict_noise)
        make_buffers_transient(self)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that are not decayed: embeddings and biases.

        The paper's code trains eSCN by the rule of fairchem's base class, unlike EquiformerV2, which has one
        of its own.
        """
        return set(super().no_weight_decay())

    def forward(self, data: Any) -> dict[str, Tensor]:
        """Predict, in normalised units.

        Args:
            data: batch with the fields of `fairchem_dens.keys`. It is not changed.

        Returns:
            ``energy`` (B,); with ``regress_forces`` also ``forces`` (N, 3); and ``noise`` (N, 3) in units of
            σ, if the batch carries ``condition_forces`` or the model is in training mode.

        Raises:
            ValueError: an atomic number is out of range, or graph parallelism is on.
        """
        data = prepared(data, self.max_num_elements)
        atomic_numbers = data[keys.ATOMIC_NUMBERS]
        graph = build_graph(
            data,
            cutoff=self.cutoff,
            max_neighbors=self.max_neighbors,
            strict=self.enforce_max_neighbors_strictly,
            use_pbc=self.use_pbc,
            otf_graph=self.otf_graph,
        )
        natoms, x = len(atomic_numbers), self._embed(data)
        if graph.edge_index.shape[1] < 2:
            # With one edge they overwrite what their gradients need.
            graph = padded(graph, natoms, num_edges=2)
            atomic_numbers = torch.cat([atomic_numbers, atomic_numbers[-1:]])
            x.set_embedding(torch.cat([x.embedding, x.embedding[-1:]]))
        frames = edge_frames(graph.vectors, random_roll=self.training)
        for rotation in self.SO3_edge_rot:
            rotation.set_wigner(frames)  # type: ignore[operator]  # a ModuleList forgets what it holds

        for index, block in enumerate(self.layer_blocks):
            messages = block(
                x,
                atomic_numbers,
                graph.distances,
                graph.edge_index,
                self.SO3_edge_rot,
                self.coefficients,
            )
            # The first block has no residual connection: it mixes the embedding in by itself.
            x.set_embedding(x.embedding + messages.embedding if index else messages.embedding)
        values = torch.einsum("nic, pi -> npc", x.embedding[:natoms], self.sphharm_weights[0])
        values = values.reshape(-1, self.sphere_channels)

        outputs = {keys.ENERGY: self._energy(values, data)}
        if self.regress_forces:
            outputs[keys.FORCES] = self.force_block(values, self.sphere_points)
            if self.predict_noise and (self.training or keys.CONDITION_FORCES in data):
                outputs[keys.NOISE] = self.denoising_pos_block(values, self.sphere_points)
        return outputs

    def _embed(self, data: Any) -> SO3_Embedding:
        """Atoms on l = 0, then the conditioning."""
        pos, scalars = data[keys.POS], self.sphere_embedding(data[keys.ATOMIC_NUMBERS])
        x = SO3_Embedding(len(pos), self.lmax_list, self.sphere_channels, pos.device, scalars.dtype)
        x.embedding[:, 0] = scalars
        x.set_embedding(
            add_conditioning(
                x.embedding, data, self.force_embedding, use_force_encoding=self.use_force_encoding
            )
        )
        return x

    def _energy(self, values: Tensor, data: Any) -> Tensor:
        # Not in half precision: it knows the sum over a structure to three digits.
        of_atoms = self.energy_block(values)[:, 0].to(self.sphere_points.dtype)
        energy = of_atoms.new_zeros(len(data[keys.NATOMS])).index_add(0, data[keys.BATCH], of_atoms)
        return ENERGY_SCALE * energy


class _Grid(SO3_Grid):
    """fairchem's grid, with its tables made at once and moved together with the model.

    fairchem makes them in the first forward pass: rounded if that is in mixed precision, and for ever on the
    device that it ran on.
    """

    def __init__(self, lmax: int, mmax: int, resolution: int | None) -> None:
        super().__init__(lmax, mmax, resolution)
        self._initialize(torch.device("cpu"))
        for name in ("to_grid_mat", "from_grid_mat"):
            table = getattr(self, name)
            delattr(self, name)
            self.register_buffer(name, table)
        self.mapping = _AllCoefficients()


class _AllCoefficients:
    """Stands for a mapping where nothing is chosen, which spares copies and the wait for an index."""

    def coefficient_idx(self, _lmax: int, _mmax: int) -> slice:
        return slice(None)


class _Coefficients(nn.Module):
    """What eSCN's blocks read of fairchem's `CoefficientMapping`, made once.

    Sizes are numbers of Python: as tensors on a GPU, each use of them would wait for it.
    """

    def __init__(self, lmax: int, mmax: int) -> None:
        super().__init__()
        mapping = CoefficientMapping([lmax], [mmax], torch.device("cpu"))
        self.register_buffer("to_m", mapping.to_m)
        self.m_size: list[int] = mapping.m_size.tolist()
        self.res_size: list[int] = mapping.res_size.tolist()


class _EdgeRotation(SO3_Rotation):
    """Rotations into the frames of edges, cut to the orders that eSCN works on once and not in each block.

    Based on EquiformerV2's class, which can be built before there are edges. eSCN does not have its rescaling
    on the way back.
    """

    wigner: Tensor
    wigner_inv: Tensor

    def __init__(self, lmax: int, mmax: int) -> None:
        super().__init__(lmax)
        self.mmax = mmax

    def set_wigner(self, rot_mat3x3: Tensor) -> None:
        """Compute the matrices of all edges, (E, coefficients up to mmax, (lmax + 1)²)."""
        # Mixed precision would round the rotations.
        with torch.autocast(rot_mat3x3.device.type, enabled=False):
            super().set_wigner(rot_mat3x3)
        self.wigner = self.wigner[:, self.mapping.coefficient_idx(self.lmax, self.mmax)]
        self.wigner_inv = self.wigner.transpose(1, 2)

    def rotate(self, embedding: Tensor, *_degree_and_order: int) -> Tensor:
        """Into the frames of the edges."""
        return torch.bmm(self.wigner, embedding)

    def rotate_inv(self, embedding: Tensor, *_degree_and_order: int) -> Tensor:
        """Back."""
        return torch.bmm(self.wigner_inv, embedding)
