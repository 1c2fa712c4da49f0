"""branch_attention over a paged prefix: the bits of a cache that is not paged; what it refuses.

Whatever may not be read is spoilt: entries of a table beyond the pages that `cache_len` needs,
pages of no entry, and the positions of a last page beyond `cache_len`.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from cases import ATTENTION, moved, operator, run_on
from targets import TARGETS, Target, over
from test_branch_attention import TOLERANCE, Inputs, int32

import lopa_kernels as lk
from lopa_kernels import _dispatch
from lopa_kernels.ops.branch_attention import PAGE_SIZES, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PAGED = [t for t in TARGETS if _dispatch.why_absent(t.backend, "branch_attention") is None]
#: where a bad entry is an error; elsewhere the host does not read it
CHECKED = [t for t in PAGED if t.backend in ("cpu", "reference")]
UNCHECKED = [t for t in PAGED if t not in CHECKED]

GARBAGE = (-1, 2**31 - 1, -(2**31), 12345)


def make(shape: tuple[int, ...], dtype: torch.dtype, page: int, seed: int = 0) -> Inputs:
    """Ragged, with a cache of one page more than `shape` says, NaN beyond `cache_len`."""
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
    rows = (capacity // page + 2) * page
    beyond = torch.arange(rows) >= cache_len[:, None]
    k_cache, v_cache = (normal(batch, rows, kv_heads, head_dim) for _ in range(2))
    k_cache[beyond] = math.nan
    v_cache[beyond] = math.nan
    return Inputs(
        normal(batch, branches, window, q_heads, head_dim),
        k_cache,
        v_cache,
        normal(batch, branches, window, kv_heads, head_dim),
        normal(batch, branches, window, kv_heads, head_dim),
        cache_len,
        length,
    )


def paged(inputs: Inputs, page: int, seed: int = 0) -> tuple[Inputs, torch.Tensor]:
    """The caches scattered over a pool in random order, and the table."""
    batch, capacity = inputs.k_cache.shape[:2]
    width = capacity // page
    g = torch.Generator().manual_seed(seed)
    pages = batch * width + 3
    table = torch.randperm(pages, generator=g)[: batch * width].view(batch, width).int()
    needed = page * torch.arange(width) < inputs.cache_len[:, None]

    def scatter(cache: torch.Tensor) -> torch.Tensor:
        pool = torch.full((pages, page, *cache.shape[2:]), math.nan, dtype=cache.dtype)
        pool[table[needed].long()] = cache.unflatten(1, (width, page))[needed]
        return pool

    pools = {"k_cache": scatter(inputs.k_cache), "v_cache": scatter(inputs.v_cache)}
    unused = torch.arange(int((~needed).sum())) % len(GARBAGE)
    table[~needed] = int32(GARBAGE)[unused]
    return inputs._replace(**pools), table


def masks(inputs: Inputs) -> list[dict[str, Any]]:
    prompt_len = (inputs.cache_len - 5).clamp(min=0)
    prompt_len[-1] = inputs.cache_len[-1] + 3
    causal = {"mask": "block_causal", "prompt_len": prompt_len}
    return [{}, {**causal, "block_size": 1}, {**causal, "block_size": 3}]


def heads_first(pool: torch.Tensor, gap: int) -> torch.Tensor:
    """A view with the strides of [pages, heads, page, D], and `gap` elements between rows."""
    pages, page, heads, head_dim = pool.shape
    wide = torch.full((pages, heads, page, head_dim + gap), math.nan, dtype=pool.dtype)
    view = wide.transpose(1, 2)[..., :head_dim]
    return view.copy_(pool)


def skip_where_long(target: Target, shape: tuple[int, ...]) -> None:
    if target.interpreted and math.prod(shape[:4]) > 400:
        pytest.skip("too long for Triton's interpreter")


@over(PAGED)
@pytest.mark.parametrize("page", PAGE_SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ATTENTION, ids=str)
def test_bits_of_the_static_cache(
    shape: tuple[int, ...], dtype: torch.dtype, page: int, target: Target
) -> None:
    skip_where_long(target, shape)
    inputs = make(shape, dtype, page)
    pools, table = paged(inputs, page)
    for options in masks(inputs):
        static = run_on(target, lk.branch_attention, *inputs, **options, return_lse=True)
        out, lse = run_on(
            target, lk.branch_attention, *pools, **options, block_table=table, return_lse=True
        )
        assert torch.equal(out, static[0])
        assert torch.equal(lse, static[1])
        expected, expected_lse = reference.attend(*inputs, **options, dtype=torch.float64)
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=TOLERANCE[dtype])
        torch.testing.assert_close(lse.double(), expected_lse, rtol=2e-6, atol=2e-6)


@over(PAGED)
@pytest.mark.parametrize("page", [16, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(page: int, dtype: torch.dtype, target: Target) -> None:
    inputs = make((2, 2, 5, 4, 2, 37, 150), dtype, page)
    pools, table = paged(inputs, page)
    options = {"block_table": table, "return_lse": True}
    expected = run_on(target, lk.branch_attention, *pools, **options)
    pools = pools._replace(
        k_cache=heads_first(pools.k_cache, 3), v_cache=heads_first(pools.v_cache, 0)
    )
    assert not pools.k_cache.is_contiguous()
    tables = (
        table.T.contiguous().T,
        torch.stack([table, int32(GARBAGE)[0].expand_as(table)], 2)[..., 0],
        torch.cat([table, table], 1)[:, : table.shape[1]],
    )
    for strided in tables:
        assert not strided.is_contiguous()
        options["block_table"] = strided
        out, lse = run_on(target, lk.branch_attention, *pools, **options)
        assert torch.equal(out, expected[0])
        assert torch.equal(lse, expected[1])


@over(PAGED)
def test_one_page_of_many_entries(target: Target) -> None:
    """Sequences share the pages of a common prefix, and a table may have one row for all."""
    inputs = make((3, 2, 5, 4, 2, 16, 70), torch.float32, 16)
    inputs.cache_len.fill_(70)
    for cache in (inputs.k_cache, inputs.v_cache):
        cache[:, :70] = torch.randn(70, 2, 16, generator=torch.Generator().manual_seed(1))
    pools, table = paged(inputs, 16)
    static = run_on(target, lk.branch_attention, *inputs)
    shared = table[1].expand(3, -1)
    assert torch.equal(run_on(target, lk.branch_attention, *pools, block_table=shared), static)
    pools.k_cache[table[1, 0].long()] = 7
    pools.v_cache[table[1, 0].long()] = 7
    inputs.k_cache[:, :16] = 7
    inputs.v_cache[:, :16] = 7
    static = run_on(target, lk.branch_attention, *inputs)
    assert torch.equal(run_on(target, lk.branch_attention, *pools, block_table=shared), static)


@over(PAGED)
@pytest.mark.parametrize(("pages", "width"), [(0, 0), (0, 3), (4, 0), (4, 3)])
def test_no_prefix(pages: int, width: int, target: Target) -> None:
    inputs = make((2, 2, 5, 4, 2, 16, 20), torch.float32, 16)
    inputs.cache_len.fill_(0)
    caches = {name: getattr(inputs, name)[:, : 16 * width] for name in ("k_cache", "v_cache")}
    inputs = inputs._replace(**caches)
    static = run_on(target, lk.branch_attention, *inputs, return_lse=True)
    pool = torch.full((pages, 16, 2, 16), math.nan)
    table = int32(GARBAGE)[:width].expand(2, -1)
    out, lse = run_on(
        target, lk.branch_attention, *inputs._replace(k_cache=pool, v_cache=pool),
        block_table=table, return_lse=True,
    )  # fmt: skip
    assert torch.equal(out, static[0])
    assert torch.equal(lse, static[1])


@over(PAGED)
@pytest.mark.parametrize("shape", [(0, 2, 4, 2, 1, 16), (2, 0, 4, 2, 1, 16), (2, 2, 0, 2, 1, 16)])
def test_empty(shape: tuple[int, ...], target: Target) -> None:
    batch, branches, window, q_heads, kv_heads, head_dim = shape
    out, lse = run_on(
        target,
        lk.branch_attention,
        torch.zeros(batch, branches, window, q_heads, head_dim),
        *torch.zeros(2, 3, 16, kv_heads, head_dim),
        *torch.zeros(2, batch, branches, window, kv_heads, head_dim),
        torch.full((batch,), 20, dtype=torch.int32),
        torch.full((batch, branches), window, dtype=torch.int32),
        block_table=torch.ones(batch, 2, dtype=torch.int32),
        return_lse=True,
    )
    assert out.shape == (batch, branches, window, q_heads, head_dim)
    assert lse.shape == (batch, branches, q_heads, window)


@over(PAGED)
@pytest.mark.parametrize("return_lse", [False, True])
def test_out(return_lse: bool, target: Target) -> None:
    pools, table = paged(make((2, 2, 5, 4, 2, 16, 70), torch.float32, 32), 32)
    options = {"block_table": table, "return_lse": True}
    expected, expected_lse = run_on(target, lk.branch_attention, *pools, **options)
    pools, table = moved((pools, table), target.device)
    out = torch.full_like(pools.q, math.nan)
    result = lk.branch_attention(
        *pools, block_table=table, out=out, return_lse=return_lse, backend=target.backend
    )
    if return_lse:
        result, lse = result
        assert torch.equal(lse.cpu(), expected_lse)
    assert result is out
    assert torch.equal(out.cpu(), expected)


@over(UNCHECKED)
@pytest.mark.parametrize("entry", [-1, -(2**31), 2**31 - 1, "pages"])
def test_keys_of_no_page_are_not_seen(entry: Any, target: Target) -> None:
    """What the host does not read is no error: the result is that of the other pages."""
    page = 16
    inputs = make((2, 2, 5, 4, 2, 16, 70), torch.float32, page)
    inputs.cache_len[1] = 40
    for cache in (inputs.k_cache, inputs.v_cache):
        cache[1, :40] = torch.randn(40, 2, 16, generator=torch.Generator().manual_seed(1))
    pools, table = paged(inputs, page)
    fewer = pools._replace(cache_len=pools.cache_len - page)
    without = torch.cat([table[:, :1], table[:, 2:]], 1)
    expected = reference.attend(*fewer, block_table=without, dtype=torch.float64)
    table[:, 1] = len(pools.k_cache) if entry == "pages" else entry
    out, lse = run_on(target, lk.branch_attention, *pools, block_table=table, return_lse=True)
    torch.testing.assert_close(out.double(), expected[0], rtol=0, atol=4e-6)
    torch.testing.assert_close(lse.double(), expected[1], rtol=2e-6, atol=2e-6)


ISA_SCRIPT = """
import sys, torch
import lopa_kernels as lk
assert torch.ops.lopa.cpu_isa() == sys.argv[1]
results = []
for inputs, pools, table in torch.load(sys.argv[2]):
    static = lk.branch_attention(*inputs, return_lse=True)
    results.append((static, lk.branch_attention(*pools, block_table=table, return_lse=True)))
