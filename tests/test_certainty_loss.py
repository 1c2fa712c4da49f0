"""certainty_forcing_loss: the reference against the published formula, the kernels against it."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from cases import close, moved, operator, random_logits, skip_where_slow
from targets import KERNELS, TARGETS, Target, over

import lopa_kernels as lk
from lopa_kernels.ops.certainty_loss import reference

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INF, NAN = math.inf, math.nan
#: one element, vectors and tiles just missed, just met and just passed, GPT-2's vocabulary
VOCABULARIES = (1, 2, 3, 17, 63, 64, 65, 255, 2047, 2048, 2049, 4097, 6400, 50257)
#: of the interpreter
SHORT = (1, 3, 65, 2049)


def published(
    logits: torch.Tensor,
    labels: torch.Tensor,
    masked: torch.Tensor,
    temperature: float = 0.5,
    beta: float = 2.0,
) -> torch.Tensor:
    """The training code's way, restated, in float64: cross entropy, softmax, log, products."""
    x, y = logits.double()[masked], labels[masked]
    if len(x) == 0:
        return logits.double().sum() * 0
    loss = torch.nn.functional.cross_entropy(x, y)
    p = torch.softmax(x / temperature, dim=-1)
    entropy = -(p * torch.log(p + 1e-300)).sum(-1)
    right = x.argmax(-1) == y
    return loss + beta * entropy[right].mean() if bool(right.any()) else loss


