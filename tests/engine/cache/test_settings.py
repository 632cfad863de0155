"""Settings are read from what a person writes, and what is not valid is named."""

import pytest

from tq.engine.cache.settings import PRESETS, KVSettings
from tq.errors import UsageError


def test_defaults():
    assert KVSettings() == PRESETS["k8v3"]
    assert (KVSettings().sink, KVSettings().key_bits, KVSettings().value_bits) == (128, 8, 3)


@pytest.mark.parametrize(
    ("text", "bits"),
    [("8,4", (8, 4)), ("4", (4, 4)), (" 8, 3 ", (8, 3)), ("k8v3", (8, 3)), ("K5V2", (5, 2)), ("2.5", (2.5, 2.5)),
     ("1", (1, 1)), ("paper-3.5", (3.5, 3.5)), ("k8v3.5", (8, 3.5))],
)  # fmt: skip
def test_bits_are_read(text, bits):
    found = KVSettings.parse(text)
    assert (found.key_bits, found.value_bits) == bits
    assert all(type(b) is int for b in (found.key_bits, found.value_bits) if b == int(b))


@pytest.mark.parametrize("text", ["", "9", "0", "8,4,2", "8,", "x", "4.5", "-4", "k8", "k8v9", "8 3"])
def test_other_bits_are_refused(text):
    with pytest.raises(UsageError, match=r"1, 2, 2\.5, 3, 3\.5, 4, 5, 6, 7, 8") as error:
        KVSettings.parse(text)
    assert error.value.hint


def test_a_near_preset_is_offered():
    with pytest.raises(UsageError, match=r"k8v3, k8v4, k4v4, paper-2\.5, paper-3\.5, polar") as error:
        KVSettings.parse("paper2.5")
    assert error.value.hint == "did you mean paper-2.5?"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codec": "lloydmax"}, "not one of lloyd-max, qjl, affine, polar"),
        ({"codec": "qjl"}, "is for keys"),
        (
            {"codec": "affine", "value_bits": 1},
            "1 bits of values are not one of 2, 3, 4, 5, 6, 7, 8, which affine takes",
        ),
        ({"codec": "affine", "bits": "3.5"}, "3.5 bits of keys"),
        ({"codec": "a,b,c"}, "more than two"),
        ({"group_size": 48}, "not one of 0, 32, 64, 128"),
        ({"sink": -1}, "give 0 or more"),
        ({"sink": 10**20}, "give less than 2147483648"),
        ({"key_bits": float("nan")}, "nan bits of keys are not one of"),
        ({"value_bits": float("inf")}, "inf bits of values are not one of"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(UsageError, match=message):
        KVSettings.from_options(**options)


def test_options_together():
    assert KVSettings.from_options() is None
    assert KVSettings.from_options(sink=4) == KVSettings(sink=4)
    found = KVSettings.from_options(bits="k4v4", key_bits=6.0, codec="qjl,lloyd-max", group_size=32, sink=0)
    assert found == KVSettings(6, 4, "qjl", "lloyd-max", sink=0, group_size=32)
    assert type(found.key_bits) is int


def test_labels_say_what_is_not_usual():
    assert KVSettings().label() == "k8v3"
    assert PRESETS["paper-2.5"].label() == "k2.5v2.5"
    assert KVSettings(4, 4, "qjl", "polar").label() == "k4v4 qjl/polar"
