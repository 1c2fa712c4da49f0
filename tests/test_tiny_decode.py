"""The tiny model's decoder against one written from the paper, in plain PyTorch and Python."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

import lopa_kernels as lk
from examples.tiny_dllm import demo, evaluate
from examples.tiny_dllm.decode import Decoder
from examples.tiny_dllm.methods import base_config, judge, lopa, vanilla
from examples.tiny_dllm.model import TinyDLLM, apply_rope, rope_table
from examples.tiny_dllm.problems import problems
from examples.tiny_dllm.tokenizer import CharTokenizer


@pytest.fixture(scope="module")
def model() -> TinyDLLM:
    return TinyDLLM.load()


@dataclass
class Branch:
    tokens: list[int]
    creation: float
    eos: bool


class PlainLoPA:
    """LoPA's Algorithm 1 for one prompt: one forward a branch, Python lists, a growing cache.

    Written from the paper (arXiv 2512.16229) and its block rules (D2F, arXiv 2508.09192), without
    the operators of this library.
    """

    def __init__(self, model: TinyDLLM, config: lk.LopaConfig, mask: str) -> None:
        self.model, self.config, self.mask = model, config, mask
        c = model.config
        self.cache = [
            (torch.zeros(0, c.kv_heads, c.head_dim), torch.zeros(0, c.kv_heads, c.head_dim))
            for _ in range(c.layers)
        ]
        self.cos_sin = rope_table(replace(c, max_pos=1024))

    def block_of(self, position: int) -> int:
        return max(-1, (position - self.prompt_len) // self.config.block_size)

    def forward(self, tokens: list[int], mask: str) -> tuple[torch.Tensor, list]:
        """Logits of the positions after the cache, and their keys and values by layer."""
        c = self.model.config
        start = len(self.cache[0][0])
        positions = range(start, start + len(tokens))
        blocks = torch.tensor([self.block_of(p) for p in positions])
        seen = torch.ones(len(tokens), start + len(tokens), dtype=torch.bool)
        if mask == "block_causal":
            seen[:, start:] = blocks[None, :] <= blocks[:, None]
        rotation = self.cos_sin[torch.tensor(positions)]
        x = self.model.embed(torch.tensor(tokens))
        made = []
        for block, (past_k, past_v) in zip(self.model.blocks, self.cache, strict=True):
            q, k, v = block.split_qkv(block.qkv(block.attn_norm(x)))
            q, k = apply_rope(q, rotation), apply_rope(k, rotation)
            made.append((k, v))
            keys = torch.cat([past_k, k]).repeat_interleave(c.q_heads // c.kv_heads, dim=1)
            values = torch.cat([past_v, v]).repeat_interleave(c.q_heads // c.kv_heads, dim=1)
            weights = torch.einsum("qhd,khd->hqk", q, keys) / math.sqrt(c.head_dim)
            weights = weights.masked_fill(~seen, -math.inf).softmax(-1)
            x = x + block.o(torch.einsum("hqk,khd->qhd", weights, values).flatten(1))
            x = x + block.mlp(block.mlp_norm(x))
        return self.model.head(self.model.norm(x)), made

    @torch.inference_mode()
    def decode(self, prompt: list[int]) -> tuple[list[int], int]:
        c, size, mask_id = self.config, self.config.block_size, self.config.mask_id
        self.prompt_len = len(prompt)
        text = list(prompt)  # what is in the cache
        anchor = Branch([*prompt, *[mask_id] * size], 1.0, False)
        branches, commit, rounds = [anchor], len(prompt), 0
        while True:
            rounds += 1
            mask = "block_causal" if rounds == 1 else self.mask
            results, confidences = [], []
            for branch in branches:
                logits, made = self.forward(branch.tokens, mask)
                p = logits.softmax(-1)
                score = (p * p.log().clamp(min=-1e30)).sum(-1)
                results.append((p.max(-1), score, made))
                masked = [i for i, t in enumerate(branch.tokens) if t == mask_id]
                mean = sum(float(score[i]) for i in masked) / len(masked) if masked else 1.0
                confidences.append(c.alpha * branch.creation + (1 - c.alpha) * mean)
            order = [*range(1, len(branches)), 0]
            winner = max(order, key=lambda k: confidences[k])
            (prob, token), score, made = results[winner]
            anchor = branches[winner]
            if commit:
                self.cache = [
                    (torch.cat([pk, k[:commit]]), torch.cat([pv, v[:commit]]))
                    for (pk, pv), (k, v) in zip(self.cache, made, strict=True)
                ]

            start = len(text) if rounds > 1 else 0
            blocks: dict[int, list[int]] = {}
            for i in range(len(anchor.tokens)):
                if self.block_of(start + i) >= 0:
                    blocks.setdefault(self.block_of(start + i), []).append(i)
            window = list(anchor.tokens)
            for index, columns in blocks.items():
                masked = [i for i in columns if anchor.tokens[i] == mask_id]
                before = blocks.get(index - 1, [])
                filled = sum(anchor.tokens[i] != mask_id for i in before) / size if before else 1.0
                chosen = [i for i in masked if float(prob[i]) > c.tau_conf]
                if not chosen and masked and filled >= c.tau_act:
                    chosen = [max(masked, key=lambda i: float(score[i]))]
                for i in chosen:
                    window[i] = int(token[i])
            eos = c.eos_id in window[self.prompt_len if rounds == 1 else 0 :] or anchor.eos
            masked = [i for i, t in enumerate(window) if t == mask_id]
            masked.sort(key=lambda i: -float(score[i]))
            following = [Branch(window, 1.0, eos)]
            for i in masked[: c.branches - 1]:
                tokens = list(window)
                tokens[i] = int(token[i])
                following.append(Branch(tokens, float(score[i]), eos or tokens[i] == c.eos_id))
            if rounds > 1:
                text += window[:commit]
            for branch in following:
                branch.tokens = branch.tokens[commit:]
            commit = 0
            rest = following[0].tokens
            while commit + size <= len(rest) and mask_id not in rest[commit : commit + size]:
                commit += size
            done = mask_id not in following[0].tokens
            for k, branch in enumerate(following):
                generated = len(text) - self.prompt_len + len(branch.tokens)
                last = branch.tokens[-size:]
                share = sum(t != mask_id for t in last) / size if last else 1.0
                if branch.eos or generated >= c.max_new_tokens or share < c.tau_add:
                    continue
                fits = len(branch.tokens) + size <= c.window
                if fits:
                    branch.tokens = branch.tokens + [mask_id] * size
                if k == 0:
                    done = False
            branches = following
            if done:
                return [*text, *branches[0].tokens][self.prompt_len :], rounds


PROMPTS = [problem.prompt for problem in problems("heldout", 3, 11)]


@pytest.mark.parametrize("mask", ["block_causal", "full"])
@pytest.mark.parametrize(("branches", "window"), [(1, 96), (4, 96), (3, 64)])
def test_equals_the_plain_decoder(model: TinyDLLM, branches: int, window: int, mask: str) -> None:
    tokenizer = CharTokenizer()
    config = lopa(model.config, branches, 0.9, window=window).config
    ids = [tokenizer.encode(prompt) for prompt in PROMPTS]
    decoded = Decoder(model, config, mask=mask).decode(ids)
    for row, forwards, prompt in zip(decoded.tokens.tolist(), decoded.forwards, ids, strict=True):
        tokens, rounds = PlainLoPA(model, config, mask).decode(prompt)
        assert row[: len(tokens)] == tokens
        assert set(row[len(tokens) :]) <= {config.mask_id}
        assert int(forwards) == rounds


def test_vanilla_fills_one_token_a_pass(model: TinyDLLM) -> None:
    tokenizer = CharTokenizer()
    config = vanilla(model.config).config
    filled: list[int] = []
    decoded = Decoder(model, config).decode(
        [tokenizer.encode(PROMPTS[0])], lambda _, out: filled.append(int(out.filled))
    )
    assert set(filled) == {1}
    assert int((decoded.tokens != config.mask_id).sum()) == len(filled)


def test_compiled_round_gives_equal_tokens(model: TinyDLLM) -> None:
    tokenizer = CharTokenizer()
    config = lopa(model.config, 3, 0.9, window=64, max_new_tokens=64).config
    ids = [tokenizer.encode(prompt) for prompt in PROMPTS[:2]]
    plain = Decoder(model, config).decode(ids)
    torch._dynamo.reset()
    compiled = Decoder(model, config, compile=True).decode(ids)  # fullgraph: no break
    assert torch.equal(compiled.tokens, plain.tokens)
    assert torch.equal(compiled.forwards, plain.forwards)


def test_reference_backend_gives_equal_tokens(model: TinyDLLM) -> None:
    tokenizer = CharTokenizer()
    config = lopa(model.config, 3, 0.9, window=64, max_new_tokens=64).config
    ids = [tokenizer.encode(PROMPTS[0])]
    native = Decoder(model, config).decode(ids)
    with lk.use_backend("reference"):
        reference = Decoder(model, config).decode(ids)
    assert torch.equal(reference.tokens, native.tokens)


def test_evaluation_decoder_gives_equal_tokens(model: TinyDLLM) -> None:
    tokenizer = CharTokenizer()
    config = lopa(model.config, 3, 0.9, window=64).config
    ids = [tokenizer.encode(prompt) for prompt in PROMPTS[:2]]
    for mask in ("block_causal", "full"):
        native = Decoder(model, config, mask=mask).decode(ids)
        plain = evaluate.PlainDecoder(model, config, mask=mask).decode(ids)
        assert torch.equal(plain.tokens, native.tokens)


def test_the_model_solves_problems(model: TinyDLLM) -> None:
    """A floor far below the card's accuracy: it catches weights that do not fit the code."""
    chosen = problems("heldout", 8, 3)
    tokenizer = CharTokenizer()
    config = lopa(model.config, 2, 0.98).config
    decoded = Decoder(model, config).decode([tokenizer.encode(p.prompt) for p in chosen])
    correct, forwards, filled, written = judge(decoded.tokens, decoded.forwards, chosen)
    assert int(correct.sum()) >= 6
    assert float(filled.sum()) / float(forwards.sum()) > 2
    assert bool((written <= filled).all())


