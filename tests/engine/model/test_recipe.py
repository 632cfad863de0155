"""Recipes: what each option and key does, which choice wins, and what an option cannot be."""

import pytest

from tq.engine.model.recipe import FormatDefaults, Recipe
from tq.engine.model.recipe_file import Choice, parse_layers
from tq.engine.model.roles import TOO_SMALL, Matrix, Role
from tq.engine.quantize import QuantSpec
from tq.errors import UsageError

PATHS = {
    Role.ATTENTION: "model.layers.1.self_attn.q_proj",
    Role.VALUE: "model.layers.1.self_attn.v_proj",
    Role.MLP: "model.layers.1.mlp.up_proj",
    Role.EXPERT: "model.layers.1.mlp.switch_mlp.up_proj",
    Role.EXPERT_DOWN: "model.layers.1.mlp.switch_mlp.down_proj",
    Role.SHARED_EXPERT: "model.layers.1.mlp.shared_expert.up_proj",
    Role.ROUTER: "model.layers.1.mlp.gate",
    Role.EMBEDDING: "model.embed_tokens",
    Role.HEAD: "lm_head",
    Role.OTHER: "model.projection",
}


def matrix(role=Role.MLP, in_features=128, path=None, kept=None):
    return Matrix(path or PATHS[role], "linear", role, (64, in_features), kept)


def bits(recipe, *roles, **options):
    """The bits of each role: 0 for ternary, None for full precision."""
    specs = [recipe.spec_for(matrix(role), **options) for role in roles]
    return [spec and spec.bits for spec in specs]


def options(**given):
    return Recipe.from_options(**given)


def from_toml(tmp_path, text, **given):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return Recipe.from_options(recipe=path, **given)


# --- options ---


def test_the_default_is_4_bits_in_groups_of_64_and_6_for_embedding_and_head():
    recipe = options()
    assert recipe.spec_for(matrix()) == QuantSpec("lloyd-max", 4, 64, "hadamard", False)
    assert bits(recipe, *PATHS) == [4, 6, 4, 4, 4, 4, None, 6, 6, None]
    assert recipe.name == "default"


@pytest.mark.parametrize(
    ("given", "spec"),
    [
        ({"bits": 3}, QuantSpec(bits=3)),
        ({"bits": "3"}, QuantSpec(bits=3)),
        ({"bits": "8"}, QuantSpec(bits=8)),
        ({"bits": "ternary"}, QuantSpec("ternary", 0)),
        ({"bits": "1.58"}, QuantSpec("ternary", 0)),
        ({"bits": "none"}, None),
        ({"bits": "NONE"}, None),
        ({"bits": 16}, None),
        ({"codec": "none"}, None),
        ({"bits": "none", "codec": "none"}, None),
        ({"codec": "ternary"}, QuantSpec("ternary", 0)),
        ({"codec": "ternary", "bits": "ternary"}, QuantSpec("ternary", 0)),
        ({"codec": "affine"}, QuantSpec("affine", 4)),
        ({"codec": "affine", "bits": 2, "rotation": "none"}, QuantSpec("affine", 2, 64, "none")),
        ({"rotation": "none"}, QuantSpec(rotation="none")),
        ({"group_size": 32}, QuantSpec(group_size=32)),
        ({"group_size": "128"}, QuantSpec(group_size=128)),
        ({"group_size": "row"}, QuantSpec(group_size=0)),
        ({"group_size": "ROW", "bits": 1}, QuantSpec(bits=1, group_size=0)),
    ],
)
def test_general_options(given, spec):
    assert options(**given).spec_for(matrix()) == spec


@pytest.mark.parametrize(
    ("option", "roles"),
    [
        ("attention_bits", {Role.ATTENTION, Role.VALUE}),
        ("mlp_bits", {Role.MLP}),
        ("expert_bits", {Role.EXPERT, Role.EXPERT_DOWN}),  # the down matrix too, unless it has its own
        ("expert_down_bits", {Role.EXPERT_DOWN}),
        ("embedding_bits", {Role.EMBEDDING}),
        ("head_bits", {Role.HEAD}),
    ],
)
@pytest.mark.parametrize(("value", "expected"), [("2", 2), (5, 5), ("ternary", 0), ("none", None), ("16", None)])
def test_options_of_a_role_change_that_role_alone(option, roles, value, expected):
    recipe, plain = options(**{option: value}), options()
    for role in PATHS:
        assert bits(recipe, role) == ([expected] if role in roles else bits(plain, role)), role


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, QuantSpec(bits=6)),
        ({"bits": 2}, QuantSpec(bits=4)),
        ({"bits": 7}, QuantSpec(bits=8)),
        ({"bits": 8}, QuantSpec(bits=8)),
        ({"codec": "affine", "bits": 5}, QuantSpec("affine", 8)),
        ({"codec": "ternary"}, QuantSpec("ternary", 0)),
        ({"codec": "none"}, None),
        ({"attention_bits": 3}, QuantSpec(bits=3)),
        ({"mlp_bits": 2}, QuantSpec(bits=6)),
    ],
)
def test_value_projections_get_two_bits_more_unless_asked(given, expected):
    assert options(**given).spec_for(matrix(Role.VALUE)) == expected


