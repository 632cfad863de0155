"""GGUF files: tiny models stored as llama.cpp stores them come back as they were; damaged files are refused."""

import importlib
import json
import math
import struct
import tracemalloc

import gguf
import mlx.core as mx
import numpy as np
import pytest
from gguf.quants import dequantize, quantize
from mlx.utils import tree_flatten

from tq.engine.model.gguf import GGUFFile
from tq.errors import TQError

_CORE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 263,  # three special tokens, 256 bytes, four pieces
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
_WIDE_HEADS = {"head_dim": 32, "tie_word_embeddings": True}
_EXPERTS = {
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
_CONFIGS = {
    "llama": _CORE | {"model_type": "llama"},
    "llama-biased": _CORE | {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "mixtral": _CORE
    | {"model_type": "mixtral", "intermediate_size": 32, "num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen2": _CORE | {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2moe": _CORE | _EXPERTS | {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 96},
    "qwen3": _CORE | _WIDE_HEADS | {"model_type": "qwen3"},
    "qwen3moe": _CORE | _EXPERTS | {"model_type": "qwen3_moe", "head_dim": 32},
    "gemma": _CORE | _WIDE_HEADS | {"model_type": "gemma"},
    "gemma2": _CORE
    | _WIDE_HEADS
    | {
        "model_type": "gemma2",
        "attn_logit_softcapping": 20.0,
        "final_logit_softcapping": 10.0,
        "query_pre_attn_scalar": 32,
        "sliding_window": 128,
    },
    "gemma3": _CORE
    | _WIDE_HEADS
    | {
        "model_type": "gemma3_text",
        "num_hidden_layers": 7,  # the sixth layer sees everything
        "query_pre_attn_scalar": 32,
        "sliding_window": 8,
        "sliding_window_pattern": 6,
        "rope_local_base_freq": 700.0,
    },
}
_PROMPT = np.arange(20)[None] * 13 % 263


def make_model(name):
    config = _CONFIGS[name]
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(config))
    if name == "gemma3":
        model.sanitize({})  # drops the head that tied embeddings leave unused
    rng = np.random.default_rng(len(name))
    weights = {}
    for key, value in tree_flatten(model.parameters()):
        scale = 0.4 if key.endswith(("norm.weight", "bias")) else 1 / math.sqrt(value.shape[-1])
        noise = (rng.standard_normal(value.shape) * scale).astype(np.float32)
        weights[key] = noise + (key.endswith("norm.weight") and not name.startswith("gemma"))
    return model, weights


def stored_form(name, key, value):
    """What llama.cpp's converter writes for one tensor of a Hugging Face checkpoint: its name and its values."""
    config = _CONFIGS[name]
    arch = {"llama-biased": "llama", "mixtral": "llama"}.get(name, name)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config["num_hidden_layers"])
    hub = key.replace("block_sparse_moe.switch_mlp.gate_proj", "block_sparse_moe.experts.w1")
    hub = hub.replace("block_sparse_moe.switch_mlp.down_proj", "block_sparse_moe.experts.w2")
    hub = hub.replace("block_sparse_moe.switch_mlp.up_proj", "block_sparse_moe.experts.w3")
    stored = names.get_name(hub.replace("switch_mlp", "experts"), try_suffixes=(".weight", ".bias"))
    assert stored, key
    if arch == "llama" and (".q_proj." in key or ".k_proj." in key):
        heads = config["num_attention_heads" if ".q_proj." in key else "num_key_value_heads"]
        value = value.reshape(heads, 2, config["head_dim"] // 2, -1).swapaxes(1, 2).reshape(value.shape)
    if arch.startswith("gemma") and key.endswith("norm.weight"):
        value = value + np.float32(1)
    if key.endswith("shared_expert_gate.weight"):
        value = value[0]
    return stored, np.ascontiguousarray(value)


def start_file(path, name, **changes):
    """A writer with the metadata of a tiny model; `changes` replaces keys (without the architecture), None drops."""
    config = _CONFIGS[name]
    arch = {"llama-biased": "llama", "mixtral": "llama"}.get(name, name)
    keys = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": config["rope_theta"],
        "rope.dimension_count": config["head_dim"],
        "attention.sliding_window": config.get("sliding_window"),
        "rope.freq_base_swa": config.get("rope_local_base_freq"),
        "attn_logit_softcapping": config.get("attn_logit_softcapping"),
        "final_logit_softcapping": config.get("final_logit_softcapping"),
        "expert_count": config.get("num_experts", config.get("num_local_experts")),
        "expert_used_count": config.get("num_experts_per_tok"),
        "expert_feed_forward_length": config.get("moe_intermediate_size"),
        "expert_shared_feed_forward_length": config.get("shared_expert_intermediate_size"),
    }
    writer = gguf.GGUFWriter(path, arch)
    for key, value in (keys | changes).items():
        if isinstance(value, str):
            writer.add_string(f"{arch}.{key}", value)
        elif isinstance(value, list):
            writer.add_array(f"{arch}.{key}", value)
        elif value is not None:
            (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(f"{arch}.{key}", value)
    writer.add_tokenizer_model("llama")
    pieces = ["▁", "a", "b", "ab"]
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces])
    writer.add_token_scores([0.0] * 259 + [-1.0, -2.0, -3.0, -4.0])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * 4)
    return writer


