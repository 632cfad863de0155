"""The checkpoint layout of turboquant-mlx-full (config.json mode "turboquant"), one matrix at a time, both ways.

Arrays of a matrix at ``path`` with n input features; experts put one axis in front of ``weight`` and ``scales``:

    path.weight      uint32   (out, ceil(n / c))  c = floor(32 / bits) codes in a word, low bits first; trits: c = 20
    path.scales      float16  (out, n / group_size)
    path.codebook    float16  (2^bits,), or 3 levels for trits: the only statement of the width
    path.signs       float16  (n,)                of y = H (signs * x); all ones where nothing is rotated
    path.qjl_packed, path.qjl_norms, path.qjl_signs   as in ``tq.engine.quantize.qjl``: same formula, same basis

A matrix with ``biases`` and without ``codebook`` is in MLX's affine layout. Group sizes follow from shapes alone.
Described from the behaviour of versions 0.6.1 and 0.30.0.
"""

from collections import Counter
from collections.abc import Iterable, Mapping

import mlx.core as mx
import numpy as np

from tq.engine.model.formats import Specs, TqFormat
from tq.engine.model.recipe import FormatDefaults
from tq.engine.model.recipe_file import Choice
from tq.engine.model.roles import Matrix
from tq.engine.quantize import PackedTensor, QuantSpec, layout
from tq.engine.quantize.packed import SHARED, ArrayLayout
from tq.engine.quantize.packing import TRITS_PER_WORD, words_per_row
from tq.engine.quantize.rotation import MAX_POWER_OF_TWO
from tq.engine.quantize.spec import FOREIGN_GROUP_SIZE, GROUP_SIZES, ROW
from tq.errors import TQError

MODE = "turboquant"
QJL_ARRAYS = ("qjl_packed", "qjl_norms", "qjl_signs")
# Every array of a quantized matrix. ``bias`` belongs to the layer: it is an ordinary tensor.
SUFFIXES = ("weight", "scales", "biases", "codebook", "signs", *QJL_ARRAYS)
LEVELS_TO_BITS = {3: 0} | {2**bits: bits for bits in range(1, 9)}  # 0: trits
# Its loader reads 5 to 8 bits as well, but its converter cannot make them and its kernels were never run with them.
WRITABLE_BITS = (2, 3, 4)
WRITABLE_AFFINE_BITS = (2, 3, 4, 6, 8)
# Where ``attn_bits`` and ``mlp_bits`` hold for versions that go by rules; ``bits`` holds elsewhere.
ATTENTION_BLOCKS = ("self_attn", "attention", "linear_attn")
MLP_BLOCKS = ("mlp", "feed_forward")


