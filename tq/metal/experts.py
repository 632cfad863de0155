"""Launches the kernels of experts: matrices (experts, out, in) of which each pair (a token, an expert) uses one.

Matrices are given everywhere as weight (codes, uint32 (experts, out, words)), scales (float16 (experts, out, groups)),
codebook, bits and group size, as to ``matmul``; bias is (experts, out). ``experts`` is uint32 (pairs,). With ``slots``,
uint32 (n,), expert e is read at ``slots[e]`` of all arrays of a matrix: experts that stay on disk keep the numbers that
the model gives them, and lie where there was room.
"""

from functools import lru_cache
from typing import Literal

import mlx.core as mx

from tq.metal.fit import decoding
from tq.metal.kernel import Kernel, Launch
from tq.metal.matmul import ENOUGH, THREADS
from tq.metal.matvec import ROWS, run_length

GATHER = Kernel("gather_matvec", ("x", "w", "scales", "levels", "bias", "experts", "slots"), ("y",))
GATHER_TILES = Kernel("gather_matmul", GATHER.inputs, ("y",))
GATE_UP = Kernel(
    "gate_up",
    (
        "x",
        *("gate", "gate_scales", "gate_levels", "gate_bias"),
        *("up", "up_scales", "up_levels", "up_bias"),
        *("experts", "slots", "constants"),
    ),
    ("y",),
)
SIMD_GROUPS = 2  # of a threadgroup that multiplies rows of x
LANES, LEAST_BUSY = (32, 16, 8, 4), 15 / 16  # that share rows of W, and the part of their steps that has columns
TOGETHER = 4  # neighbouring pairs that may share a decoded weight, if they have the same expert
# Pairs per expert from which tiles are best. Per weight, a tile spends about 10 cycles on decoding for all pairs of an
# expert, 4 on staging and 18 on each 16 pairs; without tiles, it is 7 for every TOGETHER pairs and 1 for each.
ENOUGH_FOR_TILES = 12

Stored = tuple[mx.array, mx.array, mx.array]  # weight, scales, codebook
Activation = Literal["silu", "gelu_tanh", "swiglu_oai"]
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu_tanh", "swiglu_oai")  # in the order of gate_up.metal


def gather(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    codebook: mx.array,
    experts: mx.array,
    bits: int,
    group_size: int,
    bias: mx.array | None = None,
    slots: mx.array | None = None,
    neighbours: bool = False,
    n_experts: int | None = None,
) -> mx.array:
    """x (rows, in) -> (pairs, out): each row times the matrices of the next pairs / rows experts.

    Args:
        n_experts: How many experts the pairs are of, if not all matrices are: slots hold those of other layers too.
        neighbours: Neighbouring pairs often have the same expert, because they are sorted or of one batch: the kernel
            that is best for their number is chosen. All are correct for all pairs.
    """
    pairs, rows, n_experts = experts.size, weight.shape[1], n_experts or weight.shape[0]
    if neighbours and pairs >= ENOUGH_FOR_TILES * n_experts:
        return gather_tiles(x, weight, scales, codebook, experts, bits, group_size, bias, slots, n_experts)
    decoder = decoding(codebook, bits, x.dtype)
    together = TOGETHER if neighbours else 1
    extra = ("M", together), ("FORM", decoder.form), ("TABLE", decoder.table_size)
    launch = _launch(
        (x.shape, rows, pairs), x.dtype, bits, group_size, bias is not None, slots is not None, together, extra
    )
    # A kernel has all of its inputs: others stand in for those that are not read.
    bias, slots = scales if bias is None else bias, experts if slots is None else slots
    return GATHER([x, weight, scales, decoder.levels, bias, experts, slots], launch)[0]


