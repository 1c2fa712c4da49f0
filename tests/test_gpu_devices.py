"""Operators on side streams, on a second device, at sizes past 32 bits, and across devices."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from cases import operator
from gpu import needs_memory
from operators import copied, op_calls, public_calls, tensors_of
from states import MASK, random_state, random_stats
from targets import GPU_TARGETS, Target, cpu, needs_gpu, over
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

import lopa_kernels as lk
from lopa_kernels import LopaConfig, LopaState, Status

CALLS = list(public_calls())
TWO_TO_31 = 1 << 31


def same(actual: list[torch.Tensor], expected: list[torch.Tensor], where: str) -> None:
    assert len(actual) == len(expected)
    for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
        torch.testing.assert_close(
            a, b, rtol=0, atol=0, equal_nan=True,
            msg=lambda m, index=index: f"{where}, tensor {index}: {m}",
        )  # fmt: skip


class TestStreams:
    @over(GPU_TARGETS)
    @pytest.mark.parametrize("name", CALLS)
    def test_runs_on_the_current_stream(self, name: str, target: Target) -> None:
        """The inputs are written late on a side stream: another stream would read zeros."""
        call = public_calls()[name]
        expected = call.copied("cuda")(backend=target.backend)
        late, here = call.copied("cuda"), call.copied("cuda")
        for tensor in here.tensors():
            tensor.zero_()
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            for old, new in zip(here.tensors(), late.tensors(), strict=True):
                old.copy_(new)
            got = here(backend=target.backend)
        assert torch.cuda.current_stream() != stream
        stream.synchronize()
        same(got, expected, name)

    @over(GPU_TARGETS)
    @pytest.mark.parametrize("name", CALLS)
    def test_two_streams_at_once(self, name: str, target: Target) -> None:
        """Nothing is shared between calls in flight."""
        calls = [public_calls(seed)[name].copied("cuda") for seed in (0, 1)]
        expected = [call.copied()(backend=target.backend) for call in calls]
        copies = [[call.copied() for _ in range(20)] for call in calls]
        streams = [torch.cuda.Stream() for _ in calls]
        got: list[list[list[torch.Tensor]]] = [[], []]
        torch.cuda.synchronize()
        for turn in range(20):
            for which, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    got[which].append(copies[which][turn](backend=target.backend))
        torch.cuda.synchronize()
        for which in (0, 1):
            for turn, result in enumerate(got[which]):
                same(result, expected[which], f"{name}, stream {which}, call {turn}")


@over(GPU_TARGETS)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", CALLS)
def test_second_device_while_the_first_is_current(name: str, target: Target) -> None:
    call = public_calls()[name]
    expected = call.copied("cuda:0")(backend=target.backend)
    assert torch.cuda.current_device() == 0
    got = call.copied("cuda:1")(backend=target.backend)
    assert torch.cuda.current_device() == 0
    assert {str(tensor.device) for tensor in got} == {"cuda:1"}
    torch.cuda.synchronize(1)
    same([t.cpu() for t in got], [t.cpu() for t in expected], name)


class TestBadDevices:
    @over(GPU_TARGETS)
    @pytest.mark.parametrize("name", CALLS)
    def test_public_functions(self, name: str, target: Target) -> None:
        """One tensor on the CPU, whichever: refused, and nothing has been written."""
        call = public_calls()[name].copied("cuda")
        before = call.copied().tensors()
        tensors = call.tensors()
        # What an output's device is, only the operator checks: see the next test.
        inputs = call.args[:-1] if "_out" in name else (call.args, call.kwargs)
        for tensor in tensors_of(inputs) if len(tensors) > 1 else ():
            away = tensor.cpu()
            args, kwargs = tree_map_only(
                torch.Tensor, lambda t, tensor=tensor, away=away: away if t is tensor else t,
                (call.args, call.kwargs),
            )  # fmt: skip
            with pytest.raises(ValueError, match=r"expected a tensor on (cuda:0|cpu), got"):
                call.function(*args, **kwargs, backend=target.backend)
        same(tensors, before, name)

    @over(GPU_TARGETS)
    @pytest.mark.parametrize("name", CALLS)
    def test_torch_ops(self, name: str, target: Target) -> None:
        call = op_calls()[name]
        args, kwargs = copied((call.args, call.kwargs), "cuda")
        leaves, spec = tree_flatten((args, kwargs))
        before = copied(leaves)
        tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        op = operator(target, call.name)
        for index in tensors if len(tensors) > 1 else ():
            moved = list(leaves)
            moved[index] = moved[index].cpu()
            some_args, some_kwargs = tree_unflatten(moved, spec)
            with pytest.raises(RuntimeError, match="expected .*, got"):
                op(*some_args, **some_kwargs)
        same([leaves[index] for index in tensors], [before[index] for index in tensors], name)


class TestSizes:
    @over(GPU_TARGETS)
    def test_no_rows(self, target: Target) -> None:
        options = {"backend": target.backend}
        for shape in ((0, 300), (2, 0, 300)):
            out = lk.token_confidence(torch.empty(shape, device="cuda"), **options)
            assert [t.shape for t in out] == [shape[:-1]] * 3
        none = torch.empty(0, 300, device="cuda")
        rows = torch.full((2, 3), -1, dtype=torch.int32, device="cuda")
        out = lk.token_confidence(none, rows=rows, **options)
        assert out.token.tolist() == [[0] * 3] * 2
        assert out.score.tolist() == [[float("-inf")] * 3] * 2
        call = public_calls()["lopa_step"].copied("cuda")
        _, state, config = call.args
        nowhere = torch.full(state.tokens.shape, -1, dtype=torch.int32, device="cuda")
        step = lk.lopa_step(none, state, config, nowhere, **options)
        assert (step.status & Status.MISSING_ROW).any()
        empty = LopaState(*(t[:0] for t in state))
        logits = torch.empty(*empty.tokens.shape, 300, device="cuda")
        step = lk.lopa_step(logits, empty, config, **options)
        assert step.state.tokens.shape == empty.tokens.shape == (0, 3, 8)
        assert lk.needed_rows(empty, config, **options).count.item() == 0
        assert lk.needed_rows(state, config, 0, **options).count.item() > 0
        window = torch.zeros(2, 0, 3, 4, 2, 8, device="cuda")
        cache = torch.zeros(2, 0, 9, 2, 8, device="cuda")
        zero = torch.zeros(0, dtype=torch.int32, device="cuda")
        lk.kv_commit_(cache, cache.clone(), window, window.clone(), zero, zero, zero, **options)
        torch.cuda.synchronize()

    @over(GPU_TARGETS)
    @pytest.mark.parametrize("vocab", [1, 2048, 2049, 152064])
    def test_one_row(self, vocab: int, target: Target) -> None:
        logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(vocab)) * 4
        expected = lk.softmax_stats(logits, backend="reference")
        got = lk.softmax_stats(logits.cuda(), backend=target.backend)
        for name, a, b in zip(got._fields, got, expected, strict=True):
            torch.testing.assert_close(
                a.cpu(), b, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
            )

    @over(GPU_TARGETS)
    @pytest.mark.big
    @pytest.mark.parametrize("shift", [False, True])
    def test_largest_round_equals_the_cpu_s(self, shift: bool, target: Target) -> None:
        """B 64, K 16, W 1024. Few distinct rows, so that ties are exact and nothing is close."""
        B, K, W, R, V = 64, 16, 1024, 48, 300
        rng = random.Random(0)
        g = torch.Generator().manual_seed(0)
        state = random_state(rng, B, K, W, 32)
        config = LopaConfig(
            mask_id=MASK, max_new_tokens=1024, block_size=32, tau_conf=0.4, shift=shift
        )
        table = torch.randn(R, V, generator=g) * (torch.rand(R, 1, generator=g) * 6 + 1)
        rows = torch.randint(0, R, (B, K, W), generator=g, dtype=torch.int32)
        expected = lk.lopa_step(table, state, config, rows, backend="cpu")
        here = target.to((table, state, rows))
        got = lk.lopa_step(here[0], here[1], config, here[2], backend=target.backend)
        self.same_step(got, expected)

        token, prob, score = random_stats(rng, (B, K, W))
        expected = lk.branch_step(token, prob, score, state, config, backend="cpu")
        stats = target.to((token, prob, score))
        got = lk.branch_step(*stats, here[1], config, backend=target.backend)
        self.same_step(got, expected)

        for capacity in (None, 1000):
            needed = lk.needed_rows(state, config, capacity, backend="cpu")
            found = lk.needed_rows(here[1], config, capacity, backend=target.backend)
            same([t.cpu() for t in found], list(needed), f"needed_rows, capacity {capacity}")

    @staticmethod
    def same_step(got: lk.LopaStep, expected: lk.LopaStep) -> None:
        names = [*LopaState._fields, *lk.LopaStep._fields[1:]]
        pairs = zip((*got.state, *got[1:]), (*expected.state, *expected[1:]), strict=True)
        for name, (a, b) in zip(names, pairs, strict=True):
            torch.testing.assert_close(
                a.cpu(), b, rtol=1e-5, atol=1e-5, equal_nan=True,
                msg=lambda m, name=name: f"{name}: {m}",
            )  # fmt: skip


@pytest.fixture(scope="module")
def many_logits() -> Iterator[torch.Tensor]:
    """[16384, 152064] in bf16: 5 GB, 2.5e9 elements."""
    needs_memory(12)
    logits = torch.empty(16384, 152064, dtype=torch.bfloat16, device="cuda")
    g = torch.Generator(device="cuda").manual_seed(0)
    for part in logits.split(2048):
        part.normal_(generator=g)
    assert logits.numel() > TWO_TO_31
    yield logits
    del logits
    torch.cuda.empty_cache()


@needs_gpu
@pytest.mark.big
class TestPast32Bits:
    # Rows on both sides of 2^31 elements (row 14122) and the last one; columns at both ends.
    PLANTED = ((0, 151000), (7000, 3), (14121, 9), (14122, 77), (14123, 152063), (16383, 5))

    @over(GPU_TARGETS)
    def test_logits(self, many_logits: torch.Tensor, target: Target) -> None:
        logits = many_logits
        for row, column in self.PLANTED:
            logits[row, column] = 20.0
        options = {"metric": "neg_entropy", "backend": target.backend}
        token, prob, score = lk.token_confidence(logits, **options)
        for row, column in self.PLANTED:
            assert int(token[row]) == column, f"row {row}"
        best = [part.amax(1) for part in logits.split(2048)]
        found = [
            part.gather(1, index[:, None])[:, 0]
            for part, index in zip(logits.split(2048), token.split(2048), strict=True)
        ]
        assert torch.cat(found).equal(torch.cat(best))

        some = torch.tensor([0, 14121, 14122, 15000, 16383])
        expected = lk.token_confidence(
            logits[some.cuda()].cpu(), metric="neg_entropy", backend="cpu"
        )
        for name, a, b in zip(expected._fields, (token, prob, score), expected, strict=True):
            torch.testing.assert_close(
                a.cpu()[some], b, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
            )
        named = lk.token_confidence(logits, rows=some.int().cuda(), **options)
        same(list(named), [t[some.cuda()] for t in (token, prob, score)], "by rows")

    @over(GPU_TARGETS)
    def test_step(self, many_logits: torch.Tensor, target: Target) -> None:
        shape = (4, 4, 1024)
        state = target.to(random_state(random.Random(3), *shape, 32))
        config = LopaConfig(mask_id=MASK, max_new_tokens=1024, block_size=32, metric="margin")
        options = {"backend": target.backend}
        dense = lk.lopa_step(many_logits.view(*shape, -1), state, config, **options)
        statistics = lk.token_confidence(many_logits, metric="margin", **options)
        folded = (tensor.view(shape) for tensor in statistics)
        expected = lk.branch_step(*folded, state, config, **options)
        TestSizes.same_step(dense, cpu(expected))
        everywhere = torch.arange(16384, dtype=torch.int32, device="cuda").view(shape)
        mapped = lk.lopa_step(many_logits, state, config, everywhere, **options)
        TestSizes.same_step(mapped, cpu(dense))

    @over(GPU_TARGETS)
    @pytest.mark.parametrize("direct", [False, True])
    def test_caches(self, direct: bool, target: Target) -> None:
        """Keys and values interleaved in 4.8 GB, so that either's offsets pass 2^31."""
        L, B, S, Hk, D, K, W = 3, 2, 131072, 12, 128, 2, 8
        needs_memory(8)
        whole = torch.zeros(L, B, S, 2, Hk, D, dtype=torch.bfloat16, device="cuda")
        assert whole.numel() > TWO_TO_31
        cache = whole[:, :, :, 0], whole[:, :, :, 1]
        g = torch.Generator(device="cuda").manual_seed(0)
        window = [
            torch.randn(L, B, K, W, Hk, D, device="cuda", generator=g).bfloat16() for _ in "kv"
        ]
        cache_len = torch.tensor([17, S - W], dtype=torch.int32, device="cuda")
        commit_len = torch.tensor([3, W], dtype=torch.int32, device="cuda")
        winner = torch.tensor([1, 0], dtype=torch.int32, device="cuda")
        options = {"backend": target.backend}
        if direct:
            winner.zero_()
            for layer in range(L):
                k, v = (t[layer].clone() for t in window)
                lk.kv_prewrite_(
                    *window, layer, k, v, None, cache_len, direct=True, k_cache=cache[0],
                    v_cache=cache[1], commit_len=commit_len, **options,
                )  # fmt: skip
        else:
            lk.kv_commit_(*cache, *window, winner, cache_len, commit_len, **options)
        for name, tensor, source in zip("kv", cache, window, strict=True):
            for b, (start, columns) in enumerate(((17, 3), (S - W, W))):
                written = tensor[:, b, start : start + columns]
                expected = source[:, b, int(winner[b]), :columns]
                assert written.equal(expected), f"{name}, sequence {b}"
                written.zero_()
        for layer in range(L):
            assert not whole[layer].any(), f"layer {layer}: written where it must not be"
