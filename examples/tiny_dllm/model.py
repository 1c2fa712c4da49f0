"""The tiny diffusion language model: a masked-diffusion transformer over blocks.

The architecture is that of the 7-8B models LoPA decodes, at a fraction of their size: RMSNorm
(arXiv 1910.07467), rotary positions (arXiv 2104.09864) in the rotate-half form of GPT-NeoX,
grouped-query attention (arXiv 2305.13245) and SwiGLU (arXiv 2002.05202), no biases. Row c of the
logits predicts column c (`shift=False`).

Its attention is that of D2F (arXiv 2508.09192): the prompt is one block that sees itself alone,
finished blocks see the prompt and the blocks up to themselves, and the window of open blocks sees
all of that and itself, either whole (`"full"`) or up to each column's own block
(`"block_causal"`).
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from examples.tiny_dllm.tokenizer import CharTokenizer

WEIGHTS = Path(__file__).with_name("weights")

#: the models shipped here
NAMED = {"base": WEIGHTS, "distilled": Path(__file__).with_name("weights_distilled")}


def weights_of(model: str | Path | None) -> Path:
    """The directory of a model given by name, by path or (None: the base model) not at all."""
    return NAMED["base"] if model is None else NAMED.get(str(model), Path(model))


@dataclass(frozen=True)
class TinyConfig:
    """Shape of the model, and of what it generates."""

    vocab_size: int = CharTokenizer.vocab_size
    dim: int = 384
    layers: int = 7
    q_heads: int = 6
    kv_heads: int = 2
    head_dim: int = 64
    mlp_dim: int = 1024
    rope_theta: float = 10_000.0
    max_pos: int = 512
    norm_eps: float = 1e-6
    block_size: int = 32
    max_new_tokens: int = 192
    mask_id: int = CharTokenizer.mask_id
    eos_id: int = CharTokenizer.eos_id
    pad_id: int = CharTokenizer.pad_id

    def __post_init__(self) -> None:
        if self.q_heads % self.kv_heads:
            raise ValueError(
                f"q_heads: expected a multiple of kv_heads ({self.kv_heads}), got {self.q_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim: expected an even number, got {self.head_dim}")
        if self.max_new_tokens % self.block_size:
            raise ValueError(
                f"max_new_tokens: expected a multiple of block_size ({self.block_size}), "
                f"got {self.max_new_tokens}"
            )

    @property
    def max_blocks(self) -> int:
        """Blocks of a full generation."""
        return self.max_new_tokens // self.block_size

    @property
    def qkv_dim(self) -> int:
        """Rows of the packed projection: query heads, then key heads, then value heads."""
        return (self.q_heads + 2 * self.kv_heads) * self.head_dim


def rope_table(config: TinyConfig) -> Tensor:
    """fp32 [max_pos, head_dim]: row p holds the head_dim / 2 cosines of position p, then its
    sines."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    angle = torch.outer(
        torch.arange(config.max_pos, dtype=torch.float64), config.rope_theta**-exponent
    )
    return torch.cat([angle.cos(), angle.sin()], dim=-1).float()


