"""The operators of a network's graph, with the types and shapes that MindSpore's front end infers for them.

MindSpore exports a graph of Ascend operators on a machine without an NPU (MINDIR), which type-checks every operator. What
the front end does not check, such as the length of a scale, can be read off here. It proves nothing about the kernels.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import mindspore as ms

from ms_pangu_quant.backends import Backend, current_backend
from ms_pangu_quant.checkpoint.config import ModelConfig
from ms_pangu_quant.network import runtime
from ms_pangu_quant.network.pangu import build_network
from ms_pangu_quant.recipe.plan import Plan

_PLUMBING = {"Constant", "Load", "Depend", "UpdateState", "MakeTuple", "TupleGetItem", "list_getitem", "TensorToTuple"}


@dataclass(frozen=True)
class TensorType:
    """dtype as MindSpore's proto names it ("bfloat16", "int8", "qint4x2"); -1 in shape is a dynamic size.

    name is the parameter's, without the network's prefix; "" for what another operator computed.
    """

    dtype: str
    shape: tuple[int, ...]
    name: str = ""

    def __str__(self) -> str:
        sizes = ", ".join("?" if size < 0 else str(size) for size in self.shape)
        return f"{self.dtype}[{sizes}]"


@dataclass(frozen=True)
class Operator:
    """kind is the operator's name, where the path of the cell that calls it ("decoder.layers.0.mlp.linear_fc2"), or, of an
    operator that belongs to no cell, of the one whose parameter it takes; "" if it takes none."""

    kind: str
    where: str
    inputs: tuple[TensorType, ...]
    outputs: tuple[TensorType, ...]


def device_backend(device: str) -> Backend:
    """Whose cells to build a graph of, whatever device the process was started on: "ascend" or "cpu"."""
    if device == "cpu":
        return current_backend()
    from ms_pangu_quant.backends.ascend import BACKEND

    return BACKEND


def exported_operators(
    config: ModelConfig,
    plan: Plan,
    backend: Backend,
    *,
    phase: str,
    vocab_size: int | None = None,
    options: Mapping[str, str] = MappingProxyType({}),
) -> list[Operator]:
    """The operators of one phase's graph, in the order of execution; tuples are flattened, plumbing is left out.

    plan        of the decoder layers to build; all are alike where their schemes are.
    phase       "prefill" or "decode".
    vocab_size  in place of the config's, to keep the exported file small.
    options     as in build_network.
    """
    if vocab_size is not None:
        config = ModelConfig.from_dict({**config.raw, "vocab_size": vocab_size}, where="graph")
    network = build_network(config, plan, backend=backend, num_blocks=1, options=options)
    network.process_weights_after_loading(network.model)
    network.set_phase(phase)
    network.set_dynamic_inputs()
    with tempfile.TemporaryDirectory(prefix="pangu-quant-") as folder, runtime.quiet(), _compiled_for(backend):
        ms.export(network, *network.get_inputs(), file_name=f"{folder}/graph", file_format="MINDIR")
        return read_mindir(Path(folder) / "graph.mindir")


@contextmanager
def _compiled_for(backend: Backend) -> Iterator[None]:
    """Under the settings of the backend's device, where this process runs on another."""
    if backend is current_backend():
        yield
        return
    ms.set_context(jit_config=runtime.JIT_CONFIG["ascend"])
    try:
        yield
    finally:
        ms.set_context(jit_config={"infer_boost": "off", **runtime.JIT_CONFIG["cpu"]})


