"""The kernel variants that `tq doctor --certify` runs on a GPU: each kernel on the codes and sizes of real models.

Three codebooks that no polynomial fits are among them, so that a report shows what tables cost instead.
"""

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from tq.engine.quantize.codebooks import stored_codebook
from tq.metal import attend_variants, embed, expert_variants, matmul, matvec, rotate
from tq.metal.attend_variants import Setting
from tq.metal.expert_variants import Layer
from tq.metal.variants import DTYPES, Codes, Variant

COLUMNS = 4096
HALF = (mx.float16,)


def catalogue() -> Iterator[Variant]:
    """All of them, those of one kernel after the other."""
    groups = [_codes(bits, 64) for bits in range(9)]
    rows = [_codes(bits, 0) for bits in (0, 2, 3, 4)]
    tables = [Codes(bits, 64, _irregular(bits), " from a table") for bits in (2, 3, 4)]
    usual = [_codes(3, 64), _codes(4, 64)]
    yield from matvec.variants([*groups, *rows, *tables], HALF, [(1, 8192, COLUMNS)])
    yield from matvec.variants(usual, (mx.bfloat16, mx.float32), [(1, 8192, COLUMNS)])
    yield from matvec.variants(usual, DTYPES, [(4, 8192, COLUMNS), (8, 8192, COLUMNS)])
    yield from matvec.variants(usual, HALF, [(1, 4096, n) for n in (512, 768, 1024, 2880, 5120)])
    yield from matmul.variants(groups, HALF, [(64, 2048, 2048)])
    yield from matmul.variants(usual, DTYPES, [(512, 2048, 2048)])
    yield from embed.variants(groups, HALF, [(64, 8192, 2048)])
    yield from rotate.variants(DTYPES, [(n, dim) for n in (1, 512) for dim in (768, 2048, 2880, 4096, 5120, 8192)])
    chosen = [3, 17, 0, 30, 9, 22, 5, 11]
    for codes in [_codes(0, 64), *usual]:
        yield from expert_variants.variants(Layer(codes, mx.float16, (32, 1024, 2048), chosen, pairs_per_x=8))
    for bits in ((8, 8), (8, 4), (8, 3), (4, 4), (3, 3)):
        for length in (1, 4, 128):
            yield from attend_variants.variants(
                [Setting(bits, (128, 128), mx.float16, (32, 8), (128, 0, 8192, 48), length=length)]
            )


def _codes(bits: int, group_size: int) -> Codes:
    return Codes(bits, group_size, stored_codebook("lloyd-max" if bits else "ternary", bits))


def _irregular(bits: int) -> np.ndarray:
    return np.sort(np.random.default_rng(bits).standard_normal(2**bits))
