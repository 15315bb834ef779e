"""Records read by our own unpickler are what pickle and torch make of them."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch_geometric.data import Data

from fairchem_dens.data import unpickle

DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
)


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def check_same(ours: Any, theirs: Any) -> None:
    assert type(ours) is type(theirs)
    if isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert ours.stride() == theirs.stride() and ours.requires_grad == theirs.requires_grad
        assert torch.equal(bits(ours), bits(theirs))
    elif isinstance(ours, np.ndarray):
        assert np.array_equal(ours, theirs)
    else:
        assert ours == theirs


def check_record(data: Data, protocol: int = -1) -> dict[str, Any]:
    record = pickle.dumps(data, protocol=protocol)
    ours = unpickle.fields(record)
    theirs = pickle.loads(record).to_dict()
    assert list(ours) == list(theirs)
    for name in ours:
        check_same(ours[name], theirs[name])
    return ours


@given(
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 5), min_size=0, max_size=4),
    st.integers(0, 10**6),
    st.sampled_from([2, 3, 4, 5]),
)
def test_tensors_of_any_type_and_shape(
    dtype: torch.dtype, shape: list[int], seed: int, protocol: int
) -> None:
    numbers = np.random.default_rng(seed).integers(0, 2 if dtype == torch.bool else 100, size=shape)
    check_record(Data(some=torch.as_tensor(numbers).to(dtype), natoms=3), protocol)


@pytest.mark.parametrize("rows", [255, 256, 65535, 65536])
def test_lengths_around_those_that_pickle_writes_in_another_way(rows: int) -> None:
    check_record(Data(some=torch.arange(rows)))


def test_views() -> None:
    base = torch.arange(24.0).reshape(6, 4)
    data = Data(
        rows=base[1:3], columns=base[:, 2], transposed=base.t(), every_other=base[::2], scalar=base[2, 2],
        expanded=base[0].expand(3, 4), one_row=base[3:4],
    )  # fmt: skip
    ours = check_record(data)
    ours["rows"].fill_(-1)  # memory of its own, and of nobody else
    assert not (ours["transposed"] == -1).any()


def test_the_form_of_common_records_is_read_by_ourselves(structure: Any) -> None:
    """Else the tests above would compare pickle with itself."""
    record = pickle.dumps(structure(0), protocol=-1)
    assert set(unpickle._quickly(record)) == set(structure(0).keys())


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(3, requires_grad=True),
        torch.nn.Parameter(torch.ones(2)),
        {"nested": torch.ones(2)},
        [torch.ones(2), 3],
        Data(pos=torch.ones(1, 3)),
        np.float32(2.5),
        np.arange(4),
        True,
        "text",
        (1, 2),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_values_are_left_to_pickle(value: Any) -> None:
    record = pickle.dumps(Data(pos=torch.ones(2, 3), other=value), protocol=-1)
    ours, theirs = unpickle.fields(record)["other"], pickle.loads(record)["other"]
    assert type(ours) is type(theirs) and repr(ours) == repr(theirs)


def test_sparse_tensors() -> None:
    sparse = torch.eye(3).to_sparse()
    ours = unpickle.fields(pickle.dumps(Data(some=sparse)))["some"]
    assert ours.is_sparse and torch.equal(ours.to_dense(), torch.eye(3))


def test_none_counts_as_absent() -> None:
    data = Data(pos=torch.ones(1, 3))
    data._store._mapping["tags"] = None
    assert set(unpickle.fields(pickle.dumps(data))) == {"pos"}


@pytest.mark.parametrize("other", [3, {"pos": 1}, torch.ones(3), None])
def test_other_objects_are_refused(other: Any) -> None:
    with pytest.raises(ValueError, match=f"it is a .*{type(other).__qualname__}"):
        unpickle.fields(pickle.dumps(other))


@given(st.data())
def test_damage_is_an_error_or_harmless(data: st.DataObject) -> None:
    """Bytes cut off: never something else than pickle makes of it."""
    record = pickle.dumps(Data(pos=torch.arange(12.0).reshape(4, 3), natoms=4), protocol=-1)
    cut = data.draw(st.integers(0, len(record) - 1))
    with pytest.raises(Exception):  # noqa: B017, PT011  # pickle raises many kinds
        unpickle.fields(record[:cut])


def test_a_wrong_count_of_elements_is_not_believed() -> None:
    good = pickle.dumps(Data(pos=torch.arange(12.0)), protocol=-1)
    eight = (12).to_bytes(8, "little")
    assert good.count(eight) == 1
    with pytest.raises(Exception):  # noqa: B017, PT011  # whatever torch raises
        unpickle.fields(good.replace(eight, (13).to_bytes(8, "little")))
