"""``python -m bench.ascend``: the AscendC kernels on emulated cores, and a model of their cost.

The figures are a model (``ascend_ops/emulator/cost.py``): counters of the emulated run over the
peak rates of an Ascend 910B. Nothing was run on an NPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ascend_ops.emulator import confidence, cost, kv_cache
from ascend_ops.emulator.branch import branch_step
from ascend_ops.emulator.branch_attention import branch_attention
from lopa_kernels import LopaConfig, LopaState, initial_state


@dataclass(frozen=True)
class Run:
    """A launch: the report of the emulator, and the bytes of its operands, each once."""

    report: Mapping[str, Any]
    operands: int


@dataclass(frozen=True)
class Modelled:
    """A shape of an operator to model."""

    op: str
    name: str
    run: Callable[[], Run]


def _attention(
    branches: int, window: int, prefix: int, query_heads: int, kv_heads: int, head_dim: int = 128
) -> Modelled:
    def run() -> Run:
        generator = torch.Generator().manual_seed(0)

        def draw(*sizes: int) -> torch.Tensor:
            return torch.randn(*sizes, generator=generator).bfloat16()

        q = draw(1, branches, window, query_heads, head_dim)
        caches = [draw(1, prefix, kv_heads, head_dim) for _ in range(2)]
        windows = [draw(1, branches, window, kv_heads, head_dim) for _ in range(2)]
        cache_len = torch.tensor([prefix], dtype=torch.int32)
        length = torch.full((1, branches), window, dtype=torch.int32)
        cores = cost.ASCEND_910B.cores
        result = branch_attention(q, *caches, *windows, cache_len, length, cores=cores)
        tensors = [q, *caches, *windows, result.out, result.lse]
        return Run(result.report, sum(t.numel() * t.element_size() for t in tensors))

    name = f"K={branches} W={window} P={prefix} {query_heads}/{kv_heads} D={head_dim} bf16"
    return Modelled("branch_attention", name, run)


def _confidence(rows: int, vocab: int, metric: str) -> Modelled:
    def run() -> Run:
        generator = torch.Generator().manual_seed(0)
        logits = (4 * torch.randn(rows, vocab, generator=generator)).bfloat16()
        reports: list[Mapping[str, Any]] = []
        cores = 2 * cost.ASCEND_910B.cores
        out = confidence.token_confidence(logits, metric=metric, cores=cores, reports=reports)
        return Run(reports[0], sum(t.numel() * t.element_size() for t in (logits, *out)))

    return Modelled("token_confidence", f"rows={rows} V={vocab} {metric} bf16", run)


def _state(batch: int, branches: int, window: int, block: int) -> tuple[LopaState, LopaConfig]:
    """A window of masks behind a prompt that is in the cache."""
    config = LopaConfig(
        mask_id=1, max_new_tokens=window, block_size=block, window=window, branches=branches
    )
    first = initial_state(torch.zeros(batch, block, dtype=torch.int64), config)
    tokens = torch.full((batch, branches, window), 1)
    length = torch.full((batch, branches), window, dtype=torch.int32)
    one = torch.ones(batch, branches)
    state = first._replace(
        tokens=tokens,
        length=length,
        creation=one,
        eos=torch.zeros(batch, branches, dtype=torch.bool),
        branches=torch.full((batch,), branches, dtype=torch.int32),
        cache_len=torch.full((batch,), block, dtype=torch.int32),
        commit_len=torch.zeros(batch, dtype=torch.int32),
    )
    return state, config


def _step(batch: int, branches: int, window: int) -> Modelled:
    def run() -> Run:
        generator = torch.Generator().manual_seed(0)
        state, config = _state(batch, branches, window, 32)
        prob = torch.rand(batch, branches, window, generator=generator)
        token = torch.zeros(prob.shape, dtype=torch.int64)
        reports: list[Mapping[str, Any]] = []
        out = branch_step(token, prob, prob, state, config, reports=reports)
        tensors = [token, prob, prob, *state, *out.state, *out[1:]]
        return Run(reports[0], sum(t.numel() * t.element_size() for t in tensors))

    return Modelled("branch_step", f"B={batch} K={branches} W={window}", run)


def _prewrite(
    branches: int, window: int, query_heads: int, kv_heads: int, *, norms: bool = False
) -> Modelled:
    head_dim = 128

    def run() -> Run:
        heads = query_heads + 2 * kv_heads
        qkv = torch.ones(1, branches, window, heads, head_dim, dtype=torch.bfloat16)
        q = torch.zeros(1, branches, window, query_heads, head_dim, dtype=torch.bfloat16)
        windows = torch.zeros(2, 1, 1, branches, window, kv_heads, head_dim, dtype=torch.bfloat16)
        cos_sin = torch.ones(window, head_dim)
        lengths = torch.zeros(1, dtype=torch.int32)
        cores = 2 * cost.ASCEND_910B.cores
        weights = [torch.ones(head_dim, dtype=torch.bfloat16)] * 2 if norms else []
        report = kv_cache.qkv_prewrite_(
            q, *windows, 0, qkv, cos_sin, lengths, *weights, cores=cores
        )
        tensors = [q, qkv, windows, cos_sin, *weights]
        return Run(report, sum(t.numel() * t.element_size() for t in tensors))

    name = f"K={branches} W={window} {query_heads}/{kv_heads} D={head_dim} bf16"
    return Modelled("qkv_prewrite_", f"{name} norms" if norms else name, run)


def _commit(layers: int, columns: int, kv_heads: int) -> Modelled:
    head_dim = 128

    def run() -> Run:
        window = torch.ones(2, layers, 1, 2, columns, kv_heads, head_dim, dtype=torch.bfloat16)
        cache = torch.zeros(2, layers, 1, columns, kv_heads, head_dim, dtype=torch.bfloat16)
        winner, cache_len = torch.tensor([[1], [0]], dtype=torch.int32)
        commit_len = torch.full((1,), columns, dtype=torch.int32)
        cores = 2 * cost.ASCEND_910B.cores
        lengths = winner, cache_len, commit_len
        report = kv_cache.kv_commit_(*cache, *window, *lengths, cores=cores)
        return Run(report, 2 * cache.numel() * cache.element_size())

    return Modelled("kv_commit_", f"L={layers} U={columns} Hk={kv_heads} D={head_dim} bf16", run)


#: Vocabularies of Dream (152064) and LLaDA (126464). Then Dream's heads (28/4) and LLaDA's (32/32).
CASES = [
    *(_confidence(128, 152064, metric) for metric in ("prob", "margin", "neg_entropy")),
    _confidence(8, 152064, "prob"),
    _confidence(128, 126464, "prob"),
    _step(1, 8, 96),
    _step(16, 8, 96),
    _prewrite(8, 32, 28, 4),
    _prewrite(8, 32, 32, 32),
    _prewrite(8, 32, 32, 8, norms=True),
    _commit(28, 32, 4),
    _commit(32, 32, 32),
    _attention(4, 32, 512, 28, 4),
    _attention(8, 32, 1024, 28, 4),
    _attention(4, 64, 1024, 28, 4),
    _attention(4, 32, 512, 32, 32),
]


def main(arguments: Sequence[str] | None = None) -> int:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m bench.ascend", description=__doc__)
    parser.add_argument("--op", metavar="NAME", help="operators whose name contains this")
    parser.add_argument("--json", type=Path, metavar="PATH")
    options = parser.parse_args(arguments)
    chosen = [case for case in CASES if options.op is None or options.op in case.op]
    if not chosen:
        parser.error(f"--op: no operator's name contains {options.op!r}")
    table = Table(title="Ascend 910B, a model (us at peak rates); not run on an NPU")
    for column in ("op", "shape", "memory", "L2", "cube", "vector", "scalar", "bound"):
        table.add_column(column, justify="left" if column in ("op", "shape") else "right")
    for column in ("Mbyte moved", "M repeats", "G MAC", "UB KiB", "flags"):
        table.add_column(column, justify="right")
    rows = []
    for case in chosen:
        run = case.run()
        report = {n: v for n, v in run.report.items() if n != "cores"}
        times = cost.model(run.report, run.operands)
        engine, longest = times.bound
        moved = report["gm_to_local"] + report["local_to_gm"]
        table.add_row(
            case.op,
            case.name,
            *(f"{t:.1f}" for t in (times.memory, times.l2, times.cube, times.vector, times.scalar)),
            f"{longest:.1f} {engine}",
            f"{moved / 1e6:.1f}",
            f"{report['vector_repeats'] / 1e6:.2f}",
            f"{report['cube_macs'] / 1e9:.2f}",
            f"{report['peak_ub'] / 1024:.0f}",
            str(report["flags"] + report["barriers"] + report["cross_core"] + report["sync_all"]),
        )
        rows.append(
            {
                "op": case.op,
                "case": case.name,
                "model_us": asdict(times),
                "operand_bytes": run.operands,
                "report": report,
            }
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if options.json is not None:
        options.json.write_text(json.dumps({"model": "Ascend 910B", "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