@dataclass(frozen=True)
class OperatorCount:
    """How often a kind of operator with these types occurs in a phase's graph, and in which cells; "*" for the layer."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    count: int
    cells: tuple[str, ...]


def operator_counts(config: ModelConfig, plan: Plan, backend: Backend, *, phase: str) -> list[OperatorCount]:
    """The operators of a whole network's graph in one phase, equal ones counted, in the order of execution.

    Networks of one and of two layers are exported; their difference is a layer's part, and stands for every layer with the
    same schemes. The vocabulary is small while the graph is made and its size is put into the types afterwards.

    phase  "prefill" or "decode".
    """
    total: Counter[_Key] = Counter()
    cells: dict[_Key, dict[str, None]] = {}
    for number, (block, layers) in enumerate(Counter(plan.blocks).items()):
        counts: list[Counter[_Key]] = []
        for depth in (1, 2):
            counts.append(Counter())
            for key, where in _keys(config, Plan((block,) * depth), backend, phase):
                counts[-1][key] += 1
                cells.setdefault(key, {})[re.sub(r"layers\.\d+", "layers.*", where)] = None
        once = counts[0] if number == 0 else Counter()
        each = layers - 1 if number == 0 else layers
        for key in cells:
            total[key] += once[key] + each * (counts[1][key] - counts[0][key])
    return [OperatorCount(*key, total[key], tuple(where)) for key, where in cells.items()]


_Key = tuple[str, tuple[str, ...], tuple[str, ...]]  # kind, types of the inputs, of the outputs


def _keys(config: ModelConfig, plan: Plan, backend: Backend, phase: str) -> Iterator[tuple[_Key, str]]:
    """Each operator as what equal ones have in common, and where it is."""
    small = _unused_size(config)
    for each in exported_operators(config, plan, backend, vocab_size=small, phase=phase):
        inputs, outputs = (
            tuple(str(_resized(one, small, config.vocab_size)) for one in side) for side in (each.inputs, each.outputs)
        )
        yield (each.kind, inputs, outputs), each.where


def _unused_size(config: ModelConfig) -> int:
    """A small number that no other size of the network is, not even a multiple of it."""
    sizes = {value for value in vars(config).values() if isinstance(value, int)}
    return next(size for size in (1009, 1013, 1019, 1021, 1031) if all(each % size for each in sizes if each))


def _resized(tensor: TensorType, old: int, new: int) -> TensorType:
    return TensorType(tensor.dtype, tuple(new if size == old else size for size in tensor.shape), tensor.name)


def read_mindir(path: Path) -> list[Operator]:
    """The operators of an exported graph whose parameters are in the same file."""
    from mindspore.train.mind_ir_pb2 import ModelProto

    model = ModelProto()
    model.ParseFromString(path.read_bytes())
    values: dict[str, tuple[TensorType, ...]] = {}
    for parameter in model.graph.parameter:
        name = parameter.name.rpartition(":")[2]
        values[parameter.name] = (_tensor_type(parameter, name),)
    for argument in model.graph.input:
        values[argument.name] = tuple(_tensor_type(tensor, argument.name.rpartition(":")[2]) for tensor in argument.tensor)
    operators = []
    for node in model.graph.node:
        kind = node.op_type.removeprefix("REF::").partition(":")[0]
        inputs = tuple(each for name in node.input for each in values.get(name, ()))
        outputs = tuple(_tensor_type(tensor) for attribute in node.attribute for tensor in _tensors(attribute))
        is_alias = kind in ("Load", "Depend", "MakeTuple") and bool(inputs)
        if kind == "Depend":
            inputs = values.get(node.input[0], ())
        for name in node.output:
            values[name] = inputs if is_alias else outputs
        if kind not in _PLUMBING:
            owner = next((each.name.rpartition(".")[0] for each in inputs if "." in each.name), "")
            operators.append(Operator(kind, _where(node.domain) or owner, inputs, outputs))
    return operators


def _tensors(attribute: Any) -> Iterator[Any]:
    if attribute.name == "shape":
        yield from attribute.tensors
        for value in attribute.values:
            yield from value.tensors


def _tensor_type(tensor: Any, name: str = "") -> TensorType:
    from mindspore.train.mind_ir_pb2 import TensorProto

    return TensorType(TensorProto.DataType.Name(tensor.data_type).lower(), tuple(tensor.dims), name)


def _where(domain: str) -> str:
    """Default/model-GPTModel/decoder-TransformerBlock/.../MatMul-op0 -> decoder...."""
    cells = [re.sub(r"-\w+$", "", part) for part in domain.split("/")[1:-1]]
    return ".".join(cells).removeprefix("model.")
