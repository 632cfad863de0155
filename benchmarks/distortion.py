"""Mean square error of codebooks and codecs on N(0,1), beside one least-squares loop, the RMS, and mx.quantize.

python benchmarks/distortion.py
"""

import mlx.core as mx
import numpy as np
from common import write

from tq.engine.quantize import QuantSpec, decode, encode
from tq.engine.quantize.codebooks import lloyd_max, mean_square_error, stored_codebook
from tq.engine.quantize.nearest import NearestLevel

ROWS, N = 4096, 1024


def one_scale(x: np.ndarray, bits: int, group: int, loops: int) -> float:
    """MSE with the RMS as scale (0 loops), or with least squares from there."""
    nearest = NearestLevel(stored_codebook("lloyd-max", bits))
    groups = x.reshape(-1, group)
    scale = np.sqrt((groups**2).mean(axis=1))
    for _ in range(loops):
        q = nearest.levels[nearest.codes(groups / scale[:, None])]
        scale = (groups * q).sum(axis=1) / (q * q).sum(axis=1)
    scale = scale.astype(np.float16).astype(np.float32)
    q = nearest.levels[nearest.codes(groups / scale[:, None])] * scale[:, None]
    return float(((groups - q) ** 2).mean())


def main() -> None:
    x = np.random.default_rng(0).standard_normal((ROWS, N)).astype(np.float32)
    weight = mx.array(x)
    codebooks = {f"{bits} bits": mean_square_error(lloyd_max(2**bits)) for bits in range(1, 9)}
    codebooks["ternary"] = mean_square_error(lloyd_max(3))
    codecs = []
    for group in (32, 64, 128, 0):
        for bits in (1, 2, 3, 4, 5, 6, 8):
            codecs.append(QuantSpec("lloyd-max", bits, group))
            if group and bits > 1:
                codecs.append(QuantSpec("affine", bits, group))
        codecs.append(QuantSpec("ternary", 0, group))
    records = []
    for spec in codecs:
        error = float(((decode(encode(weight, spec)) - weight) ** 2).mean())
        records.append({"codes": spec.label(), "bits_per_weight": spec.bits_per_weight((ROWS, N)), "mse": error})
        print(records[-1], flush=True)
    baselines = []
    for bits in (2, 3, 4):
        w, s, b = mx.quantize(weight, 64, bits)
        affine = float(((mx.dequantize(w, s, b, 64, bits) - weight) ** 2).mean())
        baselines.append(
            {
                "bits": bits,
                "rms_g64": one_scale(x, bits, 64, 0),
                "least_squares_g64": one_scale(x, bits, 64, 4),
                "mx_quantize_g64": affine,
            }
        )
        print(baselines[-1], flush=True)
    write("distortion", {"exact_codebook_mse": codebooks, "codecs": records, "baselines": baselines})


if __name__ == "__main__":
    main()
