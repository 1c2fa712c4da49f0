"""Training data: a pool of encoded problems, and the noise that turns them into batches.

A batch holds each problem as [prompt | finished blocks | noisy blocks], so that one forward pass
trains every block of a solution. The generated blocks are cut into windows; a window's noisy
blocks see the prompt, the finished blocks before the window, and the window itself, which is what
they see while decoding (D2F, arXiv 2508.09192: later blocks are noisier).
"""

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from examples.tiny_dllm.model import TinyConfig
from examples.tiny_dllm.problems import MAX_PROMPT_CHARS, Split, problems
from examples.tiny_dllm.tokenizer import CHARACTERS, SPECIAL, CharTokenizer

CHUNK = 10_000


@dataclass(frozen=True)
class Pool:
    """Encoded problems: prompt uint8 [N, MAX_PROMPT_CHARS] padded at the right, prompt_len
    int64 [N], solution uint8 [N, max_new_tokens] ending in EOS throughout."""

    prompt: Tensor
    prompt_len: Tensor
    solution: Tensor

    def to(self, device: str | torch.device) -> "Pool":
        return Pool(self.prompt.to(device), self.prompt_len.to(device), self.solution.to(device))

    def __len__(self) -> int:
        return len(self.prompt)


def _byte_table() -> bytes:
    table = bytearray(256)
    table[CharTokenizer.eos_id] = CharTokenizer.eos_id
    for token, char in enumerate(CHARACTERS, len(SPECIAL)):
        table[ord(char)] = token
    return bytes(table)


def _encode_chunk(index: int, split: Split, seed: int, width: int) -> tuple[bytes, bytes]:
    made = problems(split, CHUNK, seed * 1_000_003 + index)
    pad, eos = bytes([CharTokenizer.pad_id]), bytes([CharTokenizer.eos_id])
    table = _byte_table()
    prompt = b"".join(p.prompt.encode("ascii").ljust(MAX_PROMPT_CHARS, pad) for p in made)
    solution = b"".join(p.solution.encode("ascii").ljust(width, eos) for p in made)
    return prompt.translate(table), solution.translate(table)