def test_a_format_may_have_one_width_for_all_of_attention():
    uniform = FormatDefaults(value_extra_bits=0)
    assert options(bits=3).spec_for(matrix(Role.VALUE), defaults=uniform) == QuantSpec(bits=3)


def test_a_recipe_file_may_name_value_projections(tmp_path):
    (tmp_path / "r.toml").write_text("[weights]\nbits = 3\n[weights.value]\nbits = 4\n")
    recipe = options(recipe=tmp_path / "r.toml")
    assert recipe.spec_for(matrix(Role.VALUE)) == QuantSpec(bits=4)


def test_the_down_matrix_of_experts_may_differ():
    assert bits(options(expert_bits="ternary", expert_down_bits=4), Role.EXPERT, Role.EXPERT_DOWN) == [0, 4]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bits": 0}, "--bits 0 is not one of 1 to 8, ternary, none"),
        ({"bits": "9"}, "--bits 9 is not one of 1 to 8, ternary, none"),
        ({"bits": "3.5"}, "--bits 3.5 is not one of"),
        ({"bits": "²"}, "--bits ² is not one of"),
        ({"attention_bits": "x"}, "--attention-bits x is not one of"),
        ({"mlp_bits": 9}, "--mlp-bits 9 is not one of"),
        ({"expert_bits": -1}, "--expert-bits -1 is not one of"),
        ({"expert_down_bits": ""}, "--expert-down-bits  is not one of"),
        ({"embedding_bits": 32}, "--embedding-bits 32 is not one of"),
        ({"head_bits": "four"}, "--head-bits four is not one of"),
        ({"group_size": 48}, "--group-size 48 is not one of 32, 64, 128, row"),
        ({"group_size": 16}, "--group-size 16 is not one of 32, 64, 128, row"),
        ({"group_size": "0"}, "--group-size 0 is not one of"),
        ({"codec": "loyd-max"}, "--codec 'loyd-max' is not one of lloyd-max, ternary, affine, none"),
        ({"rotation": "givens"}, "--rotation 'givens' is not one of hadamard, none"),
        ({"protect": "1,x"}, "layers '1,x' are not a list such as 0-1,30"),
        ({"protect": "5-3"}, "layers '5-3' are not a list"),
        ({"protect": "3-"}, "layers '3-' are not a list"),
        ({"protect": "0", "protect_bits": 0}, "--protect-bits 0 is not one of 1 to 8"),
        ({"protect_bits": 8}, "--protect-bits needs layers to protect"),
        ({"codec": "ternary", "bits": 3}, "--codec ternary and --bits 3 contradict each other"),
        ({"codec": "none", "bits": 3}, "--codec none and --bits 3 contradict each other"),
        ({"codec": "affine", "bits": "none"}, "--codec affine and --bits none contradict each other"),
        ({"codec": "lloyd-max", "bits": "ternary"}, "--codec lloyd-max and --bits ternary contradict each other"),
    ],
)
def test_what_an_option_cannot_be(given, message):
    with pytest.raises(UsageError) as error:
        options(**given)
    assert error.value.message.startswith(message)
    assert "\n" not in error.value.message


def test_a_near_miss_is_named():
    with pytest.raises(UsageError) as error:
        options(codec="loyd-max")
    assert error.value.hint == "did you mean lloyd-max?"


@pytest.mark.parametrize("value", [1, 5, 7])
def test_bits_that_a_codec_lacks_name_the_tensor_and_the_valid_ones(value):
    if value == 5:
        assert options(codec="affine", bits=5).spec_for(matrix()).bits == 5
        return
    with pytest.raises(UsageError) as error:
        options(codec="affine", bits=value).spec_for(matrix(Role.ATTENTION))
    assert error.value.message == (
        f"model.layers.1.self_attn.q_proj (attention): bits {value} is not valid for affine: "
        "use one of 2, 3, 4, 5, 6, 8"
    )


# --- which choice wins ---


