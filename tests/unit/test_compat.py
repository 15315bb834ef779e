"""The stand-ins for torch_scatter, torch_sparse and torch_cluster, and the finder that answers for them."""

from __future__ import annotations

import importlib.util
import pickle
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fairchem_dens
from fairchem_dens.compat import STAND_INS, torch_cluster, torch_scatter, torch_sparse
from fairchem_dens.compat.torch_scatter import utils

REDUCTIONS = {
    "sum": lambda values: sum(values),
    "add": lambda values: sum(values),
    "mean": lambda values: sum(values) / len(values),
    "mul": lambda values: torch.tensor(values, dtype=torch.float64).prod().item(),
    "min": min,
    "max": max,
}
PACKAGES_ROOT = str(Path(fairchem_dens.__file__).parents[1])
COMPAT = "import fairchem_dens.compat\n"


# --- torch_scatter ---


def brute_force(src, index, dim, size, reduce):
    """Groups values one by one; `index` has the shape of `src`."""
    shape = list(src.shape)
    shape[dim] = size
    groups: dict[tuple[int, ...], list[float]] = {}
    for position in torch.cartesian_prod(*map(torch.arange, src.shape)).reshape(-1, src.dim()).tolist():
        target = list(position)
        target[dim] = int(index[tuple(position)])
        groups.setdefault(tuple(target), []).append(src[tuple(position)].item())
    result = torch.full(shape, 1.0 if reduce == "mul" else 0.0, dtype=src.dtype)
    for target, values in groups.items():
        result[target] = REDUCTIONS[reduce](values)
    return result


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    data=st.data(),
    reduce=st.sampled_from(sorted(REDUCTIONS)),
    full_index=st.booleans(),
    extra=st.integers(0, 2),
)
def test_scatter_agrees_with_grouping_by_hand(shape, data, reduce, full_index, extra):
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    src = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    size = torch.Size(shape) if full_index else (shape[dim],)
    index = torch.randint(0, 4, size, generator=torch.Generator().manual_seed(2))
    expanded = utils.broadcast(index, src, dim)
    assert expanded.shape == src.shape

    groups = int(index.max()) + 1 + extra
    expected = brute_force(src, expanded, dim, groups, reduce)
    torch.testing.assert_close(
        torch_scatter.scatter(src, index, dim, dim_size=groups, reduce=reduce), expected
    )
    without_size = torch_scatter.scatter(src, index, dim, reduce=reduce)
    assert without_size.size(dim) == groups - extra
    torch.testing.assert_close(without_size, expected.narrow(dim, 0, groups - extra))


@pytest.mark.parametrize("reduce", sorted(REDUCTIONS))
def test_scatter_passes_gradcheck(reduce):
    src = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([2, 0, 2, 0, 0, 3])
    assert torch.autograd.gradcheck(
        lambda values: torch_scatter.scatter(values, index, 0, dim_size=5, reduce=reduce), (src,)
    )


def test_out_takes_part_and_is_written_to():
    src, index = torch.tensor([1.0, 5.0, 3.0]), torch.tensor([0, 0, 2])
    start = torch.tensor([4.0, 7.0, 2.0])
    expected = {"sum": [10, 7, 5], "mul": [20, 7, 6], "min": [1, 7, 2], "max": [5, 7, 3], "mean": [5, 7, 5]}
    for reduce, values in expected.items():
        out = start.clone()
        result = torch_scatter.scatter(src, index, 0, out=out, reduce=reduce)
        assert result.tolist() == values
        assert out.tolist() == values


def test_minimum_and_maximum_tell_the_position_of_the_first_of_equals():
    src = torch.tensor([3.0, 1.0, 1.0, -2.0, -2.0], requires_grad=True)
    index = torch.tensor([0, 0, 0, 2, 2])
    values, positions = torch_scatter.scatter_min(src, index, 0, dim_size=4)
    assert values.tolist() == [1, 0, -2, 0]
    assert positions.tolist() == [1, 5, 3, 5]  # 5: there is none
    values.sum().backward()
    assert src.grad.tolist() == [0, 1, 0, 1, 0]
    values, positions = torch_scatter.scatter_max(src, index, 0, out=torch.tensor([3.0, 9.0, -7.0]))
    assert values.tolist() == [3, 9, -2]
    assert positions.tolist() == [5, 5, 3]


def test_nothing_to_scatter_gives_nothing():
    index = torch.empty(0, dtype=torch.long)
    for reduce in REDUCTIONS:
        assert torch_scatter.scatter(torch.empty(0, 3), index, 0, reduce=reduce).shape == (0, 3)
        empty_groups = torch_scatter.scatter(torch.empty(0, 3), index, 0, dim_size=2, reduce=reduce)
        assert (empty_groups == (1 if reduce == "mul" else 0)).all()


