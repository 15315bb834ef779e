"""The corruption as a random function: how its noise is distributed, what it leaves alone and depends on."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch_geometric.data import Batch, Data

from fairchem_dens import keys
from fairchem_dens.corruption import Corruption, batch_is_corrupted, corrupt
from fairchem_dens.objective import supervised_atoms

LABELS_AND_INPUTS = (
    keys.CELL,
    keys.PBC,
    keys.ATOMIC_NUMBERS,
    keys.FIXED,
    keys.TAGS,
    keys.ENERGY,
    keys.FORCES,
)


def slab(natoms: int = 8, seed: int = 0, *, fixed: Sequence[int] = (), **fields: Any) -> Data:
    """A structure without any physics; ``fixed`` lists the atoms held fixed."""
    rng = np.random.default_rng([natoms, seed])
    held = torch.zeros(natoms, dtype=torch.long)
    held[list(fixed)] = 1
    data = Data(
        pos=torch.from_numpy(rng.normal(scale=3.0, size=(natoms, 3))).float(),
        atomic_numbers=torch.from_numpy(rng.integers(1, 90, size=natoms)),
        cell=torch.from_numpy(rng.normal(size=(1, 3, 3)) + 9 * np.eye(3)).float(),
        pbc=torch.tensor([[True, True, False]]),
        natoms=natoms,
        fixed=held,
        tags=1 - held,
        energy=float(rng.normal()),
        forces=torch.from_numpy(rng.normal(size=(natoms, 3))).float(),
        sid=f"s{seed}",
        fid=seed,
    )
    for name, value in fields.items():
        data[name] = value
    return data


def always(**settings: Any) -> Corruption:
    """Corrupts every structure, all its atoms unless told otherwise."""
    return Corruption(**{"prob": 1.0, "std": 0.1, **settings})


def bits(values: torch.Tensor) -> torch.Tensor:
    """What is stored: unlike ``==``, tells -0.0 from 0.0."""
    return values.contiguous().view(torch.int64 if values.dtype == torch.float64 else torch.int32)


def same(first: Any, second: Any) -> bool:
    """Equal type, shape and bits."""
    if not isinstance(first, torch.Tensor):
        return type(first) is type(second) and first == second
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return torch.equal(bits(first), bits(second)) if first.is_floating_point() else torch.equal(first, second)


def contents(data: Any) -> dict[str, Any]:
    return {key: copy.deepcopy(data[key]) for key in data.keys()}  # noqa: SIM118  # a Data iterates over pairs


def check_fields(before: Any, after: Any, corruption: Corruption) -> None:
    """Everything that `keys` promises about a corrupted structure or batch."""
    count, structures = len(before[keys.POS]), 1
    atoms = torch.zeros(count, dtype=torch.long)
    if keys.BATCH in before:
        atoms, structures = before[keys.BATCH], int(before.num_graphs)
    mask, noise, sigmas = after[keys.NOISE_MASK], after[keys.NOISE_VEC], after[keys.SIGMAS]

    assert mask.shape == (count,) and mask.dtype == torch.bool
    assert noise.shape == (count, 3) and noise.dtype == before[keys.POS].dtype
    assert after[keys.CONDITION_FORCES].shape == (count, 3)
    assert after[keys.CONDITION_FORCES].dtype == before[keys.FORCES].dtype
    assert sigmas.shape == (count, 1) and sigmas.dtype == before[keys.POS].dtype
    assert after[keys.CORRUPTED].shape == (structures,) and after[keys.CORRUPTED].dtype == torch.bool

    assert same(after[keys.POS][~mask], before[keys.POS][~mask])
    assert same(after[keys.POS][mask], (before[keys.POS] + noise)[mask])
    assert not bits(noise[~mask]).any() and noise[mask].ne(0).any(dim=1).all()
    assert same(after[keys.CONDITION_FORCES][mask], before[keys.FORCES][mask])
    assert not bits(after[keys.CONDITION_FORCES][~mask]).any()
    if not corruption.all_atoms:
        assert not mask[before[keys.FIXED] != 0].any()

    for index in range(structures):
        assert bool(after[keys.CORRUPTED][index]) == bool(mask[atoms == index].any())
        of_structure = sigmas[atoms == index].unique().tolist()
        if after[keys.CORRUPTED][index]:
            levels = torch.from_numpy(corruption.levels()).to(sigmas).tolist()
            assert len(of_structure) == 1 and of_structure[0] in levels
        else:
            assert of_structure == [0.0]
    for key in LABELS_AND_INPUTS:
        assert same(after[key], before[key]), key
    assert set(after.keys()) - {keys.MD} == set(before.keys()) - {keys.MD} | set(keys.DENS_FIELDS)


noise_levels = st.one_of(
    st.builds(lambda std: {"std": std}, st.floats(1e-3, 1.0)),
    st.builds(
        lambda low, factor, steps: {"std_low": low, "std_high": low * factor, "num_steps": steps},
        st.floats(1e-3, 0.5), st.floats(1.0, 50.0), st.integers(1, 9),
    ),
)  # fmt: skip
corruptions = st.builds(
    lambda level, **rest: Corruption(**level, **rest),
    noise_levels,
    prob=st.sampled_from([0.0, 0.3, 1.0]),
    corrupt_ratio=st.one_of(st.none(), st.floats(0.01, 1.0)),
    all_atoms=st.booleans(),
    strict_max_ratio=st.one_of(st.none(), st.floats(0.05, 1.0)),
    max_force_norm=st.one_of(st.none(), st.floats(0.5, 5.0)),
)


@st.composite
def structures(draw: st.DrawFn) -> Data:
    natoms = draw(st.integers(1, 9))
    fixed = draw(st.sets(st.integers(0, natoms - 1)))
    data = slab(natoms, draw(st.integers(0, 10**6)), fixed=sorted(fixed))
    data[keys.MD] = torch.tensor([draw(st.integers(0, 4)) == 0])
    return data


# ------------------------------------------------------------------ fields


@given(structures(), corruptions, st.sampled_from([None, True, False]), st.integers(0, 3), st.integers(0, 3))
def test_fields_of_a_structure(
    data: Data, corruption: Corruption, selected: bool | None, seed: int, epoch: int
) -> None:
    before = contents(data)
    after = corrupt(data, corruption, seed=seed, epoch=epoch, selected=selected)
    check_fields(data, after, corruption)
    if selected is False or bool(data[keys.MD]) or (selected is None and corruption.prob == 0.0):
        assert not after[keys.NOISE_MASK].any()
    # The argument is as it was, in every field.
    assert set(before) == set(data.keys())
    assert all(same(before[key], data[key]) for key in before)


@given(st.lists(structures(), min_size=1, max_size=5), corruptions, st.sampled_from([None, True, False]))
def test_fields_of_a_batch(datas: list[Data], corruption: Corruption, selected: bool | None) -> None:
    batch = Batch.from_data_list(datas)
    before = contents(batch)
    after = corrupt(batch, corruption, seed=5, epoch=1, selected=selected)
    check_fields(batch, after, corruption)
    assert set(before) == set(batch.keys())
    assert all(same(before[key], batch[key]) for key in before)


def test_the_properties_above_are_not_empty() -> None:
    """One example by hand in which every field has something in it."""
    data = slab(6, fixed=[0, 1])
    after = corrupt(data, always(), seed=0, epoch=0)
    assert after[keys.NOISE_MASK].tolist() == [False, False, True, True, True, True]
    assert after[keys.CORRUPTED].tolist() == [True]
    assert after[keys.SIGMAS].tolist() == pytest.approx(np.full((6, 1), 0.1))
    check_fields(data, after, always())


def test_result_shares_no_memory_that_training_writes_to() -> None:
    """Models wrap positions in place; the data set may hold the original in memory."""
    data = slab()
    before = contents(data)
    for selected in (True, False):
        after = corrupt(data, always(), seed=0, epoch=0, selected=selected)
        for key in (keys.POS, *keys.DENS_FIELDS):
            after[key].fill_(7)
        assert all(same(before[key], data[key]) for key in before)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=12, max_size=12))
def test_untouched_atoms_keep_their_bits(values: list[float]) -> None:
    pos = torch.tensor([*values, -0.0, 0.0, -0.0, -0.0, 1e-42, -1e-42], dtype=torch.float32).reshape(6, 3)
    data = slab(6, fixed=[0, 4, 5], pos=pos)
    for corruption in (always(), always(corrupt_ratio=0.5), always(prob=0.0)):
        after = corrupt(data, corruption, seed=3, epoch=0)
        untouched = ~after[keys.NOISE_MASK]
        assert untouched[[0, 4, 5]].all()
        assert torch.equal(bits(after[keys.POS])[untouched], bits(pos)[untouched])


@given(structures(), corruptions, st.booleans(), st.booleans())
def test_supervised_atoms_are_disjoint_and_cover(
    data: Data, corruption: Corruption, free_atoms_only: bool, all_atoms: bool
) -> None:
    mask = corrupt(data, corruption, seed=0, epoch=0, selected=True)[keys.NOISE_MASK]
    fixed = data[keys.FIXED]
    atoms = supervised_atoms(mask, fixed, free_atoms_only=free_atoms_only, all_atoms=all_atoms)
    assert not (atoms.forces & atoms.noise).any()
    expected = torch.ones_like(mask)
    if free_atoms_only:
        expected = fixed == 0
        if all_atoms:
            expected = expected | mask
    assert torch.equal(atoms.forces | atoms.noise, expected)
    assert torch.equal(atoms.noise, mask & expected)
    assert torch.equal(atoms.forces, ~mask & expected)


# ------------------------------------------------------------------ distribution


def sample(corruption: Corruption, *, structures: int, natoms: int = 40, **options: Any) -> list[Data]:
    return [
        corrupt(slab(natoms, seed), corruption, **{"seed": 0, "epoch": 0, **options})
        for seed in range(structures)
    ]


@pytest.mark.parametrize("std", [0.025, 0.1, 0.15])
def test_noise_is_normal_with_the_given_std(std: float) -> None:
    noise = torch.stack([data[keys.NOISE_VEC] for data in sample(always(std=std), structures=200)]).double()
    unit = (noise / std).reshape(-1, 3).numpy()
    count = len(unit)
    assert count == 8000
    assert np.abs(unit.mean(axis=0)).max() < 4 / math.sqrt(count)
    assert np.abs(unit.std(axis=0) - 1).max() < 4 / math.sqrt(2 * count)
    assert stats.kstest(unit.reshape(-1), "norm").pvalue > 1e-3
    # x, y and z, neighbouring atoms and neighbouring structures are independent.
    for first, second in (
        (unit[:, 0], unit[:, 1]),
        (unit[:, 1], unit[:, 2]),
        (unit[:-1, 0], unit[1:, 0]),
        (unit[:-40, 0], unit[40:, 0]),
    ):
        assert abs(np.corrcoef(first, second)[0, 1]) < 4 / math.sqrt(count)


def test_levels_are_spaced_evenly_in_the_logarithm() -> None:
    corruption = Corruption(prob=1.0, std_low=0.01, std_high=1.0, num_steps=5)
    assert corruption.levels() == pytest.approx([0.01, 10**-1.5, 0.1, 10**-0.5, 1.0])
    assert corruption.noise_scale == 1.0
    assert Corruption(prob=1.0, std=0.3).levels() == pytest.approx([0.3])
    assert Corruption(prob=1.0, std=0.3).noise_scale == 0.3
    assert Corruption(prob=1.0, std_low=0.2, std_high=0.7, num_steps=1).levels() == pytest.approx([0.2])


def test_multi_scale_noise_has_one_level_for_each_structure() -> None:
    corruption = Corruption(prob=1.0, std_low=0.01, std_high=1.0, num_steps=5)
    datas = sample(corruption, structures=1000, natoms=12)
    sigmas = np.array([data[keys.SIGMAS].double().unique().item() for data in datas])
    levels = corruption.levels()
    drawn = np.abs(np.log(sigmas[:, None]) - np.log(levels)).argmin(axis=1)
    assert sigmas == pytest.approx(levels[drawn], rel=1e-6)
    assert stats.chisquare(np.bincount(drawn, minlength=5)).pvalue > 1e-3  # each level equally often
    for level in range(5):
        noise = torch.stack(
            [data[keys.NOISE_VEC] for data, at in zip(datas, drawn, strict=True) if at == level]
        )
        unit = (noise.double() / levels[level]).reshape(-1).numpy()
        assert abs(unit.mean()) < 4 / math.sqrt(len(unit))
        assert abs(unit.std() - 1) < 4 / math.sqrt(2 * len(unit))


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.9])
def test_each_atom_is_chosen_by_its_own_coin(ratio: float) -> None:
    chosen = torch.stack(
        [data[keys.NOISE_MASK] for data in sample(always(corrupt_ratio=ratio), structures=500)]
    )
    share = chosen.double().mean().item()
    spread = math.sqrt(ratio * (1 - ratio))
    assert abs(share - ratio) < 4 * spread / math.sqrt(chosen.numel())
    # Independent coins: the number in a structure is binomial, not a fixed share of its atoms.
    numbers = chosen.sum(dim=1).double()
    assert numbers.std().item() == pytest.approx(spread * math.sqrt(40), rel=0.15)
    # No place in a structure is preferred.
    assert (chosen.double().mean(dim=0) - ratio).abs().max() < 4.5 * spread / math.sqrt(len(chosen))


def test_the_ratio_is_of_free_atoms() -> None:
    """A third of the atoms are fixed; of the others half are chosen."""
    datas = [
        corrupt(slab(12, seed, fixed=range(4)), always(corrupt_ratio=0.5), seed=0, epoch=0)
        for seed in range(500)
    ]
    masks = torch.stack([data[keys.NOISE_MASK] for data in datas])
    assert not masks[:, :4].any()
    assert abs(masks[:, 4:].double().mean().item() - 0.5) < 4 * 0.5 / math.sqrt(500 * 8)


@pytest.mark.parametrize("prob", [0.125, 0.5])
def test_each_structure_has_its_own_coin(prob: float) -> None:
    tossed = np.array(
        [bool(data[keys.CORRUPTED]) for data in sample(always(prob=prob), structures=2000, natoms=3)]
    )
    assert abs(tossed.mean() - prob) < 4 * math.sqrt(prob * (1 - prob) / len(tossed))
    assert abs(np.corrcoef(tossed[:-1], tossed[1:])[0, 1]) < 4 / math.sqrt(len(tossed))
    # Over epochs as well: a structure is not always the corrupted one.
    data = slab(3)
    epochs = [bool(corrupt(data, always(prob=prob), seed=0, epoch=at)[keys.CORRUPTED]) for at in range(1000)]
    assert abs(np.mean(epochs) - prob) < 4 * math.sqrt(prob * (1 - prob) / 1000)


@pytest.mark.parametrize(("prob", "expected"), [(0.0, False), (0, False), (1.0, True), (1, True)])
def test_certain_coins(prob: float, expected: bool) -> None:
    for data in sample(always(prob=prob), structures=300, natoms=2):
        assert bool(data[keys.CORRUPTED]) is expected
    assert {batch_is_corrupted(always(prob=prob), seed=0, step=step) for step in range(1, 300)} == {expected}


def test_no_ratio_is_all_free_atoms_and_all_atoms_is_all() -> None:
    data = slab(9, fixed=[0, 3, 8])
    free = corrupt(data, always(corrupt_ratio=None), seed=0, epoch=0)
    assert torch.equal(free[keys.NOISE_MASK], data[keys.FIXED] == 0)
    for corruption in (always(all_atoms=True), always(all_atoms=True, corrupt_ratio=1.0)):
        assert corrupt(data, corruption, seed=0, epoch=0)[keys.NOISE_MASK].all()


def test_nothing_to_move_is_not_corrupted() -> None:
    after = corrupt(slab(4, fixed=range(4)), always(), seed=0, epoch=0)
    assert after[keys.CORRUPTED].tolist() == [False]
    assert not after[keys.SIGMAS].any() and not after[keys.NOISE_MASK].any()


# ------------------------------------------------------------------ what it depends on


def noise_of(
    data: Any, corruption: Corruption | None = None, *, seed: int = 0, epoch: int = 0
) -> torch.Tensor:
    return corrupt(data, corruption or always(), seed=seed, epoch=epoch)[keys.NOISE_VEC]


def test_a_pure_function_of_seed_epoch_and_structure() -> None:
    data = slab()
    noise = noise_of(data)
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002  # the global generator is the point
    assert same(noise_of(copy.deepcopy(data)), noise)
    others = [
        noise_of(data, epoch=1),
        noise_of(data, seed=1),
        noise_of(data, epoch=2),
        noise_of(slab(seed=1)),
    ]
    # (seed, epoch) is a pair and not a sum.
    others.append(noise_of(data, seed=1, epoch=1))
    for first in range(len(others)):
        for second in [noise, *others[:first]]:
            assert not torch.isclose(others[first], second, rtol=1e-3).any()


def test_global_generators_are_not_advanced() -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    corrupt(slab(), always(), seed=0, epoch=0)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


@pytest.mark.parametrize("key", [keys.POS, keys.ATOMIC_NUMBERS, keys.CELL])
def test_the_smallest_difference_makes_another_structure(key: str) -> None:
    data, other = slab(), slab()
    if key == keys.ATOMIC_NUMBERS:
        other[key][-1] += 1
    else:
        bits(other[key]).view(-1)[-1] ^= 1
    assert not torch.isclose(noise_of(data), noise_of(other), rtol=1e-3).any()


def test_names_and_labels_do_not_matter() -> None:
    """A data set that is renumbered, relabelled or sharded differently keeps its noise."""
    data = slab()
    other = slab(sid="elsewhere", fid=77, energy=-3.0, tags=torch.full((8,), 2), id="4_2")
    other[keys.FORCES] = other[keys.FORCES] * 2
    assert same(noise_of(data), noise_of(other))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.float32, torch.float64])
def test_the_type_of_atomic_numbers_does_not_matter(dtype: torch.dtype) -> None:
    data = slab()
    other = slab()
    other[keys.ATOMIC_NUMBERS] = other[keys.ATOMIC_NUMBERS].to(dtype)
    assert same(noise_of(data), noise_of(other))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_the_type_of_fixed_does_not_matter(dtype: torch.dtype) -> None:
    data = slab(fixed=[1, 2])
    other = slab(fixed=[1, 2])
    other[keys.FIXED] = other[keys.FIXED].to(dtype)
    after = corrupt(other, always(), seed=0, epoch=0)
    assert same(after[keys.NOISE_VEC], noise_of(data))
    assert after[keys.NOISE_MASK].tolist() == [True, False, False, True, True, True, True, True]


def test_the_shape_of_the_cell_does_not_matter() -> None:
    data = slab()
    assert same(noise_of(slab(cell=data[keys.CELL].reshape(3, 3))), noise_of(data))


def test_molecules_without_a_cell() -> None:
    data = slab()
    del data[keys.CELL], data[keys.PBC]
    after = corrupt(data, always(), seed=0, epoch=0)
    assert after[keys.NOISE_MASK].all()
    batch = Batch.from_data_list([data, data])
    assert same(noise_of(batch), torch.cat([after[keys.NOISE_VEC]] * 2))


def test_double_precision_is_kept() -> None:
    data = slab()
    data[keys.POS] = data[keys.POS].double()
    data[keys.FORCES] = data[keys.FORCES].double()
    after = corrupt(data, always(), seed=0, epoch=0)
    for key in (keys.POS, keys.NOISE_VEC, keys.CONDITION_FORCES, keys.SIGMAS):
        assert after[key].dtype == torch.float64
    check_fields(data, after, always())


def test_old_names_of_labels() -> None:
    data = slab()
    old = slab()
    old["force"] = old[keys.FORCES]
    old["y"] = old[keys.ENERGY]
    del old[keys.FORCES], old[keys.ENERGY]
    after, expected = corrupt(old, always(), seed=0, epoch=0), corrupt(data, always(), seed=0, epoch=0)
    for key in (keys.POS, *keys.DENS_FIELDS):
        assert same(after[key], expected[key])
    assert same(after["force"], data[keys.FORCES]) and keys.FORCES not in after


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"corrupt_ratio": 0.3}, {"corrupt_ratio": 0.8}),
        ({"all_atoms": False}, {"all_atoms": True}),
        ({"prob": 0.2}, {"prob": 0.9}),
        ({"max_force_norm": 2.5}, {}),
        ({"strict_max_ratio": 0.6, "corrupt_ratio": 0.5}, {"corrupt_ratio": 0.5}),
        ({"switch": "batch"}, {"switch": "structure"}),
    ],
)
def test_a_setting_changes_one_decision_and_no_other(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Runs that differ in one setting can be compared: where both displace an atom, they do so alike."""
    both_moved, differ = 0, 0
    for seed in range(60):
        data = slab(8, seed, fixed=[0, 1])
        first, second = (corrupt(data, always(**settings), seed=0, epoch=0) for settings in (one, other))
        both = first[keys.NOISE_MASK] & second[keys.NOISE_MASK]
        assert same(first[keys.NOISE_VEC][both], second[keys.NOISE_VEC][both])
        both_moved += int(both.sum())
        differ += int((first[keys.NOISE_MASK] != second[keys.NOISE_MASK]).sum())
        if one.keys() == {"corrupt_ratio"}:  # a larger ratio only adds atoms
            assert not (first[keys.NOISE_MASK] & ~second[keys.NOISE_MASK]).any()
    assert both_moved > 0
    assert (differ == 0) == ("switch" in one)


