"""Plain calls: torch.ops.lopa_eager, which no compiler, mode or fake tensor sees."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import moved
from hypothesis import given, settings
from operators import copied, public_calls, registered
from small_states import CONFIG, M, make_state, stats
from states import Drawn, assert_same, examples, fields, rounds_on, sample_inputs
from targets import KERNELS, Target, over
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lopa_kernels import (
    LopaConfig,
    LopaState,
    LopaStep,
    _dispatch,
    branch_step,
    branch_step_out,
    empty_step,
    lopa_step,
    lopa_step_out,
    token_confidence,
    token_confidence_out,
    use_backend,
)
from lopa_kernels.ops.step import eager

NATIVE = [target for target in KERNELS if target.backend != "triton"]


class Watch(TorchDispatchMode):
    """The operators of lopa that run; under it, no call is a plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace.startswith("lopa"):
            self.seen.append(f"{func.namespace}::{func._opname}")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def plain_runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The forms that plain calls take, as they take them."""
    runs: list[str] = []

    def noted(op: str, form: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            runs.append(op)
            return form(*args, **kwargs)

        return run

    forms = {op: (n, noted(op, form)) for op, (n, form) in _dispatch._native_forms.items()}
    monkeypatch.setattr(_dispatch, "_native_forms", forms)
    return runs


def test_the_schemas_are_those_of_lopa_but_for_the_settings() -> None:
    for op in sorted(registered("lopa_eager")):
        ours = getattr(torch.ops.lopa_eager, op).default._schema
        theirs = getattr(torch.ops.lopa, op).default._schema
        names = [argument.name for argument in theirs.arguments]
        if "out_branches" in names:
            last = "top_p" if op.startswith("lopa_step") else "force_anchor"
            names[names.index("out_branches") : names.index(last) + 1] = ["settings"]
        assert [argument.name for argument in ours.arguments] == names
        mutated = [a.name for a in ours.arguments if a.alias_info is not None]
        assert mutated == [a.name for a in theirs.arguments if a.alias_info is not None]
        assert not any(argument.kwarg_only for argument in ours.arguments)
        assert len(ours.returns) == len(theirs.returns)


@over(NATIVE)
def test_equals_the_operator_of_lopa(target: Target) -> None:
    """With every kind of settings, in every form."""
    backend = target.backend

    @settings(max_examples=examples(target, 100))
    @given(drawn=rounds_on(target, max_branches=4, max_window=40))
    def check(drawn: Drawn) -> None:
        *statistics, state, config = target.to(drawn)
        plain = branch_step(*statistics, state, config, backend=backend)
        out = empty_step(state, config)
        branch_step_out(*statistics, state, config, out, backend=backend)
        with Watch() as watch:
            watched = branch_step(*statistics, state, config, backend=backend)
        assert watch.seen == ["lopa::branch_step"]
        assert_same(plain, watched)
        assert_same(out, watched)

    check()


@over(NATIVE)
def test_equals_the_operator_of_lopa_from_logits(target: Target) -> None:
    logits, state, config = target.to(sample_inputs())
    sampled = {"temperature": 0.7, "metric": "margin"}
    key = target.to({"seed": torch.tensor([2**60 + 1]), "step": torch.tensor([5])})
    for options, keys in (
        ({}, {}),
        ({"shift": True, "branches": 2, "window": 20}, {}),
        (sampled, key),
        ({**sampled, "top_k": 3, "top_p": 0.85, "eos_id": None}, key),
        ({**sampled, "temperature": 1e-300, "top_p": 1 / 3}, key),
        ({"accept": "score", "tau_conf": float("-inf"), "metric": "neg_entropy"}, {}),
        ({"accept": "score", "tau_conf": -0.1 - 0.2, "tau_act": 1, "alpha": 1e-5}, {}),
        ({"mask_id": 2**62, "max_new_tokens": 2**40}, {}),
    ):
        changed = replace(config, **options)
        plain = lopa_step(logits, state, changed, **keys, backend=target.backend)
        with Watch() as watch:
            watched = lopa_step(logits, state, changed, **keys, backend=target.backend)
        assert watch.seen == ["lopa::lopa_step"]
        assert_same(plain, watched)


@over(NATIVE)
@pytest.mark.parametrize(
    ("name", "op"),
    [
        ("lopa_step", "lopa_step"),
        ("lopa_step sampled", "lopa_step"),
        ("lopa_step_out", "lopa_step_out"),
        ("lopa_step_out in place", "lopa_step_"),
        ("branch_step", "branch_step"),
        ("branch_step_out", "branch_step_out"),
        ("branch_step_out in place", "branch_step_"),
        ("token_confidence", "token_confidence"),
        ("token_confidence sampled", "token_confidence"),
        ("token_confidence_out", "token_confidence_out"),
        ("softmax_stats", "softmax_stats"),
        ("kv_prewrite_ rotated", "kv_prewrite_"),
        ("qkv_prewrite_", "qkv_prewrite_"),
        ("qkv_prewrite_ normed", "qkv_prewrite_"),
        ("kv_commit_ with status", "kv_commit_"),
    ],
)
def test_a_plain_call_takes_it(name: str, op: str, target: Target, plain_runs: list[str]) -> None:
    call = public_calls()[name]
    for options in ({}, {"backend": target.backend}):
        call.copied(target.device)(**options)
        assert plain_runs == [op]
        plain_runs.clear()
    with use_backend(target.backend):
        call.copied(target.device)()
    assert plain_runs == [op]
    plain_runs.clear()

    call.copied("cpu")(backend="reference")
    with use_backend("reference"):
        call.copied("cpu")()
    with Watch() as watch:
        call.copied(target.device)()
    assert watch.seen == [f"lopa::{op}"]
    torch._dynamo.reset()
    compiled = torch.compile(call.function, backend="eager", fullgraph=True)
    compiled(*copied(call.args), **copied(call.kwargs))
    assert plain_runs == []


def test_another_implementation_is_not_passed_over(
    monkeypatch: pytest.MonkeyPatch, plain_runs: list[str]
) -> None:
    operators = _dispatch._implementations["cpu"]
    monkeypatch.setitem(
        operators, "lopa_step", _dispatch._implementations["reference"]["lopa_step"]
    )
    logits, state, config = sample_inputs()
    assert_same(
        lopa_step(logits, state, config), lopa_step(logits, state, config, backend="reference")
    )
    assert plain_runs == []


def test_fake_tensors_take_the_operator_with_a_fake() -> None:
    """Also outside of their mode, where nothing but the tensors tells."""
    logits, state, config = sample_inputs()
    expected = lopa_step(logits, state, config)
    mode = FakeTensorMode()
    fake_logits, *fake_state = (mode.from_tensor(tensor) for tensor in (logits, *state))
    out = lopa_step(fake_logits, LopaState(*fake_state), config)
    for name, tensor in fields(out).items():
        like = fields(expected)[name]
        assert (tensor.shape, tensor.dtype) == (like.shape, like.dtype), name
        assert tensor.fake_mode is mode, name


@over(NATIVE)
def test_mistakes_are_worded_by_the_checks(target: Target) -> None:
    backend = target.backend
    logits, state, config = target.to(sample_inputs())
    meta = torch.empty_like(logits, device="meta")
    rows = torch.zeros(state.tokens.shape, dtype=torch.int32, device=target.device)
    for arguments, error, message in (
        ((meta, state, config), ValueError, "lopa_step: logits: expected a tensor on"),
        ((logits.double(), state, config), TypeError, "lopa_step: logits: expected dtype"),
        ((logits, state, config, rows), ValueError, "lopa_step: logits: expected 2 dimensions"),
        ((logits, state, None), TypeError, "lopa_step: config: expected a LopaConfig"),
        (
            (logits, state._replace(done=state.done.int()), config),
            TypeError,
            "lopa_step: state.done: expected dtype torch.bool",
        ),
        (
            (logits, state, replace(config, temperature=1.0)),
            ValueError,
            "lopa_step: seed: expected an int64 tensor",
        ),
    ):
        with pytest.raises(error, match=message) as raised:
            lopa_step(*arguments, backend=backend)
        assert raised.value.__context__ is None  # no trace of a first attempt
    out = empty_step(state, config)
    mixed = out._replace(state=out.state._replace(tokens=state.tokens))
    with pytest.raises(ValueError, match="out: expected all tensors of the state, or none"):
        lopa_step_out(logits, state, config, mixed, backend=backend)
    with pytest.raises(ValueError, match="token_confidence: metric: expected one of"):
        token_confidence(logits, metric="entropy", backend=backend)
    values = token_confidence(logits, backend=backend)
    into = values._replace(prob=torch.empty_like(values.prob, device="meta"))
    with pytest.raises(ValueError, match="token_confidence_out: prob: expected a tensor on"):
        token_confidence_out(logits, into, backend=backend)


@over(NATIVE)
def test_the_kernel_s_own_errors_come_through(target: Target) -> None:
    """What the checks let pass and the kernel refuses is the kernel's error."""
    _, state, config = target.to(sample_inputs())
    statistics = tuple(torch.zeros(state.tokens.shape, device=target.device) for _ in range(3))
    statistics = (statistics[0].long(), *statistics[1:])
    out = empty_step(state, config)
    bad = out._replace(winner=out.winner[:-1])
    with pytest.raises(RuntimeError, match="branch_step_out: winner: expected shape"):
        branch_step_out(*statistics, state, config, bad, backend=target.backend)