def test_integers_are_averaged_with_rounding_down():
    result = torch_scatter.scatter_mean(torch.tensor([1, 2, -1, -2]), torch.tensor([0, 0, 1, 1]))
    assert result.tolist() == [1, -2]


def test_nan_stays_visible():
    src, index = torch.tensor([1.0, float("nan"), 2.0]), torch.tensor([0, 0, 1])
    for reduce in ("sum", "mean", "min", "max", "mul"):
        assert torch_scatter.scatter(src, index, 0, reduce=reduce).isnan().tolist() == [True, False]


def test_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match="'median'"):
        torch_scatter.scatter(torch.ones(1), torch.zeros(1, dtype=torch.long), reduce="median")


@pytest.mark.parametrize("reduce", ["sum", "mean", "min", "max"])
def test_segment_coo_agrees_with_scatter_along_the_index(reduce):
    src = torch.randn(2, 5, 3)
    index = torch.tensor([[0, 0, 1, 3, 3], [1, 1, 1, 2, 2]])
    result = torch_scatter.segment_coo(src, index, dim_size=4, reduce=reduce)
    for row in range(2):
        expected = torch_scatter.scatter(src[row], index[row], 0, dim_size=4, reduce=reduce)
        torch.testing.assert_close(result[row], expected)


@pytest.mark.parametrize("reduce", ["sum", "mean", "min", "max"])
def test_segment_csr_reduces_slices(reduce):
    src = torch.randn(7, 2, dtype=torch.float64)
    indptr = torch.tensor([1, 1, 4, 4, 6])  # an empty segment first, one inside; position 0 and 6 in none
    out = torch.empty(4, 2, dtype=torch.float64)
    result = torch_scatter.segment_csr(src, indptr, out, reduce=reduce)
    assert result is out
    assert (result[0] == 0).all() and (result[2] == 0).all()
    for segment, rows in ((1, slice(1, 4)), (3, slice(4, 6))):
        for column in range(2):
            expected = REDUCTIONS[reduce](src[rows, column].tolist())
            assert result[segment, column].item() == pytest.approx(expected)
    per_row = torch_scatter.segment_csr(src.T.contiguous(), indptr.unsqueeze(0), reduce=reduce)
    torch.testing.assert_close(per_row, result.T)


def test_gather_undoes_segmenting():
    values, indptr = torch.randn(3, 2), torch.tensor([0, 2, 2, 5])
    expected = values[[0, 0, 2, 2, 2]]
    torch.testing.assert_close(torch_scatter.gather_csr(values, indptr), expected)
    torch.testing.assert_close(torch_scatter.gather_coo(values, torch.tensor([0, 0, 2, 2, 2])), expected)
    with pytest.raises(ValueError, match="start at 0"):
        torch_scatter.gather_csr(values, indptr + 1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_broadcast_can_be_scripted():
    # fairchem's GemNet-GP calls it from a scripted function, at import.
    scripted = torch.jit.script(utils.broadcast)
    assert scripted(torch.tensor([0, 1]), torch.zeros(3, 2, 4), 1).shape == (3, 2, 4)


# --- torch_cluster ---


def neighbours_by_hand(pos, r, batch, limit, loop=False):
    """Pairs (source, target): the `limit` nearest sources of each target that are closer than `r`."""
    edges = []
    for target in range(len(pos)):
        near = [
            (((pos[source] - pos[target]) ** 2).sum().item(), source)
            for source in range(len(pos))
            if batch[source] == batch[target] and (loop or source != target)
        ]
        near = sorted(pair for pair in near if pair[0] < r * r)[:limit]
        edges += [(source, target) for _, source in near]
    return sorted(edges)


@given(
    sizes=st.lists(st.integers(0, 6), max_size=4),
    limit=st.integers(1, 6),
    loop=st.booleans(),
    pairs_at_a_time=st.sampled_from([1, 7, 2**24]),
)
def test_radius_graph_agrees_with_trying_all_pairs(sizes, limit, loop, pairs_at_a_time):
    # Examples without points in between and at the ends; positions on a grid: many distances are equal.
    batch = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes, dtype=torch.long))
    pos = torch.randint(-2, 3, (len(batch), 3), generator=torch.Generator().manual_seed(3)).double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_cluster, "MAX_PAIRS", pairs_at_a_time)
        edges = torch_cluster.radius_graph(pos, 2.3, batch, loop=loop, max_num_neighbors=limit)
    expected = neighbours_by_hand(pos, 2.3, batch.tolist(), limit, loop)
    assert sorted(zip(*edges.tolist(), strict=True)) == expected
    assert edges.shape == (2, len(expected))
    assert (edges[1].diff() >= 0).all()


