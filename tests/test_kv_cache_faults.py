"""The static KV cache: status words, what is dropped, sizes of 0, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from caches import BAD, int32, make_caches, make_rows
from cases import moved
from targets import GPU_TARGETS, KERNELS, TARGETS, Target, cpu, over

import lopa_kernels as lk
from lopa_kernels import Status
from lopa_kernels.ops.kv_cache import reference

REFERENCE = Target("reference", "cpu")


def lengths_of_many(batch: int, shape: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """Winners, cache_len and commit_len, most of them in range, with every kind of fault."""
    _, _, branches, window, _, _, _, capacity = shape
    g = torch.Generator().manual_seed(batch)
    limits = ((-1, branches + 1), (-1, capacity - window + 3), (-1, window + 2))
    drawn = (torch.randint(low, high, (batch,), generator=g) for low, high in limits)
    winner, cache_len, commit_len = (values.int() for values in drawn)
    return winner, cache_len, torch.where(torch.rand(batch, generator=g) < 0.4, 0, commit_len)


@pytest.mark.parametrize("batch", [1, 2, 31, 32, 33, 70])
@over(KERNELS)
def test_many_sequences_and_their_status(batch: int, target: Target) -> None:
    """Sequences that commit, commit nothing or are dropped; the words have gaps between them."""
    if target.interpreted and batch > 2 and batch != 33:
        pytest.skip("too long for Triton's interpreter")
    shape = (2, batch, 3, 6, 2, 3, 8, 20)
    results = []
    for where in (target, REFERENCE):
        caches = moved(make_caches(shape, torch.float16), where.device)
        rows = moved(make_rows(shape, torch.float16), where.device)
        winner, cache_len, commit_len = where.to(lengths_of_many(batch, shape))
        words = where.to(torch.arange(3 * batch, dtype=torch.int32) % 2 * 1024)
        lk.kv_commit_(
            *caches, winner, cache_len, commit_len, status=words[::3], backend=where.backend
        )
        committed = caches.clone()
        q = lk.qkv_prewrite_(
            *caches[2:], 1, rows.qkv, rows.cos_sin[:24], cache_len, num_heads=3, direct=True,
            k_cache=caches.k_cache, v_cache=caches.v_cache, commit_len=commit_len,
            status=words[1::3], backend=where.backend,
        )  # fmt: skip
        results.append((committed, caches, cpu(words), cpu(q)))
    for got, expected in zip(results[0][:2], results[1][:2], strict=True):
        assert got.same(expected)
    assert torch.equal(results[0][2], results[1][2])
    assert torch.equal(results[0][3], results[1][3])


@pytest.mark.parametrize("empty", range(8))
@over(KERNELS)
def test_empty(empty: int, target: Target) -> None:
    """A size of 0, each in turn: nothing to do, but a fault is reported all the same."""
    sizes = [2, 3, 2, 4, 2, 3, 8, 9]
    sizes[empty] = 0
    shape = tuple(sizes)
    if shape[5] == 0:
        pytest.skip("queries have one head at least")
    rows = moved(make_rows(shape, torch.float32), target.device)
    caches = moved(make_caches(shape, torch.float32), target.device)
    zero = torch.zeros(shape[1], dtype=torch.int32)
    for cache_len, word in ((zero, 0), (zero - 1, Status.BAD_STATE)):
        before = caches.clone()
        start, commit_len, status = target.to((cache_len, zero, zero.clone()))
        lengths = (start, commit_len)
        lk.kv_commit_(*caches, commit_len, *lengths, status=status, backend=target.backend)
        assert (status == word).all()
        assert caches.same(before)
        if shape[0] == 0:
            continue
        status.zero_()
        q = lk.qkv_prewrite_(
            *caches[2:], 0, rows.qkv, rows.cos_sin, start, num_heads=3, direct=True,
            k_cache=caches.k_cache, v_cache=caches.v_cache, commit_len=commit_len, status=status,
            backend=target.backend,
        )  # fmt: skip
        assert (status == word).all()
        assert q.isfinite().all()
    if 0 in shape[:5]:
        assert caches.same(before)


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


def finds_faults(target: Target) -> bool:
    """Whether a fault without a status is an error: the host sees the values."""
    return target.backend in ("cpu", "reference")


@pytest.mark.parametrize(("change", "bits", "match"), FAULTS)
@over(TARGETS)
def test_commit_faults(
    change: dict[str, torch.Tensor], bits: list[int], match: str, target: Target
) -> None:
    values = {"winner": int32(0, 1, 3), "cache_len": int32(0, 9, 112), "commit_len": int32(4, 5, 6)}
    values = values | change
    here = target.to(values)
    expected = make_caches(BAD, torch.float32)
    caches = moved(expected.clone(), target.device)
    silent = caches.clone()
    if finds_faults(target):
        with pytest.raises(RuntimeError, match="kv_commit_: .*" + match):
            lk.kv_commit_(*caches, **here, backend=target.backend)
        assert caches.same(expected)
    else:
        lk.kv_commit_(*silent, **here, backend=target.backend)

    status = target.to(int32(0, 1, 0))
    lk.kv_commit_(*caches, **here, status=status, backend=target.backend)
    assert status.tolist() == [b | s for b, s in zip(bits, (0, 1, 0), strict=True)]
    good = {
        name: torch.where(torch.tensor(bits) == 0, tensor, 0) for name, tensor in values.items()
    }
    lk.kv_commit_(*expected, **{name: t.int() for name, t in good.items()}, backend="reference")
    assert caches.same(expected)
    assert finds_faults(target) or silent.same(expected)


@over(TARGETS)
def test_winner_of_a_sequence_that_commits_nothing_is_not_read(target: Target) -> None:
    caches = moved(make_caches(BAD, torch.float32), target.device)
    before = caches.clone()
    lengths = target.to((int32(-1, 9, 0), int32(0, 1, 128), int32(0, 0, 0)))
    status = target.to(int32(0, 0, 0))
    lk.kv_commit_(*caches, *lengths, backend=target.backend)
    lk.kv_commit_(*caches, *lengths, status=status, backend=target.backend)
    assert caches.same(before)
    assert status.tolist() == [0, 0, 0]


@over(TARGETS)
def test_direct_faults(target: Target) -> None:
    """A full cache drops the cache write alone; a bad state drops the sequence."""
    rows = moved(make_rows(BAD, torch.float32), target.device)
    caches = moved(make_caches(BAD, torch.float32), target.device)
    before = caches.clone()
    cache_len, commit_len = target.to((int32(120, 10, 129), int32(16, 3, 0)))
    options: dict[str, Any] = {
        "num_heads": 4, "direct": True, "k_cache": caches.k_cache, "v_cache": caches.v_cache,
        "commit_len": commit_len, "backend": target.backend,
    }  # fmt: skip
    arguments = (*caches[2:], 1, rows.qkv, rows.cos_sin, cache_len)
    if finds_faults(target):
        with pytest.raises(RuntimeError, match=r"sequence 0: .* exceeds the capacity 128"):
            lk.qkv_prewrite_(*arguments, **options)
        assert caches.same(before)
    status = target.to(torch.zeros(3, dtype=torch.int32))
    q = lk.qkv_prewrite_(*arguments, **options, status=status)
    assert status.tolist() == [Status.CACHE_FULL, 0, Status.BAD_STATE]
    assert torch.equal(caches.k_cache[:, 0], before.k_cache[:, 0])
    assert torch.equal(caches.k_cache[1, 1, 10:13], caches.k_window[1, 1, 0, :3])
    assert torch.equal(caches.v_window[1, :2], rows.v[:2])
    assert torch.equal(caches.v_window[1, 2], before.v_window[1, 2])
    assert (q[2] == 0).all()
    assert (q[:2] != 0).any()
    if not finds_faults(target):
        silent = before.clone()
        options |= {"k_cache": silent.k_cache, "v_cache": silent.v_cache}
        assert torch.equal(lk.qkv_prewrite_(*silent[2:], *arguments[2:], **options), q)
        assert silent.same(caches)


@over(TARGETS)
def test_position_past_the_table(target: Target) -> None:
    rows = make_rows(BAD, torch.float32)
    here = moved(rows, target.device)
    caches = moved(make_caches(BAD, torch.float32), target.device)
    before = moved(caches.clone(), "cpu")
    arguments = (*caches[2:], 0, here.k, here.v, here.cos_sin, target.to(int32(128, 129, 0)))
    if finds_faults(target):
        match = r"kv_prewrite_: sequence 1: position 144 \(cache_len 129 \+ column 15\) .*144"
        with pytest.raises(RuntimeError, match=match):
            lk.kv_prewrite_(*arguments, backend=target.backend)
        assert caches.same(before)
        return
    lk.kv_prewrite_(*arguments, backend=target.backend)
    for b, start in ((0, 128), (2, 0)):
        before.k_window[0, b] = reference.rotate(rows.k[b], rows.cos_sin[start : start + 16])
        before.v_window[0, b] = rows.v[b]
    assert caches.same(before)


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


@over(GPU_TARGETS)
def test_tensors_of_another_device(target: Target) -> None:
    caches = moved(make_caches(BAD, torch.float32), target.device)
    zeros = target.to(int32(0, 0, 0))
    with pytest.raises(
        ValueError, match="kv_commit_: winner: expected a tensor on cuda:0, got cpu"
    ):
        lk.kv_commit_(*caches, zeros.cpu(), zeros, zeros, backend=target.backend)
    with pytest.raises(
        ValueError, match="kv_commit_: v_cache: expected a tensor on cuda:0, got cpu"
    ):
        lk.kv_commit_(
            caches.k_cache, caches.v_cache.cpu(), *caches[2:], zeros, zeros, zeros,
            backend=target.backend,
        )  # fmt: skip