def inputs(
    rows: int, vocab: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, labels of which two thirds are the argmax, and a mask of about two thirds."""
    g = torch.Generator().manual_seed(seed)
    logits = random_logits(rows, vocab, dtype=dtype, seed=seed)
    labels = logits.float().argmax(-1)
    labels[::3] = torch.randint(0, vocab, labels[::3].shape, generator=g)
    return logits, labels, torch.rand(rows, generator=g) < 0.7


def run(
    target: Target,
    logits: torch.Tensor,
    labels: torch.Tensor,
    masked: torch.Tensor,
    grad_loss: float = 1.0,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, terms, gradient) of the target, on the CPU."""
    on = moved((logits, labels, masked), target.device)
    leaf = on[0].detach().requires_grad_()
    loss, terms = lk.certainty_forcing_loss(
        leaf, *on[1:], return_terms=True, backend=target.backend, **options
    )
    (grad,) = torch.autograd.grad(loss * grad_loss, leaf)
    assert loss.dtype == terms.dtype == torch.float32
    assert grad.dtype == logits.dtype
    return loss.detach().cpu(), terms.cpu(), grad.cpu()


def exact(
    logits: torch.Tensor, labels: torch.Tensor, masked: torch.Tensor, **options: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, terms, gradient) by the reference in float64."""
    settings = {"temperature": 0.5, "beta": 2.0, **options}
    logits = logits.double()
    loss, terms, *saved = reference.forward(logits, labels, masked, **settings)
    one = torch.ones((), dtype=torch.float64)
    return loss, terms, reference.gradient(one, logits, labels, *saved, **settings)


def check(
    target: Target,
    logits: torch.Tensor,
    labels: torch.Tensor,
    masked: torch.Tensor,
    **options: float,
) -> None:
    loss, terms, grad = run(target, logits, labels, masked, **options)
    expected, expected_terms, expected_grad = exact(logits, labels, masked, **options)
    close(loss, expected, 1e-6)
    close(terms, expected_terms, 1e-6)
    check_gradient(grad, expected_grad)


def check_gradient(grad: torch.Tensor, expected: torch.Tensor) -> None:
    """Rounded to the dtype, of a value within 1e-5 of the largest of its row, or relatively.

    At the label p - 1 is formed, of numbers that fp32 has to 1e-7; p is divided by the rows.
    """
    relative = 0.5 * torch.finfo(grad.dtype).eps + 1e-5
    rows = max(int((expected != 0).any(-1).sum()), 1)
    absolute = 1e-5 * expected.abs().amax(-1, keepdim=True) + 1e-6 / rows
    if grad.dtype == torch.float16:
        absolute = absolute + 2**-24
    error = (grad.double() - expected).abs()
    assert bool((error <= relative * expected.abs() + absolute).all()), float(error.max())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 0.31])
@pytest.mark.parametrize("vocab", [2, 33, 1000])
def test_the_reference_is_the_published_formula(vocab: int, temperature: float) -> None:
    logits, labels, masked = inputs(12, vocab)
    leaf = logits.double().requires_grad_()
    expected = published(leaf, labels, masked, temperature, 1.7)
    (grad,) = torch.autograd.grad(expected, leaf)
    loss, _, ours = exact(logits, labels, masked, temperature=temperature, beta=1.7)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(ours, grad, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("temperature", [0.5, 0.8])
def test_gradcheck_in_float64(temperature: float) -> None:
    logits, labels, masked = inputs(7, 11, torch.float64)

    def loss(x: torch.Tensor) -> Any:
        return lk.certainty_forcing_loss(
            x, labels, masked, temperature=temperature, backend="reference"
        )

    assert torch.autograd.gradcheck(loss, logits.requires_grad_())


@over(KERNELS)
def test_gradients_are_the_slopes_of_the_loss(target: Target) -> None:
    """By finite differences of the float64 loss along random directions: no formula is shared."""
    logits, labels, masked = inputs(6, 300)
    grad = run(target, logits, labels, masked)[2].double()
    for seed in range(3):
        direction = random_logits(6, 300, seed=seed).double()
        step = 1e-5 * direction
        up, down = (published(logits.double() + s, labels, masked) for s in (step, -step))
        slope = (up - down) / 2e-5
        torch.testing.assert_close((grad * direction).sum(), slope, rtol=1e-4, atol=1e-6)


@over(KERNELS)
@pytest.mark.parametrize("temperature", [0.5, 0.31])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_equals_the_float64_reference(
    vocab: int, dtype: torch.dtype, temperature: float, target: Target
) -> None:
    skip_where_slow(target, vocab not in SHORT)
    rows = 4 if target.interpreted else 9
    check(target, *inputs(rows, vocab, dtype), temperature=temperature)


@over(KERNELS)
@pytest.mark.parametrize("temperature", [0.5, math.nextafter(0.5, 1)])
def test_a_square_for_an_exponential(temperature: float, target: Target) -> None:
    """At 0.5 the kernels square exp(x); beside it they do not. Both err by some units of 2^-22."""
    logits, labels, masked = inputs(6, 3000)
    loss, terms, grad = run(target, logits, labels, masked, temperature=temperature)
    expected, expected_terms, expected_grad = exact(logits, labels, masked, temperature=temperature)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(terms.double(), expected_terms, rtol=1e-6, atol=0)
    error = (grad - expected_grad).norm() / expected_grad.norm()
    assert error < 1e-6


@over(KERNELS)
@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"beta": 0.0}, {"beta": -1.5}])
def test_options(options: dict[str, float], target: Target) -> None:
    check(target, *inputs(5, 700), **options)


@over(KERNELS)
@pytest.mark.parametrize("temperature", [1e-3, 0.02, 40.0, 1e4])
def test_extreme_temperatures(temperature: float, target: Target) -> None:
    logits, labels, masked = inputs(5, 333)
    check(target, logits, labels, masked, temperature=temperature)


@over(KERNELS)
@pytest.mark.parametrize("temperature", [0.5, 0.8])
@pytest.mark.parametrize("offset", [-3e4, 3e4, 1e6])
def test_large_logits_keep_their_differences(
    offset: float, temperature: float, target: Target
) -> None:
    """Multiples of 1/16 beside a large number: what is subtracted first is exact."""
    logits, labels, masked = inputs(5, 2500)
    shifted = (logits * 16).round() / 16 + offset
    loss, _, grad = run(target, shifted, labels, masked, temperature=temperature)
    expected, _, expected_grad = exact(shifted, labels, masked, temperature=temperature)
    close(loss, expected, 1e-6)
    check_gradient(grad, expected_grad)


@over(KERNELS)
@pytest.mark.parametrize("temperature", [0.05, 0.5, 0.8, 40.0])
@pytest.mark.parametrize("rise", [-60.0, -3.0, 3.0, 60.0, 1e4])
def test_values_that_rise_along_the_vocabulary(
    rise: float, temperature: float, target: Target
) -> None:
    """What a tile's sums are relative to may be that of tiles before it, or not."""
    skip_where_slow(target, True)
    logits, labels, masked = inputs(3, 50000)
    slope = torch.linspace(0, rise, 50000)
    logits = ((logits + slope) * 16).round() / 16
    logits[1] = logits[1].masked_fill(slope.abs() < abs(rise) / 3, -INF)
    masked[:] = True
    labels[0], labels[1] = logits[0].argmax(), 49999
    check(target, logits, labels, masked, temperature=temperature)


@over(KERNELS)
@pytest.mark.parametrize("temperature", [0.5, 0.8])
def test_huge_logits(temperature: float, target: Target) -> None:
    logits, labels, masked = inputs(4, 70)
    masked[:] = True
    logits[0, 5], labels[0] = 3e38, 5
    logits[1, 7], labels[1] = 1e30, 8
    logits[2] = -3e38
    labels[2] = 0
    check(target, logits, labels, masked, temperature=temperature)


@over(TARGETS)
def test_ties_go_to_the_lowest_index(target: Target) -> None:
    logits = torch.zeros(4, 5000)
    labels = torch.tensor([0, 1, 4999, 0])
    logits[2, 4999] = logits[3, 4999] = 1.0
    logits[3, 0] = 1.0
    _, terms, _ = run(target, logits, labels, torch.ones(4, dtype=torch.bool))
    # Rows 0, 2 and 3 agree.
    expected = exact(logits[[0, 2, 3]], labels[[0, 2, 3]], torch.ones(3, dtype=torch.bool))
    close(terms[1], expected[1][1], 1e-6)
    # -0 equals +0: the first of them is the argmax.
    signed = torch.zeros(1, 300)
    signed[0, 0] = -0.0
    entropy = run(target, signed, torch.tensor([0]), torch.tensor([True]))[1][1]
    close(entropy, torch.tensor(math.log(300)), 1e-5)


@over(TARGETS)
@pytest.mark.parametrize("where", [0, 2047, 2048, 2999])
def test_a_nan_or_infinity_spoils_its_row(where: int, target: Target) -> None:
    """And the loss, but no other row's gradient."""
    logits, labels, _ = inputs(5, 3000)
    labels[:] = logits.argmax(-1)
    masked = torch.tensor([True, True, False, True, True])
    for value in (NAN, INF):
        bad = logits.clone()
        bad[1, where] = value
        loss, _, grad = run(target, bad, labels, masked)
        assert loss.isnan()
        assert grad[1].isnan().all()
        rest = [0, 3, 4]
        # The row is masked, and agrees no more.
        expected = torch.zeros(3, 3000, dtype=torch.float64)
        for i, row in enumerate(rest):
            x = logits[row].double().requires_grad_()
            q = torch.softmax(x / 0.5, -1)
            cross = torch.nn.functional.cross_entropy(x, labels[row])
            term = cross / 4 - 2 * torch.special.xlogy(q, q).sum() / 3
            (expected[i],) = torch.autograd.grad(term, x)
        check_gradient(grad[rest], expected)
        assert (grad[2] == 0).all()


@over(TARGETS)
@pytest.mark.parametrize("temperature", [0.5, 0.7])
@pytest.mark.parametrize("vocab", [40, 5000])
def test_suppressed_tokens(vocab: int, temperature: float, target: Target) -> None:
    """-inf is a probability of 0: no part of the entropy, and a gradient of 0."""
    logits, labels, masked = inputs(4, vocab)
    keep = torch.zeros(vocab, dtype=torch.bool)
    keep[3::7] = True
    labels = (labels - 3) // 7 * 7 + 3
    labels[1] = 3 + 7 * int(logits[1, keep].argmax())
    masked[:] = True
    suppressed = logits.masked_fill(~keep, -INF)
    loss, terms, grad = run(target, suppressed, labels, masked, temperature=temperature)
    expected = exact(logits[:, keep], (labels - 3) // 7, masked, temperature=temperature)
    close(loss, expected[0], 1e-6)
    close(terms, expected[1], 1e-6)
    check_gradient(grad[:, keep], expected[2])
    assert (grad[:, ~keep] == 0).all()


@over(TARGETS)
def test_a_suppressed_label_costs_infinitely_much(target: Target) -> None:
    logits = torch.tensor([[0.0, -INF, 1.0], [0.0, 0.0, 3.0]])
    loss, _, grad = run(target, logits, torch.tensor([1, 2]), torch.tensor([True, True]))
    assert loss == INF
    p = torch.softmax(logits[0].double(), -1)
    p[1] -= 1
    close(grad[0], p / 2, 1e-6)


@over(TARGETS)
def test_no_finite_logit(target: Target) -> None:
    logits = torch.zeros(2, 2100)
    logits[0] = -INF
    loss, _, grad = run(target, logits, torch.tensor([0, 0]), torch.tensor([True, True]))
    assert loss.isnan()
    assert grad[0].isnan().all()
    assert grad[1].isfinite().all()


@over(TARGETS)
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_no_masked_rows(rows: int, target: Target) -> None:
    logits, labels, masked = inputs(rows, 130)
    masked[:] = False
    loss, terms, grad = run(target, logits, labels, masked)
    assert loss == 0
    assert terms.tolist() == [0, 0]
    assert grad.shape == logits.shape
    assert (grad == 0).all()


@over(KERNELS)
def test_no_agreeing_rows_and_all_of_them(target: Target) -> None:
    logits, labels, masked = inputs(6, 500)
    masked[:] = True
    labels[:] = logits.argmin(-1)
    loss, terms, _ = run(target, logits, labels, masked)
    assert terms[1] == 0
    assert loss == terms[0]
    check(target, logits, labels, masked)
    check(target, logits, logits.argmax(-1), masked)


@over(TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_only_masked_rows_are_read(dtype: torch.dtype, target: Target) -> None:
    """Neither the logits nor the labels of the others, whose gradient is 0."""
    logits, labels, masked = inputs(7, 2300, dtype)
    expected = run(target, logits, labels, masked)
    assert 0 < masked.sum() < len(masked)
    logits[~masked] = NAN
    labels[~masked] = -100
    for ours, theirs in zip(run(target, logits, labels, masked), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert (expected[2][~masked] == 0).all()


@over(TARGETS)
@pytest.mark.parametrize("label", [-1, 40, 2**40])
def test_a_label_outside_the_vocabulary(label: int, target: Target) -> None:
    logits, labels, masked = inputs(4, 40)
    masked[:] = True
    labels[2] = label
    if target.backend in ("cpu", "reference"):
        expected = f"labels: expected an index below V = 40 where masked, got {label} at flat"
        with pytest.raises(RuntimeError, match=expected):
            run(target, logits, labels, masked)
        return
    loss, _, grad = run(target, logits, labels, masked)
    assert loss.isnan()
    assert grad[2].isnan().all()
    assert grad[[0, 1, 3]].isfinite().all()


def strided(kind: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """The inputs of 6 rows of 2100 logits in other places of memory."""
    logits, labels, masked = inputs(6, 2100, dtype)
    if kind == "wide":
        wide = torch.full((6, 2111), NAN, dtype=dtype)
        wide[:, 3:2103] = logits
        return wide[:, 3:2103], labels, masked
    if kind == "every other":
        rows = torch.full((12, 2100), NAN, dtype=dtype)
        rows[::2] = logits
        apart = torch.stack([labels, labels + 10**9], 1)[:, 0]
        return rows[::2], apart, torch.stack([masked, ~masked], 1)[:, 0]
    if kind == "transposed":
        other = logits.view(2, 3, 2100).transpose(0, 1).contiguous().transpose(0, 1)
        return other, labels.view(2, 3), masked.view(2, 3)
    # A slice of the text, as a trainer cuts the prompt off.
    text = torch.full((2, 5, 2100), NAN, dtype=dtype)
    text[:, 2:] = logits.view(2, 3, 2100)
    return text[:, 2:], labels.view(2, 3), masked.view(2, 3)


@over(KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["wide", "every other", "transposed", "sliced"])
def test_strides(kind: str, dtype: torch.dtype, target: Target) -> None:
    plain = run(target, *inputs(6, 2100, dtype))
    loss, terms, grad = run(target, *strided(kind, dtype))
    assert torch.equal(loss, plain[0])
    assert torch.equal(terms, plain[1])
    assert torch.equal(grad.reshape(6, 2100), plain[2])


@over(TARGETS)
@pytest.mark.parametrize("kind", ["wide", "every other", "transposed", "sliced"])
def test_in_place_the_gradient_is_in_the_logits(kind: str, target: Target) -> None:
    made = moved(strided(kind, torch.bfloat16), target.device)
    memory = made[0].detach()
    expected = run(target, *strided(kind, torch.bfloat16), grad_loss=3.0)
    leaf = torch.zeros((), device=target.device, requires_grad=True)
    # Logits that no one else needs, as those of a head are.
    holder: list[torch.Tensor] = []

    class Head(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return made[0]

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            holder.append(grad)
            return grad.new_zeros((), dtype=torch.float32)

    logits = Head.apply(leaf)
    loss = lk.certainty_forcing_loss(
        logits, *made[1:], inplace_backward=True, backend=target.backend
    )
    (loss * 3).backward(retain_graph=True)
    assert torch.equal(loss.detach().cpu(), expected[0])
    assert holder[0].data_ptr() == made[0].data_ptr()
    assert torch.equal(memory.cpu(), expected[2].view_as(memory))
    with pytest.raises(RuntimeError, match="modified (by an )?inplace"):
        loss.backward()


@over(TARGETS)
def test_the_gradient_follows_the_loss(target: Target) -> None:
    logits, labels, masked = inputs(5, 70)
    one = run(target, logits, labels, masked)[2]
    torch.testing.assert_close(run(target, logits, labels, masked, grad_loss=-4.0)[2], one * -4.0)
    assert (run(target, logits, labels, masked, grad_loss=0.0)[2] == 0).all()


@over(KERNELS)
@pytest.mark.parametrize("temperature", [0.5, 0.8])
def test_repeats_are_equal_bit_for_bit(temperature: float, target: Target) -> None:
    skip_where_slow(target, temperature != 0.5)
    rows, vocab = (3, 2100) if target.interpreted else (300, 5000)
    made = inputs(rows, vocab, torch.bfloat16)
    expected = run(target, *made, temperature=temperature)
    for _ in range(3):
        again = run(target, *made, temperature=temperature)
        assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


def test_the_number_of_threads_does_not_matter(restore_threads: None) -> None:
    made = inputs(40, 70001, torch.bfloat16)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(Target("cpu", "cpu"), *made))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


RUN_ISA = """
import sys, torch
import lopa_kernels as lk
assert torch.ops.lopa.cpu_isa() == sys.argv[3]
out = []
for logits, labels, masked in torch.load(sys.argv[1]):
    for temperature in (0.5, 0.8):
        logits.grad = None
        logits.requires_grad_()
        loss = lk.certainty_forcing_loss(logits, labels, masked, temperature=temperature)
        loss.backward()
        out.append((loss.detach(), logits.grad))
torch.save(out, sys.argv[2])
"""


def test_every_instruction_set(tmp_path: Path) -> None:
    available = ["portable", "avx2", "avx512"]
    available = available[: available.index(torch.ops.lopa.cpu_isa()) + 1]
    made = [inputs(5, vocab, dtype) for vocab in (37, 9001) for dtype in DTYPES]
    for logits, *_ in made:
        logits[0, 1] = -INF
        logits[3, ::5] = -INF
    torch.save(made, tmp_path / "inputs.pt")
    for isa in available:
        output = tmp_path / f"{isa}.pt"
        package_root = str(Path(reference.__file__).parents[3])
        environment = {**os.environ, "LOPA_CPU_ISA": isa, "PYTHONPATH": package_root}
        command = [sys.executable, "-c", RUN_ISA, str(tmp_path / "inputs.pt"), str(output), isa]
        subprocess.run(command, env=environment, check=True, timeout=120)
        results = iter(torch.load(output))
        for logits, labels, masked in made:
            for temperature in (0.5, 0.8):
                loss, grad = next(results)
                expected = exact(logits, labels, masked, temperature=temperature)
                close(loss, expected[0], 1e-6)
                check_gradient(grad, expected[2])


@over(KERNELS)
@pytest.mark.parametrize("inplace", [False, True])
def test_opcheck(inplace: bool, target: Target) -> None:
    made = target.to(inputs(3, 2100))
    leaf = made[0].requires_grad_()
    op = operator(target, "certainty_forcing_loss")
    # In place, what opcheck calls twice on one tensor would find it changed.
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    if not inplace:
        utilities = (*utilities, "test_aot_dispatch_dynamic")
    torch.library.opcheck(op, (leaf, *made[1:], 0.6, 1.5, inplace), test_utils=utilities)


@pytest.mark.big
@over(KERNELS)
@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_to_one_graph(inplace: bool, target: Target) -> None:
    """With a head before it, as in training."""
    if target.interpreted:
        pytest.skip("the interpreter is not traced")
    torch._dynamo.reset()
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(7, 16, generator=g), torch.randn(300, 16, generator=g)
    _, labels, masked = inputs(7, 300)
    hidden, weight, labels, masked = target.to((hidden, weight, labels, masked))

    def loss(hidden: torch.Tensor, weight: torch.Tensor) -> Any:
        return lk.certainty_forcing_loss(
            hidden @ weight.t(), labels, masked, inplace_backward=inplace, backend=target.backend
        )

    results = []
    for call in (loss, torch.compile(loss, fullgraph=True)):
        leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight)]
        value = call(*leaves)
        value.backward()
        results.append([value.detach(), *(leaf.grad for leaf in leaves)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


def test_numpy_arrays() -> None:
    logits, labels, masked = inputs(4, 50)
    loss = lk.certainty_forcing_loss(logits.numpy(), labels.numpy(), masked.numpy())
    assert isinstance(loss, numpy.ndarray)
    close(torch.from_numpy(numpy.asarray(loss)), exact(logits, labels, masked)[0], 1e-6)


@over(TARGETS)
def test_the_terms_have_no_gradient(target: Target) -> None:
    on = target.to(inputs(4, 50))
    options = {"beta": 0.7, "return_terms": True, "backend": target.backend}
    loss, terms = lk.certainty_forcing_loss(on[0].requires_grad_(), *on[1:], **options)
    assert loss.requires_grad
    assert not terms.requires_grad
    close(loss.detach(), terms[0].double() + 0.7 * terms[1], 1e-6)


BAD: dict[str, tuple[dict[str, Callable[[Any], Any]], dict[str, Any], type[Exception], str]] = {
    "float64": ({"logits": torch.Tensor.double}, {}, TypeError, "logits: expected dtype"),
    "no vocabulary": ({"logits": lambda t: t[:, :0]}, {}, ValueError, "V >= 1, got .4, 0."),
    "stride": ({"logits": lambda t: t[:, ::2]}, {}, ValueError, "logits: expected unit stride"),
    "list": ({"logits": torch.Tensor.tolist}, {}, TypeError, "logits: expected a tensor, got list"),
    "int32": ({"labels": torch.Tensor.int}, {}, TypeError, "labels: expected dtype torch.int64"),
    "mask": ({"masked": torch.Tensor.long}, {}, TypeError, "masked: expected dtype torch.bool"),
    "labels": ({"labels": lambda t: t[1:]}, {}, ValueError, "labels: expected shape .4., got .3."),
    "masked": ({"masked": lambda t: t[None]}, {}, ValueError, "masked: expected shape .4., got"),
    "device": ({"labels": lambda t: t.to("meta")}, {}, ValueError, "labels: expected a tensor on"),
    "zero": ({}, {"temperature": 0.0}, ValueError, "temperature: expected a finite number > 0"),
    "NaN": ({}, {"temperature": NAN}, ValueError, "temperature: expected a finite number > 0"),
    "beta": ({}, {"beta": INF}, ValueError, "beta: expected a finite number, got inf"),
    "overlap": (
        {"logits": lambda t: t[:1].expand(4, -1)}, {"inplace_backward": True}, ValueError,
        "share no memory",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    changes, options, error, match = BAD[name]
    made = dict(zip(("logits", "labels", "masked"), inputs(4, 20), strict=True))
    made |= {argument: change(made[argument]) for argument, change in changes.items()}
    with pytest.raises(error, match=f"certainty_forcing_loss: .*{match}"):
        lk.certainty_forcing_loss(**made, **options)
