"""The mathematics of quantization: rotation, codebooks, scales, packing, codecs. It knows no model and no backend."""

from tq.engine.quantize.codecs import CODECS, decode, decode_rotated, encode, layout, shared_arrays
from tq.engine.quantize.packed import PackedTensor
from tq.engine.quantize.spec import QuantSpec

__all__ = ["CODECS", "PackedTensor", "QuantSpec", "decode", "decode_rotated", "encode", "layout", "shared_arrays"]
