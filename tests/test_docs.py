"""Every Python block of the documents runs as it stands, on every backend."""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from targets import KERNELS, Target, over

import lopa_kernels as lk
from lopa_kernels import _dispatch

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "docs/operators.md", "docs/distributed.md")


def blocks() -> list[tuple[str, str]]:
    """(document:line, code), the code moved down so that a traceback names the document's line."""
    found = []
    for name in DOCUMENTS:
        text = (ROOT / name).read_text()
        for match in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            line = text.count("\n", 0, match.start(1))
            found.append((f"{name}:{line + 1}", "\n" * line + match[1]))
    return found


BLOCKS = blocks()


@over(KERNELS)
@pytest.mark.parametrize(("place", "code"), BLOCKS, ids=[place for place, _ in BLOCKS])
def test_block_runs(place: str, code: str, target: Target) -> None:
    """On the CPU with no setting at all; elsewhere by PyTorch's default device, and the default
    backend where that is not what the device's tensors choose."""
    op = "branch_attention"
    if op in code and _dispatch.why_absent(target.backend, op) is not None:
        pytest.skip(f"no {op} of {target}")
    if "gloo" in code and (target.gpu or target.backend == "triton"):
        pytest.skip("its process group is of CPUs")
    if target.interpreted and "for _ in range" in code:
        pytest.skip("a whole decode takes minutes")
    with ExitStack() as settings:
        if target.gpu:
            settings.enter_context(torch.device(target.device))
        if target.backend == "triton":
            if "numpy" in code and target.gpu:
                pytest.skip("NumPy's arrays are on the CPU")
            settings.enter_context(lk.use_backend("triton"))
        exec(compile(code, place.partition(":")[0], "exec"), {"__name__": "document"})


def test_every_document_has_examples() -> None:
    assert {place.partition(":")[0] for place, _ in BLOCKS} == set(DOCUMENTS)


@pytest.mark.parametrize("name", [n for n in lk.__all__ if n[0].islower()])
def test_operators_md_names_every_public_function(name: str) -> None:
    assert re.search(rf"\b{name}\b", (ROOT / "docs/operators.md").read_text())


def test_links_lead_somewhere() -> None:
    for name in (*DOCUMENTS, "CONTRIBUTING.md"):
        document = ROOT / name
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
            assert (document.parent / target).exists(), f"{name}: {target}"
    text = (ROOT / "docs/operators.md").read_text()
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= anchors
