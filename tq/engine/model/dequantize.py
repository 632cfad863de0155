"""Weights of an already quantized source as plain matrices: lazy graphs, so that one is computed when it is needed.

What is stored per output row (FP8, AWQ, compressed-tensors) is undone before the model's ``sanitize``, whose splits
and stacks then see plain matrices. What mlx-lm and its ``sanitize`` give in MLX's own layout is undone after it.
"""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from tq.errors import TQError

# Values of quant_method in config.json whose tensors are read, here or by mlx-lm's sanitize.
READABLE_METHODS = ("fp8", "fbgemm_fp8", "mxfp4", "mxfp8", "modelopt", "compressed-tensors", "awq")
# MLX's modes with uint8 scales: each has one pair of bits and group size.
FLOAT_MODES = {(4, 16): "nvfp4", (4, 32): "mxfp4", (8, 32): "mxfp8"}
# An nvfp4 global scale is the largest magnitude: 6 (of E2M1) times 448 (of E4M3) times the factor of the values.
NVFP4_GLOBAL_MAX = 6 * 448
# Beside a quantized weight: scales that were used here, and those of activations and caches, which have no use.
COMPANIONS = (
    *("scale_inv", "weight_scale_inv", "weight_scale", "weight_scale_2", "weight_global_scale"),
    *("weight_packed", "weight_shape", "qweight", "qzeros", "scales"),
    *("activation_scale", "activation_scale_inv", "input_scale", "input_global_scale"),
)
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble that holds each of eight columns
ORIGINAL = "convert the original, unquantized model"


def dequantize_raw(weights: Mapping[str, mx.array], config: dict[str, Any]) -> dict[str, mx.array]:
    """Source tensors with quantized matrices replaced by dense ``X.weight``; their scales are gone.

    Read are FP8 with block, row or tensor scales (``weight_scale_inv``, ``weight_scale``), NVFP4 of ModelOpt,
    compressed-tensors' FP8, packed integers, NVFP4 and MXFP4, and AWQ. MLX's own layout and the packed experts of
    GPT-OSS, DeepSeek-V4 and Muse pass through: their ``sanitize`` brings them to MLX's layout.

    Args:
        weights: Lazy arrays by source name. Drop this mapping afterwards: what it holds stays in memory once read.
        config: config.json, with ``quantization_config`` at its top.

    Raises:
        TQError: A quantization that tq does not read, or scales that do not fit their weight.
    """
    quantization = config.get("quantization_config") or {}
    if "quantization" not in config:
        _check_method(quantization)
    dense: dict[str, mx.array] = {}
    for name in weights:
        base, _, kind = name.rpartition(".")
        # "experts.down_proj_scale_inv" too, where the weight's name has no suffix.
        target = name.removesuffix("_scale_inv") if name.endswith("_scale_inv") else f"{base}.weight"
        weight = weights.get(target)
        try:
            if kind == "weight_packed":
                dense[target] = _compressed(weights, base, quantization)
            elif kind == "qweight":
                dense[target] = _awq(weights[name], weights[f"{base}.qzeros"], weights[f"{base}.scales"])
            elif weight is None or weight.dtype != mx.uint8:
                continue
            elif name.endswith("_scale_inv") or (kind == "weight_scale" and f"{name}_2" not in weights):
                dense[target] = _fp8(weight, weights[name], _block(quantization))
            elif kind == "weight_scale_2":
                dense[target] = _float4(weight, weights[f"{base}.weight_scale"], weights[name].astype(mx.float32))
        except (KeyError, ValueError, ZeroDivisionError) as error:
            raise TQError(f"{name} cannot be dequantized: {error}", ORIGINAL) from error
    used = {f"{name.removesuffix('weight')}{kind}" for name in dense if name.endswith(".weight") for kind in COMPANIONS}
    used |= {f"{name}_{kind}" for name in dense if not name.endswith(".weight") for kind in COMPANIONS}
    return {name: array for name, array in weights.items() if name not in used} | dense