def test_the_radius_itself_is_outside():
    line = torch.tensor([[0.0], [1.0], [3.0]])
    assert torch_cluster.radius_graph(line, 1.0).tolist() == [[], []]
    assert torch_cluster.radius_graph(line, 1.001).tolist() == [[1, 0], [0, 1]]
    assert torch_cluster.radius_graph(line, 2.001).tolist() == [[1, 0, 2, 1], [0, 1, 1, 2]]


def test_the_bound_is_on_the_neighbours_of_the_target():
    star = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.1], [-1.2, 0.0]])
    edges = torch_cluster.radius_graph(star, 1.3, max_num_neighbors=1)
    assert edges.tolist() == [[1, 0, 0, 0], [0, 1, 2, 3]]
    turned = torch_cluster.radius_graph(star, 1.3, max_num_neighbors=1, flow="target_to_source")
    assert turned.tolist() == edges.flip(0).tolist()
    unbounded = torch_cluster.radius_graph(star, 1.3, max_num_neighbors=None)
    assert unbounded.shape == (2, 6)


def test_radius_finds_points_of_another_set():
    x, y = torch.tensor([[0.0], [1.0], [10.0]]), torch.tensor([[0.4], [10.1]])
    assert torch_cluster.radius(x, y, 1.0).tolist() == [[0, 0, 1], [0, 1, 2]]
    pairs = torch_cluster.radius(x, y, 1.0, torch.tensor([0, 1, 1]), torch.tensor([0, 1]))
    assert pairs.tolist() == [[0, 1], [0, 2]]


def test_unsorted_batch_and_unknown_flow_are_refused():
    with pytest.raises(ValueError, match="sorted"):
        torch_cluster.radius_graph(torch.zeros(2, 3), 1.0, torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="'upwards'"):
        torch_cluster.radius_graph(torch.zeros(2, 3), 1.0, flow="upwards")


# --- what is absent ---


@pytest.mark.parametrize(
    ("use", "package"),
    [
        (lambda: torch_sparse.SparseTensor(row=None), "torch-sparse"),
        (lambda: torch_sparse.SparseTensor.from_dense(torch.eye(2)), "torch-sparse"),
        (lambda: torch_sparse.coalesce(None, None, 2, 2), "torch-sparse"),
        (lambda: torch_scatter.scatter_softmax(torch.ones(2), torch.zeros(2)), "torch-scatter"),
        (lambda: torch_cluster.knn_graph(torch.ones(2, 3), k=1), "torch-cluster"),
    ],
)
def test_what_is_not_provided_names_the_package_to_install(use, package):
    with pytest.raises(ImportError, match=f"install {package} to use it") as error:
        use()
    assert "\n" not in str(error.value)


def test_placeholders_do_not_disturb_inspection():
    assert not isinstance(torch.ones(1), torch_sparse.SparseTensor)
    assert pickle.loads(pickle.dumps(torch.ones(1))).item() == 1
    assert not hasattr(torch_sparse.SparseTensor, "__len__")
    assert not hasattr(torch_scatter, "__path_hook__")


# --- the finder, in fresh interpreters ---


def skip_if_real(name: str) -> None:
    """Skips where the environment has the real package: there the finder is not asked."""
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.origin is not None and "fairchem_dens" not in spec.origin:
        pytest.skip(f"the real {name} is installed")


def test_installing_the_finder_loads_nothing_and_happens_once(python):
    code = f"""
    import sys
    sys.path.insert(0, {PACKAGES_ROOT!r})
    before = set(sys.modules)
    import fairchem_dens.compat as compat
    print(sorted(set(sys.modules) - before))
    compat.install()
    print(sys.meta_path.count(compat.StandInFinder), sys.meta_path[-1] is compat.StandInFinder)
    """
    # -S: without site-packages, hence without the start-up line and everything else that loads modules early.
    assert python(textwrap.dedent(code), "-S").splitlines() == [
        "['fairchem_dens', 'fairchem_dens.compat']",
        "1 True",
    ]


def test_start_up_costs_less_than_a_millisecond(python):
    code = f"""
    import sys, time
    sys.path.insert(0, {PACKAGES_ROOT!r})
    start = time.perf_counter()
    import fairchem_dens.compat
    print(time.perf_counter() - start)
    """
    # The best of several: the others measure what else the machine is doing.
    assert min(float(python(textwrap.dedent(code), "-S")) for _ in range(7)) < 1e-3


