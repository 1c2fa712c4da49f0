"""Dream and LLaDA over static buffers: packed weights, one code for prefill and rounds.

The residual stream is carried as a pair: `residual`, and `delta`, the output of the last product,
which the next norm adds on its way. Nothing here reads a value on the host, so that a CUDA graph
captures it and torch.compile traces it whole.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lopa_kernels as lk
from examples.dream.config import ModelConfig
from examples.dream.fused import add_rms_norm, swiglu


@dataclass(frozen=True)
class Cache:
    """Static keys and values: the committed prefix, and the branches' windows."""

    k: Tensor
    """[L, B, S, Hk, D]"""
    v: Tensor
    k_window: Tensor
    """[L, B, K, W, Hk, D]"""
    v_window: Tensor

    @classmethod
    def empty(
        cls, model: DiffusionLM, batch: int, branches: int, window: int, capacity: int
    ) -> Self:
        c = model.config

        def buffer(*shape: int) -> Tensor:
            return model.embed.new_zeros(c.layers, batch, *shape, c.kv_heads, c.head_dim)

        return cls(
            buffer(capacity), buffer(capacity), buffer(branches, window), buffer(branches, window)
        )

    def columns(self, count: int) -> Self:
        """The same cache with windows of their first `count` columns."""
        return replace(
            self,
            k_window=self.k_window[:, :, :, :count],
            v_window=self.v_window[:, :, :, :count],
        )


def rope_table(config: ModelConfig, positions: int, device: torch.device | str = "cpu") -> Tensor:
    """fp32 [positions, D]: D / 2 cosines, then D / 2 sines (RoPE, arXiv 2104.09864).

    The angles are formed in fp64: at theta 1e6 and long prompts fp32 loses their last digits.
    """
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    angle = torch.outer(torch.arange(positions, dtype=torch.float64), config.rope_theta**-exponent)
    return torch.cat([angle.cos(), angle.sin()], dim=-1).float().to(device)


def _weight(*shape: int, **options: Any) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, **options), requires_grad=False)


class Layer(nn.Module):
    """Weights of one layer; gate and up, and q, k and v, are packed in these orders."""

    qkv_bias: nn.Parameter | None

    def __init__(self, c: ModelConfig, **options: Any) -> None:
        super().__init__()
        self.attn_norm = _weight(c.hidden, **options)
        self.qkv = _weight(c.qkv_dim, c.hidden, **options)
        self.register_parameter("qkv_bias", _weight(c.qkv_dim, **options) if c.qkv_bias else None)
        self.o = _weight(c.hidden, c.heads * c.head_dim, **options)
        self.mlp_norm = _weight(c.hidden, **options)
        self.gate_up = _weight(2 * c.intermediate, c.hidden, **options)
        self.down = _weight(c.hidden, c.intermediate, **options)


