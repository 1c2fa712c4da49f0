"""The teacher's own solutions of training problems, as labels for distillation.

Each chunk of problems follows from a seed and its number, so the labels do not depend on how many
processes decode them. A solution is kept if its answer is right and its text ends.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load, save, save_file
from torch import Tensor

from examples.tiny_dllm.data import Pool
from examples.tiny_dllm.evaluate import decoder_of, default_precision
from examples.tiny_dllm.methods import judge, lopa
from examples.tiny_dllm.model import TinyDLLM
from examples.tiny_dllm.problems import MAX_PROMPT_CHARS, Problem, problems
from examples.tiny_dllm.tokenizer import CharTokenizer

#: apart from the seeds of the training pool and of the problems that choose thresholds
SEED = 7_000_003


@dataclass(frozen=True)
class Teacher:
    """Which model decodes, and how."""

    weights: str | None = None
    device: str = "cpu"
    tau_conf: float = 0.99
    chunk: int = 2048
    """Problems decoded together."""
    seed: int = 0
    decoder: str = "operators"


@dataclass(frozen=True)
class Labels:
    """Labelled problems, and what was decoded for them."""

    pool: Pool
    decoded: int
    """Problems, of which the pool holds those solved."""
    forwards: int


def chunk_problems(teacher: Teacher, index: int) -> list[Problem]:
    return problems("train", teacher.chunk, SEED + teacher.seed * 1_000_003 + index)


def keep(tokens: Tensor, correct: Tensor) -> tuple[Tensor, Tensor]:
    """The solutions worth learning from.

    Returns:
        bool [n]: solved, and with an end of text; uint8 [n, G]: `tokens` with all that follows
        the end of text replaced by it (blocks that were never opened hold masks).
    """
    ended = (tokens == CharTokenizer.eos_id).int().cummax(1).values.bool()
    return correct & ended[:, -1], tokens.masked_fill(ended, CharTokenizer.eos_id).to(torch.uint8)


def decode_chunk(model: TinyDLLM, teacher: Teacher, index: int) -> Labels:
    """Decodes and filters one chunk of problems."""
    tokenizer = CharTokenizer()
    made = chunk_problems(teacher, index)
    ids = [tokenizer.encode(problem.prompt) for problem in made]
    config = lopa(model.config, 1, teacher.tau_conf).config
    decoder = decoder_of(teacher.decoder, model, config, default_precision(teacher.device))
    decoded = decoder.decode(ids)
    correct, forwards, _, _ = judge(decoded.tokens, decoded.forwards, made)
    kept, solution = keep(decoded.tokens, correct)
    prompt = torch.full((len(ids), MAX_PROMPT_CHARS), tokenizer.pad_id, dtype=torch.uint8)
    for row, own in zip(prompt, ids, strict=True):
        row[: len(own)] = torch.tensor(own, dtype=torch.uint8)
    length = torch.tensor([len(own) for own in ids])
    pool = Pool(prompt[kept], length[kept], solution[kept])
    return Labels(pool, len(made), int(forwards.sum()))


def _packed(labels: Labels) -> dict[str, Tensor]:
    pool = labels.pool
    counts = torch.tensor([labels.decoded, labels.forwards])
    return {
        "prompt": pool.prompt,
        "prompt_len": pool.prompt_len,
        "solution": pool.solution,
        "decoded_forwards": counts,
    }


def _unpacked(content: bytes) -> Labels:
    saved = load(content)
    decoded, forwards = saved.pop("decoded_forwards").tolist()
    return Labels(Pool(**saved), decoded, forwards)


_model: TinyDLLM | None = None


def _start(teacher: Teacher) -> None:
    global _model
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = True
    _model = TinyDLLM.load(teacher.weights, device=teacher.device)


def _work(teacher: Teacher, index: int) -> tuple[int, bytes]:
    assert _model is not None
    # Bytes, since tensors would travel through shared memory, which containers keep small.
    return index, save(_packed(decode_chunk(_model, teacher, index)))


def _join(parts: list[Labels]) -> Labels:
    pools = [part.pool for part in parts]
    pool = Pool(
        torch.cat([pool.prompt for pool in pools]),
        torch.cat([pool.prompt_len for pool in pools]),
        torch.cat([pool.solution for pool in pools]),
    )
    return Labels(pool, sum(p.decoded for p in parts), sum(p.forwards for p in parts))


def _decoded_chunks(
    teacher: Teacher, chunks: int, workers: int, deadline: float
) -> Iterator[tuple[int, Labels]]:
    """Chunks as they are finished; none is begun after `deadline`, but each worker's first."""
    if workers == 1:
        _start(teacher)
        for index in range(chunks):
            if index and time.monotonic() > deadline:
                return
            assert _model is not None
            yield index, decode_chunk(_model, teacher, index)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start, (teacher,)) as executor:
        begun = workers
        running = {executor.submit(_work, teacher, index) for index in range(begun)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                index, content = future.result()
                yield index, _unpacked(content)
                if begun < chunks and time.monotonic() < deadline:
                    running.add(executor.submit(_work, teacher, begun))
                    begun += 1


def make_labels(
    teacher: Teacher,
    n: int,
    *,
    workers: int = 1,
    time_limit_s: float = float("inf"),
    report: Callable[[int, int], None] | None = None,
) -> Labels:
    """Decodes at least `n` training problems, or as many as the time allows.

    Args:
        teacher: the model and its settings.
        n: problems to decode; those not solved are left out, so that the pool is smaller.
        workers: processes, each with a model of its own on the teacher's device.
        time_limit_s: no chunk is begun after it.
        report: is told how many problems were decoded and how many kept.
    """
    deadline = time.monotonic() + time_limit_s
    chunks = max(1, -(-n // teacher.chunk))
    parts: dict[int, Labels] = {}
    for index, part in _decoded_chunks(teacher, chunks, min(workers, chunks), deadline):
        parts[index] = part
        if report is not None:
            report(sum(p.decoded for p in parts.values()), sum(len(p.pool) for p in parts.values()))
    return _join([parts[index] for index in sorted(parts)])


def save_labels(labels: Labels, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(_packed(labels), path)


def load_labels(path: Path) -> Labels:
    return _unpacked(path.read_bytes())
