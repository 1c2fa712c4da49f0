"""The static KV cache: rotation, both protocols, what must not be touched; graphs, compilers."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from caches import (
    DTYPES,
    Caches,
    Rows,
    int32,
    make_caches,
    make_rows,
    rotated,
    strided,
)
from cases import CACHES, moved, operator
from gpu import capture, needs_memory
from targets import GPU_TARGETS, KERNELS, TARGETS, Target, cpu, needs_gpu, over
from torch._inductor.utils import run_and_get_code

import lopa_kernels as lk
from lopa_kernels.ops.kv_cache import reference

REFERENCE = Target("reference", "cpu")


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
def test_reference_rotates(dtype: torch.dtype) -> None:
    rows = make_rows(CACHES[1], dtype)
    table = rows.cos_sin.double() if dtype == torch.float64 else rows.cos_sin
    turn = torch.stack([table[int(s) : int(s) + rows.k.shape[2]] for s in rows.cache_len])
    got = reference.rotate(rows.k, turn[:, None])
    expected = rotated(rows.k, table, rows.cache_len)
    error = (got.double() - expected).abs().max()
    assert error <= 4 * torch.finfo(dtype).eps * expected.abs().max()


def skip_slow(
    target: Target, shape: tuple[int, ...], dtype: torch.dtype, layout: str, direct: bool = False
) -> None:
    """Triton's interpreter sees the larger shapes in few forms."""
    few = direct and dtype == torch.bfloat16 and layout == "strided"
    slow = shape == CACHES[2] or (shape == CACHES[1] and layout == "strided")
    if target.interpreted and slow and not few:
        pytest.skip("too long for Triton's interpreter")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", CACHES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@over(TARGETS)