def pinned(shift: float) -> Data:
    """Of round numbers, so that its bytes are the same on any machine."""
    return Data(
        pos=torch.arange(12.0).reshape(4, 3) / 8 + shift,
        atomic_numbers=torch.tensor([29, 46, 8, 1]),
        cell=10 * torch.eye(3)[None],
        natoms=4,
        fixed=torch.tensor([1, 0, 0, 0]),
        forces=torch.arange(12.0).reshape(4, 3) / 4 - 1,
    )


def test_the_very_numbers() -> None:
    """Runs of earlier versions can be resumed and compared: the noise is what it was from the start."""
    half = always(corrupt_ratio=0.5)
    after = corrupt(pinned(0), half, seed=0, epoch=0)
    assert after[keys.NOISE_MASK].tolist() == [False, False, True, False]
    third = [0.2136911004781723, 0.04733291268348694, -0.028175434097647667]
    assert after[keys.NOISE_VEC].tolist() == [[0.0] * 3, [0.0] * 3, third, [0.0] * 3]

    multi_scale = Corruption(prob=1.0, std_low=0.01, std_high=1.0, num_steps=7, all_atoms=True)
    after = corrupt(pinned(0), multi_scale, seed=3, epoch=5)
    assert after[keys.SIGMAS].unique().tolist() == [0.10000000149011612]
    assert after[keys.NOISE_VEC].tolist() == [
        [0.01650932990014553, -0.11937696486711502, -0.1206476017832756],
        [0.08867941796779633, 0.10765623301267624, 0.032676730304956436],
        [0.12739762663841248, -0.10951025784015656, 0.08932184427976608],
        [0.03575897589325905, -0.028219295665621758, 0.11588725447654724],
    ]

    after = corrupt(Batch.from_data_list([pinned(0), pinned(1)]), half, seed=0, epoch=0)
    assert after[keys.NOISE_VEC].tolist() == [
        [0.0] * 3,
        [0.0] * 3,
        third,
        [0.0] * 3,
        [0.0] * 3,
        [-0.12329795211553574, 0.22494666278362274, -0.00909203477203846],
        [-0.02451752871274948, 0.006033765617758036, 0.08835001289844513],
        [0.03557571768760681, -0.026760825887322426, 0.09670613706111908],
    ]
    coins = [
        bool(corrupt(pinned(0), always(prob=0.5), seed=0, epoch=epoch)[keys.CORRUPTED]) for epoch in range(16)
    ]
    assert [epoch for epoch, coin in enumerate(coins) if coin] == [1, 5, 6, 8, 9, 10, 12, 13]


