"""RMSNorm of queries and keys in qkv_prewrite_: rounding, order of the sum, what is refused."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any, NamedTuple

import pytest
import torch
from caches import BAD, DTYPES, Caches, Rows, int32, make_caches, make_rows, rotated
from cases import CACHES, moved, operator
from gpu import capture
from targets import GPU_TARGETS, KERNELS, TARGETS, Target, cpu, over

import lopa_kernels as lk
from lopa_kernels import Status
from lopa_kernels.ops.kv_cache import reference

REFERENCE = Target("reference", "cpu")
EPS = 1e-6

#: (layers, batch, branches, window, kv_heads, q_heads, head_dim, capacity): half a row is one
#: element, no power of two, a vector, more than a block of the CPU's sum and than a warp
SHAPES = (
    *((2, 2, 2, 5, 2, 3, head_dim, 20) for head_dim in (2, 10, 16, 64, 80, 256, 320)),
    (1, 3, 4, 17, 1, 5, 128, 40),
)


class Norms(NamedTuple):
    q_norm: torch.Tensor
    k_norm: torch.Tensor
    norm_eps: float = EPS


def make_norms(head_dim: int, dtype: torch.dtype, eps: float = EPS) -> Norms:
    g = torch.Generator().manual_seed(2)
    q_norm, k_norm = 1 + 0.3 * torch.randn((2, head_dim), generator=g)
    return Norms(q_norm.to(dtype), k_norm.to(dtype), eps)


def run(
    where: Target, caches: Caches, layer: int, rows: Rows, norms: Norms, **options: Any
) -> torch.Tensor:
    caches_of_direct = {"k_cache": caches.k_cache, "v_cache": caches.v_cache}
    if options.get("direct"):
        options = {"commit_len": rows.commit_len, **caches_of_direct, **options}
    return lk.qkv_prewrite_(
        *caches[2:], layer, rows.qkv, rows.cos_sin, rows.cache_len,
        num_heads=rows.q.shape[3], backend=where.backend, **norms._asdict(), **options,
    )  # fmt: skip


def definition(x: torch.Tensor, weight: torch.Tensor, eps: float, rows: Rows) -> torch.Tensor:
    """In float64: PyTorch's RMSNorm, then the rotation."""
    normed = torch.nn.functional.rms_norm(x.double(), x.shape[-1:], weight.double(), eps)
    return rotated(normed, rows.cos_sin, rows.cache_len)


