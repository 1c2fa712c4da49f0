"""Every operator, on every backend: equal to the reference, equal to itself, what opcheck asks.

The rooms' tests go into depth; this is the tour, and what scripts/sanitize walks through first.
"""

from __future__ import annotations

import pytest
import torch
from operators import op_calls, public_calls, registered
from targets import KERNELS, Target, over

from lopa_kernels import _dispatch

CALLS = list(public_calls())
#: not an operator of a round, and the room that has no GPU kernels
OTHERS = {"cpu_isa", "branch_attention", "branch_attention_lse", "branch_attention_out"}


def namespace(target: Target) -> str:
    return "lopa_triton" if target.backend == "triton" else "lopa"


def test_every_operator_is_called() -> None:
    assert {call.name for call in op_calls().values()} == registered("lopa") - OTHERS


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
    call = public_calls(seed)[name]
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
    op = getattr(getattr(torch.ops, namespace(target)), call.name).default
    torch.library.opcheck(op, moved.args, moved.kwargs)


@over([target for target in KERNELS if target.backend == "triton"])
def test_triton_operators_have_the_schemas_of_the_native_ones(target: Target) -> None:
    for name in sorted(registered("lopa_triton")):
        theirs = str(getattr(torch.ops.lopa_triton, name).default._schema)
        ours = str(getattr(torch.ops.lopa, name).default._schema)
        assert theirs.removeprefix("lopa_triton::") == ours.removeprefix("lopa::")
