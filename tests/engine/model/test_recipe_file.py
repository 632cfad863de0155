"""Recipe files and profiles: every mistake is named with its place, and the profiles that ship are sound."""

from pathlib import Path

import pytest

from tq.engine.machine.profiles import profile_names, profile_path
from tq.engine.model.recipe import Recipe
from tq.engine.model.recipe_file import load_recipe
from tq.engine.model.roles import QUANTIZED_ROLES, Matrix, Role
from tq.errors import TQError, UsageError


def recipe_file(tmp_path, text):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "where", "hint"),
    [
        ("[weight]\nbits = 3", "weight", "did you mean weights?"),
        ("bits = 3", "bits", "valid keys: description, machine, weights"),
        ("[weights]\nbit = 3", "weights.bit", "did you mean bits?"),
        ("[weights]\nzzz = 3", "weights.zzz", "valid keys: attention, bits, codec, embedding, expert, expert_down,"),
        ("[weights.atention]\nbits = 3", "weights.atention", "did you mean attention?"),
        ("[weights.router]\nbits = 3", "weights.router", "valid keys: attention, "),
        ("[weights.mlp]\ngroupsize = 32", "weights.mlp.groupsize", "did you mean group_size?"),
        ("[weights.expert]\nprotect_bits = 3", "weights.expert.protect_bits", "valid keys: bits, codec, group_size,"),
        ('[[weights.override]]\nmatch = "*"\nbitz = 3', "weights.override.0.bitz", "did you mean bits?"),
        ("[machine]\nmemory_gb = 16\nwired_mb = 3", "machine.wired_mb", "did you mean wired_limit_mb?"),
    ],
)
def test_an_unknown_key_is_named_with_its_place_and_the_nearest_valid_one(tmp_path, text, where, hint):
    path = recipe_file(tmp_path, text)
    with pytest.raises(UsageError) as error:
        load_recipe(path)
    assert error.value.message == f"{path}: unknown key {where}"
    assert error.value.hint.startswith(hint)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[weights]\nbits = "4"', "weights.bits: input should be a valid integer (it is '4')"),
        ("[weights]\nbits = true", "weights.bits: input should be a valid integer (it is True)"),
        ("[weights]\nbits = 3.0", "weights.bits: input should be a valid integer (it is 3.0)"),
        ("[weights]\nbits = 9", "weights.bits: input should be less than or equal to 8 (it is 9)"),
        ("[weights.head]\nbits = 0", "weights.head.bits: input should be greater than or equal to 1 (it is 0)"),
        ("[weights]\ngroup_size = 16", "weights.group_size: input should be 32, 64, 128 or 'row' (it is 16)"),
        (
            '[weights.mlp]\ncodec = "gptq"',
            "weights.mlp.codec: input should be 'lloyd-max', 'ternary', 'affine' or 'none' (it is 'gptq')",
        ),
        ('[weights]\nrotation = "qr"', "weights.rotation: input should be 'hadamard' or 'none' (it is 'qr')"),
        ('[weights]\nqjl = "yes"', "weights.qjl: input should be a valid boolean (it is 'yes')"),
        ("[weights]\nmlp = 3", "weights.mlp must be a table, which begins with a line [weights.mlp]"),
        ("[[weights.override]]\nbits = 3", "weights.override.0.match is missing"),
        (
            "[weights.override]\nbits = 3",
            "weights.override must be a table, which begins with a line [[weights.over",
        ),
        (
            '[weights]\nprotect_layers = "1-x"',
            "weights.protect_layers: layers '1-x' are not a list such as 0-1,30",
        ),
        ('[weights.expert]\ncodec = "ternary"\nbits = 2', "weights.expert: codec ternary takes no bits"),
        ("[machine]\nmemory_gb = 0", "machine.memory_gb: input should be greater than 0 (it is 0)"),
        ("[machine]\nwired_limit_mb = 1", "machine.memory_gb is missing"),
    ],
)
def test_a_value_that_cannot_be_is_named_with_its_place(tmp_path, text, message):
    path = recipe_file(tmp_path, text)
    with pytest.raises(UsageError) as error:
        load_recipe(path)
    assert error.value.message.startswith(f"{path}: {message}")
    assert "\n" not in error.value.message


@pytest.mark.parametrize("content", [b"[weights\nbits = 3", b"bits = = 3", b"\xff\xfe", b"bits = 1\nbits = 2"])
def test_what_is_no_toml_is_said(tmp_path, content):
    path = tmp_path / "recipe.toml"
    path.write_bytes(content)
    with pytest.raises(TQError) as error:
        load_recipe(path)
    assert error.value.message.startswith(f"{path} is not a readable TOML file: ")
    assert "\n" not in error.value.message
    with pytest.raises(TQError, match="is not a readable TOML file"):
        load_recipe(tmp_path)


def test_a_missing_file_lists_the_profiles(tmp_path):
    with pytest.raises(TQError) as error:
        load_recipe("17gb")
    assert error.value.message == "no recipe file or profile '17gb'"
    assert error.value.hint == f"profiles: {', '.join(profile_names())}"


def test_an_empty_file_is_the_default(tmp_path):
    recipe = Recipe.from_options(recipe=recipe_file(tmp_path, ""))
    assert recipe.weights == Recipe().weights
    assert recipe.name == "recipe.toml"


# --- profiles ---


def test_the_profiles_that_ship():
    assert profile_names() == ["16gb", "48gb", "64gb"]
    assert profile_path("../profiles/16gb") is None


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_loads_by_name_and_fits_its_machine(name):
    profile = load_recipe(name)
    assert profile.description
    assert name == f"{profile.machine.memory_gb:.0f}gb"
    # Above 85 % of memory macOS itself has too little.
    assert 0.67 < profile.machine.wired_limit_mb / 1024 / profile.machine.memory_gb < 0.85
    recipe = Recipe.from_options(recipe=name)
    assert recipe.name == name
    bits = {role: recipe.spec_for(Matrix("m", "linear", role, (64, 128))).bits for role in QUANTIZED_ROLES}
    assert bits[Role.EXPERT_DOWN] > bits[Role.EXPERT]
    assert bits[Role.EMBEDDING] >= 6 and bits[Role.HEAD] >= 6


@pytest.mark.parametrize("name", profile_names())
def test_every_number_of_a_profile_has_its_reason_above_it(name):
    text = Path(profile_path(name)).read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith(("[", "description", "memory_gb"))]
    numbers = [i for i, line in enumerate(lines) if not line.startswith("#")]
    assert len(numbers) == len([line for line in lines if line.startswith("#")])
    assert all(lines[i - 1].startswith("#") for i in numbers)