class TurboquantFormat(TqFormat):
    """The layout as a format to write."""

    name = MODE
    # It has no other code for an embedding, and its older versions know one width for all of attention.
    defaults = FormatDefaults(vocabulary=Choice(codec="affine", rotation="none"), value_extra_bits=0)

    def refuse(self, matrix: Matrix, spec: QuantSpec) -> str | None:
        """The reason why its loader cannot run ``matrix`` with ``spec``; None if it can."""
        if spec.codec == "affine":
            if spec.rotation != "none":
                return "affine matrices are not rotated there; use rotation none"
            if spec.bits not in WRITABLE_AFFINE_BITS:
                return f"affine {spec.bits}-bit is not one of {', '.join(map(str, WRITABLE_AFFINE_BITS))} bits"
            return None
        if matrix.kind not in ("linear", "switch"):
            return "embeddings and matrices per head can only be affine there"
        experts = matrix.kind == "switch"
        if spec.codec == "ternary" and not experts:
            return "only experts can be ternary there"
        if spec.codec == "lloyd-max" and spec.bits not in WRITABLE_BITS:
            return f"{spec.bits}-bit is not one of 2, 3, 4 bits"
        if spec.group_size == ROW:
            return "one scale per row would run on one GPU lane per row there; use a group size of 32, 64 or 128"
        if spec.qjl and experts:
            return "experts have no qjl there"
        if spec.rotation == "hadamard" and _other_blocks(matrix.shape[-1]):
            return f"{matrix.shape[-1]} input features are rotated in larger blocks there; use rotation none"
        return None

    def layout(self, matrix: Matrix, spec: QuantSpec) -> dict[str, ArrayLayout]:
        """Tensors that one matrix adds to the checkpoint, in order."""
        *rows, n = matrix.shape
        found = layout(spec, matrix.shape)
        if spec.codec != "affine":
            n_levels = next(levels for levels, bits in LEVELS_TO_BITS.items() if bits == spec.bits)
            found["weight"] = ArrayLayout(mx.uint32, (*rows, _words_per_row(n, spec.bits)))
            found["codebook"] = ArrayLayout(mx.float16, (n_levels,))
            found["signs"] = ArrayLayout(mx.float16, (n,))
        if spec.qjl:
            found["qjl_signs"] = ArrayLayout(mx.float16, (n,))
        return {f"{matrix.path}.{suffix}": found[suffix] for suffix in SUFFIXES if suffix in found}

    def arrays(self, path: str, packed: PackedTensor) -> dict[str, mx.array]:
        """The tensors of ``layout``, of a matrix that ``refuse`` accepts."""
        arrays, spec = dict(packed.arrays), packed.spec
        if spec.codec != "affine":
            n_words = _words_per_row(packed.in_features, spec.bits)
            arrays["weight"] = _from_stream(arrays["weight"], _used_bits(spec.bits), n_words)
            # Its loader takes one negative sign for a rotation, so these are all ones without.
            arrays.setdefault("signs", mx.ones(packed.in_features, dtype=mx.float16))
        return {f"{path}.{suffix}": arrays[suffix] for suffix in SUFFIXES if suffix in arrays}

    def shared(self, specs: Specs) -> dict[str, mx.array]:
        """Nothing: each matrix holds its codebook and its signs."""
        return {}

    def quantization(self, specs: Specs, dtype: str) -> dict:
        """The ``quantization`` object of config.json.

        Version 0.30 reads widths and groups from the tensors and needs ``rotation`` only; where some matrices are
        rotated and some not, "none" makes it look at the signs of each. Earlier versions go by ``bits``, ``attn_bits``,
        ``mlp_bits`` and ``group_size``, and run what these can say.
        """
        coded = {path: spec for path, (_, spec) in specs.items() if spec.codec != "affine"}
        widths = {path: spec.bits for path, spec in coded.items() if spec.codec == "lloyd-max"}
        affine = {(spec.bits, spec.group_size) for _, spec in specs.values() if spec.codec == "affine"}
        attention, mlp = _inside(widths, ATTENTION_BLOCKS), _inside(widths, MLP_BLOCKS)
        elsewhere = [bits for path, bits in widths.items() if path not in attention | mlp]
        result = {
            "mode": MODE,
            "bits": _most_common(elsewhere or widths.values(), 2),
            "group_size": _most_common((spec.group_size for spec in coded.values()), 64),
            "use_qjl": any(spec.qjl for spec in coded.values()),
            "rotation": "hadamard" if all(spec.rotation == "hadamard" for spec in coded.values()) else "none",
            "attn_bits": _only(attention.values()),
            "mlp_bits": _only(mlp.values()),
            "ternary_experts": any(spec.codec == "ternary" for spec in coded.values()),
        }
        if len(affine) == 1:
            bits, group_size = affine.pop()
            result["affine_extras"] = {"bits": bits, "group_size": group_size}
        return result


def is_turboquant(config: Mapping) -> bool:
    """Whether ``config.json`` describes a checkpoint in this layout."""
    return _settings(config).get("mode") == MODE


def matrix_paths(names: Iterable[str]) -> list[str]:
    """Paths of the quantized matrices among the tensor names of a checkpoint."""
    return sorted(name.removesuffix(".scales") for name in names if name.endswith(".scales"))


