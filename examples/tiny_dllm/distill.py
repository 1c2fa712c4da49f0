"""Distils the tiny model to be certain sooner, by certainty forcing (dParallel, arXiv 2509.26488).

    python -m examples.tiny_dllm.distill --out runs/distilled

The model decodes training problems; its right solutions are the labels of a student that starts
from the same weights. Each step masks part of one block, with all blocks before it finished and
all after it masked, and adds the same loss on the complementary part. The loss is cross entropy
and, where the prediction is right, the entropy of the distribution. `--out` receives the labels,
a checkpoint, log.jsonl, curve.png, distill.md and the weights.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Generator, Tensor

import lopa_kernels as lk
from examples.tiny_dllm.data import (
    Batch,
    Pool,
    Windows,
    draw_cuts,
    draw_problems,
    layout,
    training_mask,
)
from examples.tiny_dllm.evaluate import DECODERS, decoder_of, default_precision
from examples.tiny_dllm.labels import Labels, Teacher, load_labels, make_labels, save_labels
from examples.tiny_dllm.methods import Method, entropy, lopa, run
from examples.tiny_dllm.model import TinyConfig, TinyDLLM, save_sharded, weights_of
from examples.tiny_dllm.problems import problems
from examples.tiny_dllm.train import CHECKPOINT, Trainer

#: training problems of the curve, apart from the labels' and those that choose thresholds
CURVE_SEED = 3


class Noise(NamedTuple):
    """Two complementary maskings of a batch of solutions, each bool [B, N T]."""

    windows: Windows
    first: Tensor
    second: Tensor
    """Disjoint, and together the noised blocks."""
    after: Tensor
    """The blocks after a noised one in its window, masked both times."""


def draw_noise(
    size: int, config: TinyConfig, generator: Generator, share: tuple[float, float]
) -> Noise:
    """Block-wise noise for `size` samples of N blocks of T.

    A sample's blocks are cut into windows; each is one example of the published recipe: what is
    before it is finished, its first block is noised, and the rest of it is masked. A masked share
    is drawn from `share` for each noised block.
    """
    device = generator.device
    cut, window, start = draw_cuts(size, config, generator)
    low, high = share
    level = low + (high - low) * torch.rand(cut.shape, generator=generator, device=device)
    columns = torch.rand(*cut.shape, config.block_size, generator=generator, device=device)
    drawn = (columns < level.unsqueeze(-1)).flatten(1)
    noised = cut.repeat_interleave(config.block_size, dim=1)
    masked = torch.where(
        cut, drawn.view(*cut.shape, -1).sum(-1), torch.full_like(window, config.block_size)
    )
    return Noise(Windows(window, start, masked), noised & drawn, noised & ~drawn, ~noised)


class Pair(NamedTuple):
    """A batch of 2 B rows: B samples, then the same samples under the complementary mask."""

    batch: Batch
    masked: Tensor
    """bool [2 B, N T]: the columns of the loss."""


def make_pair(
    pool: Pool,
    size: int,
    config: TinyConfig,
    generator: Generator,
    *,
    share: tuple[float, float] = (0.5, 0.5),
    following: bool = False,
) -> Pair:
    """`size` samples under two complementary masks; the attention is `training_mask`'s.

    Args:
        pool: what to draw from.
        size: B.
        config: gives T and N.
        generator: of all randomness; its device is the batch's.
        share: bounds of the share of a noised block that is masked at first.
        following: whether the masked blocks after a noised one have a loss too.
    """
    prompt, prompt_len, solution = draw_problems(pool, size, generator)
    noise = draw_noise(size, config, generator, share)
    coin = torch.rand(2, size, generator=generator, device=generator.device) < 0.5
    mask = training_mask(prompt_len, noise.windows, coin[0], coin[1], config)
    hidden = torch.cat([noise.first | noise.after, noise.second | noise.after])
    masked = hidden if following else torch.cat([noise.first, noise.second])
    twice = solution.repeat(2, 1)
    batch = layout(
        prompt.repeat(2, 1),
        prompt_len.repeat(2),
        twice,
        twice.masked_fill(hidden, config.mask_id),
        mask.repeat(2, 1, 1),
        masked.float(),
        config,
    )
    return Pair(batch, masked)


def generated_logits(
    model: TinyDLLM, tokens: Tensor, positions: Tensor, attn_mask: Tensor, columns: int
) -> Tensor:
    """Logits [B, columns, V] of the last columns."""
    return model.head(model.hidden(tokens, positions, attn_mask)[:, -columns:])


@torch.no_grad()
def column_statistics(logits: Tensor, labels: Tensor, masked: Tensor) -> dict[str, float]:
    """Of the masked columns: mean cross entropy, the share predicted right, and the mean entropy
    of these, at temperature 1; in nats."""
    log_p = logits[masked].float().log_softmax(-1)
    chosen = labels[masked]
    right = log_p.argmax(-1) == chosen
    spread = -(log_p.exp() * log_p).sum(-1)
    return {
        "ce": float(-log_p.gather(1, chosen[:, None]).mean()),
        "right": float(right.float().mean()),
        "entropy": float(spread[right].mean()) if bool(right.any()) else math.nan,
    }


class Distiller(Trainer):
    """The trainer's model, averaged model and optimizers under the distillation loss."""

    def __init__(self, args: argparse.Namespace, config: TinyConfig) -> None:
        super().__init__(args, config)
        self.logits = torch.compile(generated_logits) if args.compile else generated_logits
        self.statistics: dict[str, float] = {}

    def progress(self) -> float:
        """In [0, 1]: by steps, or by time where that runs out first."""
        by_time = self.seconds / self.args.time_limit_s if self.args.time_limit_s else 0.0
        return min(1.0, max(self.step / self.args.steps, by_time))

    def learning_rate(self) -> float:
        """Linear warm-up by steps, then a cosine to zero by progress."""
        warm = min(1.0, (self.step + 1) / max(1, self.args.warmup))
        return self.args.lr * warm * 0.5 * (1 + math.cos(math.pi * self.progress()))

    def distill_step(self, pool: Pool, *, log: bool = False) -> Tensor:
        """One step; the loss, on the device. `log` fills `statistics`."""
        args = self.args
        generator = torch.Generator(self.device).manual_seed(args.seed * 2**32 + self.step)
        batch, masked = make_pair(
            pool, args.batch, self.config, generator,
            share=tuple(args.share), following=args.following,
        )  # fmt: skip
        columns = batch.target.shape[1]
        with self.autocast():
            logits = self.logits(
                self.model, batch.tokens, batch.positions, batch.attn_mask, columns
            )
        loss = sum(
            lk.certainty_forcing_loss(
                logits[half],
                batch.target[half],
                masked[half],
                temperature=args.temperature,
                beta=args.beta,
            )
            for half in (slice(None, args.batch), slice(args.batch, None))
        )
        assert isinstance(loss, Tensor)
        if log:
            self.statistics = column_statistics(logits, batch.target, masked)
        self.update(loss, self.learning_rate())
        return loss.detach()


