"""QuantSpec: what is not valid is refused with the valid values, and its sizes are exact."""

import dataclasses
import json

import pytest

from tq.engine.quantize.spec import CODEC_BITS, GROUP_SIZES, ROW, QuantSpec
from tq.errors import UsageError

VALID = [
    QuantSpec(codec, bits, group, rotation, qjl)
    for codec, widths in CODEC_BITS.items()
    for bits in widths
    for group in (*GROUP_SIZES, *([] if codec == "affine" else [ROW]))
    for rotation in ("hadamard", "none")
    for qjl in ((False, True) if codec == "lloyd-max" else (False,))
]


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        ({"codec": "loyd-max"}, "codec 'loyd-max' is not one of lloyd-max, ternary, affine", "did you mean lloyd-max?"),
        ({"codec": "zip"}, "codec 'zip' is not one of lloyd-max, ternary, affine", None),
        ({"codec": ["affine"]}, "codec ['affine'] is not one of lloyd-max, ternary", "did you mean affine?"),
        ({"bits": 9}, "bits 9 is not valid for lloyd-max: use one of 1, 2, 3, 4, 5, 6, 7, 8", None),
        ({"bits": 0}, "bits 0 is not valid for lloyd-max", None),
        ({"bits": 3.0}, "bits 3.0 is not valid for lloyd-max", None),
        ({"bits": "3"}, "bits '3' is not valid for lloyd-max", None),
        ({"bits": True}, "bits True is not valid for lloyd-max", None),
        ({"codec": "affine", "bits": 7}, "bits 7 is not valid for affine: use one of 2, 3, 4, 5, 6, 8", None),
        ({"codec": "ternary", "bits": 2}, "the ternary codec takes no bits", None),
        ({"group_size": 48}, "group size 48 is not one of 32, 64, 128, row", None),
        ({"group_size": 64.0}, "group size 64.0 is not one of 32, 64, 128, row", None),
        ({"group_size": -1}, "group size -1 is not one of", None),
        ({"codec": "affine", "group_size": ROW}, "the affine codec needs a group size of 32, 64 or 128", None),
        ({"rotation": "hadamrd"}, "rotation 'hadamrd' is not one of hadamard, none", "did you mean hadamard?"),
        ({"qjl": "no"}, "qjl 'no' is not true or false", None),
        ({"codec": "affine", "qjl": True}, "qjl is a second stage of the lloyd-max codec only", None),
    ],
)
def test_what_is_not_valid_is_refused(arguments, message, hint):
    with pytest.raises(UsageError) as error:
        QuantSpec(**arguments)
    assert error.value.message.startswith(message)
    assert error.value.hint == hint


def test_specs_survive_json():
    for spec in VALID:
        assert QuantSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_fields_absent_from_json_have_their_defaults():
    assert QuantSpec.from_json({"bits": 3}) == QuantSpec("lloyd-max", 3, 64, "hadamard", False)


def test_an_unknown_field_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match="unknown field 'group' in") as error:
        QuantSpec.from_json({"bits": 3, "group": 64})
    assert error.value.hint == "did you mean group_size?"


def test_specs_are_frozen_and_usable_as_keys():
    assert len({*VALID, *VALID}) == len(VALID)
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantSpec().bits = 3


@pytest.mark.parametrize(
    ("spec", "label"),
    [
        (QuantSpec(), "lloyd-max 4-bit g64"),
        (QuantSpec("lloyd-max", 3, ROW), "lloyd-max 3-bit row"),
        (QuantSpec("lloyd-max", 3, 128, "none", True), "lloyd-max 3-bit g128 unrotated +qjl"),
        (QuantSpec("ternary", 0, 32), "ternary g32"),
        (QuantSpec("affine", 8, 64, "none"), "affine 8-bit g64 unrotated"),
    ],
)
def test_labels_name_what_differs(spec, label):
    assert spec.label() == label


def test_labels_are_unique():
    assert len({spec.label() for spec in VALID}) == len(VALID)


@pytest.mark.parametrize(
    ("spec", "shape", "expected"),
    [
        (QuantSpec("lloyd-max", 3, 64), (8, 128), 3.25),
        (QuantSpec("lloyd-max", 4, 32), (8, 128), 4.5),
        (QuantSpec("lloyd-max", 1, 128), (7, 384), 1.125),
        (QuantSpec("lloyd-max", 3, ROW), (8, 4096), 3 + 16 / 4096),
        (QuantSpec("lloyd-max", 2, 64, qjl=True), (4, 512), 2 + 1 + 0.25 + 16 / 512),
        (QuantSpec("ternary", 0, 64), (2, 640), 1.6 + 0.25),
        (QuantSpec("affine", 4, 64), (3, 5, 128), 4.5),
        (QuantSpec("lloyd-max", 3, ROW), (2, 7), 8 * (4 + 2) / 7),
    ],
)
def test_bits_per_weight_are_exact(spec, shape, expected):
    assert spec.bits_per_weight(shape) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("group_size", "groups"), [(32, 12), (64, 6), (128, 3), (ROW, 1)])
def test_groups_cover_the_inputs(group_size, groups):
    assert QuantSpec(group_size=group_size).n_groups(384) == groups


@pytest.mark.parametrize(
    ("n", "hint"), [(96, "use one of 32, row"), (7, "use --group-size row"), (100, "use --group-size row")]
)
def test_a_group_that_does_not_divide_the_inputs_is_refused(n, hint):
    with pytest.raises(UsageError, match=f"group size 64 does not divide {n} input features") as error:
        QuantSpec(group_size=64).n_groups(n)
    assert error.value.hint == hint