# ------------------------------------------------------------------ in a batch


def pieces(batch: Any, field: str) -> list[torch.Tensor]:
    per_structure = field == keys.CORRUPTED
    return [batch[field][index : index + 1] if per_structure else batch[field][batch[keys.BATCH] == index]
            for index in range(batch.num_graphs)]  # fmt: skip


@given(
    st.lists(structures(), min_size=1, max_size=6), corruptions, st.sampled_from([None, True]), st.randoms()
)
def test_alone_or_in_any_batch(
    datas: list[Data], corruption: Corruption, selected: bool | None, random: Any
) -> None:
    alone = [corrupt(data, corruption, seed=2, epoch=7, selected=selected) for data in datas]
    order = list(range(len(datas)))
    random.shuffle(order)
    corrupted_batch = corrupt(
        Batch.from_data_list([datas[at] for at in order]), corruption, seed=2, epoch=7, selected=selected
    )
    batch_of_corrupted = Batch.from_data_list([alone[at] for at in order])
    for field in (keys.POS, *keys.DENS_FIELDS):
        assert same(corrupted_batch[field], batch_of_corrupted[field])
        for at, piece in zip(order, pieces(corrupted_batch, field), strict=True):
            assert same(piece, alone[at][field]), field


def test_a_copy_in_the_same_batch_has_the_same_noise() -> None:
    """Known by content, not by place."""
    after = corrupt(Batch.from_data_list([slab(), slab(5, 3), slab()]), always(), seed=0, epoch=0)
    first, _, third = pieces(after, keys.NOISE_VEC)
    assert same(first, third)


