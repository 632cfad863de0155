"""What a checkpoint's weights take, by role, from headers: of one that exists, or that a conversion would make."""

import re
from collections import defaultdict
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx

from tq.engine.model.architecture import build_model, parameters
from tq.engine.model.plan import DTYPE_CODES, Plan
from tq.engine.model.roles import Matrix, Role, matrices
from tq.engine.model.sources import OWN_MODES, Source, quantization_mode
from tq.engine.quantize import QuantSpec
from tq.engine.run.weights import active_experts

EXPERTS = (Role.EXPERT, Role.EXPERT_DOWN)
HALF = (mx.float16, mx.bfloat16)
SHARED = "tq."  # what tensors begin with that many matrices use
_EXPERT_OF_LIST = re.compile(r"(.*\bexperts)\.\d+\.")  # experts as modules of their own
_PACKED = (".scales", ".biases", ".codebook", ".signs", ".qjl_packed", ".qjl_norms", ".qjl_signs")
TYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}


@dataclass(frozen=True)
class Part:
    """A tensor of the model, with all that belongs to it.

    Attributes:
        name: Its path.
        role: What it is for.
        codes: How it is stored, for people.
        weights: Numbers that it stands for.
        size_bytes: On the disk, and in the memory of a GPU.
        rows: Outputs of a matrix.
        experts: How many share these bytes, of which a token reads as many as run; 1 if all of them are read.
        block: The module that runs these experts, "" for all else.
        dtype: Of one that is kept unpacked.
    """

    name: str
    role: Role
    codes: str
    weights: int
    size_bytes: int
    rows: int = 0
    experts: int = 1
    block: str = ""
    dtype: mx.Dtype | None = None


@dataclass(frozen=True)
class Weights:
    """All weights of a checkpoint.

    Attributes:
        config: config.json, from which the model can be built. `folder`: where code of its own is.
        parts: Tensors. Those that many matrices share are among them.
        dtype: Of activations on a GPU.
        active: Experts that a token runs through; None if there are none or nobody knows.
        rotated: Rows per token of each size of activation that is rotated, by its numbers.
        tied_head: The embedding is the output head too.
    """

    config: dict[str, Any]
    parts: list[Part]
    dtype: mx.Dtype
    active: int | None
    rotated: dict[int, int]
    tied_head: bool
    folder: Path | None = None

    @property
    def size_bytes(self) -> int:
        return sum(part.size_bytes for part in self.parts)

    @property
    def weights(self) -> int:
        return sum(part.weights for part in self.parts)

    @property
    def experts_bytes(self) -> int:
        return sum(part.size_bytes for part in self.parts if part.experts > 1)

    @property
    def expert_bytes(self) -> int:
        """Of the largest single expert, all its matrices together; 0 if there are none."""
        blocks: dict[str, int] = defaultdict(int)
        for part in self.parts:
            if part.experts > 1:
                blocks[part.block] += part.size_bytes // part.experts
        return max(blocks.values(), default=0)

    @property
    def experts(self) -> int:
        """Of the layer that has the most; 0 if there are none."""
        most = max((part.experts for part in self.parts), default=1)
        return most if most > 1 else 0

    @property
    def active_weights(self) -> int | None:
        """Numbers that take part in one token; None if nobody knows how many experts run."""
        if self.experts and self.active is None:
            return None
        return round(sum(part.weights * self._running(part) for part in self.parts))

    @property
    def token_bytes(self) -> int | None:
        """What generating one token reads at least; None if nobody knows how many experts run."""
        if self.experts and self.active is None:
            return None
        tables = [part for part in self.parts if part.role == Role.EMBEDDING]
        vocabulary = max((part.rows for part in tables), default=0)
        head = [part for part in tables if self.tied_head and part.rows == vocabulary]
        read = [part for part in self.parts if part.role != Role.EMBEDDING] + head[:1]
        return round(sum(part.size_bytes * self._running(part) for part in read))

    def _running(self, part: Part) -> float:
        """The share of a part that takes part in a token."""
        return min(self.active or 1, part.experts) / part.experts

    def memory_bytes(self, gpu: bool) -> int:
        """What they take once they are loaded: on a CPU, kept half-precision numbers become float32."""
        if gpu:
            return self.size_bytes
        return sum(part.weights * mx.float32.size if _is_half(part.dtype) else part.size_bytes for part in self.parts)

    def kept(self, gpu: bool) -> dict[str, mx.Dtype]:
        """Types in memory of parameters that are not packed."""
        return {
            part.name: mx.float32 if not gpu and _is_half(part.dtype) else part.dtype
            for part in self.parts
            if part.dtype is not None
        }

    def by_role(self) -> list[dict[str, Any]]:
        """One record per role and way to store it, the largest first."""
        groups: dict[tuple[str, str], list[Part]] = defaultdict(list)
        for part in self.parts:
            groups[part.role.value, part.codes].append(part)
        return [
            {
                "role": role,
                "codes": codes,
                "tensors": len(group),
                "weights": sum(part.weights for part in group),
                "bytes": sum(part.size_bytes for part in group),
            }
            for (role, codes), group in sorted(groups.items(), key=lambda item: -sum(p.size_bytes for p in item[1]))
        ]