def dequantize_modules(
    weights: Mapping[str, mx.array], config: dict[str, Any], module_shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, mx.array]:
    """Parameters with each ``P.weight`` that has ``P.scales`` in MLX's layout replaced by the dense matrix.

    Bits, group size and mode come from the entry for P in ``config["quantization"]``, else from the shapes, as in
    mlx-lm's ``load_model``. Affine matrices get the dtype of their scales, the others bfloat16.

    Args:
        weights: Lazy arrays by parameter path, after ``sanitize``.
        config: config.json.
        module_shapes: The dense shape (..., out, in) of every matrix of the model, by module path.

    Raises:
        TQError: Scales that do not fit their weight, or a matrix stored as integers without scales.
    """
    named = config.get("quantization") or config.get("quantization_config") or {}
    result = dict(weights)
    for path, shape in module_shapes.items():
        weight = weights.get(f"{path}.weight")
        if weight is None:
            continue
        if f"{path}.scales" in weights:
            scales = result.pop(f"{path}.scales")
            biases, global_scale = (result.pop(f"{path}.{kind}", None) for kind in ("biases", "global_scale"))
            try:
                parameters = named[path] if isinstance(named.get(path), dict) else _infer(weight, scales, shape)
                dense = _dequantize(weight, scales, biases, global_scale, parameters)
            except (KeyError, ValueError, ZeroDivisionError) as error:
                raise TQError(f"{path} cannot be dequantized: {error}", ORIGINAL) from error
            if tuple(dense.shape) != tuple(shape):
                raise TQError(f"{path} is stored with shape {tuple(dense.shape)}, the model needs {tuple(shape)}")
            result[f"{path}.weight"] = dense
        elif not mx.issubdtype(weight.dtype, mx.floating):
            raise TQError(f"{path}.weight is stored as {weight.dtype} in a layout that tq does not read", ORIGINAL)
    return result


def _check_method(quantization: dict[str, Any]) -> None:
    method = quantization.get("quant_method")
    readable = f"tq reads {', '.join(READABLE_METHODS)} and MLX's own"
    if method is not None and method not in READABLE_METHODS:
        raise TQError(f"the model is quantized with {method}; {readable}", ORIGINAL)
    if method == "awq" and (quantization.get("bits", 4) != 4 or quantization.get("version", "gemm") != "gemm"):
        raise TQError("the model is quantized with AWQ of an unknown layout; tq reads 4 bits, version gemm", ORIGINAL)


def _block(quantization: dict[str, Any]) -> tuple[int, int]:
    """Rows and columns that share an FP8 scale."""
    default = (1, 32) if quantization.get("quant_method") == "mxfp8" else (128, 128)
    rows, columns = quantization.get("weight_block_size") or default
    return rows, columns