class DiffusionLM(nn.Module):
    """Inference only. The weights are uninitialised: see `load` and `random_weights`.

    Args:
        config: the model's shape.
        device, dtype: of the weights and of the residual stream.

    Attributes:
        ranks, rank: of those that hold a share of every matrix each, see `tensor_parallel`.
    """

    ranks, rank = 1, 0

    def __init__(
        self,
        config: ModelConfig,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        self.config = config
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embed = _weight(config.vocab_size, config.hidden, **options)
        self.layers = nn.ModuleList(Layer(config, **options) for _ in range(config.layers))
        self.norm = _weight(config.hidden, **options)
        self.head = (
            self.embed if config.tied else _weight(config.vocab_size, config.hidden, **options)
        )

    def weights(self, number: int) -> Layer:
        """Of one layer."""
        return cast(Layer, self.layers[number])

    def summed(self, product: Tensor) -> Tensor:
        """The sum over the ranks of what each has of a product."""
        return product

    def gathered(self, logits: Tensor) -> Tensor:
        """All columns of the logits, of which each rank has its own."""
        return logits

    def layer(
        self,
        number: int,
        residual: Tensor,
        normed: Tensor,
        state: lk.LopaState,
        cache: Cache,
        cos_sin: Tensor,
        *,
        mask: str,
        block_size: int,
        direct: bool,
    ) -> tuple[Tensor, Tensor]:
        """One layer without its first norm.

        Args:
            number: which layer.
            residual, normed: [B * K * W, hidden], the stream and its `attn_norm`.
            state, cache, cos_sin, mask, block_size, direct: as for :meth:`hidden`.

        Returns:
            residual and delta, whose sum is the stream after the layer.
        """
        c, weights = self.config, self.weights(number)
        single_phase: dict[str, Any] = {}
        if direct:
            single_phase = {
                "direct": True,
                "k_cache": cache.k,
                "v_cache": cache.v,
                "commit_len": state.commit_len,
            }
        qkv = F.linear(normed, weights.qkv, weights.qkv_bias)
        q = lk.qkv_prewrite_(
            cache.k_window,
            cache.v_window,
            number,
            qkv.view(*state.tokens.shape, c.qkv_dim),
            cos_sin,
            state.cache_len,
            num_heads=c.heads,
            **single_phase,
        )
        attended = lk.branch_attention(
            q,
            cache.k[number],
            cache.v[number],
            cache.k_window[number],
            cache.v_window[number],
            state.cache_len,
            state.length,
            mask=mask,
            block_size=block_size,
            prompt_len=state.prompt_len,
        )
        assert isinstance(attended, Tensor)
        delta = self.summed(F.linear(attended.reshape(-1, c.heads * c.head_dim), weights.o))
        residual, normed = add_rms_norm(residual, delta, weights.mlp_norm, c.norm_eps)
        delta = F.linear(swiglu(F.linear(normed, weights.gate_up)), weights.down)
        return residual, self.summed(delta)

    def hidden(
        self,
        state: lk.LopaState,
        cache: Cache,
        cos_sin: Tensor,
        *,
        mask: str,
        block_size: int,
        direct: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """All layers over every column of the windows.

        Args:
            state: the round's state; `tokens` is [B, K, W].
            cache: its windows are written, and with `direct` its prefix.
            cos_sin: fp32 [positions, D], see :func:`rope_table`.
            mask: of :func:`lopa_kernels.branch_attention`.
            block_size: T.
            direct: the columns to commit go to the cache as well (prefill, one branch).

        Returns:
            residual and delta [B * K * W, hidden], whose sum is the last layer's output.
        """
        eps = self.config.norm_eps
        tokens, norm = state.tokens.flatten(), self.weights(0).attn_norm
        residual, normed = add_rms_norm(self.embed, None, norm, eps, tokens)
        options: dict[str, Any] = {"mask": mask, "block_size": block_size, "direct": direct}
        for number in range(self.config.layers):
            residual, delta = self.layer(number, residual, normed, state, cache, cos_sin, **options)
            if number + 1 < self.config.layers:
                norm = self.weights(number + 1).attn_norm
                residual, normed = add_rms_norm(residual, delta, norm, eps)
        return residual, delta

    def logits(self, residual: Tensor, delta: Tensor, index: Tensor | None = None) -> Tensor:
        """[R, V] of the rows `index` (int64 [R]) of the last layer's output; None: of all."""
        _, normed = add_rms_norm(residual, delta, self.norm, self.config.norm_eps, index)
        return self.gathered(F.linear(normed, self.head))


@torch.no_grad()
def random_weights(
    config: ModelConfig,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> DiffusionLM:
    """A model with random weights, drawn on the device: speed does not depend on the values.

    Products keep the scale of their input, norms are near 1 and biases small.
    """
    model = DiffusionLM(config, device, dtype)
    generator = torch.Generator(device=device).manual_seed(seed)
    for name, weight in model.named_parameters():
        weight.normal_(generator=generator)
        if name.endswith("norm"):
            weight.mul_(0.1).add_(1.0)
        elif weight.dim() == 1:
            weight.mul_(0.1)
        elif name != "embed":
            weight.mul_(weight.shape[1] ** -0.5)
    return model