def of_plan(plan: Plan) -> Weights:
    """The weights that a conversion makes."""
    found = plan.outline.matrices
    n_experts = _list_sizes(found)
    active = active_experts(plan.source.config)
    parts = []
    for tensor in plan.tensors:
        matrix = _matrix(tensor.parameter, found)
        kept = None if tensor.spec else TYPES[tensor.stored[0][1]]
        parts.append(
            Part(
                tensor.name,
                matrix.role if matrix else tensor.role,
                tensor.spec.label() if tensor.spec else str(kept).removeprefix("mlx.core."),
                tensor.weights,
                tensor.size_bytes,
                tensor.shape[-2] if len(tensor.shape) > 1 else 0,
                *_experts(matrix, n_experts),
                kept,
            )
        )
    parts += [Part(name, Role.OTHER, "shared", 0, array.nbytes) for name, array in plan.shared.items()]
    specs = {tensor.name: tensor.spec for tensor in plan.tensors if tensor.spec}
    return Weights(
        plan.source.config, parts, getattr(mx, plan.dtype), active if _any_experts(parts) else None,
        _rotated(specs, found, active), plan.outline.tied_head, plan.source.folder,
    )  # fmt: skip


def of_checkpoint(source: Source, trust_remote_code: bool = False) -> Weights:
    """The weights of a checkpoint as they are: tq's own, turboquant's, or what mlx-lm loads."""
    config = source.config
    model = build_model(config, source.folder, trust_remote_code)
    found = matrices(model)
    arrays = source.weights()
    own = quantization_mode(config) in OWN_MODES
    if not own and hasattr(model, "sanitize"):  # names of a checkpoint that mlx-lm would load
        arrays = model.sanitize(arrays)
    wanted = parameters(model)
    n_experts = _list_sizes(found)
    packed = {name.rpartition(".")[0] for name in arrays if name.endswith(".scales")}
    parts: dict[str, Part] = {}
    specs, floats = {}, []
    for name, array in arrays.items():
        path = name.rpartition(".")[0]
        matrix = _matrix(name, found)
        if name.startswith(SHARED):
            parts[name] = Part(name, Role.OTHER, "shared", 0, array.nbytes)
        elif path in packed and matrix is not None and (name == f"{path}.weight" or name.endswith(_PACKED)):
            spec = _stored_spec(config, path)
            if spec is not None:
                specs[path] = spec
            before = parts[path].size_bytes if path in parts else 0
            parts[path] = Part(
                path, matrix.role, spec.label() if spec else "packed", prod(matrix.shape), before + array.nbytes,
                matrix.shape[-2], *_experts(matrix, n_experts),
            )  # fmt: skip
        elif name in wanted:  # else of other modalities, or unused
            dtype = array.dtype
            if _is_half(dtype):
                floats.append(dtype)
            role = matrix.role if matrix else Role.NORM if "norm" in name else Role.OTHER
            parts[name] = Part(
                name, role, str(dtype).removeprefix("mlx.core."), prod(array.shape), array.nbytes,
                array.shape[-2] if array.ndim > 1 else 0, *_experts(matrix, n_experts), dtype,
            )  # fmt: skip
    every = list(parts.values())
    active = active_experts(config) if _any_experts(every) else None
    stated = (config.get("quantization") or {}).get("dtype") if own else None
    dtype = getattr(mx, stated) if stated else floats[0] if floats else mx.float32
    has_head = any(part.role == Role.HEAD or part.name == "lm_head" for part in every)
    return Weights(config, every, dtype, active, _rotated(specs, found, active), not has_head, source.folder)


def is_packed(source: Source) -> bool:
    """Whether a checkpoint is made to be run as it is: tq's, turboquant's, or one that mlx-lm has quantized."""
    return quantization_mode(source.config) in OWN_MODES or isinstance(source.config.get("quantization"), dict)


def _stored_spec(config: dict[str, Any], path: str) -> QuantSpec | None:
    """How a matrix of tq's own format is packed."""
    if quantization_mode(config) != "tq":
        return None
    quantization = config["quantization"]
    stated = (quantization.get("tensors") or {}).get(path, quantization.get("default"))
    return QuantSpec.from_json(stated) if isinstance(stated, dict) else None


def _matrix(name: str, found: dict[str, Matrix]) -> Matrix | None:
    """The matrix that a tensor belongs to: its weight, its scales, its bias."""
    return found.get(name.rpartition(".")[0]) or found.get(name)


def _list_sizes(found: dict[str, Matrix]) -> dict[str, int]:
    """Experts that are modules of their own: how many are in each list."""
    names: dict[str, set[str]] = defaultdict(set)
    for path in found:
        if listed := _EXPERT_OF_LIST.match(path):
            names[listed[1]].add(path[listed.end(1) + 1 :].split(".")[0])
    return {name: len(members) for name, members in names.items()}


def _experts(matrix: Matrix | None, lists: dict[str, int]) -> tuple[int, str]:
    """How many experts share a matrix, and the module that runs them."""
    if matrix is None or matrix.role not in EXPERTS:
        return 1, ""
    if matrix.kind == "switch":
        return matrix.shape[0], matrix.path.rpartition(".")[0]
    listed = _EXPERT_OF_LIST.match(matrix.path)
    return (lists[listed[1]], listed[1]) if listed else (1, "")


def _is_half(dtype: mx.Dtype | None) -> bool:
    return dtype is not None and dtype in HALF  # a dtype does not compare with None


def _any_experts(parts: list[Part]) -> bool:
    return any(part.experts > 1 for part in parts)


def _rotated(specs: dict[str, QuantSpec], found: dict[str, Matrix], active: int | None) -> dict[int, int]:
    rows: dict[int, int] = {}
    for path, spec in specs.items():
        if spec.rotation == "hadamard" and path in found:
            each = (active or 1) if found[path].kind == "switch" else 1
            n = found[path].shape[-1]
            rows[n] = max(rows.get(n, 0), each)
    return rows
