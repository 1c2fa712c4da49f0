"""The KV cache's AscendC kernels on emulated cores: the reference's bits, whatever the cores."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest
import torch
from ascend import ascend  # noqa: F401
from caches import DTYPES, Caches, int32, make_caches, make_rows

from ascend_ops.emulator import kv_cache as emulated
from lopa_kernels import Status
from lopa_kernels.ops.kv_cache import reference

CORES = (1, 2, 7, 20, 40)
#: (layers, batch, branches, window, kv_heads, q_heads, head_dim, capacity)
SHAPES = {
    "one": (1, 1, 1, 1, 1, 1, 64, 4),
    "grouped": (2, 3, 2, 5, 2, 6, 128, 24),
    "odd heads": (2, 2, 3, 7, 3, 3, 64, 16),
    "small head": (1, 2, 2, 3, 1, 2, 16, 9),
    "wide head": (1, 1, 2, 3, 2, 4, 256, 8),
}
#: of Dream-7B and LLaDA-8B
DREAM = (2, 1, 3, 20, 4, 28, 128, 64)
LLADA = (2, 1, 2, 9, 32, 32, 128, 32)

pytestmark = pytest.mark.usefixtures("ascend")

over_shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal bit for bit, NaN included."""
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, math.nan, dtype=dtype)


