"""Profiles: found by name or path, picked by memory, and what ships is sound and says why."""

import re
from pathlib import Path

import pytest
from model_shapes import SHAPES

from tq.engine.cache.settings import KVSettings
from tq.engine.machine.limits import shortfalls, tight
from tq.engine.machine.profiles import GIB, beside, load_profile, pick_profile, profile_names, profile_path
from tq.engine.machine.tables import MachineTable
from tq.engine.model.recipe import Recipe
from tq.engine.model.roles import QUANTIZED_ROLES, Matrix, Role
from tq.errors import UsageError


def test_a_name_is_what_ships_and_anything_else_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text("")
    Path("16gb").write_text("")
    assert profile_path("16gb").parent == profile_path("48gb").parent != tmp_path
    assert profile_path("./16gb").samefile(tmp_path / "16gb") is True
    assert profile_path("mine.toml") == Path("mine.toml")
    with pytest.raises(UsageError, match=r"no recipe file or profile '\.\./profiles/16gb'"):
        profile_path("../profiles/16gb")


def test_files_name_other_files_from_where_they_are(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert beside("16gb", tmp_path) == "16gb"
    assert beside("mine.toml", tmp_path) == str(tmp_path / "mine.toml")
    assert beside("/etc/mine.toml", tmp_path) == "/etc/mine.toml"
    assert beside("~/mine.toml", tmp_path) == "/home/me/mine.toml"


@pytest.mark.parametrize("name", profile_names())
def test_a_machine_gets_its_profile_even_if_its_system_sees_a_little_less(name):
    memory_gb = load_profile(name).machine.memory_gb
    assert pick_profile(int(memory_gb * GIB))[0] == name
    assert pick_profile(int(memory_gb * GIB * 0.94))[0] == name
    assert pick_profile(int(memory_gb * GIB * 0.93))[0] != name


def test_the_choice_says_why():
    assert pick_profile(2**60)[0] == profile_names()[-1]
    name, reason = pick_profile(int(17.5 * GIB))
    assert (name, reason.startswith("16gb is the largest of 8gb, 16gb, 24gb")) == ("16gb", True)
    assert reason.endswith("that is not for more than this machine, whose system sees 17.5 GiB of memory")
    name, reason = pick_profile(GIB)
    assert (name, "are all for more than this machine, whose system sees 1.0 GiB" in reason) == (None, True)
    assert all(other in reason for other in profile_names())


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_fits_its_machine(name):
    profile = load_profile(name)
    assert profile.description
    assert name == f"{profile.machine.memory_gb:.0f}gb"
    # Above 85 % of memory macOS itself has too little.
    assert 0.67 < profile.machine.wired_limit_mb / 1024 / profile.machine.memory_gb < 0.85
    recipe = Recipe.from_options(recipe=name)
    assert recipe.name == name
    bits = {role: recipe.spec_for(Matrix("m", "linear", role, (64, 128))).bits for role in QUANTIZED_ROLES}
    assert bits[Role.EXPERT_DOWN] >= bits[Role.EXPERT]
    assert bits[Role.EMBEDDING] >= 6 and bits[Role.HEAD] >= 6


@pytest.mark.parametrize("name", profile_names())
def test_every_number_of_a_profile_has_its_reason_above_it(name):
    lines = [line for line in profile_path(name).read_text().splitlines() if line]
    facts = [line for line in lines if not line.startswith(("[", "description", "memory_gb"))]
    numbers = [i for i, line in enumerate(facts) if not line.startswith("#")]
    assert len(numbers) >= 6
    assert all(facts[i - 1].startswith("#") for i in numbers)


RESERVE_BYTES = 0.7 * GIB  # for activations, as the comments of profiles have it
CLAIM = re.compile(r"# (\S+) in ([\d.]+) GiB: (.+); unpacked (.+)\.")


@pytest.mark.parametrize("name", profile_names())
def test_what_a_profile_says_of_models_is_what_their_shapes_give(name):
    profile, recipe = load_profile(name), Recipe.from_options(recipe=name)
    kv = KVSettings.parse(profile.kv.bits)
    limit = profile.machine.wired_limit_mb * 2**20
    claims = CLAIM.findall(profile_path(name).read_text())
    assert len(claims) >= 2
    for model, weights, packed, unpacked in claims:
        shape = SHAPES[model]
        size = shape.weights_bytes(recipe)
        left = limit - RESERVE_BYTES - size
        rooms = shape.tokens_in(left, kv.key_bits, kv.value_bits), shape.tokens_in(left)
        words = ["all of its 131 K" if n >= shape.context else f"{n // 1000} K" for n in rooms]
        assert [weights, packed, unpacked] == [f"{size / GIB:.1f}", *words], model


def test_the_shapes_have_the_parameters_that_their_names_say():
    for name, billions in (
        ("Llama-3.1-8B", 8.03),
        ("Qwen3-32B", 32.8),
        ("Qwen3-30B-A3B", 30.5),
        ("GPT-OSS-120B", 116.8),
    ):
        assert SHAPES[name].weights_bytes(Recipe.from_options(bits=8)) == pytest.approx(
            billions * 1e9 * 8.25 / 8, rel=0.005
        )


# --- what a machine lacks ---


def macos(monkeypatch, memory_gb, limit_mb):
    from tq.engine.machine import limits

    monkeypatch.setattr(limits, "memory_bytes", lambda: int(memory_gb * GIB))
    monkeypatch.setattr(limits.sys, "platform", "darwin")
    import mlx.core as mx

    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": limit_mb << 20})


def test_a_machine_that_has_enough_lacks_nothing(monkeypatch):
    macos(monkeypatch, 16, 13312)
    assert shortfalls(MachineTable(memory_gb=16, wired_limit_mb=13312)) == []
    assert shortfalls(MachineTable(memory_gb=16)) == []


def test_a_gpu_that_gets_less_than_the_profile_counts_on_is_told_the_command(monkeypatch):
    macos(monkeypatch, 16, 12124)
    (found,) = shortfalls(MachineTable(memory_gb=16, wired_limit_mb=13312))
    assert found.fact == "the profile counts on 13312 MB for the GPU, and macOS allows 12124"
    assert found.fix.startswith("sudo sysctl iogpu.wired_limit_mb=13312 ")


def test_a_smaller_machine_is_told_so(monkeypatch):
    macos(monkeypatch, 15.5, 13312)
    assert shortfalls(MachineTable(memory_gb=16)) == []
    (found,) = shortfalls(MachineTable(memory_gb=48))
    assert (found.fact, found.fix) == (
        "the profile is for 48 GB of memory, and this machine has 15.5",
        "--profile auto picks one that fits",
    )


def test_weights_near_the_limit_are_told_what_would_help(monkeypatch):
    macos(monkeypatch, 16, 12124)
    assert tight(int(0.9 * 12124 * 2**20)) is None
    found = tight(int(11.5 * GIB))
    assert found.fact.startswith("the weights take 11776 MB, and macOS allows the GPU 12124: ")
    assert found.fix == "sudo sysctl iogpu.wired_limit_mb=13926 allows more until the next restart"
    assert tight(13 * GIB).fix.startswith("fewer bits")
    macos(monkeypatch, 16, 15000)  # somebody has raised it already
    assert tight(14 * GIB).fix.startswith("fewer bits")


def test_only_macos_has_a_limit_for_the_gpu(monkeypatch):
    macos(monkeypatch, 16, 1)
    from tq.engine.machine import limits

    monkeypatch.setattr(limits.sys, "platform", "linux")
    assert tight(2**60) is None
    assert shortfalls(MachineTable(memory_gb=16, wired_limit_mb=13312)) == []
