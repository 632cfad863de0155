"""The kernel library: built for this processor, opened, and its C structures mirrored for Python.

Every class here repeats a structure of kernels/tq_cpu.h field by field; `load` compares the sizes.
"""

import ctypes
import functools
import sys
from ctypes import POINTER, Structure, c_char_p, c_double, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path

from tq.cpu import build, cores, isa
from tq.cpu.build import Built, Declined, once
from tq.cpu.isa import Level

KERNELS = Path(__file__).with_name("kernels")
# No -ffast-math: NaN must stay NaN. Contraction of a * b + c to one instruction is meant; without -fno-trapping-math,
# loops with selections are not vectorized before AVX512.
FLAGS = (
    "-std=c++20", "-O3", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math",
    "-fopenmp-simd", "-pthread",
)  # fmt: skip


class Array(Structure):
    """tq_array."""

    _fields_ = (
        ("data", c_void_p),
        ("shape", POINTER(c_int32)),
        ("strides", POINTER(c_int64)),
        ("ndim", c_int32),
        ("dtype", c_int32),
    )


class Matrix(Structure):
    """tq_matrix."""

    _fields_ = (
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("biases", c_void_p),
        ("table", c_void_p),
        ("table_low", c_void_p),
        ("values", c_void_p),
        ("bias", c_void_p),
        ("table_scale", c_float),
        ("offset", c_int32),
        ("rows", c_int32),
        ("columns", c_int32),
        ("experts", c_int32),
        ("bits", c_int32),
        ("group", c_int32),
    )


class Rotation(Structure):
    """tq_rotation."""

    _fields_ = (("signs", c_void_p), ("factor", c_void_p), ("n", c_int32), ("block", c_int32), ("m", c_int32))


class MatmulParams(Structure):
    """tq_matmul_params."""

    _fields_ = (("matrix", Matrix), ("exact", c_int32))


class GatherParams(Structure):
    """tq_gather_params."""

    _fields_ = (("matrix", Matrix), ("exact", c_int32))


class ExpertsParams(Structure):
    """tq_experts_params."""

    _fields_ = (
        ("gate", Matrix),
        ("up", Matrix),
        ("down", Matrix),
        ("in_rotation", Rotation),
        ("hidden_rotation", Rotation),
        ("activation", c_int32),
        ("alpha", c_float),
        ("limit", c_float),
        ("exact", c_int32),
    )


class EmbedParams(Structure):
    """tq_embed_params."""

    _fields_ = (("matrix", Matrix), ("rotation", Rotation))


class RotateParams(Structure):
    """tq_rotate_params."""

    _fields_ = (("rotation", Rotation), ("inverse", c_int32))


class Segment(Structure):
    """tq_segment."""

    _fields_ = (
        ("keys", c_void_p),
        ("values", c_void_p),
        ("key_scales", c_void_p),
        ("value_scales", c_void_p),
        ("key_order", c_void_p),
        ("value_order", c_void_p),
        ("key_head_stride", c_int64),
        ("value_head_stride", c_int64),
        ("key_batch_stride", c_int64),
        ("value_batch_stride", c_int64),
        ("key_row_stride", c_int64),
        ("value_row_stride", c_int64),
        ("format", c_int32),
        ("capacity", c_int32),
        ("count", c_int32),
        ("position", c_int32),
        ("first", c_int32),
    )


class KVPart(Structure):
    """tq_kv_part."""

    _fields_ = (
        ("dim", c_int32),
        ("bits", c_int32),
        ("group", c_int32),
        ("affine", c_int32),
        ("table", c_void_p),
        ("values", c_void_p),
        ("table_scale", c_float),
        ("rotation", Rotation),
    )


class KVSide(Structure):
    """tq_kv_side."""

    _fields_ = (("parts", KVPart * 2), ("n_parts", c_int32), ("ordered", c_int32))


class KVCode(Structure):
    """tq_kv_code."""

    _fields_ = (("keys", KVSide), ("values", KVSide))


