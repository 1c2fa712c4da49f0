"""branch_attention: the mask, the numbers, what it must not read, and what it refuses."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from cases import ATTENTION, moved, operator, run_on
from targets import KERNELS, TARGETS, Target, over
from torch.nn.functional import scaled_dot_product_attention

import lopa_kernels as lk
from lopa_kernels import _dispatch
from lopa_kernels.ops.branch_attention import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A few units in the last place of a value near one, for rows of up to 400 keys.
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def present(targets: list[Target]) -> list[Target]:
    """Where there is branch_attention; that it is there is test_operators.py's matter."""
    return [t for t in targets if _dispatch.why_absent(t.backend, "branch_attention") is None]


TARGETS_HERE = present(TARGETS)
KERNELS_HERE = present(KERNELS)


class Inputs(NamedTuple):
    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    k_window: torch.Tensor
    v_window: torch.Tensor
    cache_len: torch.Tensor
    length: torch.Tensor


def int32(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with other strides: heads before positions, and gaps between rows."""
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), math.nan, dtype=tensor.dtype)
    wide = wide.transpose(-2, -3).contiguous().transpose(-2, -3)
    view = wide[..., : tensor.shape[-1]]
    view.copy_(tensor)
    assert view.stride(-1) == 1
    return view


def make(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Inputs:
    """Random operands; each batch has an empty, a full and ragged lengths where it can."""
    batch, branches, window, q_heads, kv_heads, head_dim, capacity = shape
    g = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=g).to(dtype)

    cache_len = torch.randint(0, capacity + 1, (batch,), generator=g, dtype=torch.int32)
    length = torch.randint(0, window + 1, (batch, branches), generator=g, dtype=torch.int32)
    cache_len[0] = capacity
    length[0, 0] = window
    if batch > 1:
        cache_len[1] = 0
    if branches > 1:
        length[-1, 1] = 0
    return Inputs(
        normal(batch, branches, window, q_heads, head_dim),
        normal(batch, capacity, kv_heads, head_dim),
        normal(batch, capacity, kv_heads, head_dim),
        normal(batch, branches, window, kv_heads, head_dim),
        normal(batch, branches, window, kv_heads, head_dim),
        cache_len,
        length,
    )


def poison(inputs: Inputs, value: float) -> Inputs:
    """Puts `value` wherever nothing may be read."""
    cached = torch.arange(inputs.k_cache.shape[1]) < inputs.cache_len[:, None]
    live = torch.arange(inputs.q.shape[2]) < inputs.length[..., None]

    def spoil(tensor: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        return torch.where(keep[..., None, None], tensor, torch.tensor(value, dtype=tensor.dtype))

    return inputs._replace(
        q=spoil(inputs.q, live),
        k_cache=spoil(inputs.k_cache, cached),
        v_cache=spoil(inputs.v_cache, cached),
        k_window=spoil(inputs.k_window, live),
        v_window=spoil(inputs.v_window, live),
    )


def block_of(position: int, prompt_len: int, block_size: int) -> int:
    return -1 if position < prompt_len else (position - prompt_len) // block_size


def dense(
    inputs: Inputs, block_size: int | None = None, prompt_len: torch.Tensor | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Attention one query at a time in float64 NumPy, from the definition alone."""
    q, k_cache, v_cache, k_window, v_window = (t.double().numpy() for t in inputs[:5])
    batch, branches, window, q_heads, head_dim = q.shape
    group = q_heads // k_cache.shape[2]
    out = np.zeros(q.shape)
    lse = np.full((batch, branches, q_heads, window), -np.inf)
    for b in range(batch):
        start = int(inputs.cache_len[b])
        for k in range(branches):
            length = int(inputs.length[b, k])
            for c in range(length):
                seen = list(range(length))
                if block_size is not None and prompt_len is not None:
                    first = int(prompt_len[b])
                    own = block_of(start + c, first, block_size)
                    seen = [j for j in seen if block_of(start + j, first, block_size) <= own]
                for h in range(q_heads):
                    kv = h // group
                    keys = np.concatenate([k_cache[b, :start, kv], k_window[b, k, seen, kv]])
                    values = np.concatenate([v_cache[b, :start, kv], v_window[b, k, seen, kv]])
                    scores = keys @ q[b, k, c, h] / np.sqrt(head_dim)
                    weights = np.exp(scores - scores.max())
                    out[b, k, c, h] = weights @ values / weights.sum()
                    lse[b, k, h, c] = scores.max() + np.log(weights.sum())
    return out, lse


@pytest.mark.parametrize("shape", [s for s in ATTENTION if math.prod(s[:4]) < 1000])
@pytest.mark.parametrize("block_size", [None, 1, 4])
def test_reference_is_dense_attention(shape: tuple[int, ...], block_size: int | None) -> None:
    inputs = Inputs(*(t.double() if t.is_floating_point() else t for t in make(shape, DTYPES[0])))
    prompt_len = inputs.cache_len + 3
    prompt_len[0] = max(0, int(inputs.cache_len[0]) - 5)
    expected = dense(inputs, block_size, prompt_len)
    mask = "full" if block_size is None else "block_causal"
    out, lse = lk.branch_attention(
        *inputs, mask=mask, block_size=block_size, prompt_len=prompt_len, return_lse=True,
        backend="reference",
    )  # fmt: skip
    assert out.dtype == torch.float64
    np.testing.assert_allclose(out.numpy(), expected[0], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(lse.numpy(), expected[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ATTENTION, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@over(KERNELS_HERE)
def test_kernel_is_reference(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, target: Target
) -> None:
    if target.interpreted and layout == "strided" and math.prod(shape[:4]) > 1000:
        pytest.skip("too long for Triton's interpreter")
    inputs = make(shape, dtype)
    expected, expected_lse = reference.attend(*inputs, dtype=torch.float64)
    inputs = poison(inputs, math.nan)
    if layout == "strided":
        inputs = Inputs(*(strided(t) for t in inputs[:5]), *inputs[5:])
    out, lse = run_on(target, lk.branch_attention, *inputs, return_lse=True)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=TOLERANCE[dtype])
    torch.testing.assert_close(lse.double(), expected_lse, rtol=2e-6, atol=2e-6)
    live = torch.arange(shape[2]) < inputs.length[..., None]
    assert (out[~live] == 0).all()
    assert torch.equal(run_on(target, lk.branch_attention, *inputs), out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [1, 3, 32, 1000])
@pytest.mark.parametrize("shape", [ATTENTION[3], ATTENTION[6], ATTENTION[8]], ids=str)
@over(KERNELS_HERE)
def test_block_causal(
    shape: tuple[int, ...], block_size: int, dtype: torch.dtype, target: Target
) -> None:
    if target.interpreted and shape != ATTENTION[3] and block_size != 32:
        pytest.skip("too long for Triton's interpreter")
    inputs = make(shape, dtype)
    g = torch.Generator().manual_seed(1)
    shift = torch.randint(-40, shape[2] + 2, (shape[0],), generator=g, dtype=torch.int32)
    prompt_len = (inputs.cache_len + shift).clamp(min=0)
    expected, expected_lse = reference.attend(
        *inputs, prompt_len, "block_causal", block_size, dtype=torch.float64
    )
    out, lse = run_on(
        target, lk.branch_attention, *poison(inputs, math.inf), mask="block_causal",
        block_size=block_size,
        prompt_len=prompt_len, return_lse=True,
    )  # fmt: skip
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=TOLERANCE[dtype])
    torch.testing.assert_close(lse.double(), expected_lse, rtol=2e-6, atol=2e-6)


@over(KERNELS_HERE)
def test_block_causal_never_reads_a_later_block(target: Target) -> None:
    inputs = make((1, 1, 12, 2, 1, 16, 8), torch.float32)
    inputs.length.fill_(12)
    prompt_len = inputs.cache_len + 4
    options: dict[str, Any] = {"mask": "block_causal", "block_size": 4, "prompt_len": prompt_len}
    clean = run_on(target, lk.branch_attention, *inputs, **options)
    inputs.k_window[:, :, 8:] = math.nan
    inputs.v_window[:, :, 8:] = math.nan
    out = run_on(target, lk.branch_attention, *inputs, **options)
    assert torch.equal(out[:, :, :8], clean[:, :, :8])
    assert out[:, :, 8:].isnan().all()


@over(KERNELS_HERE)
def test_branches_do_not_see_each_other(target: Target) -> None:
    inputs = make((1, 3, 8, 4, 2, 32, 20), torch.float32)
    inputs.length.fill_(8)
    before = run_on(target, lk.branch_attention, *inputs)
    inputs.k_window[:, 1] += 1
    inputs.v_window[:, 1] = math.nan
    after = run_on(target, lk.branch_attention, *inputs)
    assert torch.equal(after[:, 0], before[:, 0])
    assert torch.equal(after[:, 2], before[:, 2])
    assert after[:, 1].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@over(KERNELS_HERE)
def test_infinite_values_of_a_branch_stay_in_it(dtype: torch.dtype, target: Target) -> None:
    inputs = make((1, 9, 7, 2, 1, 16, 20), dtype)
    inputs.length.fill_(7)
    before = run_on(target, lk.branch_attention, *inputs)
    inputs.v_window[0, 4, 3, 0, 2] = math.inf
    inputs.v_window[0, 6, 0, 0, 1] = -math.inf
    after = run_on(target, lk.branch_attention, *inputs)
    assert (after[0, 4, ..., 2] == math.inf).all()
    assert (after[0, 6, ..., 1] == -math.inf).all()
    assert after.isinf().sum() == 2 * 7 * 2
    assert torch.equal(after[after.isfinite()], before[after.isfinite()])


@over(KERNELS_HERE)
def test_nan_and_infinity_in_live_slots_reach_their_rows_only(target: Target) -> None:
    inputs = make((1, 2, 8, 2, 1, 16, 70), torch.float32)
    inputs.length.fill_(8)
    inputs.q[0, 1, 3, 1] = math.nan
    out = run_on(target, lk.branch_attention, *inputs)
    assert out[0, 1, 3, 1].isnan().all()
    assert out.isnan().sum() == 16
    inputs.q[0, 1, 3, 1] = 1
    inputs.v_cache[0, 65, 0, 2] = math.inf
    out = run_on(target, lk.branch_attention, *inputs)
    assert (out[..., 2] == math.inf).all()
    assert out[..., :2].isfinite().all()


@pytest.mark.parametrize("scale", [0.0, -0.3, 2.5])
@over(KERNELS_HERE)
def test_scale(scale: float, target: Target) -> None:
    inputs = make(ATTENTION[3], torch.float32)
    expected, expected_lse = reference.attend(*inputs, scale=scale, dtype=torch.float64)
    out, lse = run_on(target, lk.branch_attention, *inputs, scale=scale, return_lse=True)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=3e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=3e-6, atol=3e-6)


@over(KERNELS_HERE)
def test_large_scores(target: Target) -> None:
    """Scores of thousands: one key takes all, the others underflow to nothing."""
    inputs = make((1, 2, 16, 2, 2, 64, 100), torch.float32)
    inputs = inputs._replace(q=inputs.q * 500)
    expected, expected_lse = reference.attend(*inputs, dtype=torch.float64)
    out, lse = run_on(target, lk.branch_attention, *inputs, return_lse=True)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-3)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@over(KERNELS_HERE)
