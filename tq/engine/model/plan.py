"""A plan: every tensor of a conversion with its role, spec and exact bytes, known before any work is done."""

from dataclasses import dataclass
from math import prod
from typing import Any

import mlx.core as mx

from tq.engine.model.architecture import Outline, outline
from tq.engine.model.formats import TqFormat
from tq.engine.model.recipe import Recipe
from tq.engine.model.roles import NOT_CALLED, QUANTIZED_ROLES, VETOED, Matrix, Role
from tq.engine.model.safetensors import Shard, plan_shards, size_bytes
from tq.engine.model.sources import Source
from tq.engine.model.turboquant import TurboquantFormat
from tq.engine.quantize import QuantSpec
from tq.engine.quantize.codecs import ENCODE_VALUES
from tq.engine.quantize.spec import GROUP_SIZES
from tq.errors import TQError, UsageError

FORMATS: dict[str, type[TqFormat]] = {"tq": TqFormat, "turboquant": TurboquantFormat}
ACTIVATION_DTYPES = ("float32", "float16", "bfloat16")
DTYPE_CODES = {
    mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.uint8: "U8", mx.uint16: "U16", mx.uint32: "U32",
    mx.uint64: "U64", mx.int8: "I8", mx.int16: "I16", mx.int32: "I32", mx.int64: "I64", mx.bool_: "BOOL",
    mx.complex64: "C64",
}  # fmt: skip
# An interpreter with mlx, mlx-lm and NumPy, measured; and float32 copies that live at once while a block is encoded.
BASE_MEMORY = 450_000_000
ENCODER_COPIES = 6


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the model and what it becomes.

    Attributes:
        name: Its parameter path; for a quantized matrix that of the module.
        role: What it is for.
        spec: How it is quantized; None keeps it in full precision.
        shape: Dense shape.
        stored: (name, dtype code, shape) of each tensor that the checkpoint gets, in order.
    """

    name: str
    role: Role
    spec: QuantSpec | None
    shape: tuple[int, ...]
    stored: tuple[tuple[str, str, tuple[int, ...]], ...]

    @property
    def size_bytes(self) -> int:
        return sum(size_bytes(dtype, shape) for _, dtype, shape in self.stored)

    @property
    def weights(self) -> int:
        return prod(self.shape)

    @property
    def parameter(self) -> str:
        """Its name in the model."""
        return f"{self.name}.weight" if self.spec else self.name


@dataclass(repr=False)  # to show the arrays would read them
class Plan:
    """A source, what its tensors become, and the files that will hold them.

    Attributes:
        outline: The model and its lazy weights, which the conversion uses up.
        dtype: Of the floating-point tensors that stay, and of the activations.
        shared: Tensors that many matrices use, stored once.
        peak_memory_bytes: An estimate for the conversion.
        notes: What a person should know.
    """

    source: Source
    recipe: Recipe
    outline: Outline
    format: TqFormat
    dtype: str
    tensors: list[PlannedTensor]
    shared: dict[str, mx.array]
    shards: list[Shard]
    index: dict[str, Any]
    quantization: dict[str, Any]
    peak_memory_bytes: int
    notes: list[str]

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors of the result."""
        return self.index["metadata"]["total_size"]

    @property
    def source_bytes(self) -> int:
        """Bytes of all tensors of the source as stored."""
        return sum(header.size_bytes for header in self.source.headers.values())

    @property
    def weights(self) -> int:
        return sum(tensor.weights for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Of the whole model: all bytes, all weights."""
        return 8 * self.size_bytes / self.weights

    @property
    def quantized_bits_per_weight(self) -> float | None:
        """Of the quantized matrices alone."""
        quantized = [tensor for tensor in self.tensors if tensor.spec]
        if not quantized:
            return None
        return 8 * sum(t.size_bytes for t in quantized) / sum(t.weights for t in quantized)

    def by_role(self) -> list[dict[str, Any]]:
        """One record per role and spec: tensors, weights, bytes, bits per weight."""
        groups: dict[tuple[str, str], list[PlannedTensor]] = {}
        for tensor in self.tensors:
            label = tensor.spec.label() if tensor.spec else f"kept ({_kept_as(tensor)})"
            groups.setdefault((tensor.role.value, label), []).append(tensor)
        return [
            {
                "role": role,
                "codes": label,
                "tensors": len(group),
                "weights": sum(t.weights for t in group),
                "bytes": sum(t.size_bytes for t in group),
                "bits_per_weight": round(8 * sum(t.size_bytes for t in group) / sum(t.weights for t in group), 4),
            }
            for (role, label), group in sorted(groups.items(), key=lambda item: -sum(t.size_bytes for t in item[1]))
        ]


def _kept_as(tensor: PlannedTensor) -> str:
    return tensor.stored[0][1].lower()


def _peak_memory(tensors: list[PlannedTensor], weights: dict[str, mx.array]) -> int:
    """Estimate of the converter's memory: the interpreter, the largest tensor read and made, one encoded block."""
    largest = max(
        # A tensor that mlx-lm stacks or dequantizes exists twice for a moment.
        2 * tensor.weights * weights[tensor.parameter].dtype.size + tensor.size_bytes
        for tensor in tensors
    )
    return BASE_MEMORY + largest + ENCODER_COPIES * 4 * ENCODE_VALUES


def make_plan(
    source: Source,
    recipe: Recipe,
    *,
    dtype: str | None = None,
    format: str = "tq",  # the command line's word
    trust_remote_code: bool = False,
    laid_out: Outline | None = None,
) -> Plan:
    """Plan a conversion from headers alone.

    Args:
        source: The model.
        recipe: Roles to specs.
        dtype: Type of the tensors that stay and of the activations; by default the source's, bfloat16 for float32.
        format: ``tq`` or ``turboquant``.
        trust_remote_code: Allow a model's own Python file to build it.
        laid_out: What an earlier plan of the same source found, for plans that only differ in the recipe.

    Raises:
        TQError: The source is not complete, or the format cannot hold what the recipe asks for.
        UsageError: A name is not valid, or a group size does not divide.
    """
    if format not in FORMATS:
        raise UsageError(f"--format {format!r} is not one of {', '.join(FORMATS)}")
    layout = FORMATS[format]()
    chosen = _dtype(dtype, source.config)
    found = laid_out or outline(source, trust_remote_code)
    specs: dict[str, tuple[Matrix, QuantSpec]] = {}
    for path, matrix in found.matrices.items():
        spec = recipe.spec_for(matrix, found.tied_head, layout.defaults)
        if spec is not None:
            if reason := layout.refuse(matrix, spec):
                raise TQError(f"the {layout.name} format cannot hold {path} as {spec.label()}: {reason}")
            specs[path] = (matrix, spec)
    keep_dtype = getattr(found.model, "cast_predicate", lambda _: True)
    tensors = []
    for name, array in found.weights.items():
        path = name.removesuffix(".weight")
        role = found.matrices[path].role if path in found.matrices and name.endswith(".weight") else _role(name)
        if path in specs and name.endswith(".weight"):
            matrix, spec = specs[path]
            stored = tuple((n, DTYPE_CODES[a.dtype], a.shape) for n, a in layout.layout(matrix, spec).items())
            tensors.append(PlannedTensor(path, role, spec, matrix.shape, stored))
        else:
            shape = tuple(array.shape)
            code = DTYPE_CODES[array.dtype]
            if mx.issubdtype(array.dtype, mx.floating) and keep_dtype(name):
                code = DTYPE_CODES[getattr(mx, chosen)]
            tensors.append(PlannedTensor(name, role, None, shape, ((name, code, shape),)))
    shared = layout.shared(specs)
    all_stored = [(n, DTYPE_CODES[a.dtype], tuple(a.shape)) for n, a in shared.items()]
    all_stored += [entry for tensor in tensors for entry in tensor.stored]
    shards, index = plan_shards(all_stored)
    notes = found.notes + recipe.unused(found.matrices.values()) + _matrix_notes(found.matrices)
    notes += _group_notes(found.matrices, specs, recipe, layout)
    return Plan(
        source, recipe, found, layout, chosen, tensors, shared, shards, index,
        layout.quantization(specs, chosen), _peak_memory(tensors, found.weights), notes,
    )  # fmt: skip


def _dtype(asked: str | None, config: dict) -> str:
    if asked is not None:
        if asked not in ACTIVATION_DTYPES:
            raise UsageError(f"--dtype {asked!r} is not one of {', '.join(ACTIVATION_DTYPES)}")
        return asked
    text = config.get("text_config") or {}
    own = config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype")
    # A float32 checkpoint is a training artefact: bfloat16 has its range at half the bytes of every activation.
    return own if own in ("float16", "bfloat16") else "bfloat16"


def _role(name: str) -> Role:
    return Role.NORM if "norm" in name.lower() or ".ln" in name.lower() else Role.OTHER


def _matrix_notes(matrices: dict[str, Matrix]) -> list[str]:
    """What no recipe can quantize, although its role says so. Small matrices are not worth a word."""
    notes = []
    for reason in (NOT_CALLED, VETOED):
        kept = [m.path for m in matrices.values() if m.kept == reason and m.role in QUANTIZED_ROLES]
        if kept:
            more = f" and {len(kept) - 1} more" if len(kept) > 1 else ""
            notes.append(f"kept in full precision: {kept[0]}{more}, {reason}")
    return notes


def _group_notes(
    matrices: dict[str, Matrix], specs: dict[str, tuple[Matrix, QuantSpec]], recipe: Recipe, layout: TqFormat
) -> list[str]:
    """What became of matrices whose inputs no group size divides."""
    odd = [m for m in matrices.values() if m.quantizable and m.shape[-1] % GROUP_SIZES[0]]
    rows = [m for m in odd if m.path in specs]
    kept = [m for m in odd if m.path not in specs and recipe.choice(m, m.role, layout.defaults).codec != "none"]
    parts = (("one scale per row", rows), ("kept in full precision", kept))
    return [
        f"{what}: {len(found)} matrices with {', '.join(map(str, sorted({m.shape[-1] for m in found})))} inputs, "
        "which no group size divides"
        for what, found in parts
        if found
    ]
