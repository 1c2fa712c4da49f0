"""Tensor parallelism for the models of this folder: a rank holds a share of every matrix.

Heads, the SwiGLU's width and the vocabulary are divided; the sum of the ranks' products follows the
attention's and the SwiGLU's output, and the ranks' logits are put together, so that all ranks of
a group see the same bits. With branches spread over ranks as well, `make_groups` of
`lopa_kernels.distributed` gives the groups of both.

Source: Megatron-LM, arXiv 1909.08053.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from examples.dream.config import ModelConfig
from examples.dream.model import DiffusionLM

# The name since torch 2.13 of what 2.11 calls all_gather_into_tensor.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def share_of(config: ModelConfig, ranks: int) -> ModelConfig:
    """The shape of one rank's matrices; `vocab_size` stays that of the whole.

    Raises:
        ValueError: something does not divide; the message names it.
    """
    for name in ("heads", "kv_heads", "intermediate", "vocab_size"):
        if getattr(config, name) % ranks:
            raise ValueError(
                f"{name}: expected a multiple of {ranks} ranks, got {getattr(config, name)}"
            )
    return replace(
        config,
        heads=config.heads // ranks,
        kv_heads=config.kv_heads // ranks,
        intermediate=config.intermediate // ranks,
    )


class ShardedLM(DiffusionLM):
    """This rank's share of a model; `config` is its shape, see :func:`share_of`.

    All ranks of the group call it together. Its collectives are captured in CUDA graphs.

    Args:
        model: the whole, the same on all ranks; it is copied from, and may be freed.
        group: the ranks.

    Raises:
        ValueError: the model does not divide.
    """

    @torch.no_grad()
    def __init__(self, model: DiffusionLM, group: dist.ProcessGroup) -> None:
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        whole = model.config
        super().__init__(share_of(whole, ranks), "meta", model.embed.dtype)
        self.ranks, self.rank, self._group = ranks, rank, group

        def part(weight: Tensor, dim: int = 0) -> Tensor:
            return weight.chunk(ranks, dim)[rank].clone(memory_format=torch.contiguous_format)

        def packed(weight: Tensor, rows: list[int]) -> Tensor:
            return torch.cat([part(piece) for piece in weight.split(rows)])

        heads = [whole.heads * whole.head_dim, *2 * [whole.kv_heads * whole.head_dim]]
        own: dict[str, Tensor] = {
            "embed": model.embed.data,
            "norm": model.norm.data,
            "head": part(model.head),
        }
        for number in range(whole.layers):
            layer, name = model.weights(number), f"layers.{number}."
            own |= {
                name + "attn_norm": layer.attn_norm.data,
                name + "qkv": packed(layer.qkv, heads),
                name + "o": part(layer.o, 1),
                name + "mlp_norm": layer.mlp_norm.data,
                name + "gate_up": packed(layer.gate_up, 2 * [whole.intermediate]),
                name + "down": part(layer.down, 1),
            }
            if layer.qkv_bias is not None:
                own[name + "qkv_bias"] = packed(layer.qkv_bias, heads)
        # Of a tied model this share is its own, as the embedding stays whole.
        self.head = torch.nn.Parameter(own["head"], requires_grad=False)
        self.load_state_dict(own, assign=True)
        self.requires_grad_(False)

    def summed(self, product: Tensor) -> Tensor:
        dist.all_reduce(product, group=self._group)
        return product

    def gathered(self, logits: Tensor) -> Tensor:
        parts = logits.new_empty(self.ranks, *logits.shape)
        _all_gather(parts.flatten(0, 1), logits.contiguous(), group=self._group)
        return parts.transpose(0, 1).flatten(1)
