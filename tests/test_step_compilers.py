"""The step room under compilers: opcheck, fullgraph, export; and what its calls leave behind."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable

import pytest
import torch
from cases import moved, operator
from states import MASK, VOCAB, assert_same, clone, op_args, random_state, sample_inputs
from targets import KERNELS, Target, over

import lopa_kernels
from lopa_kernels import (
    LopaConfig,
    LopaState,
    LopaStep,
    _dispatch,
    branch_step,
    empty_step,
    lopa_step,
    lopa_step_out,
    needed_rows,
    token_confidence,
)


@over(KERNELS)
class TestCompilers:
    @pytest.mark.parametrize("strided", [False, True])
    def test_opcheck(self, strided: bool, target: Target) -> None:
        if target.interpreted:
            pytest.skip("a minute for what tests/test_operators.py has too")
        logits, state, config = sample_inputs()
        statistics = tuple(token_confidence(logits, metric=config.metric, backend="cpu"))
        if strided:
            logits = torch.randn(2, 3, 16, VOCAB + 2)[..., :VOCAB]
            state = LopaState(
                *(t.repeat_interleave(2, dim=0)[::2] for t in state)  # stride 2 over the batch
            )
            statistics = tuple(t.transpose(0, 1).contiguous().transpose(0, 1) for t in statistics)
        logits, state, statistics = moved((logits, state, statistics), target.device)
        slots, window = state.tokens.shape[1:]

        def check(name: str, *args: object, **kwargs: torch.Tensor) -> None:
            torch.library.opcheck(operator(target, name), args, kwargs)

        check("lopa_step", *op_args(logits, state, config))
        branch_args = (*statistics, *state, *config.step_args(slots, window))
        check("branch_step", *branch_args)
        fields_needed = [state[i] for i in (0, 1, 4, 5, 6, 7, 11)]
        check("needed_rows", *fields_needed, MASK, False, 20)

        out = empty_step(state, config)
        results = dict(zip(LopaStep._fields[1:], out[1:], strict=True))
        following = {f"next_{n}": t for n, t in out.state._asdict().items()}
        check("branch_step_out", *branch_args, **following, **results)
        check("lopa_step_out", *op_args(logits, state, config), **following, **results)
        own = LopaState(*(t.contiguous().clone() for t in state))
        in_place = (*statistics, *own, *config.step_args(slots, window))
        check("branch_step_", *in_place, **results)
        check("lopa_step_", *op_args(logits, own, config), **results)

    def test_fullgraph_and_dynamic_shapes(self, target: Target) -> None:
        torch._dynamo.reset()
        config = LopaConfig(mask_id=MASK, max_new_tokens=16, block_size=4, metric="margin")
        backend = target.backend

        @torch.compile(fullgraph=True, dynamic=True)
        def compiled(logits: torch.Tensor, state: LopaState) -> LopaStep:
            needed = needed_rows(state, config, backend=backend)
            gathered = logits.flatten(0, 2)[needed.index]
            return lopa_step(gathered * 2, state, config, needed.rows, backend=backend)

        shapes = ((1, 4, 12), (2, 3, 16), (3, 2, 20))
        for batch, slots, window in shapes[: 2 if target.interpreted else 3]:
            state = target.to(random_state(random.Random(window), batch, slots, window, 4))
            logits = torch.randn(batch, slots, window, VOCAB).to(target.device)
            expected = lopa_step(logits * 2, state, config, backend=backend)
            assert_same(compiled(logits, state), expected)

    def test_in_place_under_compile(self, target: Target) -> None:
        torch._dynamo.reset()
        logits, state, config = target.to(sample_inputs(3))
        expected = lopa_step(logits, state, config, backend=target.backend)
        own = clone(state)
        out = LopaStep(own, *empty_step(state, config)[1:])

        @torch.compile(fullgraph=True)
        def compiled(logits: torch.Tensor, state: LopaState, out: LopaStep) -> None:
            lopa_step_out(logits, state, config, out, backend=target.backend)

        compiled(logits, own, out)
        assert_same(out, expected)

    def test_export(self, target: Target, tmp_path: object) -> None:
        _, state, config = target.to(sample_inputs(4))
        config = LopaConfig(**{**config.__dict__, "window": None, "branches": None})

        class Head(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.head = torch.nn.Linear(8, VOCAB)

            def forward(self, hidden: torch.Tensor, *state: torch.Tensor) -> LopaStep:
                logits = self.head(hidden)
                return lopa_step(logits, LopaState(*state), config, backend=target.backend)

        head = Head().to(target.device)
        hidden = torch.randn(2, 3, 16, 8).to(target.device)
        program = torch.export.export(head, (hidden, *state))
        library = "lopa_triton" if target.backend == "triton" else "lopa"
        assert f"{library}.lopa_step" in str(program.graph)
        path = f"{tmp_path}/step.pt2"
        torch.export.save(program, path)
        loaded = torch.export.load(path).module()
        assert_same(loaded(hidden, *state), head(hidden, *state))
        if target.backend != "cpu":
            return
        package = torch._inductor.aoti_compile_and_package(program)
        assert_same(
            torch._inductor.aoti_load_package(package)(hidden, *state), head(hidden, *state)
        )


class MallocInfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd",
            "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


def allocated_bytes() -> int:
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        pytest.skip("counts glibc's allocations")
    mallinfo2.restype = MallocInfo
    return int(mallinfo2().uordblks)


#: the operators behind a C++ boundary
NATIVE = [target for target in KERNELS if target.backend != "triton"]
WITH_STRINGS = (
    "lopa_step",
    "branch_step",
    "token_confidence",
    "branch_confidence",
    "branch_attention",
)


def operators_with_strings(target: Target) -> dict[str, Callable[[], object]]:
    logits, state, config = target.to(sample_inputs())
    statistics = token_confidence(logits, metric=config.metric)
    opened = state.tokens == MASK
    q, cache, window, one = target.to(
        (
            torch.zeros(1, 1, 2, 1, 16),
            torch.zeros(1, 1, 1, 16),
            torch.zeros(1, 1, 2, 1, 16),
            torch.ones(1, dtype=torch.int32),
        )
    )
    return {
        "lopa_step": lambda: lopa_step(logits, state, config),
        "branch_step": lambda: branch_step(*statistics, state, config),
        "token_confidence": lambda: token_confidence(logits[0, 0, :1], metric="neg_entropy"),
        "branch_confidence": lambda: lopa_kernels.branch_confidence(
            statistics.score, opened, state.creation
        ),
        "branch_attention": lambda: lopa_kernels.branch_attention(
            q, cache, cache, window, window, one, one[None]
        ),
    }


@over(NATIVE)
@pytest.mark.parametrize("op", WITH_STRINGS)
def test_calls_leave_no_memory_behind(op: str, target: Target) -> None:
    """torch 2.13 makes a std::string argument with a `new` that nothing deletes: 48 bytes each."""
    if _dispatch.why_absent(target.backend, op) is not None:
        pytest.skip(f"no {op} of {target}")
    call = operators_with_strings(target)[op]
    for _ in range(500 if target.gpu else 100):
        call()
    before = allocated_bytes()
    for _ in range(2000):
        call()
    assert allocated_bytes() - before < 2000 * 24
