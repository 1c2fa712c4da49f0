"""The tiny model's problems, tokenizer, architecture, training layout and resume."""

import hashlib
import json
import re
from collections.abc import Iterator

import pytest
import torch

from examples.tiny_dllm import data, model, oracle, problems, tokenizer, train

SHAPE = {
    "dim": 32,
    "layers": 2,
    "q_heads": 4,
    "kv_heads": 2,
    "head_dim": 8,
    "mlp_dim": 48,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Shapes this small are slower on several threads, and much slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny() -> model.TinyDLLM:
    torch.manual_seed(0)
    return model.TinyDLLM(model.TinyConfig(**SHAPE)).double().eval()


def keys_of(split: problems.Split, n: int, seed: int) -> set[tuple[str, tuple[int, ...]]]:
    rng = problems.random.Random(seed)
    return {
        (template.key, tuple(numbers.values()))
        for template, numbers, _ in (problems._make(rng, split) for _ in range(n))
    }


def test_splits_are_disjoint_by_their_key() -> None:
    train_keys, held_keys = keys_of("train", 4000, 1), keys_of("heldout", 4000, 1)
    assert len(train_keys) > 2000
    assert len(held_keys) > 2000
    assert not train_keys & held_keys
    assert {problems.split_of(*key) for key in train_keys} == {"train"}
    assert {problems.split_of(*key) for key in held_keys} == {"heldout"}


def test_problems_repeat_from_a_seed_and_extend() -> None:
    assert problems.problems("train", 50, 5) == problems.problems("train", 80, 5)[:50]
    assert problems.problems("train", 50, 5) != problems.problems("train", 50, 6)
    assert problems.problems("heldout", 0, 5) == []


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_solutions_fit_and_their_arithmetic_is_right(split: problems.Split) -> None:
    equation = re.compile(r"(\d+) ([-+*]) (\d+)(?: =|, or) (\d+)")
    equations = 0
    for p in problems.problems(split, 3000, 7):
        assert 0 < len(p.prompt) <= problems.MAX_PROMPT_CHARS
        assert 0 < len(p.solution) <= problems.MAX_SOLUTION_CHARS
        assert problems.extract_answer(p.solution) == p.answer
        assert problems.MIN_VALUE <= p.answer <= problems.MAX_VALUE
        assert 3 <= p.solution.count(".") <= 5
        for left, op, right, result in equation.findall(p.solution):
            assert problems._APPLY[op](int(left), int(right)) == int(result)
            equations += 1
    assert equations > 1000


def test_every_template_appears_and_wordings_vary() -> None:
    rng = problems.random.Random(0)
    made = [problems._make(rng, "train") for _ in range(3000)]
    assert {template.key for template, _, _ in made} == {t.key for t in problems.TEMPLATES}
    assert all(len(set(forms)) >= 8 for forms in problems.FORMS.values())
    assert len({p.solution.split(".")[-2].split()[0] for _, _, p in made}) >= 6
    twice = next(t for t in problems.TEMPLATES if t.key == "twice")
    steps = problems.evaluate(twice, {"a": 10, "b": 5, "c": 3})
    assert steps == [("*", 2, 10, 20), ("+", 10, 20, 30), ("+", 30, 5, 35), ("-", 35, 3, 32)]
    assert problems.evaluate(twice, {"a": 30, "b": 30, "c": 3}) is None
    wordings = {problems._word(rng, steps, "pages", 32) for _ in range(200)}
    assert len(wordings) == 200
    assert len({len(w) for w in wordings}) > 40


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3 + 4 = 7. So the answer is 7.", 7),
        ("the rest is 9 - 4, or 5.", 5),
        ("Answer: -12", -12),
        ("3-4", 4),
        ("no number", None),
        ("", None),
    ],
)
def test_extract_answer(text: str, answer: int | None) -> None:
    assert problems.extract_answer(text) == answer