def test_error_at_most_twice_that_of_sdpa(dtype: torch.dtype, target: Target) -> None:
    branches, window, prefix = (2, 20, 200) if target.interpreted else (4, 64, 400)
    inputs = make((1, branches, window, 6, 2, 64, prefix), dtype)
    inputs.length.fill_(window)
    prefixes = (t.expand(branches, -1, -1, -1) for t in (inputs.k_cache, inputs.v_cache))
    windows = (inputs.k_window[0], inputs.v_window[0])
    k, v = (torch.cat(pair, 1).transpose(1, 2) for pair in zip(prefixes, windows, strict=True))
    operands = target.to((inputs.q[0].transpose(1, 2), k, v))
    sdpa = scaled_dot_product_attention(*operands, enable_gqa=True).cpu()
    expected, _ = reference.attend(*inputs, dtype=torch.float64)
    error = run_on(target, lk.branch_attention, *inputs).double() - expected
    peer = sdpa.transpose(1, 2).double() - expected[0]
    assert error.square().mean().sqrt() <= 2 * peer.square().mean().sqrt()
    unit = torch.finfo(dtype).eps * expected.abs().max()
    assert error.abs().max() <= 2 * peer.abs().max() + unit


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("return_lse", [False, True])
@over(KERNELS_HERE)
def test_out(layout: str, return_lse: bool, target: Target) -> None:
    inputs = make(ATTENTION[3], torch.float32)
    here = moved(tuple(inputs), target.device)
    expected, expected_lse = lk.branch_attention(*here, return_lse=True, backend=target.backend)
    out = torch.full_like(inputs.q, math.nan)
    if layout == "strided":
        out = strided(out)
    out = moved(out, target.device)
    result = lk.branch_attention(*here, out=out, return_lse=return_lse, backend=target.backend)
    if return_lse:
        result, lse = result
        assert torch.equal(lse, expected_lse)
    assert result is out
    assert torch.equal(out, expected)
    if layout == "strided":
        gap = out.as_strided((*out.shape[:-1], 3), out.stride(), out.shape[-1])
        assert gap.isnan().all(), "written beyond the head dimension"
    reference_out = torch.full_like(inputs.q, math.nan)
    lk.branch_attention(*inputs, out=reference_out, backend="reference")
    torch.testing.assert_close(reference_out, expected.cpu(), rtol=0, atol=TOLERANCE[torch.float32])