def test_override_over_protected_layer_over_role_over_general(tmp_path):
    recipe = from_toml(
        tmp_path,
        """
        [weights]
        bits = 3
        protect_layers = "1"
        protect_bits = 6
        [weights.mlp]
        bits = 2
        [[weights.override]]
        match = "*.1.mlp.up_proj"
        bits = 7
        """,
    )
    layer = "model.layers.{}.{}".format
    choices = {
        layer(0, "self_attn.q_proj"): (Role.ATTENTION, 3),  # general
        layer(0, "mlp.up_proj"): (Role.MLP, 2),  # role
        layer(1, "mlp.down_proj"): (Role.MLP, 6),  # protected layer
        layer(1, "mlp.up_proj"): (Role.MLP, 7),  # override
        layer(11, "mlp.down_proj"): (Role.MLP, 2),  # 11 is not 1
    }
    assert {p: recipe.spec_for(matrix(r, path=p)).bits for p, (r, _) in choices.items()} == {
        path: expected for path, (_, expected) in choices.items()
    }


def test_later_overrides_win_and_what_they_leave_out_stays(tmp_path):
    recipe = from_toml(
        tmp_path,
        """
        [weights]
        group_size = 32
        [[weights.override]]
        match = "*.mlp.*"
        bits = 2
        rotation = "none"
        [[weights.override]]
        match = "*.up_proj"
        bits = 8
        """,
    )
    assert recipe.spec_for(matrix()) == QuantSpec("lloyd-max", 8, 32, "none")
    assert recipe.spec_for(matrix(path="model.layers.0.mlp.down_proj")) == QuantSpec("lloyd-max", 2, 32, "none")


def test_an_override_can_keep_a_tensor_and_bring_one_back(tmp_path):
    recipe = from_toml(
        tmp_path,
        """
        [weights]
        codec = "none"
        [[weights.override]]
        match = "lm_head"
        bits = 5
        [[weights.override]]
        match = "*.q_proj"
        codec = "affine"
        """,
    )
    assert bits(recipe, Role.MLP, Role.HEAD) == [None, 5]
    assert recipe.spec_for(matrix(Role.ATTENTION)) == QuantSpec("affine", 4)


def test_options_go_over_the_file(tmp_path):
    text = """
        [weights]
        bits = 3
        group_size = 128
        [weights.expert]
        codec = "ternary"
        """
    recipe = from_toml(tmp_path, text, bits=2, expert_bits=4, head_bits="none")
    assert recipe.spec_for(matrix()) == QuantSpec("lloyd-max", 2, 128)
    assert bits(recipe, Role.EXPERT, Role.HEAD) == [4, None]
    # What the file says of bits holds for another codec.
    assert from_toml(tmp_path, text, codec="affine").spec_for(matrix()) == QuantSpec("affine", 3, 128)
    assert bits(from_toml(tmp_path, text, codec="none"), Role.MLP, Role.EXPERT) == [None, 0]


def test_a_choice_takes_over_what_fits_its_codec():
    general = Choice(codec="lloyd-max", bits=3, group_size="row")
    assert Choice(codec="affine").over(general) == Choice(codec="affine", bits=3)  # affine has no row scale
    assert Choice(codec="ternary").over(general) == Choice(codec="ternary", group_size="row")
    assert Choice(bits=2).over(Choice(codec="none")) == Choice(codec="lloyd-max", bits=2)
    assert Choice(bits=2).over(Choice(codec="affine")) == Choice(codec="affine", bits=2)


# --- protected layers ---


def test_protected_layers_get_8_bits_and_what_is_outside_of_layers_does_not():
    recipe = options(protect="0-1,30", bits=3)
    assert bits(recipe, Role.ATTENTION, Role.EXPERT, Role.HEAD) == [8, 8, 6]
    assert recipe.spec_for(matrix(path="model.layers.2.mlp.up_proj")).bits == 3
    assert recipe.spec_for(matrix(path="model.layers.30.mlp.up_proj")).bits == 8


def test_protection_never_takes_bits_away():
    recipe = options(bits=2, protect="1", protect_bits=3, expert_down_bits=4, attention_bits="none", mlp_bits="ternary")
    roles = (Role.EXPERT, Role.EXPERT_DOWN, Role.ATTENTION, Role.MLP)
    assert bits(recipe, *roles) == [3, 4, None, 3]


@pytest.mark.parametrize(
    ("text", "layers"),
    [("", []), ("3", [3]), ("0-2", [0, 1, 2]), ("0-1, 30", [0, 1, 30]), ("7,", [7]), ("0-99999999999", range(5))],
)
def test_layers(text, layers):
    found = parse_layers(text)
    assert all(any(layer in part for part in found) for layer in layers)
    assert not any(2 * 10**11 in part for part in found)


# --- embedding and head ---


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"bits": 2}, [6, 6]),  # never below 6 unless asked
        ({"bits": 7}, [7, 7]),
        ({"bits": "ternary"}, [6, 6]),
        ({"bits": "none"}, [None, None]),
        ({"codec": "none", "head_bits": 8}, [None, 8]),
        ({"bits": 2, "embedding_bits": 3}, [3, 6]),
        ({"bits": 2, "head_bits": "ternary"}, [6, 0]),
        ({"codec": "affine", "bits": 2}, [6, 6]),
    ],
)
def test_embedding_and_head_have_at_least_6_bits_unless_asked(given, expected):
    assert bits(options(**given), Role.EMBEDDING, Role.HEAD) == expected