def test_a_batch_of_one_atom_structures() -> None:
    batch = Batch.from_data_list([slab(1, seed) for seed in range(5)])
    check_fields(batch, corrupt(batch, always(corrupt_ratio=0.5), seed=0, epoch=0), always(corrupt_ratio=0.5))


# ------------------------------------------------------------------ structures that are left alone


@pytest.mark.parametrize(
    "flag",
    [
        True,
        1,
        torch.tensor([True]),
        torch.tensor(True),
        torch.tensor([1]),
        torch.tensor([1.0]),
        np.bool_(True),
    ],
    ids=repr,
)
@pytest.mark.parametrize("selected", [None, True])
def test_md_is_never_corrupted(flag: Any, selected: bool | None) -> None:
    for epoch in range(20):
        after = corrupt(slab(md=flag), always(all_atoms=True), seed=0, epoch=epoch, selected=selected)
        assert not after[keys.CORRUPTED].any() and not after[keys.NOISE_MASK].any()
        assert same(after[keys.POS], slab()[keys.POS])


@pytest.mark.parametrize("flag", [False, 0, torch.tensor([False]), torch.tensor([0]), None], ids=repr)
def test_what_is_not_md_is_corrupted(flag: Any) -> None:
    assert same(noise_of(slab(md=flag)), noise_of(slab()))


