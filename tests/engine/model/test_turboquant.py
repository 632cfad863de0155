"""The turboquant layout: the files of its own converters are read as its own layers compute them, and written back."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from tq.engine.model.convert import convert
from tq.engine.model.load import load
from tq.engine.model.plan import make_plan
from tq.engine.model.recipe import Recipe
from tq.engine.model.roles import Matrix, Role
from tq.engine.model.sources import open_source
from tq.engine.model.turboquant import TurboquantFormat, is_turboquant, matrix_paths, read_matrices, read_matrix
from tq.engine.quantize import PackedTensor, QuantSpec, decode, decode_rotated, encode
from tq.engine.quantize.packing import pack, unpack
from tq.errors import TQError, UsageError

FORMAT = TurboquantFormat()
FIXTURES = Path(__file__).parents[2] / "fixtures" / "turboquant"
VARIANTS = sorted(path.parent.name for path in FIXTURES.glob("*/config.json"))
TOKENS = [1, 17, 5, 80, 33, 2, 61, 9, 44, 95, 12, 70]
QJL_TOLERANCE = 1e-3  # the project computes this correction in float16
FLOAT32_SCALES_TOLERANCE = 3e-3  # those of "affine_extras" are float16 in the memory order of the CPU kernels


def tolerance(variant):
    return QJL_TOLERANCE if variant == "qjl" else 1e-5


def checkpoint(variant):
    folder = FIXTURES / variant
    return json.loads((folder / "config.json").read_text()), mx.load(str(folder / "model.safetensors"))


def specs(variant):
    config, arrays = checkpoint(variant)
    return {path: read_matrix(path, arrays, config).spec for path in matrix_paths(arrays)}


def relative_error(actual, expected):
    actual, expected = np.array(actual), np.array(expected)
    return np.abs(actual - expected).max() / np.abs(expected).max()


def test_every_fixture_is_there():
    assert len(VARIANTS) == 13


@pytest.mark.parametrize("variant", VARIANTS)
def test_matrices_compute_what_the_layers_of_the_project_compute(variant):
    config, arrays = checkpoint(variant)
    probes = mx.load(str(FIXTURES / variant / "probes.safetensors"))
    paths = matrix_paths(arrays)
    assert paths == sorted(name for name in probes if not name.startswith("x."))
    for path in paths:
        packed = read_matrix(path, arrays, config)
        dense = decode(packed)
        assert dense.shape == packed.shape
        outputs = probes[f"x.{packed.in_features}"] @ dense.swapaxes(-1, -2)
        assert relative_error(outputs, probes[path]) < tolerance(variant), path


@pytest.mark.parametrize("variant", VARIANTS)
def test_loaded_models_have_the_logits_of_the_project(variant):
    loaded = load(str(FIXTURES / variant))
    logits = loaded.model(mx.array([TOKENS]))[0]
    assert logits.dtype == mx.float32
    bound = FLOAT32_SCALES_TOLERANCE if variant == "affine_extras" else tolerance(variant)
    assert relative_error(logits, np.load(FIXTURES / variant / "logits.npy")) < bound


def test_widths_come_from_the_codebook_of_each_matrix():
    found = specs("hybrid")
    assert found["model.layers.0.self_attn.q_proj"] == QuantSpec("lloyd-max", 4, 32)
    assert found["model.layers.0.mlp.down_proj"] == QuantSpec("lloyd-max", 2, 32)
    assert found["lm_head"] == QuantSpec("lloyd-max", 3, 32)


def test_experts_are_ternary_where_their_codebook_has_three_levels():
    found = specs("expert_down_bits")
    experts = "model.layers.0.mlp.switch_mlp"
    assert found[f"{experts}.gate_proj"] == found[f"{experts}.up_proj"] == QuantSpec("ternary", 0, 32)
    assert found[f"{experts}.down_proj"] == QuantSpec("lloyd-max", 4, 32)
    found = specs("protected_experts")
    assert found["model.layers.0.mlp.switch_mlp.up_proj"].codec == "ternary"
    assert found["model.layers.1.mlp.switch_mlp.up_proj"] == QuantSpec("lloyd-max", 3, 32)


def test_rotation_none_is_believed_only_if_the_signs_agree():
    assert {spec.rotation for spec in specs("rotation_none").values()} == {"none"}
    assert {spec.rotation for spec in specs("version_0_6_1_none").values()} == {"hadamard"}


def test_qjl_is_read_with_its_projection():
    config, arrays = checkpoint("qjl")
    packed = read_matrix("model.layers.0.mlp.down_proj", arrays, config)
    assert packed.spec == QuantSpec("lloyd-max", 2, 32, qjl=True)
    without = {name: array for name, array in packed.arrays.items() if not name.startswith("qjl")}
    plain = PackedTensor(QuantSpec("lloyd-max", 2, 32), packed.shape, without)
    assert not np.allclose(np.array(decode(packed)), np.array(decode(plain)))


def test_affine_matrices_have_the_width_of_the_layer_or_of_the_config():
    config, arrays = checkpoint("affine_extras")
    expected = QuantSpec("affine", 4, 32, "none")
    assert read_matrix("lm_head", arrays, config).spec == expected
    del config["quantization"]["affine_extras"]
    assert read_matrix("lm_head", arrays, config, in_features=96).spec == expected
    # The same words and groups, read as a layer of twice the width.
    assert read_matrix("lm_head", arrays, config, in_features=192).spec == QuantSpec("affine", 2, 64, "none")
    with pytest.raises(TQError, match="affine_extras"):
        read_matrix("lm_head", arrays, config)


def naive_words(codes, bits):
    """(rows, n) codes -> (rows, words) of the layout, one code at a time."""
    per_word, place = (32 // bits, 2**bits) if bits else (20, 3)
    rows, n = codes.shape
    words = np.zeros((rows, -(-n // per_word)), np.uint64)
    for i in range(n):
        words[:, i // per_word] += codes[:, i].astype(np.uint64) * np.uint64(place ** (i % per_word))
    return words.astype(np.uint32)


@pytest.mark.parametrize("bits", range(9))
@pytest.mark.parametrize("n", [32, 96, 352])
def test_codes_of_every_width_survive_repacking_exactly(bits, n):
    levels = 2**bits if bits else 3
    codes = np.random.default_rng(bits).integers(0, levels, (6, n))
    words = naive_words(codes, bits)
    if bits and 32 % bits:
        words |= np.uint32((2**32 - 1) << (32 // bits * bits) & (2**32 - 1))  # bits that hold no code mean nothing
    arrays = {
        "m.weight": mx.array(words).reshape(2, 3, -1),
        "m.scales": mx.ones((2, 3, n // 32), mx.float16),
        "m.codebook": mx.arange(levels).astype(mx.float16),
        "m.signs": mx.ones((n,), mx.float16),
    }
    packed = read_matrix("m", arrays, {"quantization": {"mode": "turboquant", "rotation": "none"}})
    assert np.array_equal(np.array(decode_rotated(packed)), codes.reshape(2, 3, n))
    assert mx.array_equal(packed.arrays["weight"], mx.array(pack(codes, bits)).reshape(2, 3, -1))


def test_groups_of_16_are_read_but_not_offered():
    """Its converter has --mlp-group-size 16."""
    rng = np.random.default_rng(16)
    codes, scales = rng.integers(0, 4, (5, 96)), rng.uniform(0.5, 2, (5, 6)).astype(np.float16)
    levels = np.array([-1.5, -0.5, 0.25, 1.0], np.float16)
    arrays = {
        "m.weight": mx.array(naive_words(codes, 2)),
        "m.scales": mx.array(scales),
        "m.codebook": mx.array(levels),
        "m.signs": mx.ones((96,), mx.float16),
    }
    packed = read_matrix("m", arrays, {"quantization": {"mode": "turboquant", "rotation": "none"}})
    assert packed.spec == QuantSpec("lloyd-max", 2, 16, "none")
    expected = levels[codes].astype(np.float32) * np.repeat(scales.astype(np.float32), 16, axis=1)
    assert np.array_equal(np.array(decode(packed)), expected)
    with pytest.raises(UsageError, match="not one of 32, 64, 128, row"):
        Recipe.from_options(group_size=16)
    with pytest.raises(UsageError, match="32, 64 or 128"):
        QuantSpec("affine", 4, 16)


WRITTEN = [
    (QuantSpec("lloyd-max", 2, 32), (5, 96), "linear"),
    (QuantSpec("lloyd-max", 3, 32), (5, 96), "linear"),
    (QuantSpec("lloyd-max", 3, 64), (5, 448), "linear"),
    (QuantSpec("lloyd-max", 4, 128), (5, 384), "linear"),
    (QuantSpec("lloyd-max", 3, 32, "none"), (5, 352), "linear"),
    (QuantSpec("lloyd-max", 3, 32, qjl=True), (5, 160), "linear"),
    (QuantSpec("lloyd-max", 3, 32), (4, 5, 96), "switch"),
    (QuantSpec("ternary", 0, 32), (4, 5, 96), "switch"),
    (QuantSpec("affine", 4, 32, "none"), (7, 96), "embedding"),
    (QuantSpec("affine", 3, 64, "none"), (4, 5, 128), "multi"),
]


def matrix(shape, kind, path="layer"):
    return Matrix(path, kind, Role.OTHER, shape)


def quantization(specs):
    return FORMAT.quantization(
        {path: (matrix((8, 64), "linear", path), spec) for path, spec in specs.items()}, "float32"
    )


@pytest.mark.parametrize(("spec", "shape", "kind"), WRITTEN, ids=lambda value: str(value))
def test_what_is_written_is_read_back(spec, shape, kind):
    mx.random.seed(3)
    packed = encode(mx.random.normal(shape), spec)
    assert FORMAT.refuse(matrix(shape, kind), spec) is None
    written = FORMAT.arrays("layer", packed)
    planned = FORMAT.layout(matrix(shape, kind), spec)
    assert [(name, a.dtype, a.shape) for name, a in written.items()] == [
        (name, a.dtype, a.shape) for name, a in planned.items()
    ]
    config = {"quantization": quantization({"layer": spec})}
    assert is_turboquant(config)
    again = read_matrix("layer", written, config)
    assert (again.spec, again.shape) == (packed.spec, packed.shape)
    assert again.arrays.keys() == packed.arrays.keys()
    for name, array in packed.arrays.items():
        assert mx.array_equal(again.arrays[name], array), name
    if spec.codec != "affine":
        codes = np.array(unpack(packed.arrays["weight"], spec.bits, shape[-1])).reshape(-1, shape[-1])
        expected = naive_words(codes, spec.bits).reshape(*shape[:-1], -1)
        assert np.array_equal(np.array(written["layer.weight"]), expected)


@pytest.mark.parametrize(
    ("spec", "shape", "kind", "reason"),
    [
        (QuantSpec("lloyd-max", 5, 32), (8, 64), "linear", "2, 3, 4 bits"),
        (QuantSpec("lloyd-max", 1, 32), (8, 64), "linear", "2, 3, 4 bits"),
        (QuantSpec("lloyd-max", 4, 0), (8, 64), "linear", "one scale per row"),
        (QuantSpec("lloyd-max", 4, 32), (8, 64), "embedding", "only be affine"),
        (QuantSpec("lloyd-max", 4, 32), (2, 8, 64), "multi", "only be affine"),
        (QuantSpec("lloyd-max", 4, 32), (8, 16384), "linear", "larger blocks"),
        (QuantSpec("lloyd-max", 4, 32, qjl=True), (2, 8, 64), "switch", "qjl"),
        (QuantSpec("ternary", 0, 32), (8, 64), "linear", "only experts"),
        (QuantSpec("affine", 4, 32), (8, 64), "linear", "not rotated"),
        (QuantSpec("affine", 5, 32, "none"), (8, 64), "linear", "2, 3, 4, 6, 8 bits"),
    ],
    ids=lambda value: str(value),
)
def test_what_the_layout_cannot_hold_is_refused(spec, shape, kind, reason):
    assert reason in FORMAT.refuse(matrix(shape, kind), spec)


def test_config_says_what_versions_that_go_by_rules_can_use():
    section = quantization(
        {
            "model.layers.0.self_attn.q_proj": QuantSpec("lloyd-max", 4, 64),
            "model.layers.0.self_attn.o_proj": QuantSpec("lloyd-max", 4, 64),
            "model.layers.0.mlp.switch_mlp.up_proj": QuantSpec("ternary", 0, 64),
            "model.layers.0.mlp.switch_mlp.down_proj": QuantSpec("lloyd-max", 3, 64),
            "model.embed_tokens": QuantSpec("affine", 8, 32, "none"),
            "lm_head": QuantSpec("lloyd-max", 2, 64),
        }
    )
    assert section == {
        "mode": "turboquant",
        "bits": 2,
        "group_size": 64,
        "use_qjl": False,
        "rotation": "hadamard",
        "attn_bits": 4,
        "mlp_bits": 3,
        "ternary_experts": True,
        "affine_extras": {"bits": 8, "group_size": 32},
    }


def test_config_of_partly_rotated_matrices_leaves_it_to_their_signs():
    assert quantization({"a": QuantSpec(rotation="none"), "b": QuantSpec()})["rotation"] == "none"


def test_other_quantizations_are_not_taken_for_this_one():
    assert not is_turboquant({"quantization": {"bits": 4, "group_size": 64}})
    assert not is_turboquant({})


def test_matrices_are_taken_out_of_the_weights_and_the_rest_stays():
    config, arrays = checkpoint("expert_biases")
    paths = matrix_paths(arrays)
    shapes = {path: read_matrix(path, arrays, config).shape for path in paths} | {"unquantized": (8, 8)}
    found = read_matrices(config, arrays, shapes)
    assert sorted(found) == paths
    assert "model.layers.0.mlp.experts.down_proj.bias" in arrays
    assert "model.layers.0.mlp.router.weight" in arrays
    assert not [name for name in arrays if name.endswith((".scales", ".signs", ".codebook"))]


def test_matrices_with_equal_signs_share_them():
    mx.random.seed(0)
    weights = FORMAT.arrays("q", encode(mx.random.normal((4, 64)), QuantSpec()))
    weights |= FORMAT.arrays("k", encode(mx.random.normal((2, 64)), QuantSpec()))
    weights |= FORMAT.arrays("o", encode(mx.random.normal((2, 128)), QuantSpec()))
    config = {"quantization": quantization({path: QuantSpec() for path in "qko"})}
    weights = {name: mx.array(np.array(array)) for name, array in weights.items()}  # as from a file
    found = read_matrices(config, weights, {"q": (4, 64), "k": (2, 64), "o": (2, 128)})
    assert found["q"].arrays["signs"] is found["k"].arrays["signs"]
    assert found["q"].arrays["signs"] is not found["o"].arrays["signs"]


def test_quantized_matrices_without_a_module_of_their_shape_are_refused():
    config, arrays = checkpoint("bits3")
    shapes = {path: read_matrix(path, arrays, config).shape for path in matrix_paths(arrays)}
    with pytest.raises(TQError, match="lm_head has the shape"):
        read_matrices(config, dict(arrays), shapes | {"lm_head": (95, 96)})
    del shapes["lm_head"]
    with pytest.raises(TQError, match="lm_head is quantized, but"):
        read_matrices(config, dict(arrays), shapes)


def test_both_formats_of_a_conversion_hold_the_same_model(tmp_path):
    from mlx.utils import tree_flatten
    from mlx_lm.models.qwen3_moe import Model, ModelArgs

    config = {key: value for key, value in checkpoint("ternary_experts")[0].items() if "quantization" not in key}
    mx.random.seed(1)
    model = Model(ModelArgs.from_dict(config))
    (tmp_path / "source").mkdir()
    mx.save_safetensors(
        str(tmp_path / "source" / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"}
    )
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    for file in FIXTURES.glob("ternary_experts/tokenizer*"):
        shutil.copy(file, tmp_path / "source")
    recipe = Recipe.from_options(
        bits=3,
        attention_bits=3,  # value projections too: tq's own format would give them more
        group_size=32,
        expert_bits="ternary",
        expert_down_bits=2,
        embedding_bits="none",
        head_bits="none",
    )
    logits = {}
    for name in ("tq", "turboquant"):
        plan = make_plan(open_source(str(tmp_path / "source")), recipe, dtype="float32", format=name)
        for _ in convert(plan, tmp_path / name):
            pass
        loaded = load(str(tmp_path / name))
        assert loaded.config["quantization"]["mode"] == name
        logits[name] = np.array(loaded.model(mx.array([TOKENS])))
    assert np.array_equal(logits["tq"], logits["turboquant"])


def drop(suffix):
    return lambda config, arrays: arrays.pop(f"lm_head.{suffix}")


def put(suffix, array):
    return lambda config, arrays: arrays.update({f"lm_head.{suffix}": array})


def say(**values):
    return lambda config, arrays: config["quantization"].update(values)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop("weight"), "lacks lm_head.weight"),
        (drop("signs"), "lacks lm_head.signs"),
        (drop("codebook"), "lacks lm_head.biases"),
        (put("qjl_packed", mx.zeros((96, 3), mx.uint32)), "lacks lm_head.qjl_norms, lm_head.qjl_signs"),
        (put("codebook", mx.zeros(6, mx.float16)), "6 levels"),
        (put("codebook", mx.zeros(16, mx.float16)), "contradict"),
        (put("weight", mx.zeros((96, 9), mx.uint32)), "contradict"),
        (put("weight", mx.zeros((96, 10), mx.float32)), "contradict"),
        (put("scales", mx.zeros((96, 4), mx.float16)), "4 scales for 96 input features"),
        (say(rotation="givens"), "'givens'"),
        (say(fuse_rotations=True), "--fuse-rotations"),
    ],
)
def test_damaged_checkpoints_are_refused_by_name(damage, message):
    config, arrays = checkpoint("bits3")
    damage(config, arrays)
    with pytest.raises(TQError, match=message):
        read_matrix("lm_head", arrays, config)


def test_a_matrix_of_another_width_than_the_layer_is_refused():
    config, arrays = checkpoint("bits3")
    with pytest.raises(TQError, match="96 input features where the model has 64"):
        read_matrix("lm_head", arrays, config, in_features=64)


def test_blocks_of_rotation_larger_than_ours_are_refused():
    n = 16384
    arrays = {
        "m.weight": mx.zeros((1, n // 16), mx.uint32),
        "m.scales": mx.zeros((1, n // 64), mx.float16),
        "m.codebook": mx.zeros(4, mx.float16),
        "m.signs": mx.ones(n, mx.float16),
    }
    with pytest.raises(TQError, match="rotated in blocks larger"):
        read_matrix("m", arrays, {"quantization": {"mode": "turboquant"}})
