"""Bringing batches into the form that models read."""

from __future__ import annotations

import pytest
import torch
from torch_geometric.data import Batch

from fairchem_dens.models.inputs import check_atomic_numbers, prepared


def test_elements_of_a_single_structure_are_checked(structure):
    data = structure(0)
    with pytest.raises(ValueError, match="Atomic number 46"):
        check_atomic_numbers(data, 40)


class TestPrepared:
    def test_brings_fields_into_one_form(self, structure):
        data = structure(0)
        data.pbc, data.atomic_numbers = torch.tensor([True, True, False]), data.atomic_numbers.float()
        batch = Batch.from_data_list([data, data])
        assert batch.pbc.shape == (6,)
        ready = prepared(batch, 90)
        assert ready.pbc.tolist() == [[True, True, False]] * 2
        assert ready.atomic_numbers.dtype == torch.int64
        assert ready.natoms.tolist() == [12, 12]
        assert batch.pbc.shape == (6,) and batch.atomic_numbers.dtype == torch.float32

    def test_single_structure_becomes_a_batch_of_one(self, structure):
        ready = prepared(structure(0), 90)
        assert ready.natoms.tolist() == [12] and ready.batch.tolist() == [0] * 12
