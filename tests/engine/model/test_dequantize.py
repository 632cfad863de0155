"""Sources that are already quantized become plain matrices, each equal to its format's definition in NumPy."""

import json
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from tq.engine.model.dequantize import dequantize_modules, dequantize_raw
from tq.engine.model.sources import open_source
from tq.errors import TQError

RNG = np.random.default_rng(11)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def e4m3(codes):
    """OCP FP8 E4M3: 4 exponent bits with bias 7, 3 mantissa bits."""
    codes = np.asarray(codes, np.int64)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    magnitude = np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    return np.where(codes & 128, -magnitude, magnitude)


def e8m0(codes):
    return 2.0 ** (np.asarray(codes, np.float64) - 127)


def random_fp8(*shape):
    codes = RNG.integers(0, 256, shape)
    return np.where(codes & 127 == 127, 5, codes).astype(np.uint8)  # 127 and 255 are NaN


def spread(scale, block, shape):
    """Every block's scale at each of its elements, the tails cut off."""
    for axis, size in zip((-2, -1), block, strict=True):
        scale = np.repeat(scale, size, axis)
    return scale[..., : shape[-2], : shape[-1]]


def close(array, expected, bits=8):
    """Equal up to one rounding to a format with that many significant bits (8: bfloat16, 11: float16)."""
    actual = np.array(array.astype(mx.float32), np.float64)
    assert actual.shape == expected.shape
    return np.all(np.abs(actual - expected) <= np.abs(expected) * 2.0**-bits * 1.001 + 1e-30)


FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}


# --- FP8 ---