def test_decoder_needs_branches_and_window(model: TinyDLLM) -> None:
    config = replace(base_config(model.config), window=None)
    with pytest.raises(ValueError, match="expected branches and window"):
        Decoder(model, config)


def test_demo_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    arguments = ["--problems", "2", "--branches", "1", "3", "--json", str(path)]
    assert demo.main(arguments) == 0
    printed = capsys.readouterr().out
    for word in ("vanilla", "confidence", "LoPA K=3", "TPF", "lopa_step"):
        assert word in printed
    results = json.loads(path.read_text())["results"]
    assert results["vanilla"]["tpf"] == pytest.approx(1.0, abs=0.05)
    assert results["LoPA K=3"]["tpf"] > results["confidence"]["tpf"] > 1.5
    for row in results.values():
        parts = row["seconds_model"] + row["seconds_step"] + row["seconds_elsewhere"]
        assert parts == pytest.approx(row["seconds_total"])


def test_demo_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    assert demo.main(["--prompt", PROMPTS[0], "--branches", "4", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "anchor" in printed
    result = json.loads(path.read_text())["results"]
    positions = [p for entry in result["rounds"] for p in entry["positions"]]
    assert len(positions) == len(set(positions)) == sum(e["filled"] for e in result["rounds"])
    assert result["solution"].replace("\n", "") in printed.replace("\n", "")
    assert demo.main(["--prompt", "no such character: é"]) == 2


def test_bootstrap_interval_covers_the_ratio() -> None:
    numerator = torch.arange(1, 101)
    low, high = evaluate.bootstrap(numerator, torch.full((100,), 2))
    assert low < 25.25 < high
    assert evaluate.bootstrap(torch.ones(50), torch.ones(50)) == (1.0, 1.0)