class TestSettings:
    def test_text(self) -> None:
        config = LopaConfig(
            mask_id=9, max_new_tokens=32, tau_conf=0.1 + 0.2, branches=3, top_p=1 / 3, shift=True
        )
        assert eager.settings(config) == (
            "3 None 0.30000000000000004 0.1 0.95 32 32 9 -1 prob block mean 1.0 None 0.0 True "
            "False neg_entropy 0.0 None 0.3333333333333333"
        )
        assert eager.settings(config) is eager.settings(config)

    def test_many_configurations(self) -> None:
        state, statistics = make_state([[M, M, M, M]], columns=8), stats([[0.45] * 8])
        filled = [
            int(branch_step(*statistics, state, replace(CONFIG, tau_conf=tau / 400)).filled)
            for tau in range(400)
        ]
        assert filled == [4] * 180 + [1] * 220
        assert len(eager._texts) <= eager._MOST_TEXTS

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda words: [], "settings: expected another word, got the end"),
            (lambda words: words[:-1], "settings: expected another word, got the end"),
            (lambda words: [*words, "1"], "settings: expected no further words, got 1"),
            (lambda words: ["x", *words[1:]], "settings: expected a number, got x"),
            (lambda words: ["3.5", *words[1:]], "settings: expected a number, got 3.5"),
            (lambda words: [str(2**63), *words[1:]], "settings: expected a number"),
            (lambda words: [*words[:15], "1", *words[16:]], "settings: expected True or False"),
            (lambda words: [*words[:9], "no", *words[10:]], "accept: expected prob or score"),
            (lambda words: ["0", *words[1:]], "out_branches: expected at least 1, got 0"),
        ],
    )
    def test_texts_that_are_none(self, change: Any, message: str) -> None:
        logits, state, config = sample_inputs()
        text = " ".join(change(eager.settings(config).split(" ")))
        before = lopa_step(logits, state, config)
        with pytest.raises(RuntimeError, match=f"lopa_step: {message}"):
            torch.ops.lopa_eager.lopa_step(logits, None, None, None, *state, text)
        assert_same(lopa_step(logits, state, config), before)


@over(NATIVE)
def test_strided_states_and_every_form_leave_no_trace(target: Target) -> None:
    """A state of views goes in by copies of the kernel's own; it is not written."""
    logits, state, config = sample_inputs()
    config = replace(config, branches=None, window=None)
    strided = LopaState(*(tensor.repeat_interleave(2, dim=0)[::2] for tensor in state))
    logits, state, strided = moved((logits, state, strided), target.device)
    before = copied(strided)
    expected = lopa_step(logits, state, config, backend=target.backend)
    assert_same(lopa_step(logits, strided, config, backend=target.backend), expected)
    assert all(a.equal(b) for a, b in zip(strided, before, strict=True))
    own = LopaState(*(tensor.clone() for tensor in state))
    buffers = LopaStep(own, *empty_step(own, config)[1:])
    lopa_step_out(logits, own, config, buffers, backend=target.backend)
    assert_same(buffers, expected)