def test_problems_rejects_bad_arguments() -> None:
    with pytest.raises(ValueError, match="split: expected 'train' or 'heldout', got 'test'"):
        problems.problems("test", 1, 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n: expected at least 0, got -1"):
        problems.problems("train", -1, 0)


def test_tokenizer_round_trip_and_specials() -> None:
    tok = tokenizer.CharTokenizer()
    for p in problems.problems("train", 300, 2):
        text = p.prompt + p.solution
        assert tok.decode(tok.encode(text)) == text
    assert len(tok.vocabulary()) <= tok.vocab_size
    assert tok.vocabulary()[tok.mask_id] == "<mask>"
    ids = tok.encode("ab")
    assert tok.decode([*ids, tok.mask_id, tok.pad_id, tok.eos_id, *ids]) == "ab_"
    assert tok.decode([tok.eos_id, *ids], stop_at_eos=False) == "ab"
    assert tok.piece(tok.vocab_size - 1) == "\N{REPLACEMENT CHARACTER}"
    with pytest.raises(ValueError, match="character 'ß' is not in the vocabulary"):
        tok.encode("aß")
    with pytest.raises(ValueError, match="each character once"):
        tokenizer.CharTokenizer("aba")


def test_rope_depends_on_distance_only(tiny: model.TinyDLLM) -> None:
    table = model.rope_table(tiny.config)
    assert table.dtype == torch.float32
    assert table.shape == (tiny.config.max_pos, tiny.config.head_dim)
    q, k = torch.randn(2, 1, tiny.config.head_dim)

    def product(i: int, j: int) -> torch.Tensor:
        return (model.apply_rope(q, table[i]) * model.apply_rope(k, table[j])).sum()

    torch.testing.assert_close(product(3, 10), product(203, 210), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(product(3, 10), product(3, 11), rtol=1e-3)
    # At position p the first pair turns by p radians.
    turned = model.apply_rope(torch.eye(tiny.config.head_dim)[0].unsqueeze(0), table[2])
    expected = torch.zeros(1, tiny.config.head_dim)
    expected[0, 0], expected[0, tiny.config.head_dim // 2] = (
        torch.tensor(2.0).cos(),
        torch.tensor(2.0).sin(),
    )
    torch.testing.assert_close(turned, expected)


def test_block_parts_rebuild_its_forward(tiny: model.TinyDLLM) -> None:
    block, c = tiny.blocks[0], tiny.config
    x = torch.randn(2, 9, c.dim, dtype=torch.float64)
    cos_sin = tiny.cos_sin[:9].expand(2, -1, -1)
    packed = block.qkv(block.attn_norm(x))
    q, k, v = block.split_qkv(packed)
    assert q.shape == (2, 9, c.q_heads, c.head_dim)
    assert k.shape == v.shape == (2, 9, c.kv_heads, c.head_dim)
    assert torch.equal(v.flatten(-2), packed[..., -c.kv_heads * c.head_dim :])
    q, k = model.apply_rope(q, cos_sin), model.apply_rope(k, cos_sin)
    out = torch.empty_like(q)
    for head in range(c.q_heads):
        shared = head // (c.q_heads // c.kv_heads)
        scores = q[:, :, head] @ k[:, :, shared].transpose(1, 2) * c.head_dim**-0.5
        out[:, :, head] = scores.softmax(-1) @ v[:, :, shared]
    y = x + block.o(out.flatten(2))
    y = y + block.mlp(block.mlp_norm(y))
    torch.testing.assert_close(block(x, cos_sin, None), y, rtol=1e-5, atol=1e-6)


def test_config_rejects_impossible_shapes() -> None:
    with pytest.raises(ValueError, match=r"q_heads: expected a multiple of kv_heads \(2\), got 5"):
        model.TinyConfig(q_heads=5)
    with pytest.raises(ValueError, match="head_dim: expected an even number, got 7"):
        model.TinyConfig(head_dim=7)
    with pytest.raises(ValueError, match="max_new_tokens: expected a multiple of block_size"):
        model.TinyConfig(max_new_tokens=100)


def test_weights_survive_saving_in_shards(tmp_path) -> None:
    torch.manual_seed(1)
    net = model.TinyDLLM(model.TinyConfig(**SHAPE))
    files = model.save_sharded(net, tmp_path, dtype=torch.float32, max_bytes=20_000)
    shards = [f for f in files if f.suffix == ".safetensors"]
    assert len(shards) > 2
    assert all(f.stat().st_size < 22_000 for f in shards)
    loaded = model.TinyDLLM.load(tmp_path)
    assert loaded.config == net.config
    assert not loaded.training
    for name, weight in net.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name
    vocabulary = json.loads((tmp_path / "config.json").read_text())["vocabulary"]
    assert vocabulary == tokenizer.CharTokenizer().vocabulary()
    half = model.TinyDLLM.load(tmp_path, dtype=torch.bfloat16)
    assert half.head.weight.dtype == torch.bfloat16
    assert half.cos_sin.dtype == torch.float32
    with pytest.raises(ValueError, match=r"max_bytes: embed\.weight takes"):
        model.save_sharded(net, tmp_path, max_bytes=100)
    with pytest.raises(FileNotFoundError):
        model.TinyDLLM.load(tmp_path / "absent")


def test_pool_holds_the_problems_and_ignores_the_number_of_workers(monkeypatch) -> None:
    monkeypatch.setattr(data, "CHUNK", 40)
    pool = data.build_pool(100, 9, workers=1)
    assert len(pool) == 120
    tok = tokenizer.CharTokenizer()
    for row, p in enumerate(problems.problems("train", 40, 9 * 1_000_003)):
        length = int(pool.prompt_len[row])
        assert tok.decode(pool.prompt[row, :length].tolist()) == p.prompt
        assert tok.decode(pool.solution[row].tolist()) == p.solution
        assert pool.solution[row, len(p.solution) :].eq(tok.eos_id).all()
    shared = data.build_pool(100, 9, workers=2)
    assert torch.equal(pool.prompt, shared.prompt)
    assert torch.equal(pool.solution, shared.solution)


def test_windows_partition_the_blocks_with_rising_noise() -> None:
    config = model.TinyConfig()
    drawn = data.draw_windows(4000, config, torch.Generator().manual_seed(0))
    steps = drawn.window.diff(dim=1)
    assert steps.min() == 0
    assert steps.max() == 1
    assert torch.equal(
        drawn.start[:, 1:][steps == 1], torch.arange(1, 6).expand(4000, 5)[steps == 1]
    )
    assert torch.equal(drawn.start[:, 1:][steps == 0], drawn.start[:, :-1][steps == 0])
    sizes = torch.stack([(drawn.start == b).sum(1) for b in range(6)], 1)
    assert set(sizes.unique().tolist()) == {0, 1, 2, 3, 4, 5, 6}
    assert drawn.masked.min() == 0
    assert drawn.masked.max() == config.block_size
    rising = (drawn.masked.diff(dim=1) >= 0)[steps == 0].float().mean()
    assert 0.93 < rising < 1


def test_masked_columns_have_the_drawn_counts() -> None:
    config = model.TinyConfig()
    pool = data.build_pool(1, 0, workers=1)
    gen = torch.Generator().manual_seed(0)
    wanted = torch.randint(0, 33, (500, 6), generator=gen)
    solution = pool.solution[:500].long()
    masked = data.draw_masked(wanted, solution, config, gen)
    assert torch.equal(masked.view(500, 6, 32).sum(-1), wanted)


def in_training_layout(
    net: model.TinyDLLM, pool: data.Pool, windows: data.Windows, full: bool, seen: bool, noisy
) -> torch.Tensor:
    """Logits [B, 192, V] of the noisy columns as a training step computes them."""
    batch = len(pool)
    ones = torch.ones(batch, dtype=torch.bool)
    mask = data.training_mask(pool.prompt_len, windows, ones & full, ones & seen, net.config)
    generated = pool.prompt_len[:, None] + torch.arange(192)
    columns = torch.arange(problems.MAX_PROMPT_CHARS).expand(batch, -1)
    tokens = torch.cat([pool.prompt.long(), pool.solution[:, :160].long(), noisy], 1)
    positions = torch.cat([columns, generated[:, :160], generated], 1)
    return net(tokens, positions, mask)[:, -192:]


@pytest.mark.parametrize("full", [False, True])
def test_training_layout_equals_decoding(tiny: model.TinyDLLM, full: bool) -> None:
    """A window's logits in a training batch are those of the decoder in the same state."""
    config = tiny.config
    whole = data.build_pool(1, 3, workers=1)
    pool = data.Pool(whole.prompt[:5], whole.prompt_len[:5], whole.solution[:5])
    gen = torch.Generator().manual_seed(1)
    windows = data.draw_windows(5, config, gen)
    masked = data.draw_masked(windows.masked, pool.solution, config, gen)
    noisy = pool.solution.long().masked_fill(masked, config.mask_id)
    got = in_training_layout(tiny, pool, windows, full, False, noisy)
    width = int(pool.prompt_len.max())
    block = torch.arange(6).repeat_interleave(32)
    for first in range(6):
        rows = (windows.start == first).any(1).nonzero().squeeze(1)
        if not len(rows):
            continue
        inside = windows.start[rows] == first
        opened = first + inside.sum(1)
        tokens = torch.where(block < first, pool.solution[rows].long(), noisy[rows])
        columns = int(opened.max()) * 32
        mask = oracle.decoding_mask(
            pool.prompt_len[rows], width, opened, torch.full_like(opened, first), full, config
        )
        positions = torch.cat(
            [
                torch.arange(width).expand(len(rows), -1),
                pool.prompt_len[rows, None] + torch.arange(columns),
            ],
            1,
        )
        prompt = pool.prompt[rows, :width].long()
        logits = tiny(torch.cat([prompt, tokens[:, :columns]], 1), positions, mask)[:, width:]
        compare = inside.repeat_interleave(32, 1)[:, :columns]
        torch.testing.assert_close(
            logits[compare], got[rows][:, :columns][compare], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(("full", "seen"), [(False, False), (True, False), (True, True)])
def test_masked_tokens_do_not_leak(tiny: model.TinyDLLM, full: bool, seen: bool) -> None:
    """What a window has to predict, and every block after it, changes nothing it sees."""
    config = tiny.config
    whole = data.build_pool(1, 4, workers=1)
    pool = data.Pool(whole.prompt[:8], whole.prompt_len[:8], whole.solution[:8])
    gen = torch.Generator().manual_seed(2)
    windows = data.draw_windows(8, config, gen)
    masked = data.draw_masked(windows.masked, pool.solution, config, gen)
    noisy = pool.solution.long().masked_fill(masked, config.mask_id)
    before = in_training_layout(tiny, pool, windows, full, seen, noisy)
    start = windows.start.repeat_interleave(32, 1)
    block = torch.arange(6).repeat_interleave(32)
    changed = 0
    for first in range(6):
        other = torch.where(block >= first, (pool.solution + 7) % 60 + 3, pool.solution)
        moved = data.Pool(pool.prompt, pool.prompt_len, other)
        after = in_training_layout(tiny, moved, windows, full, seen, noisy)
        same = start <= first
        assert torch.equal(before[same], after[same])
        changed += int((before[~same] != after[~same]).any(-1).sum())
    assert changed > 0


def test_prompt_is_encoded_alone(tiny: model.TinyDLLM) -> None:
    """A prompt's hidden states, and so its cache, do not depend on what follows."""
    prompt, prompt_len = oracle.encode_prompts(["Tom has 3 pens.", "Mia has 12 marbles. And?"])
    opened, first = torch.tensor([2, 1]), torch.tensor([0, 0])
    mask = oracle.decoding_mask(prompt_len, prompt.shape[1], opened, first, True, tiny.config)
    tokens = torch.cat([prompt, torch.randint(3, 60, (2, 64))], 1)
    hidden = tiny.hidden(tokens, attn_mask=mask)
    for row in range(2):
        alone = tiny.hidden(prompt[row : row + 1, : prompt_len[row]])
        torch.testing.assert_close(hidden[row, : prompt_len[row]], alone[0], rtol=1e-4, atol=1e-5)


def test_vanilla_decoding_fills_one_column_a_pass(tiny: model.TinyDLLM) -> None:
    prompts = [p.prompt for p in problems.problems("heldout", 3, 0)]
    decoded = oracle.decode(tiny, prompts, tau_conf=None)
    filled = (decoded.tokens != tiny.config.mask_id).sum(1)
    # An untrained model may predict the mask itself, which leaves the column open.
    assert torch.all(filled <= decoded.forwards)
    assert torch.all(filled % tiny.config.block_size == 0)


def test_held_out_problems_are_those_of_the_card() -> None:
    """The card's accuracy is of these problems; another generator needs another measurement."""
    lines = "\n".join(f"{p.prompt} {p.solution}" for p in problems.problems("heldout", 1000, 0))
    digest = hashlib.sha256(lines.encode()).hexdigest()
    assert digest == "5643542486583199c5098580d36864843a6886923576a94a381e6f0010550d8b"


def test_shipped_weights_know_the_arithmetic() -> None:
    """With the rest of the text in place, the shipped model restores the numbers in it."""
    net = model.TinyDLLM.load()
    assert sum(p.numel() for p in net.parameters()) == 11_089_536
    tok = tokenizer.CharTokenizer()
    digits = torch.tensor(tok.encode("0123456789"))
    right = total = 0
    result = re.compile(r"(?:=|, or) (\d+)")
    chosen = [p for p in problems.problems("heldout", 60, 1) if len(result.findall(p.solution)) > 1]
    for p in chosen[:8]:
        prompt, solution = tok.encode(p.prompt), torch.tensor(tok.encode(p.solution))
        pad = torch.full((-len(solution) % 32,), tok.eos_id)
        target = torch.cat([solution, pad])
        opened = torch.tensor([len(target) // 32])
        mask = oracle.decoding_mask(
            torch.tensor([len(prompt)]), len(prompt), opened, opened * 0, False, net.config
        )
        # The number after "=" or "or" can be told from the two before it.
        hidden = torch.zeros(len(target), dtype=torch.bool)
        for found in result.finditer(p.solution):
            hidden[found.start(1) : found.end(1)] = True
        tokens = torch.cat([torch.tensor(prompt), target.masked_fill(hidden, tok.mask_id)])
        with torch.inference_mode():
            logits = net(tokens.unsqueeze(0), attn_mask=mask)[0, len(prompt) :]
        right += int((logits.argmax(-1)[hidden] == target[hidden]).sum())
        total += int(hidden.sum())
        assert torch.isin(target[hidden], digits).all()
    assert total > 20
    assert right / total > 0.95


def arguments(out, *more: str) -> list[str]:
    return [
        *("--out", str(out), "--device", "cpu", "--config", json.dumps(SHAPE), "--batch", "4"),
        *("--pool", "1", "--workers", "1", "--warmup", "2", "--log-every", "1", *more),
    ]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resumed_training_equals_uninterrupted(tmp_path, optimizer: str) -> None:
    chosen = ("--steps", "6", "--optimizer", optimizer)
    train.main(arguments(tmp_path / "whole", *chosen))
    stopped = train.parser().parse_args(arguments(tmp_path / "parts", *chosen))
    trainer = train.Trainer(stopped, model.TinyConfig(**SHAPE))
    pool = data.build_pool(1, stopped.seed, workers=1)
    for _ in range(3):
        trainer.train_step(pool)
    trainer.save(tmp_path / "parts" / train.CHECKPOINT)
    train.main(arguments(tmp_path / "parts", *chosen, "--resume"))
    whole, parts = (
        torch.load(tmp_path / name / train.CHECKPOINT, weights_only=True)
        for name in ("whole", "parts")
    )
    assert whole["step"] == parts["step"] == 6
    for part in ("model", "ema"):
        for name, weight in whole[part].items():
            assert torch.equal(weight, parts[part][name]), name
    lines = (tmp_path / "whole" / "log.jsonl").read_text().splitlines()
    resumed = (tmp_path / "parts" / "log.jsonl").read_text().splitlines()
    assert [json.loads(s)["loss"] for s in lines[3:]] == [json.loads(s)["loss"] for s in resumed]
    with pytest.raises(ValueError, match="has seed 0, not 1"):
        train.main(arguments(tmp_path / "parts", *chosen, "--resume", "--seed", "1"))


def test_training_learns(tmp_path) -> None:
    train.main(arguments(tmp_path, "--steps", "40", "--lr", "0.02"))
    rows = [json.loads(s) for s in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows[0]["nats"] > 4
    assert sum(row["nats"] for row in rows[-5:]) / 5 < 3.2
    scores = tmp_path / "scores.json"
    command = ["--eval", "--device", "cpu", "--weights", str(tmp_path / "weights")]
    train.main([*command, "--problems", "1", "--json", str(scores)])
    methods = [row["method"] for row in json.loads(scores.read_text())]
    assert methods == ["vanilla", "confidence 0.9, full", "confidence 0.9, causal"]