@pytest.mark.parametrize(
    "kind", [bool, int, lambda flag: torch.tensor([flag]), lambda flag: torch.tensor([int(flag)])]
)
def test_md_within_a_batch(kind: Any) -> None:
    flags = [False, True, True, False, True]
    batch = Batch.from_data_list([slab(4, seed, md=kind(flag)) for seed, flag in enumerate(flags)])
    for selected in (None, True):
        after = corrupt(batch, always(), seed=0, epoch=0, selected=selected)
        assert after[keys.CORRUPTED].tolist() == [not flag for flag in flags]


def test_md_is_known_in_a_batch_where_only_some_structures_say_so() -> None:
    """``switch: batch`` sees structures after they were collated, which drops what the first one lacks."""
    transformed = [
        corrupt(data, always(switch="batch"), seed=0, epoch=0, selected=False)
        for data in (slab(4, 0), slab(4, 1, md=True), slab(4, 2, md=torch.tensor([False])))
    ]
    batch = Batch.from_data_list(transformed)
    after = corrupt(batch, always(switch="batch"), seed=0, epoch=0, selected=True)
    assert after[keys.CORRUPTED].tolist() == [True, False, True]


@pytest.mark.parametrize("limit", [0.2, 0.5, 0.75, 1.0])
def test_strict_max_ratio(limit: float) -> None:
    left_alone = 0
    for seed in range(200):
        data = slab(8, seed)
        free = corrupt(data, always(corrupt_ratio=0.5), seed=0, epoch=0)
        strict = corrupt(data, always(corrupt_ratio=0.5, strict_max_ratio=limit), seed=0, epoch=0)
        if free[keys.NOISE_MASK].double().mean().item() > limit:
            left_alone += 1
            assert not strict[keys.CORRUPTED].any() and same(strict[keys.POS], data[keys.POS])
        else:
            for key in (keys.POS, *keys.DENS_FIELDS):
                assert same(strict[key], free[key])
    assert (left_alone > 0) == (limit < 1.0)


