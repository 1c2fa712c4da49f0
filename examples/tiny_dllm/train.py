"""Trains the tiny model, or scores a trained one.

    python -m examples.tiny_dllm.train --out runs/tiny            # train, write the weights
    python -m examples.tiny_dllm.train --out runs/tiny --resume   # go on after an interruption
    python -m examples.tiny_dllm.train --eval                     # score the shipped weights

Every step draws its batch and its noise from a generator seeded by (seed, step), so a resumed run
continues with the data it would have seen.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from examples.tiny_dllm.data import Batch, Pool, build_pool, make_batch
from examples.tiny_dllm.model import TinyConfig, TinyDLLM, save_sharded
from examples.tiny_dllm.oracle import Decoded, Score, decode, score
from examples.tiny_dllm.problems import problems

CHECKPOINT = "checkpoint.pt"


def masked_loss(model: TinyDLLM, batch: Batch) -> tuple[Tensor, Tensor]:
    """The weighted cross entropy of the masked columns, divided by all generated columns, and the
    plain mean cross entropy of a masked column in nats; two scalars, the first differentiable."""
    hidden = model.hidden(batch.tokens, batch.positions, batch.attn_mask)
    logits = model.head(hidden[:, -batch.target.shape[1] :]).float()
    nats = F.cross_entropy(logits.flatten(0, 1), batch.target.flatten(), reduction="none")
    weight = batch.weight.flatten()
    masked = weight > 0
    plain = (nats.detach() * masked).sum() / masked.sum().clamp_min(1)
    return (nats * weight).sum() / weight.numel(), plain


class Optimizers:
    """Muon (momentum orthogonalised, Keller Jordan 2024) for the layers' matrices, AdamW for
    embedding, head and norms; or AdamW for all."""

    def __init__(self, model: TinyDLLM, kind: str, lr: float, weight_decay: float) -> None:
        fused = next(model.parameters()).is_cuda
        matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
        inside = {id(p) for p in matrices}
        others = [p for p in model.parameters() if id(p) not in inside]
        self.all: list[torch.optim.Optimizer] = []
        if kind == "muon":
            # match_rms_adamw scales the update to AdamW's usual size, so that one learning rate
            # serves both (arXiv 2502.16982).
            self.all.append(
                torch.optim.Muon(
                    matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
                )
            )
        else:
            others = [*matrices, *others]
        groups = [
            {"params": [p for p in others if p.dim() == 2], "weight_decay": weight_decay},
            {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.all.append(torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=fused))

    def step(self, lr: float) -> None:
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        return [optimizer.state_dict() for optimizer in self.all]

    def load_state_dict(self, states: Iterable[dict[str, Any]]) -> None:
        for optimizer, state in zip(self.all, states, strict=True):
            optimizer.load_state_dict(state)


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then a cosine to zero at `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class Trainer:
    """Model, averaged model and optimizers, with their way to and from a checkpoint."""

    def __init__(self, args: argparse.Namespace, config: TinyConfig) -> None:
        self.args = args
        self.config = config
        self.device = torch.device(args.device)
        torch.manual_seed(args.seed)
        self.model = TinyDLLM(config)
        if args.init is not None:
            self.model.load_state_dict(TinyDLLM.load(args.init).state_dict())
        self.model.to(self.device)
        self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(args.ema))
        self.optimizers = Optimizers(self.model, args.optimizer, args.lr, args.weight_decay)
        self.step = 0
        self.seconds = 0.0
        self.loss_and_nats: Callable[[TinyDLLM, Batch], tuple[Tensor, Tensor]] = masked_loss
        if args.compile:
            self.loss_and_nats = torch.compile(masked_loss, dynamic=False)

    def save(self, path: Path) -> None:
        """Writes a checkpoint beside `path` and moves it there, so that an interruption leaves
        the old one whole."""
        state = {
            "config": asdict(self.config),
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizers": self.optimizers.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "seed": self.args.seed,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def resume(self, path: Path) -> None:
        """Continues from a checkpoint.

        Raises:
            ValueError: the checkpoint is of another shape or seed.
        """
        state = torch.load(path, map_location=self.device, weights_only=True)
        if state["config"] != asdict(self.config):
            raise ValueError(f"--resume: {path} has the shape {state['config']}")
        if state["seed"] != self.args.seed:
            raise ValueError(f"--resume: {path} has seed {state['seed']}, not {self.args.seed}")
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizers.load_state_dict(state["optimizers"])
        self.step, self.seconds = state["step"], state["seconds"]

    def train_step(self, pool: Pool) -> tuple[Tensor, Tensor]:
        """One step; the loss and the mean nats of a masked column, on the device."""
        args = self.args
        generator = torch.Generator(self.device).manual_seed(args.seed * 2**32 + self.step)
        batch = make_batch(pool, args.batch, self.config, generator)
        with self.autocast():
            loss, nats = self.loss_and_nats(self.model, batch)
        self.update(loss, learning_rate(self.step, args.steps, args.lr, args.warmup))
        return loss.detach(), nats

    def autocast(self) -> AbstractContextManager[None]:
        """bf16 products on an accelerator."""
        if self.device.type == "cuda":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()

    def update(self, loss: Tensor, lr: float) -> None:
        """What follows a step's loss: gradients, clipped to a norm of 1, weights, average."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizers.step(lr)
        self.ema.update_parameters(self.model)
        self.step += 1

    def averaged(self) -> TinyDLLM:
        """The averaged model, in evaluation mode; shares its memory."""
        module = self.ema.module
        assert isinstance(module, TinyDLLM)
        return module.eval()