@pytest.mark.parametrize("name", STAND_INS)
def test_stand_in_is_found_under_the_real_name(name, python):
    skip_if_real(name)
    out = python(f"{COMPAT}import {name}\nprint({name}.__name__, {name}.__file__)")
    assert out.split()[0] == name
    assert "fairchem_dens" in out.split()[1]


def test_submodule_is_found(python):
    skip_if_real("torch_scatter")
    python(f"{COMPAT}from torch_scatter.utils import broadcast\nimport torch_scatter.utils")


@pytest.mark.parametrize("name", STAND_INS)
def test_real_package_wins(name, python, tmp_path):
    # A package is real to the finder when any other finder has it.
    package = tmp_path / "elsewhere" / name
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("REAL = True\n")
    (package / "utils.py").write_text("REAL = True\n")
    code = f"{COMPAT}import {name}, {name}.utils\nprint({name}.REAL, {name}.utils.REAL, {name}.__file__)"
    out = python(code, path=str(package.parent))
    assert out.split() == ["True", "True", str(package / "__init__.py")]


def test_other_missing_modules_stay_missing(python):
    python(f"{COMPAT}import importlib.util\nassert importlib.util.find_spec('torch_spline_conv_x') is None")


@pytest.mark.parametrize("first", ["torch_geometric", "torch_scatter, torch_sparse, torch_cluster"])
def test_torch_geometric_is_not_misled_and_does_not_warn(first, python):
    for name in STAND_INS:
        skip_if_real(name)
    code = f"""
    import warnings
    import fairchem_dens.compat
    import torch
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import {first}
        import torch_geometric.typing as decisions
        import torch_geometric.nn
    ours = ("torch_scatter", "torch_sparse", "torch_cluster")
    messages = [str(warning.message).replace("-", "_") for warning in caught]
    print([message for message in messages if any(name in message for name in ours)])
    print(decisions.WITH_TORCH_SCATTER, decisions.WITH_TORCH_SPARSE)
    """
    assert python(textwrap.dedent(code)).splitlines() == ["[]", "False False"]


def test_torch_geometric_builds_graphs_without_periodicity(python):
    # With the real one, torch_geometric decides: from 2.8 on it wants pyg_lib, and says so.
    skip_if_real("torch_cluster")
    code = """
    import fairchem_dens.compat
    import torch
    from torch_geometric.nn import radius_graph
    pos = torch.tensor([[0.0, 0, 0], [1, 0, 0], [1.5, 0, 0], [0, 0, 0], [0.2, 0, 0]])
    batch = torch.tensor([0, 0, 0, 1, 1])
    print(radius_graph(pos, r=1.2, batch=batch, max_num_neighbors=1).tolist())
    print(radius_graph(pos, r=1.2, batch=batch, max_num_neighbors=5, loop=True).size(1))
    """
    assert python(textwrap.dedent(code)).splitlines() == ["[[1, 2, 1, 4, 3], [0, 1, 2, 3, 4]]", "11"]


def test_torch_geometric_before_2_8_gets_the_stand_in_for_torch_cluster(python, tmp_path):
    # It imports torch_cluster rather than looking for its spec, and reads a docstring. A module that asks in
    # this way under its name stands for it here.
    package = tmp_path / "earlier" / "torch_geometric"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import torch_geometric.typing\n")
    (package / "typing.py").write_text(
        textwrap.dedent("""
        try:
            import torch_scatter
            WITH_TORCH_SCATTER = True
        except ImportError:
            WITH_TORCH_SCATTER = False
        try:
            import torch_cluster
            WITH_TORCH_CLUSTER = True
            WITH_TORCH_CLUSTER_BATCH_SIZE = 'batch_size' in torch_cluster.knn.__doc__
        except ImportError:
            WITH_TORCH_CLUSTER = False
        """)
    )
    skip_if_real("torch_scatter")
    code = f"""{COMPAT}
import torch_scatter
import torch_geometric.typing as t
print(t.WITH_TORCH_SCATTER, t.WITH_TORCH_CLUSTER, t.WITH_TORCH_CLUSTER_BATCH_SIZE)
pos = __import__("torch").zeros(2, 3)
print(t.torch_cluster.radius_graph(pos, 1.0, None, False, 32, "source_to_target", 1, 1).tolist())
"""
    out = python(code, path=str(package.parent))
    assert out.splitlines() == ["False True True", "[[1, 0], [0, 1]]"]
