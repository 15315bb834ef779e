"""Two hundred malformed inputs: each trains, or fails with an error of ours; none hangs or spoils a file.

An error of ours is a `ValueError`, for a path a `FileNotFoundError`, or one of `fairchem_dens.errors`; this
package raises it, and it names what is wrong: the YAML key, or the file and the record.
"""

from __future__ import annotations

import copy
import functools
import math
import operator
import pickle
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import lmdb
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch_geometric.data import Data

from fairchem_dens import keys
from fairchem_dens.errors import CheckpointNotWritten, TooManyBadSteps

pytestmark = pytest.mark.slow

SECONDS = 120
"""After which an example is said to hang."""
RECORDS = 6
EXAMPLES = 100  # of records, and as many of settings
PROPERTY = settings(
    max_examples=EXAMPLES,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


class Hangs(Exception):  # noqa: N818  # not an error of what is tested
    pass


@contextmanager
def a_time_limit() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Hangs

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def is_ours(error: BaseException, named: tuple[str, ...]) -> bool:
    """Whether this package raised it, as a kind of error that users are told of, and it names the culprit."""
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    return (
        isinstance(error, ValueError | FileNotFoundError | TooManyBadSteps | CheckpointNotWritten)
        and "/fairchem_dens/" in raised_in
        and any(name in str(error) for name in named)
    )


@pytest.fixture
def check(make_trainer: Callable[..., Any], tmp_path: Path) -> Callable[..., str]:
    """Trains with some settings; returns ``trains`` or ``refused``, and fails at anything else."""
    checkpoints = tmp_path / "checkpoints" / "test"
    checkpoints.mkdir(parents=True)
    earlier = checkpoints / "of_an_earlier_run.pt"
    torch.save({"state_dict": {"weight": torch.ones(2)}, "step": 3}, earlier)
    before = earlier.read_bytes()

    def run(settings: dict[str, Any], named: tuple[str, ...]) -> str:
        outcome = "trains"
        try:
            with a_time_limit():
                make_trainer(settings).train(disable_eval_tqdm=True)
        except Hangs:
            pytest.fail(f"It hangs: {named}")
        except Exception as error:
            if not is_ours(error, named):
                raise
            outcome = "refused"
        assert earlier.read_bytes() == before
        for file in checkpoints.glob("*checkpoint.pt"):
            assert torch.load(file, weights_only=True)["state_dict"]
        assert not list(checkpoints.glob(".*")), "something was left half written"
        return outcome

    return run


# ------------------------------------------------------------------ records


class Wrong(NamedTuple):
    """A way to spoil a record: what is done to it, and to its bytes."""

    said: str
    data: Callable[[Data], None] = lambda data: None
    stored: Callable[[bytes], bytes | None] = lambda stored: stored


FIELDS = (
    keys.POS,
    keys.ATOMIC_NUMBERS,
    keys.CELL,
    keys.PBC,
    keys.FIXED,
    keys.TAGS,
    keys.FORCES,
    keys.ENERGY,
    keys.NATOMS,
    keys.SID,
    keys.FID,
)
TENSORS = (keys.POS, keys.ATOMIC_NUMBERS, keys.CELL, keys.PBC, keys.FIXED, keys.TAGS, keys.FORCES)


def drop(name: str) -> Wrong:
    return Wrong(f"no {name}", lambda data: data.__delitem__(name))


def put(name: str, value: Any) -> Wrong:
    return Wrong(f"{name} is {value!r}", lambda data: data.__setitem__(name, copy.deepcopy(value)))


def spoil(name: str, place: int, value: float) -> Wrong:
    def do(data: Data) -> None:
        data[name] = data[name].to(torch.float32) if name != keys.ATOMIC_NUMBERS else data[name]
        data[name].view(-1)[place % data[name].numel()] = value

    return Wrong(f"{name}[{place}] is {value}", do)


def cut(name: str, rows: int) -> Wrong:
    return Wrong(f"{name} of {rows} rows", lambda data: data.__setitem__(name, data[name][:rows]))


def cast(name: str, dtype: torch.dtype) -> Wrong:
    return Wrong(f"{name} as {dtype}", lambda data: data.__setitem__(name, data[name].to(dtype)))


def reshape(name: str) -> Wrong:
    return Wrong(f"{name} flat", lambda data: data.__setitem__(name, data[name].reshape(-1)))


def longer(name: str) -> Wrong:
    return Wrong(f"{name} twice", lambda data: data.__setitem__(name, torch.cat([data[name]] * 2)))


def empty(data: Data) -> None:
    for key in (keys.POS, keys.ATOMIC_NUMBERS, keys.FIXED, keys.TAGS, keys.FORCES):
        data[key] = data[key][:0]
    data.natoms = 0


def all_in_one_place(data: Data) -> None:
    data.pos = torch.zeros_like(data.pos)


class Unpicklable:
    """Runs code that fails when it is unpickled."""

    def __reduce__(self) -> Any:
        return operator.truediv, (1, 0)


JUNK = st.sampled_from(
    [
        None,
        "text",
        -1,
        0,
        7,
        2.5,
        math.nan,
        math.inf,
        True,
        [],
        [1, 2],
        {},
        {"a": 1},
        b"bytes",
        np.array("text"),
        np.zeros((2, 2)),
        np.array([None, 1], dtype=object),
        torch.zeros(0),
        torch.zeros(3, 3, 3),
        torch.tensor(math.nan),
        torch.zeros(2, 3, dtype=torch.complex64),
        10**30,
        ("a",),
        Data(),
    ]
)
NUMBERS = st.sampled_from([math.nan, math.inf, -math.inf, 1e38, -1e38, 1e20, 1e-30])
CELLS = st.sampled_from(
    [
        torch.zeros(1, 3, 3),
        torch.ones(1, 3, 3),
        torch.eye(3)[None] * 1e-6,
        torch.eye(3)[None] * 1e8,
        -torch.eye(3)[None] * 8,
        torch.diag(torch.tensor([5.0, 5.0, 0.0]))[None],
        torch.full((1, 3, 3), math.nan),
        torch.full((1, 3, 3), 1e30),
    ]
)
WRONG_RECORDS = st.one_of(
    st.builds(drop, st.sampled_from(FIELDS)),
    st.builds(put, st.sampled_from(FIELDS), JUNK),
    st.builds(spoil, st.sampled_from([keys.POS, keys.FORCES, keys.CELL]), st.integers(0, 40), NUMBERS),
    st.builds(
        spoil,
        st.just(keys.ATOMIC_NUMBERS),
        st.integers(0, 9),
        st.sampled_from([-1, 0, 89, 90, 119, 255, 10**6, -(2**62)]),
    ),
    st.builds(
        spoil, st.sampled_from([keys.FIXED, keys.TAGS]), st.integers(0, 9), st.sampled_from([-1.0, 2.0, 7.5])
    ),
    st.builds(cut, st.sampled_from(TENSORS), st.integers(0, 3)),
    st.builds(
        cast,
        st.sampled_from(TENSORS),
        st.sampled_from(
            [
                torch.float64,
                torch.float16,
                torch.bfloat16,
                torch.int8,
                torch.uint8,
                torch.bool,
                torch.complex64,
            ]
        ),
    ),
    st.builds(reshape, st.sampled_from(TENSORS)),
    st.builds(longer, st.sampled_from(TENSORS)),
    st.builds(put, st.just(keys.CELL), CELLS),
    st.builds(
        put, st.sampled_from(["extra", "edge_index", "batch", "ptr", "noise_vec", "md", "y", "force"]), JUNK
    ),
    st.sampled_from(
        [
            Wrong("no atoms", empty),
            Wrong("all atoms in one place", all_in_one_place),
            Wrong("extra is code", lambda data: data.__setitem__("extra", Unpicklable())),
        ]
    ),
    st.builds(
        lambda share: Wrong(f"cut off at {share}", stored=lambda raw: raw[: int(share * len(raw))]),
        st.floats(0, 0.999),
    ),
    st.builds(
        lambda place, byte: Wrong(f"byte {place} is {byte}", stored=lambda raw: _changed(raw, place, byte)),
        st.integers(0, 10**6),
        st.integers(0, 255),
    ),
    st.builds(lambda raw: Wrong(f"bytes {raw!r}", stored=lambda _: raw), st.binary(max_size=40)),
    st.just(Wrong("missing", stored=lambda _: None)),
    st.builds(
        lambda thing: Wrong(f"a {thing!r}", stored=lambda _: pickle.dumps(thing)),
        st.sampled_from([None, 3, "text", {"pos": 1}, [Data()], np.zeros(3)]),
    ),
)


def _changed(raw: bytes, place: int, byte: int) -> bytes:
    place %= len(raw)
    return raw[:place] + bytes([byte]) + raw[place + 1 :]


def write(folder: Path, structures: list[Data], index: int, wrong: Wrong) -> Path:
    """Write an LMDB by hand, one record of which is wrong."""
    folder.mkdir()
    env = lmdb.open(str(folder / "data.0000.lmdb"), subdir=False, map_size=2**24, lock=False)
    with env.begin(write=True) as transaction:
        for number, data in enumerate(structures):
            stored: bytes | None = pickle.dumps(data, protocol=-1)
            if number == index:
                wrong.data(data)
                stored = wrong.stored(pickle.dumps(data, protocol=-1))
            if stored is not None:
                transaction.put(str(number).encode(), stored)
        transaction.put(b"length", pickle.dumps(len(structures)))
    env.close()
    return folder


@PROPERTY
@given(
    wrong=WRONG_RECORDS,
    index=st.integers(0, RECORDS - 1),
    format_=st.sampled_from(["lmdb", "dens_lmdb"]),
    switch=st.sampled_from(["structure", "batch"]),
)
def test_a_malformed_record(
    check: Callable[..., str],
    run_settings: dict[str, Any],
    structure: Callable[..., Data],
    wrong: Wrong,
    index: int,
    format_: str,
    switch: str,
) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        structures = [structure(1000 + seed, natoms=10) for seed in range(RECORDS)]
        run = copy.deepcopy(run_settings)
        train = run["dataset"]["train"]
        train |= {"src": str(write(Path(temporary) / "train", structures, index, wrong)), "format": format_}
        train |= {"md_logs": "ignore"} if format_ == "dens_lmdb" else {}
        train["transforms"]["dens"]["switch"] = switch
        run["dataset"] = {"train": train}
        run["optim"] |= {"max_epochs": 1, "eval_every": 100}
        # Where records differ, either may be the one that is told of; the file is named then.
        event(check(run, (f"sid {1000 + index}", f"Structure {index} of", "data.0000.lmdb")))


# ------------------------------------------------------------------ settings


class Change(NamedTuple):
    """A wrong setting: where it stands, and what stands there; `_GONE` where it is left out."""

    path: tuple[str | int, ...]
    value: Any


_GONE = object()
SETTINGS: tuple[tuple[str | int, ...], ...] = tuple(
    [
        ("dataset", "train", "transforms", "dens", key)
        for key in (
            "prob",
            "std",
            "corrupt_ratio",
            "all_atoms",
            "switch",
            "std_low",
            "std_high",
            "num_steps",
            "strict_max_ratio",
            "max_force_norm",
        )
    ]
    + [
        ("dataset", "train", "transforms", "normalizer", "energy", key)
        for key in ("mean", "rmsd", "stdev", "file")
    ]
    + [("dataset", "train", "transforms", "normalizer", "forces")]
    + [("dataset", "train", "transforms", key) for key in ("dens", "normalizer", "element_references")]
    + [
        ("dataset", "train", key)
        for key in (
            "src",
            "format",
            "transforms",
            "key_mapping",
            "max_atoms",
            "first_n",
            "sample_n",
            "no_shuffle",
            "metadata_path",
            "shard",
            "total_shards",
            "subset_to",
            "skip_bad_records",
            "lin_ref",
            "md_logs",
        )
    ]
    + [("dataset", "val", key) for key in ("src", "transforms", "use_train_settings")]
    + [("dataset", "train"), ("dataset", "val"), ("dataset",)]
    + [
        ("loss_functions", place, target, key)
        for place, target in ((0, "energy"), (1, "forces"), (2, "noise"))
        for key in ("fn", "coefficient", "reduction")
    ]
    + [("loss_functions", 2, "noise", key) for key in ("decay", "decay_floor")]
    + [("loss_functions", 1), ("loss_functions",)]
    + [
        ("optim", key)
        for key in (
            "local_num_workers",
            "max_bad_steps_in_a_row",
            "amp_dtype",
            "batch_size",
            "eval_batch_size",
            "num_workers",
            "lr_initial",
            "optimizer",
            "optimizer_params",
            "scheduler",
            "scheduler_params",
            "max_epochs",
            "clip_grad_norm",
            "ema_decay",
            "eval_every",
            "checkpoint_every",
            "load_balancing",
            "load_balancing_on_error",
            "weight_decay",
            "use_denoising_pos",
            "denoising_pos_params",
            "denoising_pos_coefficient",
            "loss_energy",
        )
    ]
    + [("optim", "optimizer_params", key) for key in ("weight_decay", "betas", "amsgrad")]
    + [
        ("optim", "scheduler_params", key)
        for key in ("lambda_type", "warmup_factor", "warmup_epochs", "lr_min_factor")
    ]
    + [("optim",)]
    + [
        ("model", key)
        for key in (
            "name",
            "num_layers",
            "sphere_channels",
            "lmax_list",
            "mmax_list",
            "max_radius",
            "max_neighbors",
            "max_num_elements",
            "norm_type",
            "grid_resolution",
            "attn_activation",
            "weight_init",
            "alpha_drop",
            "num_heads",
            "otf_graph",
            "use_pbc",
            "regress_forces",
            "predict_noise",
            "finetune_config",
        )
    ]
    + [("model",)]
    + [
        ("outputs", "energy", "level"),
        ("outputs", "forces", "train_on_free_atoms"),
        ("outputs", "forces"),
        ("outputs", "energy"),
        ("outputs",),
    ]
    + [
        ("evaluation_metrics", "primary_metric"),
        ("evaluation_metrics", "metrics"),
        ("evaluation_metrics", "metrics", "forces"),
        ("evaluation_metrics",),
    ]
    + [("task",), ("logger",)]
)
VALUES = st.sampled_from(
    [
        _GONE,
        None,
        "text",
        "",
        "1e-3",
        -1,
        0,
        1,
        3,
        2.5,
        0.5,
        math.nan,
        math.inf,
        True,
        False,
        [],
        [1, 2],
        ["a"],
        {},
        {"a": 1},
        {"file": "nowhere.npz"},
        [{"a": 1}],
        -0.1,
        10**12,
        "adam",
        "nowhere",
    ]
)


def misspelt(path: tuple[str | int, ...], cut: int) -> Change:
    """A key with a letter less, with the value that belongs to the right one."""
    name = str(path[-1])
    cut %= len(name)
    return Change((*path[:-1], name[:cut] + name[cut + 1 :] or "x"), path[-1])


CHANGES = st.lists(
    st.one_of(
        st.builds(Change, st.sampled_from(SETTINGS), VALUES),
        st.builds(Change, st.sampled_from(SETTINGS), VALUES),
        st.builds(
            misspelt,
            st.sampled_from([path for path in SETTINGS if isinstance(path[-1], str)]),
            st.integers(0, 20),
        ),
    ),
    min_size=1,
    max_size=2,
)


def apply(change: Change, run: dict[str, Any]) -> None:
    """Change settings, where what a change is about is still there."""
    *way, last = change.path
    try:
        place = functools.reduce(operator.getitem, way, run)
        if change.value is _GONE:
            del place[last]
        else:
            place[last] = copy.deepcopy(change.value)
    except (KeyError, IndexError, TypeError):
        pass


@PROPERTY
@given(changes=CHANGES)
def test_malformed_settings(
    check: Callable[..., str], run_settings: dict[str, Any], changes: list[Change]
) -> None:
    run = copy.deepcopy(run_settings)
    run["optim"] |= {"max_epochs": 1, "eval_every": 3, "batch_size": 8}
    for change in changes:
        apply(change, run)
    named = tuple(str(part) for change in changes for part in change.path if isinstance(part, str))
    if not all(key in run for key in ("trainer", "model", "optim", "dataset")):
        return  # fairchem itself asks for these, before any trainer
    run = {"task": {}, "outputs": {}, "loss_functions": {}, "evaluation_metrics": {}, "logger": "wandb"} | run
    event(check(run, named))