def build_pool(
    n: int, seed: int, *, split: Split = "train", width: int = 192, workers: int | None = None
) -> Pool:
    """At least `n` problems, made by `workers` processes (default: one a core) in chunks whose
    seeds follow from `seed`, so that the pool does not depend on the number of workers."""
    chunks = max(1, -(-n // CHUNK))
    make = partial(_encode_chunk, split=split, seed=seed, width=width)
    workers = min(chunks, workers or os.cpu_count() or 1)
    if workers == 1:
        parts = [make(index) for index in range(chunks)]
    else:
        with ProcessPoolExecutor(workers) as executor:
            parts = list(executor.map(make, range(chunks)))

    def join(which: int, columns: int) -> Tensor:
        flat = np.frombuffer(b"".join(part[which] for part in parts), dtype=np.uint8)
        return torch.from_numpy(flat.reshape(-1, columns).copy())

    prompt = join(0, MAX_PROMPT_CHARS)
    prompt_len = (prompt != CharTokenizer.pad_id).sum(1)
    return Pool(prompt, prompt_len, join(1, width))


class Batch(NamedTuple):
    """What a training step reads; S = MAX_PROMPT_CHARS + (N - 1) T + N T for N blocks of T."""

    tokens: Tensor
    """int64 [B,S]."""
    positions: Tensor
    """int64 [B,S], as in the sequence without the copy."""
    attn_mask: Tensor
    """bool [B,S,S], True where the row may see the column."""
    target: Tensor
    """int64 [B, N T], of the last N T columns."""
    weight: Tensor
    """fp32 [B, N T], 0 where nothing is to be predicted."""


class Windows(NamedTuple):
    """How one sample's N blocks are grouped, and how noisy each is; all [B,N]."""

    window: Tensor
    start: Tensor
    masked: Tensor
    """Masked columns of each block, 0..T."""


def draw_cuts(batch: int, config: TinyConfig, generator: Generator) -> tuple[Tensor, ...]:
    """Cuts each sample's N blocks into windows, from all blocks one by one to all in one window.

    Returns:
        cut, bool [B,N]: a window begins at this block; window, int64 [B,N]: the window's number;
        start, int64 [B,N]: its first block.
    """
    device, blocks = generator.device, config.max_blocks
    cut = torch.rand(batch, blocks, generator=generator, device=device)
    cut = cut < 1.25 * torch.rand(batch, 1, generator=generator, device=device)
    cut[:, 0] = True
    start = torch.where(cut, torch.arange(blocks, device=device), 0).cummax(1).values
    return cut, cut.cumsum(1), start


def draw_windows(batch: int, config: TinyConfig, generator: Generator) -> Windows:
    """Random windows over the blocks, from all blocks one by one to all in one window.

    Inside a window the noise rises from block to block. A window's last block is often all masks,
    as when it has just been opened, and its first sometimes complete, as in the pass that writes
    it to the cache. One sample in ten is not sorted: threshold decoding is only roughly monotone.
    """
    device = generator.device
    blocks = config.max_blocks

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    cut, window, start = draw_cuts(batch, config, generator)
    last = cut.roll(-1, dims=1)
    uniform = rand(batch, blocks)
    level = (window + uniform).sort(dim=1).values - window
    level = torch.where(rand(batch, 1) < 0.1, uniform, level)
    opened = torch.where(cut & last, 0.15, 0.35)
    level = torch.where(last & (rand(batch, blocks) < opened), 1.0, level)
    level = torch.where(cut & ~last & (rand(batch, blocks) < 0.15), 0.0, level)
    return Windows(window, start, (level * config.block_size).ceil().long())


def draw_masked(masked: Tensor, solution: Tensor, config: TinyConfig, gen: Generator) -> Tensor:
    """bool [B, N T]: which columns of `solution` are masked, `masked[B,N]` in each block.

    In part of the blocks the choice is uniform. In the others it prefers, in random proportion,
    late columns, neighbouring columns and digits (or the opposite of digits), since decoding by
    confidence fills the text in runs and not evenly.
    """
    batch, blocks = masked.shape
    size = config.block_size
    shape = (batch, blocks, size)
    device = gen.device

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=gen, device=device)

    even = rand(*shape)
    # A mean of 7 uniform numbers, spread out again to the variance of one.
    runs = (F.avg_pool1d(rand(batch, blocks, size + 6), 7, 1) - 0.5) * 7**0.5 + 0.5
    late = torch.arange(size, device=device) / size
    zero = len(SPECIAL) + CHARACTERS.index("0")
    digit = ((solution >= zero) & (solution < zero + 10)).view(shape).float()
    part = rand(4, batch, blocks, 1)
    shaped = part[0] * even + part[1] * runs + part[2] * late + (part[3] - 0.5) * digit
    score = torch.where(rand(batch, blocks, 1) < 0.4, even, shaped)
    rank = score.argsort(dim=-1).argsort(dim=-1)
    return (rank >= size - masked.unsqueeze(-1)).flatten(1)


def training_mask(
    prompt_len: Tensor, windows: Windows, full: Tensor, seen: Tensor, config: TinyConfig
) -> Tensor:
    """The attention mask of a `Batch`, bool [B,S,S].

    Args:
        prompt_len: int64 [B].
        windows: the samples' windows.
        full: bool [B]; whether window columns see the whole window, or up to their own block.
        seen: bool [B]; with `full`, whether finished blocks see the open blocks after them, as
            keys written to the cache from within such a window have.
        config: gives T and N.
    """
    device = prompt_len.device
    blocks, size = config.max_blocks, config.block_size
    index = torch.arange(blocks, device=device).repeat_interleave(size)
    clean, noisy = index[:-size], index
    prompt_columns = torch.arange(MAX_PROMPT_CHARS, device=device)
    # The last block is never a prefix, so the finished copy lacks it.
    p, c = MAX_PROMPT_CHARS, MAX_PROMPT_CHARS + len(clean)
    seq = c + len(noisy)
    batch = len(prompt_len)
    mask = torch.zeros(batch, seq, seq, dtype=torch.bool, device=device)
    mask[:, :, :p] = (prompt_columns < prompt_len[:, None]).unsqueeze(1)
    mask[:, p:c, p:c] = clean[None, :] <= clean[:, None]
    start, window = windows.start[:, noisy], windows.window[:, noisy]
    mask[:, c:, p:c] = clean < start.unsqueeze(-1)
    up_to = noisy[None, :] <= noisy[:, None]
    mask[:, c:, c:] = (window.unsqueeze(-1) == window.unsqueeze(-2)) & (full[:, None, None] | up_to)
    following = windows.window[:, clean + 1].unsqueeze(-1) == window.unsqueeze(-2)
    mask[:, p:c, c:] = following & (noisy > clean[:, None]) & (full & seen)[:, None, None]
    # Padding sees itself, since a row that sees nothing is NaN.
    mask.diagonal(dim1=1, dim2=2).fill_(True)
    return mask


def layout(
    prompt: Tensor,
    prompt_len: Tensor,
    solution: Tensor,
    noisy: Tensor,
    mask: Tensor,
    weight: Tensor,
    config: TinyConfig,
) -> Batch:
    """The `Batch` of prompts, solutions and noisy copies of these under a `training_mask`."""
    size, device = len(prompt), prompt.device
    kept = config.max_new_tokens - config.block_size
    generated = prompt_len[:, None] + torch.arange(config.max_new_tokens, device=device)
    columns = torch.arange(MAX_PROMPT_CHARS, device=device).expand(size, -1)
    return Batch(
        torch.cat([prompt, solution[:, :kept], noisy], dim=1),
        torch.cat([columns, generated[:, :kept], generated], dim=1),
        mask,
        solution,
        weight,
    )


def draw_problems(pool: Pool, size: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts, their lengths and solutions, int64, drawn from the pool."""
    pick = torch.randint(len(pool), (size,), generator=generator, device=generator.device)
    return pool.prompt[pick].long(), pool.prompt_len[pick], pool.solution[pick].long()


def make_batch(pool: Pool, size: int, config: TinyConfig, generator: Generator) -> Batch:
    """A batch of `size` problems drawn from the pool, all from `generator`, on its device."""
    prompt, prompt_len, solution = draw_problems(pool, size, generator)
    windows = draw_windows(size, config, generator)
    masked = draw_masked(windows.masked, solution, config, generator)
    noisy = solution.masked_fill(masked, config.mask_id)
    coin = torch.rand(2, size, generator=generator, device=generator.device) < 0.5
    # Each masked token counts 1 / (share masked in its block), the weight of the masked-diffusion
    # bound (arXiv 2406.07524), clipped at 4 so that nearly finished blocks do not dominate.
    share = (windows.masked / config.block_size).clamp_min(0.25)
    weight = masked / share.repeat_interleave(config.block_size, dim=1)
    mask = training_mask(prompt_len, windows, coin[0], coin[1], config)
    return layout(prompt, prompt_len, solution, noisy, mask, weight, config)
