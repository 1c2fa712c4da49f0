"""Decodes a prompt with a published checkpoint: `python -m examples.dream.decode --help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch

from examples.dream.config import ModelConfig
from examples.dream.load import load
from examples.dream.round import Runner


class Tokenizer(NamedTuple):
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]


def _from_tokenizers(file: Path) -> Tokenizer | None:
    try:
        from tokenizers import Tokenizer as Fast  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return None
    fast: Any = Fast.from_file(str(file))
    return Tokenizer(lambda text: fast.encode(text).ids, fast.decode)


def _from_transformers(folder: Path, trust: bool, chat: bool) -> Tokenizer | None:
    try:
        from transformers import AutoTokenizer  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return None
    slow: Any = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust)

    def encode(text: str) -> list[int]:
        if chat:
            message = [{"role": "user", "content": text}]
            text = slow.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return list(slow(text).input_ids)

    return Tokenizer(encode, lambda ids: slow.decode(ids, skip_special_tokens=True))


def tokenizer(folder: Path, *, trust_remote_code: bool = False, chat: bool = False) -> Tokenizer:
    """The checkpoint's tokenizer, by `transformers` or, for a plain `tokenizer.json`, `tokenizers`.

    Raises:
        RuntimeError: neither library can read it; it says what is needed.
    """
    file = folder / "tokenizer.json"
    found = _from_transformers(folder, trust_remote_code, chat)
    if found is None and file.is_file() and not chat:
        found = _from_tokenizers(file)
    if found is None:
        raise RuntimeError(
            f"{folder}: no tokenizer: pip install transformers, or tokenizers where the folder "
            "has a tokenizer.json and --chat is not wanted"
        )
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m examples.dream.decode", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--lora", type=Path, help="folder of a LoRA adapter to merge (D2F)")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--chat", action="store_true", help="apply the chat template")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="let transformers run the checkpoint's own code (Dream's tokenizer needs it)",
    )
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--branches", type=int, default=4, help="K, anchor included")
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--mask", choices=("full", "block_causal"), default="full")
    parser.add_argument("--tau-conf", type=float, default=0.9)
    parser.add_argument("--tau-add", type=float, default=0.1)
    parser.add_argument("--tau-act", type=float, default=0.95)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def _run(args: argparse.Namespace) -> None:
    config = ModelConfig.from_file(args.model)
    text = tokenizer(args.model, trust_remote_code=args.trust_remote_code, chat=args.chat)
    prompt = text.encode(args.prompt)
    settings = config.decoding(
        max_new_tokens=args.max_new_tokens,
        block_size=args.block_size,
        branches=args.branches,
        window=args.window,
        tau_conf=args.tau_conf,
        tau_add=args.tau_add,
        tau_act=args.tau_act,
        temperature=args.temperature,
    )
    model = load(args.model, args.device, lora=args.lora)
    runner = Runner(
        model,
        settings,
        capacity=len(prompt) + args.max_new_tokens,
        mask=args.mask,
        compile=args.compile,
        seed=args.seed,
    )
    runner.prepare()
    start = perf_counter()
    decoded = runner.decode([prompt])
    seconds = perf_counter() - start
    ids = decoded.tokens[0].tolist()
    kept = [token for token in ids if token != config.mask_id]
    if config.eos_id in kept:
        kept = kept[: kept.index(config.eos_id)]
    rounds = int(decoded.rounds[0])
    print(text.decode(kept))
    print(
        f"{len(kept)} tokens in {rounds} passes ({len(kept) / rounds:.2f} a pass), {seconds:.2f} s",
        file=sys.stderr,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        _run(args)
    except (OSError, ValueError, RuntimeError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