def curve_methods(config: TinyConfig, args: argparse.Namespace) -> list[Method]:
    methods = [entropy(config, args.curve_tau_entropy)]
    if args.curve_branches > 1:
        methods.append(lopa(config, args.curve_branches, args.curve_tau_conf))
    return methods


def measure(model: TinyDLLM, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """TPF, text TPF and accuracy of each method on training problems."""
    chosen = problems("train", args.curve_problems, CURVE_SEED)
    precision = default_precision(args.device)
    found = {}
    for method in curve_methods(model.config, args):
        decoder = decoder_of(args.decoder, model, method.config, precision)
        outcome = run(decoder, chosen, args.curve_batch)
        found[method.name] = {
            "accuracy": outcome.accuracy,
            "tpf": outcome.tpf,
            "text_tpf": outcome.text_tpf,
        }
    return found


def get_labels(args: argparse.Namespace, console: Console) -> Labels:
    """The labels of `args.labels_file` or of an earlier run in `args.out`, else new ones.

    Raises:
        RuntimeError: the teacher solved nothing.
    """
    path = Path(args.labels_file or Path(args.out) / "labels.safetensors")
    if path.exists():
        labels = load_labels(path)
        console.print(f"{len(labels.pool)} labels from {path}")
        return labels
    began = time.monotonic()
    teacher = Teacher(
        args.init, args.device, args.label_tau, args.label_batch, args.seed, args.decoder
    )
    labels = make_labels(
        teacher,
        args.labels,
        workers=args.workers,
        time_limit_s=args.label_time_limit_s,
        report=lambda decoded, kept: console.print(
            f"{time.monotonic() - began:6.1f} s  {decoded} decoded, {kept} kept"
        ),
    )
    if not len(labels.pool):
        raise RuntimeError(f"--init: the teacher solved none of {labels.decoded} problems")
    save_labels(labels, path)
    return labels


def distill(args: argparse.Namespace, console: Console) -> None:
    """Labels, training with its curve, weights."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    labels = get_labels(args, console)
    saved_config = json.loads((weights_of(args.init) / "config.json").read_text())
    distiller = Distiller(args, TinyConfig(**saved_config["model"]))
    if args.resume:
        distiller.resume(out / CHECKPOINT)
        console.print(f"resumed at step {distiller.step}")
    pool = labels.pool.to(distiller.device)
    last_saved, first = time.monotonic(), True
    with (out / "log.jsonl").open("a" if args.resume else "w") as log:

        def write(row: dict) -> None:
            row = {"step": distiller.step, "seconds": round(distiller.seconds, 1), **row}
            log.write(json.dumps(row) + "\n")
            log.flush()
            console.print(row)

        if distiller.step == 0:
            write(
                {"problems": args.curve_problems, "measured": measure(distiller.averaged(), args)}
            )
        while distiller.progress() < 1:
            began = time.monotonic()
            log_this = distiller.step % args.log_every == 0
            loss = distiller.distill_step(pool, log=log_this)
            if log_this:
                write({"loss": loss.item(), **distiller.statistics})
            # The limit is for steps alone: neither for measuring and saving nor for compiling,
            # which the first step does.
            if not first or not args.compile:
                distiller.seconds += time.monotonic() - began
            first = False
            done = distiller.progress() >= 1
            if distiller.step % args.measure_every == 0 or done:
                write(
                    {
                        "problems": args.curve_problems,
                        "measured": measure(distiller.averaged(), args),
                    }
                )
            if time.monotonic() - last_saved > args.checkpoint_every_s or done:
                distiller.save(out / CHECKPOINT)
                save_sharded(distiller.averaged(), out / "weights")
                last_saved = time.monotonic()
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    draw_curve(rows, out / "curve.png")
    (out / "distill.md").write_text(report(args, labels, rows))
    console.print(f"step {distiller.step}, {distiller.seconds:.0f} s; wrote {out / 'weights'}")


def draw_curve(rows: list[dict], path: Path) -> None:
    """Plots cross entropy and entropy, and accuracy and TPF on training problems, over steps."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    steps = [row for row in rows if "ce" in row]
    measured = [row for row in rows if "measured" in row]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    at = [row["step"] for row in steps]
    left.plot(at, [row["ce"] for row in steps], label="cross entropy of masked columns")
    left.plot(at, [row["entropy"] for row in steps], label="entropy of those predicted right")
    left.set(ylabel="nats", yscale="log", title="Training batches")
    names = list(measured[0]["measured"]) if measured else []
    for name in names:
        at = [row["step"] for row in measured]
        of = [row["measured"][name] for row in measured]
        middle.plot(at, [entry["tpf"] for entry in of], marker=".", label=name)
        right.plot(at, [100 * entry["accuracy"] for entry in of], marker=".", label=name)
    middle.set(ylabel="TPF", title="Tokens a forward pass, training problems")
    right.set(ylabel="%", title="Accuracy, training problems")
    for axes in (left, middle, right):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def report(args: argparse.Namespace, labels: Labels, rows: list[dict]) -> str:
    """What the run did, in markdown, for the model's card."""
    steps = [row for row in rows if "ce" in row]
    measured = [row for row in rows if "measured" in row]
    tail = steps[-max(1, len(steps) // 20) :]

    def mean(some: list[dict], key: str) -> float:
        values = [row[key] for row in some if not math.isnan(row[key])]
        return sum(values) / len(values) if values else math.nan

    low, high = args.share
    share = f"{low:.0%}" if low == high else f"{low:.0%} to {high:.0%}"
    lines = [
        f"Labels: {labels.decoded:,} training problems decoded by confidence {args.label_tau} "
        f"({labels.forwards / labels.decoded:.1f} passes each), {len(labels.pool):,} "
        f"({len(labels.pool) / labels.decoded:.1%}) solved and kept.",
        "",
        f"Training: {measured[-1]['step']:,} steps of {args.batch} problems under two "
        f"complementary masks, {measured[-1]['seconds']:.0f} s; {share} of the noised block "
        f"masked, temperature {args.temperature}, beta {args.beta}, "
        f"{args.optimizer} with a peak learning rate of {args.lr}, average of decay {args.ema}"
        + (", the masked blocks after the noised one in the loss." if args.following else "."),
        "",
        "| | first step | last twentieth |",
        "|---|---|---|",
    ]
    for key, name, form in (
        ("ce", "cross entropy of a masked column, nats", ".3f"),
        ("right", "share predicted right", ".1%"),
        ("entropy", "entropy where right, nats", ".4f"),
    ):
        lines.append(f"| {name} | {steps[0][key]:{form}} | {mean(tail, key):{form}} |")
    lines += [
        "",
        f"On {measured[0]['problems']} training problems, teacher and student:",
        "",
        "| decoding | TPF | text TPF | accuracy |",
        "|---|---|---|---|",
    ]
    settings = {"entropy": f"entropy {args.curve_tau_entropy}"}
    for name, before in measured[0]["measured"].items():
        after = measured[-1]["measured"][name]
        title = settings.get(name, f"{name}, tau_conf {args.curve_tau_conf}")
        lines.append(
            f"| {title} | {before['tpf']:.2f} to {after['tpf']:.2f} "
            f"| {before['text_tpf']:.2f} to {after['text_tpf']:.2f} "
            f"| {before['accuracy']:.1%} to {after['accuracy']:.1%} |"
        )
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m examples.tiny_dllm.distill", description=__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("--out", default="runs/distilled", help="folder of all that is written")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--init", default="base", help="teacher and start: a name or a folder")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--decoder", choices=tuple(DECODERS), default="operators",
                   help="of labels and curve; see table.py")  # fmt: skip
    p.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out")
    labels = p.add_argument_group("labels")
    labels.add_argument("--labels", type=int, default=100_000, help="problems to decode")
    labels.add_argument("--labels-file", help="labels of an earlier run, or where to put them")
    labels.add_argument("--label-tau", type=float, default=0.99, help="the teacher's tau_conf")
    labels.add_argument("--label-batch", type=int, default=2048)
    labels.add_argument("--label-time-limit-s", type=float, default=math.inf)
    labels.add_argument("--workers", type=int, default=1, help="processes that decode")
    train = p.add_argument_group("training")
    train.add_argument("--steps", type=int, default=3000)
    train.add_argument("--time-limit-s", type=float, help="of training; the schedule follows it")
    train.add_argument("--batch", type=int, default=128, help="problems a step")
    train.add_argument("--optimizer", choices=("adamw", "muon"), default="muon")
    train.add_argument("--lr", type=float, default=1e-3)
    train.add_argument("--warmup", type=int, default=50)
    train.add_argument("--weight-decay", type=float, default=0.01)
    train.add_argument("--ema", type=float, default=0.99, help="decay of the averaged weights")
    train.add_argument("--temperature", type=float, default=0.5)
    train.add_argument("--beta", type=float, default=2.0)
    train.add_argument("--share", type=float, nargs=2, default=[0.5, 0.5], metavar=("LOW", "HIGH"),
                       help="share of the noised block that the first mask takes")  # fmt: skip
    train.add_argument("--following", action="store_true",
                       help="a loss on the masked blocks after the noised one too")  # fmt: skip
    train.add_argument("--compile", action="store_true", help="torch.compile the model")
    train.add_argument("--checkpoint-every-s", type=float, default=60.0)
    curve = p.add_argument_group("curve")
    curve.add_argument("--log-every", type=int, default=20)
    curve.add_argument("--measure-every", type=int, default=200)
    curve.add_argument("--curve-problems", type=int, default=256)
    curve.add_argument("--curve-batch", type=int, default=256)
    curve.add_argument("--curve-tau-entropy", type=float, default=0.1)
    curve.add_argument("--curve-branches", type=int, default=8, help="1: no lookahead row")
    curve.add_argument("--curve-tau-conf", type=float, default=0.98)
    return p


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    # TF32 products where autocast does not rule, as the model was trained.
    torch.backends.cuda.matmul.allow_tf32 = True
    distill(args, Console(width=None if Console().is_terminal else 120))


if __name__ == "__main__":
    main()