def test_prewrite(shape: tuple[int, ...], dtype: torch.dtype, layout: str, target: Target) -> None:
    skip_slow(target, shape, dtype, layout)
    rows = make_rows(shape, dtype)
    here = moved(rows, target.device)
    for layer in {0, shape[0] - 1}:
        caches = moved(make_caches(shape, dtype, layout), target.device)
        expected = moved(caches.clone(), "cpu")
        expected.k_window[layer] = rows.k
        expected.v_window[layer] = rows.v
        arguments = (*caches[2:], layer, here.k, here.v)
        assert lk.kv_prewrite_(*arguments, backend=target.backend) is None
        assert caches.same(expected)

        key = rotated(rows.k, rows.cos_sin, rows.cache_len)
        lk.kv_prewrite_(*arguments, here.cos_sin, here.cache_len, backend=target.backend)
        tolerance = 4 * torch.finfo(dtype).eps * float(key.abs().max())
        got = cpu(caches.k_window[layer])
        torch.testing.assert_close(got.double(), key, rtol=0, atol=tolerance)
        expected.k_window[layer] = got
        assert caches.same(expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", CACHES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("direct", [False, True])
@over(KERNELS)
def test_packed_is_reference_bit_for_bit(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, direct: bool, target: Target
) -> None:
    skip_slow(target, shape, dtype, layout, direct)
    results = []
    for where in (target, REFERENCE):
        rows = moved(make_rows(shape, dtype), where.device)
        caches = moved(make_caches(shape, dtype, layout), where.device)
        options: dict[str, Any] = {"backend": where.backend}
        if direct:
            options |= {"direct": True, "k_cache": caches.k_cache, "v_cache": caches.v_cache}
            options |= {"commit_len": rows.commit_len}
        q = lk.qkv_prewrite_(
            *caches[2:], shape[0] - 1, rows.qkv, rows.cos_sin, rows.cache_len,
            num_heads=shape[5], **options,
        )  # fmt: skip
        results.append((q, caches))
    (q, caches), (expected_q, expected) = results
    assert torch.equal(cpu(q), expected_q)
    assert caches.same(expected)

    rows = moved(make_rows(shape, dtype), target.device)
    separate = moved(make_caches(shape, dtype, layout), target.device)
    if direct:
        options |= {"k_cache": separate.k_cache, "v_cache": separate.v_cache}
        options |= {"commit_len": rows.commit_len}
    options["backend"] = target.backend
    lk.kv_prewrite_(
        *separate[2:], shape[0] - 1, rows.k, rows.v, rows.cos_sin, rows.cache_len, **options
    )
    assert separate.same(caches)

    given = torch.full_like(expected_q, math.nan)
    given = moved(strided(given) if layout == "strided" else given, target.device)
    five = rows.qkv.unflatten(-1, (-1, shape[6]))
    result = lk.qkv_prewrite_(
        *separate[2:], 0, five, rows.cos_sin, rows.cache_len, num_heads=shape[5], q=given,
        backend=target.backend,
    )  # fmt: skip
    assert result is given
    assert torch.equal(cpu(given), expected_q)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", CACHES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("with_status", [False, True])
@over(TARGETS)
def test_commit(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, with_status: bool, target: Target
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
    caches = moved(caches, target.device)
    lengths = target.to((winner, rows.cache_len, rows.commit_len))
    status = target.to(torch.ones(shape[1], dtype=torch.int32)) if with_status else None
    assert lk.kv_commit_(*caches, *lengths, status=status, backend=target.backend) is None
    assert caches.same(expected)
    if status is not None:
        assert (status == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [1, 3, 12, 20, 33, 128])
@over(KERNELS)
def test_every_width_of_access(dtype: torch.dtype, head_dim: int, target: Target) -> None:
    """Head dimensions and first elements that are not a multiple of a vector, in every tensor."""
    shape = (2, 2, 3, 5, 3, 1, head_dim, 11)
    for offset in (0, 1, 2, 4):
        results = []
        for where in (target, REFERENCE):
            wide = make_caches((*shape[:6], head_dim + 8, 11), dtype)
            caches = Caches(
                *(t[..., offset : offset + head_dim] for t in moved(wide, where.device))
            )
            k, v = torch.randn((2, 2, 3, 5, 3, head_dim), generator=torch.manual_seed(0)).to(dtype)
            lengths = where.to((int32(2, 1), int32(3, 0), int32(5, 4)))
            for layer in range(2):
                lk.kv_prewrite_(*caches[2:], layer, *where.to((k, v)), backend=where.backend)
            lk.kv_commit_(*caches, *lengths, backend=where.backend)
            results.append(caches)
        assert results[0].same(results[1])


@pytest.mark.parametrize("shape", CACHES[1:], ids=str)
@over(TARGETS)
def test_direct_is_prewrite_and_commit_of_slot_zero(shape: tuple[int, ...], target: Target) -> None:
    if target.interpreted and shape == CACHES[2]:
        pytest.skip("too long for Triton's interpreter")
    rows = moved(make_rows(shape, torch.bfloat16), target.device)
    two_phases = moved(make_caches(shape, torch.bfloat16), target.device)
    direct = two_phases.clone()
    for layer in range(shape[0]):
        arguments = (layer, rows.k, rows.v, rows.cos_sin, rows.cache_len)
        lk.kv_prewrite_(*two_phases[2:], *arguments, backend=target.backend)
        lk.kv_prewrite_(
            *direct[2:], *arguments, direct=True, k_cache=direct.k_cache, v_cache=direct.v_cache,
            commit_len=rows.commit_len, backend=target.backend,
        )  # fmt: skip
    slots = target.to(torch.zeros(shape[1], dtype=torch.int32))
    lk.kv_commit_(*two_phases, slots, rows.cache_len, rows.commit_len, backend=target.backend)
    assert direct.same(two_phases)


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@over(TARGETS)
def test_nothing_but_the_committed_columns_is_touched(layout: str, target: Target) -> None:
    """All of the caches is NaN, and all that must not be read."""
    shape = (2, 4, 3, 6, 2, 2, 8, 16)
    winner, cache_len, commit_len = int32(2, 0, 9, 1), int32(3, 16, 5, 0), int32(6, 0, 0, 1)
    caches = make_caches(shape, torch.bfloat16, layout)
    values = caches.clone()
    for tensor in caches:
        tensor.fill_(math.nan)
    for b, (slot, count) in enumerate(zip(winner.tolist(), commit_len.tolist(), strict=True)):
        if count > 0:
            caches.k_window[:, b, slot, :count] = values.k_window[:, b, slot, :count]
            caches.v_window[:, b, slot, :count] = values.v_window[:, b, slot, :count]
    expected = caches.clone()
    for b, (slot, start, count) in enumerate(((2, 3, 6), (0, 0, 0), (0, 0, 0), (1, 0, 1))):
        to = slice(start, start + count)
        expected.k_cache[:, b, to] = values.k_window[:, b, slot, :count]
        expected.v_cache[:, b, to] = values.v_window[:, b, slot, :count]
    caches = moved(caches, target.device)
    lengths = target.to((winner, cache_len, commit_len))
    lk.kv_commit_(*caches, *lengths, backend=target.backend)
    assert caches.same(expected)


def every_half() -> tuple[torch.Tensor, torch.Tensor]:
    """All finite fp16 values, and products that fall on every kind of rounding; a table."""
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
    return qkv, cos_sin


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@over(KERNELS)
def test_rounds_as_the_reference(dtype: torch.dtype, target: Target) -> None:
    qkv, cos_sin = every_half()
    qkv = qkv.to(dtype)
    window = torch.full_like(qkv[None, :, :, :, :1], math.nan)
    window, table, packed, start = target.to((window, cos_sin, qkv, int32(0)))
    q = lk.qkv_prewrite_(
        window, window.clone(), 0, packed, table, start, num_heads=30, backend=target.backend
    )
    expected = reference.rotate(qkv, cos_sin[None, None])
    assert torch.equal(cpu(q), expected[:, :, :, :30])
    assert torch.equal(cpu(window[0]), expected[:, :, :, 30:31])


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
    if ISAS.index(isa) > ISAS.index(torch.ops.lopa.cpu_isa()):
        pytest.skip(f"no {isa} here")
    qkv, cos_sin = every_half()
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
@over(KERNELS)
def test_opcheck(layout: str, with_status: bool, target: Target) -> None:
    if target.interpreted:
        pytest.skip("too long for Triton's interpreter; test_operators.py has one of each")
    shape = (2, 2, 3, 4, 2, 4, 8, 20)
    rows = moved(make_rows(shape, torch.float32), target.device)
    caches = moved(make_caches(shape, torch.float32, layout), target.device)
    winner, status, q = target.to((int32(1, 2), int32(0, 0), torch.zeros(2, 3, 4, 4, 8)))
    qkv = rows.qkv.unflatten(-1, (-1, 8))
    status = status if with_status else None
    lengths = (rows.cache_len, rows.commit_len)
    for name, arguments in (
        ("kv_prewrite_", (*caches[2:], 1, rows.k, rows.v)),
        ("kv_prewrite_", (*caches[2:], 1, rows.k, rows.v, rows.cos_sin, rows.cache_len)),
        (
            "kv_prewrite_direct_",
            (*caches[2:], *caches[:2], 1, rows.k, rows.v, *lengths, rows.cos_sin, status),
        ),
        ("qkv_prewrite_", (q, *caches[2:], 1, qkv, rows.cos_sin, rows.cache_len)),
        (
            "qkv_prewrite_direct_",
            (q, *caches[2:], *caches[:2], 1, qkv, rows.cos_sin, *lengths, status),
        ),
        ("kv_commit_", (*caches, winner, *lengths, status)),
    ):
        torch.library.opcheck(operator(target, name), arguments)


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


def play(target: Target, caches: Caches, rows: Rows, lengths: list[torch.Tensor]) -> torch.Tensor:
    """A round of the cache: every layer's Pre-Write, the last one also direct, and the commit."""
    winner, cache_len, commit_len, status = lengths
    for layer in range(caches.k_window.shape[0]):
        q = lk.qkv_prewrite_(
            *caches[2:], layer, rows.qkv, rows.cos_sin, cache_len, num_heads=6,
            backend=target.backend,
        )  # fmt: skip
    lk.kv_commit_(*caches, winner, cache_len, commit_len, status=status, backend=target.backend)
    lk.kv_prewrite_(
        *caches[2:], 0, rows.k, rows.v, rows.cos_sin, cache_len, direct=True,
        k_cache=caches.k_cache, v_cache=caches.v_cache, commit_len=commit_len, status=status,
        backend=target.backend,
    )  # fmt: skip
    return q


@over(GPU_TARGETS)
def test_graph_replays_with_new_lengths_and_contents(target: Target) -> None:
    shape = CACHES[1]
    caches = moved(make_caches(shape, torch.bfloat16), target.device)
    rows = moved(make_rows(shape, torch.bfloat16), target.device)
    lengths = target.to([int32(0, 1, 2), rows.cache_len, rows.commit_len, int32(0, 0, 0)])
    play(target, caches, rows, lengths)
    graph, q = capture(lambda: play(target, caches, rows, lengths))
    status = int32(0, 0, 0)
    for winner, cache_len, commit_len in (
        (int32(3, 0, 1), int32(0, 20, 33), int32(7, 1, 7)),
        (int32(1, 1, 1), int32(5, 39, 40), int32(0, 7, 0)),
        (int32(-1, 4, 2), int32(-3, 7, 9), int32(1, 2, 3)),
    ):
        for tensor, values in zip(lengths, (winner, cache_len, commit_len, status), strict=True):
            tensor.copy_(values)
        for tensor in (*caches, rows.qkv, rows.k, rows.v):
            tensor.normal_()
        eager, eager_lengths = caches.clone(), [tensor.clone() for tensor in lengths]
        graph.replay()
        eager_q = play(target, eager, rows, eager_lengths)
        assert torch.equal(q, eager_q)
        assert caches.same(eager)
        assert torch.equal(lengths[3], eager_lengths[3])


@pytest.mark.big
@over(GPU_TARGETS)
def test_more_than_two_to_the_31_elements(target: Target) -> None:
    needs_memory(12)
    capacity, start, count = 1_200_000, 1_199_996, 3
    caches = Caches(
        *torch.zeros((2, 2, 1, capacity, 8, 128), dtype=torch.bfloat16, device=target.device),
        *torch.randn((2, 2, 1, 2, 4, 8, 128), device=target.device).bfloat16(),
    )
    assert caches.k_cache.numel() > 2**31
    winner, cache_len, commit_len = target.to((int32(1), int32(start), int32(count)))
    lk.kv_commit_(*caches, winner, cache_len, commit_len, backend=target.backend)
    for cache, window in zip(caches[:2], caches[2:], strict=True):
        assert torch.equal(cache[:, 0, start : start + count], window[:, 0, 1, :count])
        assert not cache[:, 0, start + count :].any()
        cache[:, 0, start:] = 0
        assert not cache.any()
    lk.kv_prewrite_(
        *caches[2:], 1, *(window[0] for window in caches[2:]), None, cache_len, direct=True,
        k_cache=caches.k_cache, v_cache=caches.v_cache, commit_len=commit_len,
        backend=target.backend,
    )  # fmt: skip
    for cache, window in zip(caches[:2], caches[2:], strict=True):
        assert torch.equal(window[1], window[0])
        assert torch.equal(cache[1, 0, start : start + count], window[0, 0, 0, :count])
        cache[1, 0, start : start + count] = 0
        assert not cache.any()


@needs_gpu
def test_cupy_arrays() -> None:
    cupy = pytest.importorskip("cupy")
    shape = CACHES[1]
    rows = make_rows(shape, torch.float16)
    expected = make_caches(shape, torch.float16)
    winner = int32(0, 1, 2)
    arrays = [cupy.asarray(tensor.numpy()) for tensor in expected]
    values = (rows.qkv, rows.cos_sin, rows.cache_len, rows.commit_len, winner)
    qkv, table, start, count, slots = (cupy.asarray(tensor.numpy()) for tensor in values)
    q = lk.qkv_prewrite_(
        *expected[2:], 1, rows.qkv, rows.cos_sin, rows.cache_len, num_heads=shape[5]
    )
    lk.kv_commit_(*expected, winner, rows.cache_len, rows.commit_len)
    got = lk.qkv_prewrite_(*arrays[2:], 1, qkv, table, start, num_heads=shape[5])
    lk.kv_commit_(*arrays, slots, start, count)
    assert isinstance(got, cupy.ndarray)
    np.testing.assert_array_equal(cupy.asnumpy(got), q.numpy())
    for array, tensor in zip(arrays, expected, strict=True):
        np.testing.assert_array_equal(cupy.asnumpy(array), tensor.numpy())
