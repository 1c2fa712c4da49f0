"""Distillation of the tiny model, and the table of both models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from rich.console import Console

from examples.tiny_dllm import demo, distill, labels, table, table_report
from examples.tiny_dllm.data import MAX_PROMPT_CHARS, Pool
from examples.tiny_dllm.model import NAMED, TinyConfig, TinyDLLM, save_sharded, weights_of
from examples.tiny_dllm.problems import extract_answer, problems
from examples.tiny_dllm.tokenizer import CharTokenizer

CONFIG = TinyConfig(
    dim=32, layers=2, q_heads=2, kv_heads=1, head_dim=16, mlp_dim=48, max_new_tokens=192
)
SHORT = TinyConfig(
    dim=32, layers=1, q_heads=2, kv_heads=1, head_dim=16, mlp_dim=48, max_new_tokens=64
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pool_of(n: int, width: int = CONFIG.max_new_tokens) -> Pool:
    """Problems with the solutions they come with, cut to `width`."""
    tokenizer = CharTokenizer()
    made = problems("train", n, 0)
    prompt = torch.zeros(n, MAX_PROMPT_CHARS, dtype=torch.uint8)
    solution = torch.full((n, width), tokenizer.eos_id, dtype=torch.uint8)
    for row, problem in enumerate(made):
        ids = torch.tensor(tokenizer.encode(problem.prompt), dtype=torch.uint8)
        prompt[row, : len(ids)] = ids
        ids = torch.tensor(tokenizer.encode(problem.solution), dtype=torch.uint8)[: width - 1]
        solution[row, : len(ids)] = ids
    return Pool(prompt, (prompt != tokenizer.pad_id).sum(1), solution)


def saved_model(path: Path, config: TinyConfig, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    save_sharded(TinyDLLM(config), path)
    return path


@pytest.mark.parametrize("share", [(0.5, 0.5), (0.2, 1.0)])
def test_the_masks_are_complementary_and_block_wise(share: tuple[float, float]) -> None:
    generator = torch.Generator().manual_seed(3)
    size, blocks = 300, CONFIG.max_blocks
    noise = distill.draw_noise(size, CONFIG, generator, share)
    assert not (noise.first & noise.second).any()
    by_block = (noise.first | noise.second).view(size, blocks, -1)
    noised = by_block.all(-1)
    assert torch.equal(by_block.any(-1), noised)  # whole blocks, or nothing of them
    assert torch.equal(noise.after, ~(noise.first | noise.second))
    assert noised[:, 0].all()
    for row in range(20):
        for window in range(1, int(noise.windows.window[row].max()) + 1):
            inside = (noise.windows.window[row] == window).nonzero().flatten()
            assert noised[row, inside].tolist() == [True] + [False] * (len(inside) - 1)
            assert (noise.windows.start[row, inside] == inside[0]).all()
    counts = noise.first.view(size, blocks, -1).sum(-1) + noise.after.view(size, blocks, -1).sum(-1)
    assert torch.equal(counts, noise.windows.masked)
    assert noise.first.sum() / by_block.sum() == pytest.approx(sum(share) / 2, abs=0.02)
    assert set(noised.sum(1).tolist()) == set(range(1, blocks + 1))


@pytest.mark.parametrize("following", [False, True])
def test_a_pair_is_one_sample_under_both_masks(following: bool) -> None:
    pool = pool_of(8)
    generator = torch.Generator().manual_seed(5)
    batch, masked = distill.make_pair(pool, 6, CONFIG, generator, following=following)
    # The same draws again, to know the noise.
    generator.manual_seed(5)
    torch.randint(8, (6,), generator=generator)
    noise = distill.draw_noise(6, CONFIG, generator, (0.5, 0.5))
    length, block = CONFIG.max_new_tokens, CONFIG.block_size
    kept = length - block
    for half, own in ((slice(0, 6), noise.first), (slice(6, 12), noise.second)):
        noisy = batch.tokens[half, -length:]
        assert torch.equal(noisy == CONFIG.mask_id, own | noise.after)
        assert torch.equal(noisy[~(own | noise.after)], batch.target[half][~(own | noise.after)])
        finished = batch.tokens[half, MAX_PROMPT_CHARS : MAX_PROMPT_CHARS + kept]
        assert torch.equal(finished, batch.target[half, :kept])
        assert torch.equal(masked[half], own | noise.after if following else own)
    assert torch.equal(batch.target[:6], batch.target[6:])
    assert torch.equal(batch.attn_mask[:6], batch.attn_mask[6:])
    # A noised block sees the finished blocks before it, and neither its own nor later ones.
    see = batch.attn_mask[:6, -length::block, MAX_PROMPT_CHARS : MAX_PROMPT_CHARS + kept : block]
    start = noise.windows.start[:, :, None]
    assert torch.equal(see, (torch.arange(kept // block) < start))


def arguments(out: Path, weights: Path, *more: str) -> list[str]:
    return [
        *("--out", str(out), "--init", str(weights), "--device", "cpu", "--optimizer", "adamw"),
        *("--batch", "4", "--warmup", "1", "--log-every", "2", "--measure-every", "3"),
        *("--curve-problems", "2", "--curve-batch", "2", "--curve-branches", "2", *more),
    ]


def test_steps_lower_the_loss(tmp_path: Path) -> None:
    weights = saved_model(tmp_path / "weights", CONFIG)
    args = distill.parser().parse_args(
        arguments(tmp_path, weights, "--steps", "40", "--lr", "0.01", "--ema", "0.5")
    )
    distiller = distill.Distiller(args, CONFIG)
    pool = pool_of(16)
    before = TinyDLLM.load(weights).state_dict()
    assert all(torch.equal(v, before[k].cpu()) for k, v in distiller.model.state_dict().items())
    losses, rates = [], []
    for _ in range(40):
        rates.append(distiller.learning_rate())
        losses.append(float(distiller.distill_step(pool, log=True)))
    assert sum(losses[-4:]) / 4 < 0.8 * losses[0]
    assert distiller.statistics["ce"] < 0.8 * 4.6
    assert rates == sorted(rates, reverse=True)
    assert distiller.progress() == 1


def test_the_schedule_follows_the_time_limit(tmp_path: Path) -> None:
    weights = saved_model(tmp_path / "weights", SHORT)
    options = ("--steps", "1000", "--time-limit-s", "10", "--lr", "0.1")
    distiller = distill.Distiller(
        distill.parser().parse_args(arguments(tmp_path, weights, *options)), SHORT
    )
    distiller.step, distiller.seconds = 10, 5.0
    assert distiller.learning_rate() == pytest.approx(0.05)
    distiller.seconds = 11.0
    assert distiller.progress() == 1


def test_column_statistics() -> None:
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.9, 0.05, 0.05], [0.1, 0.1, 0.8]]]))
    found = distill.column_statistics(
        logits, torch.tensor([[0, 1, 2]]), torch.tensor([[True, True, False]])
    )
    nats = torch.tensor([0.5, 0.05]).log()
    assert found["ce"] == pytest.approx(float(-nats.mean()))
    assert found["right"] == 0.5
    assert found["entropy"] == pytest.approx(1.5 * torch.tensor(2.0).log().item(), rel=1e-5)


def test_distillation_from_labels_to_weights(tmp_path: Path) -> None:
    weights = saved_model(tmp_path / "weights", SHORT)
    ready = tmp_path / "labels.safetensors"
    labels.save_labels(labels.Labels(pool_of(5, SHORT.max_new_tokens), 6, 300), ready)
    again = labels.load_labels(ready)
    assert (again.decoded, again.forwards, len(again.pool)) == (6, 300, 5)
    out = tmp_path / "out"
    fixed = ("--labels-file", str(ready))
    distill.main(arguments(out, weights, *fixed, "--steps", "4"))
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "measured" in row] == [0, 3, 4]
    assert {"loss", "ce", "entropy", "right"} <= set(rows[1])
    assert set(rows[0]["measured"]) == {"entropy", "LoPA K=2"}
    first = TinyDLLM.load(out / "weights").state_dict()
    assert any(not torch.equal(v, first[k]) for k, v in TinyDLLM.load(weights).state_dict().items())
    assert (out / "curve.png").stat().st_size > 10_000
    text = (out / "distill.md").read_text()
    assert "6 training problems decoded" in text
    assert "5 (83.3%) solved and kept" in text
    distill.main(arguments(out, weights, *fixed, "--steps", "6", "--resume"))
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "measured" in row] == [0, 3, 4, 6]
    with pytest.raises(RuntimeError, match="solved none of 2 problems"):
        distill.main(arguments(tmp_path / "none", weights, "--labels", "2", "--label-batch", "2"))


def test_labels_are_solved_training_problems() -> None:
    teacher = labels.Teacher(tau_conf=0.9, chunk=2)
    told: list[tuple[int, int]] = []
    made = labels.make_labels(teacher, 3, report=lambda *n: told.append(n), time_limit_s=0)
    assert made.decoded == 2  # the time was over before the second chunk
    assert told == [(2, len(made.pool))]
    assert len(made.pool) > 0
    tokenizer = CharTokenizer()
    answers = {p.prompt: p.answer for p in problems("train", 2, labels.SEED)}
    for prompt, length, solution in zip(
        made.pool.prompt, made.pool.prompt_len, made.pool.solution, strict=True
    ):
        text = tokenizer.decode(prompt[:length].tolist())
        assert extract_answer(tokenizer.decode(solution.tolist())) == answers[text]
        assert int(solution[-1]) == tokenizer.eos_id
        assert tokenizer.mask_id not in solution


def test_wrong_and_endless_solutions_are_left_out() -> None:
    eos, mask = CharTokenizer.eos_id, CharTokenizer.mask_id
    tokens = torch.tensor([[7, eos, 9, mask], [7, eos, eos, mask], [7, 8, 9, 9], [8, 9, 9, eos]])
    kept, solution = labels.keep(tokens, torch.tensor([True, False, True, True]))
    assert kept.tolist() == [True, False, False, True]
    assert solution[kept].tolist() == [[7, eos, eos, eos], [8, 9, 9, eos]]


def made_row(model: str, method: str, tau: float, accuracy: float, tpf: float) -> table.Row:
    return {"model": model, "method": method, "tau": tau, "accuracy": accuracy, "tpf": tpf}


def test_thresholds_are_chosen_by_the_rule() -> None:
    rows = [
        made_row("m", "confidence", tau, accuracy, tpf)
        for tau, accuracy, tpf in [(0.8, 0.94, 9), (0.9, 0.95, 5), (0.95, 0.97, 4), (0.99, 1.0, 3)]
    ]
    assert table.choose(rows)["tau"] == 0.9
    assert table.choose(reversed(rows))["tau"] == 0.9
    assert table.choose([rows[0], made_row("m", "confidence", 0.7, 0.93, 11)])["tau"] == 0.8
    assert table.choose([rows[0], made_row("m", "confidence", 0.7, 0.94, 11)])["tau"] == 0.7


def table_arguments(out: Path, *models: Path, problems: int = 2) -> list[str]:
    return [
        *("--out", str(out), "--device", "cpu", "--models", *map(str, models)),
        *("--problems", str(problems), "--train-problems", "2", "--branches", "2", "8"),
        *("--tau", "0.02", "0.1", "--tau-entropy", "4.5"),
    ]


def test_table_is_written_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [saved_model(tmp_path / name, SHORT, seed) for seed, name in enumerate("ab")]
    out = tmp_path / "out"
    assert table.main(table_arguments(out, *models)) == 0
    printed = capsys.readouterr().out
    saved = json.loads((out / "table.json").read_text())
    methods = ["vanilla", "confidence", "entropy", "LoPA K=2", "LoPA K=8"]
    held_out = [r for r in saved["rows"] if r["split"] == "heldout" and r["change"] is None]
    assert {(r["model"], r["method"]) for r in held_out} == {
        (str(model), name) for model in models for name in methods
    }
    for row in held_out:
        if row["method"] != "vanilla":
            assert row["tau"] == saved["chosen"][row["model"]][row["method"]]["tau"]
        low, high = row["tpf_interval"]
        assert low <= row["tpf"] + 1e-9
        assert row["tpf"] <= high + 1e-9
    changed = [r for r in saved["rows"] if r["change"] is not None]
    assert len(changed) == 12
    assert {r["config"]["metric"] for r in changed} == {"neg_entropy", "prob", "margin"}
    assert {r["config"]["reduction"] for r in changed} == {"mean", "bottom", "group", "min"}
    assert {r["mask"] for r in changed} == {"block_causal", "full"}
    assert all(r["config"]["branches"] == 8 for r in changed)
    assert sum(r["split"] == "train" for r in saved["rows"]) == 2 * 7
    assert not any(entry["reached"] for entry in saved["chosen"][str(models[0])].values())
    assert (out / "table.png").stat().st_size > 10_000
    assert (out / "table.md").read_text() in printed
    assert printed.count("window: full") == 2

    calls: list[table.Job] = []
    real = table.measure

    def counted(job: table.Job, machine: table.Machine) -> table.Row:
        calls.append(job)
        return real(job, machine)

    monkeypatch.setattr(table, "measure", counted)
    (out / "table.md").unlink()
    assert table.main(table_arguments(out, *models)) == 0
    assert not calls
    assert (out / "table.md").exists()
    # Other weights under the same name are measured again, and nothing else is.
    saved_model(models[1], SHORT, seed=9)
    assert table.main([*table_arguments(out, *models), "--no-ablations"]) == 0
    assert {job.model for job in calls} == {str(models[1])}
    assert len(calls) == 7 + 5


def test_a_failed_row_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = saved_model(tmp_path / "a", SHORT)

    def measure(job: table.Job, machine: table.Machine) -> table.Row:
        if job.tau == 0.1:
            raise MemoryError("too large")
        row = made_row(job.model, job.method.name, job.tau or 0.0, 1.0, 2.0)
        return row | {
            "key": job.key("operators", "fp32"), "split": job.split, "change": job.change,
        }  # fmt: skip

    monkeypatch.setattr(table, "measure", measure)
    args = table.parse(table_arguments(tmp_path, weights))
    results = table.Results(tmp_path / "table.json")
    with (
        ThreadPoolExecutor(1) as pool,
        pytest.raises(RuntimeError, match="3 of 8 rows failed") as failure,
    ):
        table.Table(args, results, Console(stderr=True)).make(pool)  # type: ignore[arg-type]
    assert isinstance(failure.value.__cause__, MemoryError)
    assert len(table.Results(tmp_path / "table.json").rows) == 5
    assert "too large" in capsys.readouterr().err


def test_thresholds_that_miss_the_rule_are_marked() -> None:
    chosen = {"m": {"confidence": {"reached": False}, "entropy": {"reached": True}}}
    assert table_report.threshold(made_row("m", "confidence", 0.9, 0, 0), chosen) == "0.9 *"
    assert table_report.threshold(made_row("m", "entropy", 0.5, 0, 0), chosen) == "0.5 nats"


def test_models_by_name_and_the_rows_of_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_model(tmp_path / "student", SHORT)
    monkeypatch.setitem(NAMED, "distilled", tmp_path / "student")
    assert TinyDLLM.load("distilled").config == SHORT
    assert weights_of(None) == weights_of("base") == NAMED["base"]
    assert weights_of(tmp_path) == tmp_path
    results = tmp_path / "table.json"
    monkeypatch.setattr(demo, "TABLE", results)
    published = demo.distilled_methods(SHORT, 4)
    assert [m.config.tau_conf for m in published] == [-0.5, 0.9]
    results.write_text(
        json.dumps({"chosen": {"distilled": {"entropy": {"tau": 0.2}, "LoPA K=4": {"tau": 0.7}}}})
    )
    chosen = demo.distilled_methods(SHORT, 4)
    assert [m.name for m in chosen] == ["distilled, entropy", "distilled, LoPA K=4"]
    assert [m.config.tau_conf for m in chosen] == [-0.2, 0.7]
    assert chosen[1].config.branches == 4
