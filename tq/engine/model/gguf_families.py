"""What each family of models is called in GGUF and in Hugging Face: tensor names and config.json. Not the data.

The GGUF side is defined by llama.cpp's converter (its `conversion` folder) and loaders, the other side by mlx-lm's
`ModelArgs`. A name or a setting that is not in these tables is refused, never dropped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tq.errors import TQError


@dataclass(frozen=True)
class Family:
    """One `general.architecture`.

    Args:
        model_type: mlx-lm's name of the model.
        architecture: Hugging Face's class.
        hidden_act: Activation of the MLP.
        experts: The module that holds the router and the stacked experts, or "" for a dense model.
        permuted: The rows of q and k are stored in llama.cpp's order for rotary embeddings.
        norm_offset: Stored norm weights are the model's plus this.
        sandwich: A norm before and one after each of attention and MLP.
    """

    model_type: str
    architecture: str
    hidden_act: str = "silu"
    experts: str = ""
    permuted: bool = False
    norm_offset: float = 0.0
    sandwich: bool = False


_GELU = "gelu_pytorch_tanh"
_FAMILIES = {
    "llama": Family("llama", "LlamaForCausalLM", permuted=True),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM"),
    "qwen2moe": Family("qwen2_moe", "Qwen2MoeForCausalLM", experts="mlp"),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM"),
    "qwen3moe": Family("qwen3_moe", "Qwen3MoeForCausalLM", experts="mlp"),
    "gemma": Family("gemma", "GemmaForCausalLM", _GELU, norm_offset=1.0),
    "gemma2": Family("gemma2", "Gemma2ForCausalLM", _GELU, norm_offset=1.0, sandwich=True),
    "gemma3": Family("gemma3_text", "Gemma3ForCausalLM", _GELU, norm_offset=1.0, sandwich=True),
}
_MIXTRAL = Family("mixtral", "MixtralForCausalLM", experts="block_sparse_moe", permuted=True)

_MODEL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_SANDWICH_NAMES = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_EXPERT_NAMES = {
    "ffn_gate_inp": "{experts}.gate",
    "ffn_gate_exps": "{experts}.switch_mlp.gate_proj",
    "ffn_up_exps": "{experts}.switch_mlp.up_proj",
    "ffn_down_exps": "{experts}.switch_mlp.down_proj",
    "ffn_gate_inp_shexp": "{experts}.shared_expert_gate",
    "ffn_gate_shexp": "{experts}.shared_expert.gate_proj",
    "ffn_up_shexp": "{experts}.shared_expert.up_proj",
    "ffn_down_shexp": "{experts}.shared_expert.down_proj",
}


class Settings:
    """The metadata of one file, read with types checked. Keys are relative to the architecture's name."""

    def __init__(self, metadata: Mapping[str, Any], filename: str):
        self.metadata, self.filename = metadata, filename
        self.architecture = metadata.get("general.architecture")

    def number(self, key: str, default: float | None = None) -> Any:
        """A positive number; one per layer is accepted when all are equal.

        Raises:
            TQError: It is missing and has no default, or it is something else.
        """
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if value is None:
            raise TQError(f"{self.filename} lacks the metadata key {self.architecture}.{key}")
        if isinstance(value, list) and value and value.count(value[0]) == len(value):
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**53:
            raise TQError(f"{self.filename}: {self.architecture}.{key} is {_brief(value)}, not one positive number")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """A positive whole number, as `number`."""
        value = self.number(key, default)
        if not isinstance(value, int):
            raise self.refuse(key, f"is {value}, not a whole number")
        return value

    def has(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self.metadata

    def refuse(self, key: str, problem: str) -> TQError:
        return TQError(f"{self.filename}: {self.architecture}.{key} {problem}")


def family_of(settings: Settings) -> Family:
    """The family of a file.

    Raises:
        TQError: It is none of those that tq knows.
    """
    family = _FAMILIES.get(settings.architecture) if isinstance(settings.architecture, str) else None
    if family is None:
        raise TQError(
            f"{settings.filename} has the architecture {_brief(settings.architecture)}; "
            f"tq reads these from GGUF: {', '.join(_FAMILIES)}",
            "use the model's original Hugging Face checkpoint",
        )
    if settings.architecture == "llama" and settings.metadata.get("llama.expert_count"):
        return _MIXTRAL
    return family


def tensor_name(family: Family, stored: str) -> str | None:
    """Hugging Face's name (mlx-lm's, for stacked experts), or None for a tensor that belongs in config.json.

    Raises:
        TQError: The family has no such tensor.
    """
    if stored == "rope_freqs.weight":
        return None
    match = re.fullmatch(r"(?:blk\.(0|[1-9]\d{0,4})\.)?([a-z_]+)\.(weight|bias)", stored)
    if match:
        layer, part, kind = match.groups()
        names = _MODEL_NAMES
        if layer is not None:
            names = _LAYER_NAMES | (_SANDWICH_NAMES if family.sandwich else {})
            names |= _EXPERT_NAMES if family.experts else {}
        if part in names:
            prefix = f"model.layers.{layer}." if layer is not None else ""
            return f"{prefix}{names[part].format(experts=family.experts)}.{kind}"
    raise TQError(f"tensor {stored!r} is not part of a {family.model_type} model that tq can read")


def build_config(
    family: Family,
    settings: Settings,
    shapes: Mapping[str, Sequence[int]],
    rope_factors: np.ndarray | None,
    dtype: str,
) -> dict[str, Any]:
    """A config.json that mlx-lm and transformers understand.

    Args:
        family: From `family_of`.
        settings: The file's metadata.
        shapes: Dense shapes by Hugging Face name.
        rope_factors: (head_dim / 2,) the tensor rope_freqs.weight: how much each rotary frequency is divided.
        dtype: For torch_dtype.

    Raises:
        TQError: A setting is missing, or means something that the model in mlx-lm cannot do.
    """
    number, count = settings.number, settings.count
    embedding = shapes.get("model.embed_tokens.weight", ())
    if len(embedding) != 2:
        raise TQError(f"{settings.filename} has no matrix token_embd.weight")
    vocab_size, hidden_size = embedding
    n_layers, n_heads = count("block_count"), count("attention.head_count")
    if f"model.layers.{n_layers - 1}.input_layernorm.weight" not in shapes:
        raise settings.refuse("block_count", f"is {n_layers}, but there is no tensor blk.{n_layers - 1}.attn_norm")
    head_dim = count("attention.key_length", hidden_size // n_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if settings.has(key) and number(key) != head_dim:
            raise settings.refuse(key, f"is {number(key)}; tq needs it to be the head size, {head_dim}")
    config = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "num_key_value_heads": count("attention.head_count_kv", n_heads),
        "head_dim": head_dim,
        "intermediate_size": count("feed_forward_length"),
        "hidden_act": family.hidden_act,
        "max_position_embeddings": count("context_length"),
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "rope_theta": float(number("rope.freq_base", 10000.0)),
        "rope_scaling": _rope_scaling(settings, rope_factors, head_dim),
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in shapes,
        "mlp_bias": "model.layers.0.mlp.gate_proj.bias" in shapes,
        "tie_word_embeddings": "lm_head.weight" not in shapes,
        "torch_dtype": dtype,
    }
    if settings.has("attention.sliding_window"):
        config["sliding_window"] = count("attention.sliding_window")
    if family.experts:
        config |= _expert_config(family, settings, shapes)
    if family.sandwich:
        config |= _gemma_config(family, settings, config)
    return config


def _gemma_config(family: Family, settings: Settings, config: Mapping[str, Any]) -> dict[str, Any]:
    number = settings.number
    # The scale of the scores is not in the file: it is the head size, but for the 27B models, known by their layers.
    largest = {"gemma2": 46, "gemma3_text": 62}[family.model_type]
    is_27b = config["num_hidden_layers"] == largest
    scale = config["hidden_size"] // config["num_attention_heads"] if is_27b else config["head_dim"]
    if family.model_type == "gemma2":
        return {
            "query_pre_attn_scalar": scale,
            "attn_logit_softcapping": number("attn_logit_softcapping", 50.0),
            "final_logit_softcapping": number("final_logit_softcapping", 30.0),
        }
    if settings.has("final_logit_softcapping"):
        raise settings.refuse("final_logit_softcapping", "is set, which mlx-lm's gemma3 does not have")
    windowed = settings.has("attention.sliding_window")
    return {
        "query_pre_attn_scalar": scale,
        "rope_theta": float(number("rope.freq_base", 1_000_000.0)),
        "rope_local_base_freq": float(number("rope.freq_base_swa", 10000.0)),
        "sliding_window": settings.count("attention.sliding_window", 512),
        # One layer in six sees everything; all do when the file names no window.
        "sliding_window_pattern": settings.count("attention.sliding_window_pattern", 6) if windowed else 1,
    }


def _expert_config(family: Family, settings: Settings, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    prefix = f"model.layers.0.{family.experts}"
    stacked = shapes.get(f"{prefix}.switch_mlp.gate_proj.weight")
    if stacked is None or len(stacked) != 3:
        raise TQError(f"{settings.filename} has no stacked experts in blk.0.ffn_gate_exps.weight")
    width = stacked[1]
    n_experts, n_used = settings.count("expert_count"), settings.count("expert_used_count")
    if family.model_type == "mixtral":
        return {"num_local_experts": n_experts, "num_experts_per_tok": n_used, "intermediate_size": width}
    config = {
        "num_experts": n_experts,
        "num_experts_per_tok": n_used,
        "moe_intermediate_size": width,
        "norm_topk_prob": family.model_type == "qwen3_moe",  # fixed for each architecture in llama.cpp
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    shared = shapes.get(f"{prefix}.shared_expert.gate_proj.weight")
    return config | ({"shared_expert_intermediate_size": shared[0]} if shared else {})


def _rope_scaling(settings: Settings, factors: np.ndarray | None, head_dim: int) -> dict[str, Any] | None:
    kind = settings.metadata.get(f"{settings.architecture}.rope.scaling.type", "linear")
    # rope.scale_linear is the older name of the factor.
    factor = settings.number("rope.scaling.factor", settings.number("rope.scale_linear", 1.0))
    if factors is not None and not np.all(factors == 1):
        return _llama3_scaling(settings, np.asarray(factors, np.float64), head_dim)
    if kind == "none" or factor == 1:
        return None
    if kind == "linear":
        return {"rope_type": "linear", "type": "linear", "factor": float(factor)}
    if kind != "yarn":
        raise settings.refuse("rope.scaling.type", f"is {_brief(kind)}; tq reads none, linear and yarn")
    for key in ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"):
        if settings.number(key, 1.0) != 1:
            raise settings.refuse(key, "is not 1, which mlx-lm does not have")
    scaling = {
        "rope_type": "yarn",
        "type": "yarn",
        "factor": float(factor),
        "original_max_position_embeddings": settings.count("rope.scaling.original_context_length"),
    }
    for name in ("beta_fast", "beta_slow"):
        if settings.has(f"rope.scaling.yarn_{name}"):
            scaling[name] = float(settings.number(f"rope.scaling.yarn_{name}"))
    return scaling


def _llama3_scaling(settings: Settings, factors: np.ndarray, head_dim: int) -> dict[str, Any]:
    """Llama 3.1's scaling, found from the factors that llama.cpp stores in its place.

    All Llama 3 models have these three constants; they are confirmed by computing the factors again.
    """
    low, high, context, factor = 1.0, 4.0, 8192, float(factors.max())
    theta = settings.number("rope.freq_base", 10000.0)
    wavelengths = 2 * np.pi * theta ** (np.arange(len(factors)) / len(factors))
    smooth = np.clip((context / wavelengths - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if 2 * len(factors) != head_dim or not np.allclose(factors, expected, rtol=1e-3):
        raise TQError(
            f"{settings.filename}: rope_freqs.weight is not Llama 3's scaling "
            "(low_freq_factor 1, high_freq_factor 4, original context 8192)",
            "use the model's original Hugging Face checkpoint",
        )
    return {
        "rope_type": "llama3",
        "factor": round(factor, 4),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
