"""Recipe files: every mistake is named with its place."""

import pytest

from tq.engine.machine.profiles import load_profile, profile_names
from tq.engine.model.recipe import Recipe
from tq.errors import UsageError


def recipe_file(tmp_path, text):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "where", "hint"),
    [
        ("\n[weight]", "weight", "did you mean weights?"),
        ("bits = 3", "bits", "valid keys: description, kv, machine, prefill, prompt_cache, serve, stream, weights"),
        ("[weights]\nbit = 3", "weights.bit", "did you mean bits?"),
        ("[weights]\nzzz = 3", "weights.zzz", "valid keys: attention, bits, codec, embedding, expert, expert_down,"),
        ("[weights.atention]", "weights.atention", "did you mean attention?"),
        ("[weights.router]", "weights.router", "valid keys: attention, "),
        ("[weights.mlp]\ngroupsize = 32", "weights.mlp.groupsize", "did you mean group_size?"),
        ("[weights.expert]\nprotect_bits = 3", "weights.expert.protect_bits", "valid keys: bits, codec, group_size,"),
        ('[[weights.override]]\nmatch = "*"\nbitz = 3', "weights.override.0.bitz", "did you mean bits?"),
        ("[machine]\nmemory_gb = 16\nwired_mb = 3", "machine.wired_mb", "did you mean wired_limit_mb?"),
    ],
)
def test_an_unknown_key_is_named_with_its_place_and_the_nearest_valid_one(tmp_path, text, where, hint):
    path = recipe_file(tmp_path, text)
    with pytest.raises(UsageError) as error:
        load_profile(path)
    line = len(text.splitlines())
    assert error.value.message == f"{path}:{line}: unknown key {where}"
    assert error.value.hint.startswith(hint)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[weights]\nbits = "4"', "2: weights.bits: input should be a valid integer (it is '4')"),
        ("[weights]\nbits = true", "2: weights.bits: input should be a valid integer (it is True)"),
        ("[weights]\nbits = 3.0", "2: weights.bits: input should be a valid integer (it is 3.0)"),
        ("[weights]\nbits = 9", "2: weights.bits: input should be less than or equal to 8 (it is 9)"),
        ("[weights.head]\nbits = 0", "2: weights.head.bits: input should be greater than or equal to 1 (it is 0)"),
        ("[weights]\ngroup_size = 16", "2: weights.group_size: input should be 32, 64, 128 or 'row' (it is 16)"),
        (
            '[weights.mlp]\ncodec = "gptq"',
            "2: weights.mlp.codec: input should be 'lloyd-max', 'ternary', 'affine' or 'none' (it is 'gptq')",
        ),
        ('[weights]\nrotation = "qr"', "2: weights.rotation: input should be 'hadamard' or 'none' (it is 'qr')"),
        ('[weights]\nqjl = "yes"', "2: weights.qjl: input should be a valid boolean (it is 'yes')"),
        ("[weights]\nmlp = 3", "2: weights.mlp must be a table, which begins with a line [weights.mlp]"),
        ("[[weights.override]]\nbits = 3", "1: weights.override.0.match is missing"),
        (
            "[weights.override]\nbits = 3",
            "1: weights.override must be a table, which begins with a line [[weights.over",
        ),
        (
            '[weights]\nprotect_layers = "1-x"',
            "2: weights.protect_layers: layers '1-x' are not a list such as 0-1,30",
        ),
        ('[weights.expert]\ncodec = "ternary"\nbits = 2', "1: weights.expert: codec ternary takes no bits"),
        ("[machine]\nmemory_gb = 0", "2: machine.memory_gb: input should be greater than 0 (it is 0)"),
        ("[machine]\nwired_limit_mb = 1", "1: machine.memory_gb is missing"),
    ],
)
def test_a_value_that_cannot_be_is_named_with_its_place(tmp_path, text, message):
    path = recipe_file(tmp_path, text)
    with pytest.raises(UsageError) as error:
        load_profile(path)
    assert error.value.message.startswith(f"{path}:{message}")
    assert "\n" not in error.value.message


@pytest.mark.parametrize("content", [b"[weights\nbits = 3", b"bits = = 3", b"\xff\xfe", b"bits = 1\nbits = 2"])
def test_what_is_no_toml_is_said(tmp_path, content):
    path = tmp_path / "recipe.toml"
    path.write_bytes(content)
    with pytest.raises(UsageError) as error:
        load_profile(path)
    assert error.value.message.startswith(f"{path}: not a readable TOML file: ")
    assert "\n" not in error.value.message
    with pytest.raises(UsageError, match="not a readable TOML file: Is a directory"):
        load_profile(tmp_path)


def test_a_missing_file_lists_the_profiles(tmp_path):
    with pytest.raises(UsageError) as error:
        load_profile("17gb")
    assert error.value.message == "no recipe file or profile '17gb'"
    assert error.value.hint == f"profiles: {', '.join(profile_names())}"


def test_an_empty_file_is_the_default(tmp_path):
    recipe = Recipe.from_options(recipe=recipe_file(tmp_path, ""))
    assert recipe.weights == Recipe().weights
    assert recipe.name == "recipe.toml"