def test_max_force_norm() -> None:
    forces = torch.zeros(5, 3)
    forces[2] = torch.tensor([3.0, 0.0, 4.0])
    data = slab(5, forces=forces)
    for limit, expected in ((4.99, False), (5.0, True), (5.01, True)):
        after = corrupt(data, always(max_force_norm=limit), seed=0, epoch=0)
        assert after[keys.CORRUPTED].tolist() == [expected]
    # It is the norm that counts, and only that of the structure itself.
    assert (
        corrupt(slab(5, forces=-forces), always(max_force_norm=4.0), seed=0, epoch=0)[keys.NOISE_MASK]
        .any()
        .item()
        is False
    )
    batch = Batch.from_data_list([slab(5, 1), data, slab(5, 2)])
    calm = always(max_force_norm=4.99)
    assert corrupt(batch, calm, seed=0, epoch=0, selected=True)[keys.CORRUPTED].tolist() == [
        True,
        False,
        True,
    ]


# ------------------------------------------------------------------ one coin for a batch


def test_the_coin_of_a_batch() -> None:
    corruption = always(prob=0.3, switch="batch")
    tossed = [batch_is_corrupted(corruption, seed=0, step=step) for step in range(1, 4001)]
    assert abs(np.mean(tossed) - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 4000)
    assert abs(np.corrcoef(tossed[:-1], tossed[1:])[0, 1]) < 4 / math.sqrt(4000)
    assert tossed == [batch_is_corrupted(corruption, seed=0, step=step) for step in range(1, 4001)]
    other = [batch_is_corrupted(corruption, seed=1, step=step) for step in range(1, 4001)]
    assert abs(np.corrcoef(tossed, other)[0, 1]) < 4 / math.sqrt(4000)
    # A larger probability only adds steps.
    more = [
        batch_is_corrupted(always(prob=0.6, switch="batch"), seed=0, step=step) for step in range(1, 4001)
    ]
    assert all(later or not earlier for earlier, later in zip(tossed, more, strict=True))