@pytest.mark.parametrize("shape", [(0, 2, 4, 2, 1, 16, 8), (2, 0, 4, 2, 1, 16, 8),
                                   (2, 2, 0, 2, 1, 16, 8), (1, 1, 4, 2, 1, 16, 0)])  # fmt: skip
@over(KERNELS_HERE)
def test_empty(shape: tuple[int, ...], target: Target) -> None:
    batch, branches, window, q_heads, kv_heads, head_dim, capacity = shape
    inputs = Inputs(
        torch.randn(batch, branches, window, q_heads, head_dim),
        *torch.randn(2, batch, capacity, kv_heads, head_dim),
        *torch.randn(2, batch, branches, window, kv_heads, head_dim),
        torch.zeros(batch, dtype=torch.int32),
        torch.full((batch, branches), window, dtype=torch.int32),
    )
    out, lse = run_on(target, lk.branch_attention, *inputs, return_lse=True)
    assert out.shape == inputs.q.shape
    assert lse.shape == (batch, branches, q_heads, window)
    expected, _ = reference.attend(*inputs)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("restore_threads")
def test_bits_do_not_depend_on_threads_or_on_the_batch() -> None:
    inputs = make(ATTENTION[8], torch.float32)
    torch.set_num_threads(1)
    expected, expected_lse = lk.branch_attention(*inputs, return_lse=True)
    for threads in (2, 3, 16):
        torch.set_num_threads(threads)
        for _ in range(3):
            out, lse = lk.branch_attention(*inputs, return_lse=True)
            assert torch.equal(out, expected)
            assert torch.equal(lse, expected_lse)
    for b in range(inputs.q.shape[0]):
        alone = lk.branch_attention(*(t[b : b + 1] for t in inputs))
        assert torch.equal(alone[0], expected[b])


