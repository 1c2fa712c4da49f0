"""Converters of ``torch.ops.lopa`` to the operators of ascend_ops, for torchair's GE graphs.

Names, order and attributes are those of the operators' definitions (ascend_ops/*/op_host).
Imported by :func:`lopa_kernels.ascend.register_converters` alone, since it needs torchair.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torchair
from torchair import ge

from lopa_kernels.state import LopaState, LopaStep

#: a GE tensor; None where an optional input is absent
Tensor = Any
_Converter = Callable[..., Any]

_converters: dict[str, _Converter] = {}

_STATE = LopaState._fields
_NEXT = tuple(f"next_{name}" for name in _STATE)
_RESULTS = LopaStep._fields[1:]
_STATISTICS_TYPES = (torch.int64, torch.float32, torch.float32, torch.int32)
_ROWS_STATE = (
    "tokens", "length", "branches", "cache_len", "commit_len", "prompt_len", "done",
)  # fmt: skip


def _converts(op: str) -> Callable[[_Converter], _Converter]:
    def add(converter: _Converter) -> _Converter:
        _converters[op] = converter
        return converter

    return add


def register() -> None:
    """Registers all converters; a second call changes nothing."""
    for op, converter in _converters.items():
        torchair.register_fx_node_ge_converter(getattr(torch.ops.lopa, op).default)(converter)


def _bits(value: float) -> Any:
    """A double as an integer attribute: GE's own floats are fp32."""
    (bits,) = struct.unpack("<q", struct.pack("<d", value))
    return ge.attr.Int(bits)


def _least_count(share: float, block_size: int) -> int:
    """The least n with ``n / block_size >= share``, as least_count of csrc/branch/params.h."""
    n = max(0, int(share * block_size) - 1)
    while n <= block_size and n / block_size < share:
        n += 1
    return n


def _op(
    name: str, inputs: dict[str, Tensor], outputs: Sequence[str], attributes: dict[str, Any]
) -> Any:
    return ge.custom_op(f"Lopa{name}", inputs=inputs, outputs=list(outputs), attrs=attributes)


def _sampling(temperature: float, top_k: int | None, top_p: float | None) -> dict[str, Any]:
    if top_p is not None and top_p < 1:
        # top_k is held against the vocabulary by the operator's tiling.
        raise NotImplementedError(f"top_p {top_p}: Ascend's operators filter no tokens")
    return {
        "temperature_bits": _bits(temperature),
        "top_k": ge.attr.Int(top_k or 0),
        "top_p_bits": _bits(1.0 if top_p is None else top_p),
    }


