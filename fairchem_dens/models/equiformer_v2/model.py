"""EquiformerV2 that is told about corrupted structures and predicts their noise.

The conditioning enters between the atom embedding and the edge-degree embedding. Names of arguments and
parameters are those of the paper's flat model. The parameters are held by fairchem's modules; what is done
with them is in `fairchem_dens.ops`, which computes the same in less time and memory.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from fairchem.core.models.equiformer_v2.module_list import ModuleListInfo
from fairchem.core.models.equiformer_v2.radial_function import RadialFunction
from fairchem.core.models.equiformer_v2.so3 import (
    CoefficientMappingModule,
    SO3_Grid,
    SO3_LinearV2,
    SO3_Rotation,
)
from fairchem.core.models.scn.smearing import GaussianSmearing
from torch import Tensor, nn

from fairchem_dens import keys
from fairchem_dens.models.arguments import argument_names, check_degrees, check_resolution, require
from fairchem_dens.models.conditioning import ForceEmbedding, add_conditioning
from fairchem_dens.models.equiformer_v2 import memory, paths
from fairchem_dens.models.equiformer_v2.block import Block
from fairchem_dens.models.equiformer_v2.embedding import EdgeDegree
from fairchem_dens.models.equiformer_v2.geometry import (
    Geometry,
    Grids,
    StockInputs,
    edges_of,
    sorted_by_target,
)
from fairchem_dens.models.equiformer_v2.heads import EnergyHead, VectorHead
from fairchem_dens.models.equiformer_v2.norm import make_norm
from fairchem_dens.models.graph import Graph, build_graph, edge_frames, padded
from fairchem_dens.models.inputs import prepared
from fairchem_dens.models.state import ParametersOnly, make_buffers_transient
from fairchem_dens.models.weight_decay import no_weight_decay
from fairchem_dens.ops.layout import Rows
from fairchem_dens.ops.radial import EdgeInputs, gaussians
from fairchem_dens.validation import refuse_unknown_keys

AVG_NUM_NODES = 77.81317
AVG_DEGREE = 23.395238876342773
"""Means over 100 000 structures of OC20 IS2RE, the second within 5 Å: the constants of the paper's code."""
NUM_GAUSSIANS = 600


