"""The certainty-forcing loss on a GPU: graphs, synchronisation, memory, sizes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import close, random_logits
from gpu import capture, needs_memory, node_types, peak_bytes
from targets import GPU_TARGETS, Target, over

import lopa_kernels as lk
from lopa_kernels.ops.certainty_loss import gradient, reference

LLADA = 126464


class Step:
    """Both passes on tensors that stay where they are."""

    def __init__(self, target: Target, rows: int, vocab: int, temperature: float) -> None:
        self.generator = torch.Generator(target.device).manual_seed(rows + vocab)
        self.options: dict[str, Any] = {"temperature": temperature, "backend": target.backend}
        on = {"device": target.device}
        self.logits = torch.zeros(rows, vocab, dtype=torch.bfloat16, **on)
        self.labels = torch.zeros(rows, dtype=torch.int64, **on)
        self.masked = torch.zeros(rows, dtype=torch.bool, **on)
        self.renew()

    def renew(self) -> None:
        """Other logits, labels and another number of masked rows, for a graph that is replayed."""
        self.logits.normal_(std=4, generator=self.generator)
        self.labels.copy_(self.logits.float().argmax(-1))
        self.labels[::3] = 0
        share = torch.rand((), generator=self.generator, device=self.logits.device)
        draws = torch.rand(self.masked.shape, generator=self.generator, device=self.logits.device)
        self.masked.copy_(draws < share)

    def __call__(self) -> list[torch.Tensor]:
        leaf = self.logits.detach().requires_grad_()
        loss, terms = lk.certainty_forcing_loss(
            leaf, self.labels, self.masked, return_terms=True, **self.options
        )
        (grad,) = torch.autograd.grad(loss, leaf)
        return [loss.detach(), terms, grad]


def check_equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def check_rows(step: Step, results: list[torch.Tensor]) -> None:
    """Against float64, of the whole batch's loss and of some rows' gradients."""
    options = (step.options["temperature"], 2.0)
    rows = [
        reference.forward(x.double(), label, mask, *options)
        for x, label, mask in zip(
            step.logits.split(64), step.labels.split(64), step.masked.split(64), strict=True
        )
    ]
    counts = torch.stack([part[4] for part in rows]).sum(0)
    terms = sum(part[1] * part[4] for part in rows) / counts.clamp(min=1)
    close(results[0].cpu(), (terms[0] + 2 * terms[1]).cpu(), 1e-6)
    close(results[1].cpu(), terms.cpu(), 1e-6)
    one = torch.ones((), dtype=torch.float64, device=step.logits.device)
    stats, order = rows[0][2:4]
    expected = reference.gradient(
        one, step.logits[:64].double(), step.labels[:64], stats, order, counts, *options
    )
    error = (results[2][:64].double() - expected).abs()
    bound = (2**-8 + 1e-5) * expected.abs() + 1e-6 / counts[0].clamp(min=1)
    bound = bound + 1e-5 * expected.abs().amax(-1, keepdim=True)
    assert bool((error <= bound).all()), float(error.max())


@pytest.mark.parametrize("temperature", [0.5, 0.8])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 777), (100, 5001), (300, 50257), (67, LLADA)])
@over(GPU_TARGETS)
def test_values(rows: int, vocab: int, temperature: float, target: Target) -> None:
    """More tiles than the ring holds, rows at any address, last tiles of any length."""
    step = Step(target, rows, vocab, temperature)
    for _ in range(2):
        check_rows(step, step())
        step.renew()


@pytest.mark.parametrize("temperature", [0.5, 0.8])
@pytest.mark.parametrize("vocab", [777, LLADA])
@over(GPU_TARGETS)
def test_a_captured_graph_replays_with_other_values(
    vocab: int, temperature: float, target: Target
) -> None:
    """Bit for bit what eager execution gives, with another number of masked rows."""
    step = Step(target, 40, vocab, temperature)
    step()
    torch.cuda.synchronize()
    graph, captured = capture(step)
    losses = []
    for _ in range(4):
        step.renew()
        graph.replay()
        replayed = [tensor.clone() for tensor in captured]
        check_equal(replayed, step())
        losses.append(float(replayed[0]))
    assert len(set(losses)) > 1


@over(GPU_TARGETS)
def test_a_graph_of_both_passes_holds_kernels_alone(target: Target, plain_memory: None) -> None:
    """Order, tiles, rows and means; the gradient; and autograd's 1 before it."""
    step = Step(target, 20, 5000, 0.5)
    step()
    torch.cuda.synchronize()
    graph, _ = capture(step)
    assert node_types(graph) == ["kernel"] * 6


@over(GPU_TARGETS)
def test_never_waits_for_the_device(target: Target) -> None:
    step = Step(target, 50, 9001, 0.5)
    expected = [tensor.clone() for tensor in step()]
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    check_equal(results, expected)


