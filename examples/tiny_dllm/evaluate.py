"""Accuracy against tokens a forward pass, over branches and thresholds, with intervals.

`python -m examples.tiny_dllm.evaluate --problems 1000 --json out.json` decodes the problems of a
split by vanilla decoding and by every (K, tau_conf), and prints a table with 95 % bootstrap
intervals. With `--device cuda` the model runs there in plain PyTorch and `lopa_step` on the CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

import lopa_kernels as lk
from examples.tiny_dllm.decode import Cache, Decoder
from examples.tiny_dllm.methods import Method, Outcome, lopa, run, vanilla
from examples.tiny_dllm.model import TinyDLLM, apply_rope
from examples.tiny_dllm.problems import problems


class PlainDecoder(Decoder):
    """The model on an accelerator in plain PyTorch, which copies the prefix to every branch; the
    round's decisions by `lopa_step` on the CPU."""

    def __init__(
        self,
        model: TinyDLLM,
        config: lk.LopaConfig,
        *,
        mask: str,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__(model, config, mask=mask, autocast=autocast)
        self.state_device = torch.device("cpu")

    def visible(self, state: lk.LopaState, capacity: int, mask: str) -> Tensor:
        """bool [B * K, 1, W, capacity + W]: which cached positions and columns a column sees."""
        _, branches, window = state.tokens.shape
        column = torch.arange(window, device=state.tokens.device)
        prefix = torch.arange(capacity, device=column.device) < state.cache_len[:, None]
        own = (column < state.length[..., None])[:, :, None].expand(-1, -1, window, -1)
        if mask == "block_causal":
            position = state.cache_len[:, None] + column - state.prompt_len[:, None]
            block = position.div(self.model.config.block_size, rounding_mode="floor").clamp(min=-1)
            own = own & (block[:, None, :, None] >= block[:, None, None, :])
        # Padding sees itself, so that no row of the softmax is empty.
        own = own | torch.eye(window, dtype=torch.bool, device=column.device)
        prefix = prefix[:, None, None].expand(-1, branches, window, -1)
        return torch.cat([prefix, own], dim=-1).flatten(0, 1).unsqueeze(1)

    def hidden(self, state: lk.LopaState, cache: Cache, cos_sin: Tensor, mask: str) -> Tensor:
        """Normalised hidden states [B * K * W, dim]; keys and values go to the windows."""
        c = self.model.config
        batch, branches, window = state.tokens.shape
        seen = self.visible(state, cache.k.shape[2], mask)
        position = state.cache_len[:, None].long() + torch.arange(window, device=seen.device)
        rotation = cos_sin[position][:, None]

        def with_prefix(past: Tensor, own: Tensor) -> Tensor:
            past = past[:, None].expand(-1, branches, -1, -1, -1)
            both = torch.cat([past, own], dim=2).flatten(0, 1).transpose(1, 2)
            return both.repeat_interleave(c.q_heads // c.kv_heads, dim=1)

        x = self.model.embed(state.tokens)
        for layer, block in enumerate(self.model.blocks):
            q, k, v = block.split_qkv(block.qkv(block.attn_norm(x)))
            cache.k_window[layer].copy_(apply_rope(k, rotation))
            cache.v_window[layer].copy_(v)
            attended = F.scaled_dot_product_attention(
                apply_rope(q, rotation).flatten(0, 1).transpose(1, 2),
                with_prefix(cache.k[layer], cache.k_window[layer]),
                with_prefix(cache.v[layer], cache.v_window[layer]),
                attn_mask=seen,
            )
            x = x + block.o(attended.transpose(1, 2).reshape(batch, branches, window, -1))
            x = x + block.mlp(block.mlp_norm(x))
        return self.model.norm(x).flatten(0, 2)

    def advance(self, state: lk.LopaState, cache: Cache, cos_sin: Tensor, mask: str) -> lk.LopaStep:
        device = cache.k.device
        with self.timer("model"):
            there = lk.LopaState(*(tensor.to(device) for tensor in state))
            needed = lk.needed_rows(state, self.config)
            index = needed.index[: int(needed.count)].to(device)
            hidden = self.hidden(there, cache, cos_sin.to(device), mask)
            logits = self.model.head(hidden[index]).cpu()
        with self.timer("step"):
            out = lk.lopa_step(logits, state, self.config, needed.rows)
            column = torch.arange(state.tokens.shape[2])
            b, c = (column < state.commit_len[:, None]).nonzero(as_tuple=True)
            position = (state.cache_len[b] + c).to(device)
            b, c, winner = b.to(device), c.to(device), out.winner[b].to(device)
            cache.k[:, b, position] = cache.k_window[:, b, winner, c]
            cache.v[:, b, position] = cache.v_window[:, b, winner, c]
        return out

    def round(self, state: lk.LopaState, cache: Cache, cos_sin: Tensor) -> lk.LopaStep:
        return self.advance(state, cache, cos_sin, self.mask)

    def prefill(self, state: lk.LopaState, cache: Cache, cos_sin: Tensor) -> lk.LopaStep:
        batch, _, window = state.tokens.shape
        own = Cache.empty(self.model, batch, 1, window, 0, self.autocast)
        return self.advance(state, replace(own, k=cache.k, v=cache.v), cos_sin, "block_causal")


#: the decoders that tables choose from: this library's operators throughout, or attention by
#: PyTorch and `lopa_step` on the CPU
DECODERS: dict[str, type[Decoder]] = {"operators": Decoder, "plain": PlainDecoder}


def decoder_of(
    kind: str, model: TinyDLLM, config: lk.LopaConfig, precision: str, mask: str = "block_causal"
) -> Decoder:
    """One of `DECODERS`; `precision` is "fp32", or "bf16" of products, keys and values."""
    autocast = torch.bfloat16 if precision == "bf16" else None
    return DECODERS[kind](model, config, mask=mask, autocast=autocast)


def default_precision(device: str) -> str:
    """bf16 on an accelerator, as in training."""
    return "fp32" if device == "cpu" else "bf16"


def bootstrap(
    numerator: Tensor, denominator: Tensor, samples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of sum(numerator) / sum(denominator), resampling problems."""
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randint(len(numerator), (samples, len(numerator)), generator=generator)
    ratio = numerator.double()[picked].sum(1) / denominator.double()[picked].sum(1)
    low, high = torch.quantile(ratio, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def row(method: Method, outcome: Outcome) -> dict[str, object]:
    one = torch.ones_like(outcome.forwards)
    return {
        "method": method.name,
        "branches": method.config.branches,
        "tau_conf": method.config.tau_conf,
        "window": method.config.window,
        **outcome.summary(),
        "accuracy_interval": bootstrap(outcome.correct, one),
        "tpf_interval": bootstrap(outcome.filled, outcome.forwards),
    }


def markdown(rows: Sequence[dict]) -> str:
    def interval(pair: tuple[float, float], form: str) -> str:
        return f"[{pair[0]:{form}}, {pair[1]:{form}}]"

    return tabulate(
        [
            [
                r["method"],
                r["tau_conf"],
                f"{r['accuracy']:.1%} {interval(r['accuracy_interval'], '.1%')}",
                f"{r['forwards']:,}",
                f"{r['tpf']:.2f} {interval(r['tpf_interval'], '.2f')}",
                f"{r['text_tpf']:.2f}",
            ]
            for r in rows
        ],
        headers=["method", "tau_conf", "accuracy", "forwards", "TPF", "text TPF"],
        tablefmt="github",
        disable_numparse=True,
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.tiny_dllm.evaluate", description=__doc__
    )
    parser.add_argument("--split", choices=("heldout", "train"), default="heldout")
    parser.add_argument("--problems", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--branches", type=int, nargs="*", default=[1, 2, 4, 8, 14], metavar="K")
    parser.add_argument("--tau", type=float, nargs="*", default=[0.9], metavar="TAU")
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--mask", choices=("block_causal", "full"), default="block_causal")
    parser.add_argument("--no-vanilla", action="store_true")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--weights", help="a directory of weights, or base or distilled")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    # TF32 products on GPUs: as the model was trained and its card measured.
    torch.backends.cuda.matmul.allow_tf32 = True
    model = TinyDLLM.load(args.weights, device=args.device)
    chosen = problems(args.split, args.problems, args.seed)
    methods = [] if args.no_vanilla else [vanilla(model.config)]
    methods += [
        lopa(model.config, k, tau, window=args.window) for k in args.branches for tau in args.tau
    ]
    kind = Decoder if args.device == "cpu" else PlainDecoder
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    rows = []
    for method in methods:
        start = perf_counter()
        outcome = run(kind(model, method.config, mask=args.mask), chosen, args.batch)
        rows.append(row(method, outcome))
        print(
            f"{method.name} tau {method.config.tau_conf}: {outcome.accuracy:.1%} at "
            f"{outcome.tpf:.2f} ({perf_counter() - start:.1f} s)",
            file=sys.stderr,
            flush=True,
        )
        if args.json is not None:
            args.json.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
    print(markdown(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
