"""EquiformerV2 that is told about corrupted structures and predicts their noise.

The blocks are fairchem's; put together here so that the conditioning can enter between the atom embedding and
the edge-degree embedding. Argument and parameter names are those of the paper's flat model.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from fairchem.core.models.equiformer_v2.input_block import EdgeDegreeEmbedding
from fairchem.core.models.equiformer_v2.layer_norm import get_normalization_layer
from fairchem.core.models.equiformer_v2.module_list import ModuleListInfo
from fairchem.core.models.equiformer_v2.radial_function import RadialFunction
from fairchem.core.models.equiformer_v2.so3 import (
    CoefficientMappingModule,
    SO3_Embedding,
    SO3_Grid,
    SO3_LinearV2,
    SO3_Rotation,
)
from fairchem.core.models.equiformer_v2.transformer_block import (
    FeedForwardNetwork,
    SO2EquivariantGraphAttention,
    TransBlockV2,
)
from fairchem.core.models.scn.smearing import GaussianSmearing
from torch import Tensor, nn

from fairchem_dens import keys
from fairchem_dens.models.arguments import argument_names, check_degrees, check_resolution, require
from fairchem_dens.models.conditioning import ForceEmbedding, add_conditioning
from fairchem_dens.models.graph import build_graph, edge_frames, padded
from fairchem_dens.models.inputs import prepared
from fairchem_dens.models.state import ParametersOnly, make_buffers_transient
from fairchem_dens.models.weight_decay import no_weight_decay
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
        **unknown: Any,
    ) -> None:
        super().__init__()
        refuse_unknown_keys(unknown, argument_names(type(self)), "model")
        require("distance_function", distance_function, ["gaussian"])
        require("use_tp_reparam", use_tp_reparam, [False])
        require("use_s2_act_attn", use_s2_act_attn, [False])
        require("weight_init", weight_init, ["uniform", "normal"])
        require("norm_type", norm_type, ["layer_norm", "layer_norm_sh", "rms_norm_sh"])
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
        embeds_in_blocks = use_atom_edge_embedding and not share_atom_edge_embedding

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
        self.edge_degree_embedding = EdgeDegreeEmbedding(
            sphere_channels,
            self.lmax_list,
            self.mmax_list,
            self.SO3_rotation,
            self.mappingReduced,
            max_num_elements,
            edge_channels_list,
            embeds_in_blocks,
            rescale_factor=avg_degree or AVG_DEGREE,
        )

        attention: dict[str, Any] = {
            "sphere_channels": sphere_channels,
            "num_heads": num_heads,
            "attn_alpha_channels": attn_alpha_channels,
            "attn_value_channels": attn_value_channels,
            "lmax_list": self.lmax_list,
            "mmax_list": self.mmax_list,
            "SO3_rotation": self.SO3_rotation,
            "mappingReduced": self.mappingReduced,
            "SO3_grid": self.SO3_grid,
            "max_num_elements": max_num_elements,
            "edge_channels_list": edge_channels_list,
            "use_atom_edge_embedding": embeds_in_blocks,
            "use_m_share_rad": use_m_share_rad,
            "use_s2_act_attn": use_s2_act_attn,
            "use_attn_renorm": use_attn_renorm,
            "use_gate_act": use_gate_act,
            "use_sep_s2_act": use_sep_s2_act,
        }
        self.blocks = nn.ModuleList(
            TransBlockV2(
                attn_hidden_channels=attn_hidden_channels,
                ffn_hidden_channels=ffn_hidden_channels,
                output_channels=sphere_channels,
                attn_activation=attn_activation,
                ffn_activation=ffn_activation,
                use_grid_mlp=use_grid_mlp,
                norm_type=norm_type,
                alpha_drop=alpha_drop,
                drop_path_rate=drop_path_rate,
                proj_drop=proj_drop,
                **attention,
            )
            for _ in range(num_layers)
        )
        self.norm = get_normalization_layer(norm_type, lmax=self.lmax, num_channels=sphere_channels)
        self.energy_block = FeedForwardNetwork(
            sphere_channels,
            ffn_hidden_channels,
            1,
            self.lmax_list,
            self.mmax_list,
            self.SO3_grid,
            ffn_activation,
            use_gate_act,
            use_grid_mlp,
            use_sep_s2_act,
        )

        def vector_head() -> SO2EquivariantGraphAttention:
            return SO2EquivariantGraphAttention(
                hidden_channels=attn_hidden_channels,
                output_channels=1,
                activation=attn_activation,
                alpha_drop=0.0,
                **attention,
            )

        if regress_forces:
            self.force_block = vector_head()
        if load_energy_lin_ref:
            self.energy_lin_ref = nn.Parameter(torch.zeros(max_num_elements), requires_grad=False)
        self.force_embedding = ForceEmbedding(self.lmax, sphere_channels, weight_init)
        self.noise_schedule_sigma_embedding = (
            nn.Linear(1, sphere_channels) if use_noise_schedule_sigma_encoding else None
        )
        if regress_forces:
            self.denoising_pos_block = vector_head().requires_grad_(predict_noise)

        self.apply(self._initialise)
        self.apply(_initialise_radial_function)
        make_buffers_transient(self)

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
            atomic_numbers, batch = (torch.cat([values, values[-1:]]) for values in (atomic_numbers, batch))
            x.set_embedding(torch.cat([x.embedding, x.embedding[-1:]]))
        frames = edge_frames(graph.vectors, random_roll=self.training)
        for rotation in self.SO3_rotation:
            rotation.set_wigner(frames)  # type: ignore[operator]  # a ModuleList forgets what it holds
        edge_features = self._edge_features(graph.distances, atomic_numbers, graph.edge_index)

        edge_degree = self.edge_degree_embedding(
            atomic_numbers, edge_features, graph.edge_index, len(atomic_numbers)
        )
        x.embedding = x.embedding + edge_degree.embedding
        for block in self.blocks:
            x = block(x, atomic_numbers, edge_features, graph.edge_index, batch=batch)
        x.embedding = self.norm(x.embedding)

        outputs = {keys.ENERGY: self._energy(x, data)}
        if self.regress_forces:

            def vectors(head: SO2EquivariantGraphAttention) -> Tensor:
                return head(x, atomic_numbers, edge_features, graph.edge_index).embedding[:natoms, 1:4, 0]

            outputs[keys.FORCES] = vectors(self.force_block)
            if self.predict_noise and (self.training or keys.CONDITION_FORCES in data):
                outputs[keys.NOISE] = vectors(self.denoising_pos_block)
        return outputs

    def _edge_features(self, distances: Tensor, atomic_numbers: Tensor, edge_index: Tensor) -> Tensor:
        features = self.distance_expansion(distances)
        if self.source_embedding is None or self.target_embedding is None:
            return features
        source, target = atomic_numbers[edge_index]
        return torch.cat([features, self.source_embedding(source), self.target_embedding(target)], dim=1)

    def _embed(self, data: Any, atomic_numbers: Tensor) -> SO3_Embedding:
        """Atoms on l = 0, then the conditioning."""
        pos = data[keys.POS]
        x = SO3_Embedding(
            len(atomic_numbers),
            self.lmax_list,
            self.sphere_channels,
            pos.device,
            self.sphere_embedding.weight.dtype,
        )
        x.embedding[:, 0] = self.sphere_embedding(atomic_numbers)
        x.set_embedding(
            add_conditioning(
                x.embedding,
                data,
                self.force_embedding,
                self.noise_schedule_sigma_embedding,
                self.use_force_encoding,
            )
        )
        return x

    def _energy(self, x: SO3_Embedding, data: Any) -> Tensor:
        of_atoms = self.energy_block(x).embedding[: len(data[keys.BATCH]), 0, 0]
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
