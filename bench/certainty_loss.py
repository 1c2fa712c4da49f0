"""certainty_forcing_loss, forward and backward, against the training code's PyTorch and Liger."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from bench import peers
from bench.case import Case
from lopa_kernels.ops.certainty_loss import certainty_forcing_loss, reference
from lopa_kernels.ops.certainty_loss.fused_linear import fused_linear_certainty_forcing_loss

#: two exponentials, counted as ten each, and the products and sums beside them, of both passes
FLOPS_PER_LOGIT = 48

#: LLaDA-8B
LLADA, HIDDEN = 126464, 4096

#: dParallel's
TEMPERATURE, BETA = 0.5, 2.0

#: rows of the oracle at a time
ORACLE_ROWS = 256

Result = tuple[torch.Tensor, torch.Tensor]


def published(
    logits: torch.Tensor,
    labels: torch.Tensor,
    masked: torch.Tensor,
    temperature: float = TEMPERATURE,
    beta: float = BETA,
) -> torch.Tensor:
    """The loss by the operations of dParallel's training code, in the dtype of the logits.

    Cross entropy, the softmax at the temperature, its logarithm, their product, the argmax. The
    rows are weighed instead of selected, which is cheaper where most are masked, never waits for
    the device, and leaves a compiler one graph.
    """
    cross = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    p = torch.softmax(logits / temperature, dim=-1)
    entropy = -(p * torch.log(p + 1e-12)).sum(-1)
    right = (logits.argmax(-1) == labels) & masked
    entropy_mean = (entropy * right).sum() / right.sum().clamp(min=1)
    return (cross * masked).sum() / masked.sum().clamp(min=1) + beta * entropy_mean


def published_fp32(
    logits: torch.Tensor, labels: torch.Tensor, masked: torch.Tensor, temperature: float
) -> torch.Tensor:
    return published(logits.float(), labels, masked, temperature)


def both_passes(
    loss: Callable[..., torch.Tensor],
    logits: torch.Tensor,
    labels: torch.Tensor,
    masked: torch.Tensor,
) -> Result:
    """(loss, gradient of the logits)."""
    leaf = logits.detach().requires_grad_()
    value = loss(leaf, labels, masked)
    (grad,) = torch.autograd.grad(value, leaf)
    return value.detach(), grad


def oracle(
    logits: torch.Tensor, labels: torch.Tensor, masked: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, gradient in the dtype of the logits, terms) by float64, some rows at a time."""
    parts = [tensor.split(ORACLE_ROWS) for tensor in (logits, labels, masked)]
    forward = [
        reference.forward(x.double(), y, m, temperature, BETA)
        for x, y, m in zip(*parts, strict=True)
    ]
    counts = torch.stack([part[4] for part in forward]).sum(0)
    terms = torch.stack([part[1] * part[4] for part in forward]).sum(0) / counts.clamp(min=1)
    one = torch.ones((), dtype=torch.float64, device=logits.device)
    grad = torch.empty_like(logits)
    for out, x, y, part in zip(grad.split(ORACLE_ROWS), *parts[:2], forward, strict=True):
        exact = reference.gradient(one, x.double(), y, *part[2:4], counts, temperature, BETA)
        out.copy_(exact)
    return terms[0] + BETA * terms[1], grad, terms


def check_gradient(grad: torch.Tensor, expected: torch.Tensor, relative: float) -> None:
    """By the norm of the difference, without a copy of the whole in another dtype."""
    error = size = 0.0
    for ours, theirs in zip(grad.split(ORACLE_ROWS), expected.split(ORACLE_ROWS), strict=True):
        error += (ours.float() - theirs.float()).square().sum().item()
        size += theirs.float().square().sum().item()
    assert error <= relative**2 * size, f"gradients differ by {(error / size) ** 0.5:.1e}"


def check(result: Any, expected: Any, loss: float = 1e-4, grad: float | None = None) -> None:
    """The loss, and the gradient within twice the rounding of its dtype, or as told."""
    eps = torch.finfo(result[1].dtype).eps
    torch.testing.assert_close(result[0].double(), expected[0], rtol=loss, atol=1e-6)
    check_gradient(result[1], expected[1], max(eps, 1e-5) if grad is None else grad)


#: in bf16 the published operations round every probability and its logarithm
check_rounded = functools.partial(check, loss=3e-2, grad=0.1)


def check_in_place(result: Any, expected: Any) -> None:
    check((result[0], result[1]), expected)


