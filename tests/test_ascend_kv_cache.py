"""The KV cache's AscendC kernels on emulated cores: the reference's bits, whatever the cores."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest
import torch
from ascend import ascend  # noqa: F401
from caches import DTYPES, Caches, int32, make_caches, make_rows, rotated

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


#: of which the squares' halves are less than a repeat, one, more and no power of two
NORM_SHAPES = {
    **SHAPES,
    "half of 40": (1, 2, 2, 3, 2, 4, 80, 8),
    "half of 72": (1, 1, 2, 3, 1, 2, 144, 8),
    "more heads than at once": (1, 1, 1, 3, 2, 70, 64, 8),
}
PACKED = ("q", "k_window", "v_window")
DIRECT = (*PACKED, "k_cache", "v_cache")


def norm_weights(head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    q_norm, k_norm = (1 + torch.randn(2, head_dim, generator=g) / 4).to(dtype)
    return q_norm, k_norm


class TestNorms:
    """RMSNorm of queries and keys ahead of the rotation."""

    @over_dtypes
    @pytest.mark.parametrize("shape", NORM_SHAPES.values(), ids=NORM_SHAPES)
    def test_bits(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        case = Case(shape, dtype)
        rows = case.rows
        arguments = (shape[0] - 1, rows.qkv, rows.cos_sin, rows.cache_len)
        norms = (*norm_weights(shape[6], dtype), 1e-5)
        case.check("qkv_prewrite_", *PACKED, *arguments, *norms)
        direct = (*DIRECT, *arguments, rows.commit_len, "status")
        case.check("qkv_prewrite_direct_", *direct, *norms)

    @pytest.mark.parametrize("head_dim", [16, 80, 128, 256])
    def test_against_doubles(self, head_dim: int) -> None:
        shape = (1, 2, 2, 3, 2, 6, head_dim, 16)
        case = Case(shape, torch.float32)
        rows, eps = case.rows, 0.25
        q_norm, k_norm = norm_weights(head_dim, torch.float32)
        cache_len = int32(3, 7)
        arguments = (*PACKED, 0, rows.qkv, rows.cos_sin, cache_len, q_norm, k_norm, eps)
        got = case.run("qkv_prewrite_", emulated, arguments, {})
        for x, weight, y in ((rows.q, q_norm, got["q"]), (rows.k, k_norm, got["k_window"][0])):
            x = x.double()
            x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
            expected = rotated(x, rows.cos_sin, cache_len)
            torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=2e-6)
        assert same(got["v_window"][0], rows.v)

    def test_queries_and_keys_have_weights_of_their_own(self) -> None:
        shape = SHAPES["grouped"]
        case = Case(shape, torch.bfloat16)
        rows, arguments = case.rows, (0, case.rows.qkv, case.rows.cos_sin, int32(1, 2, 3))
        q_norm, k_norm = norm_weights(shape[6], torch.bfloat16)
        first = case.run("qkv_prewrite_", emulated, (*PACKED, *arguments, q_norm, k_norm), {})
        other = case.run("qkv_prewrite_", emulated, (*PACKED, *arguments, k_norm, k_norm), {})
        assert not same(first["q"], other["q"])
        assert same(first["k_window"], other["k_window"])
        assert same(first["v_window"][0], rows.v)

    def test_a_head_that_is_not_finite_keeps_to_itself(self) -> None:
        shape = (1, 1, 1, 2, 1, 9, 64, 4)
        case = Case(shape, torch.float32)
        rows, norms = case.rows, norm_weights(64, torch.float32)
        arguments = (*PACKED, 0, rows.qkv, rows.cos_sin, int32(0), *norms)
        clean = case.run("qkv_prewrite_", emulated, arguments, {})
        rows.q[0, 0, 0, 3, 5], rows.q[0, 0, 1, 8, 0], rows.q[0, 0, 1, 0] = math.nan, math.inf, 0
        case.check("qkv_prewrite_", *PACKED, 0, rows.qkv, rows.cos_sin, int32(0), *norms, cores=1)
        got = case.run("qkv_prewrite_", emulated, arguments, {})
        assert got["q"][0, 0, 0, 3].isnan().all()
        assert got["q"][0, 0, 1, 8].isnan().any()
        assert (got["q"][0, 0, 1, 0] == 0).all()
        left = torch.ones(2, 9, dtype=torch.bool)
        left[0, 3] = left[1, 8] = left[1, 0] = False
        assert same(got["q"][0, 0][left], clean["q"][0, 0][left])
        assert same(got["k_window"], clean["k_window"])

    @pytest.mark.parametrize("cores", CORES)
    def test_bits_do_not_depend_on_the_cores(self, cores: int) -> None:
        case = Case(DREAM, torch.bfloat16)
        rows = case.rows
        arguments = (*DIRECT, 1, rows.qkv, rows.cos_sin, int32(5), int32(16), "status")
        norms = norm_weights(DREAM[6], torch.bfloat16)
        case.check("qkv_prewrite_direct_", *arguments, *norms, cores=cores)

    def test_a_sequence_that_is_dropped(self) -> None:
        case = Case(SHAPES["grouped"], torch.float16)
        rows, lengths = case.rows, (int32(-1, 20, 24), int32(2, 5, 0))
        arguments = (*DIRECT, 1, rows.qkv, rows.cos_sin, *lengths, "status")
        norms = norm_weights(case.shape[6], torch.float16)
        case.check("qkv_prewrite_direct_", *arguments, *norms)
        got = case.run("qkv_prewrite_direct_", emulated, (*arguments, *norms), {})
        assert got["status"].tolist() == [int(Status.BAD_STATE), int(Status.CACHE_FULL), 0]
        assert (got["q"][0] == 0).all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_they_fit_beside_any_tile(self, dtype: torch.dtype) -> None:
        """More columns and heads than fit: the launch is an error where memory is short."""
        for head_dim in range(16, 257, 48):
            shape = (1, 1, 1, 2, 1, 12288 // head_dim, head_dim, 4)
            case = Case(shape, dtype)
            rows, norms = case.rows, norm_weights(head_dim, dtype)
            arguments = (*PACKED, 0, rows.qkv, rows.cos_sin, int32(0), *norms)
            case.check("qkv_prewrite_", *arguments, cores=1)

    @pytest.mark.parametrize("eps", [0.0, -1e-6, 1e-60, math.inf, math.nan])
    def test_eps_that_is_refused(self, eps: float) -> None:
        case = Case(SHAPES["one"], torch.float32)
        rows, norms = case.rows, norm_weights(64, torch.float32)
        arguments = (*PACKED, 0, rows.qkv, rows.cos_sin, int32(0), *norms, eps)
        with pytest.raises(ValueError, match="norm_eps: expected above 0"):
            case.run("qkv_prewrite_", emulated, arguments, {})


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