@over(KERNELS_HERE)
def test_same_bits_every_time(target: Target) -> None:
    inputs = make(ATTENTION[3] if target.interpreted else ATTENTION[8], torch.float32)
    expected, expected_lse = run_on(target, lk.branch_attention, *inputs, return_lse=True)
    for _ in range(1 if target.interpreted else 10):
        out, lse = run_on(target, lk.branch_attention, *inputs, return_lse=True)
        assert torch.equal(out, expected)
        assert torch.equal(lse, expected_lse)


ISA_SCRIPT = """
import sys, torch
import lopa_kernels as lk
assert torch.ops.lopa.cpu_isa() == sys.argv[1]
for case in torch.load(sys.argv[2]):
    case["out"], case["lse"] = lk.branch_attention(*case.pop("inputs"), return_lse=True)
    torch.save(case, sys.argv[3] + str(case["name"]))
"""

ISAS = ("portable", "avx2", "avx512")


def available_isas() -> tuple[str, ...]:
    # cpu_isa() is the best of the machine unless the environment lowers it.
    best = torch.ops.lopa.cpu_isa()
    return ISAS[: ISAS.index(best) + 1]


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa: str, tmp_path: Any) -> None:
    if isa not in available_isas():
        pytest.skip(f"no {isa} here")
    cases = []
    for i, shape in enumerate(ATTENTION[:-1]):
        for dtype in DTYPES:
            inputs = poison(make(shape, dtype), math.nan)
            cases.append({"name": f"{i}{dtype}", "inputs": tuple(inputs)})
    torch.save(cases, tmp_path / "cases")
    environment = {**os.environ, "LOPA_CPU_ISA": isa}
    arguments = [sys.executable, "-c", ISA_SCRIPT, isa, tmp_path / "cases", f"{tmp_path}/result"]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for case in cases:
        inputs = Inputs(*case["inputs"])
        result = torch.load(f"{tmp_path}/result{case['name']}")
        expected, expected_lse = reference.attend(*inputs, dtype=torch.float64)
        tolerance = TOLERANCE[inputs.q.dtype]
        torch.testing.assert_close(result["out"].double(), expected, rtol=0, atol=tolerance)
        torch.testing.assert_close(result["lse"].double(), expected_lse, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@over(KERNELS_HERE)
def test_opcheck(layout: str, target: Target) -> None:
    inputs = make((2, 2, 5, 4, 2, 16, 20), torch.float32)
    if layout == "strided":
        inputs = Inputs(*(strided(t) for t in inputs[:5]), *inputs[5:])
    inputs = moved(inputs, target.device)
    options = (inputs.cache_len + 2, None, "block_causal", 2, 0.5)
    torch.library.opcheck(operator(target, "branch_attention"), tuple(inputs))
    torch.library.opcheck(operator(target, "branch_attention"), (*inputs, *options))
    torch.library.opcheck(operator(target, "branch_attention_lse"), (*inputs, *options))
    out = torch.zeros(inputs.q.shape, device=target.device)
    lse = torch.zeros(2, 2, 4, 5, device=target.device)
    op = operator(target, "branch_attention_out")
    torch.library.opcheck(op, tuple(inputs), {"out": out})
    torch.library.opcheck(op, tuple(inputs), {"out": out, "lse": lse})


@over(KERNELS_HERE)
def test_compile_fullgraph_with_dynamic_shapes(target: Target) -> None:
    def layer(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = lk.branch_attention(*inputs, return_lse=True, backend=target.backend)
        return out * 2, lse

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    counter = torch._dynamo.utils.counters
    counter.clear()
    for i, window in enumerate((5, 8, 33)):
        inputs = make((2, 3, window, 4, 2, 16, 40 + window), torch.float32, seed=i)
        inputs = moved(inputs, target.device)
        out, lse = compiled(*inputs)
        expected, expected_lse = lk.branch_attention(
            *inputs, return_lse=True, backend=target.backend
        )
        assert torch.equal(out, expected * 2)
        assert torch.equal(lse, expected_lse)
    assert counter["stats"]["unique_graphs"] == 1


def test_numpy_arrays() -> None:
    inputs = make(ATTENTION[3], torch.float32)
    expected, expected_lse = lk.branch_attention(*inputs, return_lse=True)
    out, lse = lk.branch_attention(*(t.numpy() for t in inputs), return_lse=True)
    assert isinstance(out, np.ndarray)
    np.testing.assert_array_equal(out, expected.numpy())
    np.testing.assert_array_equal(lse, expected_lse.numpy())


GOOD = (2, 3, 5, 4, 2, 16, 20)


BAD_ARGUMENTS = [
    ({"q": torch.randn(2, 5, 4, 16)}, ValueError, r"q: expected 5 dimensions"),
    ({"q": torch.randn(2, 3, 5, 4, 16).double()}, TypeError, r"q: expected dtype"),
    ({"q": torch.randn(2, 3, 5, 3, 16)}, ValueError, r"multiple of the 2 KV heads, got 3"),
    ({"q": torch.randn(2, 3, 5, 4, 300)}, ValueError, r"head_dim 1 to 256, got 300"),
    ({"q": torch.randn(2, 3, 5, 16, 4).mT}, ValueError, r"q: expected unit stride"),
    ({"k_cache": torch.randn(2, 20, 2, 16).half()}, TypeError, r"k_cache: expected dtype"),
    ({"v_cache": torch.randn(2, 21, 2, 16)}, ValueError, r"v_cache: expected shape"),
    ({"k_window": torch.randn(2, 3, 6, 2, 16)}, ValueError, r"k_window: expected shape"),
    ({"v_window": torch.empty(2, 3, 5, 2, 16, device="meta")}, ValueError, r"v_window: .*meta"),
    ({"cache_len": torch.zeros(2)}, TypeError, r"cache_len: expected dtype torch.int32"),
    ({"length": int32([1, 2])}, ValueError, r"length: expected shape \[2, 3\]"),
    ({"mask": "causal"}, ValueError, r"mask: expected one of full, block_causal"),
    ({"mask": "block_causal"}, ValueError, r"block_size: expected 1 or more"),
    ({"mask": "block_causal", "block_size": 4}, ValueError, r"prompt_len: expected a tensor"),
    ({"scale": math.inf}, ValueError, r"scale: expected a finite number"),
    ({"out": torch.randn(2, 3, 5, 4, 8)}, ValueError, r"out: expected shape"),
    ({"backend": "nothing"}, ValueError, r"backend: expected one of"),
]

BAD_VALUES = [
    ({"cache_len": int32([3, 21])}, RuntimeError, r"cache_len: expected 0 to 20.*21 in .* 1"),
    ({"cache_len": int32([-1, 2])}, RuntimeError, r"cache_len: expected 0 to 20.*-1 in .* 0"),
    (
        {"mask": "block_causal", "block_size": 4, "prompt_len": int32([0, -2])},
        RuntimeError,
        r"prompt_len: expected 0 or more, got -2 in sequence 1",
    ),
    (
        {"length": int32([[1, 2, 3], [4, 5, 6]])},
        RuntimeError,
        r"length: expected 0 to 5.*6 in sequence 1, branch 2",
    ),
]


@pytest.mark.parametrize(("change", "error", "match"), BAD_ARGUMENTS)
@over(TARGETS_HERE)
def test_bad_input(
    change: dict[str, Any], error: type[Exception], match: str, target: Target
) -> None:
    if target.backend == "reference" and error is TypeError and "q" in change:
        pytest.skip("the reference takes float64")
    arguments = {
        name: value if getattr(value, "is_meta", False) else moved(value, target.device)
        for name, value in {**make(GOOD, torch.float32)._asdict(), **change}.items()
    }
    with pytest.raises(error, match=match):
        lk.branch_attention(**{"backend": target.backend, **arguments})


@pytest.mark.parametrize(("change", "error", "match"), BAD_VALUES)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_bad_values(
    change: dict[str, Any], error: type[Exception], match: str, backend: str
) -> None:
    arguments = {**make(GOOD, torch.float32)._asdict(), "backend": backend, **change}
    with pytest.raises(error, match=match):
        lk.branch_attention(**arguments)


def test_bad_input_writes_nothing() -> None:
    inputs = make(GOOD, torch.float32)._replace(cache_len=int32([3, 21]))
    out = torch.full_like(inputs.q, 7)
    with pytest.raises(RuntimeError, match="sequence 1"):
        lk.branch_attention(*inputs, out=out)
    assert (out == 7).all()


@pytest.mark.parametrize(
    ("index", "value", "match"),
    [
        (0, torch.randn(2, 3, 5, 4, 16).double(), "q: expected dtype"),
        (1, torch.randn(2, 20, 2, 8), "k_cache: expected shape"),
        (2, torch.randn(2, 20, 16, 2).mT, "v_cache: expected unit stride"),
        (5, torch.zeros(3, dtype=torch.int32), "cache_len: expected shape"),
    ],
)
@over(KERNELS_HERE)
def test_bad_input_through_torch_ops(
    index: int, value: torch.Tensor, match: str, target: Target
) -> None:
    arguments = list(make(GOOD, torch.float32))
    arguments[index] = value
    with pytest.raises(RuntimeError, match=match):
        operator(target, "branch_attention")(*moved(arguments, target.device))
