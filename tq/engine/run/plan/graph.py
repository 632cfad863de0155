"""The memory that a graph of operations needs: in which order MLX runs them, and what lives at once.

Every result takes memory from its operation to its last reader; views take none, and an operation on equal numbers
writes over an input that nobody else wants. This is `eval_impl` of mlx/transforms.cpp without the computing.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import mlx.core as mx

# Results that are another look at their input's memory.
VIEWS = {
    "AsStrided", "Broadcast", "BroadcastAxes", "Copy", "CustomTransforms", "Depends", "ExpandDims", "Slice", "Split",
    "Squeeze", "StopGradient", "Transpose", "View",
}  # fmt: skip
# Views of an input whose numbers are in order, copies of any other.
RESHAPES = {"Reshape", "Flatten", "Unflatten"}
PARTS = {"Broadcast", "BroadcastAxes", "Slice", "Split"}  # views whose rows do not follow each other
OUT_OF_ORDER = PARTS | {"AsStrided", "Transpose"}
PRODUCTS = {"AddMM", "BlockMaskedMM", "GatherMM", "Matmul"}
# Operations that cannot write over what they read.
FRESH = PRODUCTS | {
    "ArgPartition", "ArgReduce", "ArgSort", "Arange", "Concatenate", "Convolution", "Full", "Gather", "GatherAxis",
    "GatherQMM", "NumberOfElements", "Pad", "Partition", "QuantizedMatmul", "RandomBits", "Reduce",
    "ScaledDotProductAttention", "Sort",
}  # fmt: skip
WIDTH = 20  # of the order (MLX_BFS_MAX_WIDTH)
IN_FLIGHT = 10  # batches of operations that are begun before an earlier one must have ended (MAX_ACTIVE_TASKS)


@dataclass(frozen=True)
class Node:
    """An operation. Arrays have names; `inputs` and `outputs` come with their bytes."""

    name: str
    inputs: tuple[tuple[str, int], ...]
    outputs: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Device:
    """How a device of MLX runs operations.

    Attributes:
        batch: Operations that are handed over, and give their memory back, together.
        batch_bytes: What these read and make at most; None: no matter.
        copies: Whether products copy operands whose rows do not follow each other.
    """

    batch: int
    batch_bytes: int | None
    copies: bool


CPU = Device(10, None, copies=True)  # DISPATCHES_PER_TASK of mlx/backend/cpu/encoder.h
GPU = Device(50, 50 << 20, copies=False)  # the largest of mlx/backend/metal/device.cpp


@dataclass(frozen=True)
class Graph:
    """What a function does.

    Attributes:
        nodes: Its operations, each after those whose results it reads.
        inputs: Bytes of the arrays it is given, in order.
        outputs: Bytes of the arrays it returns, in order.
    """

    nodes: list[Node]
    inputs: dict[str, int]
    outputs: dict[str, int]


def trace(function: Callable[..., list[mx.array]], arguments: Sequence[mx.array]) -> Graph:
    """The graph of a function of arrays, of which nothing is computed.

    Raises:
        ValueError: It looks at numbers, or has an operation that MLX cannot list.
    """
    records: list[dict[str, Any]] = []
    with _listable():
        mx.export_function(records.append, function, *arguments)
    lists = {record["type"]: record for record in records if record["type"] != "primitive"}
    nodes = [
        Node(record["name"], _sizes(record["inputs"]), _sizes(record["outputs"]))
        for record in records
        if record["type"] == "primitive"
    ]
    return Graph(nodes, dict(_sizes(lists["inputs"]["inputs"])), dict(_sizes(lists["outputs"]["outputs"])))


def _sizes(entries: Sequence[tuple[str, tuple[int, ...], mx.Dtype]]) -> tuple[tuple[str, int], ...]:
    return tuple((name, prod(shape) * dtype.size) for name, shape, dtype in entries)


@contextmanager
def _listable() -> Iterator[None]:
    """Operations that MLX does not list, as others that read and make as much."""
    real = mx.contiguous, mx.to_fp8, mx.from_fp8

    def contiguous(x: mx.array, *_: Any, **__: Any) -> mx.array:
        return mx.where(mx.array(True), x, x)

    def to_fp8(x: mx.array, **_: Any) -> mx.array:
        return x.astype(mx.uint8)

    def from_fp8(x: mx.array, dtype: mx.Dtype = mx.bfloat16, **_: Any) -> mx.array:
        return x.astype(dtype)

    mx.contiguous, mx.to_fp8, mx.from_fp8 = contiguous, to_fp8, from_fp8
    try:
        yield
    finally:
        mx.contiguous, mx.to_fp8, mx.from_fp8 = real


def in_order(nodes: Sequence[Node], wanted: Sequence[str]) -> list[Node]:
    """Operations in the order in which MLX runs them: backwards from what is wanted, breadth first up to a width."""
    maker = {name: i for i, node in enumerate(nodes) for name, _ in node.outputs}
    needs = [[maker[name] for name, _ in node.inputs if name in maker] for node in nodes]
    needs.append([maker[name] for name in wanted if name in maker])
    users = Counter(needs[-1])
    seen, todo = set(), list(needs[-1])
    while todo:
        i = todo.pop()
        if i not in seen:
            seen.add(i)
            users.update(needs[i])
            todo += needs[i]
    tape, at = [len(nodes)], 0
    waiting: list[tuple[int, int]] = []
    while at < len(tape) or waiting:
        if at < len(tape):
            i, first = tape[at], 0
            at += 1
        else:
            i, first = waiting.pop()
        for j in range(first, len(needs[i])):
            if len(tape) - at >= WIDTH:
                waiting.append((i, j))
                break
            one = needs[i][j]
            users[one] -= 1
            if users[one] == 0:
                tape.append(one)
    return [nodes[i] for i in reversed(tape[1:])]


def peak_bytes(graph: Graph, inputs: Sequence[str], device: Device) -> int:
    """The most bytes that live at once while a graph is computed.

    Args:
        inputs: Arrays whose memory is given back after their last reader. All others that the graph is given (weights)
            count nothing.
        device: What runs it. The worst case is taken: as many operations in flight as it admits.
    """
    nodes = in_order(graph.nodes, list(graph.outputs))
    readers = Counter(name for node in nodes for name in dict(node.inputs))
    readers.update(graph.outputs.keys())
    owner = {name: name for name in inputs}  # in whose memory an array is; those of weights have none
    memory = {name: graph.inputs[name] for name in inputs}
    users = {name: int(readers[name] > 0) for name in inputs}  # arrays in it that somebody will still read
    jumbled: set[str] = set()  # arrays whose numbers are not in order
    parts: set[str] = set()
    live = peak = sum(memory.values())
    held: deque[int] = deque()  # what batches in flight will give back
    batch = batch_bytes = batch_freed = 0
    for node in nodes:
        sources = dict(node.inputs)
        base = next(iter(sources), None)
        last = [name for name in sources if name in owner and readers[name] == 1]
        shares = base is not None and (node.name in VIEWS or (node.name in RESHAPES and base not in jumbled))
        for name, size in node.outputs:
            if shares and base is not None:
                if base in owner:
                    owner[name] = owner[base]
                    users[owner[base]] += 1
                if node.name in OUT_OF_ORDER or base in jumbled:
                    jumbled.add(name)
                if node.name in PARTS or base in parts:
                    parts.add(name)
                continue
            alone = (
                []
                if node.name in FRESH | RESHAPES
                else [x for x in last if users[owner[x]] == 1 and memory[owner[x]] == size]
            )
            if alone:  # written over
                last.remove(alone[0])
                owner[name] = owner[alone[0]]
            else:
                owner[name], memory[name], users[name] = name, size, 1
                live += size
        copied = 0
        if device.copies and node.name in PRODUCTS:
            copied = sum(size for name, size in sources.items() if name in parts and name in owner)
        live += copied
        peak = max(peak, live)
        freed = copied
        for name in [*last, *(name for name, _ in node.outputs if name in owner and not readers[name])]:
            users[owner[name]] -= 1
            if users[owner[name]] == 0:
                freed += memory[owner[name]]
        readers.subtract(sources.keys())
        batch, batch_freed = batch + 1, batch_freed + freed
        batch_bytes += sum(sources.values()) + sum(size for _, size in node.outputs)
        if batch >= device.batch or (device.batch_bytes is not None and batch_bytes > device.batch_bytes):
            held.append(batch_freed)
            batch = batch_bytes = batch_freed = 0
            if len(held) > IN_FLIGHT:
                live -= held.popleft()
    return peak
