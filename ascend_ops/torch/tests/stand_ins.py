"""Stand-ins for the CANN libraries that torch_npu links, so that it can be imported without CANN.

Every symbol that torch_npu's libraries want from CANN is there and does nothing: a function
returns 0. That is enough to import torch_npu and to convert graphs; nothing can run.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _needed(library: Path) -> set[str]:
    return set(re.findall(r"NEEDED.*\[(.+)\]", _run("readelf", "-d", str(library))))


def _symbols(library: Path, which: str) -> set[str]:
    lines = _run("nm", "-D", f"--{which}-only", str(library)).splitlines()
    return {line.split()[-1] for line in lines if " w " not in line and " v " not in line}


def make(package: Path, torch_libraries: Path, out: Path) -> list[Path]:
    """Makes what neither `package` (torch_npu), nor torch, nor the system has."""
    libraries = sorted(package.rglob("*.so"))
    # Versioned symbols are those of the system's libraries.
    wanted = {s for lib in libraries for s in _symbols(lib, "undefined") if "@" not in s}
    for library in (*libraries, *torch_libraries.glob("*.so*")):
        wanted -= {symbol.partition("@")[0] for symbol in _symbols(library, "defined")}
    wanted = {symbol for symbol in wanted if not symbol.startswith(("Py", "_Py"))}
    known = {lib.name for lib in (*libraries, *torch_libraries.glob("*.so*"))}
    cache = _run("/sbin/ldconfig", "-p")
    names = sorted({name for lib in libraries for name in _needed(lib)} - known)
    names = [name for name in names if f"\t{name} " not in cache]

    out.mkdir(parents=True, exist_ok=True)
    source = out / "stand_ins.S"
    text = [".text", "nothing: xor %eax, %eax", "ret"]
    for symbol in sorted(wanted):
        text.append(f".globl {symbol}")
        if symbol.startswith("_ZT"):  # vtables and type information
            text += [f".data\n.balign 16\n.type {symbol}, @object", f"{symbol}: .zero 256\n.text"]
        else:
            text += [f".type {symbol}, @function", f"{symbol} = nothing"]
    text.append('.section .note.GNU-stack,"",@progbits')
    source.write_text("\n".join(text) + "\n")
    # One library has the symbols; the others are its aliases.
    made = []
    empty = out / "empty.c"
    empty.write_text("")
    for i, name in enumerate(names):
        target = out / name
        code = source if i == 0 else empty
        _run("gcc", "-shared", "-o", str(target), str(code), f"-Wl,-soname,{name}")
        made.append(target)
    return made


if __name__ == "__main__":
    for path in make(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])):
        print(path)
