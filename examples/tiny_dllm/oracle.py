"""Decoding in plain PyTorch, without cache, operators or speed: what training is judged by."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from examples.tiny_dllm.model import TinyConfig, TinyDLLM
from examples.tiny_dllm.problems import Problem, extract_answer
from examples.tiny_dllm.tokenizer import CharTokenizer


@dataclass(frozen=True)
class Decoded:
    """What a decoder made of a batch; all tensors on the CPU."""

    tokens: Tensor
    """int64 [B, max_new_tokens]; blocks never opened hold masks."""
    forwards: Tensor
    """int64 [B]: forward passes each sequence took part in before it was done."""


@dataclass(frozen=True)
class Score:
    """Accuracy in [0, 1], and tokens a forward pass: of the text with its EOS, and of all columns
    filled, the EOS padding of the last blocks included."""

    accuracy: float
    text_per_forward: float
    filled_per_forward: float


def encode_prompts(prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token ids [B,P], padded at the right to the longest, and lengths [B]; both int64."""
    tokenizer = CharTokenizer()
    ids = [torch.tensor(tokenizer.encode(prompt)) for prompt in prompts]
    padded = torch.nn.utils.rnn.pad_sequence(ids, True, tokenizer.pad_id)
    return padded, torch.tensor([len(row) for row in ids])


def decoding_mask(
    prompt_len: Tensor, width: int, opened: Tensor, first: Tensor, full: bool, config: TinyConfig
) -> Tensor:
    """bool [B, width + G, width + G] over [prompt padded to `width` | G generated columns], G for
    the most opened blocks; blocks `first`..`opened` - 1 of a sequence are its window."""
    device = prompt_len.device
    blocks = int(opened.max())
    block = torch.arange(blocks, device=device).repeat_interleave(config.block_size)
    seq = width + len(block)
    mask = torch.zeros(len(prompt_len), seq, seq, dtype=torch.bool, device=device)
    mask[:, :, :width] = (torch.arange(width, device=device) < prompt_len[:, None]).unsqueeze(1)
    see = (block[None, :] <= block[:, None]).expand(len(prompt_len), -1, -1)
    if full:
        inside = (block >= first[:, None]) & (block < opened[:, None])
        see = see | (inside.unsqueeze(-1) & inside.unsqueeze(-2))
    mask[:, width:, width:] = see
    mask.diagonal(dim1=1, dim2=2).fill_(True)
    return mask


@torch.inference_mode()
def decode(
    model: TinyDLLM,
    prompts: Sequence[str],
    *,
    tau_conf: float | None,
    tau_add: float = 0.1,
    tau_act: float = 0.95,
    full: bool = True,
) -> Decoded:
    """Decodes a batch, every pass over the whole sequence.

    Args:
        model: the model, on any device.
        prompts: the problems.
        tau_conf: a column is filled when its probability is above this, and the best one of every
            activated block when none is (D2F, arXiv 2508.09192, section 3.4). None decodes
            vanilla: one block at a time, its most probable column a pass.
        tau_add: share of the last block to fill before the next is opened.
        tau_act: share of a block to fill before the next block is activated.
        full: whether the window sees itself whole, or up to each column's block.
    """
    config = model.config
    device = next(model.parameters()).device
    size = config.block_size
    prompt, prompt_len = (t.to(device) for t in encode_prompts(prompts))
    batch, width = prompt.shape
    tokens = torch.full((batch, config.max_new_tokens), config.mask_id, device=device)
    opened = torch.ones(batch, dtype=torch.long, device=device)
    forwards = torch.zeros_like(opened)
    done = torch.zeros(batch, dtype=torch.bool, device=device)
    index = torch.arange(config.max_blocks, device=device)
    if tau_conf is None:
        tau_conf, tau_add, tau_act = 2.0, 1.0, 1.0
    while not bool(done.all()):
        columns = int(opened.max()) * size
        filled = (tokens != config.mask_id).view(batch, -1, size)
        first = filled.all(-1).long().cumprod(1).sum(1)
        mask = decoding_mask(prompt_len, width, opened, first, full, config)
        positions = torch.cat(
            [
                torch.arange(width, device=device).expand(batch, -1),
                prompt_len[:, None] + torch.arange(columns, device=device),
            ],
            dim=1,
        )
        hidden = model.hidden(torch.cat([prompt, tokens[:, :columns]], 1), positions, mask)
        probability, token = model.head(hidden[:, width:]).float().softmax(-1).max(-1)
        opening = (tokens[:, :columns] == config.mask_id).view(batch, -1, size)
        opening &= (index[: columns // size] < opened[:, None]).unsqueeze(-1)
        opening &= ~done[:, None, None]
        confidence = probability.view(opening.shape).masked_fill(~opening, -1.0)
        accept = confidence > tau_conf
        share = filled.float().mean(-1)[:, : columns // size]
        before = torch.cat([torch.ones_like(share[:, :1]), share[:, :-1]], dim=1)
        forced = (before >= tau_act) & ~accept.any(-1) & opening.any(-1)
        best = torch.zeros_like(accept).scatter_(-1, confidence.argmax(-1, keepdim=True), True)
        accept = (accept | (best & forced.unsqueeze(-1))).flatten(1)
        tokens[:, :columns] = torch.where(accept, token, tokens[:, :columns])
        forwards += ~done
        share = (tokens != config.mask_id).view(batch, -1, size).float().mean(-1)
        enough = share.gather(1, opened[:, None] - 1).squeeze(1) >= tau_add
        more = enough & (opened < config.max_blocks) & ~(tokens == config.eos_id).any(1) & ~done
        opened += more
        done |= ~more & ((share == 1.0) | (index >= opened[:, None])).all(1)
    return Decoded(tokens.cpu(), forwards.cpu())


def score(decoded: Decoded, problems: Sequence[Problem], config: TinyConfig) -> Score:
    """Exact-answer accuracy and tokens a pass of a decoded batch."""
    tokenizer = CharTokenizer()
    texts = [tokenizer.decode(row) for row in decoded.tokens.tolist()]
    right = [extract_answer(text) == p.answer for text, p in zip(texts, problems, strict=True)]
    total = int(decoded.forwards.sum())
    written = sum(min(len(text) + 1, config.max_new_tokens) for text in texts)
    filled = int((decoded.tokens != config.mask_id).sum())
    return Score(sum(right) / len(right), written / total, filled / total)
