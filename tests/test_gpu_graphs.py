"""Rounds on a GPU: captured and replayed, never waited for, in as few launches as promised."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from gpu import capture, device_events, node_types, peak_bytes
from operators import Call, copied, public_calls
from states import MASK, random_state
from targets import GPU_TARGETS, TARGETS, Target, over
from toy import FORMS, Decode, Model, assert_same, make_config

import lopa_kernels as lk
from lopa_kernels import LopaConfig, Status

CALLS = list(public_calls())

#: launches of the hand-written kernels, at most
LAUNCHES = {
    "token_confidence": 2,
    "token_confidence_out": 2,
    "softmax_stats": 2,
    "branch_confidence": 1,
    "select_positions": 1,
    "spawn_branches": 1,
    "needed_rows": 1,
    "lopa_step": 3,
    "lopa_step_out": 3,
    "branch_step": 1,
    "branch_step_out": 1,
    "kv_prewrite_": 1,
    "qkv_prewrite_": 1,
    "kv_commit_": 1,
}

PROMPT = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
DECODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "shifted": {"shift": True, "metric": "margin"},
    "sampled": {"temperature": 0.8, "alpha": 0.2},
    "filtered": {"temperature": 0.9, "top_k": 30, "top_p": 0.9, "shift": True, "metric": "prob"},
}


def same(actual: list[torch.Tensor], expected: list[torch.Tensor], where: str) -> None:
    assert len(actual) == len(expected)
    for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
        torch.testing.assert_close(
            a, b, rtol=0, atol=0, equal_nan=True,
            msg=lambda m, index=index: f"{where}, tensor {index}: {m}",
        )  # fmt: skip


@over(TARGETS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["greedy", "shifted"])
def test_decode_is_the_cpu_s(kind: str, form: str, target: Target) -> None:
    """The toy of the tests below does what a decode does, on every backend."""
    if target.interpreted and (kind, form) != ("shifted", "in place"):
        pytest.skip("one is slow enough")
    config = make_config(**DECODES[kind])
    expected = Decode(Model("cpu"), config, "cpu", "cpu")
    here = Decode(Model(target.device), config, target.device, target.backend)
    for decode in (expected, here):
        decode.start(PROMPT)
    winners, committed, rounds = set(), 0, 0
    while not expected.state.done.all():
        committed += int(expected.state.commit_len.sum())
        expected.round()
        rounds += 1
        winners |= set(expected.results.winner.tolist())
        if target.interpreted and rounds > 3:
            continue  # it takes seconds a round
        here.round(form)
        for name, tensor in here.tensors().items():
            torch.testing.assert_close(
                tensor.cpu(),
                expected.tensors()[name],
                rtol=1e-5,
                atol=1e-5,
                msg=lambda m, name=name, rounds=rounds: f"round {rounds}, {name}: {m}",
            )
        assert rounds < 50
    assert not expected.results.status.any()
    assert not expected.status.any()
    assert rounds >= 5
    assert committed > 20
    assert len(winners) > 1


@over(GPU_TARGETS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", list(DECODES))
def test_captured_decode_equals_eager(kind: str, form: str, target: Target) -> None:
    """One captured round, replayed to the end of a decode, and of a second one."""
    config = make_config(**DECODES[kind])
    model = Model("cuda")
    eager = Decode(model, config, "cuda", target.backend)
    replayed = Decode(model, config, "cuda", target.backend)
    replayed.start(PROMPT, seed=1)
    replayed.round(form)  # a first call, and no more than that
    graph, _ = capture(lambda: replayed.round(form))

    texts = []
    for prompt, seed in ((PROMPT, 11), (PROMPT.flip(1), 12), (PROMPT, 13)):
        for decode in (eager, replayed):
            decode.start(prompt, seed)
        rounds = 0
        while not eager.state.done.all():
            eager.round(form)
            graph.replay()
            rounds += 1
            assert_same(replayed, eager, f"seed {seed}, round {rounds}")
            assert rounds < 50
        assert rounds >= 5
        assert not eager.results.status.any()
        texts.append(replayed.cache[0].clone())
    assert texts[0].equal(texts[2]) == (config.temperature == 0), "the seed decides the draws"
    assert not texts[0].equal(texts[1]), "the prompt decides the text"


@over(GPU_TARGETS)
@pytest.mark.parametrize("kind", list(DECODES))
def test_replays_follow_their_inputs(kind: str, target: Target) -> None:
    """Random states of every kind, logits, seeds and steps, copied into one captured round."""
    config = LopaConfig(
        mask_id=MASK, max_new_tokens=32, block_size=4, tau_conf=0.3, **DECODES[kind]
    )
    vocab, shape = 2100, (3, 4, 24)
    g = torch.Generator().manual_seed(0)

    def draw(seed: int) -> list[torch.Tensor]:
        sharp = torch.rand(*shape, 1, generator=g) * 9 + 1
        logits = torch.randn(*shape, vocab, generator=g) * sharp
        key = [torch.tensor([seed * 1000]), torch.tensor([seed])]
        caches = [torch.randn(2, 3, 64, 2, 8, generator=g) for _ in range(2)]
        windows = [torch.randn(2, *shape, 2, 8, generator=g) for _ in range(2)]
        status = [torch.zeros(3, dtype=torch.int32)]
        state = random_state(random.Random(seed), *shape, 4)
        return [logits, *state, *key, *caches, *windows, *status]

    def play(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        logits, state, (seed, step) = tensors[0], lk.LopaState(*tensors[1:13]), tensors[13:15]
        key = {"seed": seed, "step": step} if config.temperature > 0 else {}
        needed = lk.needed_rows(state, config, backend=target.backend)
        gathered = logits.flatten(0, 2)[needed.index]
        out = lk.lopa_step(gathered, state, config, needed.rows, **key, backend=target.backend)
        lk.kv_commit_(
            *tensors[15:19],
            out.winner,
            state.cache_len,
            state.commit_len,
            status=tensors[19],
            backend=target.backend,
        )
        return [*needed, *out.state, *out[1:]]

    static = [tensor.to("cuda") for tensor in draw(0)]
    play(static)
    graph, outputs = capture(lambda: play(static))
    winners = set()
    for seed in range(1, 7):
        fresh = [tensor.to("cuda") for tensor in draw(seed)]
        for old, new in zip(static, fresh, strict=True):
            old.copy_(new)
        graph.replay()
        expected = play(fresh)
        same([*outputs, *static[15:]], [*expected, *fresh[15:]], f"replay {seed}")
        winners |= set(outputs[15].tolist())
        assert not static[19].any()
    assert len(winners) > 1


@over(GPU_TARGETS)
def test_replays_allocate_nothing(target: Target) -> None:
    decode = Decode(Model("cuda"), make_config(temperature=0.8), "cuda", target.backend)
    decode.start(PROMPT)
    decode.round()
    graph, _ = capture(decode.round)
    decode.start(PROMPT)
    graph.replay()
    torch.cuda.synchronize()
    counters = ("allocation.all.allocated", "segment.all.allocated", "allocated_bytes.all.current")
    before = {name: torch.cuda.memory_stats()[name] for name in counters}
    for _ in range(5):
        graph.replay()
    torch.cuda.synchronize()
    assert {name: torch.cuda.memory_stats()[name] for name in counters} == before


@over(GPU_TARGETS)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.usefixtures("plain_memory")
def test_every_operator_captures_after_a_first_call(name: str, target: Target) -> None:
    call = public_calls()[name]
    expected = call.copied("cuda")(backend=target.backend)
    here = call.copied("cuda")
    graph, result = capture(lambda: here(backend=target.backend))
    for old, new in zip(here.tensors(), call.copied("cuda").tensors(), strict=True):
        old.copy_(new)
    graph.replay()
    same(result, expected, name)
    types = node_types(graph)
    assert set(types) == {"kernel"}, f"{name}: {types}"
    if target.backend == "cuda" and "strided" not in name:
        assert len(types) <= LAUNCHES[name.partition(" ")[0]], f"{name}: {types}"


@over(GPU_TARGETS)
@pytest.mark.parametrize("name", CALLS)
def test_no_operator_waits_for_the_device(name: str, target: Target) -> None:
    """PyTorch's own synchronisations; those of the kernels' hosts would break a capture."""
    call = public_calls()[name]
    expected = call.copied("cuda")(backend=target.backend)
    here, number = call.copied("cuda"), torch.ones(1, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
            number.item()  # the mode sees what waits
        result = here(backend=target.backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    same(result, expected, name)


@over([target for target in GPU_TARGETS if target.backend == "cuda"])
@pytest.mark.big
@pytest.mark.parametrize("name", [name for name in CALLS if "strided" not in name])
@pytest.mark.usefixtures("plain_memory")
def test_launches_in_a_profile(name: str, target: Target) -> None:
    call = public_calls()[name].copied("cuda")
    names = [event.name for event in device_events(lambda: call(backend=target.backend))]
    assert names, "a call without a kernel"
    assert all("lopa::" in kernel for kernel in names), names
    assert len(names) <= LAUNCHES[name.partition(" ")[0]], names


def _round(vocab: int, shift: bool, temperature: float) -> Call:
    """K 4, W 64: 512 rows of logits, all open."""
    shape = (2, 4, 64)
    config = LopaConfig(
        mask_id=vocab - 1, max_new_tokens=64, block_size=64, shift=shift, temperature=temperature
    )
    state = lk.initial_state(torch.zeros(2, 0, dtype=torch.int64), config)
    state = state._replace(
        tokens=torch.full(shape, vocab - 1),
        length=torch.full(shape[:2], 64, dtype=torch.int32),
        creation=torch.ones(shape[:2]),
        eos=torch.zeros(shape[:2], dtype=torch.bool),
        branches=torch.full((2,), 4, dtype=torch.int32),
        carry_prob=torch.full((2,), 0.5),
        carry_score=torch.full((2,), 0.5),
    )
    state = copied(state, "cuda")
    logits = torch.randn(*shape, vocab, device="cuda", dtype=torch.bfloat16)
    key = {"seed": torch.zeros(1, dtype=torch.int64, device="cuda")} if temperature else {}
    return Call(lk.lopa_step, (logits, state, config), key)


@over(GPU_TARGETS)
@pytest.mark.big
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.usefixtures("plain_memory")
def test_logits_are_never_copied(shift: bool, temperature: float, target: Target) -> None:
    call = _round(152064, shift, temperature)
    logits = call.args[0]
    extra = peak_bytes(lambda: call(backend=target.backend))
    assert extra < logits.nbytes / 16, f"{extra / 1e6:.1f} MB for {logits.nbytes / 1e6:.0f} MB"
    status = call(backend=target.backend)[16].tolist()
    assert status == [Status.OK] * len(status)