torch.save(results, sys.argv[3])
"""

ISAS = ("portable", "avx2", "avx512")


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa: str, tmp_path: Any) -> None:
    # cpu_isa() is the best of the machine unless the environment lowers it.
    if isa not in ISAS[: ISAS.index(torch.ops.lopa.cpu_isa()) + 1]:
        pytest.skip(f"no {isa} here")
    cases = []
    for shape in ATTENTION:
        for dtype in DTYPES:
            for page in (16, 32, 128):
                inputs = make(shape, dtype, page)
                pools, table = paged(inputs, page)
                cases.append((tuple(inputs), tuple(pools), table))
    torch.save(cases, tmp_path / "cases")
    environment = {**os.environ, "LOPA_CPU_ISA": isa}
    arguments = [sys.executable, "-c", ISA_SCRIPT, isa, tmp_path / "cases", tmp_path / "results"]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = torch.load(tmp_path / "results")
    for (inputs, _, _), (static, result) in zip(cases, results, strict=True):
        assert torch.equal(result[0], static[0])
        assert torch.equal(result[1], static[1])
        expected, expected_lse = reference.attend(*inputs, dtype=torch.float64)
        tolerance = TOLERANCE[inputs[0].dtype]
        torch.testing.assert_close(result[0].double(), expected, rtol=0, atol=tolerance)
        torch.testing.assert_close(result[1].double(), expected_lse, rtol=2e-6, atol=2e-6)


KERNELS_HERE = [target for target in PAGED if target.backend != "reference"]


@over(KERNELS_HERE)
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_opcheck(layout: str, target: Target) -> None:
    pools, table = paged(make((2, 2, 5, 4, 2, 16, 20), torch.float32, 16), 16)
    if layout == "strided":
        table = table.T.contiguous().T
        pools = pools._replace(
            k_cache=heads_first(pools.k_cache, 0), v_cache=heads_first(pools.v_cache, 3)
        )
    options = (pools.cache_len + 2, table, "block_causal", 2, 0.5)
    values, plain, options = moved((pools, (None, table), options), target.device)
    torch.library.opcheck(operator(target, "branch_attention"), (*values, *plain))
    torch.library.opcheck(operator(target, "branch_attention"), (*values, *options))
    torch.library.opcheck(operator(target, "branch_attention_lse"), (*values, *options))
    written = {
        "out": torch.zeros(pools.q.shape, device=target.device),
        "lse": torch.zeros(2, 2, 4, 5, device=target.device),
    }
    torch.library.opcheck(operator(target, "branch_attention_out"), (*values, *options), written)


@over(KERNELS_HERE)
def test_compile_fullgraph_with_dynamic_shapes(target: Target) -> None:
    def layer(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = lk.branch_attention(
            *inputs[:7], block_table=inputs[7], return_lse=True, backend=target.backend
        )
        return out * 2, lse

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    counter = torch._dynamo.utils.counters
    counter.clear()
    # No two sizes that change are the same at first, or the compiler takes them for one.
    for window, capacity in ((5, 100), (8, 120), (13, 40)):
        pools, table = paged(make((2, 3, window, 4, 2, 16, capacity), torch.float32, 16), 16)
        pools, table = moved((pools, table), target.device)
        # Not a view: the size of its base would be one more that may be the same as another.
        table = table.clone()
        out, lse = compiled(*pools, table)
        expected, expected_lse = lk.branch_attention(
            *pools, block_table=table, return_lse=True, backend=target.backend
        )
        assert torch.equal(out, expected * 2)
        assert torch.equal(lse, expected_lse)
    assert counter["stats"]["unique_graphs"] == 1


class Layer(torch.nn.Module):
    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        result = lk.branch_attention(*inputs[:7], block_table=inputs[7], backend=self.backend)
        assert isinstance(result, torch.Tensor)
        return result


@over(KERNELS_HERE)
def test_export(target: Target) -> None:
    pools, table = paged(make((2, 2, 5, 4, 2, 16, 70), torch.float32, 16), 16)
    values = moved((*pools, table), target.device)
    program = torch.export.export(Layer(target.backend), values)
    names = [node.target._opname for node in program.graph.nodes if node.op == "call_function"]
    assert names == ["branch_attention"]
    out = program.module()(*values)
    assert torch.equal(out, Layer(target.backend)(*values))


def test_numpy_arrays() -> None:
    pools, table = paged(make(ATTENTION[3], torch.float32, 16), 16)
    expected = lk.branch_attention(*pools, block_table=table)
    out = lk.branch_attention(*(t.numpy() for t in pools), block_table=table.numpy())
    assert isinstance(out, np.ndarray)
    np.testing.assert_array_equal(out, expected.numpy())


def good() -> dict[str, Any]:
    """Two sequences of up to 64 positions in a pool of 11 pages of 16."""
    pools, table = paged(make((2, 3, 5, 4, 2, 16, 40), torch.float32, 16), 16)
    pools.cache_len[1] = 30
    table[1, :2] = int32([4, 4])
    assert pools.k_cache.shape == (11, 16, 2, 16)
    assert table.shape == (2, 4)
    return {**pools._asdict(), "block_table": table}


def sized(page: int) -> dict[str, Any]:
    return {"k_cache": torch.zeros(11, page, 2, 16), "v_cache": torch.zeros(11, page, 2, 16)}


def entry(row: int, column: int, value: int) -> dict[str, Any]:
    table = good()["block_table"].clone()
    table[row, column] = value
    return {"block_table": table}


BAD_TENSORS = [
    (sized(48), ValueError, r"k_cache: expected pages of a power of two from 16 to 256 .* got 48"),
    (sized(8), ValueError, r"k_cache: expected pages of .* 16 to 256 positions, got 8"),
    (sized(512), ValueError, r"k_cache: expected pages of .* 16 to 256 positions, got 512"),
    (sized(0), ValueError, r"k_cache: expected pages of .* 16 to 256 positions, got 0"),
    ({"v_cache": torch.zeros(11, 32, 2, 16)}, ValueError, r"v_cache: expected shape"),
    ({"v_cache": torch.zeros(10, 16, 2, 16)}, ValueError, r"v_cache: expected shape"),
    ({"v_cache": torch.zeros(11, 16, 16, 2).mT}, ValueError, r"v_cache: expected unit stride"),
    ({"k_cache": torch.zeros(11, 16, 2, 16).half()}, TypeError, r"k_cache: expected dtype"),
    (
        {"block_table": torch.zeros(2, 4, dtype=torch.int64)},
        TypeError,
        r"block_table: expected dtype torch.int32, got torch.int64",
    ),
    (
        {"block_table": torch.zeros(8, dtype=torch.int32)},
        ValueError,
        r"block_table: expected 2 dimensions, got shape \[8\]",
    ),
    (
        {"block_table": torch.zeros(3, 4, dtype=torch.int32)},
        ValueError,
        r"block_table: expected shape \[2, 4\], got \[3, 4\]",
    ),
    (
        {"block_table": torch.zeros(2, 4, dtype=torch.int32, device="meta")},
        ValueError,
        r"block_table: expected a tensor on .*, got meta",
    ),
]
BAD_VALUES = [
    (
        entry(1, 1, 11),
        r"block_table: expected at least 0 and less than 11, the pages of k_cache, "
        r"got 11 in sequence 1, entry 1$",
    ),
    (
        entry(0, 2, -1),
        r"block_table: expected at least 0 and less than 11, the pages of k_cache, "
        r"got -1 in sequence 0, entry 2$",
    ),
    (
        {"k_cache": torch.zeros(0, 16, 2, 16), "v_cache": torch.zeros(0, 16, 2, 16)},
        r"block_table: expected at least 0 and less than 0, .* in sequence 0, entry 0$",
    ),
    (
        {"cache_len": int32([3, 65])},
        r"cache_len: expected 0 to 64, the cache's capacity, got 65 in sequence 1$",
    ),
]


@over(PAGED)
@pytest.mark.parametrize(("change", "error", "match"), BAD_TENSORS)
def test_bad_tensors(
    change: dict[str, Any], error: type[Exception], match: str, target: Target
) -> None:
    out = torch.full_like(good()["q"], 7)
    arguments = {**good(), **change, "out": out}
    on_meta = {name: t for name, t in arguments.items() if t.device.type == "meta"}
    arguments = {**moved({k: v for k, v in arguments.items() if k not in on_meta}, target.device)}
    with pytest.raises(error, match=match):
        lk.branch_attention(**arguments, **on_meta, backend=target.backend)
    assert (arguments["out"] == 7).all()


@over(CHECKED)
@pytest.mark.parametrize(("change", "match"), BAD_VALUES)
def test_bad_values(change: dict[str, Any], match: str, target: Target) -> None:
    out = torch.full_like(good()["q"], 7)
    with pytest.raises(RuntimeError, match=match):
        lk.branch_attention(**{**good(), **change}, out=out, backend=target.backend)
    assert (out == 7).all()


@over(KERNELS_HERE)
@pytest.mark.parametrize(
    ("change", "match"),
    [(change, match) for change, _, match in BAD_TENSORS if "meta" not in match],
)
def test_bad_tensors_through_torch_ops(change: dict[str, Any], match: str, target: Target) -> None:
    arguments = moved({**good(), **change}, target.device)
    # The operators say Int where Python says torch.int32, and name a shape as such.
    match = match.replace("torch.int32, got torch.int64", "Int, got Long")
    match = match.replace(r"got \[3", r"got shape \[3")
    with pytest.raises(RuntimeError, match=match):
        operator(target, "branch_attention")(**arguments)
