"""Equiformer that is told about corrupted structures and predicts their noise; forces from the energy.

The network of the paper's MD17 experiments. Argument and parameter names are those of the authors' model.

Source: arXiv 2403.09549, section 4.3; Liao and Smidt, Equiformer, arXiv 2206.11990.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from e3nn import o3
from torch import Tensor, nn

from fairchem_dens import keys
from fairchem_dens.models.arguments import argument_names, require, require_range
from fairchem_dens.models.conditioning import force_features
from fairchem_dens.models.equiformer.activation import ScalarActivation
from fairchem_dens.models.equiformer.attention import GraphAttention
from fairchem_dens.models.equiformer.blocks import AtomEmbedding, EdgeDegreeEmbedding, TransBlock
from fairchem_dens.models.equiformer.dropout import dropout_channels
from fairchem_dens.models.equiformer.features import SCALAR, Features, parse_harmonics, parse_irreps
from fairchem_dens.models.equiformer.graph import (
    COMPLETE_UP_TO,
    Edges,
    Neighbors,
    edge_vectors,
    find_neighbors,
)
from fairchem_dens.models.equiformer.harmonics import SphericalHarmonics
from fairchem_dens.models.equiformer.linear import Linear
from fairchem_dens.models.equiformer.norm import EquivariantLayerNorm
from fairchem_dens.models.equiformer.radial import ExpNormalBasis, RadialProfile, hidden_features
from fairchem_dens.models.equiformer.state import WithoutGeneratedBuffers
from fairchem_dens.models.inputs import prepared
from fairchem_dens.models.weight_decay import no_weight_decay
from fairchem_dens.validation import refuse_unknown_keys, require_number

AVG_NUM_NODES = 18.03065905448718
AVG_DEGREE = 15.57930850982666
"""Means over QM9 with a cutoff of 5 Å: the constants of the paper's code, also on MD17."""