def check_cross_entropy(result: Any, expected: Any) -> None:
    """Of Liger's, which has no entropy."""
    # Its result is in the dtype of the logits.
    torch.testing.assert_close(result[0].double(), expected[2][0], rtol=1e-2, atol=1e-5)


def has_liger() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


@functools.cache
def _liger(name: str) -> Any:
    return getattr(importlib.import_module("liger_kernel.transformers"), name)()


def liger_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, masked: torch.Tensor
) -> torch.Tensor:
    """The cross entropy of all rows; it writes its gradient over the logits."""
    return _liger("LigerCrossEntropyLoss")(logits, labels)


def make_inputs(
    rows: int, vocab: int, dtype: torch.dtype, device: str, masked_share: float, buffers: int
) -> list[tuple[torch.Tensor, ...]]:
    """Logits of which nine rows in ten agree with their labels, as a distilled model's do."""
    torch.compiler.reset()
    generator = torch.Generator(device).manual_seed(0)
    made = []
    for _ in range(buffers):
        logits = torch.empty(rows, vocab, dtype=dtype, device=device)
        logits.normal_(std=3, generator=generator)
        labels = torch.cat([part.float().argmax(-1) for part in logits.split(ORACLE_ROWS)])
        labels[::10] = 0
        masked = torch.rand(rows, generator=generator, device=device) < masked_share
        made.append((logits, labels, masked))
    return made


def _label(rows: int, vocab: int, dtype: torch.dtype, temperature: float, share: float) -> str:
    name = f"{rows} x {vocab} {str(dtype).removeprefix('torch.')}, temperature={temperature}"
    return name if share == 1 else f"{name}, {share:.0%} masked"


def case(
    rows: int,
    vocab: int,
    dtype: torch.dtype,
    device: str,
    temperature: float = TEMPERATURE,
    masked_share: float = 1.0,
) -> Case:
    """Both passes; the gradient is a tensor of its own."""

    def ours(backend: str | None = None) -> Callable[..., Result]:
        loss = functools.partial(
            certainty_forcing_loss, temperature=temperature, beta=BETA, backend=backend
        )
        return functools.partial(both_passes, loss)

    eager = functools.partial(published, temperature=temperature)
    eager_fp32 = functools.partial(published_fp32, temperature=temperature)
    providers: dict[str, Callable[..., Any]] = {"eager": functools.partial(both_passes, eager)}
    checks: dict[str, Callable[[Any, Any], None]] = {}
    compiled = {"torch.compile": eager}
    if dtype != torch.float32:
        providers["eager, fp32"] = functools.partial(both_passes, eager_fp32)
        compiled["torch.compile, fp32"] = eager_fp32
        checks = {"eager": check_rounded, "torch.compile": check_rounded}
    optional = list(compiled)
    if dtype == torch.float16:
        # log(p + 1e-12) of a p that is 0 there is that of 0, and 0 times it NaN.
        optional.append("eager")
    for name, function in compiled.items():
        providers[name] = functools.partial(both_passes, peers.compiled(function))
    providers["lopa"] = ours()
    if device != "cpu" and peers.has_triton("certainty_forcing_loss"):
        providers["lopa, triton"] = ours("triton")
    moved = (1 + 2 * masked_share) * rows * vocab * dtype.itemsize
    return Case(
        op="certainty_forcing_loss",
        name=_label(rows, vocab, dtype, temperature, masked_share),
        make=functools.partial(make_inputs, rows, vocab, dtype, device, masked_share),
        providers=providers,
        reference=None,
        oracle=functools.partial(oracle, temperature=temperature),
        check=check,
        checks=checks,
        # The logits of masked rows are read by each pass, and a gradient of all written.
        bytes=round(moved),
        flops=round(masked_share * rows * vocab * FLOPS_PER_LOGIT),
        device=device,
        optional=tuple(optional),
    )


def in_place_case(rows: int, vocab: int, dtype: torch.dtype, device: str) -> Case:
    """The gradient over the logits, as Liger's cross entropy has it too, which is measured beside.

    A call finds what the call before has left of its inputs: a gradient, which is as good as other
    logits for the time that it takes.
    """

    def ours(backend: str | None = None) -> Callable[..., Result]:
        loss = functools.partial(certainty_forcing_loss, inplace_backward=True, backend=backend)
        return functools.partial(both_passes, loss)

    providers: dict[str, Callable[..., Any]] = {"lopa": ours()}
    optional: tuple[str, ...] = ()
    if device != "cpu" and peers.has_triton("certainty_forcing_loss"):
        providers["lopa, triton"] = ours("triton")
    if device != "cpu" and has_liger():
        providers["Liger cross entropy (no entropy)"] = functools.partial(
            both_passes, liger_cross_entropy
        )
        optional = ("Liger cross entropy (no entropy)",)
    return Case(
        op="certainty_forcing_loss",
        name=f"{_label(rows, vocab, dtype, TEMPERATURE, 1.0)}, in place",
        make=functools.partial(make_inputs, rows, vocab, dtype, device, 1.0),
        providers=providers,
        reference=None,
        oracle=functools.partial(oracle, temperature=TEMPERATURE),
        check=check_in_place,
        checks=dict.fromkeys(optional, check_cross_entropy),
        bytes=3 * rows * vocab * dtype.itemsize,
        flops=rows * vocab * FLOPS_PER_LOGIT,
        device=device,
        optional=optional,
    )