def _confidence(
    logits: Tensor,
    rows: Tensor,
    seed: Tensor,
    step: Tensor,
    metric: str,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = {"logits": logits, "rows": rows, "seed": seed, "step": step}
    attributes = {"metric": ge.attr.Str(metric), **_sampling(temperature, top_k, top_p)}
    outputs = ("token", "prob", "score", "unusable")
    made = _op("TokenConfidence", inputs, outputs, attributes)
    # torchair knows the dtypes of what a torch operator returns, and of nothing between.
    for tensor, dtype in zip(made, _STATISTICS_TYPES, strict=True):
        tensor.set_torch_dtype(dtype)
    return made


@_converts("token_confidence")
def token_confidence(
    logits: Tensor,
    rows: Tensor = None,
    seed: Tensor = None,
    step: Tensor = None,
    metric: str = "prob",
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> tuple[Tensor, ...]:
    return _confidence(logits, rows, seed, step, metric, temperature, top_k, top_p)[:3]


@_converts("softmax_stats")
def softmax_stats(
    logits: Tensor,
    rows: Tensor = None,
    seed: Tensor = None,
    step: Tensor = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> tuple[Tensor, ...]:
    inputs = {"logits": logits, "rows": rows, "seed": seed, "step": step}
    outputs = ("token", "prob", "margin", "neg_entropy", "lse")
    return _op("SoftmaxStats", inputs, outputs, _sampling(temperature, top_k, top_p))


def _reduction(reduction: str, fraction: float, group: int | None, alpha: float) -> dict[str, Any]:
    return {
        "reduction": ge.attr.Str(reduction),
        "fraction_bits": _bits(fraction),
        "group": ge.attr.Int(group or 0),
        "alpha_bits": _bits(alpha),
    }


def _selection(
    tau_conf: float, tau_act: float, block_size: int, mask_id: int, accept: str, fallback: str
) -> dict[str, Any]:
    return {
        "tau_conf": ge.attr.Float(tau_conf),
        "act_count": ge.attr.Int(_least_count(tau_act, block_size)),
        "block_size": ge.attr.Int(block_size),
        "mask_id": ge.attr.Int(mask_id),
        "accept": ge.attr.Str(accept),
        "fallback": ge.attr.Str(fallback),
    }


@_converts("branch_confidence")
def branch_confidence(
    score: Tensor,
    open: Tensor,
    creation: Tensor,
    branches: Tensor = None,
    length: Tensor = None,
    reduction: str = "mean",
    fraction: float = 1.0,
    group: int | None = None,
    alpha: float = 0.0,
) -> Tensor:
    inputs = {
        "score": score, "open": open, "creation": creation, "branches": branches, "length": length,
    }  # fmt: skip
    attributes = _reduction(reduction, fraction, group, alpha)
    return _op("BranchConfidence", inputs, ("confidence",), attributes)


@_converts("select_positions")
def select_positions(
    token: Tensor,
    prob: Tensor,
    score: Tensor,
    tokens: Tensor,
    length: Tensor,
    cache_len: Tensor,
    prompt_len: Tensor,
    lookahead: int,
    tau_conf: float,
    tau_act: float,
    block_size: int,
    mask_id: int,
    accept: str,
    fallback: str,
) -> tuple[Tensor, ...]:
    inputs = {
        "token": token, "prob": prob, "score": score, "tokens": tokens, "length": length,
        "cache_len": cache_len, "prompt_len": prompt_len,
    }  # fmt: skip
    attributes = {
        "lookahead": ge.attr.Int(lookahead),
        **_selection(tau_conf, tau_act, block_size, mask_id, accept, fallback),
    }
    return _op("SelectPositions", inputs, ("fill", "columns", "filled"), attributes)


@_converts("spawn_branches")
def spawn_branches(
    tokens: Tensor, eos: Tensor, token: Tensor, score: Tensor, columns: Tensor, eos_id: int
) -> tuple[Tensor, ...]:
    inputs = {"tokens": tokens, "eos": eos, "token": token, "score": score, "columns": columns}
    outputs = ("out_tokens", "out_creation", "out_eos", "out_branches")
    return _op("SpawnBranches", inputs, outputs, {"eos_id": ge.attr.Int(eos_id)})


def _round(
    statistics: dict[str, Tensor], state: dict[str, Tensor], settings: Sequence[Any]
) -> tuple[Tensor, ...]:
    """`settings` are LopaConfig.step_args, in the order of the schema."""
    (
        out_branches, out_window, tau_conf, tau_add, tau_act, block_size, max_new_tokens, mask_id,
        eos_id, accept, fallback, reduction, fraction, group, alpha, shift, force_anchor,
    ) = settings  # fmt: skip
    select = _selection(tau_conf, tau_act, block_size, mask_id, accept, fallback)
    attributes = {
        "out_branches": ge.attr.Int(out_branches),
        "out_window": ge.attr.Int(out_window),
        "tau_conf": select["tau_conf"],
        "add_count": ge.attr.Int(_least_count(tau_add, block_size)),
        "act_count": select["act_count"],
        "block_size": select["block_size"],
        "max_blocks": ge.attr.Int(max_new_tokens // block_size),
        "mask_id": select["mask_id"],
        "eos_id": ge.attr.Int(eos_id),
        "accept": select["accept"],
        "fallback": select["fallback"],
        **_reduction(reduction, fraction, group, alpha),
        "shift": ge.attr.Bool(shift),
        "force_anchor": ge.attr.Bool(force_anchor),
    }
    return _op("BranchStep", {**statistics, **state}, (*_NEXT, *_RESULTS), attributes)


@_converts("branch_step")
def branch_step(token: Tensor, prob: Tensor, score: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    state = dict(zip(_STATE, arguments[:12], strict=True))
    statistics = {"token": token, "prob": prob, "score": score, "unusable": None}
    return _round(statistics, state, arguments[12:])


@_converts("lopa_step")
def lopa_step(
    logits: Tensor, rows: Tensor, seed: Tensor, step: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    """Three operators, and no other: the rows that are needed, their statistics, the round."""
    state = dict(zip(_STATE, arguments[:12], strict=True))
    settings, sampling = arguments[12:29], arguments[29:]
    mask_id, shift = settings[7], settings[15]
    wanted = _op(
        "StepRows",
        {**{name: state[name] for name in _ROWS_STATE}, "given_rows": rows},
        ("wanted",),
        {"mask_id": ge.attr.Int(mask_id), "shift": ge.attr.Bool(shift)},
    )
    wanted.set_torch_dtype(torch.int32)
    names = ("token", "prob", "score", "unusable")
    statistics = _confidence(logits, wanted, seed, step, *sampling)
    return _round(dict(zip(names, statistics, strict=True)), state, settings)


@_converts("needed_rows")
def needed_rows(*arguments: Any) -> tuple[Tensor, ...]:
    mask_id, shift, capacity = arguments[7:]
    attributes = {
        "mask_id": ge.attr.Int(mask_id),
        "shift": ge.attr.Bool(shift),
        "capacity": ge.attr.Int(capacity),
    }
    inputs = dict(zip(_ROWS_STATE, arguments[:7], strict=True))
    return _op("NeededRows", inputs, ("index", "rows", "count"), attributes)


def _attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_window: Tensor,
    v_window: Tensor,
    cache_len: Tensor,
    length: Tensor,
    prompt_len: Tensor = None,
    block_table: Tensor = None,
    mask: str = "full",
    block_size: int | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    inputs = {
        "q": q, "k_cache": k_cache, "v_cache": v_cache, "k_window": k_window,
        "v_window": v_window, "cache_len": cache_len, "length": length, "prompt_len": prompt_len,
        "block_table": block_table,
    }  # fmt: skip
    attributes = {
        "mask": ge.attr.Str(mask),
        "block_size": ge.attr.Int(block_size or 0),
        # 0 is the operator's word for D ** -0.5, which it takes from the shape.
        "scale": ge.attr.Float(0.0 if scale is None else scale),
        "cache_layout": ge.attr.Str("BSND"),
    }
    out, lse = _op("BranchAttention", inputs, ("out", "lse"), attributes)
    lse.set_torch_dtype(torch.float32)
    return out, lse


@_converts("branch_attention")
def branch_attention(*arguments: Any, **options: Any) -> Tensor:
    return _attention(*arguments, **options)[0]


@_converts("branch_attention_lse")
def branch_attention_lse(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    return _attention(*arguments, **options)


# The operators of the KV cache write in place. torchair hands a converter copies (TensorMove) of
# what is written, takes the outputs of the same names for the new values, and assigns those to
# what was copied. It reads the names off the last operator that the converter has added. Status
# words are always there: torchair (of torch_npu 2.13) converts no mutable argument that is absent,
# and the public functions give some.


@_converts("kv_prewrite_")
def kv_prewrite_(
    k_window: Tensor,
    v_window: Tensor,
    layer: int,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor = None,
    cache_len: Tensor = None,
) -> None:
    inputs = {
        "k_window": k_window, "v_window": v_window, "k": k, "v": v, "cos_sin": cos_sin,
        "cache_len": cache_len,
    }  # fmt: skip
    _op("KvPrewrite", inputs, ("k_window", "v_window"), {"layer": ge.attr.Int(layer)})


@_converts("kv_prewrite_direct_")
def kv_prewrite_direct_(
    k_window: Tensor,
    v_window: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    layer: int,
    k: Tensor,
    v: Tensor,
    cache_len: Tensor,
    commit_len: Tensor,
    cos_sin: Tensor = None,
    status: Tensor = None,
) -> None:
    inputs = {
        "k_window": k_window, "v_window": v_window, "k_cache": k_cache, "v_cache": v_cache, "k": k,
        "v": v, "cache_len": cache_len, "commit_len": commit_len, "cos_sin": cos_sin,
        "status": status,
    }  # fmt: skip
    outputs = ("k_window", "v_window", "k_cache", "v_cache", "status")
    _op("KvPrewriteDirect", inputs, outputs, {"layer": ge.attr.Int(layer)})


@_converts("qkv_prewrite_")
def qkv_prewrite_(
    q: Tensor,
    k_window: Tensor,
    v_window: Tensor,
    layer: int,
    qkv: Tensor,
    cos_sin: Tensor,
    cache_len: Tensor,
    q_norm: Tensor = None,
    k_norm: Tensor = None,
    norm_eps: float = 1e-6,
) -> None:
    inputs = {
        "q": q, "k_window": k_window, "v_window": v_window, "qkv": qkv, "cos_sin": cos_sin,
        "cache_len": cache_len, "q_norm": q_norm, "k_norm": k_norm,
    }  # fmt: skip
    attributes = {"layer": ge.attr.Int(layer), "norm_eps_bits": _bits(norm_eps)}
    _op("QkvPrewrite", inputs, ("q", "k_window", "v_window"), attributes)


@_converts("qkv_prewrite_direct_")
def qkv_prewrite_direct_(
    q: Tensor,
    k_window: Tensor,
    v_window: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    layer: int,
    qkv: Tensor,
    cos_sin: Tensor,
    cache_len: Tensor,
    commit_len: Tensor,
    status: Tensor = None,
    q_norm: Tensor = None,
    k_norm: Tensor = None,
    norm_eps: float = 1e-6,
) -> None:
    inputs = {
        "q": q, "k_window": k_window, "v_window": v_window, "k_cache": k_cache, "v_cache": v_cache,
        "qkv": qkv, "cos_sin": cos_sin, "cache_len": cache_len, "commit_len": commit_len,
        "status": status, "q_norm": q_norm, "k_norm": k_norm,
    }  # fmt: skip
    outputs = ("q", "k_window", "v_window", "k_cache", "v_cache", "status")
    attributes = {"layer": ge.attr.Int(layer), "norm_eps_bits": _bits(norm_eps)}
    _op("QkvPrewriteDirect", inputs, outputs, attributes)


@_converts("kv_commit_")
def kv_commit_(
    k_cache: Tensor,
    v_cache: Tensor,
    k_window: Tensor,
    v_window: Tensor,
    winner: Tensor,
    cache_len: Tensor,
    commit_len: Tensor,
    status: Tensor = None,
) -> None:
    inputs = {
        "k_cache": k_cache, "v_cache": v_cache, "k_window": k_window, "v_window": v_window,
        "winner": winner, "cache_len": cache_len, "commit_len": commit_len,
        "status": status,
    }  # fmt: skip
    _op("KvCommit", inputs, ("k_cache", "v_cache", "status"), {})


def _refuse(op: str, functional: str, *_: Any, **__: Any) -> None:
    raise NotImplementedError(
        f"lopa::{op} does not convert to a GE graph, which plans its own memory: use {functional}"
    )


for _form, _functional in (
    ("lopa_step_out", "lopa_step"),
    ("lopa_step_", "lopa_step"),
    ("branch_step_out", "branch_step"),
    ("branch_step_", "branch_step"),
    ("token_confidence_out", "token_confidence"),
    ("branch_attention_out", "branch_attention"),
):
    _converters[_form] = partial(_refuse, _form, _functional)