def finish_file(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_model(path, name, kind="Q8_0", **changes):
    """Stores a tiny model; returns it with the weights that a reader can still know: the dequantized ones."""
    model, weights = make_model(name)
    writer = start_file(path, name, **changes)
    qtype = gguf.GGMLQuantizationType[kind]
    known = {}
    for key, value in weights.items():
        stored, array = stored_form(name, key, value)
        if value.ndim > 1 and "gate_inp" not in stored:
            blocks = quantize(array, qtype)
            writer.add_tensor(stored, blocks, raw_dtype=qtype)
            known[key] = dequantize(quantize(value, qtype), qtype)
        else:
            writer.add_tensor(stored, array)
            known[key] = value
    finish_file(writer)
    model.load_weights([(key, mx.array(value)) for key, value in known.items()])
    return model, known


def rebuild(file, folder):
    """Loads what the file holds with mlx-lm, as a checkpoint in a folder."""
    from mlx_lm.utils import load_model

    (folder / "config.json").write_text(json.dumps(file.config))
    weights = {key: mx.array(tensor.read()).astype(mx.float32) for key, tensor in file.tensors.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return load_model(folder, strict=True)[0]


@pytest.mark.parametrize("name", _CONFIGS)
def test_a_model_of_every_family_gives_the_logits_of_the_original(tmp_path, name):
    model, known = write_model(tmp_path / "m.gguf", name)
    file = GGUFFile(tmp_path / "m.gguf")
    assert {key: tensor.shape for key, tensor in file.tensors.items()} == {k: v.shape for k, v in known.items()}
    for key, tensor in file.tensors.items():
        np.testing.assert_allclose(tensor.read(), known[key], rtol=0, atol=3e-7, err_msg=key)
    expected, logits = model(mx.array(_PROMPT)), rebuild(file, tmp_path)(mx.array(_PROMPT))
    assert mx.std(expected).item() > 0.05
    np.testing.assert_allclose(np.array(logits), np.array(expected), rtol=0, atol=2e-4)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_every_type_is_dequantized_exactly(tmp_path, kind):
    model, known = write_model(tmp_path / "m.gguf", "llama", kind)
    file = GGUFFile(tmp_path / "m.gguf")
    for key, tensor in file.tensors.items():
        values = tensor.read()
        matrix = len(tensor.shape) > 1
        assert tensor.quantization == (kind if matrix else "F32")
        assert values.dtype == (np.float16 if matrix and kind == "F16" else np.float32)
        np.testing.assert_array_equal(values, known[key], err_msg=key)
    q = file.tensors["model.layers.0.self_attn.q_proj.weight"]
    bits = {"F32": 32, "F16": 16, "BF16": 16, "Q8_0": 8.5, "Q4_0": 4.5, "Q4_1": 5, "Q5_0": 5.5, "Q5_1": 6}[kind]
    assert q.size_bytes == 64 * 64 * bits / 8
    assert file.config["torch_dtype"] == {"F32": "float32", "F16": "float16"}.get(kind, "bfloat16")
    logits = rebuild(file, tmp_path)(mx.array(_PROMPT))
    np.testing.assert_allclose(np.array(logits), np.array(model(mx.array(_PROMPT))), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "kind",
    "Q2_K Q3_K Q4_K Q5_K Q6_K IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ4_NL IQ4_XS TQ1_0 TQ2_0 MXFP4".split(),
)
def test_random_blocks_of_every_other_type(tmp_path, kind):
    qtype = gguf.GGMLQuantizationType[kind]
    writer = start_file(tmp_path / "m.gguf", "llama", block_count=1)
    rng = np.random.default_rng(3)
    block, block_bytes = gguf.GGML_QUANT_SIZES[qtype]
    blocks = rng.integers(0, 256, (64, 256 // block * block_bytes), np.uint8)
    writer.add_tensor("token_embd.weight", np.zeros((263, 64), np.float32))
    writer.add_tensor("blk.0.attn_norm.weight", np.zeros(64, np.float32))
    for part in ("ffn_down", "attn_q"):
        writer.add_tensor(f"blk.0.{part}.weight", blocks, raw_dtype=qtype)
    finish_file(writer)
    tensors = GGUFFile(tmp_path / "m.gguf").tensors
    with np.errstate(all="ignore"):
        expected = dequantize(blocks, qtype)
    assert np.unique(expected[np.isfinite(expected)]).size > 2
    down = tensors["model.layers.0.mlp.down_proj.weight"]
    assert (down.shape, down.quantization, down.size_bytes) == ((64, 256), kind, blocks.size)
    np.testing.assert_array_equal(down.read(), expected)
    pairs = expected.reshape(4, 8, 2, 256)  # a head's row 2 i is row i of its first half, row 2 i + 1 of its second
    unpermuted = np.concatenate([pairs[:, :, 0], pairs[:, :, 1]], axis=1).reshape(64, 256)
    np.testing.assert_array_equal(tensors["model.layers.0.self_attn.q_proj.weight"].read(), unpermuted)


def test_reading_a_tensor_needs_memory_for_that_tensor_only(tmp_path):
    writer = start_file(tmp_path / "m.gguf", "llama", block_count=1)
    rows = 4096
    for part, columns in (("ffn_up", 2048), ("ffn_down", 512)):
        blocks = np.zeros((rows, columns // 32 * 34), np.uint8)
        writer.add_tensor(f"blk.0.{part}.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("token_embd.weight", np.zeros((263, 64), np.float32))
    writer.add_tensor("blk.0.attn_norm.weight", np.zeros(64, np.float32))
    finish_file(writer)
    down = GGUFFile(tmp_path / "m.gguf").tensors["model.layers.0.mlp.down_proj.weight"]
    tracemalloc.start()
    values = down.read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert values.nbytes == rows * 512 * 4
    assert peak < values.nbytes + (6 << 20)  # the pieces that it is made in are small


def test_config_says_what_the_metadata_says(tmp_path):
    write_model(tmp_path / "m.gguf", "gemma2")
    config = GGUFFile(tmp_path / "m.gguf").config
    wanted = _CONFIGS["gemma2"] | {
        "architectures": ["Gemma2ForCausalLM"],
        "hidden_act": "gelu_pytorch_tanh",
        "rope_scaling": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert {key: config[key] for key in wanted} == wanted


def test_the_largest_gemmas_scale_scores_by_width_per_head(tmp_path):
    writer = start_file(tmp_path / "m.gguf", "gemma2", block_count=46)
    writer.add_tensor("token_embd.weight", np.zeros((263, 64), np.float32))
    writer.add_tensor("blk.45.attn_norm.weight", np.zeros(64, np.float32))
    finish_file(writer)
    assert GGUFFile(tmp_path / "m.gguf").config["query_pre_attn_scalar"] == 64 // 4


def test_linear_and_yarn_scaling(tmp_path):
    write_model(tmp_path / "a.gguf", "llama", **{"rope.scaling.type": "linear", "rope.scaling.factor": 4.0})
    assert GGUFFile(tmp_path / "a.gguf").config["rope_scaling"]["factor"] == 4.0
    yarn = {"type": "yarn", "factor": 8.0, "original_context_length": 64, "yarn_beta_fast": 16.0}
    write_model(tmp_path / "b.gguf", "qwen3", **{f"rope.scaling.{k}": v for k, v in yarn.items()})
    scaling = GGUFFile(tmp_path / "b.gguf").config["rope_scaling"]
    assert scaling["rope_type"] == "yarn" and scaling["original_max_position_embeddings"] == 64
    assert (scaling["factor"], scaling["beta_fast"]) == (8.0, 16.0) and "beta_slow" not in scaling


def llama3_factors(factor, low, high, context, dims, theta):
    for i in range(0, dims, 2):
        wavelength = 2 * math.pi * theta ** (i / dims)
        if wavelength < context / high:
            yield 1.0
        elif wavelength > context / low:
            yield factor
        else:
            smooth = (context / wavelength - low) / (high - low)
            yield 1 / ((1 - smooth) / factor + smooth)


def write_with_factors(path, low):
    writer = start_file(path, "llama", **{"block_count": 1, "rope.freq_base": 500000.0})
    factors = np.array(list(llama3_factors(32.0, low, 4.0, 8192, 16, 500000.0)), np.float32)
    writer.add_tensor("rope_freqs.weight", factors)
    writer.add_tensor("token_embd.weight", np.zeros((263, 64), np.float32))
    writer.add_tensor("blk.0.attn_norm.weight", np.zeros(64, np.float32))
    finish_file(writer)
    return factors


def test_llama3_scaling_is_found_from_its_factors(tmp_path):
    from mlx_lm.models.rope_utils import initialize_rope

    factors = write_with_factors(tmp_path / "m.gguf", low=1.0)
    assert 1 < np.sort(factors)[len(factors) // 2] < 32  # some are in the smooth part
    file = GGUFFile(tmp_path / "m.gguf")
    assert "rope_freqs.weight" not in file.tensors
    rope = initialize_rope(16, 500000.0, False, file.config["rope_scaling"])
    wavelengths = 500000.0 ** (np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(np.array(rope._freqs), wavelengths * factors, rtol=1e-5)


def test_other_rope_factors_are_refused(tmp_path):
    write_with_factors(tmp_path / "m.gguf", low=2.0)
    with pytest.raises(TQError, match="not Llama 3's scaling"):
        GGUFFile(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        ({"general.base_model.0.repo_url": "https://huggingface.co/org/base-1.5"}, "org/base-1.5"),
        ({"general.source.repo_url": "https://huggingface.co/org/model/"}, "org/model"),
        ({"general.name": "org/model"}, "org/model"),
        ({"general.name": "A model", "general.source.repo_url": "https://example.com/a/b"}, None),
    ],
)
def test_base_model_is_a_hub_id_or_nothing(tmp_path, keys, found):
    writer = start_file(tmp_path / "m.gguf", "llama", block_count=1)
    for key, value in keys.items():
        writer.add_string(key, value)
    writer.add_tensor("token_embd.weight", np.zeros((263, 64), np.float32))
    writer.add_tensor("blk.0.attn_norm.weight", np.zeros(64, np.float32))
    finish_file(writer)
    assert GGUFFile(tmp_path / "m.gguf").base_model == found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention.head_count": None}, "lacks the metadata key llama.attention.head_count"),
        ({"attention.head_count_kv": [2, 1]}, r"is \[2, 1\], not one positive number"),
        ({"attention.head_count": 3, "attention.head_count_kv": 3}, "which 3 heads do not fit"),
        ({"context_length": "long"}, "'long', not one positive number"),
        ({"context_length": 0.5}, "0.5, not a whole number"),
        ({"block_count": 3}, "there is no tensor blk.2"),
        ({"rope.dimension_count": 8}, "needs it to be the head size, 16"),
        ({"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0}, "none, linear and yarn"),
    ],
)
def test_settings_that_mlx_lm_cannot_follow_are_refused(tmp_path, changes, message):
    write_model(tmp_path / "m.gguf", "llama", **changes)
    with pytest.raises(TQError, match=message):
        GGUFFile(tmp_path / "m.gguf")


def test_other_architectures_tensors_and_parts_are_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "mamba")
    finish_file(writer)
    with pytest.raises(TQError, match=r"'mamba'; tq reads these from GGUF: llama, qwen2, .*gemma3"):
        GGUFFile(tmp_path / "a.gguf")
    for name, tensor in {"b": "blk.0.attn_qkv.weight", "c": "blk.0.ffn_gate_exps.weight", "d": "ssm.weight"}.items():
        writer = start_file(tmp_path / f"{name}.gguf", "llama")
        writer.add_tensor(tensor, np.zeros((2, 2), np.float32))
        finish_file(writer)
        with pytest.raises(TQError, match=f"{tensor!r} is not part of a llama model"):
            GGUFFile(tmp_path / f"{name}.gguf")
    writer = start_file(tmp_path / "e.gguf", "llama")
    writer.add_uint16("split.count", 3)
    finish_file(writer)
    with pytest.raises(TQError, match="one part of several"):
        GGUFFile(tmp_path / "e.gguf")


def test_a_merged_file_is_whole(tmp_path):
    writer = start_file(tmp_path / "m.gguf", "llama", block_count=1)
    writer.add_uint16("split.count", 0)
    writer.add_tensor("token_embd.weight", np.zeros((263, 64), np.float32))
    writer.add_tensor("blk.0.attn_norm.weight", np.zeros(64, np.float32))
    finish_file(writer)
    assert len(GGUFFile(tmp_path / "m.gguf").tensors) == 2


def test_a_type_that_cannot_be_dequantized_is_refused_at_once(tmp_path):
    writer = start_file(tmp_path / "m.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((263, 64), np.int8))
    finish_file(writer)
    with pytest.raises(TQError, match="type I8"):
        GGUFFile(tmp_path / "m.gguf")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The bytes of a good file, and where its last tensor ends (padding follows)."""
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write_model(path, "llama")
    data = path.read_bytes()
    reader = gguf.GGUFReader(path)
    return data, max(tensor.data_offset + tensor.n_bytes for tensor in reader.tensors)


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path, whole):
    data, end = whole
    path = tmp_path / "m.gguf"
    path.write_bytes(data[:end])
    GGUFFile(path)
    for size in [*range(40), *range(41, 12000, 97), *range(12000, end, 9973), end - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(TQError, match=r"incomplete|ends inside|not a GGUF file|ends at byte"):
            GGUFFile(path)


@pytest.mark.parametrize(
    ("offset", "patch", "message"),
    [
        (0, b"GGML", "not a GGUF file"),
        (4, struct.pack("<I", 1), "version 1"),
        (4, struct.pack(">I", 3), "big-endian"),
        (8, struct.pack("<Q", 2**62), "ends inside its header"),  # tensors
        (16, struct.pack("<Q", 2**63), "ends inside its header"),  # metadata keys
        (24, struct.pack("<Q", 2**64 - 1), "ends inside its header"),  # the length of the first key
        (32, b"\xff\xfe", "not UTF-8"),
    ],
)
def test_damage_in_the_first_bytes(tmp_path, whole, offset, patch, message):
    path = tmp_path / "m.gguf"
    path.write_bytes(whole[0][:offset] + patch + whole[0][offset + len(patch) :])
    with pytest.raises(TQError, match=message):
        GGUFFile(path)


def test_huge_lengths_further_on(tmp_path, whole):
    data = whole[0]
    path = tmp_path / "m.gguf"
    for key, skip in ((b"tokenizer.ggml.tokens", 8), (b"tokenizer.ggml.scores", 8), (b"blk.0.attn_q.weight", 4)):
        start = data.index(key) + len(key) + skip  # behind the types: the array's length, or the first dimension
        for size in (2**40, 2**63 - 1):
            path.write_bytes(data[:start] + struct.pack("<Q", size) + data[start + 8 :])
            with pytest.raises(TQError, match=r"ends inside its header|ends at byte|damaged"):
                GGUFFile(path)


def test_random_damage_never_gives_another_error(tmp_path, whole):
    data = bytearray(whole[0])
    header = data.index(b"output_norm.weight") + 64
    path = tmp_path / "m.gguf"
    rng = np.random.default_rng(11)
    refused = 0
    for position, value in zip(rng.integers(0, header, 400), rng.integers(0, 256, 400), strict=True):
        damaged = data.copy()
        damaged[position] = value
        path.write_bytes(damaged)
        try:
            file = GGUFFile(path)
            file.write_tokenizer(tmp_path)
            for tensor in file.tensors.values():
                tensor.read()
        except TQError:
            refused += 1
    assert refused > 20


def test_what_is_no_file_is_refused(tmp_path):
    (tmp_path / "empty.gguf").write_bytes(b"")
    with pytest.raises(TQError, match="not a GGUF file"):
        GGUFFile(tmp_path / "empty.gguf")
    for path in (tmp_path, tmp_path / "missing.gguf"):
        with pytest.raises(TQError, match="cannot be read"):
            GGUFFile(path)
