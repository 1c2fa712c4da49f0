"""Every operator, on every backend: equal to the reference, equal to itself, what opcheck asks.

The rooms' tests go into depth; this is the tour, and what scripts/sanitize walks through first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import operator
from operators import OpCall, all_calls, copied, op_calls, registered, tensors_of
from targets import KERNELS, Target, over
from torch.utils._pytree import tree_flatten, tree_unflatten

from lopa_kernels import _dispatch

CALLS = list(all_calls())
#: not an operator of a round
OTHERS = {"cpu_isa"}


def namespace(target: Target) -> str:
    return "lopa_triton" if target.backend == "triton" else "lopa"


def test_every_operator_is_called() -> None:
    assert {call.name for call in op_calls().values()} == registered("lopa") - {"cpu_isa"}


@over(KERNELS)
def test_every_operator_is_implemented(target: Target) -> None:
    names = registered("lopa") - OTHERS
    absent = {name: _dispatch.why_absent(target.backend, name) for name in names}
    assert not any(absent.values()), absent
    assert names <= registered(namespace(target))


@over(KERNELS)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_the_reference(name: str, target: Target, seed: int) -> None:
    if target.interpreted and seed > 0:
        pytest.skip("one is slow enough")
    call = all_calls(seed)[name]
    expected = call.copied()(backend="reference")
    here = call.copied(target.device)
    got = here(backend=target.backend)
    again = call.copied(target.device)(backend=target.backend)
    assert len(got) == len(expected)
    for index, (a, b, repeated) in enumerate(zip(got, expected, again, strict=True)):
        where = f"{name}, tensor {index}"
        assert a.device.type == target.device, where
        torch.testing.assert_close(
            a.cpu(), b, rtol=1e-5, atol=1e-5, equal_nan=True, msg=lambda m, w=where: f"{w}: {m}"
        )
        torch.testing.assert_close(
            a, repeated, rtol=0, atol=0, equal_nan=True, msg=lambda m, w=where: f"{w}, again: {m}"
        )


@over(KERNELS)
@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name: str, target: Target) -> None:
    call = op_calls()[name]
    moved = call._replace(args=target.to(call.args), kwargs=target.to(call.kwargs))
    torch.library.opcheck(operator(target, call.name), moved.args, moved.kwargs)


#: what makes a tensor one that an operator does not take, or takes with other results
FAULTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "dtype": lambda t: t.to(torch.float64 if t.dtype != torch.int64 else torch.int32),
    "one less": lambda t: t[:-1],
    "one dimension more": lambda t: t.unsqueeze(-1),
    "one dimension less": lambda t: t.flatten(0, 1) if t.dim() > 1 else t[0],
    "strides": lambda t: torch.stack([t, t], -1)[..., 0],
}
#: those that a tensor of no dimensions cannot have
NEED_DIMENSIONS = {"one less", "one dimension less"}
OPTIONS: dict[type, tuple[Any, ...]] = {
    int: (-1, 0),
    float: (float("nan"), -0.5, 1.5),
    str: ("unknown",),
}


def faulty(call: OpCall) -> list[tuple[str, OpCall]]:
    """The call with one of its arguments changed, which may make it a bad one."""
    leaves, spec = tree_flatten((call.args, call.kwargs))
    made = []
    for index, leaf in enumerate(leaves):
        values = [(str(value), value) for value in OPTIONS.get(type(leaf), ())]
        if isinstance(leaf, torch.Tensor):
            values = [
                (name, fault(leaf))
                for name, fault in FAULTS.items()
                if leaf.dim() > 0 or name not in NEED_DIMENSIONS
            ]
        for name, value in values:
            args, kwargs = tree_unflatten([*leaves[:index], value, *leaves[index + 1 :]], spec)
            made.append((f"argument {index}, {name}", OpCall(call.name, args, kwargs)))
    return made


def error(run: Callable[..., Any], call: OpCall) -> str | None:
    try:
        run(*call.args, **call.kwargs)
    except RuntimeError as raised:
        return str(raised)
    return None


@over([target for target in KERNELS if target.backend != "cpu"])
@pytest.mark.parametrize("name", CALLS)
def test_refuses_what_the_cpu_refuses(name: str, target: Target) -> None:
    """In the same words, and nothing has been written."""
    call = op_calls()[name]
    native = getattr(torch.ops.lopa, call.name).default
    run = operator(target, call.name)
    refused = 0
    for where, bad in faulty(call):
        expected = error(native, OpCall(bad.name, *copied((bad.args, bad.kwargs))))
        # What only values tell is the CPU's alone.
        if expected is None or "flat index" in expected or " sequence " in expected:
            continue
        refused += 1
        args, kwargs = copied((bad.args, bad.kwargs), target.device)
        tensors = tensors_of((args, kwargs))
        before = copied(tensors)
        assert error(run, OpCall(bad.name, args, kwargs)) == expected, where
        torch.testing.assert_close(
            tensors, before, rtol=0, atol=0, equal_nan=True,
            msg=lambda m, where=where: f"{where}: {m}",
        )  # fmt: skip
    assert refused > 0


TRITON = [target for target in KERNELS if target.backend == "triton"]


@over(TRITON)
def test_what_is_too_large_for_triton(target: Target) -> None:
    """Views of one element, so that nothing of that size exists."""

    def view(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.zeros((), dtype=dtype, device=target.device).expand(shape)

    window = view(torch.int64, 1, 32769)
    with pytest.raises(RuntimeError, match="tokens: expected at most 32768 columns, got 32769"):
        operator(target, "spawn_branches")(
            window, view(torch.bool, 1), window, view(torch.float32, 1, 32769),
            view(torch.int32, 1, 1), -1,
        )  # fmt: skip
    B, K = 65536, 2
    numbers = [view(torch.int32, B)] * 4
    with pytest.raises(RuntimeError, match="elements of tokens: expected at most 2147483647, got"):
        operator(target, "needed_rows")(
            view(torch.int64, B, K, 32768), view(torch.int32, B, K), *numbers,
            view(torch.bool, B), 9, False, 1,
        )  # fmt: skip


@over(TRITON)
def test_triton_operators_have_the_schemas_of_the_native_ones(target: Target) -> None:
    for name in sorted(registered("lopa_triton")):
        theirs = str(getattr(torch.ops.lopa_triton, name).default._schema)
        ours = str(getattr(torch.ops.lopa, name).default._schema)
        assert theirs.removeprefix("lopa_triton::") == ours.removeprefix("lopa::")