def read_matrices(
    config: dict, weights: dict[str, mx.array], shapes: dict[str, tuple[int, ...]]
) -> dict[str, PackedTensor]:
    """Take the quantized matrices of a checkpoint out of ``weights``, lazily. Equal signs become one array.

    Args:
        config: config.json.
        weights: All tensors of the checkpoint; those of quantized matrices are removed.
        shapes: Dense shapes (..., out, in) of the modules that may be quantized.

    Raises:
        TQError: As ``read_matrix``, or a quantized matrix belongs to no such module.
    """
    found = {}
    known: dict[bytes, mx.array] = {}
    for path in matrix_paths(weights):
        shape = shapes.get(path)
        if shape is None:
            raise TQError(f"{path} is quantized, but the model has no matrix of that name that tq can replace")
        packed = read_matrix(path, weights, config, shape[-1])
        if packed.shape != tuple(shape):
            raise TQError(f"{path} has the shape {packed.shape} where the model has {tuple(shape)}")
        for suffix in SUFFIXES:
            weights.pop(f"{path}.{suffix}", None)
        # Each matrix has its copy; modules that rotate alike are known by the array.
        for name in packed.arrays.keys() & set(SHARED):
            array = packed.arrays[name]
            packed.arrays[name] = known.setdefault(np.array(array).tobytes(), array)
        found[path] = packed
    return found


def read_matrix(
    path: str, weights: Mapping[str, mx.array], config: Mapping, in_features: int | None = None
) -> PackedTensor:
    """One matrix of a checkpoint. Its words are repacked when it is evaluated, which takes four times their size.

    Args:
        path: Name of the matrix, without ``.weight``.
        weights: The tensors of the checkpoint by name; only those of ``path`` are used.
        config: config.json.
        in_features: Input features of the layer, if known: bits and group of an affine matrix follow from them.
            Without, they are those of ``affine_extras`` in ``config``.

    Raises:
        TQError: The arrays of ``path`` are incomplete or contradict each other.
    """
    if _settings(config).get("fuse_rotations"):
        raise TQError(
            "this checkpoint was made with --fuse-rotations, which no version of turboquant-mlx-full runs correctly",
            "convert the original model again",
        )
    own = {suffix: weights[f"{path}.{suffix}"] for suffix in SUFFIXES if f"{path}.{suffix}" in weights}
    read = _read_coded if "codebook" in own else _read_affine
    return read(path, own, config, in_features)


def _read_coded(path: str, own: dict[str, mx.array], config: Mapping, in_features: int | None) -> PackedTensor:
    qjl = "qjl_packed" in own
    _require(path, own, "weight", "scales", "signs", *(QJL_ARRAYS if qjl else ()))
    n, n_levels = own["signs"].size, own["codebook"].size
    if in_features not in (None, n):
        raise TQError(f"{path} has {n} input features where the model has {in_features}")
    if n_levels not in LEVELS_TO_BITS:
        raise TQError(f"{path}.codebook has {n_levels} levels, not 3 or a power of two up to 256")
    bits = LEVELS_TO_BITS[n_levels]
    _check_words(path, own["weight"], _words_per_row(n, bits))
    rotation = _rotation(path, own["signs"], config)
    if rotation == "none":
        del own["signs"]
    elif _other_blocks(n):
        raise TQError(f"{path} has {n} input features, rotated in blocks larger than those of tq")
    group_size = _group_size(path, n, own["scales"].shape[-1])
    spec = QuantSpec("lloyd-max" if bits else "ternary", bits, group_size, rotation, qjl)
    shape = (*own["weight"].shape[:-1], n)
    own["weight"] = _to_stream(own["weight"], _used_bits(bits), words_per_row(n, bits))
    return PackedTensor(spec, shape, own)


def _read_affine(path: str, own: dict[str, mx.array], config: Mapping, in_features: int | None) -> PackedTensor:
    _require(path, own, "weight", "scales", "biases")
    words, groups = own["weight"].shape[-1], own["scales"].shape[-1]
    if in_features is None:
        # Words and groups alone give bits * group_size: 4 bits in groups of 32 look like 2 bits in groups of 64.
        extras = _settings(config).get("affine_extras")
        if not extras:
            raise TQError(f"config.json lacks the affine_extras that say how {path} is quantized")
        in_features = groups * extras["group_size"]
    bits = words * 32 // in_features
    _check_words(path, own["weight"], words_per_row(in_features, bits) if bits else None)
    spec = QuantSpec("affine", bits, _group_size(path, in_features, groups), "none")
    return PackedTensor(spec, (*own["weight"].shape[:-1], in_features), own)


def _settings(config: Mapping) -> Mapping:
    return config.get("quantization") or config.get("quantization_config") or {}