@over(GPU_TARGETS)
def test_repeats_are_equal_bit_for_bit(target: Target) -> None:
    step = Step(target, 500, LLADA, 0.5)
    expected = [tensor.clone() for tensor in step()]
    for _ in range(5):
        check_equal(step(), expected)


@over(GPU_TARGETS)
def test_a_row_does_not_depend_on_the_others(target: Target) -> None:
    """The gradients of rows alone, with the counts of the batch: what the chunked form does."""
    step = Step(target, 60, 33333, 0.5)
    grad = step()[2]
    run = torch.ops.lopa_triton if target.backend == "triton" else torch.ops.lopa
    counts = run.certainty_forcing_loss(step.logits, step.labels, step.masked, 0.5)[4]
    one = torch.ones((), device=target.device)
    for rows in (slice(0, 1), slice(7, 20), slice(20, 60)):
        part = (step.logits[rows], step.labels[rows], step.masked[rows])
        stats, order = run.certainty_forcing_loss(*part, 0.5)[2:4]
        alone = gradient(one, *part[:2], stats, order, counts, backend=target.backend)
        assert alone is not None
        assert torch.equal(alone, grad[rows])


@pytest.mark.parametrize("share", [0.0, 0.05, 1.0])
@over(GPU_TARGETS)
def test_few_masked_rows(share: float, target: Target) -> None:
    """What has no part in the loss may hold anything; its gradient is written all the same."""
    step = Step(target, 257, 20001, 0.5)
    step.masked.copy_(torch.arange(257, device=target.device) < round(257 * share))
    step.logits[~step.masked] = math.nan
    loss, _, grad = step()
    assert loss.isfinite()
    assert (grad[~step.masked] == 0).all()
    assert grad.isfinite().all()


@pytest.mark.big
@over(GPU_TARGETS)
def test_memory_is_the_gradient_alone(target: Target, plain_memory: None) -> None:
    needs_memory(8)
    rows = 2048
    step = Step(target, rows, LLADA, 0.5)
    step()
    size = step.logits.nbytes
    assert peak_bytes(step) < 1.02 * size

    def in_place() -> None:
        head = step.logits.detach().requires_grad_()
        loss = lk.certainty_forcing_loss(
            head, step.labels, step.masked, inplace_backward=True, **step.options
        )
        torch.autograd.grad(loss, head)

    assert peak_bytes(in_place) < 0.02 * size


@pytest.mark.big
@over(GPU_TARGETS)
def test_memory_of_the_chunked_form(target: Target, plain_memory: None) -> None:
    """A chunk of logits, the gradients, and the sum of the hidden states' in fp32."""
    needs_memory(8)
    rows, hidden_size, chunk = 4096, 256, 64 << 20
    hidden = torch.randn(rows, hidden_size, device=target.device).bfloat16().requires_grad_()
    weight = torch.randn(LLADA, hidden_size, device=target.device).bfloat16().requires_grad_()
    labels = torch.zeros(rows, dtype=torch.int64, device=target.device)
    masked = torch.ones(rows, dtype=torch.bool, device=target.device)

    def call() -> None:
        loss = lk.fused_linear_certainty_forcing_loss(
            hidden, weight, labels, masked, chunk_bytes=chunk, backend=target.backend
        )
        torch.autograd.grad(loss, (hidden, weight))

    call()
    most = chunk + weight.nbytes + 3 * hidden.nbytes
    assert peak_bytes(call) < 1.1 * most
    assert most < rows * LLADA * 2 / 4


@pytest.mark.big
@over(GPU_TARGETS)
def test_more_than_two_to_the_31_elements(target: Target) -> None:
    """Offsets in the logits and in the gradient are of 64 bits."""
    needs_memory(16)
    rows = 2**31 // LLADA + 100
    step = Step(target, 1, LLADA, 0.5)
    tail = random_logits(64, LLADA, dtype=torch.bfloat16).to(target.device)
    step.logits = torch.empty(rows, LLADA, dtype=torch.bfloat16, device=target.device)
    step.logits[-64:] = tail
    step.labels = torch.zeros(rows, dtype=torch.int64, device=target.device)
    step.labels[-64:] = tail.float().argmax(-1)
    step.masked = torch.zeros(rows, dtype=torch.bool, device=target.device)
    step.masked[-64:] = True
    loss, _, grad = step()
    alone = Step(target, 64, LLADA, 0.5)
    alone.logits, alone.labels, alone.masked = tail, step.labels[-64:], step.masked[-64:]
    expected = alone()
    assert torch.equal(loss, expected[0])
    assert torch.equal(grad[-64:], expected[2])
    assert not bool(grad[:-64].any())