def check_one_rounding(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Off by no more than one rounding to the dtype and a few in fp32 of numbers of that size."""
    half_unit = torch.finfo(got.dtype).eps / 2 * expected.abs()
    largest = expected.abs().amax(-1, keepdim=True)
    smallest = torch.finfo(got.dtype).smallest_normal * torch.finfo(got.dtype).eps
    assert ((got.double() - expected).abs() <= half_unit + 1e-6 * largest + smallest).all()


def equal_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    torch.testing.assert_close(cpu(a), cpu(b), rtol=0, atol=0, equal_nan=True)
    return True


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("shape", "eps"), [*((shape, EPS) for shape in SHAPES), (SHAPES[2], 0.0), (SHAPES[4], 0.5)]
)
@over(TARGETS)
def test_is_the_definition_rounded_once(
    shape: tuple[int, ...], dtype: torch.dtype, eps: float, target: Target
) -> None:
    if dtype == torch.float64 and target != REFERENCE:
        pytest.skip("the reference's alone")
    rows = make_rows(shape, dtype)
    if dtype == torch.float64:
        rows = rows._replace(cos_sin=rows.cos_sin.double())
    norms = make_norms(shape[6], dtype, eps)
    caches = moved(make_caches(shape, dtype), target.device)
    expected = moved(caches.clone(), "cpu")
    q = run(target, caches, 0, moved(rows, target.device), Norms(*target.to(norms)))
    check_one_rounding(cpu(q), definition(rows.q, norms.q_norm, eps, rows))
    key = cpu(caches.k_window[0])
    check_one_rounding(key, definition(rows.k, norms.k_norm, eps, rows))
    expected.k_window[0] = key
    expected.v_window[0] = rows.v
    assert caches.same(expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, *CACHES[:2]], ids=str)
@pytest.mark.parametrize(("layout", "direct"), [("contiguous", False), ("strided", True)])
@over(KERNELS)
def test_is_the_reference_bit_for_bit(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, direct: bool, target: Target
) -> None:
    few = direct and layout == "strided" and (dtype == torch.bfloat16 or shape[6] in (10, 64))
    if target.interpreted and not few:
        pytest.skip("too long for Triton's interpreter")
    results = []
    for where in (target, REFERENCE):
        rows = moved(make_rows(shape, dtype), where.device)
        caches = moved(make_caches(shape, dtype, layout), where.device)
        q = run(where, caches, 0, rows, Norms(*where.to(make_norms(shape[6], dtype))),
                direct=direct)  # fmt: skip
        results.append((q, caches))
    assert equal_bits(results[0][0], results[1][0])
    assert results[0][1].same(results[1][1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@over(KERNELS)
def test_more_rows_than_threads_are_resident(dtype: torch.dtype, target: Target) -> None:
    """A thread of a GPU then has several rows, whose number does not divide the heads here."""
    if target.interpreted:
        pytest.skip("too long for Triton's interpreter")
    shape = (1, 4, 8, 128, 3, 5, 128, 130)
    results = []
    for where in (target, REFERENCE):
        rows = moved(make_rows(shape, dtype), where.device)
        caches = moved(make_caches(shape, dtype), where.device)
        q = run(where, caches, 0, rows, Norms(*where.to(make_norms(shape[6], dtype))), direct=True)
        results.append((q, caches))
    assert equal_bits(results[0][0], results[1][0])
    assert results[0][1].same(results[1][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [2, 12, 80, 128, 320])
@over(KERNELS)
def test_every_width_of_access(dtype: torch.dtype, head_dim: int, target: Target) -> None:
    """First elements and strides that are not a multiple of a vector, of rows and of weights."""
    shape = (1, 2, 1, 3, 1, 2, head_dim, 11)
    rows = make_rows(shape, dtype)
    norms = make_norms(head_dim, dtype)
    five = rows.qkv.unflatten(-1, (-1, head_dim))

    def off(tensor: torch.Tensor, offset: int, where: Target) -> torch.Tensor:
        wide = torch.full((*tensor.shape[:-1], head_dim + 8), math.nan, dtype=dtype)
        wide[..., offset : offset + head_dim] = tensor
        return moved(wide, where.device)[..., offset : offset + head_dim]

    for offset, of_weights in ((0, 0), (1, 0), (0, 1), (2, 4), (4, 2)):
        results = []
        for where in (target, REFERENCE):
            here = moved(rows, where.device)._replace(qkv=off(five, offset, where))
            weights = [off(weight, of_weights, where) for weight in norms[:2]]
            caches = moved(make_caches(shape, dtype), where.device)
            q = run(where, caches, 0, here, Norms(*weights))
            results.append((q, caches))
        assert equal_bits(results[0][0], results[1][0])
        assert results[0][1].same(results[1][1])
        if target.interpreted:
            break
    strided = [torch.stack([weight, weight * 2], -1)[..., 0] for weight in norms[:2]]
    caches = moved(make_caches(shape, dtype), target.device)
    q = run(target, caches, 0, moved(rows, target.device), Norms(*moved(strided, target.device)))
    assert equal_bits(q, results[1][0])
    assert caches.same(results[1][1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@over(TARGETS)
def test_zeros_nan_and_infinities(dtype: torch.dtype, target: Target) -> None:
    """A row's own alone: 0 stays 0 but without eps, NaN and infinities fill the row."""
    shape = (1, 1, 2, 4, 2, 3, 16, 20)
    rows = make_rows(shape, dtype)
    five = rows.qkv.unflatten(-1, (-1, 16))
    five[0, 0, 0, 0] = 0
    five[0, 0, 1, 4] = 0
    five[0, 0, 2, 1, 5] = math.nan
    five[0, 1, 3, 3, 15] = math.nan
    five[0, 1, 0, 2, 8] = -math.inf
    five[0, 1, 1, 6, 3] = math.nan  # a value
    norms = make_norms(16, dtype)
    here = moved(rows, target.device)
    caches = moved(make_caches(shape, dtype), target.device)
    q = cpu(run(target, caches, 0, here, Norms(*target.to(norms))))
    key, value = cpu(caches.k_window[0]), cpu(caches.v_window[0])
    assert (q[0, 0, 0, 0] == 0).all()
    assert (key[0, 0, 1, 1] == 0).all()
    assert q[0, 0, 2, 1].isnan().all()
    assert key[0, 1, 3, 0].isnan().all()
    assert q[0, 1, 0, 2, [0, 8]].isnan().all()
    assert (q[0, 1, 0, 2, [1, 9]] == 0).all()
    assert int((~q.isfinite()).sum()) == 16 + 2
    assert int((~key.isfinite()).sum()) == 16
    torch.testing.assert_close(value, rows.v, rtol=0, atol=0, equal_nan=True)
    q = cpu(run(target, caches, 0, here, Norms(*target.to(norms[:2]), 0.0)))
    assert q[0, 0, 0, 0].isnan().all()


@over(TARGETS)
def test_squares_past_the_range_of_fp16(target: Target) -> None:
    """In fp32 neither 60000 overflows nor 1e-4 vanishes. One tensor is both weights."""
    shape = (1, 1, 1, 2, 1, 1, 16, 4)
    for scale in (60000.0, 1e-4):
        rows = make_rows(shape, torch.float16)
        rows.qkv.copy_(rows.qkv.sign() * scale)
        weight = make_norms(16, torch.float16).q_norm
        shared = target.to(weight)
        caches = moved(make_caches(shape, torch.float16), target.device)
        q = run(target, caches, 0, moved(rows, target.device), Norms(shared, shared))
        check_one_rounding(cpu(q), definition(rows.q, weight, EPS, rows))
        check_one_rounding(cpu(caches.k_window[0]), definition(rows.k, weight, EPS, rows))


@over(KERNELS)
def test_faults_are_those_without_norms(target: Target) -> None:
    shape = (2, 3, 4, 16, 2, 4, 20, 128)
    results = []
    for where in (target, REFERENCE):
        rows = moved(make_rows(shape, torch.bfloat16), where.device)
        lengths = where.to((int32(120, 10, 129), int32(16, 3, 0)))
        rows = rows._replace(cache_len=lengths[0], commit_len=lengths[1])
        caches = moved(make_caches(shape, torch.bfloat16), where.device)
        status = where.to(int32(0, 0, 0))
        norms = Norms(*where.to(make_norms(20, torch.bfloat16)))
        q = run(where, caches, 1, rows, norms, direct=True, status=status)
        assert status.tolist() == [Status.CACHE_FULL, 0, Status.BAD_STATE]
        assert (q[2] == 0).all()
        results.append((q, caches))
    assert equal_bits(results[0][0], results[1][0])
    assert results[0][1].same(results[1][1])


ISA_SCRIPT = """
import sys, torch
import lopa_kernels as lk
assert torch.ops.lopa.cpu_isa() == sys.argv[1]
cases = torch.load(sys.argv[2])
for case in cases:
    qkv = case["qkv"]
    window = torch.zeros(1, *qkv.shape[:3], 1, qkv.shape[-1], dtype=qkv.dtype)
    q = lk.qkv_prewrite_(window, window.clone(), 0, qkv, case["cos_sin"], case["cache_len"],
                         num_heads=qkv.shape[3] - 2, q_norm=case["q_norm"], k_norm=case["k_norm"])
    case["result"] = (q, window)
torch.save(cases, sys.argv[3])
"""

ISAS = ("portable", "avx2", "avx512")


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_has_the_same_bits(isa: str, tmp_path: Any) -> None:
    if ISAS.index(isa) > ISAS.index(torch.ops.lopa.cpu_isa()):
        pytest.skip(f"no {isa} here")
    g = torch.Generator().manual_seed(0)
    cases = []
    for head_dim in (2, 6, 16, 34, 64, 128, 130, 256, 320):
        for dtype in DTYPES:
            qkv = torch.randn((1, 2, 8, 12, head_dim), generator=g)
            qkv *= torch.logspace(-4, 4, 12)[:, None]
            norms = make_norms(head_dim, dtype)
            case = {"qkv": qkv.to(dtype), "cache_len": int32(0), **norms._asdict()}
            cases.append(case | {"cos_sin": torch.rand((8, head_dim), generator=g) * 2 - 1})
    torch.save(cases, tmp_path / "cases")
    arguments = [sys.executable, "-c", ISA_SCRIPT, isa, tmp_path / "cases", tmp_path / "results"]
    environment = {**os.environ, "LOPA_CPU_ISA": isa}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for case in torch.load(tmp_path / "results"):
        qkv, (q, window) = case["qkv"], case["result"]
        for got, x, weight in (
            (q, qkv[..., :10, :], case["q_norm"]),
            (window[0], qkv[..., 10:11, :], case["k_norm"]),
        ):
            normed = reference.normalize(x, weight, EPS, torch.float32)
            expected = reference.rotate(normed, case["cos_sin"]).to(x.dtype)
            assert torch.equal(got, expected), (isa, x.shape, x.dtype)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"q_norm": None}, ValueError, "q_norm: expected a tensor, since k_norm is given"),
        ({"k_norm": None}, ValueError, "k_norm: expected a tensor, since q_norm is given"),
        ({"q_norm": torch.ones(7)}, ValueError, r"q_norm: expected shape \[8\], got \[7\]"),
        ({"k_norm": torch.ones(1, 8)}, ValueError, r"k_norm: expected shape \[8\]"),
        ({"q_norm": torch.ones(8).half()}, TypeError, "q_norm: expected dtype torch.float32"),
        ({"k_norm": torch.ones(8).double()}, TypeError, "k_norm: expected dtype torch.float32"),
        (
            {"q_norm": torch.ones(8, device="meta")}, ValueError,
            "q_norm: expected a tensor on cpu, got meta",
        ),
        ({"norm_eps": -1e-6}, ValueError, "norm_eps: expected a finite number, 0 or more, got -1"),
        ({"norm_eps": math.nan}, ValueError, "norm_eps: expected a finite .* got nan"),
        ({"norm_eps": math.inf}, ValueError, "norm_eps: expected a finite .* got inf"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("direct", [False, True])
@over(TARGETS)
def test_bad_norms(
    change: dict[str, Any], error: type[Exception], match: str, direct: bool, target: Target
) -> None:
    if target.gpu and "meta" in match:
        match = "q_norm: expected a tensor on cuda:0, got meta"
    rows = moved(make_rows(BAD, torch.float32), target.device)
    caches = moved(make_caches(BAD, torch.float32), target.device)
    before = caches.clone()
    norms = Norms(*target.to(make_norms(8, torch.float32)))
    change = {
        name: value if getattr(value, "is_meta", True) else target.to(value)
        for name, value in change.items()
    }
    with pytest.raises(error, match="qkv_prewrite_: " + match):
        run(target, caches, 0, rows, norms._replace(**change), direct=direct)
    assert caches.same(before)


@over(KERNELS)
def test_bad_norms_through_torch_ops(target: Target) -> None:
    rows = moved(make_rows(BAD, torch.float32), target.device)
    caches = moved(make_caches(BAD, torch.float32), target.device)
    q = torch.zeros_like(rows.q)
    arguments = (q, *caches[2:], 0, rows.qkv.unflatten(-1, (-1, 8)), rows.cos_sin, rows.cache_len)
    weight = target.to(torch.ones(8))
    prewrite = operator(target, "qkv_prewrite_")
    for norms, match in (
        ((weight,), "k_norm: expected a tensor, since q_norm is given, got None"),
        ((None, weight), "q_norm: expected a tensor, since k_norm is given, got None"),
        ((weight, weight[:7]), r"k_norm: expected shape \[8\], got shape \[7\]"),
        ((weight, weight.double()), "k_norm: expected dtype Float, got Double"),
        ((weight, weight, math.nan), "norm_eps: expected a finite number, 0 or more, got nan"),
    ):
        with pytest.raises(RuntimeError, match="qkv_prewrite_: " + match):
            prewrite(*arguments, *norms)


@pytest.mark.parametrize("with_status", [False, True])
@over(KERNELS)
def test_opcheck(with_status: bool, target: Target) -> None:
    if target.interpreted:
        pytest.skip("too long for Triton's interpreter; test_operators.py has one of each")
    shape = (2, 2, 3, 4, 2, 4, 8, 20)
    rows = moved(make_rows(shape, torch.float32), target.device)
    caches = moved(make_caches(shape, torch.float32, "strided"), target.device)
    norms = target.to(make_norms(8, torch.float32))
    q, status = target.to((torch.zeros(2, 3, 4, 4, 8), int32(0, 0)))
    packed = (1, rows.qkv.unflatten(-1, (-1, 8)), rows.cos_sin, rows.cache_len)
    status = status if with_status else None
    for name, arguments in (
        ("qkv_prewrite_", (q, *caches[2:], *packed, *norms)),
        (
            "qkv_prewrite_direct_",
            (q, *caches[2:], *caches[:2], *packed, rows.commit_len, status, *norms),
        ),
    ):
        torch.library.opcheck(operator(target, name), arguments)


@over(KERNELS)
def test_compiles_in_one_graph(target: Target) -> None:
    if target.interpreted:
        pytest.skip("the interpreter's kernels are Python")
    torch._dynamo.reset()
    shape = (2, 2, 2, 5, 2, 3, 16, 20)
    rows = moved(make_rows(shape, torch.float32), target.device)
    norms = Norms(*target.to(make_norms(16, torch.float32)))
    caches = moved(make_caches(shape, torch.float32), target.device)
    expected, eager = caches.clone(), caches.clone()
    compiled = torch.compile(run, fullgraph=True)
    for given, direct in ((norms, False), (norms._replace(norm_eps=0.5), True)):
        want = run(target, expected, 1, rows, given, direct=direct)
        got = compiled(target, eager, 1, rows, given, direct=direct)
        assert equal_bits(got, want)
        assert eager.same(expected)


def test_numpy_arrays() -> None:
    shape = CACHES[1]
    rows = make_rows(shape, torch.float32)
    norms = make_norms(shape[6], torch.float32)
    expected = make_caches(shape, torch.float32)
    arrays = Caches(*(tensor.clone().numpy() for tensor in expected))
    q = run(Target("cpu", "cpu"), expected, 1, rows, norms)
    weights = {"q_norm": norms.q_norm.numpy(), "k_norm": norms.k_norm.numpy()}
    table, start = rows.cos_sin.numpy(), rows.cache_len.numpy()
    got = lk.qkv_prewrite_(
        *arrays[2:], 1, rows.qkv.numpy(), table, start, num_heads=shape[5], **weights
    )
    assert torch.equal(torch.from_numpy(got), q)
    assert torch.equal(torch.from_numpy(arrays.k_window), expected.k_window)


@over(GPU_TARGETS)
def test_graph_replays_with_new_weights(target: Target) -> None:
    shape = CACHES[1]
    caches = moved(make_caches(shape, torch.bfloat16), target.device)
    rows = moved(make_rows(shape, torch.bfloat16), target.device)
    norms = Norms(*target.to(make_norms(shape[6], torch.bfloat16)))
    run(target, caches, 1, rows, norms, direct=True)
    graph, q = capture(lambda: run(target, caches, 1, rows, norms, direct=True))
    for seed in (0, 1):
        torch.manual_seed(seed)
        for tensor in (rows.qkv, *norms[:2]):
            tensor.normal_()
        eager = caches.clone()
        graph.replay()
        assert torch.equal(q, run(target, eager, 1, rows, norms, direct=True))
        assert caches.same(eager)
