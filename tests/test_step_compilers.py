"""The step room under compilers: opcheck, fullgraph, export; and what its calls leave behind."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable

import pytest
import torch
from states import MASK, VOCAB, assert_same, clone, op_args, random_state, sample_inputs

import lopa_kernels
from lopa_kernels import (
    LopaConfig,
    LopaState,
    LopaStep,
    branch_step,
    empty_step,
    lopa_step,
    lopa_step_out,
    needed_rows,
    token_confidence,
)


class TestCompilers:
    @pytest.mark.parametrize("strided", [False, True])
    def test_opcheck(self, strided: bool) -> None:
        logits, state, config = sample_inputs()
        statistics = tuple(token_confidence(logits, metric=config.metric))
        if strided:
            logits = torch.randn(2, 3, 16, VOCAB + 2)[..., :VOCAB]
            state = LopaState(
                *(t.repeat_interleave(2, dim=0)[::2] for t in state)  # stride 2 over the batch
            )
            statistics = tuple(t.transpose(0, 1).contiguous().transpose(0, 1) for t in statistics)
        slots, window = state.tokens.shape[1:]
        ops = torch.ops.lopa
        torch.library.opcheck(ops.lopa_step, op_args(logits, state, config))
        branch_args = (*statistics, *state, *config.step_args(slots, window))
        torch.library.opcheck(ops.branch_step, branch_args)
        fields_needed = [state[i] for i in (0, 1, 4, 5, 6, 7, 11)]
        torch.library.opcheck(ops.needed_rows, (*fields_needed, MASK, False, 20))

        out = empty_step(state, config)
        results = dict(zip(LopaStep._fields[1:], out[1:], strict=True))
        following = {f"next_{n}": t for n, t in out.state._asdict().items()}
        torch.library.opcheck(ops.branch_step_out, branch_args, {**following, **results})
        torch.library.opcheck(
            ops.lopa_step_out, op_args(logits, state, config), {**following, **results}
        )
        own = LopaState(*(t.contiguous().clone() for t in state))
        in_place = (*statistics, *own, *config.step_args(slots, window))
        torch.library.opcheck(ops.branch_step_, in_place, results)
        torch.library.opcheck(ops.lopa_step_, op_args(logits, own, config), results)

    def test_fullgraph_and_dynamic_shapes(self) -> None:
        config = LopaConfig(mask_id=MASK, max_new_tokens=16, block_size=4, metric="margin")

        @torch.compile(fullgraph=True, dynamic=True)
        def compiled(logits: torch.Tensor, state: LopaState) -> LopaStep:
            needed = needed_rows(state, config)
            gathered = logits.flatten(0, 2)[needed.index]
            return lopa_step(gathered * 2, state, config, needed.rows)

        for batch, slots, window in ((2, 3, 16), (1, 4, 12), (3, 2, 20)):
            state = random_state(random.Random(window), batch, slots, window, 4)
            logits = torch.randn(batch, slots, window, VOCAB)
            assert_same(compiled(logits, state), lopa_step(logits * 2, state, config))

    def test_in_place_under_compile(self) -> None:
        logits, state, config = sample_inputs(3)
        expected = lopa_step(logits, state, config)
        own = clone(state)
        out = LopaStep(own, *empty_step(state, config)[1:])

        @torch.compile(fullgraph=True)
        def compiled(logits: torch.Tensor, state: LopaState, out: LopaStep) -> None:
            lopa_step_out(logits, state, config, out)

        compiled(logits, own, out)
        assert_same(out, expected)

    def test_export(self, tmp_path: object) -> None:
        _, state, config = sample_inputs(4)
        config = LopaConfig(**{**config.__dict__, "window": None, "branches": None})

        class Head(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.head = torch.nn.Linear(8, VOCAB)

            def forward(self, hidden: torch.Tensor, *state: torch.Tensor) -> LopaStep:
                return lopa_step(self.head(hidden), LopaState(*state), config)

        head = Head()
        hidden = torch.randn(2, 3, 16, 8)
        program = torch.export.export(head, (hidden, *state))
        assert "lopa.lopa_step" in str(program.graph)
        path = f"{tmp_path}/step.pt2"
        torch.export.save(program, path)
        loaded = torch.export.load(path).module()
        assert_same(loaded(hidden, *state), head(hidden, *state))
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


def operators_with_strings() -> dict[str, Callable[[], object]]:
    logits, state, config = sample_inputs()
    statistics = token_confidence(logits, metric=config.metric)
    opened = state.tokens == MASK
    q = torch.zeros(1, 1, 2, 1, 16)
    cache, window = torch.zeros(1, 1, 1, 16), torch.zeros(1, 1, 2, 1, 16)
    one = torch.ones(1, dtype=torch.int32)
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


@pytest.mark.parametrize("op", list(operators_with_strings()))
def test_calls_leave_no_memory_behind(op: str) -> None:
    """torch 2.13 makes a std::string argument with a `new` that nothing deletes: 48 bytes each."""
    call = operators_with_strings()[op]
    for _ in range(100):
        call()
    before = allocated_bytes()
    for _ in range(2000):
        call()
    assert allocated_bytes() - before < 2000 * 24
