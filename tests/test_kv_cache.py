"""The static KV cache: rotation, both protocols, what must not be touched, what is refused."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from cases import CACHES
from torch._inductor.utils import run_and_get_code

import lopa_kernels as lk
from lopa_kernels import Status
from lopa_kernels.ops.kv_cache import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("cpu", "reference")


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


class Caches(NamedTuple):
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    k_window: torch.Tensor
    v_window: torch.Tensor

    def clone(self) -> Caches:
        """A copy that keeps the strides."""
        copies = []
        for tensor in self:
            size = tensor.untyped_storage().nbytes() // tensor.element_size()
            whole = tensor.as_strided((size,), (1,), 0).clone()
            copies.append(whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()))
        return Caches(*copies)

    def same(self, other: Caches) -> bool:
        """Equal, NaN to NaN, in everything that the storage holds."""
        for a, b in zip(self, other, strict=True):
            bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
            x, y = (torch.tensor(t.untyped_storage(), dtype=torch.uint8).view(bits) for t in (a, b))
            if not torch.equal(x, y):
                return False
        return True


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with heads before positions and gaps after each row."""
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), math.nan, dtype=tensor.dtype)
    wide = wide.transpose(-2, -3).contiguous().transpose(-2, -3)
    view = wide[..., : tensor.shape[-1]]
    view.copy_(tensor)
    return view


