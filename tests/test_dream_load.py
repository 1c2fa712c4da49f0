"""Published checkpoints: names, shards, LoRA adapters, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_dream_model import SMALL, Plain, both, run_layers, window_state
from torch import Tensor

from examples.dream import decode
from examples.dream.config import ModelConfig, small_dream
from examples.dream.load import load, merge_lora, published
from examples.dream.model import DiffusionLM, random_weights


def hf_config(c: ModelConfig) -> dict[str, Any]:
    shared = {"rope_theta": c.rope_theta, "rms_norm_eps": c.norm_eps, "vocab_size": c.vocab_size}
    shared |= {"mask_token_id": c.mask_id, "eos_token_id": c.eos_id}
    if c.family == "dream":
        names = {"hidden_size": c.hidden, "num_hidden_layers": c.layers, "head_dim": c.head_dim}
        names |= {"num_attention_heads": c.heads, "num_key_value_heads": c.kv_heads}
        return {"model_type": "Dream", "intermediate_size": c.intermediate, **names, **shared}
    names = {"d_model": c.hidden, "n_layers": c.layers, "n_heads": c.heads}
    names |= {"n_kv_heads": c.kv_heads, "mlp_hidden_size": c.intermediate}
    return {"model_type": "llada", **names, **shared}


def hf_tensors(c: ModelConfig) -> dict[str, Tensor]:
    """Random tensors under the published names, which are spelled out here once more."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * shape[-1] ** -0.5

    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    dream = c.family == "dream"
    made = {}
    for layer in range(c.layers):
        at = f"model.layers.{layer}." if dream else f"model.transformer.blocks.{layer}."
        attention, mlp = (at + "self_attn.", at + "mlp.") if dream else (at, at)
        for part, rows in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
            made[f"{attention}{part}.weight"] = draw(rows, c.hidden)
            if dream:
                made[f"{attention}{part}.bias"] = draw(rows)
        made[attention + ("o_proj" if dream else "attn_out") + ".weight"] = draw(c.hidden, q)
        for part in ("gate_proj" if dream else "ff_proj", "up_proj"):
            made[f"{mlp}{part}.weight"] = draw(c.intermediate, c.hidden)
        down = "down_proj" if dream else "ff_out"
        made[f"{mlp}{down}.weight"] = draw(c.hidden, c.intermediate)
        norms = ("input_layernorm", "post_attention_layernorm")
        for norm in norms if dream else ("attn_norm", "ff_norm"):
            made[f"{at}{norm}.weight"] = 1 + draw(c.hidden)
    top = ("model.embed_tokens", "model.norm", "lm_head")
    if not dream:
        top = ("model.transformer.wte", "model.transformer.ln_f", "model.transformer.ff_out")
    made[top[0] + ".weight"] = draw(c.vocab_size, c.hidden) * c.hidden**0.5
    made[top[1] + ".weight"] = 1 + draw(c.hidden)
    made[top[2] + ".weight"] = draw(c.vocab_size, c.hidden)
    return made


def write(folder: Path, c: ModelConfig, tensors: dict[str, Tensor], shards: int = 3) -> None:
    (folder / "config.json").write_text(json.dumps(hf_config(c)))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[shard::shards])
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def assert_same_logits(model: DiffusionLM, plain: Plain) -> None:
    state = window_state(model.config, [9], 9)
    _, logits = run_layers(model, state)
    _, expected = plain(state.tokens[0, 0], torch.ones(9, 9, dtype=torch.bool))
    torch.testing.assert_close(logits[0].double(), expected, rtol=1e-4, atol=1e-4)


@both
@pytest.mark.parametrize("shards", [1, 3])
def test_a_checkpoint_gives_the_logits_of_its_tensors(
    family: str, shards: int, tmp_path: Path
) -> None:
    config = SMALL[family]()
    tensors = hf_tensors(config)
    write(tmp_path, config, tensors, shards)
    model = load(tmp_path, dtype=torch.float32)
    assert model.config == config
    assert_same_logits(model, Plain(config, tensors))


