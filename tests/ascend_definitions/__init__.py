"""The operator definitions of ascend_ops as data: compiled against a recorder of CANN's OpDef."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ASCEND_OPS = HERE.parent.parent / "ascend_ops"


@dataclass(frozen=True)
class Definition:
    """One operator: its operands in order, by name."""

    type: str
    inputs: dict[str, dict[str, Any]]
    outputs: dict[str, dict[str, Any]]
    attributes: dict[str, dict[str, Any]]
    configs: tuple[str, ...]

    @property
    def kernel(self) -> str:
        """The name of the entry, that of the type in snake case."""
        return "".join(f"_{c.lower()}" if c.isupper() else c for c in self.type).lstrip("_")


def compiled(pattern: str, main: str, build: Path) -> Path:
    """A program of the sources of every room's op_host that `pattern` names, and `main`."""
    sources = sorted(ASCEND_OPS.glob(f"*/op_host/{pattern}"))
    program = build / main.removesuffix(".cpp")
    compiler = os.environ.get("CXX", "c++")
    command = [compiler, "-std=c++17", "-O0", f"-I{HERE}", *map(str, sources)]
    subprocess.run([*command, str(HERE / main), "-o", str(program)], check=True)
    return program


def load(build: Path) -> dict[str, Definition]:
    """Compiles the definitions in the directory `build`, and reads them: type -> definition."""
    program = compiled("*_def.cpp", "main.cpp", build)
    printed = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    found = {}
    for op in json.loads(printed)["operators"]:
        named = [{p["name"]: p for p in op[key]} for key in ("inputs", "outputs", "attributes")]
        found[op["type"]] = Definition(op["type"], *named, configs=tuple(op["configs"]))
    return found