def _require(path: str, own: dict[str, mx.array], *suffixes: str) -> None:
    missing = [f"{path}.{suffix}" for suffix in suffixes if suffix not in own]
    if missing:
        raise TQError(f"the checkpoint lacks {', '.join(missing)}", "download or convert the model again")


def _check_words(path: str, weight: mx.array, words: int | None) -> None:
    if weight.dtype != mx.uint32 or weight.shape[-1] != words:
        raise TQError(
            f"{path}.weight is {weight.dtype} {tuple(weight.shape)}, which its other arrays contradict",
            "download or convert the model again",
        )


def _group_size(path: str, n: int, groups: int) -> int:
    size, rest = divmod(n, groups)
    if not rest and size in (*GROUP_SIZES, FOREIGN_GROUP_SIZE):
        return size
    if groups == 1:
        return ROW
    valid = ", ".join(map(str, (FOREIGN_GROUP_SIZE, *GROUP_SIZES)))
    raise TQError(f"{path} has {groups} scales for {n} input features; tq reads groups of {valid} or a whole row")


def _rotation(path: str, signs: mx.array, config: Mapping) -> str:
    name = _settings(config).get("rotation", "hadamard")
    if name in ("hadamard", "blockwise_hadamard"):  # two names of one rotation
        return "hadamard"
    if name != "none":
        raise TQError(f"rotation {name!r} in config.json is not one of hadamard, blockwise_hadamard, none")
    # Versions that could not switch the rotation off still wrote "none"; unrotated matrices have no negative sign.
    return "hadamard" if mx.any(signs < 0).item() else "none"


def _other_blocks(n: int) -> bool:
    """Whether the layout rotates n features in other blocks than tq, which bounds their power of two."""
    return n % (2 * MAX_POWER_OF_TWO) == 0


def _most_common(values: Iterable[int], default: int) -> int:
    ranked = Counter(values).most_common(1)
    return ranked[0][0] if ranked else default


def _only(values: Iterable[int]) -> int | None:
    """The value that all share, or None."""
    found = set(values)
    return found.pop() if len(found) == 1 else None


def _inside(widths: dict[str, int], blocks: tuple[str, ...]) -> dict[str, int]:
    return {path: bits for path, bits in widths.items() if set(path.split(".")) & set(blocks)}


def _words_per_row(n: int, bits: int) -> int:
    return -(-n // (32 // bits if bits else TRITS_PER_WORD))


def _used_bits(bits: int) -> int:
    """Bits of a word that hold codes: 30 of 32 at 3 bits. Words of trits are used whole."""
    return 32 // bits * bits if bits else 32


def _to_stream(words: mx.array, used: int, n_words: int) -> mx.array:
    """Words (..., any) that hold ``used`` bits each as one bit stream (..., n_words), by the word and not by the code.

    With s = 32 - used unused bits, 32 / s words fill used / s words of the stream exactly, each from two neighbours.
    """
    if used == 32:
        return words
    step = 32 - used
    blocks = _blocks(words & (2**used - 1), 32 // step)
    shift = mx.arange(used // step, dtype=mx.uint32) * step
    stream = (blocks[..., :-1] >> shift) | (blocks[..., 1:] << (used - shift))
    return _rows(stream, n_words)


def _from_stream(stream: mx.array, used: int, n_words: int) -> mx.array:
    """The inverse of ``_to_stream``."""
    if used == 32:
        return stream
    step = 32 - used
    blocks = _blocks(stream, used // step)
    zero = mx.zeros((*blocks.shape[:-1], 1), mx.uint32)
    shift = mx.arange(32 // step, dtype=mx.uint32) * step
    # The first shift would be 32, which is undefined, but its word is 0.
    low = mx.concatenate([zero, blocks], axis=-1) >> mx.minimum(32 - shift, 31)
    high = mx.concatenate([blocks, zero], axis=-1) << shift
    return _rows((low | high) & (2**used - 1), n_words)


def _blocks(words: mx.array, size: int) -> mx.array:
    """(..., n) to (..., blocks, size), zeros at the end of each row."""
    *lead, n = words.shape
    return mx.pad(words, [(0, 0)] * len(lead) + [(0, -n % size)]).reshape(*lead, -1, size)


def _rows(blocks: mx.array, n_words: int) -> mx.array:
    return mx.contiguous(blocks.reshape(*blocks.shape[:-2], -1)[..., :n_words])