def write_adapter(
    folder: Path, c: ModelConfig, targets: tuple[str, ...], **options: Any
) -> dict[str, tuple[Tensor, Tensor, float]]:
    generator = torch.Generator().manual_seed(9)
    rank, alpha = 4, 12
    saved, factors = {}, {}
    for name, weight in hf_tensors(c).items():
        module = name.removesuffix(".weight")
        if weight.dim() == 2 and module.rsplit(".", 1)[-1] in targets and ".0." in module:
            a = torch.randn(rank, weight.shape[1], generator=generator) * 0.1
            b = torch.randn(weight.shape[0], rank, generator=generator) * 0.1
            saved[f"base_model.model.{module}.lora_A.weight"] = a
            saved[f"base_model.model.{module}.lora_B.weight"] = b
            factors[module] = (a, b, alpha / rank)
    settings = {"r": rank, "lora_alpha": alpha, "target_modules": list(targets), **options}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(saved, folder / "adapter_model.safetensors")
    return factors


@both
def test_a_merged_adapter_is_base_and_adapter_unmerged(family: str, tmp_path: Path) -> None:
    config = SMALL[family]()
    tensors = hf_tensors(config)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    write(base, config, tensors)
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "attn_out", "down_proj", "ff_proj")
    factors = write_adapter(adapter, config, targets)
    assert len(factors) >= 5
    model = load(base, dtype=torch.float32, lora=adapter)
    assert_same_logits(model, Plain(config, tensors, factors))
    with pytest.raises(AssertionError):
        assert_same_logits(model, Plain(config, tensors))


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    config = small_dream()
    tensors = hf_tensors(config)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2, 2)
    tensors["model.norm.weight"] = torch.zeros(3)
    write(tmp_path, config, tensors)
    with pytest.raises(ValueError, match="missing: model.layers.1.mlp.up_proj.weight") as error:
        load(tmp_path)
    assert "unknown: model.layers.9.mlp.up_proj.weight" in str(error.value)
    assert "of another shape: model.norm.weight [3] for [64]" in str(error.value)


def test_absent_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no model configuration"):
        load(tmp_path)
    config = small_dream()
    write(tmp_path, config, hf_tensors(config))
    with pytest.raises(FileNotFoundError, match="adapter_config.json"):
        merge_lora(random_weights(config), tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="missing shards of the index: model-00002"):
        load(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match="no weights: expected model.safetensors"):
        load(tmp_path)


def test_adapters_that_do_not_fit_change_nothing(tmp_path: Path) -> None:
    config = small_dream()
    model = random_weights(config, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in published(model).items()}
    write_adapter(tmp_path, config, ("q_proj",), use_dora=True)
    with pytest.raises(ValueError, match="use_dora: not implemented"):
        merge_lora(model, tmp_path)
    write_adapter(tmp_path, config, ("q_proj", "o_proj"))
    file = tmp_path / "adapter_model.safetensors"
    saved = load_file(file)
    saved["base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 64)
    del saved["base_model.model.model.layers.0.self_attn.o_proj.lora_B.weight"]
    save_file(saved, file)
    unfit = "model.layers.0.self_attn.o_proj.weight"
    with pytest.raises(ValueError, match=rf"model.layers.7.*lora_A.*unfit: {unfit}"):
        merge_lora(model, tmp_path)
    assert all(tensor.equal(before[name]) for name, tensor in published(model).items())


def test_the_command_says_what_it_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as stop:
        decode.main(["--model", str(tmp_path / "none"), "--prompt", "Hello"])
    assert stop.value.code != 0
    assert "config.json" in capsys.readouterr().err
    for library in ("transformers", "tokenizers"):
        monkeypatch.setitem(sys.modules, library, None)
    write(tmp_path, small_dream(), hf_tensors(small_dream()))
    with pytest.raises(SystemExit) as stop:
        decode.main(["--model", str(tmp_path), "--prompt", "Hello", "--device", "cpu"])
    assert stop.value.code != 0
    assert "tokenizer" in capsys.readouterr().err


def test_the_command_decodes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_dream()
    write(tmp_path, config, hf_tensors(config))
    letters = decode.Tokenizer(
        lambda text: [ord(char) - 32 for char in text],
        lambda ids: "".join(chr(token + 32) for token in ids),
    )
    monkeypatch.setattr(decode, "tokenizer", lambda *_, **__: letters)
    sizes = ["--max-new-tokens", "16", "--block-size", "8", "--window", "16", "--branches", "2"]
    decode.main(["--model", str(tmp_path), "--prompt", "Hello", "--device", "cpu", *sizes])
    printed = capsys.readouterr()
    assert "a pass)" in printed.err
    assert 1 <= len(printed.out.rstrip("\n")) <= 16