def gather_tiles(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    codebook: mx.array,
    experts: mx.array,
    bits: int,
    group_size: int,
    bias: mx.array | None = None,
    slots: mx.array | None = None,
    n_experts: int | None = None,
) -> mx.array:
    """As ``gather``, for many pairs of which neighbours have the same expert: any order is correct, and may be slow."""
    pairs, rows, n_experts = experts.size, weight.shape[1], n_experts or weight.shape[0]
    if x.shape[0] < pairs:
        x = mx.repeat(x, pairs // x.shape[0], axis=0)
    decoder = decoding(codebook, bits, x.dtype)
    # A tile works on one expert at a time: where experts have few rows, larger tiles only make threadgroups fewer.
    bm = 64 if pairs >= 64 * n_experts else 32
    bn = 64 if -(-pairs // bm) * -(-rows // 64) >= ENOUGH else 32
    launch = Launch(
        {
            "T": x.dtype,
            "BITS": bits,
            "GROUP": group_size,
            "FORM": decoder.form,
            "TABLE": decoder.table_size,
            "WHOLE": x.shape[1] % run_length(bits) == 0,
            "BM": bm,
            "BN": bn,
            "BIAS": bias is not None,
            "SLOTS": slots is not None,
        },
        grid=(-(-pairs // bm) * THREADS, -(-rows // bn), 1),
        threadgroup=(THREADS, 1, 1),
        outputs=[((pairs, rows), x.dtype)],
    )
    bias, slots = scales if bias is None else bias, experts if slots is None else slots
    return GATHER_TILES([x, weight, scales, decoder.levels, bias, experts, slots], launch)[0]


def gate_up(
    x: mx.array,
    gate: Stored,
    up: Stored,
    experts: mx.array,
    bits: int,
    group_size: int,
    activation: Activation,
    alpha: float = 1.702,
    limit: float = 7.0,
    gate_bias: mx.array | None = None,
    up_bias: mx.array | None = None,
    slots: mx.array | None = None,
) -> mx.array:
    """x (rows, in) -> act(gate x, up x) (pairs, hidden), for few pairs, as ``gather``. Both have a bias, or none.

    Args:
        activation: ``silu`` and ``gelu_tanh``: act(gate) * up; ``swiglu_oai``: GPT-OSS's, with ``alpha`` and ``limit``.
    """
    pairs, rows = experts.size, gate[0].shape[1]
    gate_decoder, up_decoder = (decoding(matrix[2], bits, x.dtype) for matrix in (gate, up))
    if (gate_bias is None) != (up_bias is None):
        raise ValueError("of gate and up, only one has a bias")
    extra = (
        *(("GATE_FORM", gate_decoder.form), ("GATE_TABLE", gate_decoder.table_size)),
        *(("UP_FORM", up_decoder.form), ("UP_TABLE", up_decoder.table_size)),
        ("ACTIVATION", ACTIVATIONS.index(activation)),
    )
    launch = _launch(
        (x.shape, rows, pairs), x.dtype, bits, group_size, gate_bias is not None, slots is not None, 1, extra
    )
    inputs = [
        x,
        *(gate[0], gate[1], gate_decoder.levels, gate[1] if gate_bias is None else gate_bias),
        *(up[0], up[1], up_decoder.levels, up[1] if up_bias is None else up_bias),
        *(experts, experts if slots is None else slots, _constants(alpha, limit)),
    ]
    return GATE_UP(inputs, launch)[0]


@lru_cache
def _constants(alpha: float, limit: float) -> mx.array:
    return mx.array([alpha, limit], dtype=mx.float32)


@lru_cache(maxsize=4096)
def _launch(
    shape: tuple[tuple[int, ...], int, int],
    dtype: mx.Dtype,
    bits: int,
    group_size: int,
    bias: bool,
    slots: bool,
    together: int,
    extra: tuple[tuple[str, int], ...],
) -> Launch:
    """How a kernel of pairs is run. shape: of x, rows of W, pairs; ``together``: neighbouring pairs of one SIMD-group.

    Lanes share the rows of W; the grid is whole threadgroups along the rows, and pairs.
    """
    (x_rows, columns), rows, pairs = shape
    runs = -(-columns // run_length(bits))
    # The more lanes, the longer a read from memory; but few of them may be left without columns. Pairs make
    # threadgroups enough, so that nothing else has to share a row.
    lanes = next((n for n in LANES if runs >= LEAST_BUSY * n * -(-runs // n)), LANES[-1])
    threadgroups = -(-rows // (ROWS * SIMD_GROUPS * 32 // lanes))
    return Launch(
        {
            "T": dtype,
            "BITS": bits,
            "GROUP": group_size,
            "WHOLE": columns % run_length(bits) == 0,
            "ROWS": ROWS,
            "LK": lanes,
            "PAIRS_PER_X": pairs // max(x_rows, 1),
            "BIAS": bias,
            "SLOTS": slots,
            **dict(extra),
        },
        grid=(threadgroups * 32 * SIMD_GROUPS, -(-pairs // together), 1),
        threadgroup=(32 * SIMD_GROUPS, 1, 1),
        outputs=[((pairs, rows), dtype)],
    )