def _fp8(weight: mx.array, scale: mx.array, block: tuple[int, int]) -> mx.array:
    """E4M3 bytes times their scale, bfloat16.

    weight: (..., out, in) uint8. scale: one for everything, one per row (out,) or (out, 1), or one per block:
    (..., ceil(out / block[0]), ceil(in / block[1])); uint8 scales are E8M0, powers of two.
    """
    if weight.ndim < 2 or scale.ndim > weight.ndim:
        raise ValueError(f"a scale of shape {scale.shape} for a weight of shape {weight.shape}")
    if scale.dtype == mx.uint8:  # E8M0 is the exponent of a float32
        scale = (scale.astype(mx.uint32) << 23).view(mx.float32)
    scale = scale.astype(mx.float32)
    if scale.ndim == 1 and scale.size == weight.shape[-2]:
        scale = scale[:, None]
    scale = scale.reshape((1,) * (weight.ndim - scale.ndim) + tuple(scale.shape))
    *lead, rows, columns = weight.shape
    row_block = _block_of_axis(rows, scale.shape[-2], block[0])
    column_block = _block_of_axis(columns, scale.shape[-1], block[1])
    n_row_blocks, n_column_blocks = -(-rows // row_block), -(-columns // column_block)
    # MiMo's scales have more rows of blocks than its weights.
    scale = scale[..., :n_row_blocks, :]
    if scale.shape[-1] != n_column_blocks or any(s not in (1, n) for s, n in zip(scale.shape, lead, strict=False)):
        raise ValueError(f"a scale of shape {scale.shape} for a weight of shape {weight.shape}, blocks of {block}")

    values = mx.from_fp8(weight, mx.bfloat16)  # exact: E4M3 has 4 significant bits
    tails = [(0, 0)] * len(lead) + [(0, -rows % row_block), (0, -columns % column_block)]
    if tails[-2][1] or tails[-1][1]:
        values = mx.pad(values, tails)
    values = values.reshape(*lead, n_row_blocks, row_block, n_column_blocks, column_block)
    values = (values * scale[..., :, None, :, None]).astype(mx.bfloat16)
    return values.reshape(*lead, n_row_blocks * row_block, n_column_blocks * column_block)[..., :rows, :columns]


def _block_of_axis(size: int, n_scales: int, block: int) -> int:
    """The block size along an axis with n_scales scales: everything, one by one, or as the config says."""
    if n_scales == 1:
        return max(size, 1)
    if n_scales == size:
        return 1
    if n_scales < -(-size // block):
        raise ValueError(f"{n_scales} scales for an axis of {size} in blocks of {block}")
    return block


def _float4(packed: mx.array, scale: mx.array, factor: mx.array | None) -> mx.array:
    """NVFP4 or MXFP4 with two values in a byte, low bits first: (..., out, in / 2) uint8 to (..., out, in)."""
    group_size = packed.shape[-1] * 2 // scale.shape[-1]
    mode = FLOAT_MODES.get((4, group_size), f"with groups of {group_size}")
    values = mx.dequantize(packed.view(mx.uint32), scale, group_size=group_size, bits=4, mode=mode, dtype=mx.float32)
    return (values if factor is None else values * factor).astype(mx.bfloat16)


def _compressed(weights: Mapping[str, mx.array], base: str, quantization: dict[str, Any]) -> mx.array:
    """``weight_packed`` of compressed-tensors: integers in int32 words, or FP4 in bytes."""
    packed, scale = weights[f"{base}.weight_packed"], weights[f"{base}.weight_scale"]
    if packed.dtype == mx.uint8:
        # Here the global scale divides.
        divisor = weights.get(f"{base}.weight_global_scale")
        return _float4(packed, scale, None if divisor is None else 1 / divisor.astype(mx.float32))
    for kind, meaning in (("weight_zero_point", "zero points"), ("weight_g_idx", "permuted groups")):
        if f"{base}.{kind}" in weights:
            raise ValueError(f"it has {meaning}, which tq does not read")
    groups = quantization.get("config_groups", {}).values()
    widths = {group["weights"]["num_bits"] for group in groups}
    if len(widths) != 1 or not widths <= {4, 8}:
        raise ValueError(f"its words hold {sorted(widths) or 'unknown'} bits, tq reads 4 or 8")
    bits = widths.pop()
    codes = _unpack(packed.view(mx.uint32), bits, range(32 // bits)).astype(scale.dtype) - 2 ** (bits - 1)
    grouped = codes.reshape(*scale.shape, -1)
    return (grouped * scale[..., None]).reshape(codes.shape)


def _awq(qweight: mx.array, qzeros: mx.array, scales: mx.array) -> mx.array:
    """AutoAWQ's "gemm" layout: qweight (in, out / 8), qzeros (groups, out / 8), scales (groups, out)."""
    codes = _unpack(qweight.view(mx.uint32), 4, AWQ_ORDER).astype(scales.dtype)
    zeros = _unpack(qzeros.view(mx.uint32), 4, AWQ_ORDER).astype(scales.dtype)
    grouped = codes.reshape(scales.shape[0], -1, scales.shape[1])
    return ((grouped - zeros[:, None]) * scales[:, None]).reshape(codes.shape).T


def _unpack(words: mx.array, bits: int, order: tuple[int, ...] | range) -> mx.array:
    """Codes of the last axis; value i of a word lies at bits order[i] * bits."""
    shifts = mx.array(list(order), mx.uint32) * bits
    codes = (words[..., None] >> shifts) & (2**bits - 1)
    return codes.reshape(*words.shape[:-1], -1)


def _infer(weight: mx.array, scales: mx.array, shape: tuple[int, ...]) -> dict[str, Any]:
    """Bits, group size and mode from the shapes: only affine keeps its scales in a float dtype."""
    bits, group_size = weight.shape[-1] * 32 // shape[-1], shape[-1] // scales.shape[-1]
    mode = FLOAT_MODES.get((bits, group_size)) if scales.dtype == mx.uint8 else "affine"
    if mode is None:
        raise ValueError(f"no mode of MLX has {bits} bits with group size {group_size}")
    return {"bits": bits, "group_size": group_size, "mode": mode}


def _dequantize(
    weight: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    global_scale: mx.array | None,
    parameters: dict[str, Any],
) -> mx.array:
    bits, group_size, mode = parameters["bits"], parameters["group_size"], parameters.get("mode", "affine")
    if global_scale is None:
        return mx.dequantize(weight, scales, biases, group_size=group_size, bits=bits, mode=mode)
    # Experts have one global scale each, where mx.dequantize takes one number.
    values = mx.dequantize(weight, scales, group_size=group_size, bits=bits, mode=mode, dtype=mx.float32)
    factor = (global_scale / NVFP4_GLOBAL_MAX).reshape(*global_scale.shape, *(1,) * (weight.ndim - global_scale.ndim))
    return (values * factor).astype(mx.bfloat16)
