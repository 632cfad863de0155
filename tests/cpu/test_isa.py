"""The best instruction set that a processor has is chosen, and its flags ask for no more than what was looked for."""

import platform
import shutil
import subprocess
import sys

import pytest

from tq.cpu import isa
from tq.errors import UsageError

ZEN4 = "fma avx2 f16c avx512f avx512bw avx512vl avx512dq avx512_vnni avx512vbmi"
# What a compiler defines when it may use an instruction set, by the kernel's name for it.
MACROS = {
    "avx2": "__AVX2__", "fma": "__FMA__", "f16c": "__F16C__", "avx512f": "__AVX512F__", "avx512bw": "__AVX512BW__",
    "avx512vl": "__AVX512VL__", "avx512dq": "__AVX512DQ__", "avx512_vnni": "__AVX512VNNI__",
    "avx512vbmi": "__AVX512VBMI__", "avx_vnni": "__AVXVNNI__", "avx512_bf16": "__AVX512BF16__",
    "avx512_vbmi2": "__AVX512VBMI2__", "amx_tile": "__AMX_TILE__", "amx_int8": "__AMX_INT8__",
    "bmi2": "__BMI2__", "gfni": "__GFNI__",
}  # fmt: skip


@pytest.fixture
def processor(tmp_path, monkeypatch):
    """Pretend to be another machine: its name, and one line of features for each of its processors."""

    def pretend(machine, *lines):
        path = tmp_path / "cpuinfo"
        label = "Features" if machine == "aarch64" else "flags"
        path.write_text("\n".join(f"processor\t: {i}\n{label}\t\t: {line}\n" for i, line in enumerate(lines)))
        monkeypatch.setattr(isa, "CPUINFO", path)
        monkeypatch.setattr(platform, "machine", lambda: machine)
        monkeypatch.delenv("TQ_CPU_ISA", raising=False)
        isa.features.cache_clear()

    yield pretend
    isa.features.cache_clear()


@pytest.mark.parametrize(
    ("machine", "lines", "level"),
    [
        ("x86_64", [ZEN4 + " amx_tile amx_int8 amx_bf16"], "amx"),
        ("x86_64", [ZEN4 + " amx_tile amx_bf16"], "avx512"),
        ("x86_64", [ZEN4], "avx512"),
        ("x86_64", [ZEN4 + " avx_vnni"], "avx512"),
        ("x86_64", [ZEN4.replace(" avx512vbmi", "")], "avx2"),  # Cascade Lake
        ("x86_64", ["fma avx2 f16c avx_vnni"], "avx2vnni"),
        ("x86_64", ["fma avx2 f16c"], "avx2"),
        ("x86_64", ["avx2 f16c"], "generic"),
        ("x86_64", [ZEN4, "fma avx2 f16c"], "avx2"),  # processors of two kinds
        ("aarch64", ["fp asimd fphp asimdhp asimddp"], "neon"),
        ("aarch64", ["fp asimd"], "generic"),
        ("riscv64", ["rv64imafdcv"], "generic"),
        ("x86_64", [], "generic"),
    ],
)
def test_the_best_level_of_a_processor(processor, machine, lines, level):
    processor(machine, *lines)
    assert isa.chosen()[0].name == level
    assert isa.chosen()[-1].name == "generic"


def test_features_that_cannot_be_read_are_none(processor, monkeypatch, tmp_path):
    processor("x86_64", ZEN4)
    monkeypatch.setattr(isa, "CPUINFO", tmp_path / "nothing")
    isa.features.cache_clear()
    assert [level.name for level in isa.chosen()] == ["generic"]


@pytest.mark.parametrize("name", ["avx512", "avx2", "generic"])
def test_a_level_that_the_processor_has_can_be_forced(processor, monkeypatch, name):
    processor("x86_64", ZEN4)
    monkeypatch.setenv("TQ_CPU_ISA", name)
    assert [level.name for level in isa.chosen()] == [name]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("avx3", "TQ_CPU_ISA is 'avx3': it must be one of amx, avx512, avx2vnni, avx2, neon, generic"),
        ("amx", "TQ_CPU_ISA is amx, but this processor lacks amx_int8, amx_tile"),
        ("avx2vnni", "TQ_CPU_ISA is avx2vnni, but this processor lacks avx_vnni"),
        ("neon", "TQ_CPU_ISA is neon, but this processor lacks the instructions of aarch64"),
    ],
)
def test_a_level_that_is_not_there_cannot_be_forced(processor, monkeypatch, name, message):
    processor("x86_64", ZEN4)
    monkeypatch.setenv("TQ_CPU_ISA", name)
    with pytest.raises(UsageError) as error:
        isa.chosen()
    assert error.value.message == message
    if name != "avx3":
        assert error.value.hint == "it has avx512, avx2, generic"


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="asks an x86 compiler")
@pytest.mark.parametrize(
    "level", [level for level in isa.LEVELS if "aarch64" not in level.machines], ids=lambda x: x.name
)
def test_a_compiler_is_allowed_what_was_looked_for_and_no_more(level):
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no compiler")
    command = [compiler, *level.flags, "-dM", "-E", "-x", "c++", "/dev/null"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    defined = {line.split()[1] for line in done.stdout.splitlines()}
    assert {name for name, macro in MACROS.items() if macro in defined} == level.features


def test_no_level_is_tuned_to_the_machine_that_builds_it():
    assert not any("native" in flag for level in isa.LEVELS for flag in level.flags)
    assert not isa.LEVELS[-1].features  # what every machine can run
