"""torch.compile on a GPU: one graph, its modes, caches that are never copied."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from gpu import device_events, needs_memory, peak_bytes
from targets import GPU_TARGETS, needs_gpu
from torch.utils._pytree import tree_map

import lopa_kernels as lk
from lopa_kernels import LopaConfig, LopaState, LopaStep

pytestmark = [needs_gpu, pytest.mark.big]

VOCAB, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 512, 64, 2, 2, 2, 128
BATCH, PROMPT, CAPACITY = 2, 8, 1 << 19
CONFIG = LopaConfig(
    mask_id=VOCAB - 1, max_new_tokens=64, block_size=8, branches=3, window=24, tau_conf=0.02,
    metric="margin",
)  # fmt: skip


class Model(torch.nn.Module):
    """Pre-Write, a head on the rows that the round needs, the round, the commit."""

    def __init__(self, slots: int, window: int, cache: tuple[torch.Tensor, torch.Tensor]) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)

        def weight(*shape: int) -> torch.nn.Parameter:
            values = torch.randn(shape, generator=g) / shape[-1] ** 0.5
            return torch.nn.Parameter(values.bfloat16(), requires_grad=False)

        self.embed = torch.nn.Embedding(VOCAB, HIDDEN, dtype=torch.bfloat16)
        self.embed.weight = weight(VOCAB, HIDDEN)
        self.qkv = torch.nn.Linear(HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD_DIM, bias=False)
        self.qkv.weight = weight((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN)
        self.down = torch.nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=False)
        self.down.weight = weight(HIDDEN, HEADS * HEAD_DIM)
        self.head = torch.nn.Linear(HIDDEN, VOCAB, bias=False)
        self.head.weight = weight(VOCAB, HIDDEN)
        angle = torch.rand(256, HEAD_DIM // 2, generator=g) * 6
        self.register_buffer("cos_sin", torch.cat([angle.cos(), angle.sin()], 1))
        self.to("cuda")
        shape = (LAYERS, BATCH, slots, window, KV_HEADS, HEAD_DIM)
        for name in ("k_window", "v_window"):
            zeros = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
            self.register_buffer(name, zeros)
        self.register_buffer("k_cache", cache[0])
        self.register_buffer("v_cache", cache[1])

    def forward(
        self, state: LopaState, backend: str | None
    ) -> tuple[torch.Tensor, torch.Tensor, LopaStep]:
        window = self.k_window, self.v_window
        x = self.embed(state.tokens)
        for layer in range(LAYERS):
            q = lk.qkv_prewrite_(
                *window, layer, self.qkv(x), self.cos_sin, state.cache_len,
                num_heads=HEADS, backend=backend,
            )  # fmt: skip
            x = x + self.down(q.flatten(-2))
        needed = lk.needed_rows(state, CONFIG, backend=backend)
        logits = self.head(x.flatten(0, 2)[needed.index])
        step = lk.lopa_step(logits, state, CONFIG, needed.rows, backend=backend)
        lk.kv_commit_(
            self.k_cache, self.v_cache, *window, step.winner, state.cache_len, state.commit_len,
            backend=backend,
        )  # fmt: skip
        return logits, needed.rows, step


@pytest.fixture
def cache() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """1.07 GB each: more than all that compiling and measuring take for themselves."""
    needs_memory(8)
    shape = (LAYERS, BATCH, CAPACITY, KV_HEADS, HEAD_DIM)
    yield tuple(torch.zeros(2, *shape, dtype=torch.bfloat16, device="cuda").unbind())
    torch._dynamo.reset()
    torch.cuda.empty_cache()


def same(actual: LopaStep, expected: LopaStep, where: str) -> None:
    names = [*LopaState._fields, *LopaStep._fields[1:]]
    pairs = zip((*actual.state, *actual[1:]), (*expected.state, *expected[1:]), strict=True)
    for name, (a, b) in zip(names, pairs, strict=True):
        torch.testing.assert_close(
            a, b, rtol=0, atol=0, equal_nan=True,
            msg=lambda m, name=name: f"{where}, {name}: {m}",
        )  # fmt: skip


#: mode, the backend of the calls, that of the process
CASES = [
    pytest.param("reduce-overhead", None, "auto", id="reduce-overhead"),
    pytest.param("max-autotune", None, "auto", id="max-autotune"),
    pytest.param("reduce-overhead", "triton", "auto", id="triton by argument"),
    pytest.param("reduce-overhead", None, "triton", id="triton by default"),
]


@pytest.mark.parametrize(("mode", "backend", "default"), CASES)
@pytest.mark.usefixtures("plain_memory")
def test_compiled_rounds(
    mode: str, backend: str | None, default: str, cache: tuple[torch.Tensor, torch.Tensor]
) -> None:
    if "triton" in (backend, default) and not any(t.backend == "triton" for t in GPU_TARGETS):
        pytest.skip("no Triton here")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    g = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, VOCAB - 1, (BATCH, PROMPT), generator=g).to("cuda")
    start = lk.initial_state(prompt, CONFIG)
    with lk.use_backend(default), torch.no_grad():
        prefill = Model(1, start.tokens.shape[2], cache)
        states = [prefill(start, backend)[2].state]
        model = Model(CONFIG.branches, CONFIG.window, cache)
        compiled = torch.compile(model, fullgraph=True, mode=mode)
        check = torch.zeros_like(model.k_cache[:, :, :256])

        def rounds() -> None:
            for number in range(10):
                where, state = f"round {number}", states[-1]
                check.copy_(model.k_cache[:, :, :256])
                torch.compiler.cudagraph_mark_step_begin()
                logits, rows, step = tree_map(torch.clone, compiled(state, backend))
                expected = lk.lopa_step(logits, state, CONFIG, rows, backend=backend)
                same(step, expected, where)
                assert not step.status.any(), where
                # The commit of this round, from the windows that its Pre-Write left.
                lk.kv_commit_(
                    check, check.clone(), model.k_window, model.v_window, step.winner,
                    state.cache_len, state.commit_len, backend=backend,
                )  # fmt: skip
                assert check.equal(model.k_cache[:, :, :256]), where
                states.append(step.state)

        copy = cache[0].nbytes
        extra = peak_bytes(rounds)
        assert extra < copy / 2, f"{extra / 1e6:.1f} MB beside caches of {copy / 1e6:.0f} MB"
        assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
        assert states[-1].cache_len.sum() > BATCH * PROMPT, "nothing was committed"

        def run() -> torch.Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            return compiled(states[-1], backend)[0]

        # 5 TB/s is more than any GPU of today reaches.
        slow = [event for event in device_events(run) if event.microseconds > 2 * copy / 5e6]
        assert not slow, f"as slow as a copy of a cache: {slow}"
        eager_logits, _, _ = model(states[-1], backend)
        torch.testing.assert_close(run(), eager_logits, rtol=0.05, atol=0.05)
