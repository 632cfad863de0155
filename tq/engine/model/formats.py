"""How quantized matrices are named and laid out in a checkpoint: tq's own format, version 1. See docs/formats.md.

A format object has the interface of ``TqFormat``; ``turboquant.py`` has the other one.
"""

import mlx.core as mx

from tq.engine.model.recipe import ANY_FORMAT
from tq.engine.model.roles import Matrix
from tq.engine.quantize import PackedTensor, QuantSpec, layout, shared_arrays
from tq.engine.quantize.packed import SHARED, ArrayLayout
from tq.errors import TQError, UsageError

VERSION = 1
DAMAGED = "download or convert the model again"
Specs = dict[str, tuple[Matrix, QuantSpec]]


class TqFormat:
    """Per matrix ``<path>.weight`` and ``<path>.scales`` (``.biases``, ``.qjl_*``); shared arrays once per model."""

    name = "tq"
    defaults = ANY_FORMAT

    def refuse(self, matrix: Matrix, spec: QuantSpec) -> str | None:
        """The reason why the format cannot hold a matrix; None if it can."""
        return None

    def layout(self, matrix: Matrix, spec: QuantSpec) -> dict[str, ArrayLayout]:
        """Tensors that one matrix adds to the checkpoint, in order."""
        return {f"{matrix.path}.{name}": array for name, array in layout(spec, matrix.shape).items()}

    def arrays(self, path: str, packed: PackedTensor) -> dict[str, mx.array]:
        """The tensors of ``layout``."""
        return {f"{path}.{name}": packed.arrays[name] for name in packed.per_matrix_arrays}

    def shared(self, specs: Specs) -> dict[str, mx.array]:
        """Tensors that the checkpoint holds once."""
        found: dict[str, mx.array] = {}
        for matrix, spec in specs.values():
            arrays = shared_arrays(spec, matrix.shape[-1])
            found |= {shared_name(name, spec, matrix.shape[-1]): array for name, array in arrays.items()}
        return dict(sorted(found.items()))

    def quantization(self, specs: Specs, dtype: str) -> dict:
        """The ``quantization`` object of config.json: the most frequent spec, and the others by path."""
        if not specs:
            return {"mode": "tq", "version": VERSION, "dtype": dtype, "default": None, "tensors": {}}
        each = {path: spec for path, (_, spec) in specs.items()}
        default = max(set(each.values()), key=lambda s: (list(each.values()).count(s), s.label()))
        return {
            "mode": "tq",
            "version": VERSION,
            "dtype": dtype,
            "default": default.to_json(),
            "tensors": {path: spec.to_json() for path, spec in each.items() if spec != default},
        }


def shared_name(name: str, spec: QuantSpec, in_features: int) -> str:
    """The tensor that holds a shared array: codebooks by codec and bits, signs by dimension."""
    if name == "codebook":
        return f"tq.codebook.{spec.codec}" + (f"-{spec.bits}" if spec.bits else "")
    return f"tq.{name}.{in_features}"


def read_matrices(
    config: dict, weights: dict[str, mx.array], shapes: dict[str, tuple[int, ...]]
) -> dict[str, PackedTensor]:
    """Take the quantized matrices of a tq checkpoint out of ``weights``.

    Args:
        config: config.json, with ``quantization.mode == "tq"``.
        weights: All tensors of the checkpoint; those of matrices and shared ones are removed.
        shapes: Dense shapes (..., out, in) of the modules that may be quantized.

    Raises:
        TQError: Another format version, a damaged config.json, or tensors that are missing or do not fit their spec.
    """
    quantization = config["quantization"]
    if quantization.get("version") != VERSION:
        raise TQError(
            f"this checkpoint has tq format version {quantization.get('version')}, and this tq reads version {VERSION}",
            "upgrade tq, or convert the model again",
        )
    exceptions = quantization.get("tensors") or {}
    shared = {name: weights.pop(name) for name in list(weights) if name.startswith("tq.")}
    found = {}
    for path, shape in shapes.items():
        weight = weights.get(f"{path}.weight")
        if f"{path}.scales" not in weights and (weight is None or weight.dtype != mx.uint32):
            continue  # full precision, or missing altogether
        spec = _spec(exceptions.get(path, quantization.get("default")), path)
        arrays = {}
        for name, expected in layout(spec, shape).items():
            array = weights.pop(f"{path}.{name}", None)
            if array is None or tuple(array.shape) != expected.shape or array.dtype != expected.dtype:
                has = "is missing" if array is None else f"is {array.dtype} {tuple(array.shape)}"
                needs = f"{spec.label()} needs {expected.dtype} {expected.shape}"
                raise TQError(f"{path}.{name} {has}, but {needs}", DAMAGED)
            arrays[name] = array
        for name in SHARED:
            if _uses(spec, name):
                key = shared_name(name, spec, shape[-1])
                if key not in shared:
                    raise TQError(f"the checkpoint has no {key}, which {path} needs", DAMAGED)
                arrays[name] = shared[key]
        found[path] = PackedTensor(spec, shape, arrays)
    return found


def _spec(data: object, path: str) -> QuantSpec:
    if not isinstance(data, dict):
        raise TQError(f"config.json does not say how {path} is quantized", DAMAGED)
    try:
        return QuantSpec.from_json(data)
    except UsageError as error:
        raise TQError(f"config.json says of {path}: {error.message}", error.hint or DAMAGED) from error


def _uses(spec: QuantSpec, name: str) -> bool:
    return {
        "codebook": spec.codec != "affine",
        "signs": spec.rotation == "hadamard",
        "qjl_signs": spec.qjl,
    }[name]