def train(args: argparse.Namespace, console: Console) -> None:
    """Trains until `args.steps` or `args.time_limit_s`, with checkpoints, and writes the averaged
    weights to `args.out`/weights."""
    out = Path(args.out)
    config = TinyConfig(**json.loads(args.config))
    began = time.monotonic()
    pool = build_pool(args.pool, args.seed, width=config.max_new_tokens, workers=args.workers)
    console.print(f"{len(pool)} training problems in {time.monotonic() - began:.1f} s")
    trainer = Trainer(args, config)
    pool = pool.to(trainer.device)
    if args.resume:
        trainer.resume(out / CHECKPOINT)
        console.print(f"resumed at step {trainer.step}")
    count = sum(p.numel() for p in trainer.model.parameters())
    console.print(f"{count / 1e6:.2f} M parameters on {trainer.device}")
    out.mkdir(parents=True, exist_ok=True)
    before, start, saved = trainer.seconds, time.monotonic(), time.monotonic()
    columns = (
        TextColumn("step"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with (
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
        (out / "log.jsonl").open("a" if args.resume else "w") as log,
    ):
        task = progress.add_task("train", total=args.steps, completed=trainer.step, note="")
        while trainer.step < args.steps:
            loss, nats = trainer.train_step(pool)
            progress.advance(task)
            trainer.seconds = before + time.monotonic() - start
            if trainer.step % args.log_every == 0 or trainer.step == args.steps:
                row = {
                    "step": trainer.step,
                    "loss": round(loss.item(), 5),
                    "nats": round(nats.item(), 5),
                    "seconds": round(before + time.monotonic() - start, 1),
                }
                log.write(json.dumps(row) + "\n")
                log.flush()
                progress.update(task, note=f"loss {row['loss']:.4f}  nats {row['nats']:.4f}")
                if not console.is_terminal and trainer.step % (10 * args.log_every) == 0:
                    console.print(row)
            if time.monotonic() - saved > args.checkpoint_every_s:
                trainer.save(out / CHECKPOINT)
                saved = time.monotonic()
            if args.time_limit_s is not None and time.monotonic() - began > args.time_limit_s:
                console.print(f"time limit reached at step {trainer.step} of {args.steps}")
                break
    trainer.save(out / CHECKPOINT)
    files = save_sharded(trainer.averaged(), out / "weights")
    console.print(
        f"step {trainer.step}, {trainer.seconds:.0f} s; wrote {', '.join(map(str, files))}"
    )


def decode_all(
    model: TinyDLLM, prompts: list[str], batch: int, tau_conf: float | None, full: bool
) -> Decoded:
    """`oracle.decode` over batches."""
    parts = [
        decode(model, prompts[low : low + batch], tau_conf=tau_conf, full=full)
        for low in range(0, len(prompts), batch)
    ]
    return Decoded(
        torch.cat([part.tokens for part in parts]), torch.cat([part.forwards for part in parts])
    )


def evaluate(args: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """Scores the weights in `args.weights` on held-out problems: vanilla decoding, then
    confidence-driven decoding at each `args.tau` in both window modes."""
    torch.set_float32_matmul_precision("high")
    model = TinyDLLM.load(args.weights, device=args.device)
    held_out = problems("heldout", args.problems, args.eval_seed)
    prompts = [problem.prompt for problem in held_out]
    runs: list[tuple[str, float | None, bool]] = [("vanilla", None, False)]
    for tau in args.tau:
        runs += [(f"confidence {tau}, full", tau, True), (f"confidence {tau}, causal", tau, False)]
    rows = []
    for name, tau_conf, full in runs:
        began = time.monotonic()
        result: Score = score(
            decode_all(model, prompts, args.eval_batch, tau_conf, full), held_out, model.config
        )
        seconds = time.monotonic() - began
        rows.append({"method": name, "problems": len(prompts), **asdict(result)})
        console.print(
            f"{name:24} accuracy {result.accuracy:.3f}  text tokens a pass "
            f"{result.text_per_forward:.2f}  filled a pass {result.filled_per_forward:.2f}  "
            f"({seconds:.0f} s)"
        )
    return rows


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m examples.tiny_dllm.train", description=__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("--out", default="runs/tiny_dllm", help="folder of checkpoint, log and weights")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--config", default="{}", help="TinyConfig fields to change, as JSON")
    p.add_argument("--steps", type=int, default=8000)
    p.add_argument("--batch", type=int, default=256)
    p.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--warmup", type=int, default=200)
    p.add_argument("--weight-decay", type=float, default=0.05)
    p.add_argument("--ema", type=float, default=0.998, help="decay of the averaged weights")
    p.add_argument("--pool", type=int, default=2_000_000, help="training problems")
    p.add_argument("--workers", type=int, help="processes that make them")
    p.add_argument("--compile", action="store_true", help="torch.compile the forward and backward")
    p.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out")
    p.add_argument("--init", help="folder of weights to start from")
    p.add_argument("--time-limit-s", type=float, help="stop, checkpoint and write weights")
    p.add_argument("--checkpoint-every-s", type=float, default=120.0)
    p.add_argument("--log-every", type=int, default=50)
    p.add_argument("--eval", action="store_true", help="score --weights instead of training")
    p.add_argument("--weights", help="folder of weights to score; default: those shipped")
    p.add_argument("--problems", type=int, default=1000)
    p.add_argument("--eval-seed", type=int, default=0)
    p.add_argument("--eval-batch", type=int, default=500)
    p.add_argument("--tau", type=float, nargs="*", default=[0.9])
    p.add_argument("--json", help="file to write the scores to")
    return p


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    console = Console(width=None if Console().is_terminal else 120)
    if not args.eval:
        train(args, console)
        return
    rows = evaluate(args, console)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
