"""The line of every value is found in TOML as people write it."""

import pytest

from tq.engine.machine.tables import Profile
from tq.engine.machine.toml_file import Mistake, TomlFile, line_numbers, read

TEXT = """\
# [kv]
description = "a = b"

[kv] # bits = 3
  bits = 4
sink=5
[weights.head]
bits = 6
[[weights.override]]
match = "*"
[[weights.override]]
match = "x"
bits = 3
"""


def test_lines():
    assert line_numbers(TEXT) == {
        ("description",): 2,
        ("kv",): 4,
        ("kv", "bits"): 5,
        ("kv", "sink"): 6,
        ("weights", "head"): 7,
        ("weights", "head", "bits"): 8,
        ("weights", "override"): 9,
        ("weights", "override", 0): 9,
        ("weights", "override", 0, "match"): 10,
        ("weights", "override", 1): 11,
        ("weights", "override", 1, "match"): 12,
        ("weights", "override", 1, "bits"): 13,
    }


def test_a_file_knows_where_its_values_are(tmp_path):
    path = tmp_path / "p.toml"
    path.write_text(TEXT)
    file = read(path, Profile)
    assert isinstance(file, TomlFile)
    assert file.values.weights.override[1].bits == 3
    assert file.where("kv", "sink") == f"{path}:6"
    assert file.where("kv", "codec") == f"{path}:4"
    assert file.where("prefill") == str(path)


def test_mistakes_of_a_table_in_an_array_have_its_line(tmp_path):
    path = tmp_path / "p.toml"
    path.write_text(TEXT.replace("bits = 3\n", "bitz = 3\n"))
    assert read(path, Profile) == [Mistake(f"{path}:13", "unknown key weights.override.1.bitz", "did you mean bits?")]


@pytest.mark.parametrize("text", ["kv = {bits = 9}", '"kv" = {bits = 9}', "kv.bits = 9"])
def test_other_ways_to_write_a_table_cost_at_most_the_line(tmp_path, text):
    path = tmp_path / "p.toml"
    path.write_text(text)
    (mistake,) = read(path, Profile)
    assert mistake.where in (f"{path}:1", str(path))
    assert mistake.message.startswith("kv.bits: 9 bits of keys")