def _linear(
    loss: Callable[..., torch.Tensor],
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    masked: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
    value = loss(*leaves, labels, masked)
    return (value.detach(), *torch.autograd.grad(value, leaves))


def _through_logits(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, masked: torch.Tensor
) -> torch.Tensor:
    loss = certainty_forcing_loss(hidden @ weight.t(), labels, masked, inplace_backward=True)
    assert isinstance(loss, torch.Tensor)
    return loss


def _liger_linear(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, masked: torch.Tensor
) -> torch.Tensor:
    return _liger("LigerFusedLinearCrossEntropyLoss")(weight, hidden, labels)


def linear_case(rows: int, hidden_size: int, vocab: int, dtype: torch.dtype, device: str) -> Case:
    """From hidden states: by chunks, through all logits, and Liger's fused cross entropy."""

    def make(buffers: int) -> list[tuple[torch.Tensor, ...]]:
        generator = torch.Generator(device).manual_seed(0)
        made = []
        for _ in range(buffers):
            hidden, weight = (
                torch.empty(n, hidden_size, dtype=dtype, device=device) for n in (rows, vocab)
            )
            hidden.normal_(generator=generator)
            weight.normal_(std=3 * hidden_size**-0.5, generator=generator)
            labels = torch.randint(0, vocab, (rows,), generator=generator, device=device)
            made.append((hidden, weight, labels, torch.ones_like(labels, dtype=torch.bool)))
        return made

    def check_linear(result: Any, expected: Any) -> None:
        torch.testing.assert_close(result[0], expected[0], rtol=1e-3, atol=1e-5)
        for ours, theirs in zip(result[1:], expected[1:], strict=True):
            check_gradient(ours, theirs, 2e-2)

    providers: dict[str, Callable[..., Any]] = {
        "lopa through all logits": functools.partial(_linear, _through_logits),
        "lopa": functools.partial(_linear, fused_linear_certainty_forcing_loss),
    }
    optional: tuple[str, ...] = ()
    if device != "cpu" and has_liger():
        providers["Liger fused linear cross entropy (no entropy)"] = functools.partial(
            _linear, _liger_linear
        )
        optional = ("Liger fused linear cross entropy (no entropy)",)
    parameters = (rows + vocab) * hidden_size * dtype.itemsize
    return Case(
        op="fused_linear_certainty_forcing_loss",
        name=f"{rows} x {hidden_size} x {vocab} {str(dtype).removeprefix('torch.')}",
        make=make,
        providers=providers,
        reference="lopa through all logits",
        check=check_linear,
        # The logits are another's loss there: no label agrees, so that the cross entropy is all.
        checks=dict.fromkeys(optional, check_linear),
        bytes=3 * parameters,
        flops=3 * 2 * rows * vocab * hidden_size,
        buffers=2,
        device=device,
        optional=optional,
    )


def cases(device: str = "cpu") -> list[Case]:
    """Every case on one device."""
    bf16 = torch.bfloat16
    if device != "cpu":
        return [
            case(4096, LLADA, bf16, device),
            in_place_case(4096, LLADA, bf16, device),
            case(4096, LLADA, bf16, device, temperature=0.8),
            case(4096, LLADA, bf16, device, masked_share=0.5),
            case(512, LLADA, bf16, device),
            case(1024, LLADA, torch.float16, device),
            case(1024, LLADA, torch.float32, device),
            linear_case(4096, HIDDEN, LLADA, bf16, device),
        ]
    return [
        case(64, LLADA, bf16, device),
        case(64, LLADA, bf16, device, temperature=0.8),
        case(64, LLADA, torch.float32, device),
        in_place_case(64, LLADA, bf16, device),
        linear_case(64, 256, 32000, torch.float32, device),
    ]


CASES = cases()
