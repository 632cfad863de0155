"""Two correct kernels with their inputs and what they should compute, for tests that put bugs into them."""

from pathlib import Path

import numpy as np
from metal.emulator import Kernel

FOLDER = Path(__file__).parent


def codes(words: np.ndarray) -> np.ndarray:
    """The eight 4-bit codes of each word, lowest bits first, along the last axis."""
    return (words[..., None] >> (np.arange(8, dtype=np.uint32) * 4) & 15).reshape(*words.shape[:-1], -1)


class Matvec:
    """y = W x of 42 rows and 512 columns: the last SIMD-group has two rows."""

    source = (FOLDER / "matvec.metal").read_text()
    template = (("T", np.float16), ("GROUP", 64))
    output_dtypes = (np.float16,)

    def __init__(self, source: str = source, rows: int = 42, columns: int = 512):
        random = np.random.default_rng(0)
        self.kernel = Kernel("matvec", ["w", "scales", "codebook", "x"], ["y"], source)
        self.rows = rows
        self.inputs = [
            random.integers(0, 2**32, (rows, columns // 8), dtype=np.uint32),
            random.random((rows, columns // 64)).astype(np.float16) * np.float16(0.1),
            np.sort(random.standard_normal(16)).astype(np.float16),
            random.standard_normal(columns).astype(np.float16),
        ]

    def run(self, **mode) -> np.ndarray:
        (output,) = self.kernel(
            inputs=self.inputs,
            template=self.template,
            grid=(-(-self.rows // 8) * 64, 1, 1),
            threadgroup=(64, 1, 1),
            output_shapes=[(self.rows,)],
            output_dtypes=self.output_dtypes,
            **mode,
        )
        return output

    def expected(self) -> np.ndarray:
        w, scales, codebook, x = self.inputs
        return (codebook.astype(float)[codes(w)] * np.repeat(scales.astype(float), 64, axis=1)) @ x.astype(float)


class Attend:
    """Attention of 8 heads of 128 with 2 heads of 97 keys: SIMD-groups have 25 or 24 of them."""

    source = (FOLDER / "attend.metal").read_text()
    template = (("T", np.float16), ("D", 128))
    output_dtypes = (np.float16,)

    def __init__(self, source: str = source, heads: int = 8, kv_heads: int = 2, length: int = 97):
        random = np.random.default_rng(1)
        names = ["q", "keys", "key_scales", "values", "value_scales", "codebook", "scale"]
        self.kernel = Kernel("attend", names, ["out"], source)
        self.heads = heads
        words = random.integers(0, 2**32, (2, kv_heads, length, 16), dtype=np.uint32)
        scales = (random.random((2, kv_heads, length)) + 0.5).astype(np.float16)
        self.inputs = [
            random.standard_normal((heads, 128)).astype(np.float16),
            *(words[0], scales[0], words[1], scales[1]),
            np.sort(random.standard_normal(16)).astype(np.float16),
            np.float32(128**-0.5),
        ]

    def run(self, **mode) -> np.ndarray:
        (output,) = self.kernel(
            inputs=self.inputs,
            template=self.template,
            grid=(self.heads * 128, 1, 1),
            threadgroup=(128, 1, 1),
            output_shapes=[(self.heads, 128)],
            output_dtypes=self.output_dtypes,
            **mode,
        )
        return output

    def expected(self) -> np.ndarray:
        q, keys, key_scales, values, value_scales, codebook, scale = self.inputs
        repeats = self.heads // keys.shape[0]
        k, v = (
            np.repeat(codebook.astype(float)[codes(words)] * scales.astype(float)[..., None], repeats, axis=0)
            for words, scales in ((keys, key_scales), (values, value_scales))
        )
        scores = np.einsum("hd,hsd->hs", q.astype(float), k) * scale
        weights = np.exp(scores - scores.max(1, keepdims=True))
        return np.einsum("hs,hsd->hd", weights / weights.sum(1, keepdims=True), v)