def test_a_codec_of_the_head_alone_keeps_the_minimum(tmp_path):
    recipe = from_toml(tmp_path, '[weights]\nbits = 3\n[weights.head]\ncodec = "affine"')
    assert recipe.spec_for(matrix(Role.HEAD)) == QuantSpec("affine", 6)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, 6),
        ({"embedding_bits": 4}, 4),  # nothing was asked for the head
        ({"head_bits": 3}, 3),
        ({"embedding_bits": 4, "head_bits": 8}, 8),
        ({"embedding_bits": 8, "head_bits": 4}, 8),
        ({"embedding_bits": 4, "head_bits": "none"}, None),
        ({"embedding_bits": "none", "head_bits": 4}, None),
    ],
)
def test_a_tied_head_gets_the_better_of_what_was_asked(given, expected):
    assert bits(options(**given), Role.EMBEDDING, tied_head=True) == [expected]


def test_a_format_may_have_one_codec_for_the_vocabulary():
    affine = FormatDefaults(vocabulary=Choice(codec="affine", rotation="none"))
    for given, expected in (({}, 6), ({"head_bits": 8}, 8), ({"bits": 2, "group_size": "row"}, 6)):
        spec = options(**given).spec_for(matrix(Role.HEAD), defaults=affine)
        assert spec == QuantSpec("affine", expected, 64, "none"), given
    assert options(head_bits="none").spec_for(matrix(Role.HEAD), defaults=affine) is None
    assert options(codec="none").spec_for(matrix(Role.HEAD), defaults=affine) is None
    assert options().spec_for(matrix(), defaults=affine) == QuantSpec()


# --- groups ---


@pytest.mark.parametrize(("n", "group_size"), [(32, 32), (96, 32), (64, 64), (128, 64), (576, 64), (48, 0), (7, 0)])
def test_the_group_size_adapts_to_the_inputs_by_default(n, group_size):
    assert options().spec_for(matrix(in_features=n)).group_size == group_size


def test_a_group_size_that_was_asked_for_must_divide():
    with pytest.raises(UsageError) as error:
        options(group_size=64).spec_for(matrix(in_features=96))
    assert error.value.message == ("model.layers.1.mlp.up_proj (mlp): group size 64 does not divide 96 input features")
    assert error.value.hint == "use one of 32, row"
    with pytest.raises(UsageError) as error:
        options(group_size=64, codec="affine").spec_for(matrix(in_features=96))
    assert error.value.hint == "use --group-size 32"
    assert options(group_size=32).spec_for(matrix(in_features=96)).group_size == 32
    assert options(group_size=64).spec_for(matrix(in_features=48)).group_size == 0  # there is no other way


def test_affine_has_no_row_scale():
    with pytest.raises(UsageError, match="32, 64 or 128"):
        options(codec="affine", group_size="row").spec_for(matrix())
    assert options(codec="affine").spec_for(matrix(in_features=48)) is None


def test_qjl_belongs_to_lloyd_max(tmp_path):
    assert from_toml(tmp_path, "[weights]\nqjl = true").spec_for(matrix()).qjl
    with pytest.raises(UsageError, match=r"up_proj \(mlp\): qjl is a second stage of the lloyd-max codec only"):
        from_toml(tmp_path, '[weights]\nqjl = true\ncodec = "affine"').spec_for(matrix())


# --- what stays ---


@pytest.mark.parametrize("m", [matrix(Role.ROUTER), matrix(Role.OTHER), matrix(kept=TOO_SMALL)])
def test_routers_and_what_cannot_be_quantized_stay(m):
    assert options(bits=8).spec_for(m) is None


def test_what_a_recipe_says_of_absent_tensors_is_noted(tmp_path):
    recipe = from_toml(
        tmp_path,
        """
        [weights]
        protect_layers = "40-41"
        [[weights.override]]
        match = "*.mpl.*"
        bits = 8
        [[weights.override]]
        match = "*.up_proj"
        bits = 8
        [[weights.override]]
        match = "*.gate"
        bits = 8
        """,
    )
    assert recipe.unused([matrix(), matrix(Role.ROUTER)]) == [
        "nothing that can be quantized matches the override '*.mpl.*'",
        "nothing that can be quantized matches the override '*.gate'",
        "the model has none of the protected layers 40-41",
    ]
    assert recipe.unused([matrix(path="x.40.mpl.up_proj"), matrix(path="x.gate")]) == []
    assert options(protect="1").unused([matrix()]) == []
