"""Equiformer computed as the paper's code does: a list of edges, e3nn's tensor products, sums by scattering.

It shares the parameters of an `EquiformerDeNS` and gives the same predictions, slowly. Tests and benchmarks
compare with it; nothing else uses it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from e3nn import nn as e3nn_nn
from e3nn import o3
from torch import Tensor, nn
from torch_geometric.nn import radius_graph
from torch_geometric.utils import softmax

from fairchem_dens import keys
from fairchem_dens.models.equiformer.activation import smooth_leaky_relu
from fairchem_dens.models.equiformer.attention import GraphAttention
from fairchem_dens.models.equiformer.blocks import FeedForward, TransBlock
from fairchem_dens.models.equiformer.features import SCALAR
from fairchem_dens.models.equiformer.linear import Linear
from fairchem_dens.models.equiformer.model import AVG_DEGREE, AVG_NUM_NODES, EquiformerDeNS
from fairchem_dens.models.equiformer.norm import EquivariantLayerNorm
from fairchem_dens.models.equiformer.radial import RadialProfile
from fairchem_dens.models.equiformer.tensor_product import DepthwiseTensorProduct
from fairchem_dens.models.inputs import prepared

_NO_ATTRIBUTE = o3.Irreps([(1, SCALAR)])


class PlainEquiformer(nn.Module):
    """The same network, without dropout, in e3nn's layout: rows (N, dim), channel by channel.

    Args:
        model: whose parameters are used.
    """

    def __init__(self, model: EquiformerDeNS) -> None:
        super().__init__()
        self.model = model
        # Products of e3nn by what they belong to; outside the tree of modules, whose names are the model's.
        self._products: dict[int, o3.TensorProduct] = {}
        self._columns: dict[int, Tensor] = {}
        first: Any = model.blocks[0]
        self._nodes = first.norm_1.irreps
        self._edge = model.edge_deg_embed.irreps_edge
        self._linear(model.atom_embed.atom_type_lin, o3.Irreps([(model.max_num_elements, SCALAR)]))
        self._linear(model.edge_deg_embed.exp, _NO_ATTRIBUTE)
        self._surroundings = DepthwiseTensorProduct(self._nodes, self._edge, self._nodes)
        self._depthwise(self._surroundings, self._nodes)
        self._linear(model.edge_deg_embed.proj, self._surroundings.irreps_out)
        if model.force_embed is not None:
            self._linear(model.force_embed, o3.Irreps([(1, ir) for _, ir in _force_irreps(model)]))
        for block in model.blocks:
            self._block(block)
        features = model.norm.irreps
        self._linear(model.energy_head[0], features)
        self._linear(model.energy_head[2], features[:1])
        if hasattr(model, "denoising_pos_head"):
            self._attention(model.denoising_pos_head, features)

    # ------------------------------------------------------------------ construction

    def _keep(self, owner: nn.Module, product: o3.TensorProduct) -> None:
        parameter = next(self.model.parameters())
        self._products[id(owner)] = product.to(device=parameter.device, dtype=parameter.dtype)

    def _linear(self, linear: Any, irreps_in: o3.Irreps) -> None:
        instructions = [(source, 0, place, "uvw", True) for source, place, _, _ in linear.paths]
        product = o3.TensorProduct(
            irreps_in,
            _NO_ATTRIBUTE,
            linear.irreps_out,
            instructions,
            path_normalization="none",
            internal_weights=False,
            shared_weights=True,
        )
        self._keep(linear, product)

    def _depthwise(self, product: DepthwiseTensorProduct, irreps_in: o3.Irreps) -> None:
        blocks = [(irreps_in[path.source].mul, path.ir) for path in product.paths]
        places = [place for ending in product.ending_in for place in ending]
        instructions = [
            (path.source, path.edge, places.index(number), "uvu", True)
            for number, path in enumerate(product.paths)
        ]
        theirs = o3.TensorProduct(
            irreps_in,
            self._edge,
            o3.Irreps([blocks[place] for place in places]),
            instructions,
            path_normalization="none",
            internal_weights=False,
            shared_weights=False,
        )
        self._keep(product, theirs)

    def _gate(self, gate: Any, irreps: o3.Irreps) -> None:
        rest = irreps[1:]
        gates = o3.Irreps([(rest.num_irreps, SCALAR)]) if len(rest) else o3.Irreps("")
        theirs = e3nn_nn.Gate(irreps[:1], [F.silu], gates, [torch.sigmoid] * len(gates), rest)
        self._keep(gate, theirs)
        # e3nn's gate sorts what it reads by its own order, in which 0o comes before 0e, and 1o before 1e.
        places = dict(zip((ir for _, ir in gate.irreps_in), gate.irreps_in.slices(), strict=True))
        columns = torch.arange(gate.irreps_in.dim, device=next(self.model.parameters()).device)
        order = torch.cat([columns[places[ir]] for _, ir in theirs.irreps_in])
        if not torch.equal(order, columns):
            self._columns[id(gate)] = order

    def _block(self, block: Any) -> None:
        irreps_in = block.norm_1.irreps
        self._attention(block.ga, irreps_in)
        gate = block.ffn.gate
        mid = _gated_irreps(gate.irreps_in, gate.sizes)
        self._gate(gate, mid)
        self._linear(block.ffn.fctp_1, irreps_in)
        self._linear(block.ffn.fctp_2, mid)
        if block.ffn_shortcut is not None:
            self._linear(block.ffn_shortcut, irreps_in)

    def _attention(self, attention: Any, irreps_in: o3.Irreps) -> None:
        messages = attention.merge_src.irreps_out
        heads = attention.sep_value.lin.irreps_out
        self._linear(attention.merge_src, irreps_in)
        self._linear(attention.merge_dst, irreps_in)
        for convolution in (attention.sep_act, attention.sep_value):
            self._depthwise(convolution.dtp, messages)
            self._linear(convolution.lin, convolution.dtp.irreps_out)
        self._linear(attention.sep_alpha, attention.sep_act.dtp.irreps_out)
        self._gate(attention.sep_act.gate, messages)
        self._linear(attention.proj, heads)

    # ------------------------------------------------------------------ prediction

    def forward(self, data: Any) -> dict[str, Tensor]:
        """Predict what the model predicts; see `EquiformerDeNS.forward`."""
        model = self.model
        data = prepared(data, model.max_num_elements)
        keeps_graph = torch.is_grad_enabled()
        batch = data[keys.BATCH]
        edge_index = radius_graph(
            data[keys.POS].detach(), model.max_radius, batch, max_num_neighbors=len(batch)
        )
        with torch.enable_grad():
            pos = data[keys.POS].detach().requires_grad_()
            x, edges = self._features(pos, edge_index, data)
            of_atoms = self._mapped(model.energy_head[0], x)
            of_atoms = self._mapped(model.energy_head[2], _silu(of_atoms))[:, 0]
            energy = of_atoms.new_zeros(len(data[keys.NATOMS])).index_add(0, batch, of_atoms)
            energy = energy * (model.scale / math.sqrt(AVG_NUM_NODES))
            (gradient,) = torch.autograd.grad(
                energy.sum(), pos, create_graph=keeps_graph and model.training, retain_graph=keeps_graph
            )
            outputs = {keys.ENERGY: energy, keys.FORCES: -gradient}
            if model.predict_noise and (model.training or keys.CONDITION_FORCES in data):
                outputs[keys.NOISE] = self._attended(model.denoising_pos_head, x, edges)
        return outputs if keeps_graph else {name: value.detach() for name, value in outputs.items()}

    def _features(self, pos: Tensor, edge_index: Tensor, data: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        model = self.model
        source, target = edge_index
        vectors = pos[source] - pos[target]
        harmonics = o3.spherical_harmonics(self._edge, vectors, normalize=True, normalization="component")
        basis = model.rbf(vectors.norm(dim=-1))
        edges = (source, target, harmonics, basis)

        numbers = F.one_hot(data[keys.ATOMIC_NUMBERS], model.max_num_elements).to(harmonics.dtype)
        embedded = self._mapped(model.atom_embed.atom_type_lin, numbers)
        x = F.pad(embedded, (0, self._nodes.dim - embedded.shape[1]))
        x = x + self._surrounded(model.edge_deg_embed, edges, len(pos))
        if model.force_embed is not None:
            irreps = _force_irreps(model)
            forces = data.get(keys.CONDITION_FORCES) if model.use_force_encoding else None
            encoded = x.new_zeros(len(pos), irreps.dim)
            if forces is not None:
                norm = forces.norm(dim=-1, keepdim=True)
                encoded = norm / math.sqrt(3) * o3.spherical_harmonics(irreps, forces, True, "component")
            x = x + self._mapped(model.force_embed, encoded)
        for block in model.blocks:
            x = self._transformed(block, x, edges)
        return self._normed(model.norm, x), edges

    def _mapped(self, linear: Any, x: Tensor) -> Tensor:
        out = self._products[id(linear)](x, torch.ones_like(x[:, :1]), linear.tp["weight"])
        if not len(linear.bias):
            return out
        bias = linear.bias[0]
        return torch.cat([out[:, : len(bias)] + bias, out[:, len(bias) :]], dim=1)

    def _gated(self, gate: Any, x: Tensor) -> Tensor:
        columns = self._columns.get(id(gate))
        return self._products[id(gate)](x if columns is None else x[:, columns])

    def _weights(self, profile: RadialProfile, basis: Tensor) -> Tensor:
        return profile.net(basis) + profile.offset

    def _surrounded(self, embedding: Any, edges: tuple[Tensor, ...], natoms: int) -> Tensor:
        _, target, harmonics, basis = edges
        scalars = self._mapped(embedding.exp, torch.ones_like(basis[:, :1]))
        x = F.pad(scalars, (0, self._nodes.dim - scalars.shape[1]))
        product = self._products[id(self._surroundings)]
        messages = self._mapped(embedding.proj, product(x, harmonics, self._weights(embedding.rad, basis)))
        summed = messages.new_zeros(natoms, messages.shape[1]).index_add(0, target, messages)
        return summed / math.sqrt(AVG_DEGREE)

    def _normed(self, norm: EquivariantLayerNorm, x: Tensor) -> Tensor:
        irreps, out, place = norm.irreps, [], 0
        parts = x.split([mul * ir.dim for mul, ir in irreps], dim=1)
        for (mul, ir), part in zip(irreps, parts, strict=True):
            one = part.view(-1, mul, ir.dim)
            if ir == SCALAR:
                one = one - one.mean(dim=1, keepdim=True)
            size = one.pow(2).mean(dim=-1).mean(dim=1, keepdim=True)
            one = one * ((size + norm.eps).pow(-0.5) * norm.affine_weight[place : place + mul])[..., None]
            if ir == SCALAR:
                one = one + norm.affine_bias[:, None]
            out.append(one.reshape(-1, mul * ir.dim))
            place += mul
        return torch.cat(out, dim=1)

    def _transformed(self, block: TransBlock | Any, x: Tensor, edges: tuple[Tensor, ...]) -> Tensor:
        x = x + self._attended(block.ga, self._normed(block.norm_1, x), edges)
        branch = self._fed_forward(block.ffn, self._normed(block.norm_2, x))
        return (x if block.ffn_shortcut is None else self._mapped(block.ffn_shortcut, x)) + branch

    def _fed_forward(self, ffn: FeedForward, x: Tensor) -> Tensor:
        return self._mapped(ffn.fctp_2, self._gated(ffn.gate, self._mapped(ffn.fctp_1, x)))

    def _attended(self, attention: GraphAttention, x: Tensor, edges: tuple[Tensor, ...]) -> Tensor:
        source, target, harmonics, basis = edges
        message = self._mapped(attention.merge_src, x)[source] + self._mapped(attention.merge_dst, x)[target]
        act, value, heads = attention.sep_act, attention.sep_value, attention.num_heads
        message = self._products[id(act.dtp)](message, harmonics, self._weights(act.dtp_rad, basis))
        scalars = self._mapped(attention.sep_alpha, message).view(-1, heads, attention.alpha_dot.shape[-1])
        message = self._gated(act.gate, self._mapped(act.lin, message))
        weights = value.dtp.tp["weight"].expand(len(message), -1)
        message = self._mapped(value.lin, self._products[id(value.dtp)](message, harmonics, weights))
        logits = (smooth_leaky_relu(scalars) * attention.alpha_dot).sum(dim=-1)
        alpha = softmax(logits, target, num_nodes=len(x))
        irreps = value.lin.irreps_out
        weighted = [
            (part.view(len(part), heads, -1) * alpha[..., None]).flatten(1)
            for part in message.split([mul * ir.dim for mul, ir in irreps], dim=1)
        ]
        message = torch.cat(weighted, dim=1)
        return self._mapped(
            attention.proj, message.new_zeros(len(x), message.shape[1]).index_add(0, target, message)
        )


def _silu(x: Tensor) -> Tensor:
    return e3nn_nn.Activation(o3.Irreps([(x.shape[1], SCALAR)]), [F.silu]).to(x.device)(x)


def _force_irreps(model: EquiformerDeNS) -> o3.Irreps:
    linear: Linear | None = model.force_embed
    assert linear is not None
    return o3.Irreps([(1, linear.irreps_out[place].ir) for _, place, _, _ in linear.paths])


def _gated_irreps(irreps_in: o3.Irreps, sizes: list[int]) -> o3.Irreps:
    return o3.Irreps([(mul, ir) for mul, (_, ir) in zip(sizes, irreps_in, strict=True)])