def make_caches(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous") -> Caches:
    layers, batch, branches, window, kv_heads, _, head_dim, capacity = shape
    g = torch.Generator().manual_seed(0)
    cache = (layers, batch, capacity, kv_heads, head_dim)
    windows = (layers, batch, branches, window, kv_heads, head_dim)
    tensors = [torch.randn(s, generator=g).to(dtype) for s in (cache, cache, windows, windows)]
    if layout == "strided":
        tensors = [strided(t) for t in tensors]
    return Caches(*tensors)


class Rows(NamedTuple):
    qkv: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cos_sin: torch.Tensor
    cache_len: torch.Tensor
    commit_len: torch.Tensor


def rope_table(positions: int, head_dim: int) -> torch.Tensor:
    frequency = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.outer(torch.arange(positions, dtype=torch.float64), frequency)
    return torch.cat([angle.cos(), angle.sin()], -1).float()


def make_rows(shape: tuple[int, ...], dtype: torch.dtype) -> Rows:
    _, batch, branches, window, kv_heads, q_heads, head_dim, capacity = shape
    g = torch.Generator().manual_seed(1)
    heads = q_heads + 2 * kv_heads
    qkv = torch.randn((batch, branches, window, heads * head_dim), generator=g).to(dtype)
    q, k, v = qkv.unflatten(-1, (heads, head_dim)).split([q_heads, kv_heads, kv_heads], 3)
    cache_len = torch.randint(0, capacity + 1, (batch,), generator=g, dtype=torch.int32)
    room = (capacity - cache_len).clamp(max=window)
    commit_len = (torch.rand((batch,), generator=g) * (room + 1)).int()
    return Rows(qkv, q, k, v, rope_table(capacity + window, head_dim), cache_len, commit_len)


def rotated(x: torch.Tensor, cos_sin: torch.Tensor, cache_len: torch.Tensor) -> torch.Tensor:
    """The rotation as complex multiplication in float64, from the definition."""
    half = x.shape[-1] // 2
    number = torch.complex(x.double()[..., :half], x.double()[..., half:])
    position = cache_len[:, None] + torch.arange(x.shape[2])
    turn = cos_sin.double()[position.long()]
    turn = torch.complex(turn[..., :half], turn[..., half:])[:, None, :, None]
    return torch.cat([(number * turn).real, (number * turn).imag], -1)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_reference_rotates(dtype: torch.dtype) -> None:
    rows = make_rows(CACHES[1], dtype)
    table = rows.cos_sin.double() if dtype == torch.float64 else rows.cos_sin
    turn = torch.stack([table[int(s) : int(s) + rows.k.shape[2]] for s in rows.cache_len])
    got = reference.rotate(rows.k, turn[:, None])
    expected = rotated(rows.k, table, rows.cache_len)
    error = (got.double() - expected).abs().max()
    assert error <= 4 * torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", CACHES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_prewrite(shape: tuple[int, ...], dtype: torch.dtype, layout: str, backend: str) -> None:
    rows = make_rows(shape, dtype)
    for layer in {0, shape[0] - 1}:
        caches = make_caches(shape, dtype, layout)
        expected = caches.clone()
        expected.k_window[layer] = rows.k
        expected.v_window[layer] = rows.v
        windows = caches[2:]
        assert lk.kv_prewrite_(*windows, layer, rows.k, rows.v, backend=backend) is None
        assert caches.same(expected)

        key = rotated(rows.k, rows.cos_sin, rows.cache_len)
        lk.kv_prewrite_(
            *windows, layer, rows.k, rows.v, rows.cos_sin, rows.cache_len, backend=backend
        )
        tolerance = 4 * torch.finfo(dtype).eps * float(key.abs().max())
        got = caches.k_window[layer].double()
        torch.testing.assert_close(got, key, rtol=0, atol=tolerance)
        expected.k_window[layer] = caches.k_window[layer]
        assert caches.same(expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", CACHES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("direct", [False, True])
def test_packed_cpu_is_reference_bit_for_bit(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, direct: bool
) -> None:
    rows = make_rows(shape, dtype)
    results = []
    for backend in BACKENDS:
        caches = make_caches(shape, dtype, layout)
        options: dict[str, Any] = {}
        if direct:
            options = {"direct": True, "k_cache": caches.k_cache, "v_cache": caches.v_cache}
            options |= {"commit_len": rows.commit_len}
        q = lk.qkv_prewrite_(
            *caches[2:], shape[0] - 1, rows.qkv, rows.cos_sin, rows.cache_len,
            num_heads=shape[5], backend=backend, **options,
        )  # fmt: skip
        results.append((q, caches))
    (q, caches), (expected_q, expected) = results
    assert torch.equal(q, expected_q)
    assert caches.same(expected)

    separate = make_caches(shape, dtype, layout)
    lk.kv_prewrite_(
        *separate[2:], shape[0] - 1, rows.k, rows.v, rows.cos_sin, rows.cache_len,
        **(options | {"k_cache": separate.k_cache, "v_cache": separate.v_cache} if direct else {}),
    )  # fmt: skip
    assert separate.same(caches)

    given = strided(torch.full_like(q, math.nan)) if layout == "strided" else torch.empty_like(q)
    five = rows.qkv.unflatten(-1, (-1, shape[6]))
    result = lk.qkv_prewrite_(
        *separate[2:], 0, five, rows.cos_sin, rows.cache_len, num_heads=shape[5], q=given
    )
    assert result is given
    assert torch.equal(given, q)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", CACHES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_status", [False, True])
def test_commit(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, backend: str, with_status: bool
) -> None:
    caches = make_caches(shape, dtype, layout)
    rows = make_rows(shape, dtype)
    winner = torch.arange(shape[1], dtype=torch.int32) % shape[2]
    expected = caches.clone()
    for layer in range(shape[0]):
        for b in range(shape[1]):
            for c in range(int(rows.commit_len[b])):
                to = int(rows.cache_len[b]) + c
                slot = int(winner[b])
                expected.k_cache[layer, b, to] = caches.k_window[layer, b, slot, c]
                expected.v_cache[layer, b, to] = caches.v_window[layer, b, slot, c]
    status = torch.ones(shape[1], dtype=torch.int32) if with_status else None
    result = lk.kv_commit_(
        *caches, winner, rows.cache_len, rows.commit_len, status=status, backend=backend
    )
    assert result is None
    assert caches.same(expected)
    if status is not None:
        assert (status == 1).all()


@pytest.mark.parametrize("shape", CACHES[1:], ids=str)
def test_direct_is_prewrite_and_commit_of_slot_zero(shape: tuple[int, ...]) -> None:
    rows = make_rows(shape, torch.bfloat16)
    two_phases = make_caches(shape, torch.bfloat16)
    direct = two_phases.clone()
    for layer in range(shape[0]):
        arguments = (layer, rows.k, rows.v, rows.cos_sin, rows.cache_len)
        lk.kv_prewrite_(*two_phases[2:], *arguments)
        lk.kv_prewrite_(
            *direct[2:], *arguments, direct=True, k_cache=direct.k_cache, v_cache=direct.v_cache,
            commit_len=rows.commit_len,
        )  # fmt: skip
    slots = torch.zeros(shape[1], dtype=torch.int32)
    lk.kv_commit_(*two_phases, slots, rows.cache_len, rows.commit_len)
    assert direct.same(two_phases)


BAD = (2, 3, 4, 16, 2, 4, 8, 128)
FAULTS = [
    (
        {"cache_len": int32(0, 5, 120), "commit_len": int32(3, 0, 16)},
        [0, 0, Status.CACHE_FULL],
        r"sequence 2: cache_len 120 \+ commit_len 16 = 136 exceeds the capacity 128",
    ),
    ({"cache_len": int32(0, 2**31 - 1, 5)}, [0, Status.CACHE_FULL, 0], "sequence 1: .* exceeds"),
    ({"cache_len": int32(-1, 2, 5)}, [Status.BAD_STATE, 0, 0], "sequence 0: cache_len -1 is neg"),
    ({"commit_len": int32(1, 17, 5)}, [0, Status.BAD_STATE, 0], "commit_len 17 is outside the wi"),
    ({"commit_len": int32(1, 2, -3)}, [0, 0, Status.BAD_STATE], "sequence 2: commit_len -3 is out"),
    ({"winner": int32(0, 4, 1)}, [0, Status.BAD_STATE, 0], "winner 4 is not one of the 4 branch"),
    ({"winner": int32(0, 1, -1)}, [0, 0, Status.BAD_STATE], "sequence 2: winner -1 is not one"),
]


@pytest.mark.parametrize(("change", "bits", "match"), FAULTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_commit_faults(
    change: dict[str, torch.Tensor], bits: list[int], match: str, backend: str
) -> None:
    values = {"winner": int32(0, 1, 3), "cache_len": int32(0, 9, 112), "commit_len": int32(4, 5, 6)}
    values |= change
    caches = make_caches(BAD, torch.float32)
    before = caches.clone()
    with pytest.raises(RuntimeError, match="kv_commit_: .*" + match):
        lk.kv_commit_(*caches, **values, backend=backend)
    assert caches.same(before)

    status = int32(0, 1, 0)
    lk.kv_commit_(*caches, **values, status=status, backend=backend)
    assert status.tolist() == [b | s for b, s in zip(bits, (0, 1, 0), strict=True)]
    good = {
        name: torch.where(torch.tensor(bits) == 0, tensor, 0) for name, tensor in values.items()
    }
    lk.kv_commit_(*before, **{name: t.int() for name, t in good.items()})
    assert caches.same(before)


def test_winner_of_a_sequence_that_commits_nothing_is_not_read() -> None:
    caches = make_caches(BAD, torch.float32)
    before = caches.clone()
    lk.kv_commit_(*caches, int32(-1, 9, 0), int32(0, 1, 128), int32(0, 0, 0))
    assert caches.same(before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_direct_faults(backend: str) -> None:
    """A full cache drops the cache write alone; a bad state drops the sequence."""
    rows = make_rows(BAD, torch.float32)
    caches = make_caches(BAD, torch.float32)
    before = caches.clone()
    cache_len, commit_len = int32(120, 10, 129), int32(16, 3, 0)
    options: dict[str, Any] = {
        "num_heads": 4, "direct": True, "k_cache": caches.k_cache, "v_cache": caches.v_cache,
        "commit_len": commit_len, "backend": backend,
    }  # fmt: skip
    arguments = (*caches[2:], 1, rows.qkv, rows.cos_sin, cache_len)
    with pytest.raises(RuntimeError, match=r"sequence 0: .* exceeds the capacity 128"):
        lk.qkv_prewrite_(*arguments, **options)
    assert caches.same(before)
    status = torch.zeros(3, dtype=torch.int32)
    q = lk.qkv_prewrite_(*arguments, **options, status=status)
    assert status.tolist() == [Status.CACHE_FULL, 0, Status.BAD_STATE]
    assert torch.equal(caches.k_cache[:, 0], before.k_cache[:, 0])
    assert torch.equal(caches.k_cache[1, 1, 10:13], caches.k_window[1, 1, 0, :3])
    assert torch.equal(caches.v_window[1, :2], rows.v[:2])
    assert torch.equal(caches.v_window[1, 2], before.v_window[1, 2])
    assert (q[2] == 0).all()
    assert (q[:2] != 0).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_position_past_the_table(backend: str) -> None:
    rows = make_rows(BAD, torch.float32)
    caches = make_caches(BAD, torch.float32)
    before = caches.clone()
    match = r"kv_prewrite_: sequence 1: position 144 \(cache_len 129 \+ column 15\) exceeds .*144"
    with pytest.raises(RuntimeError, match=match):
        lk.kv_prewrite_(
            *caches[2:], 0, rows.k, rows.v, rows.cos_sin, int32(128, 129, 0), backend=backend
        )
    assert caches.same(before)


ISA_SCRIPT = """
import sys, torch
import lopa_kernels as lk
assert torch.ops.lopa.cpu_isa() == sys.argv[1]
case = torch.load(sys.argv[2])
for key in ("bfloat16", "float16", "float32"):
    qkv = case["qkv"].to(getattr(torch, key))
    window = torch.zeros(1, *qkv.shape[:3], 1, qkv.shape[-1], dtype=qkv.dtype)
    q = lk.qkv_prewrite_(window, window.clone(), 0, qkv, case["cos_sin"], case["cache_len"],
                         num_heads=qkv.shape[3] - 2)
    case[key] = (q, window)
torch.save(case, sys.argv[3])
"""

ISAS = ("portable", "avx2", "avx512")


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_has_the_same_bits(isa: str, tmp_path: Any) -> None:
    """All finite fp16 values, and products that fall on every kind of rounding."""
    if ISAS.index(isa) > ISAS.index(torch.ops.lopa.cpu_isa()):
        pytest.skip(f"no {isa} here")
    g = torch.Generator().manual_seed(0)
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    halves = bits.view(torch.float16).float()
    halves = torch.where(halves.isfinite(), halves, 0)
    low = halves[torch.randperm(2**16, generator=g)].view(1, 2, 16, 32, 64)
    high = torch.randn(low.shape, generator=g) * 1e-3
    high[:, 0] = 0
    qkv = torch.cat([low[..., :37], high[..., :37]], -1)
    cos_sin = torch.rand((16, 74), generator=g) * 2 - 1
    cos_sin[0] = torch.tensor([1.0] * 37 + [0.0] * 37)
    case = {"qkv": qkv, "cos_sin": cos_sin, "cache_len": int32(0)}
    torch.save(case, tmp_path / "case")
    arguments = [sys.executable, "-c", ISA_SCRIPT, isa, tmp_path / "case", tmp_path / "result"]
    environment = {**os.environ, "LOPA_CPU_ISA": isa}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = torch.load(tmp_path / "result")
    for name in ("bfloat16", "float16", "float32"):
        x = qkv.to(getattr(torch, name))
        expected = reference.rotate(x, cos_sin[None, None])
        assert torch.equal(result[name][0], expected[:, :, :, :30])
        assert torch.equal(result[name][1][0], expected[:, :, :, 30:31])


@pytest.mark.usefixtures("restore_threads")
def test_bits_do_not_depend_on_threads() -> None:
    shape = (4, 3, 8, 64, 2, 6, 64, 256)
    rows = make_rows(shape, torch.bfloat16)
    results = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        caches = make_caches(shape, torch.bfloat16)
        for layer in range(shape[0]):
            q = lk.qkv_prewrite_(
                *caches[2:], layer, rows.qkv, rows.cos_sin, rows.cache_len, num_heads=6
            )
        lk.kv_commit_(*caches, int32(7, 0, 3), rows.cache_len, rows.commit_len)
        results.append((q, caches))
    for q, caches in results[1:]:
        assert torch.equal(q, results[0][0])
        assert caches.same(results[0][1])


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("with_status", [False, True])
def test_opcheck(layout: str, with_status: bool) -> None:
    shape = (2, 2, 3, 4, 2, 4, 8, 20)
    rows = make_rows(shape, torch.float32)
    caches = make_caches(shape, torch.float32, layout)
    winner, qkv = int32(1, 2), rows.qkv.unflatten(-1, (-1, 8))
    q = torch.zeros(2, 3, 4, 4, 8)
    status = int32(0, 0) if with_status else None
    lengths = (rows.cache_len, rows.commit_len)
    ops = torch.ops.lopa
    for op, arguments in (
        (ops.kv_prewrite_, (*caches[2:], 1, rows.k, rows.v)),
        (ops.kv_prewrite_, (*caches[2:], 1, rows.k, rows.v, rows.cos_sin, rows.cache_len)),
        (
            ops.kv_prewrite_direct_,
            (*caches[2:], *caches[:2], 1, rows.k, rows.v, *lengths, rows.cos_sin, status),
        ),
        (ops.qkv_prewrite_, (q, *caches[2:], 1, qkv, rows.cos_sin, rows.cache_len)),
        (
            ops.qkv_prewrite_direct_,
            (q, *caches[2:], *caches[:2], 1, qkv, rows.cos_sin, *lengths, status),
        ),
        (ops.kv_commit_, (*caches, winner, *lengths, status)),
    ):
        torch.library.opcheck(op.default, arguments)


def model_round(
    caches: Caches, qkv: torch.Tensor, cos_sin: torch.Tensor, cache_len: torch.Tensor,
    commit_len: torch.Tensor, length: torch.Tensor, winner: torch.Tensor, status: torch.Tensor,
) -> list[torch.Tensor]:  # fmt: skip
    """Every layer's Pre-Write and attention, then the commit: what a decoder compiles."""
    outs = []
    for layer in range(caches.k_cache.shape[0]):
        q = lk.qkv_prewrite_(
            caches.k_window, caches.v_window, layer, qkv, cos_sin, cache_len, num_heads=4
        )
        views = (tensor[layer] for tensor in caches)
        outs.append(lk.branch_attention(q, *views, cache_len, length))
    lk.kv_commit_(*caches, winner, cache_len, commit_len, status=status)
    return outs


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_round_does_not_copy_the_caches(dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(model_round, fullgraph=True, dynamic=dynamic)
    for window in (6, 16, 9) if dynamic else (6,):
        shape = (2, 2, 3, window, 2, 4, 16, 512)
        rows = make_rows(shape, torch.float32)
        caches = make_caches(shape, torch.float32)
        expected = caches.clone()
        length = torch.full((2, 3), window, dtype=torch.int32)
        arguments = (rows.qkv, rows.cos_sin, rows.cache_len, rows.commit_len, length, int32(1, 2))
        status = int32(0, 0)
        outs = model_round(expected, *arguments, status)
        got, code = run_and_get_code(compiled, caches, *arguments, status)
        assert all(torch.equal(a, b) for a, b in zip(got, outs, strict=True))
        assert caches.same(expected)
        if not code:
            continue
        body = code[0][code[0].index("def call(") :]
        for name in ("qkv_prewrite_", "branch_attention", "kv_commit_"):
            assert f"torch.ops.lopa.{name}.default(" in body
        assert "clone" not in body
        assert "copy_" not in body
        sizes = re.findall(r"empty_strided_cpu\(\(([^)]*)\)", body)
        assert sizes
        for size in sizes:
            assert len(size.split(",")) == 5, f"a buffer beside the queries: {size}"


def test_numpy_arrays() -> None:
    shape = CACHES[1]
    rows = make_rows(shape, torch.float32)
    expected = make_caches(shape, torch.float32)
    arrays = Caches(*(t.clone().numpy() for t in expected))
    winner = int32(0, 1, 2)
    q = lk.qkv_prewrite_(
        *expected[2:], 1, rows.qkv, rows.cos_sin, rows.cache_len, num_heads=shape[5]
    )
    lk.kv_commit_(*expected, winner, rows.cache_len, rows.commit_len)
    table, start = rows.cos_sin.numpy(), rows.cache_len.numpy()
    got = lk.qkv_prewrite_(*arrays[2:], 1, rows.qkv.numpy(), table, start, num_heads=shape[5])
    lk.kv_commit_(*arrays, winner.numpy(), start, rows.commit_len.numpy())
    assert isinstance(got, np.ndarray)
    np.testing.assert_array_equal(got, q.numpy())
    for array, tensor in zip(arrays, expected, strict=True):
        np.testing.assert_array_equal(array, tensor.numpy())


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"k_window": torch.zeros(3, 4, 16, 2, 8)}, ValueError, "k_window: expected 6 dimensions"),
        ({"k_window": torch.zeros(2, 3, 4, 16, 2, 8).int()}, TypeError, "k_window: expected dtype"),
        ({"v_window": torch.zeros(2, 3, 4, 15, 2, 8)}, ValueError, "v_window: expected shape"),
        ({"k": torch.zeros(3, 4, 16, 2, 8).half()}, TypeError, "k: expected dtype torch.float32"),
        ({"v": torch.zeros(3, 4, 16, 8, 2).mT}, ValueError, "v: expected unit stride"),
        ({"layer": 2}, ValueError, "layer: expected 0 to 1, got 2"),
        ({"layer": -1}, ValueError, "layer: expected 0 to 1, got -1"),
        ({"cos_sin": torch.zeros(99, 7)}, ValueError, r"cos_sin: expected shape \[99, 8\]"),
        ({"cos_sin": torch.zeros(99, 8).half()}, TypeError, "cos_sin: expected dtype"),
        ({"cache_len": None}, ValueError, "cache_len: expected a tensor, since cos_sin is given"),
        ({"cache_len": torch.zeros(3)}, TypeError, "cache_len: expected dtype torch.int32"),
        ({"commit_len": int32(0, 0, 0)}, ValueError, "commit_len: only for direct=True"),
        ({"direct": True}, ValueError, "k_cache, v_cache, commit_len: needed for direct=True"),
    ],
)  # fmt: skip
def test_bad_prewrite(change: dict[str, Any], error: type[Exception], match: str) -> None:
    rows = make_rows(BAD, torch.float32)
    caches = make_caches(BAD, torch.float32)
    arguments = {
        "k_window": caches.k_window, "v_window": caches.v_window, "layer": 0, "k": rows.k,
        "v": rows.v, "cos_sin": rows.cos_sin, "cache_len": rows.cache_len, **change,
    }  # fmt: skip
    with pytest.raises(error, match="kv_prewrite_: " + match):
        lk.kv_prewrite_(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"qkv": torch.zeros(3, 4, 16, 65)}, ValueError, r"qkv: expected shape \[3, 4, 16, 64\]"),
        ({"num_heads": 3}, ValueError, r"qkv: expected shape \[3, 4, 16, 56\]"),
        ({"num_heads": 0}, ValueError, "num_heads: expected 1 or more, got 0"),
        ({"q": torch.zeros(3, 4, 16, 4, 7)}, ValueError, "q: expected shape"),
    ],
)
def test_bad_packed_prewrite(change: dict[str, Any], error: type[Exception], match: str) -> None:
    rows = make_rows(BAD, torch.float32)
    caches = make_caches(BAD, torch.float32)
    arguments = {
        "k_window": caches.k_window, "v_window": caches.v_window, "layer": 0, "qkv": rows.qkv,
        "cos_sin": rows.cos_sin, "cache_len": rows.cache_len, "num_heads": 4, **change,
    }  # fmt: skip
    with pytest.raises(error, match="qkv_prewrite_: " + match):
        lk.qkv_prewrite_(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"k_cache": torch.zeros(2, 3, 128, 2)}, ValueError, "k_cache: expected 5 dimensions"),
        ({"v_cache": torch.zeros(2, 3, 127, 2, 8)}, ValueError, "v_cache: expected shape"),
        ({"winner": torch.zeros(3).long()}, TypeError, "winner: expected dtype torch.int32"),
        ({"commit_len": int32(0, 0)}, ValueError, r"commit_len: expected shape \[3\]"),
        ({"status": torch.zeros(3)}, TypeError, "status: expected dtype torch.int32"),
    ],
)
def test_bad_commit(change: dict[str, Any], error: type[Exception], match: str) -> None:
    zeros = {name: int32(0, 0, 0) for name in ("winner", "cache_len", "commit_len")}
    arguments = {**make_caches(BAD, torch.float32)._asdict(), **zeros, **change}
    with pytest.raises(error, match="kv_commit_: " + match):
        lk.kv_commit_(**arguments)


def test_bad_input_through_torch_ops() -> None:
    caches = make_caches(BAD, torch.float32)
    zeros = int32(0, 0, 0)
    with pytest.raises(RuntimeError, match="k_cache: expected dtype Float"):
        torch.ops.lopa.kv_commit_(caches.k_cache.double(), *caches[1:], zeros, zeros, zeros)
    with pytest.raises(RuntimeError, match="cache_len: expected shape"):
        torch.ops.lopa.kv_commit_(*caches, zeros, int32(0), zeros)
    rows = make_rows(BAD, torch.float32)
    with pytest.raises(RuntimeError, match="layer: expected 0 to 1, got 7"):
        torch.ops.lopa.kv_prewrite_(*caches[2:], 7, rows.k, rows.v)