def test_selected_overrides_the_structures_coin() -> None:
    never, ever = always(prob=0.0), always(prob=1.0)
    data = slab()
    assert same(corrupt(data, never, seed=0, epoch=0, selected=True)[keys.NOISE_VEC], noise_of(data))
    assert not corrupt(data, ever, seed=0, epoch=0, selected=False)[keys.CORRUPTED].any()


# ------------------------------------------------------------------ bad structures


def test_no_forces() -> None:
    data = slab(seed=12)
    del data[keys.FORCES]
    with pytest.raises(
        ValueError, match=r"sid s12, fid 12.*no field 'forces'.*'force'.*Train on data with forces"
    ):
        corrupt(data, always(), seed=0, epoch=0)


def test_no_fixed() -> None:
    data = slab(seed=12)
    del data[keys.FIXED]
    with pytest.raises(ValueError, match=r"sid s12, fid 12.*no field 'fixed'.*zeros if all atoms are free"):
        corrupt(data, always(), seed=0, epoch=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("settings", [{}, {"prob": 0.0}, {"corrupt_ratio": 0.01}, {"max_force_norm": 1.0}])
def test_forces_that_are_not_finite(value: float, settings: dict[str, Any]) -> None:
    """Also where this structure would not be corrupted: in the next epoch it may be."""
    bad = slab(seed=4)
    bad[keys.FORCES][-1, 2] = value
    with pytest.raises(ValueError, match=r"sid s4, fid 4\) has forces that are not finite.*Remove"):
        corrupt(bad, always(**settings), seed=0, epoch=0)
    # In a batch, the right one is named.
    with pytest.raises(ValueError, match=r"sid s4, fid 4\) has forces that are not finite"):
        corrupt(
            Batch.from_data_list([slab(3, 1), slab(5, 2), bad, slab()]), always(**settings), seed=0, epoch=0
        )


def test_empty_structure() -> None:
    with pytest.raises(ValueError, match=r"sid s9, fid 9\) has no atoms.*remove it"):
        corrupt(slab(0, 9), always(), seed=0, epoch=0)
    with pytest.raises(ValueError, match=r"sid s9, fid 9\) has no atoms"):
        corrupt(Batch.from_data_list([slab(2, 1), slab(0, 9)]), always(), seed=0, epoch=0, selected=True)


@pytest.mark.parametrize("ids", [(), (keys.SID,), (keys.FID,), (keys.SID, keys.FID)])
def test_structures_with_few_ids(ids: tuple[str, ...]) -> None:
    data = slab(0, 9)
    for key in {keys.SID, keys.FID} - set(ids):
        del data[key]
    expected = {keys.SID: "sid s9", keys.FID: "fid 9"}
    message = ", ".join(expected[key] for key in ids) if ids else "without sid or fid"
    with pytest.raises(ValueError, match=message):
        corrupt(data, always(), seed=0, epoch=0)


def test_ids_as_tensors() -> None:
    with pytest.raises(ValueError, match=r"sid 9, fid 3"):
        corrupt(slab(0, sid=torch.tensor([9]), fid=torch.tensor(3)), always(), seed=0, epoch=0)
