"""token_confidence and softmax_stats under compilers, with other arrays, and with bad input."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cases import integer, moved, operator, random_logits, skip_where_slow
from targets import KERNELS, Target, over

from lopa_kernels.ops.confidence import (
    TokenConfidence,
    softmax_stats,
    token_confidence,
    token_confidence_out,
)

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@over(KERNELS)
def test_opcheck(dtype: torch.dtype, target: Target) -> None:
    skip_where_slow(target, dtype != torch.float32)
    a, b = (2, 1) if target.interpreted else (3, 4)
    logits = random_logits(a, b, 50, dtype=dtype)
    strided = random_logits(b, a, 60, dtype=dtype).transpose(0, 1)[..., 3:53]
    rows = torch.tensor([[1, -1], [0, a * b - 1]], dtype=torch.int32)
    sampling = {"temperature": 0.9, "seed": integer(3), "step": integer(4)}
    out = {
        "token": torch.zeros(a, b, dtype=torch.int64),
        "prob": torch.zeros(b, a).t(),
        "score": torch.zeros(a, b),
    }
    for tensor in (logits, strided):
        calls = [
            (name, {**kind, **options})
            for name, kind in (("token_confidence", {"metric": "margin"}), ("softmax_stats", {}))
            for options in ({}, {"rows": rows, **sampling}, {"rows": rows.t(), "top_k": 3})
        ]
        for name, options in [*calls, ("token_confidence_out", out)]:
            arguments = moved((tensor, options), target.device)
            torch.library.opcheck(operator(target, name), arguments[:1], arguments[1])


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@over(KERNELS)
def test_compiles_without_a_break(compiler: str, target: Target) -> None:
    backend = target.backend

    def step(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        result = token_confidence(x * 2, metric="neg_entropy", top_k=7, backend=backend)
        prob = torch.empty_like(result.prob)
        outputs = TokenConfidence(out, prob, torch.empty_like(prob))
        token_confidence_out(x, outputs, backend=backend)
        return result.score + prob

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=compiler)
    for shape in ((3, 40), (5, 40), (2, 90)):
        x = target.to(random_logits(*shape))
        ours, theirs = (torch.full(shape[:1], -1, device=target.device) for _ in range(2))
        torch.testing.assert_close(compiled(x, ours), step(x, theirs))
        assert torch.equal(ours, theirs)


@over(KERNELS)
def test_export(target: Target) -> None:
    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seed", target.to(integer(1)))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            options = {"temperature": 0.5, "seed": self.seed, "backend": target.backend}
            return tuple(token_confidence(x, **options))

    x = target.to(random_logits(3, 40))
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(Module(), (x,), dynamic_shapes=({0: batch},))
    y = target.to(random_logits(9, 40))
    for ours, theirs in zip(program.module()(y), Module()(y), strict=True):
        assert torch.equal(ours, theirs)


def test_numpy_arrays() -> None:
    logits = np.random.default_rng(0).standard_normal((3, 50)).astype(np.float32)
    result = token_confidence(logits)
    assert isinstance(result.token, np.ndarray)
    assert (result.token == logits.argmax(-1)).all()


X = torch.zeros(2, 8)
BAD_INPUT = [
    ({"logits": torch.zeros(2, 8, dtype=torch.int32)}, TypeError, "logits: expected dtype"),
    ({"logits": torch.zeros(2, 8, dtype=torch.float64)}, TypeError, "logits: expected dtype"),
    ({"logits": torch.zeros(())}, ValueError, r"logits: expected shape \[\.\.\., V\]"),
    ({"logits": torch.zeros(3, 0)}, ValueError, r"logits: .* got \[3, 0\]"),
    ({"logits": torch.zeros(8, 2).t()}, ValueError, "logits: expected unit stride"),
    ({"metric": "entropy"}, ValueError, "metric: expected one of prob, margin, neg_entropy"),
    ({"temperature": -0.5}, ValueError, r"temperature: .* got -0\.5"),
    ({"temperature": INF}, ValueError, "temperature: .* got inf"),
    ({"temperature": NAN}, ValueError, "temperature: .* got nan"),
    ({"temperature": 1.0}, ValueError, "seed: .* got None"),
    ({"top_k": 0}, ValueError, "top_k: expected at least 1, got 0"),
    ({"top_p": 0.0}, ValueError, r"top_p: .* got 0\.0"),
    ({"top_p": 1.5}, ValueError, r"top_p: .* got 1\.5"),
    ({"seed": 3}, TypeError, "seed: expected an int64 tensor, got int"),
    ({"seed": torch.zeros(1)}, TypeError, "seed: expected dtype torch.int64"),
    ({"seed": torch.zeros(2, dtype=torch.int64)}, ValueError, "seed: expected one element"),
    ({"step": torch.zeros(1, dtype=torch.int32)}, TypeError, "step: expected dtype"),
    ({"rows": torch.zeros(2, dtype=torch.int64)}, TypeError, "rows: expected dtype torch.int32"),
    ({"rows": torch.zeros(1, dtype=torch.int32, device="meta")}, ValueError, "rows: expected a"),
    ({"backend": "tpu"}, ValueError, "backend: expected one of"),
]


@pytest.mark.parametrize(("options", "error", "match"), BAD_INPUT)
def test_bad_input(options: dict, error: type[Exception], match: str) -> None:
    arguments = {"logits": X, **options}
    with pytest.raises(error, match=match):
        token_confidence(**arguments)
    if "metric" not in options:
        with pytest.raises(error, match=match):
            softmax_stats(**arguments)


NATIVE_BAD_INPUT = [
    ({"metric": "entropy"}, "metric: expected one of"),
    ({"temperature": NAN}, "temperature: expected a finite number"),
    ({"temperature": 1.0}, "seed: expected an int64 tensor"),
    ({"top_k": -1}, "top_k: expected at least 1, got -1"),
    ({"top_p": NAN}, "top_p: expected"),
    ({"step": torch.zeros(2, dtype=torch.int64)}, "step: expected one element"),
    ({"seed": torch.zeros(1)}, "seed: expected dtype Long, got Float"),
    ({"rows": torch.zeros(2)}, "rows: expected dtype Int, got Float"),
    ({"rows": torch.tensor([1, -2], dtype=torch.int32)}, "rows: .* got -2 at flat index 1"),
    ({"logits": torch.zeros(3, 8, dtype=torch.float64)}, "logits: expected dtype BFloat16"),
    ({"logits": torch.zeros(8, 2).t()}, "logits: expected unit stride"),
    (
        {"logits": torch.zeros((1, 2) * 9 + (8,)).expand((3, 2) * 9 + (8,))},
        "logits: expected at most 8 leading",
    ),
]


@pytest.mark.parametrize(("options", "match"), NATIVE_BAD_INPUT)
@over(KERNELS)
def test_bad_input_past_the_python_checks(options: dict, match: str, target: Target) -> None:
    if target.backend != "cpu" and "flat index" in match:
        pytest.skip("a GPU's values are not read by the host")
    if target.backend == "triton" and "leading" in match:
        pytest.skip("Triton's kernels take any number of leading dimensions")
    with pytest.raises(RuntimeError, match=f"token_confidence: {match}"):
        operator(target, "token_confidence")(**moved({"logits": X, **options}, target.device))


@pytest.mark.parametrize(
    ("position", "buffer", "error", "match"),
    [
        (0, torch.zeros(2, dtype=torch.int32), TypeError, "token: expected dtype"),
        (1, torch.zeros(3), ValueError, r"prob: expected shape \[2\], got \[3\]"),
        (2, torch.zeros(2, device="meta"), ValueError, "score: expected a tensor on cpu"),
    ],
)
def test_bad_outputs(
    position: int, buffer: torch.Tensor, error: type[Exception], match: str
) -> None:
    out = [torch.zeros(2, dtype=torch.int64), torch.zeros(2), torch.zeros(2)]
    out[position] = buffer
    with pytest.raises(error, match=match):
        token_confidence_out(X, TokenConfidence(*out))