class EquiformerDeNS(WithoutGeneratedBuffers):
    """Equiformer with force conditioning and a noise head; forces are minus the gradient of the energy.

    Irreps are given as in e3nn, by degree, each once, scalars first. Defaults are those of the paper's runs
    with L = 2.

    Args:
        irreps_in: scalars, as many as there are known elements: atomic numbers below this.
        irreps_equivariant_inputs: what the conditioning forces are encoded in, each degree from 0 once. None
            builds the model without DeNS: no force embedding, no noise head.
        irreps_node_embedding: features of the nodes.
        num_layers: blocks.
        irreps_node_attr: only ``1x0e``; there for the paper's configurations.
        irreps_sh: spherical harmonics of the edges, each degree from 0 once.
        max_radius: cutoff, Å. All atoms within it are neighbours.
        number_of_basis: radial functions.
        basis_type: only ``exp``, the exponential-normal functions.
        fc_neurons: hidden layers of the radial networks.
        irreps_feature: features after the last block.
        irreps_head: of one attention head.
        num_heads: attention heads.
        irreps_pre_attn: of the messages; None for those that the attention reads.
        rescale_degree: only False.
        nonlinear_message: only True.
        irreps_mlp_mid: hidden features of the feed-forward networks.
        norm_layer: only ``layer``.
        alpha_drop, proj_drop, out_drop, drop_path_rate: dropout of attention weights, of the outputs of
            branches, of the final features, and of branches for whole structures.
        mean, std, atomref: only None. Normalisers and element references are set in the data set's
            ``transforms``.
        scale: the energy is multiplied by it.
        use_force_encoding: False hides the forces (ablation).
        use_pbc: only False: molecules.
        otf_graph: only True: the graph is made of the positions in each forward pass.
        regress_forces: False predicts the energy alone, and builds no noise head.
        max_neighbors: accepted, without effect.
        predict_noise: False keeps the noise head but neither evaluates nor trains it: for runs without a loss
            on the noise.

    Raises:
        ValueError: an argument that does not exist (with the nearest one) or whose value is not supported.
    """

    def __init__(
        self,
        irreps_in: str = "64x0e",
        irreps_equivariant_inputs: str | None = "1x0e+1x1e+1x2e",
        irreps_node_embedding: str = "128x0e+64x1e+32x2e",
        num_layers: int = 6,
        irreps_node_attr: str = "1x0e",
        irreps_sh: str = "1x0e+1x1e+1x2e",
        max_radius: float = 5.0,
        number_of_basis: int = 32,
        basis_type: str = "exp",
        fc_neurons: Sequence[int] = (64, 64),
        irreps_feature: str = "512x0e+256x1e+128x2e",
        irreps_head: str = "32x0e+16x1e+8x2e",
        num_heads: int = 4,
        irreps_pre_attn: str | None = "128x0e+64x1e+32x2e",
        rescale_degree: bool = False,
        nonlinear_message: bool = True,
        irreps_mlp_mid: str = "384x0e+192x1e+96x2e",
        norm_layer: str = "layer",
        alpha_drop: float = 0.0,
        proj_drop: float = 0.0,
        out_drop: float = 0.0,
        drop_path_rate: float = 0.0,
        mean: None = None,
        std: None = None,
        scale: float | None = None,
        atomref: None = None,
        use_force_encoding: bool = True,
        use_pbc: bool = False,
        otf_graph: bool = True,
        regress_forces: bool = True,
        max_neighbors: int = 500,
        predict_noise: bool = True,
        **unknown: Any,
    ) -> None:
        super().__init__()
        refuse_unknown_keys(unknown, argument_names(type(self)), "model")
        require("irreps_node_attr", irreps_node_attr, ["1x0e"])
        require("basis_type", basis_type, ["exp"])
        require("rescale_degree", rescale_degree, [False])
        require("nonlinear_message", nonlinear_message, [True])
        require("norm_layer", norm_layer, ["layer"])
        require("use_pbc", use_pbc, [False])
        require("otf_graph", otf_graph, [True])
        for name, value in (("mean", mean), ("std", std), ("atomref", atomref)):
            if value is not None:
                raise ValueError(
                    f"'model.{name}' must be left out, found {value!r}: normalise energies and forces with "
                    "'dataset.train.transforms' (normalizer, element_references)."
                )
        for name, number in (("num_layers", num_layers), ("num_heads", num_heads)):
            require_range(name, number, number >= 1, "at least 1")
        require_range("number_of_basis", number_of_basis, number_of_basis >= 2, "at least 2")
        max_radius = require_number(max_radius, "model.max_radius")
        require_range("max_radius", max_radius, max_radius > 0, "above 0")
        rates = {"alpha_drop": alpha_drop, "proj_drop": proj_drop, "out_drop": out_drop}
        for name, rate in {**rates, "drop_path_rate": drop_path_rate}.items():
            require_range(name, rate, 0 <= require_number(rate, f"model.{name}") < 1, "from 0 to below 1")
        elements = parse_irreps("irreps_in", irreps_in)
        if elements.lmax > 0 or len(elements) > 1:
            raise ValueError(f"'model.irreps_in' must be scalars such as 64x0e, found {irreps_in!r}.")
        nodes = parse_irreps("irreps_node_embedding", irreps_node_embedding)
        edge = parse_harmonics("irreps_sh", irreps_sh)
        features = parse_irreps("irreps_feature", irreps_feature)
        fc_neurons = [number_of_basis, *fc_neurons]
        attention: dict[str, Any] = {
            "irreps_pre_attn": irreps_pre_attn and parse_irreps("irreps_pre_attn", irreps_pre_attn),
            "irreps_head": parse_irreps("irreps_head", irreps_head),
            "num_heads": num_heads,
            "fc_neurons": fc_neurons,
            "alpha_drop": alpha_drop,
            "proj_drop": proj_drop,
        }
        self.max_num_elements = elements.dim
        self.max_radius = max_radius
        self.otf_graph, self.use_pbc, self.max_neighbors = otf_graph, use_pbc, max_neighbors
        self.regress_forces = regress_forces
        self.use_force_encoding = use_force_encoding
        self.out_drop, self.scale = out_drop, 1.0 if scale is None else float(scale)
        has_dens = irreps_equivariant_inputs is not None
        self.predict_noise = predict_noise and regress_forces and has_dens

        # The order in which modules are made is that of the paper's code.
        self.spherical_harmonics = SphericalHarmonics(edge.lmax)
        self.atom_embed = AtomEmbedding(self.max_num_elements, nodes)
        self.rbf = ExpNormalBasis(max_radius, number_of_basis)
        self.edge_deg_embed = EdgeDegreeEmbedding(nodes, edge, fc_neurons, AVG_DEGREE)
        self.force_embed: Linear | None = None
        if has_dens:
            forces = parse_harmonics("irreps_equivariant_inputs", irreps_equivariant_inputs)
            self.force_embed = Linear(forces, nodes)
            self.force_sizes = [ir.dim for _, ir in forces]
            self.force_harmonics = SphericalHarmonics(forces.lmax)
        self.blocks = nn.ModuleList(
            TransBlock(
                nodes,
                edge,
                features if layer == num_layers - 1 else nodes,
                irreps_mlp_mid=parse_irreps("irreps_mlp_mid", irreps_mlp_mid),
                drop_path_rate=drop_path_rate,
                **attention,
            )
            for layer in range(num_layers)
        )
        self.norm = EquivariantLayerNorm(features)
        self.energy_head = nn.Sequential(
            Linear(features, features[:1]), ScalarActivation(), Linear(features[:1], o3.Irreps([(1, SCALAR)]))
        )
        if has_dens and regress_forces:
            vector = o3.Irreps([(1, forces[1].ir)])
            if forces[1].ir not in attention["irreps_head"]:
                raise ValueError(
                    f"'model.irreps_head' must hold {forces[1].ir}, which the noise is made of, found "
                    f"{irreps_head!r}."
                )
            self.denoising_pos_head = GraphAttention(features, edge, vector, **attention)
            self.denoising_pos_head.requires_grad_(predict_noise)

    @property
    def num_params(self) -> int:
        """Number of parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that are not decayed."""
        return no_weight_decay(self)

    def has_static_shapes(self, batch: Any) -> bool:
        """Whether shapes follow from the numbers of atoms alone, so that a step can be recorded.

        Args:
            batch: on the host, else this waits for the device.
        """
        return int(batch[keys.NATOMS].max()) <= COMPLETE_UP_TO + 1

    def forward(self, data: Any) -> dict[str, Tensor]:
        """Predict, in normalised units.

        Gradients are switched on for the positions whatever the caller's mode. The forces can be
        differentiated again in training only.

        Args:
            data: batch with the fields of `fairchem_dens.keys`; ``cell`` and ``pbc`` are not looked at. It is
                not changed.

        Returns:
            ``energy`` (B,); with ``regress_forces`` also ``forces`` (N, 3); and ``noise`` (N, 3) in units of
            σ, if the batch carries ``condition_forces`` or the model is in training mode.

        Raises:
            ValueError: an atomic number is out of range, or graph parallelism is on.
        """
        data = prepared(data, self.max_num_elements)
        keeps_graph = torch.is_grad_enabled()
        largest = data[keys.LARGEST] if keys.LARGEST in data else None  # noqa: SIM401  # of Batch, no dict
        neighbors = find_neighbors(
            data[keys.POS], data[keys.NATOMS], data[keys.BATCH], self.max_radius, largest
        )
        learns = keeps_graph and self.training and self.regress_forces
        with torch.set_grad_enabled(keeps_graph or self.regress_forces):
            pos = data[keys.POS].detach().requires_grad_(self.regress_forces)
            x, edges = self._features(pos, neighbors, data, learns)
            energy = self._energy(x, data)
            outputs = {keys.ENERGY: energy}
            if self.regress_forces:
                (gradient,) = torch.autograd.grad(
                    energy.sum(), pos, create_graph=learns, retain_graph=keeps_graph
                )
                outputs[keys.FORCES] = -gradient
        if self._predicts_noise(data):
            # Nobody asks how the noise changes with the positions.
            outputs[keys.NOISE] = self.denoising_pos_head(x, edges.constant())[0][..., 0]
        return outputs if keeps_graph else {name: value.detach() for name, value in outputs.items()}

    def _predicts_noise(self, data: Any) -> bool:
        return self.predict_noise and (self.training or keys.CONDITION_FORCES in data)

    def _radial_profiles(self, data: Any) -> list[RadialProfile]:
        """All networks of the distance that this batch needs."""
        profiles = [self.edge_deg_embed.rad, *(block.ga.sep_act.dtp_rad for block in self.blocks)]
        if self._predicts_noise(data):
            profiles.append(self.denoising_pos_head.sep_act.dtp_rad)
        return profiles

    def _features(self, pos: Tensor, neighbors: Neighbors, data: Any, learns: bool) -> tuple[Features, Edges]:
        """Return the final features of the nodes, and the edges; ``learns`` as in `Edges`."""
        dtype = self.edge_deg_embed.exp.tp["weight"].dtype
        # Mixed precision would round distances to a hundredth of an Å.
        with torch.autocast(pos.device.type, enabled=False):
            vectors, mask = edge_vectors(pos, neighbors, self.max_radius)
            harmonics = self.spherical_harmonics(vectors).to(dtype)
            basis = self.rbf(torch.linalg.vector_norm(vectors, dim=-1)).to(dtype)
        profiles = self._radial_profiles(data)
        hidden = dict(zip(profiles, hidden_features(profiles, basis), strict=True))
        edges = Edges(neighbors.index, neighbors.reverse, mask, harmonics, basis, learns, hidden)
        scalars, *others = self.edge_deg_embed(edges)
        x = [self.atom_embed(data[keys.ATOMIC_NUMBERS]) + scalars, *others]
        if self.force_embed is not None:
            x = [one + other for one, other in zip(x, self._encoded_forces(data, dtype), strict=True)]
        batch, size = data[keys.BATCH], len(data[keys.NATOMS])
        for block in self.blocks:
            x = block(x, edges, batch, size)
        return dropout_channels(self.norm(x), self.out_drop, self.training), edges

    def _encoded_forces(self, data: Any, dtype: torch.dtype) -> Features:
        """Forces as spherical tensors, mapped to features of the nodes; biases alone where there are none."""
        assert self.force_embed is not None
        num_atoms, lmax = len(data[keys.POS]), len(self.force_sizes) - 1
        if self.use_force_encoding and keys.CONDITION_FORCES in data:
            forces = data[keys.CONDITION_FORCES].to(dtype)
            encoded = force_features(forces, lmax, self.force_harmonics)
        else:
            encoded = data[keys.POS].new_zeros(num_atoms, (lmax + 1) ** 2, dtype=dtype)
        return self.force_embed([one[:, :, None] for one in encoded.split(self.force_sizes, dim=1)])

    def _energy(self, x: Features, data: Any) -> Tensor:
        of_atoms = self.energy_head(x)[0].flatten()
        energy = of_atoms.new_zeros(len(data[keys.NATOMS])).index_add(0, data[keys.BATCH], of_atoms)
        return energy * (self.scale / math.sqrt(AVG_NUM_NODES))
