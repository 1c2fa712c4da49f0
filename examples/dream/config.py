"""Shapes of Dream and LLaDA, and the constants of decoding that follow from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import lopa_kernels as lk


@dataclass(frozen=True)
class ModelConfig:
    """A diffusion language model of the LLaMA kind: RMSNorm, RoPE, grouped queries, SwiGLU.

    Attributes:
        family: "dream" (Qwen2: biases of q, k and v; row i - 1 predicts position i) or "llada"
            (LLaMA: no biases; row i predicts position i). It also says how tensors are named.
        vocab_size: V, rows of the embedding and of the LM head.
        hidden: width of the residual stream.
        layers: L.
        heads, kv_heads, head_dim: Hq, Hk, D.
        intermediate: width of the SwiGLU.
        rope_theta, norm_eps: constants of RoPE and RMSNorm.
        mask_id, eos_id: special tokens.
        tied: the LM head is the embedding.

    Raises:
        ValueError: a value out of range; the message names the field.

    Source: Dream 7B, arXiv 2508.15487; LLaDA, arXiv 2502.09992; the checkpoints' config.json.
    """

    family: Literal["dream", "llada"]
    vocab_size: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    rope_theta: float
    norm_eps: float
    mask_id: int
    eos_id: int
    tied: bool = False

    def __post_init__(self) -> None:
        if self.family not in ("dream", "llada"):
            raise ValueError(f"family: expected dream or llada, got {self.family!r}")
        for name in ("vocab_size", "hidden", "layers", "heads", "kv_heads", "intermediate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads: expected a multiple of kv_heads ({self.kv_heads}), got {self.heads}"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim: expected an even number, got {self.head_dim}")
        for name in ("mask_id", "eos_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ValueError(
                    f"{name}: expected an id below vocab_size ({self.vocab_size}), "
                    f"got {getattr(self, name)}"
                )

    @property
    def shift(self) -> bool:
        """Whether logits row i - 1 predicts position i."""
        return self.family == "dream"

    @property
    def qkv_bias(self) -> bool:
        return self.family == "dream"

    @property
    def qkv_dim(self) -> int:
        """Rows of the packed projection: query heads, then key heads, then value heads."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    def decoding(self, **settings: Any) -> lk.LopaConfig:
        """A LopaConfig with this model's tokens and shift."""
        tokens = {"mask_id": self.mask_id, "eos_id": self.eos_id, "shift": self.shift}
        return lk.LopaConfig(**{**tokens, **settings})

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> Self:
        """From the contents of a published `config.json`.

        Raises:
            ValueError: another architecture, or an option of it that is not implemented here.
        """
        kind = str(values.get("model_type")).lower()
        if kind == "dream":
            return cls(**_dream(values))
        if kind == "llada":
            return cls(**_llada(values))
        raise ValueError(f"model_type: expected Dream or llada, got {values.get('model_type')!r}")

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """From `config.json`, or from the folder that holds it."""
        path = Path(path)
        if path.suffix != ".json":
            path = path / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"no model configuration: expected the file {path}")
        return cls.from_hf(json.loads(path.read_text()))


def _take(values: Mapping[str, Any], name: str) -> Any:
    if values.get(name) is None:
        raise ValueError(f"{name}: missing in the model's configuration")
    return values[name]


def _refuse(values: Mapping[str, Any], supported: Mapping[str, Any]) -> None:
    for name, value in supported.items():
        if values.get(name, value) != value:
            raise ValueError(f"{name}: only {value!r} is implemented, got {values[name]!r}")


def _dream(values: Mapping[str, Any]) -> dict[str, Any]:
    _refuse(values, {"hidden_act": "silu", "rope_scaling": None, "use_sliding_window": False})
    hidden, heads = _take(values, "hidden_size"), _take(values, "num_attention_heads")
    return {
        "family": "dream",
        "vocab_size": _take(values, "vocab_size"),
        "hidden": hidden,
        "layers": _take(values, "num_hidden_layers"),
        "heads": heads,
        "kv_heads": _take(values, "num_key_value_heads"),
        "head_dim": values.get("head_dim") or hidden // heads,
        "intermediate": _take(values, "intermediate_size"),
        "rope_theta": float(_take(values, "rope_theta")),
        "norm_eps": float(_take(values, "rms_norm_eps")),
        "mask_id": _take(values, "mask_token_id"),
        "eos_id": values.get("eos_token_id") or _take(values, "pad_token_id"),
        "tied": bool(values.get("tie_word_embeddings", False)),
    }


def _llada(values: Mapping[str, Any]) -> dict[str, Any]:
    supported = {
        "activation_type": "silu",
        "block_type": "llama",
        "layer_norm_type": "rms",
        "rope": True,
        "alibi": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "attention_layer_norm": False,
        "input_emb_norm": False,
        "scale_logits": False,
    }
    _refuse(values, supported)
    hidden, heads = _take(values, "d_model"), _take(values, "n_heads")
    return {
        "family": "llada",
        "vocab_size": values.get("embedding_size") or _take(values, "vocab_size"),
        "hidden": hidden,
        "layers": _take(values, "n_layers"),
        "heads": heads,
        "kv_heads": values.get("n_kv_heads") or heads,
        "head_dim": hidden // heads,
        "intermediate": _take(values, "mlp_hidden_size"),
        "rope_theta": float(_take(values, "rope_theta")),
        "norm_eps": float(_take(values, "rms_norm_eps")),
        "mask_id": _take(values, "mask_token_id"),
        "eos_id": _take(values, "eos_token_id"),
        "tied": bool(values.get("weight_tying", False)),
    }


def dream_7b() -> ModelConfig:
    """Dream-v0-7B, Base and Instruct."""
    return ModelConfig(
        family="dream",
        vocab_size=152064,
        hidden=3584,
        layers=28,
        heads=28,
        kv_heads=4,
        head_dim=128,
        intermediate=18944,
        rope_theta=1e6,
        norm_eps=1e-6,
        mask_id=151666,
        eos_id=151643,
    )


def llada_8b() -> ModelConfig:
    """LLaDA-8B, Base and Instruct."""
    return ModelConfig(
        family="llada",
        vocab_size=126464,
        hidden=4096,
        layers=32,
        heads=32,
        kv_heads=32,
        head_dim=128,
        intermediate=12288,
        rope_theta=5e5,
        norm_eps=1e-5,
        mask_id=126336,
        eos_id=126081,
    )


def small_dream() -> ModelConfig:
    """Dream's architecture at a size for tests."""
    return ModelConfig("dream", 96, 64, 3, 4, 2, 32, 112, 1e6, 1e-6, mask_id=95, eos_id=94)


def small_llada() -> ModelConfig:
    """LLaDA's architecture at a size for tests."""
    return ModelConfig("llada", 96, 64, 3, 2, 2, 32, 112, 5e5, 1e-5, mask_id=95, eos_id=94)


MODELS = {"dream-7b": dream_7b, "llada-8b": llada_8b}
