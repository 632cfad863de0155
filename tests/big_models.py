"""Well-known large models as their headers alone: config.json, and safetensors files that are one hole behind a header.

Numbers are those of the published config.json and of the tensors' published shapes; `PARAMETERS` those that the makers
state, in units of 10^9.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tq.engine.model.safetensors import header_bytes, size_bytes

PARAMETERS = {"llama-3.3-70b": 70.6, "qwen3-30b-a3b": 30.5, "gpt-oss-120b": 116.8, "deepseek-v3": 671.0}
ACTIVE = {"llama-3.3-70b": 70.6, "qwen3-30b-a3b": 3.3, "gpt-oss-120b": 5.1, "deepseek-v3": 37.0}
Tensors = Iterator[tuple[str, str, tuple[int, ...]]]

CONFIGS: dict[str, dict[str, Any]] = {
    "llama-3.3-70b": {
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
    "gpt-oss-120b": {
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 201088,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 18,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 4096,
        },
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "quantization_config": {"quant_method": "mxfp4"},
    },
    "deepseek-v3": {
        "model_type": "deepseek_v3",
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "vocab_size": 129280,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "moe_layer_freq": 1,
        "first_k_dense_replace": 3,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "max_position_embeddings": 163840,
        "attention_bias": False,
        "torch_dtype": "bfloat16",
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    },
}


def write(folder: Path, name: str, **changes: Any) -> Path:
    """The folder of a model, or of one with another config, with files that take no space."""
    config = CONFIGS[name] | changes
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = list(_TENSORS[config["model_type"]](config))
    header = header_bytes(tensors, {"format": "pt"})
    path = folder / "model.safetensors"
    path.write_bytes(header)
    with path.open("r+b") as file:
        file.truncate(len(header) + sum(size_bytes(dtype, shape) for _, dtype, shape in tensors))
    return folder


def _outside(config: dict[str, Any]) -> Tensors:
    vocab, h = config["vocab_size"], config["hidden_size"]
    yield "model.embed_tokens.weight", "BF16", (vocab, h)
    yield "model.norm.weight", "BF16", (h,)
    yield "lm_head.weight", "BF16", (vocab, h)


def _attention(config: dict[str, Any], at: str, bias: bool = False) -> Tensors:
    h, dim = config["hidden_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    for name, out, inputs in (("q_proj", q, h), ("k_proj", kv, h), ("v_proj", kv, h), ("o_proj", h, q)):
        yield f"{at}.self_attn.{name}.weight", "BF16", (out, inputs)
        if bias:
            yield f"{at}.self_attn.{name}.bias", "BF16", (out,)
    yield f"{at}.input_layernorm.weight", "BF16", (h,)
    yield f"{at}.post_attention_layernorm.weight", "BF16", (h,)


def _llama(config: dict[str, Any]) -> Tensors:
    h, width = config["hidden_size"], config["intermediate_size"]
    yield from _outside(config)
    for n in range(config["num_hidden_layers"]):
        at = f"model.layers.{n}"
        yield from _attention(config, at)
        for name, out, inputs in (("gate_proj", width, h), ("up_proj", width, h), ("down_proj", h, width)):
            yield f"{at}.mlp.{name}.weight", "BF16", (out, inputs)


def _qwen3_moe(config: dict[str, Any]) -> Tensors:
    h, width, dim = config["hidden_size"], config["moe_intermediate_size"], config["head_dim"]
    yield from _outside(config)
    for n in range(config["num_hidden_layers"]):
        at = f"model.layers.{n}"
        yield from _attention(config, at)
        yield f"{at}.self_attn.q_norm.weight", "BF16", (dim,)
        yield f"{at}.self_attn.k_norm.weight", "BF16", (dim,)
        yield f"{at}.mlp.gate.weight", "BF16", (config["num_experts"], h)
        for e in range(config["num_experts"]):
            for name, out, inputs in (("gate_proj", width, h), ("up_proj", width, h), ("down_proj", h, width)):
                yield f"{at}.mlp.experts.{e}.{name}.weight", "BF16", (out, inputs)


def _gpt_oss(config: dict[str, Any]) -> Tensors:
    h, width, n_experts = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    yield from _outside(config)
    for n in range(config["num_hidden_layers"]):
        at = f"model.layers.{n}"
        yield from _attention(config, at, bias=True)
        yield f"{at}.self_attn.sinks", "BF16", (config["num_attention_heads"],)
        yield f"{at}.mlp.router.weight", "BF16", (n_experts, h)
        yield f"{at}.mlp.router.bias", "BF16", (n_experts,)
        for name, out, inputs in (("gate_up_proj", 2 * width, h), ("down_proj", h, width)):
            yield f"{at}.mlp.experts.{name}_blocks", "U8", (n_experts, out, inputs // 32, 16)
            yield f"{at}.mlp.experts.{name}_scales", "U8", (n_experts, out, inputs // 32)
            yield f"{at}.mlp.experts.{name}_bias", "BF16", (n_experts, out)


def _deepseek(config: dict[str, Any]) -> Tensors:
    h, heads, rope = config["hidden_size"], config["num_attention_heads"], config["qk_rope_head_dim"]
    latent, q_rank, nope, v = (
        config[name] for name in ("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "v_head_dim")
    )

    def fp8(path: str, out: int, inputs: int) -> Tensors:
        yield f"{path}.weight", "F8_E4M3", (out, inputs)
        yield f"{path}.weight_scale_inv", "F32", (-(-out // 128), -(-inputs // 128))

    def mlp(path: str, width: int) -> Tensors:
        for name, out, inputs in (("gate_proj", width, h), ("up_proj", width, h), ("down_proj", h, width)):
            yield from fp8(f"{path}.{name}", out, inputs)

    yield from _outside(config)
    for n in range(config["num_hidden_layers"]):
        at = f"model.layers.{n}"
        for name, size in (("input_layernorm", h), ("post_attention_layernorm", h)):
            yield f"{at}.{name}.weight", "BF16", (size,)
        for name, size in (("q_a_layernorm", q_rank), ("kv_a_layernorm", latent)):
            yield f"{at}.self_attn.{name}.weight", "BF16", (size,)
        yield from fp8(f"{at}.self_attn.q_a_proj", q_rank, h)
        yield from fp8(f"{at}.self_attn.q_b_proj", heads * (nope + rope), q_rank)
        yield from fp8(f"{at}.self_attn.kv_a_proj_with_mqa", latent + rope, h)
        yield from fp8(f"{at}.self_attn.kv_b_proj", heads * (nope + v), latent)
        yield from fp8(f"{at}.self_attn.o_proj", h, heads * v)
        if n < config["first_k_dense_replace"]:
            yield from mlp(f"{at}.mlp", config["intermediate_size"])
            continue
        yield f"{at}.mlp.gate.weight", "BF16", (config["n_routed_experts"], h)
        yield f"{at}.mlp.gate.e_score_correction_bias", "F32", (config["n_routed_experts"],)
        yield from mlp(f"{at}.mlp.shared_experts", config["moe_intermediate_size"])
        for e in range(config["n_routed_experts"]):
            yield from mlp(f"{at}.mlp.experts.{e}", config["moe_intermediate_size"])


_TENSORS = {"llama": _llama, "qwen3_moe": _qwen3_moe, "gpt_oss": _gpt_oss, "deepseek_v3": _deepseek}
