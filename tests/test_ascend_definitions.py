"""The definitions of the Ascend operators hold to the schemas of torch.ops.lopa."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from ascend_definitions import ASCEND_OPS, Definition, load
from operators import registered

import lopa_kernels  # noqa: F401

#: definition's type -> operator of torch.ops.lopa
SCHEMAS = {
    "LopaKvPrewrite": "kv_prewrite_",
    "LopaKvPrewriteDirect": "kv_prewrite_direct_",
    "LopaQkvPrewrite": "qkv_prewrite_",
    "LopaQkvPrewriteDirect": "qkv_prewrite_direct_",
    "LopaKvCommit": "kv_commit_",
    "LopaBranchAttention": "branch_attention_lse",
}


@pytest.fixture(scope="module")
def definitions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Definition]:
    return load(tmp_path_factory.mktemp("definitions"))


def test_operands_are_those_of_the_schema(definitions: dict[str, Definition]) -> None:
    assert set(SCHEMAS) <= set(definitions)
    assert set(SCHEMAS.values()) <= registered("lopa")
    for name, op in SCHEMAS.items():
        schema = getattr(torch.ops.lopa, op).default._schema
        tensors = {a.name: a for a in schema.arguments if "Tensor" in str(a.type)}
        definition = definitions[name]
        assert list(definition.inputs) == list(tensors), name
        for argument, operand in definition.inputs.items():
            optional = "Optional" in str(tensors[argument].type)
            # A status word is needed there: who has none gives some that nobody reads.
            assert operand["required"] != optional or argument == "status", (name, argument)
        written = [a.name for a in tensors.values() if a.alias_info and a.alias_info.is_write]
        in_place = [output for output in definition.outputs if output in definition.inputs]
        assert in_place == written, name


def test_every_operand_has_a_dtype_for_each_combination(
    definitions: dict[str, Definition],
) -> None:
    for definition in definitions.values():
        operands = [*definition.inputs.values(), *definition.outputs.values()]
        combinations = {len(operand["types"]) for operand in operands}
        assert len(combinations) == 1, definition.type
        assert {operand["formats"] for operand in operands} == combinations, definition.type
        for name in definition.outputs:
            if name in definition.inputs:
                types = definition.inputs[name]["types"]
                assert definition.outputs[name]["types"] == types, (definition.type, name)
        # A tensor that is not contiguous would reach the kernel as it is.
        assert all(operand["contiguous"] for operand in definition.inputs.values())


def test_processors(definitions: dict[str, Definition]) -> None:
    for definition in definitions.values():
        assert definition.configs == ("ascend910b", "ascend910_93"), definition.type


def test_a_kernel_takes_inputs_outputs_workspace_and_tiling(
    definitions: dict[str, Definition],
) -> None:
    entries = {}
    for source in ASCEND_OPS.glob("*/op_kernel/*.cpp"):
        found = re.search(r"__aicore__ void (\w+)\(([^)]*)\)", source.read_text())
        assert found is not None, source
        entries[found[1]] = [p.split()[-1].lower().replace("_", "") for p in found[2].split(",")]
    for definition in definitions.values():
        outputs = [f"{n}_out" if n in definition.inputs else n for n in definition.outputs]
        names = [*definition.inputs, *outputs, "workspace", "tiling"]
        # cacheLen in the kernel is cache_len here.
        expected = [name.replace("_", "") for name in names]
        assert entries[definition.kernel] == expected, definition.type


def test_every_operator_has_its_host_functions(definitions: dict[str, Definition]) -> None:
    host = "\n".join(path.read_text() for path in Path(ASCEND_OPS).glob("*/op_host/*.cpp"))
    for name in definitions:
        assert f"IMPL_OP_INFERSHAPE({name})" in host, name
        assert f"IMPL_OP_OPTILING({name})" in host, name


def test_the_package_builds_every_operator(definitions: dict[str, Definition]) -> None:
    listed = {}
    for line in (ASCEND_OPS / "CMakeLists.txt").read_text().splitlines():
        if line.startswith("lopa_kernel("):
            kind, room, file = line.removeprefix("lopa_kernel(").rstrip(")").split()
            listed[kind] = ASCEND_OPS / room / "op_kernel" / file
    assert set(listed) == set(definitions)
    for kind, path in listed.items():
        assert f"__aicore__ void {definitions[kind].kernel}(" in path.read_text(), kind


def test_kernels_include_their_own_folder_alone() -> None:
    """The package takes op_kernel along, and compiles from there."""
    for path in ASCEND_OPS.glob("*/op_kernel/*"):
        for name in re.findall(r'#include "([^"]+)"', path.read_text()):
            assert name == "kernel_operator.h" or (path.parent / name).exists(), path
            assert "/" not in name, path


def arguments(text: str) -> list[str]:
    """The arguments of a call, up to its closing parenthesis."""
    found, depth = [""], 0
    for character in text:
        if character == ")" and depth == 0:
            return [argument.strip() for argument in found]
        depth += (character in "({[") - (character in ")}]")
        if character == "," and depth == 0:
            found.append("")
        else:
            found[-1] += character
    raise AssertionError("no closing parenthesis")


def test_adapters_pass_inputs_attributes_and_outputs(definitions: dict[str, Definition]) -> None:
    """aclnn's order, in which what is written in place is among the inputs alone."""
    calls = {}
    for source in (ASCEND_OPS / "torch").glob("*.*"):
        text = source.read_text()
        for match in re.finditer(r'launch\("aclnn(\w+)", ', text):
            calls[match[1]] = arguments(text[match.end() :])
    assert set(calls) == set(definitions)
    for kind, passed in calls.items():
        definition = definitions[kind]
        outputs = [name for name in definition.outputs if name not in definition.inputs]
        names = [*definition.inputs, *definition.attributes, *outputs]
        assert len(passed) == len(names), kind
        for i, name in enumerate(definition.attributes, len(definition.inputs)):
            value = passed[i]
            assert not re.search(r"Operand|operand|of_sequences|words", value), (kind, name)
            assert ("bits_of(" in value) == name.endswith("_bits"), (kind, name)