@pytest.mark.parametrize("shape", [(256, 128), (129, 257), (5, 7), (300, 64), (128, 130), (1, 1)])
def test_block_fp8_with_odd_tails(shape):
    codes = random_fp8(*shape)
    n_blocks = [-(-size // 128) for size in shape]
    scale = RNG.uniform(1e-4, 1e-2, n_blocks).astype(np.float32)
    weights = {"a.weight": mx.array(codes), "a.weight_scale_inv": mx.array(scale), "a.bias": mx.zeros(3)}
    dense = dequantize_raw(weights, FP8)
    assert set(dense) == {"a.weight", "a.bias"}
    assert dense["a.weight"].dtype == mx.bfloat16
    assert close(dense["a.weight"], e4m3(codes) * spread(scale.astype(np.float64), (128, 128), shape))


@pytest.mark.parametrize("block", [(64, 32), (1, 16)])
def test_the_block_size_comes_from_the_config(block):
    codes = random_fp8(100, 80)
    scale = RNG.uniform(1e-3, 1, [-(-size // b) for size, b in zip(codes.shape, block, strict=True)])
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": list(block)}}
    weights = {"a.weight": mx.array(codes), "a.weight_scale_inv": mx.array(scale, mx.float32)}
    expected = e4m3(codes) * spread(scale, block, codes.shape)
    assert close(dequantize_raw(weights, config)["a.weight"], expected)


@pytest.mark.parametrize("scale_shape", [(), (1,), (1, 1), (300, 1), (300,)])
@pytest.mark.parametrize("suffix", ["weight_scale", "weight_scale_inv"])
def test_tensor_and_row_scales(scale_shape, suffix):
    codes = random_fp8(300, 200)
    scale = RNG.uniform(1e-3, 1, scale_shape).astype(np.float32)
    weights = {
        "a.weight": mx.array(codes),
        f"a.{suffix}": mx.array(scale, mx.bfloat16 if scale_shape == () else mx.float32),
        "a.input_scale": mx.array(1.0),
        "a.activation_scale": mx.array(1.0),
        "k_scale": mx.array(1.0),
    }
    dense = dequantize_raw(weights, {"quantization_config": {"quant_method": "compressed-tensors"}})
    assert set(dense) == {"a.weight", "k_scale"}
    factor = np.array(weights[f"a.{suffix}"].astype(mx.float32), np.float64)
    factor = factor[:, None] if scale_shape == (300,) else factor
    assert close(dense["a.weight"], e4m3(codes) * factor)


def test_stacked_experts_with_a_scale_each_or_blocks():
    codes = random_fp8(3, 150, 140)
    one, blocks = RNG.uniform(0.1, 1, (3, 1, 1)), RNG.uniform(0.1, 1, (3, 2, 2))
    weights = {
        "experts.down_proj": mx.array(codes),
        "experts.down_proj_scale_inv": mx.array(one, mx.float32),
        "experts.down_proj_activation_scale": mx.array(1.0),
        "experts.up_proj": mx.array(codes),
        "experts.up_proj_scale_inv": mx.array(blocks, mx.float32),
    }
    dense = dequantize_raw(weights, FP8)
    assert set(dense) == {"experts.down_proj", "experts.up_proj"}
    assert close(dense["experts.down_proj"], e4m3(codes) * one)
    assert close(dense["experts.up_proj"], e4m3(codes) * spread(blocks, (128, 128), codes.shape))


def test_scales_that_are_powers_of_two():
    codes, exponents = random_fp8(70, 96), RNG.integers(100, 140, (70, 3)).astype(np.uint8)
    weights = {"a.weight": mx.array(codes), "a.weight_scale_inv": mx.array(exponents)}
    expected = e4m3(codes) * spread(e8m0(exponents), (1, 32), codes.shape)
    assert close(dequantize_raw(weights, {"quantization_config": {"quant_method": "mxfp8"}})["a.weight"], expected)


@pytest.mark.parametrize("scale_shape", [(1, 7), (2, 2), (3, 3), (4, 2, 3), (300, 3)])
def test_scales_that_do_not_fit_are_refused(scale_shape):
    weights = {"a.weight": mx.zeros((300, 200), mx.uint8), "a.weight_scale_inv": mx.ones(scale_shape)}
    with pytest.raises(TQError, match=r"a\.weight_scale_inv cannot be dequantized: .*(300|200)"):
        dequantize_raw(weights, FP8)


def self_with(**arguments):
    return SimpleNamespace(args=SimpleNamespace(**arguments))


def fp8_source(shapes):
    weights = {}
    for name, shape in shapes.items():
        weights[f"{name}.weight"] = mx.array(random_fp8(*shape))
        n_blocks = [-(-size // 128) for size in shape]
        weights[f"{name}.weight_scale_inv"] = mx.array(RNG.uniform(1e-3, 1e-2, n_blocks), mx.float32)
    return weights


LAYER = "model.layers.0"
EXPERTS = {f"{LAYER}.mlp.experts.{e}.{p}_proj": (130, 70) for e in (0, 1) for p in ("gate", "up", "down")}
LATENT = {"n_routed_experts": 2, "num_attention_heads": 2, "qk_nope_head_dim": 24, "v_head_dim": 40}
SANITIZED = {
    "deepseek_v3": (
        LATENT,
        EXPERTS | {f"{LAYER}.self_attn.kv_b_proj": (128, 200), f"{LAYER}.self_attn.o_proj": (129, 257)},
    ),
    "minimax": (
        {"num_local_experts": 2},
        {f"{LAYER}.block_sparse_moe.experts.{e}.w{i}": (130, 70) for e in (0, 1) for i in (1, 2, 3)}
        | {f"{LAYER}.self_attn.q_proj": (200, 300)},
    ),
    "mistral4": (LATENT, EXPERTS | {f"{LAYER}.self_attn.kv_b_proj": (128, 200)}),
    "mimo_v2_flash": ({"n_routed_experts": 2}, {f"{LAYER}.self_attn.q_proj": (200, 300)}),
}


@pytest.mark.parametrize("architecture", SANITIZED)
def test_early_dequantization_equals_that_of_the_models_own_sanitize(architecture):
    import importlib

    arguments, shapes = SANITIZED[architecture]
    model = importlib.import_module(f"mlx_lm.models.{architecture}").Model
    source = fp8_source(shapes)
    early = model.sanitize(self_with(num_hidden_layers=1, **arguments), dequantize_raw(source, FP8))
    late = model.sanitize(self_with(num_hidden_layers=1, **arguments), dict(source))
    assert set(early) == set(late)
    assert not [name for name in early if "scale" in name]
    for name in late:
        assert early[name].dtype == late[name].dtype == mx.bfloat16
        assert mx.array_equal(early[name], late[name]), name


def test_scales_with_more_rows_than_the_weight_as_in_mimo():
    from mlx_lm.models.mimo_v2_flash import Model

    source = {"a.weight": mx.array(random_fp8(150, 130)), "a.weight_scale_inv": mx.random.uniform(shape=(4, 2))}
    expected = Model.sanitize(self_with(num_hidden_layers=0), dict(source))["a.weight"]
    assert mx.array_equal(dequantize_raw(source, FP8)["a.weight"], expected)


def test_experts_of_an_architecture_without_fp8_are_stacked_dense():
    from mlx_lm.models.qwen3_moe import Model

    source = fp8_source(EXPERTS)
    arguments = self_with(num_experts=2, tie_word_embeddings=False)
    stacked = Model.sanitize(arguments, dequantize_raw(source, FP8))[f"{LAYER}.mlp.switch_mlp.up_proj.weight"]
    for e in (0, 1):
        name = f"{LAYER}.mlp.experts.{e}.up_proj.weight"
        scale = np.array(source[f"{name}_scale_inv"], np.float64)
        assert close(stacked[e], e4m3(source[name]) * spread(scale, (128, 128), (130, 70)))


def test_minimax_m3_keeps_no_packed_weight():
    from mlx_lm.models.minimax_m3_vl import Model

    packed, scales = mx.quantize(mx.random.normal((10, 64)), mode="mxfp8")
    name = "language_model.model.layers.0.self_attn.q_proj"
    source = {f"{name}.weight": packed.view(mx.uint8), f"{name}.weight_scale_inv": scales}
    text = SimpleNamespace(tie_word_embeddings=False, num_hidden_layers=1, num_local_experts=2)
    config = {"quantization_config": {"quant_method": "mxfp8", "weight_block_size": [1, 32]}}
    weights = Model.sanitize(self_with(text_config=text), dequantize_raw(source, config))
    assert set(weights) == {f"{name}.weight"}
    assert mx.array_equal(weights[f"{name}.weight"], mx.dequantize(packed, scales, mode="mxfp8"))


# --- four bits, packed by others ---


def nibbles(codes):
    """Two codes in a byte, the even one in the low bits."""
    return (codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8)


def test_mxfp4_of_gpt_oss():
    from mlx_lm.models.gpt_oss import Model

    n_experts, width, groups = 3, 10, 2
    config = {"quantization_config": {"quant_method": "mxfp4"}}
    codes, expected, source = {}, {}, {}
    for name, rows in (("gate_up_proj", 2 * width), ("down_proj", width)):
        codes = RNG.integers(0, 16, (n_experts, rows, groups, 32))
        exponents = RNG.integers(115, 130, (n_experts, rows, groups))
        source[f"{LAYER}.mlp.experts.{name}_blocks"] = mx.array(nibbles(codes))
        source[f"{LAYER}.mlp.experts.{name}_scales"] = mx.array(exponents.astype(np.uint8))
        source[f"{LAYER}.mlp.experts.{name}_bias"] = mx.zeros((n_experts, rows), mx.bfloat16)
        expected[name] = (E2M1[codes] * e8m0(exponents)[..., None]).reshape(n_experts, rows, -1)
    weights = Model.sanitize(None, dequantize_raw(source, config))
    paths = {p: f"{LAYER}.mlp.experts.{p}_proj" for p in ("gate", "up", "down")}
    dense = dequantize_modules(weights, config, dict.fromkeys(paths.values(), (n_experts, width, 64)))
    assert not [name for name in dense if "scales" in name]
    for part, values in (
        ("gate", expected["gate_up_proj"][:, ::2]),
        ("up", expected["gate_up_proj"][:, 1::2]),
        ("down", expected["down_proj"]),
    ):
        array = dense[f"{paths[part]}.weight"]
        assert array.dtype == mx.bfloat16
        assert np.array_equal(np.array(array.astype(mx.float32)), values)


def test_nvfp4_of_modelopt_and_of_compressed_tensors():
    codes, scales = RNG.integers(0, 16, (6, 64)), random_fp8(6, 4) & 127
    expected = E2M1[codes] * np.repeat(e4m3(scales), 16, -1)
    packed, block = mx.array(nibbles(codes)), mx.array(scales)
    modelopt = {
        "a.weight": packed,
        "a.weight_scale": block,
        "a.weight_scale_2": mx.array(0.003),
        "a.input_scale": mx.array(1.0),
    }
    dense = dequantize_raw(modelopt, {"quantization_config": {"quant_method": "modelopt"}})
    assert set(dense) == {"a.weight"}
    assert close(dense["a.weight"], expected * np.float64(np.float32(0.003)))
    compressed = {
        "a.weight_packed": packed,
        "a.weight_scale": block,
        "a.weight_global_scale": mx.array([750.0]),
        "a.input_global_scale": mx.array([1.0]),
    }
    dense = dequantize_raw(compressed, {"quantization_config": {"quant_method": "compressed-tensors"}})
    assert set(dense) == {"a.weight"}
    assert close(dense["a.weight"], expected / 750)


def test_mxfp4_of_compressed_tensors():
    codes, exponents = RNG.integers(0, 16, (6, 64)), RNG.integers(110, 130, (6, 2)).astype(np.uint8)
    weights = {"a.weight_packed": mx.array(nibbles(codes)), "a.weight_scale": mx.array(exponents)}
    dense = dequantize_raw(weights, {"quantization_config": {"quant_method": "compressed-tensors"}})
    assert close(dense["a.weight"], E2M1[codes] * np.repeat(e8m0(exponents), 32, -1))


def words(codes, bits, order=None):
    """Codes of the last axis in int32 words; code i of a word lies at bits order[i] * bits."""
    per = 32 // bits
    grouped = codes.reshape(*codes.shape[:-1], -1, per).astype(np.uint64)
    shifts = np.array(order if order is not None else range(per), np.uint64) * np.uint64(bits)
    return mx.array((grouped << shifts).sum(-1).astype(np.uint32)).view(mx.int32)


def compressed_config(bits):
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "config_groups": {"group_0": {"weights": {"num_bits": bits}}},
        }
    }


@pytest.mark.parametrize("bits, group_size", [(4, 32), (4, 96), (8, 48), (8, 16)])
def test_packed_integers_of_compressed_tensors(bits, group_size):
    codes = RNG.integers(0, 2**bits, (10, 96))
    scale = RNG.uniform(0.01, 1, (10, 96 // group_size)).astype(np.float16)
    weights = {
        "a.weight_packed": words(codes, bits),
        "a.weight_scale": mx.array(scale),
        "a.weight_shape": mx.array([10, 96]),
    }
    dense = dequantize_raw(weights, compressed_config(bits))
    assert set(dense) == {"a.weight"} and dense["a.weight"].dtype == mx.float16
    assert close(dense["a.weight"], (codes - 2 ** (bits - 1)) * np.repeat(scale.astype(np.float64), group_size, -1), 11)


def test_packed_integers_agree_with_the_sanitize_of_kimi_k2():
    from mlx_lm.models.deepseek_v3 import Model

    weights = {
        "a.weight_packed": words(RNG.integers(0, 16, (10, 64)), 4),
        "a.weight_scale": mx.random.uniform(shape=(10, 2)),
        "a.weight_shape": mx.array([10, 64]),
    }
    arguments = self_with(num_hidden_layers=0)
    late = dequantize_modules(Model.sanitize(arguments, dict(weights)), {}, {"a": (10, 64)})["a.weight"]
    early = Model.sanitize(arguments, dequantize_raw(weights, compressed_config(4)))["a.weight"]
    assert mx.allclose(early, late, atol=1e-5)


@pytest.mark.parametrize("extra, reason", [("weight_zero_point", "zero points"), ("weight_g_idx", "permuted groups")])
def test_packed_integers_with_more_to_them_are_refused(extra, reason):
    weights = {
        "a.weight_packed": mx.zeros((4, 4), mx.int32),
        "a.weight_scale": mx.ones((4, 1)),
        f"a.{extra}": mx.zeros(4),
    }
    with pytest.raises(TQError, match=f"a.weight_packed cannot be dequantized: .*{reason}"):
        dequantize_raw(weights, compressed_config(4))


def test_packed_integers_of_another_width_are_refused():
    weights = {"a.weight_packed": mx.zeros((4, 4), mx.int32), "a.weight_scale": mx.ones((4, 1))}
    for config in (compressed_config(3), {"quantization_config": {"quant_method": "compressed-tensors"}}):
        with pytest.raises(TQError, match="tq reads 4 or 8"):
            dequantize_raw(weights, config)


def test_awq_equals_its_definition_and_mlx_lm():
    from mlx_lm.utils import _transform_awq_weights

    n_in, n_out, group_size = 96, 24, 32
    codes, zeros = RNG.integers(0, 16, (n_in, n_out)), RNG.integers(0, 16, (n_in // group_size, n_out))
    scales = RNG.uniform(0.01, 0.1, (n_in // group_size, n_out)).astype(np.float16)
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    weights = {
        "a.qweight": words(codes, 4, order),
        "a.qzeros": words(zeros, 4, order),
        "a.scales": mx.array(scales),
        "norm.weight": mx.ones(3),
    }
    quantization = {"quant_method": "awq", "bits": 4, "group_size": group_size, "version": "gemm"}
    dense = dequantize_raw(weights, {"quantization_config": quantization})
    assert set(dense) == {"a.weight", "norm.weight"}
    expected = (codes - np.repeat(zeros, group_size, 0)) * np.repeat(scales.astype(np.float64), group_size, 0)
    assert close(dense["a.weight"], expected.T, 11)
    theirs, parameters = _transform_awq_weights(
        weights | {"a.qweight": weights["a.qweight"].view(mx.uint32)}, quantization
    )
    theirs = dequantize_modules(theirs, {"quantization": parameters}, {"a": (n_out, n_in)})["a.weight"]
    assert mx.allclose(dense["a.weight"], theirs, atol=2e-3)


# --- MLX's own layout ---

MODES = [
    {"mode": mode, "bits": bits, "group_size": group_size}
    for mode, bits, group_size in [
        *(("affine", 2, 32), ("affine", 3, 64), ("affine", 4, 64), ("affine", 5, 32), ("affine", 6, 32)),
        *(("affine", 8, 64), ("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32)),
    ]
]
TINY = {
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "vocab_size": 50,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
    "max_position_embeddings": 128,
}


def tiny_model():
    from mlx_lm.models.qwen3_moe import Model, ModelArgs

    return Model(ModelArgs.from_dict(TINY))


def saved_quantized(folder, **arguments):
    """A tiny mixture of experts, quantized and saved by mlx-lm. Returns the quantized model."""
    from mlx_lm.utils import quantize_model, save_config, save_model

    mx.random.seed(3)
    model, config = quantize_model(tiny_model(), dict(TINY), **arguments)
    save_model(folder, model)
    save_config(config, folder / "config.json")
    return model


def opened_dense(folder):
    source = open_source(str(folder))
    fresh = tiny_model()
    shapes = {path: module.weight.shape for path, module in fresh.named_modules() if hasattr(module, "to_quantized")}
    weights = fresh.sanitize(dequantize_raw(source.weights(), source.config))
    weights = dequantize_modules(weights, source.config, shapes)
    assert {name: array.shape for name, array in weights.items()} == {
        name: array.shape for name, array in tree_flatten(fresh.parameters())
    }
    return weights


@pytest.mark.parametrize("parameters", MODES, ids=lambda p: f"{p['mode']}{p['bits']}")
def test_every_mode_that_mlx_lm_saves_loads_dense(tmp_path, parameters):
    model = saved_quantized(tmp_path, **parameters)
    weights = opened_dense(tmp_path)
    n_quantized = 0
    for path, module in model.named_modules():
        if not hasattr(module, "scales"):
            continue
        n_quantized += 1
        # The router is affine with 8 bits in every mode.
        used = {"bits": module.bits, "group_size": module.group_size, "mode": module.mode}
        expected = mx.dequantize(module.weight, module.scales, module.get("biases"), **used)
        dense = weights[f"{path}.weight"]
        assert dense.dtype == (module.scales.dtype if module.mode == "affine" else mx.bfloat16)
        assert mx.array_equal(dense, expected), path
    assert n_quantized > 8


def test_mixed_bits_load_dense_with_and_without_their_entry(tmp_path):
    def predicate(path, module):
        return {"bits": 8, "group_size": 32} if "v_proj" in path else "lm_head" not in path

    model = saved_quantized(tmp_path, bits=4, group_size=64, quant_predicate=predicate)
    named = opened_dense(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    path = "model.layers.0.self_attn.v_proj"
    assert config["quantization"].pop(path)["bits"] == 8
    config.pop("quantization_config", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    inferred = opened_dense(tmp_path)
    module = model.model.layers[0].self_attn.v_proj
    expected = mx.dequantize(module.weight, module.scales, module.biases, bits=8, group_size=32)
    for weights in (named, inferred):
        assert mx.array_equal(weights[f"{path}.weight"], expected)
        assert mx.array_equal(weights["lm_head.weight"], model.lm_head.weight)


def test_experts_with_a_global_scale_each(tmp_path):
    model = saved_quantized(tmp_path, mode="nvfp4", bits=4, group_size=16, global_scale=True)
    experts = model.model.layers[0].mlp.switch_mlp.up_proj
    dense = opened_dense(tmp_path)["model.layers.0.mlp.switch_mlp.up_proj.weight"]
    assert experts.global_scale.shape == (3,) and dense.dtype == mx.bfloat16
    for e in range(3):
        scale = experts.global_scale[e]
        expected = mx.dequantize(experts.weight[e], experts.scales[e], mode="nvfp4", global_scale=scale)
        assert mx.allclose(dense[e], expected, rtol=2**-7, atol=0)
    linear = mx.quantize(mx.random.normal((4, 32)), mode="nvfp4", global_scale=(scale := mx.array(3.0)))
    weights = {"a.weight": linear[0], "a.scales": linear[1], "a.global_scale": scale}
    dense = dequantize_modules(weights, {}, {"a": (4, 32)})["a.weight"]
    assert mx.allclose(dense, mx.dequantize(*linear, mode="nvfp4", global_scale=scale), rtol=2**-7, atol=0)


def test_a_matrix_whose_shape_is_not_the_models_is_refused():
    weight, scales, biases = mx.quantize(mx.random.normal((4, 64)), bits=4, group_size=32)
    weights = {"a.weight": weight, "a.scales": scales, "a.biases": biases}
    with pytest.raises(TQError, match=r"a is stored with shape \(4, 64\), the model needs \(5, 64\)"):
        dequantize_modules(weights, {}, {"a": (5, 64)})
    with pytest.raises(TQError, match="a cannot be dequantized"):
        dequantize_modules(weights, {}, {"a": (4, 96)})
    with pytest.raises(TQError, match="a cannot be dequantized: no mode of MLX has 4 bits with group size 64"):
        dequantize_modules(weights | {"a.scales": mx.zeros((4, 1), mx.uint8)}, {}, {"a": (4, 64)})
    with pytest.raises(TQError, match=r"a cannot be dequantized: .*Biases"):
        dequantize_modules({"a.weight": weight, "a.scales": scales}, {}, {"a": (4, 64)})


@pytest.mark.parametrize("dtype", [mx.uint8, mx.int8, mx.uint32])
def test_integers_without_scales_are_refused(dtype):
    with pytest.raises(TQError, match=r"a\.weight is stored as .* in a layout that tq does not read"):
        dequantize_modules({"a.weight": mx.zeros((4, 8), dtype)}, {}, {"a": (4, 8)})


def test_plain_weights_pass_untouched():
    weights = {"a.weight": mx.ones((2, 3)), "b.bias": mx.zeros(2), "ids": mx.arange(3)}
    raw = dequantize_raw(weights, {"model_type": "llama"})
    assert all(raw[name] is weights[name] for name in weights)
    dense = dequantize_modules(raw, {}, {"a": (2, 3), "absent": (1, 1)})
    assert all(dense[name] is weights[name] for name in weights)


@pytest.mark.parametrize("method", ["gptq", "bitnet", "bitsandbytes", "hqq"])
def test_a_method_that_tq_does_not_read_is_named_with_those_it_reads(method):
    with pytest.raises(TQError, match=f"quantized with {method}; tq reads fp8, .*awq and MLX's own") as caught:
        dequantize_raw({}, {"quantization_config": {"quant_method": method}})
    assert "original" in caught.value.hint


@pytest.mark.parametrize("setting", [{"bits": 8}, {"version": "gemv"}])
def test_awq_of_another_layout_is_refused(setting):
    with pytest.raises(TQError, match="AWQ of an unknown layout; tq reads 4 bits, version gemm"):
        dequantize_raw({}, {"quantization_config": {"quant_method": "awq", **setting}})


# --- laziness ---


def test_evaluating_one_matrix_evaluates_no_other(tmp_path):
    mx.random.seed(5)
    names = [f"layer{i}" for i in range(6)]
    stored = {}
    for name in names:
        parts = mx.quantize(mx.random.normal((512, 1024)), bits=8, group_size=64)
        stored |= {f"{name}.{kind}": part for kind, part in zip(("weight", "scales", "biases"), parts, strict=True)}
        stored[f"{name}.f8.weight"] = mx.to_fp8(mx.random.normal((512, 1024)))
        stored[f"{name}.f8.weight_scale_inv"] = mx.ones((4, 8))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), stored)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | FP8))
    del stored, parts
    source = open_source(str(tmp_path))
    weights = dequantize_raw(source.weights(), source.config)
    weights = dequantize_modules(weights, source.config, dict.fromkeys(names, (512, 1024)))
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    sizes = []
    for name in list(weights):
        dense = weights.pop(name)
        mx.eval(dense)
        sizes.append(dense.nbytes)
        del dense
    # The largest is float32, 2 MiB, from 0.6 MiB; all of them together are 20 MiB.
    assert mx.get_peak_memory() - before < 2.5 * max(sizes) < sum(sizes) / 3
    assert mx.get_active_memory() - before < 1000


def test_the_tiny_model_is_quantized_where_the_tests_think(tmp_path):
    model = saved_quantized(tmp_path, bits=4, group_size=64)
    assert isinstance(model.lm_head, nn.QuantizedLinear)
    assert model.model.layers[0].mlp.switch_mlp.up_proj.weight.shape == (3, 64, 8)