class EquiformerV2DeNS(ParametersOnly):
    """EquiformerV2 with force conditioning and a noise head.

    Args:
        use_pbc: periodic boundary conditions.
        regress_forces: build the force head and the noise head.
        otf_graph: search neighbours in each forward pass; corrupted positions need it.
        max_neighbors: neighbours per atom.
        max_radius: cutoff, Å.
        max_num_elements: atomic numbers below this are known.
        num_layers: blocks.
        sphere_channels: channels C of the node features.
        attn_hidden_channels: hidden channels of attention.
        num_heads, attn_alpha_channels, attn_value_channels: heads, and channels of a head's weight and value.
        ffn_hidden_channels: hidden channels of the feed-forward networks.
        norm_type: ``layer_norm``, ``layer_norm_sh`` or ``rms_norm_sh``.
        lmax_list, mmax_list: highest degree and order, each a list of one number.
        grid_resolution: points of the S2 grid along each angle; None for the smallest.
        num_sphere_samples, num_distance_basis: accepted, without effect, as in the paper's code.
        edge_channels: hidden channels of the radial functions.
        use_atom_edge_embedding, share_atom_edge_embedding: elements enter the radial functions; with one
            embedding for all blocks.
        use_m_share_rad: one radial weight for all orders of a degree.
        distance_function: ``gaussian``.
        attn_activation, ffn_activation: activations.
        use_tp_reparam: only False; there for the paper's configurations.
        use_s2_act_attn: only False.
        use_attn_renorm, use_gate_act, use_grid_mlp, use_sep_s2_act: as in EquiformerV2.
        alpha_drop, drop_path_rate, proj_drop: dropout of attention weights, of blocks, of projections.
        weight_init: ``uniform`` or ``normal``.
        enforce_max_neighbors_strictly: see `fairchem_dens.models.graph.build_graph`.
        avg_num_nodes, avg_degree: what sums over atoms and edges are divided by; None for the OC20 constants.
        use_force_encoding: False hides the forces (ablation).
        use_noise_schedule_sigma_encoding: encode σ too.
        use_denoising_energy: False multiplies the energy of corrupted structures by zero (ablation).
        predict_noise: False keeps the noise head but neither evaluates nor trains it: for runs without a loss
            on the noise.
        recompute: what is computed a second time for the gradient instead of being kept: ``none``,
            ``activations`` or ``layers``, see `fairchem_dens.models.equiformer_v2.memory`.
        kernels: ``plain`` for PyTorch, ``triton`` for fused kernels, ``auto`` for these if they can be had.
        use_energy_lin_ref, load_energy_lin_ref: add per-element references held in the model; hold them. Both
            False in training.

    Raises:
        ValueError: an argument that does not exist (with the nearest one) or whose value is not supported.
    """

    def __init__(
        self,
        use_pbc: bool = True,
        regress_forces: bool = True,
        otf_graph: bool = True,
        max_neighbors: int = 500,
        max_radius: float = 5.0,
        max_num_elements: int = 90,
        num_layers: int = 12,
        sphere_channels: int = 128,
        attn_hidden_channels: int = 128,
        num_heads: int = 8,
        attn_alpha_channels: int = 32,
        attn_value_channels: int = 16,
        ffn_hidden_channels: int = 512,
        norm_type: str = "rms_norm_sh",
        lmax_list: list[int] | None = None,
        mmax_list: list[int] | None = None,
        grid_resolution: int | None = None,
        num_sphere_samples: int = 128,
        edge_channels: int = 128,
        use_atom_edge_embedding: bool = True,
        share_atom_edge_embedding: bool = False,
        use_m_share_rad: bool = False,
        distance_function: str = "gaussian",
        num_distance_basis: int = 512,
        attn_activation: str = "scaled_silu",
        use_tp_reparam: bool = False,
        use_s2_act_attn: bool = False,
        use_attn_renorm: bool = True,
        ffn_activation: str = "scaled_silu",
        use_gate_act: bool = False,
        use_grid_mlp: bool = False,
        use_sep_s2_act: bool = True,
        alpha_drop: float = 0.1,
        drop_path_rate: float = 0.05,
        proj_drop: float = 0.0,
        weight_init: str = "normal",
        enforce_max_neighbors_strictly: bool = True,
        avg_num_nodes: float | None = None,
        avg_degree: float | None = None,
        use_force_encoding: bool = True,
        use_noise_schedule_sigma_encoding: bool = False,
        use_denoising_energy: bool = True,
        use_energy_lin_ref: bool = False,
        load_energy_lin_ref: bool = False,
        predict_noise: bool = True,
        recompute: str = "activations",
        kernels: str = "auto",
        **unknown: Any,
    ) -> None:
        super().__init__()
        refuse_unknown_keys(unknown, argument_names(type(self)), "model")
        require("distance_function", distance_function, ["gaussian"])
        require("use_tp_reparam", use_tp_reparam, [False])
        require("use_s2_act_attn", use_s2_act_attn, [False])
        require("weight_init", weight_init, ["uniform", "normal"])
        require("norm_type", norm_type, ["layer_norm", "layer_norm_sh", "rms_norm_sh"])
        require("recompute", recompute, list(memory.LEVELS))
        require("kernels", kernels, list(paths.KERNELS))
        # fairchem's blocks take any name for these two and use SiLU.
        require("attn_activation", attn_activation, ["silu", "scaled_silu"])
        require("ffn_activation", ffn_activation, ["silu", "scaled_silu"])
        if use_energy_lin_ref and not load_energy_lin_ref:
            raise ValueError(
                "'model.use_energy_lin_ref: True' needs 'model.load_energy_lin_ref: True', which holds the "
                "references it adds."
            )
        if share_atom_edge_embedding and not use_atom_edge_embedding:
            raise ValueError(
                "'model.share_atom_edge_embedding: True' needs 'model.use_atom_edge_embedding: True'."
            )
        self.lmax_list = [6] if lmax_list is None else lmax_list
        self.mmax_list = [2] if mmax_list is None else mmax_list
        check_degrees(self.lmax_list, self.mmax_list)
        check_resolution("grid_resolution", grid_resolution, self.lmax_list[0])
        self.lmax_list, self.mmax_list = list(self.lmax_list), list(self.mmax_list)
        self.lmax = self.lmax_list[0]
        self.use_pbc, self.otf_graph = use_pbc, otf_graph
        self.max_neighbors, self.max_radius = max_neighbors, max_radius
        self.enforce_max_neighbors_strictly = enforce_max_neighbors_strictly
        self.max_num_elements = max_num_elements
        self.regress_forces = regress_forces
        self.sphere_channels = sphere_channels
        self.weight_init = weight_init
        self.avg_num_nodes = avg_num_nodes or AVG_NUM_NODES
        self.use_force_encoding = use_force_encoding
        self.use_denoising_energy = use_denoising_energy
        self.use_energy_lin_ref = use_energy_lin_ref
        self.predict_noise = predict_noise and regress_forces

        # The order in which modules are made is the paper's: optimizer and EMA states of its checkpoints list
        # parameters by position.
        self.sphere_embedding = nn.Embedding(max_num_elements, sphere_channels)
        self.distance_expansion = GaussianSmearing(0.0, max_radius, NUM_GAUSSIANS, 2.0)
        edge_channels_list = [int(self.distance_expansion.num_output), edge_channels, edge_channels]
        self.source_embedding, self.target_embedding = None, None
        if share_atom_edge_embedding:
            self.source_embedding = nn.Embedding(max_num_elements, edge_channels)
            self.target_embedding = nn.Embedding(max_num_elements, edge_channels)
            edge_channels_list[0] += 2 * edge_channels

        self.SO3_rotation = nn.ModuleList([SO3_Rotation(self.lmax)])
        self.mappingReduced = CoefficientMappingModule(self.lmax_list, self.mmax_list)
        self.SO3_grid = ModuleListInfo(f"({self.lmax}, {self.lmax})")
        for degree in range(self.lmax + 1):
            self.SO3_grid.append(
                nn.ModuleList(
                    SO3_Grid(degree, order, resolution=grid_resolution, normalization="component")
                    for order in range(self.lmax + 1)
                )
            )
        self.rows = Rows(self.lmax, self.mmax_list[0])
        self.grids = Grids(self.SO3_grid, self.rows)
        shared: dict[str, Any] = {
            "sphere_channels": sphere_channels,
            "lmax_list": self.lmax_list,
            "mmax_list": self.mmax_list,
        }
        of_edges: dict[str, Any] = shared | {
            "SO3_rotation": self.SO3_rotation,
            "mappingReduced": self.mappingReduced,
            "max_num_elements": max_num_elements,
            "edge_channels_list": edge_channels_list,
            "use_atom_edge_embedding": use_atom_edge_embedding and not share_atom_edge_embedding,
            "recompute": recompute,
        }
        attention: dict[str, Any] = of_edges | {
            "hidden_channels": attn_hidden_channels,
            "num_heads": num_heads,
            "attn_alpha_channels": attn_alpha_channels,
            "attn_value_channels": attn_value_channels,
            "SO3_grid": self.SO3_grid,
            "grids": self.grids,
            "use_m_share_rad": use_m_share_rad,
            "activation": attn_activation,
            "use_s2_act_attn": use_s2_act_attn,
            "use_attn_renorm": use_attn_renorm,
            "use_gate_act": use_gate_act,
            "use_sep_s2_act": use_sep_s2_act,
        }
        feed_forward: dict[str, Any] = shared | {
            "hidden_channels": ffn_hidden_channels,
            "SO3_grid": self.SO3_grid,
            "grids": self.grids,
            "activation": ffn_activation,
            "use_gate_act": use_gate_act,
            "use_grid_mlp": use_grid_mlp,
            "use_sep_s2_act": use_sep_s2_act,
        }
        vector_head = attention | {"output_channels": 1, "alpha_drop": 0.0}

        self.edge_degree_embedding = EdgeDegree(rescale_factor=avg_degree or AVG_DEGREE, **of_edges)
        self.blocks = nn.ModuleList(
            Block(
                norm_type,
                attention | {"output_channels": sphere_channels, "alpha_drop": alpha_drop},
                feed_forward | {"output_channels": sphere_channels},
                drop_path_rate,
                proj_drop,
            )
            for _ in range(num_layers)
        )
        self.norm = make_norm(norm_type, self.lmax, sphere_channels)
        self.energy_block = EnergyHead(output_channels=1, **feed_forward)
        if regress_forces:
            self.force_block = VectorHead(**vector_head)
        if load_energy_lin_ref:
            self.energy_lin_ref = nn.Parameter(torch.zeros(max_num_elements), requires_grad=False)
        self.force_embedding = ForceEmbedding(self.lmax, sphere_channels, weight_init)
        self.noise_schedule_sigma_embedding = (
            nn.Linear(1, sphere_channels) if use_noise_schedule_sigma_encoding else None
        )
        if regress_forces:
            self.denoising_pos_block = VectorHead(**vector_head).requires_grad_(predict_noise)

        self.apply(self._initialise)
        self.apply(_initialise_radial_function)
        make_buffers_transient(self)
        self.operations = paths.operations(kernels)
        paths.choose(self, self.operations)
        paths.describe(self)

    @property
    def num_params(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that are not decayed."""
        return no_weight_decay(self)

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
        atomic_numbers, batch = data[keys.ATOMIC_NUMBERS], data[keys.BATCH]
        graph = build_graph(
            data,
            cutoff=self.max_radius,
            max_neighbors=self.max_neighbors,
            strict=self.enforce_max_neighbors_strictly,
            use_pbc=self.use_pbc,
            otf_graph=self.otf_graph,
        )
        natoms, x = len(atomic_numbers), self._embed(data, atomic_numbers)
        if graph.edge_index.shape[1] == 0:
            graph = padded(graph, natoms, num_edges=1)
            atomic_numbers, batch, x = (
                torch.cat([values, values[-1:]]) for values in (atomic_numbers, batch, x)
            )
        geometry = self._geometry(sorted_by_target(graph), atomic_numbers)
        x = x + self.edge_degree_embedding(geometry)
        for block in self.blocks:
            x = block(x, geometry, batch, len(data[keys.NATOMS]))
        x = self.norm(x)

        outputs = {keys.ENERGY: self._energy(self.energy_block(x)[:natoms], data)}
        if self.regress_forces:
            outputs[keys.FORCES] = self.force_block(x, geometry)[:natoms]
            if self.predict_noise and (self.training or keys.CONDITION_FORCES in data):
                outputs[keys.NOISE] = self.denoising_pos_block(x, geometry)[:natoms]
        return outputs

    def _geometry(self, graph: Graph, atomic_numbers: Tensor) -> Geometry:
        """Of a graph that is sorted by target."""
        frames = edge_frames(graph.vectors, random_roll=self.training)
        source, target = atomic_numbers[graph.edge_index]
        expansion = self.distance_expansion
        shared = None
        if self.source_embedding is not None and self.target_embedding is not None:
            shared = self.source_embedding.weight, self.target_embedding.weight

        def stock_inputs() -> StockInputs:
            for rotation in self.SO3_rotation:
                rotation.set_wigner(frames)  # type: ignore[operator]  # a ModuleList forgets what it holds
            features = inputs.gaussians
            if self.source_embedding is not None and self.target_embedding is not None:
                of_elements = self.source_embedding(source), self.target_embedding(target)
                features = torch.cat([features, *of_elements], dim=1)
            return StockInputs(atomic_numbers, features, graph.edge_index)

        inputs = EdgeInputs(gaussians(graph.distances, expansion.offset, expansion.coeff), source, target)
        return Geometry(
            edges_of(graph, len(atomic_numbers)),
            self.operations.wigner_packed(frames, self.rows),
            inputs,
            shared,
            stock_inputs,
        )

    def _embed(self, data: Any, atomic_numbers: Tensor) -> Tensor:
        """Atoms on l = 0, then the conditioning; (N, (L+1)², C)."""
        scalars = self.sphere_embedding(atomic_numbers)[:, None]
        return add_conditioning(
            F.pad(scalars, (0, 0, 0, self.rows.num_full - 1)),
            data,
            self.force_embedding,
            self.noise_schedule_sigma_embedding,
            self.use_force_encoding,
        )

    def _energy(self, of_atoms: Tensor, data: Any) -> Tensor:
        energy = of_atoms.new_zeros(len(data[keys.NATOMS])).index_add(0, data[keys.BATCH], of_atoms)
        energy = energy / self.avg_num_nodes
        if not self.use_denoising_energy and keys.CORRUPTED in data:
            energy = energy * ~data[keys.CORRUPTED]
        if self.use_energy_lin_ref:
            references = self.energy_lin_ref[data[keys.ATOMIC_NUMBERS]]
            energy = energy.to(references.dtype).index_add(0, data[keys.BATCH], references)
        return energy

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | SO3_LinearV2):
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            if self.weight_init == "normal":
                nn.init.normal_(module.weight, 0.0, 1 / math.sqrt(module.in_features))
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def _initialise_radial_function(module: nn.Module) -> None:
    """Radial functions start uniform whatever ``weight_init`` says."""
    if isinstance(module, RadialFunction):
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                bound = 1 / math.sqrt(layer.in_features)
                nn.init.uniform_(layer.weight, -bound, bound)
                nn.init.zeros_(layer.bias)
