"""torchair without CANN: what would come from the installed package of custom operators is read
from its definitions, and a graph is taken before it would be compiled for a device.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_npu  # noqa: F401
import torchair
from torchair._ge_concrete_graph import fx2ge_converter
from torchair.core import _torchair

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from ascend_definitions import Definition, load  # noqa: E402

from lopa_kernels.ascend import register_converters  # noqa: E402

#: operators of torch.ops.lopa that NPUs have not: a word about the CPU, and the training loss
ELSEWHERE = {
    "cpu_isa", "certainty_forcing_loss", "certainty_forcing_loss_backward",
    "certainty_forcing_loss_backward_",
}  # fmt: skip


class Taken(Exception):
    """A graph was converted; nothing is compiled or run."""


@dataclass
class Node:
    """An operator of a GE graph: inputs as (name, tensor), "node:index"."""

    name: str
    type: str
    inputs: dict[str, str]
    outputs: dict[str, tuple[str, tuple[int, ...]]]
    attributes: dict[str, Any]


@dataclass
class Graph:
    """A GE graph as converted, and the inputs that its outputs are written to."""

    nodes: list[Node]
    written: dict[int, int]
    data: dict[str, int]
    argument_of: list[int]
    """Graph input -> argument of the function."""

    def of(self, kind: str) -> list[Node]:
        return [node for node in self.nodes if node.type == kind]

    def one(self, kind: str) -> Node:
        (node,) = self.of(kind)
        return node

    def custom(self) -> list[str]:
        """Types of the operators of this project, in order."""
        return [node.type for node in self.nodes if node.type.startswith("Lopa")]

    def producer(self, tensor: str) -> Node:
        name = tensor.rpartition(":")[0]
        return next(node for node in self.nodes if node.name == name)


def _read(graph: Any) -> Graph:
    from torchair._ge_concrete_graph.ge_ir_pb2 import DataType

    names = {value: name for name, value in DataType.items()}
    nodes, data = [], {}
    for op in graph.op:
        inputs = {}
        for tensor, description in zip(op.input, op.input_desc, strict=False):
            inputs[description.name] = tensor
        outputs = {
            description.name: (names[description.dtype], tuple(description.shape.dim))
            for description in op.output_desc
        }
        attributes = {}
        for key, value in op.attr.items():
            field = value.WhichOneof("value")
            if not key.startswith("_") and field in ("i", "f", "b", "s"):
                got = getattr(value, field)
                attributes[key] = got.decode() if field == "s" else got
        nodes.append(Node(op.name, op.type, inputs, outputs, attributes))
        if op.type == "Data":
            data[op.name] = op.attr["index"].i
    return Graph(nodes, {}, data, [])


@pytest.fixture(scope="session")
def definitions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Definition]:
    return load(tmp_path_factory.mktemp("definitions"))


@pytest.fixture(scope="session", autouse=True)
def installed(definitions: dict[str, Definition]) -> Iterator[None]:
    """torchair's question for a registered operator, answered from the definitions."""

    def registered(name: str) -> tuple[str, list[Any], list[Any], list[Any]]:
        if name == "ZerosLike":  # one of CANN's own
            return "SUCCESS", [("x", "require")], [("y", "require")], []
        if name not in definitions:
            return "ERROR", [], [], []
        d = definitions[name]
        inputs = [(n, "require" if p["required"] else "optional") for n, p in d.inputs.items()]
        outputs = [(n, "require") for n in d.outputs]
        return "SUCCESS", inputs, outputs, [(n, a["type"]) for n, a in d.attributes.items()]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_torchair, "get_registered_ir_def", registered)
        register_converters()
        yield


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Graph, Graph]]:
    """Compiles a function for its arguments: the GE graph as converted, and as it would be run."""
    graphs: list[Graph] = []

    # It would open a device.
    monkeypatch.setattr(fx2ge_converter, "initialize_graph_engine", lambda _options: None)
    optimize = fx2ge_converter.GeConcreteGraph.optimize_graph_without_runtime

    def take(self: Any, *arguments: Any, **options: Any) -> None:
        graphs.append(_read(self.graph))
        optimize(self, *arguments, **options)
        final = _read(self.graph)
        final.written = dict(self._graph_output_ref_input)
        graphs.append(final)
        raise Taken

    monkeypatch.setattr(fx2ge_converter.GeConcreteGraph, "optimize_graph_without_runtime", take)

    def run(function: Callable[..., Any], *arguments: Any) -> tuple[Graph, Graph]:
        torch._dynamo.reset()
        config = torchair.CompilerConfig()
        backend = torchair.get_npu_backend(compiler_config=config)

        def number(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
            # Dynamo passes what is used, in the order of use.
            order[:] = [next(i for i, a in enumerate(arguments) if a is t) for t in inputs]
            return backend(module, inputs)

        order: list[int] = []
        compiled = torch.compile(function, backend=number, fullgraph=True, dynamic=False)
        graphs.clear()
        try:
            with torch.no_grad():
                compiled(*arguments)
        except Exception:  # Taken, in what Dynamo and torchair make of it
            if len(graphs) != 2:
                raise
        assert len(graphs) == 2
        for graph in graphs:
            graph.argument_of = order
        return graphs[0], graphs[1]

    return run