class AttendParams(Structure):
    """tq_attend_params."""

    _fields_ = (
        ("n_heads", c_int32),
        ("n_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("value_dim", c_int32),
        ("scale", c_float),
        ("softcap", c_float),
        ("causal", c_int32),
        ("window", c_int32),
        ("position", c_int32),
        ("sinks", c_void_p),
        ("n_segments", c_int32),
        ("segments", Segment * 4),
        ("code", KVCode),
        ("exact", c_int32),
        ("mask", c_int32),
        ("pack_from", c_int32),
        ("n_sequences", c_int32),
        ("new_first", c_int32),
        ("new_count", c_int32),
    )


class Nearest(Structure):
    """tq_nearest."""

    _fields_ = (
        ("levels", c_void_p),
        ("boundaries", c_void_p),
        ("below", c_void_p),
        ("level_of_cell", c_void_p),
        ("cells_per_unit", c_float),
        ("offset", c_float),
        ("n_levels", c_int32),
        ("n_cells", c_int32),
    )


class ScaleSearch(Structure):
    """tq_scale_search."""

    _fields_ = (
        ("nearest", Nearest),
        ("lowest", c_float),
        ("highest", c_float),
        ("to_largest", c_int32),
        ("n_starts", c_int32),
        ("size", c_int32),
        ("n_groups", c_int64),
    )


class SampleParams(Structure):
    """tq_sample_params."""

    _fields_ = (("temperature", c_float), ("top_p", c_float), ("min_p", c_float), ("top_k", c_int32))


class Norm(Structure):
    """tq_norm."""

    _fields_ = (("weight", c_void_p), ("eps", c_float))


class Projection(Structure):
    """tq_projection."""

    _fields_ = (("matrix", Matrix), ("rotation", Rotation))


class Rope(Structure):
    """tq_rope."""

    _fields_ = (
        ("frequencies", c_void_p),
        ("dims", c_int32),
        ("interleaved", c_int32),
        ("position_scale", c_float),
        ("multiplier", c_float),
    )


class Router(Structure):
    """tq_router."""

    _fields_ = (
        ("weight", c_void_p),
        ("packed", Projection),
        ("bias", c_void_p),
        ("correction", c_void_p),
        ("experts", c_int32),
        ("k", c_int32),
        ("groups", c_int32),
        ("kept_groups", c_int32),
        ("sigmoid", c_int32),
        ("normalize", c_int32),
        ("factor", c_float),
    )


class Layer(Structure):
    """tq_layer."""

    _fields_ = (
        ("hidden", c_int32),
        ("bare", c_int32),
        ("residual", c_float),
        ("before_attention", Norm),
        ("after_attention", Norm),
        ("query", Projection),
        ("key", Projection),
        ("value", Projection),
        ("out", Projection),
        ("gated", c_int32),
        ("query_norm", Norm),
        ("key_norm", Norm),
        ("norm_whole", c_int32),
        ("norm_after_rope", c_int32),
        ("rope", Rope),
        ("n_heads", c_int32),
        ("n_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("value_dim", c_int32),
        ("scale", c_float),
        ("softcap", c_float),
        ("sinks", c_void_p),
        ("before_feed_forward", Norm),
        ("after_feed_forward", Norm),
        ("gate", Projection),
        ("up", Projection),
        ("down", Projection),
        ("activation", c_int32),
        ("router", Router),
        ("experts", ExpertsParams),
        ("shared_gate", c_void_p),
    )


class LayerParams(Structure):
    """tq_layer_params."""

    _fields_ = (
        ("layer", c_void_p),
        ("parts", c_int32),
        ("causal", c_int32),
        ("has_cache", c_int32),
        ("has_mask", c_int32),
        ("has_query_factors", c_int32),
        ("exact", c_int32),
        ("code", c_void_p),
        ("sink", c_int32),
        ("window", c_int32),
        ("limit", c_int32),
        ("resting", c_int32),
        ("position", c_int32),
        ("row", c_int32),
        ("rows", c_int32),
        ("packed", c_int32),
    )


# Every structure by its name in C. tq_struct_size must know it too (kernels/machine.cpp).
STRUCTURES: dict[str, type[Structure]] = {
    "tq_array": Array,
    "tq_matrix": Matrix,
    "tq_rotation": Rotation,
    "tq_matmul_params": MatmulParams,
    "tq_gather_params": GatherParams,
    "tq_experts_params": ExpertsParams,
    "tq_embed_params": EmbedParams,
    "tq_rotate_params": RotateParams,
    "tq_segment": Segment,
    "tq_kv_part": KVPart,
    "tq_kv_side": KVSide,
    "tq_kv_code": KVCode,
    "tq_attend_params": AttendParams,
    "tq_sample_params": SampleParams,
    "tq_nearest": Nearest,
    "tq_scale_search": ScaleSearch,
    "tq_norm": Norm,
    "tq_projection": Projection,
    "tq_rope": Rope,
    "tq_router": Router,
    "tq_layer": Layer,
    "tq_layer_params": LayerParams,
}
# Functions with the one signature of an operation: (params, in, out).
OPERATIONS = [
    "tq_matmul", "tq_gather_matmul", "tq_experts", "tq_embed", "tq_rotate", "tq_attend", "tq_kv_append", "tq_kv_unpack",
    "tq_sample",
    "tq_layer_forward",
]  # fmt: skip
# Result and arguments: of those, and of all others.
Signature = tuple[type | None, list[type]]
OPERATION: Signature = (None, [c_void_p, c_void_p, c_void_p])
FUNCTIONS: dict[str, Signature] = {
    "tq_codes_bytes": (c_int64, [c_int32, c_int32, c_int32]),
    "tq_pack": (None, [c_void_p, c_int64, c_int32, c_int32, c_int32, c_int32, c_void_p]),
    "tq_kv_block_bytes": (c_int64, [c_int32, c_int32, c_int32]),
    "tq_best_scales": (None, [c_void_p, c_void_p, c_void_p, c_void_p]),
    "tq_set_threads": (None, [c_int32]),
    "tq_get_threads": (c_int32, []),
    "tq_isa": (c_char_p, []),
    "tq_self_check": (c_char_p, []),
    "tq_read_bandwidth": (c_double, [c_int64]),
    "tq_struct_size": (c_int32, [c_char_p]),
}


@dataclass(frozen=True)
class LibraryState:
    """Whether the kernels are there, and why or why not.

    Attributes:
        level: The instruction set they are built for, or None.
        threads: How many they use.
        hint: What would help where they are not there.
    """

    active: bool
    reason: str
    level: str | None = None
    threads: int = 0
    hint: str | None = None


@once
def library() -> ctypes.CDLL:
    """The kernels for this processor, with TQ_THREADS threads.

    Raises:
        Declined: They cannot be had, and why.
        UsageError: TQ_CPU_ISA or TQ_THREADS is wrong.
    """
    if sys.platform != "linux":
        raise Declined("not made for this system")
    loaded = _first_usable(isa.chosen())
    loaded.tq_set_threads(cores.threads())
    return loaded


_passed_over: dict[str, str] = {}  # levels that were better, and why they are not used


def _first_usable(levels: list[Level]) -> ctypes.CDLL:
    for level in levels:
        try:
            return load(level)
        except Declined as declined:
            if not level.on_trial or level is levels[-1]:
                raise
            _passed_over[level.name] = str(declined)
    raise AssertionError("a processor has at least one level")


@functools.cache
def state() -> LibraryState:
    """What `library` found, for people.

    Raises:
        UsageError: TQ_CPU_ISA or TQ_THREADS is wrong.
    """
    try:
        loaded = library()
    except Declined as declined:
        return LibraryState(False, str(declined), hint=declined.hint)
    level, threads = loaded.tq_isa().decode(), loaded.tq_get_threads()
    reason = f"{level}, {threads} thread{'s' if threads > 1 else ''}"
    reason += "".join(f"; not {name}: {why}" for name, why in _passed_over.items())
    return LibraryState(True, reason, level, threads)


def compiled(level: Level) -> Built:
    """The library of a level, which need not be one that this processor can run.

    Raises:
        Declined: It cannot be built.
    """
    sources, headers = sorted(KERNELS.glob("*.cpp")), sorted(KERNELS.glob("*.h"))
    return build.build(
        build.Recipe(f"kernels-{level.name}", "C++", tuple(sources), tuple(headers), (*FLAGS, *level.flags))
    )


@once
def load(level: Level) -> ctypes.CDLL:
    """The kernels of one level, with the types of their arguments.

    Raises:
        Declined: They cannot be built or loaded, or this processor or this system cannot run them.
    """
    missing = isa.lacking(level)
    if missing:
        raise Declined(f"this processor lacks {', '.join(missing)}")
    loaded = build.load(compiled(level).path)
    for name, (result, arguments) in {**dict.fromkeys(OPERATIONS, OPERATION), **FUNCTIONS}.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    for name, structure in STRUCTURES.items():
        size = loaded.tq_struct_size(name.encode())
        if size != ctypes.sizeof(structure):
            raise AssertionError(f"{name} has {size} bytes in C and {ctypes.sizeof(structure)} in {structure.__name__}")
    why = loaded.tq_self_check()
    if why is not None:
        raise Declined(why.decode())
    return loaded
