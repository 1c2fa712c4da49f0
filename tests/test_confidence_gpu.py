"""The vocabulary pass on a GPU: graphs, streams, synchronisation, memory, sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from cases import VOCABULARY_OPTIONS, close, integer, operator, random_logits
from gpu import capture
from targets import GPU_TARGETS, Target, cpu, needs_gpu, over

from lopa_kernels.ops.confidence import (
    TokenConfidence,
    reference,
    softmax_stats,
    token_confidence,
    token_confidence_out,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Call:
    """Both forms of the pass on inputs and outputs that stay where they are."""

    def __init__(
        self, target: Target, options: dict, rows: int = 40, vocab: int = 50257, **kind: object
    ) -> None:
        self.generator = torch.Generator().manual_seed(rows + vocab)
        self.options = {**options, "backend": target.backend}
        self.options["rows"] = torch.zeros(5, 7, dtype=torch.int32, device=target.device)
        if "seed" in options:
            self.options["seed"] = target.to(integer(0))
            self.options["step"] = target.to(integer(0))
        self.logits = torch.zeros(rows, vocab, device=target.device, **kind)
        self.out = TokenConfidence(
            torch.zeros(5, 7, dtype=torch.int64, device=target.device),
            torch.zeros(7, 5, device=target.device).t(),
            torch.zeros(5, 7, device=target.device),
        )
        self.renew()

    def renew(self) -> None:
        """Other logits, rows (some of them missing or out of range), seed and step."""
        logits = torch.randn(self.logits.shape, generator=self.generator) * 3
        logits[:: len(logits) // 3] = logits[:: len(logits) // 3].round()
        self.logits.copy_(logits)
        rows = torch.randint(-2, len(logits) + 2, (5, 7), generator=self.generator)
        self.options["rows"].copy_(rows)
        for name in ("seed", "step"):
            if name in self.options:
                value = torch.randint(-(2**62), 2**62, (1,), generator=self.generator)
                self.options[name].copy_(value)

    def __call__(self) -> list[torch.Tensor]:
        """Poisons the outputs of the out form, and runs."""
        self.out.token.fill_(-7)
        self.out.prob.fill_(math.nan)
        self.out.score.fill_(math.nan)
        token_confidence_out(self.logits, self.out, **self.options)
        options = {k: v for k, v in self.options.items() if k != "metric"}
        stats = softmax_stats(self.logits, **options)
        return [*self.out, *stats, *token_confidence(self.logits, **self.options)]


def check_equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def copies(results: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in results]


@pytest.mark.parametrize("options", VOCABULARY_OPTIONS)
@pytest.mark.parametrize("vocab", [777, 152064])
@over(GPU_TARGETS)
def test_a_captured_graph_replays_with_other_values(
    vocab: int, options: dict, target: Target
) -> None:
    """Bit for bit what eager execution gives; nothing but a first call comes before."""
    call = Call(target, options, vocab=vocab, dtype=torch.bfloat16)
    call()
    graph, captured = capture(call)
    tokens = []
    for _ in range(4):
        call.renew()
        graph.replay()
        replayed = copies(captured)
        check_equal(replayed, call())
        tokens.append(replayed[0])
    assert not torch.equal(tokens[0], tokens[1])


@contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("options", VOCABULARY_OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@over(GPU_TARGETS)
def test_never_waits_for_the_device(dtype: torch.dtype, options: dict, target: Target) -> None:
    call = Call(target, options, vocab=9001, dtype=dtype)
    expected = copies(call())
    with no_synchronisation():
        results = call()
    check_equal(expected, results)


@pytest.mark.parametrize("options", VOCABULARY_OPTIONS)
@pytest.mark.parametrize("vocab", [500, 152064])
@over(GPU_TARGETS)
def test_repeats_are_equal_bit_for_bit(vocab: int, options: dict, target: Target) -> None:
    call = Call(target, options, rows=300, vocab=vocab, dtype=torch.bfloat16)
    expected = copies(call())
    for _ in range(10):
        check_equal(expected, call())


def fill_free_memory(byte: int) -> None:
    """What the caching allocator hands out next holds this byte."""
    sizes = [512 * 4**i for i in range(9) for _ in range(6)]
    blocks = [torch.full((size,), byte, dtype=torch.uint8, device="cuda") for size in sizes]
    del blocks


@pytest.mark.parametrize("options", VOCABULARY_OPTIONS)
@over(GPU_TARGETS)
def test_what_scratch_memory_held_does_not_matter(options: dict, target: Target) -> None:
    """Partial statistics, counters and outputs are all written before they are read."""
    call = Call(target, options, vocab=33333)
    torch.utils.deterministic.fill_uninitialized_memory = False
    expected = copies(call())
    for byte in (0xFF, 0x00, 0x7F, 0x80):
        fill_free_memory(byte)
        check_equal(expected, call())


@pytest.mark.parametrize("options", VOCABULARY_OPTIONS)
@over(GPU_TARGETS)
def test_streams_do_not_share_scratch_memory(options: dict, target: Target) -> None:
    calls = [Call(target, options, rows=rows, vocab=30011) for rows in (40, 41)]
    expected = [copies(call()) for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    results: list[list[list[torch.Tensor]]] = [[], []]
    for _ in range(20):
        for call, stream, kept in zip(calls, streams, results, strict=True):
            with torch.cuda.stream(stream):
                kept.append(copies(call()))
    torch.cuda.synchronize()
    for kept, wanted in zip(results, expected, strict=True):
        for result in kept:
            check_equal(result, wanted)


@pytest.mark.parametrize("options", [o for o in VOCABULARY_OPTIONS if "top_p" not in o])
@over(GPU_TARGETS)
def test_more_than_2_31_elements(options: dict, target: Target) -> None:
    vocab = 152064
    rows = 2**31 // vocab + 100
    free, _ = torch.cuda.mem_get_info()
    if free < 3 * rows * vocab:
        pytest.skip(f"needs {3 * rows * vocab >> 30} GiB of memory")
    logits = torch.empty(rows, vocab, dtype=torch.bfloat16, device=target.device)
    generator = torch.Generator(target.device).manual_seed(7)
    for part in (logits[:2], logits[-5:]):
        part.normal_(std=4.0, generator=generator)
    picked = [0, rows - 5, rows - 1]
    call = {**target.to(options), "backend": target.backend}
    index = target.to(torch.tensor(picked, dtype=torch.int32))
    some = cpu(token_confidence(logits, rows=index, **call))
    every = cpu(token_confidence(logits, **call))
    for a, b in zip(some, every, strict=True):
        assert torch.equal(a, b[picked])
    # The row's index belongs to the draw: the reference gets it by a view of stride 0.
    for position, row in enumerate(picked):
        values = cpu(logits[row]).expand(rows, vocab)
        at = torch.tensor([row], dtype=torch.int32)
        token, prob, score = reference.token_confidence(
            values, rows=at, dtype=torch.float64, **options
        )
        assert some.token[position] == token[0]
        close(some.prob[position], prob[0])
        close(some.score[position], score[0], 1e-5)


@pytest.mark.parametrize("count", [1, 64, 4096, 70000])
@over(GPU_TARGETS)
def test_any_number_of_rows(count: int, target: Target) -> None:
    """A grid has room for 65535 in its second dimension."""
    logits = random_logits(97, 130, dtype=torch.bfloat16)
    rows = torch.arange(count, dtype=torch.int32) % 97
    for options in VOCABULARY_OPTIONS:
        arguments = target.to({"logits": logits, "rows": rows, **options})
        result = cpu(token_confidence(**arguments, backend=target.backend))
        expected = token_confidence(logits, **options)
        assert torch.equal(result.token, expected.token[rows.long()])
        close(result.prob, expected.prob[rows.long()])
        close(result.score, expected.score[rows.long()], 1e-5)


@over(GPU_TARGETS)
def test_a_device_that_is_not_current(target: Target) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    for options in VOCABULARY_OPTIONS:
        call = Call(Target(target.backend, "cuda:1"), options)
        assert torch.cuda.current_device() == 0
        there = cpu(call())
        here = Call(target, options)
        check_equal(there, cpu(here()))


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
@over(GPU_TARGETS)
def test_compiles_into_graphs(mode: str, target: Target) -> None:
    def step(x: torch.Tensor, seed: torch.Tensor) -> torch.Tensor:
        options = {"temperature": 0.7, "seed": seed, "top_k": 20, "backend": target.backend}
        token, prob, score = token_confidence(x * 2, metric="neg_entropy", **options)
        return torch.stack([token.float(), prob, score + 1])

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, mode=mode)
    for seed in range(5):
        x = target.to(random_logits(9, 3001, seed=seed))
        key = target.to(integer(seed))
        torch.testing.assert_close(compiled(x, key).clone(), step(x, key))


@over(GPU_TARGETS)
def test_cupy_arrays(target: Target) -> None:
    cupy = pytest.importorskip("cupy")
    logits = cupy.random.standard_normal((3, 5000), dtype=cupy.float32)
    seed = cupy.array([3])
    result = token_confidence(logits, backend=target.backend)
    assert all(isinstance(array, cupy.ndarray) for array in result)
    assert bool((result.token == logits.argmax(-1)).all())
    drawn = token_confidence(logits, temperature=1.0, seed=seed, backend=target.backend)
    expected = token_confidence(
        torch.from_numpy(cupy.asnumpy(logits)), temperature=1.0, seed=integer(3)
    )
    assert drawn.token.tolist() == expected.token.tolist()


@needs_gpu
@pytest.mark.parametrize("name", ["seed", "step", "rows"])
def test_tensors_of_another_device(name: str) -> None:
    logits = torch.zeros(2, 8, device="cuda")
    tensors = {"seed": integer(1), "step": integer(1), "rows": torch.zeros(2, dtype=torch.int32)}
    tensors = {key: value if key == name else value.cuda() for key, value in tensors.items()}
    with pytest.raises(ValueError, match=f"{name}: expected a tensor on cuda:0, got cpu"):
        token_confidence(logits, temperature=1.0, **tensors)


@over(GPU_TARGETS)
def test_tensors_of_another_device_past_the_python_checks(target: Target) -> None:
    logits = torch.zeros(2, 8, device=target.device)
    for name, value in (("seed", integer(1)), ("rows", torch.zeros(2, dtype=torch.int32))):
        with pytest.raises(RuntimeError, match=f"{name}: expected a tensor on cuda:0, got the CPU"):
            operator(target, "token_confidence")(logits, **{name: value})
