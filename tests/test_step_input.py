"""What lopa_step refuses, and in which words."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from cases import operator
from states import MASK, clone, op_args, sample_inputs
from targets import KERNELS, TARGETS, Target, over

from lopa_kernels import (
    LopaConfig,
    LopaState,
    LopaStep,
    Status,
    empty_step,
    lopa_step,
    lopa_step_out,
    needed_rows,
)


def inputs(target: Target) -> tuple[torch.Tensor, LopaState, LopaConfig, Callable[..., LopaStep]]:
    """Good inputs on the target, and lopa_step there."""
    return (*target.to(sample_inputs()), partial(lopa_step, backend=target.backend))


class TestBadInput:
    def test_config(self) -> None:
        good = {"mask_id": MASK, "max_new_tokens": 32}
        nan = float("nan")
        for bad in (
            {"tau_conf": nan},
            {"tau_conf": 1.5},
            {"tau_conf": -0.1},
            {"tau_conf": nan, "accept": "score"},
            {"tau_add": 1.1},
            {"tau_act": -0.1},
            {"tau_act": nan},
            {"alpha": 2},
            {"fraction": 0.0},
            {"fraction": 1.1},
            {"metric": "entropy"},
            {"accept": "logit"},
            {"fallback": "none"},
            {"reduction": "max"},
            {"group": 0},
            {"top_k": 0},
            {"top_p": 0.0},
            {"top_p": 1.5},
            {"temperature": -1.0},
            {"temperature": float("inf")},
            {"block_size": 0},
            {"max_new_tokens": 31},
            {"branches": 0},
            {"window": 31},
            {"mask_id": -1},
            {"eos_id": -1},
            {"eos_id": MASK},
            {"shift": 1},
        ):
            name = next(iter(bad))
            with pytest.raises(ValueError, match=rf"LopaConfig: {name}: expected .*, got"):
                LopaConfig(**{**good, **bad})
        with pytest.raises(ValueError, match="group: expected a number of columns"):
            LopaConfig(**good, reduction="group")
        assert hash(LopaConfig(**good)) == hash(LopaConfig(**good))

    @over(TARGETS)
    def test_state_fields(self, target: Target) -> None:
        logits, state, config, step = inputs(target)
        device = logits.device
        for name, tensor in state._asdict().items():
            wrong = torch.float64 if tensor.dtype != torch.float64 else torch.float32
            with pytest.raises(TypeError, match=rf"lopa_step: state.{name}: expected dtype"):
                step(logits, state._replace(**{name: tensor.to(wrong)}), config)
            if name != "tokens":
                with pytest.raises(ValueError, match=rf"state.{name}: expected shape"):
                    step(logits, state._replace(**{name: tensor[:1]}), config)
            if name != "tokens":
                other = state._replace(**{name: tensor.to("meta")})
                wanted = rf"state.{name}: expected a tensor on {device}, got meta"
                with pytest.raises(ValueError, match=wanted):
                    step(logits, other, config)
        with pytest.raises(ValueError, match=f"logits: expected a tensor on {device}, got meta"):
            step(logits.to("meta"), state, config)
        with pytest.raises(ValueError, match=r"state.tokens: expected shape \[B, K, W\]"):
            step(logits, state._replace(tokens=state.tokens[0]), config)

    @over(KERNELS)
    def test_empty_dimensions(self, target: Target) -> None:
        logits, state, config, step = inputs(target)
        none = state._replace(tokens=state.tokens[:, :0])
        with pytest.raises(ValueError, match="at least one branch and one column"):
            step(logits, none, config)
        empty = LopaState(*(t[:0] for t in state))
        out = step(logits[:0], empty, config)
        assert out.state.tokens.shape == (0, 3, 16)
        rows = torch.full((2, 3, 16), -1, dtype=torch.int32, device=logits.device)
        out = step(logits.flatten(0, 2)[:0], state, config, rows)
        open_somewhere = needed_rows(state, config, backend=target.backend).count.item() > 0
        assert open_somewhere
        assert bool((out.status & Status.MISSING_ROW).any())

    @over(TARGETS)
    def test_logits(self, target: Target) -> None:
        logits, state, config, step = inputs(target)
        with pytest.raises(TypeError, match="logits: expected dtype torch.bfloat16 or"):
            step(logits.double(), state, config)
        with pytest.raises(ValueError, match=r"logits: expected shape \[2, 3, 16, 10\], got"):
            step(logits[:, :, :8], state, config)
        with pytest.raises(ValueError, match="logits: expected unit stride"):
            step(logits.transpose(-1, -2).contiguous().transpose(-1, -2), state, config)
        with pytest.raises(ValueError, match="logits: expected 4 dimensions"):
            step(logits[0], state, config)
        with pytest.raises(ValueError, match="logits: expected 2 dimensions"):
            step(logits, state, config, rows=state.tokens.int())
        with pytest.raises(ValueError, match=r"rows: expected shape \[2, 3, 16\]"):
            step(logits.flatten(0, 2), state, config, rows=state.length)
        with pytest.raises(TypeError, match="rows: expected dtype torch.int32"):
            step(logits.flatten(0, 2), state, config, rows=state.tokens)
        with pytest.raises(ValueError, match="logits: expected a vocabulary"):
            step(logits[..., :0], state, config)

    @over(TARGETS)
    def test_sampling_needs_a_seed(self, target: Target) -> None:
        logits, state, config, step = inputs(target)
        sampled = LopaConfig(**{**config.__dict__, "temperature": 0.7})
        with pytest.raises(ValueError, match="seed: expected an int64 tensor"):
            step(logits, state, sampled)
        with pytest.raises(TypeError, match="seed: expected dtype torch.int64"):
            step(logits, state, sampled, seed=target.to(torch.tensor(1.0)))
        seed, two = target.to((torch.tensor(1), torch.tensor([1, 2])))
        with pytest.raises(ValueError, match="step: expected one element"):
            step(logits, state, sampled, seed=seed, step=two)

    @over(TARGETS)
    def test_window_smaller_than_a_block(self, target: Target) -> None:
        logits, state, _, step = inputs(target)
        config = LopaConfig(mask_id=MASK, max_new_tokens=32, block_size=32)
        with pytest.raises(ValueError, match=r"a window of at least block_size \(32\) columns"):
            step(logits, state, config)

    @over(KERNELS)
    def test_through_torch_ops(self, target: Target) -> None:
        logits, state, config, _ = inputs(target)
        args = list(op_args(logits, state, config))
        run = operator(target, "lopa_step")
        names = ("tau_conf", "tau_add", "tau_act")
        for offset, name in enumerate(names):
            bad = list(args)
            bad[18 + offset] = float("nan")
            with pytest.raises(RuntimeError, match=rf"lopa_step: {name}: expected .*, got"):
                run(*bad)
        bad = list(args)
        bad[5] = state.length.long()
        with pytest.raises(RuntimeError, match="lopa_step: length: expected dtype Int, got Long"):
            run(*bad)
        bad = list(args)
        bad[16] = 0
        with pytest.raises(RuntimeError, match="out_branches: expected at least 1, got 0"):
            run(*bad)

    @over(KERNELS)
    def test_in_place_needs_equal_shapes_and_whole_states(self, target: Target) -> None:
        logits, state, config, _ = inputs(target)
        run = partial(lopa_step_out, backend=target.backend)
        wider = LopaConfig(**{**config.__dict__, "branches": 5})
        own = clone(state)
        with pytest.raises(RuntimeError, match=r"for an in-place step, got 5, 16"):
            run(logits, own, wider, LopaStep(own, *empty_step(state, config)[1:]))
        assert all(torch.equal(a, b) for a, b in zip(own, state, strict=True))
        mixed = empty_step(state, config)
        mixed = mixed._replace(state=mixed.state._replace(tokens=own.tokens))
        with pytest.raises(ValueError, match="all tensors of the state, or none"):
            run(logits, own, config, mixed)

    def test_missing_backends(self) -> None:
        logits, state, config = sample_inputs()
        names = "auto, cpu, cuda, triton, ascend, reference"
        with pytest.raises(ValueError, match=f"backend: expected one of {names}, got 'gpu'"):
            lopa_step(logits, state, config, backend="gpu")
        meta = LopaState(*(t.to("meta") for t in state))
        with pytest.raises(RuntimeError, match="no backend for device type 'meta'"):
            lopa_step(logits.to("meta"), meta, config)
