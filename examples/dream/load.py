"""Published checkpoints into packed weights, and LoRA adapters into those."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from examples.dream.config import ModelConfig
from examples.dream.model import DiffusionLM

_NAMES = {
    "dream": {
        "layer": "model.layers.{}.",
        "attn_norm": "input_layernorm",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
        "embed": "model.embed_tokens",
        "norm": "model.norm",
        "head": "lm_head",
    },
    "llada": {
        "layer": "model.transformer.blocks.{}.",
        "attn_norm": "attn_norm",
        "q": "q_proj",
        "k": "k_proj",
        "v": "v_proj",
        "o": "attn_out",
        "mlp_norm": "ff_norm",
        "gate": "ff_proj",
        "up": "up_proj",
        "down": "ff_out",
        "embed": "model.transformer.wte",
        "norm": "model.transformer.ln_f",
        "head": "model.transformer.ff_out",
    },
}


def published(model: DiffusionLM) -> dict[str, Tensor]:
    """The weights under their published names, as views of the packed ones."""
    c = model.config
    names = _NAMES[c.family]
    tensors: dict[str, Tensor] = {
        names["embed"] + ".weight": model.embed.data,
        names["norm"] + ".weight": model.norm.data,
    }
    if not c.tied:
        tensors[names["head"] + ".weight"] = model.head.data
    rows = [c.heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.head_dim]
    for number in range(c.layers):
        layer = model.weights(number)
        prefix = names["layer"].format(number)
        for part in ("attn_norm", "o", "mlp_norm", "down"):
            tensors[f"{prefix}{names[part]}.weight"] = getattr(layer, part).data
        gate, up = layer.gate_up.data.chunk(2)
        tensors[f"{prefix}{names['gate']}.weight"] = gate
        tensors[f"{prefix}{names['up']}.weight"] = up
        for part, weight in zip("qkv", layer.qkv.data.split(rows), strict=True):
            tensors[f"{prefix}{names[part]}.weight"] = weight
        if layer.qkv_bias is not None:
            for part, bias in zip("qkv", layer.qkv_bias.data.split(rows), strict=True):
                tensors[f"{prefix}{names[part]}.bias"] = bias
    return tensors


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        shards = [folder / name for name in files]
        absent = [path.name for path in shards if not path.is_file()]
        if absent:
            raise FileNotFoundError(f"{folder}: missing shards of the index: {_some(absent)}")
        return shards
    single = folder / "model.safetensors"
    if not single.is_file():
        raise FileNotFoundError(
            f"{folder}: no weights: expected model.safetensors or {index.name} with its shards"
        )
    return [single]


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more


def _read(path: Path, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in sorted(file.keys() if names is None else names):
            yield name, file.get_tensor(name)


@torch.no_grad()
def load(
    path: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    lora: str | Path | None = None,
) -> DiffusionLM:
    """A published checkpoint: a folder with `config.json` and safetensors, sharded or not.

    Args:
        path: the folder.
        device, dtype: of the model.
        lora: the folder of an adapter to merge (D2F), see :func:`merge_lora`.

    Raises:
        FileNotFoundError: no configuration or no weights there.
        ValueError: tensors that are missing, unknown, or of another shape; all are named.
    """
    folder = Path(path)
    config = ModelConfig.from_file(folder)
    shards = _shards(folder)
    model = DiffusionLM(config, device, dtype)
    expected = published(model)
    tied = _NAMES[config.family]["head"] + ".weight" if config.tied else None
    seen: set[str] = set()
    unknown: list[str] = []
    misshaped: list[str] = []
    for shard in shards:
        for name, tensor in _read(shard):
            target = expected.get(name)
            if target is None:
                # A buffer of older exports, which follows from the configuration; a tied head.
                if not name.endswith("rotary_emb.inv_freq") and name != tied:
                    unknown.append(name)
            elif target.shape != tensor.shape:
                misshaped.append(f"{name} {list(tensor.shape)} for {list(target.shape)}")
                seen.add(name)
            else:
                target.copy_(tensor)
                seen.add(name)
    faults = {
        "missing": sorted(expected.keys() - seen),
        "unknown": unknown,
        "of another shape": misshaped,
    }
    found = [f"{fault}: {_some(names)}" for fault, names in faults.items() if names]
    if found:
        raise ValueError(f"{folder}: tensors {'; '.join(found)}")
    if lora is not None:
        merge_lora(model, lora)
    return model


def _adapter_scale(folder: Path) -> tuple[int, float]:
    """Rank and scale of an adapter."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no adapter: expected adapter_config.json")
    values: dict[str, Any] = json.loads(path.read_text())
    for name in ("use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out"):
        if values.get(name):
            raise ValueError(f"{path}: {name}: not implemented, got {values[name]!r}")
    if values.get("bias", "none") != "none":
        raise ValueError(f"{path}: bias: only 'none' is implemented, got {values['bias']!r}")
    rank, alpha = values.get("r"), values.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
        raise ValueError(f"{path}: expected r >= 1 and lora_alpha, got {rank!r} and {alpha!r}")
    return rank, alpha / (math.sqrt(rank) if values.get("use_rslora") else rank)


@torch.no_grad()
def merge_lora(model: DiffusionLM, path: str | Path) -> None:
    """Adds a peft adapter to the weights: W + lora_alpha / r * B @ A, formed in fp32.

    Nothing has been written when an error is raised.

    Args:
        model: changed in place.
        path: the folder with `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: an option that is not implemented, or tensors that do not fit; it names them.

    Source: LoRA, arXiv 2106.09685.
    """
    folder = Path(path)
    rank, scale = _adapter_scale(folder)
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: no adapter: expected adapter_model.safetensors")
    factors: dict[str, dict[str, Tensor]] = {}
    unknown: list[str] = []
    weights = published(model)
    for name, tensor in _read(file):
        for side in ("A", "B"):
            suffix = f".lora_{side}.weight"
            target = name.removeprefix("base_model.model.").removesuffix(suffix) + ".weight"
            if name.endswith(suffix) and target in weights and weights[target].dim() == 2:
                factors.setdefault(target, {})[side] = tensor
                break
        else:
            unknown.append(name)
    misshaped = [
        target
        for target, pair in factors.items()
        if pair.keys() != {"A", "B"}
        or pair["A"].shape != (rank, weights[target].shape[1])
        or pair["B"].shape != (weights[target].shape[0], rank)
    ]
    if unknown or misshaped or not factors:
        raise ValueError(
            f"{file}: expected factors A and B of rank {rank} for weights of the model; "
            f"unknown: {_some(unknown) or 'none'}; unfit: {_some(misshaped) or 'none'}"
        )
    for target, pair in factors.items():
        weight = weights[target]
        left, right = (pair[side].to(weight.device, torch.float32) for side in ("B", "A"))
        weight.copy_(weight.float() + scale * (left @ right))
