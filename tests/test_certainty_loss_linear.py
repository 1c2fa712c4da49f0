"""fused_linear_certainty_forcing_loss: the loss of hidden states, a chunk of logits at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import close, skip_where_slow
from targets import KERNELS, TARGETS, Target, over

import lopa_kernels as lk
from lopa_kernels.ops import certainty_loss
from lopa_kernels.ops.certainty_loss import fused_linear

ROWS, VOCAB, HIDDEN = 11, 150, 12
#: of a row of logits
ROW = 4 * VOCAB


def inputs(dtype: torch.dtype = torch.float32, vocab: int = VOCAB) -> tuple[torch.Tensor, ...]:
    """Hidden states and a weight of small multiples, so that bf16 has few ties; labels, a mask."""
    g = torch.Generator().manual_seed(3)
    hidden = torch.randn(ROWS, HIDDEN, generator=g)
    weight = torch.randn(vocab, HIDDEN, generator=g)
    labels = (hidden @ weight.t()).argmax(-1)
    labels[::4] = torch.randint(0, vocab, labels[::4].shape, generator=g)
    masked = torch.rand(ROWS, generator=g) < 0.7
    return hidden.to(dtype), weight.to(dtype), labels, masked


def run(target: Target, made: tuple[torch.Tensor, ...], **options: Any) -> list[torch.Tensor]:
    """Loss, gradients of hidden and weight, terms; on the CPU."""
    hidden, weight, labels, masked = target.to(made)
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    loss, terms = lk.fused_linear_certainty_forcing_loss(
        *leaves, labels, masked, return_terms=True, backend=target.backend, **options
    )
    (loss * 2).backward()
    return [t.detach().cpu() for t in (loss, *(leaf.grad for leaf in leaves), terms)]


def through_logits(
    target: Target, made: tuple[torch.Tensor, ...], **options: Any
) -> list[torch.Tensor]:
    hidden, weight, labels, masked = target.to(made)
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    loss, terms = lk.certainty_forcing_loss(
        leaves[0] @ leaves[1].t(), labels, masked,
        return_terms=True, backend=target.backend, **options,
    )  # fmt: skip
    (loss * 2).backward()
    return [t.detach().cpu() for t in (loss, *(leaf.grad for leaf in leaves), terms)]


@over(TARGETS)
@pytest.mark.parametrize("chunk_bytes", [1, 3 * ROW, 4 * ROW + 7, ROWS * ROW, 1 << 28])
def test_equals_the_loss_of_the_logits(chunk_bytes: int, target: Target) -> None:
    """Whatever the chunks: the means are over all rows, and the gradients over all columns."""
    skip_where_slow(target, chunk_bytes not in (4 * ROW + 7, 1 << 28))
    if chunk_bytes == 1 and (target.gpu or target.interpreted):
        pytest.skip("150 columns one by one")
    expected = through_logits(target, inputs(), temperature=0.5, beta=1.5)
    got = run(target, inputs(), temperature=0.5, beta=1.5, chunk_bytes=chunk_bytes)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@over(KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, target: Target) -> None:
    made = inputs(dtype)
    loss, hidden, weight, _ = run(target, made, chunk_bytes=4 * ROW)
    expected = through_logits(target, made)
    assert hidden.dtype == weight.dtype == dtype
    # Products of other shapes may round some logits otherwise.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(loss, expected[0], rtol=eps, atol=eps)
    for ours, theirs in ((hidden, expected[1]), (weight, expected[2])):
        error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
        assert error < 2 * eps


def test_sums_of_slices_are_kept_in_fp32() -> None:
    """The gradient of bf16 hidden states is as near to float64 by slices as at once."""
    made = inputs(torch.bfloat16)
    target = Target("cpu", "cpu")
    exact = run(Target("reference", "cpu"), (*(t.double() for t in made[:2]), *made[2:]))[1]
    errors = [
        float((run(target, made, chunk_bytes=size)[1].double() - exact).norm() / exact.norm())
        for size in (30 * ROWS * 2, 1 << 28)
    ]
    assert errors[0] < 2 * max(errors[1], torch.finfo(torch.bfloat16).eps / 2)


@pytest.mark.parametrize("chunk_bytes", [2 * 7 * 8, 5 * 7 * 8])
def test_gradcheck_in_float64(chunk_bytes: int) -> None:
    hidden, weight, labels, masked = inputs(torch.float64, vocab=7)
    labels, masked = labels[:5], masked[:5]

    def loss(*leaves: torch.Tensor) -> Any:
        return lk.fused_linear_certainty_forcing_loss(
            *leaves, labels, masked, chunk_bytes=chunk_bytes, backend="reference"
        )

    leaves = (hidden[:5, :4].clone().requires_grad_(), weight[:, :4].clone().requires_grad_())
    assert torch.autograd.gradcheck(loss, leaves)


@over(TARGETS)
def test_no_masked_rows_and_no_rows(target: Target) -> None:
    hidden, weight, labels, masked = inputs()
    for rows in (ROWS, 0):
        got = run(
            target,
            (hidden[:rows], weight, labels[:rows], masked[:rows] & False),
            chunk_bytes=4 * ROW,
        )
        assert all(bool((tensor == 0).all()) for tensor in got)
        assert got[1].shape == (rows, HIDDEN)


@over(KERNELS)
@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_a_frozen_input_has_no_gradient(trained: str, target: Target) -> None:
    hidden, weight, labels, masked = target.to(inputs())
    leaf = (hidden if trained == "hidden" else weight).requires_grad_()
    loss = lk.fused_linear_certainty_forcing_loss(
        hidden, weight, labels, masked, chunk_bytes=5 * ROW, backend=target.backend
    )
    loss.backward()
    expected = run(target, inputs(), chunk_bytes=5 * ROW)
    close(leaf.grad.cpu() * 2, expected[1 if trained == "hidden" else 2], 1e-6)


@over(KERNELS)
def test_logits_are_never_made_at_once(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, backward = [], []

    class Shapes(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dim() == 2:
                forward.append(tuple(result.shape))
            return result

    # Autograd calls the backward pass outside of the mode.
    def gradient(grad_loss: torch.Tensor, logits: torch.Tensor, *rest: Any, **options: Any) -> None:
        backward.append(tuple(logits.shape))
        certainty_loss.gradient(grad_loss, logits, *rest, **options)

    monkeypatch.setattr(fused_linear, "gradient", gradient)
    made = inputs()
    with Shapes():
        run(target, made, chunk_bytes=3 * ROW)
    assert (3, VOCAB) in forward
    assert (ROWS, VOCAB) not in forward
    columns = 3 * VOCAB // ROWS
    assert backward == [(ROWS, columns)] * (VOCAB // columns) + [(ROWS, VOCAB % columns)]


@pytest.mark.big
@over(KERNELS)
def test_compiles_to_one_graph(target: Target) -> None:
    if target.interpreted:
        pytest.skip("the interpreter is not traced")
    torch._dynamo.reset()
    hidden, weight, labels, masked = target.to(inputs())

    def loss(hidden: torch.Tensor, weight: torch.Tensor) -> Any:
        return lk.fused_linear_certainty_forcing_loss(
            hidden, weight, labels, masked, chunk_bytes=4 * ROW, backend=target.backend
        )

    results = []
    # Inductor takes long for the products of a CPU, which are not what is tested.
    compiler = "inductor" if target.gpu else "aot_eager"
    for call in (loss, torch.compile(loss, backend=compiler, fullgraph=True)):
        leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight)]
        value = call(*leaves)
        value.backward()
        results.append([value.detach(), *(leaf.grad for leaf in leaves)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


def test_default_chunks() -> None:
    assert fused_linear.chunk_size(fused_linear.CHUNK_BYTES, 126464 * 2) == 1024
    assert fused_linear.chunk_size(fused_linear.CHUNK_BYTES, 4096 * 2) == 32768
    assert fused_linear.chunk_size(1000, 10) == 100
    assert fused_linear.chunk_size(1, 10) == 1


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"weight": lambda w: w.bfloat16()}, TypeError, "weight: expected dtype torch.float32"),
        ({"weight": lambda w: w[:, 1:]}, ValueError, "weight: expected shape .V, 12. with V >= 1"),
        ({"weight": lambda w: w[:0]}, ValueError, "weight: expected shape"),
        ({"hidden": lambda h: h[None]}, ValueError, "hidden: expected 2 dimensions"),
        ({"hidden": lambda h: h.double()}, TypeError, "hidden: expected dtype"),
        ({"labels": lambda t: t[1:]}, ValueError, "labels: expected shape .11., got .10."),
        ({"chunk_bytes": lambda _: 0}, ValueError, "chunk_bytes: expected at least 1, got 0"),
        ({"temperature": lambda _: math.nan}, ValueError, "temperature: expected"),
    ],
)  # fmt: skip
def test_bad_input(changes: dict[str, Any], error: type[Exception], match: str) -> None:
    made: dict[str, Any] = dict(
        zip(("hidden", "weight", "labels", "masked"), inputs(), strict=True)
    )
    made |= {name: change(made.get(name)) for name, change in changes.items()}
    with pytest.raises(error, match=f"fused_linear_certainty_forcing_loss: {match}"):
        lk.fused_linear_certainty_forcing_loss(**made)