def queries(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    _, batch, branches, window, _, q_heads, head_dim, _ = shape
    return poisoned((batch, branches, window, q_heads, head_dim), dtype)


class Case:
    """Inputs of one shape, whose operators run on the emulator and on the reference."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
        self.caches = make_caches(shape, dtype)
        rows = make_rows(shape, dtype)
        self.rows = rows._replace(qkv=rows.qkv.unflatten(-1, (-1, shape[6])))

    def check(self, op: str, *args: Any, cores: int = 7, **options: Any) -> None:
        """`args` and `options` may name caches, queries and the status by their field."""
        expected = self.run(op, reference, args, options)
        got = self.run(op, emulated, args, {**options, "cores": cores})
        for name, value in expected.items():
            assert same(value, got[name]), name

    def run(
        self, op: str, where: ModuleType, args: tuple[Any, ...], options: dict[str, Any]
    ) -> dict[str, torch.Tensor]:
        caches = self.caches.clone()
        named = {**caches._asdict(), "q": queries(self.shape, self.dtype)}
        named["status"] = torch.zeros(self.shape[1], dtype=torch.int32)

        def value(argument: Any) -> Any:
            return named[argument] if isinstance(argument, str) else argument

        function = getattr(where, op)
        function(*map(value, args), **{name: value(v) for name, v in options.items()})
        return named


@over_dtypes
@over_shapes
class TestPrewrite:
    def test_packed(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        case = Case(shape, dtype)
        rows = case.rows
        arguments = (shape[0] - 1, rows.qkv, rows.cos_sin, rows.cache_len)
        case.check("qkv_prewrite_", "q", "k_window", "v_window", *arguments)

    def test_packed_and_direct(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        case = Case(shape, dtype)
        rows = case.rows
        lengths = rows.cache_len, rows.commit_len
        case.check(
            "qkv_prewrite_direct_", "q", "k_window", "v_window", "k_cache", "v_cache", shape[0] - 1,
            rows.qkv, rows.cos_sin, *lengths, "status",
        )  # fmt: skip

    def test_keys_and_values(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        case = Case(shape, dtype)
        rows = case.rows
        copied = ("k_window", "v_window", 0, rows.k, rows.v)
        case.check("kv_prewrite_", *copied)
        case.check("kv_prewrite_", *copied, None, rows.cache_len)
        case.check("kv_prewrite_", *copied, rows.cos_sin, rows.cache_len)

    def test_keys_and_values_direct(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        case = Case(shape, dtype)
        rows = case.rows
        arguments = ("k_window", "v_window", "k_cache", "v_cache", 0, rows.k, rows.v)
        lengths = rows.cache_len, rows.commit_len
        case.check("kv_prewrite_direct_", *arguments, *lengths, None, "status")
        case.check("kv_prewrite_direct_", *arguments, *lengths, rows.cos_sin, "status")


@over_dtypes
@over_shapes
def test_commit(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    case = Case(shape, dtype)
    winner = torch.arange(shape[1], dtype=torch.int32) % shape[2]
    lengths = case.rows.cache_len, case.rows.commit_len
    case.check("kv_commit_", *Caches._fields, winner, *lengths, "status")


@pytest.mark.parametrize("cores", CORES)
def test_results_do_not_depend_on_the_cores(cores: int) -> None:
    for shape in (DREAM, LLADA):
        case = Case(shape, torch.bfloat16)
        rows = case.rows
        lengths = int32(5), int32(min(shape[3], 16))
        case.check(
            "qkv_prewrite_direct_", "q", "k_window", "v_window", "k_cache", "v_cache", 1, rows.qkv,
            rows.cos_sin, *lengths, "status", cores=cores,
        )  # fmt: skip
        case.check("kv_commit_", *Caches._fields, int32(1), *lengths, "status", cores=cores)


def test_a_column_that_does_not_fit_is_cut_by_heads() -> None:
    shape = (1, 1, 1, 2, 2, 80, 256, 8)
    case = Case(shape, torch.float32)
    tiling = emulated.module().kv_prewrite_tiling(
        shape, 4, layer=0, positions=10, rotates=True, has_cache_len=True, cores=2
    )
    assert 0 < tiling["heads"] < 80
    rows = case.rows
    case.check("qkv_prewrite_", "q", "k_window", "v_window", 0, rows.qkv, rows.cos_sin, int32(3))
    dropped = ("q", "k_window", "v_window", 0, rows.qkv, rows.cos_sin, int32(9))
    got = case.run("qkv_prewrite_", emulated, dropped, {})
    assert (got["q"] == 0).all()
    assert same(got["k_window"], case.caches.k_window)


def test_nan_and_infinity_are_copied() -> None:
    case = Case(SHAPES["grouped"], torch.bfloat16)
    for tensor in (case.rows.k, case.rows.v, case.caches.k_window):
        tensor.view(torch.int16).flatten()[:4] = torch.tensor([0x7FC1, 0x7F80, -0x0080, -0x8000])
    rows = case.rows
    case.check("kv_prewrite_", "k_window", "v_window", 0, rows.k, rows.v)
    lengths = int32(0, 4, 8), int32(5, 5, 5)
    case.check("kv_commit_", *Caches._fields, int32(0, 1, 0), *lengths, "status")


class TestFaults:
    """A sequence that does not fit is dropped, and nothing is written out of bounds."""

    SHAPE = SHAPES["grouped"]
    # W = 5, S = 24; positions of cos_sin: 29
    LENGTHS = (
        (int32(-1, 20, 24), int32(2, 5, 0), (Status.BAD_STATE, Status.CACHE_FULL, Status.OK)),
        (int32(0, 19, 25), int32(-1, 5, 1), (Status.BAD_STATE, Status.OK, Status.BAD_STATE)),
        (int32(23, 2**31 - 1, 0), int32(1, 5, 6), (Status.OK, Status.BAD_STATE, Status.BAD_STATE)),
    )

    @pytest.mark.parametrize(("cache_len", "commit_len", "bits"), LENGTHS)
    @pytest.mark.parametrize("cores", [1, 7])
    def test_prewrite(
        self, cache_len: torch.Tensor, commit_len: torch.Tensor, bits: tuple[int, ...], cores: int
    ) -> None:
        case = Case(self.SHAPE, torch.float16)
        arguments = (1, case.rows.qkv, case.rows.cos_sin, cache_len, commit_len)
        names = ("q", "k_window", "v_window", "k_cache", "v_cache")
        case.check("qkv_prewrite_direct_", *names, *arguments, "status", cores=cores)
        got = case.run("qkv_prewrite_direct_", emulated, (*names, *arguments, "status"), {})
        assert got["status"].tolist() == [int(bit) for bit in bits]
        for b, bit in enumerate(bits):
            assert (got["q"][b] == 0).all() == (bit == Status.BAD_STATE)

    def test_commit(self) -> None:
        case = Case(self.SHAPE, torch.bfloat16)
        bad = ((2, 0, -1), (0, 23, 3), (1, 2, 1)), ((2, 2, 0), (5, 2**31 - 1, -3), (0, 5, 1))
        statuses = ((4, 16, 4), (0, 16, 4))
        for (winner, cache_len, commit_len), bits in zip(bad, statuses, strict=True):
            lengths = int32(*winner), int32(*cache_len), int32(*commit_len)
            case.check("kv_commit_", *Caches._fields, *lengths, "status")
            got = case.run("kv_commit_", emulated, (*Caches._fields, *lengths, "status"), {})
            assert got["status"].tolist() == list(bits)

    def test_status_bits_are_added(self) -> None:
        case = Case(self.SHAPE, torch.bfloat16)
        status = int32(int(Status.NONFINITE), 0, int(Status.STALLED))
        caches = case.caches.clone()
        emulated.kv_commit_(*caches, int32(0, 0, 0), int32(22, 0, -1), int32(5, 5, 5), status)
        assert status.tolist() == [1 | 16, 0, 32 | 4]

    def test_more_sequences_than_a_chunk(self) -> None:
        shape = (1, 67, 2, 2, 1, 1, 16, 4)
        case = Case(shape, torch.float32)
        g = torch.Generator().manual_seed(2)
        lengths = [torch.randint(-1, 5, (67,), generator=g, dtype=torch.int32) for _ in range(2)]
        winner = torch.randint(-1, 3, (67,), generator=g, dtype=torch.int32)
        case.check("kv_commit_", *Caches._fields, winner, *lengths, "status")
        names = ("q", "k_window", "v_window", "k_cache", "v_cache")
        arguments = (0, case.rows.qkv, case.rows.cos_sin, *lengths, "status")
        case.check("qkv_prewrite_direct_", *names, *arguments)


class TestTiling:
    def test_shapes_that_are_refused(self) -> None:
        module = emulated.module()
        for head_dim in (8, 24, 272):
            with pytest.raises(
                ValueError, match="head_dim: expected a multiple of 16, at most 256"
            ):
                module.kv_commit_tiling((1, 1, 1, 1, 1, 0, head_dim, 1), 2, cores=1)
        with pytest.raises(ValueError, match="kv_heads: expected 1 or more"):
            module.kv_commit_tiling((1, 1, 1, 1, 0, 0, 64, 1), 2, cores=1)
        with pytest.raises(ValueError, match="a column exceeds 2 MiB"):
            module.kv_commit_tiling((1, 1, 1, 1, 8192, 0, 256, 1), 2, cores=1)

    def test_a_small_window_leaves_cores_idle(self) -> None:
        module = emulated.module()
        tiling = module.kv_prewrite_tiling(
            (1, 1, 2, 3, 4, 28, 128, 0), 2, layer=0, positions=9, rotates=True, has_cache_len=True,
            cores=40,
        )  # fmt: skip
        assert tiling["cores"] == 6
        assert tiling["columns"] == 1


def test_the_report_counts_what_was_moved() -> None:
    layers, _, _, _, kv_heads, _, head_dim, _ = DREAM
    caches = make_caches(DREAM, torch.bfloat16)
    report = emulated.kv_commit_(*caches, int32(2), int32(3), int32(16), cores=20)
    moved = 2 * layers * 16 * kv_heads * head_dim * 2
    assert report["local_to_gm"] == moved
    # And the lengths, which every core reads.
    assert moved < report["gm_to_local"] <= moved + 20 * 3 * 32
    assert report["vector_repeats"] == 0
    assert report["peak_ub"] <= 192 * 1024 - 256 - 8192


def test_the_same_bits_again() -> None:
    case = Case(SHAPES["odd heads"], torch.bfloat16)
    rows = case.rows
    arguments = ("q", "k_window", "v_window", 0, rows.qkv, rows.cos_sin, rows.cache_len)
    first, second = (case.run("qkv_prewrite_", emulated, arguments, {}) for _ in range(2))
    assert all(same(first[name], second[name]) for name in first)