def apply_rope(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotates x[..., heads, head_dim] by cos_sin[..., head_dim], the table's rows at the
    positions; element i pairs with element i + head_dim / 2. Arithmetic in fp32, or wider."""
    cos, sin = cos_sin.unsqueeze(-2).chunk(2, dim=-1)
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up packed in this order."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """One layer.

    A decoder with its own attention calls `qkv(attn_norm(x))`, whose last dimension packs
    [q_heads | kv_heads | kv_heads] x head_dim, rotates and caches, attends, and finishes with
    `x = x + o(attended)` and `x = x + mlp(mlp_norm(x))`.
    """

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        self.attn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.qkv = nn.Linear(config.dim, config.qkv_dim, bias=False)
        self.o = nn.Linear(config.q_heads * config.head_dim, config.dim, bias=False)
        self.mlp_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.mlp = SwiGLU(config.dim, config.mlp_dim)

    def split_qkv(self, packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of packed[..., qkv_dim] as q[..., Hq, D], k[..., Hk, D], v[..., Hk, D]."""
        c = self.config
        heads = packed.unflatten(-1, (c.q_heads + 2 * c.kv_heads, c.head_dim))
        q, k, v = heads.split([c.q_heads, c.kv_heads, c.kv_heads], dim=-2)
        return q, k, v

    def forward(self, x: Tensor, cos_sin: Tensor, attn_mask: Tensor | None) -> Tensor:
        """x[B,S,dim] with cos_sin fp32 [B,S,head_dim] and attn_mask bool [B,1,S,S] or None."""
        q, k, v = self.split_qkv(self.qkv(self.attn_norm(x)))
        # Keys and values are repeated here because PyTorch's fused kernels that take a mask do
        # not take enable_gqa.
        group = self.config.q_heads // self.config.kv_heads
        attended = F.scaled_dot_product_attention(
            apply_rope(q, cos_sin).transpose(1, 2),
            apply_rope(k, cos_sin).repeat_interleave(group, dim=2).transpose(1, 2),
            v.repeat_interleave(group, dim=2).transpose(1, 2),
            attn_mask=attn_mask,
        )
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class TinyDLLM(nn.Module):
    """The model; parts are public so that a decoder can run them one by one."""

    cos_sin: Tensor

    def __init__(self, config: TinyConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or TinyConfig()
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.register_buffer("cos_sin", rope_table(config), persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        # Residual projections start smaller by sqrt(2 layers), as in GPT-2, so that the stream's
        # variance does not grow with depth.
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                deep = name.endswith(("o.weight", "down.weight"))
                std = 0.02 if name == "embed.weight" else self.config.dim**-0.5
                if deep:
                    std /= (2 * self.config.layers) ** 0.5
                nn.init.normal_(weight, std=std)

    def hidden(
        self, tokens: Tensor, positions: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        """The normalised hidden states [B,S,dim] that `head` turns into logits; as `forward`."""
        batch, seq = tokens.shape
        if positions is None:
            positions = torch.arange(seq, device=tokens.device).expand(batch, seq)
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.unsqueeze(1)
        cos_sin = self.cos_sin[positions]
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, cos_sin, attn_mask)
        return self.norm(x)

    def forward(
        self, tokens: Tensor, positions: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        """Logits of whole sequences, without a cache.

        Args:
            tokens: int64 [B,S].
            positions: int64 [B,S], each in [0, max_pos); by default 0, 1, 2, ...
            attn_mask: bool [B,S,S] or [B,1,S,S], True where row may see column; None lets all
                see all.

        Returns:
            [B,S,vocab_size]; row c predicts column c.
        """
        return self.head(self.hidden(tokens, positions, attn_mask))

    @classmethod
    def load(
        cls,
        path: str | Path | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> Self:
        """The model saved in a directory, in evaluation mode.

        Args:
            path: a directory written by `save_sharded`, or the name of a model shipped here,
                "base" or "distilled"; None for "base".
            dtype: of the parameters. The rotary table stays fp32.
            device: where they go.

        Raises:
            FileNotFoundError: the directory holds no model.
            RuntimeError: weights are missing, surplus, or of another shape than config.json says.
        """
        directory = weights_of(path)
        saved = json.loads((directory / "config.json").read_text())
        model = cls(TinyConfig(**saved["model"]))
        index = json.loads((directory / "model.safetensors.index.json").read_text())
        state: dict[str, Tensor] = {}
        for shard in sorted(set(index["weight_map"].values())):
            state.update(load_file(directory / shard))
        model.load_state_dict(state)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        return model.to(device).eval()


def save_sharded(
    model: TinyDLLM,
    path: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    max_bytes: int = 14_000_000,
) -> list[Path]:
    """Writes the model as safetensors shards of at most `max_bytes` of weights each, with their
    index and config.json (the shape and the vocabulary).

    Returns:
        The files written, config.json and the index last.

    Raises:
        ValueError: one weight alone is larger than `max_bytes`.
    """
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    used = 0
    for name, weight in model.state_dict().items():
        saved = weight.detach().to("cpu", dtype).contiguous()
        size = saved.numel() * saved.element_size()
        if size > max_bytes:
            raise ValueError(f"max_bytes: {name} takes {size} bytes, more than {max_bytes}")
        if used + size > max_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = saved
        used += size
    written = []
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = directory / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, file)
        written.append(file)
        weight_map |= dict.fromkeys(shard, file.name)
    config = directory / "config.json"
    record = {"model": asdict(model.config), "vocabulary": CharTokenizer().vocabulary()}
    config.write_text(json.dumps(record, indent=1) + "\n")
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}, indent=1) + "\n")
    return [*written, config, index]
