"""Python's structures are those of the C headers, and the library is the one that the settings ask for."""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tq.cpu import build, isa, library
from tq.cpu.build import Declined
from tq.errors import UsageError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kernels are for Linux")


def test_every_field_of_every_structure_is_where_c_has_it(tmp_path):
    lines = ["#include <cstddef>", "#include <cstdio>"]
    lines += [f'#include "{header}"' for header in sorted(library.KERNELS.glob("tq_*.h"))]
    lines += ["int main() {"]
    for name, structure in library.STRUCTURES.items():
        lines.append(f'  printf("{name} {len(structure._fields_)} %zu\\n", sizeof({name}));')
        for field, *_ in structure._fields_:
            place = f"offsetof({name}, {field}), sizeof {name}::{field}"
            lines.append(f'  printf("{name}.{field} %zu %zu\\n", {place});')
    source, program = tmp_path / "sizes.cpp", tmp_path / "sizes"
    source.write_text("\n".join([*lines, "}"]))
    compiler = shutil.which("c++")
    subprocess.run([compiler, "-std=c++20", str(source), "-o", str(program)], check=True)
    found = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.splitlines()
    expected = []
    for name, structure in library.STRUCTURES.items():
        expected.append(f"{name} {len(structure._fields_)} {ctypes.sizeof(structure)}")
        for field, *_ in structure._fields_:
            place = getattr(structure, field)
            expected.append(f"{name}.{field} {place.offset} {place.size}")
    assert found == expected


def test_everything_that_the_headers_declare_is_known():
    text = "".join(path.read_text() for path in library.KERNELS.glob("tq_*.h"))
    declared = {
        line.partition("(")[0].split()[-1].lstrip("*") for line in text.splitlines() if line.startswith("TQ_API")
    }
    assert declared == {*library.OPERATIONS, *library.FUNCTIONS}
    structures = {line.split()[1].rstrip(";") for line in text.splitlines() if line.startswith("} tq_")}
    assert structures == set(library.STRUCTURES)


def test_this_machine_has_kernels():
    state = library.state()
    level = isa.chosen()[0].name
    assert (state.active, state.level, state.threads, state.hint) == (True, level, 1, None)
    assert state.reason == f"{level}, 1 thread"
    assert library.library().tq_struct_size(b"no such structure") == -1


def fresh(code, **environment):
    environment = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


STATE = "from tq.cpu import library; state = library.state(); print(state.active, state.reason, state.hint, sep='|')"


@pytest.mark.parametrize("level", [level.name for level in isa.LEVELS if not isa.lacking(level)])
def test_every_level_of_this_processor_can_be_forced(level):
    assert fresh(STATE, TQ_CPU_ISA=level, TQ_THREADS="3") == f"True|{level}, 3 threads|None"


def test_levels_share_a_cache():
    usable = [level for level in isa.LEVELS if not isa.lacking(level)]
    assert len({library.compiled(level).path for level in usable}) == len(usable)
    assert [library.load(level).tq_isa().decode() for level in usable] == [level.name for level in usable]


def test_a_level_of_another_processor_is_not_run():
    foreign = next(level for level in isa.LEVELS if isa.lacking(level))
    with pytest.raises(Declined, match=r"^this processor lacks "):
        library.load(foreign)


def test_a_level_on_trial_that_cannot_be_used_is_passed_over_with_its_reason(monkeypatch):
    amx, best, *_ = [isa.LEVEL["amx"], *isa.chosen()]
    assert amx.on_trial and isa.lacking(amx)
    monkeypatch.setattr(isa, "chosen", lambda: [amx, best])
    monkeypatch.setattr(library, "_passed_over", {})
    assert library.library.__wrapped__() is library.load(best)
    reason = library.state.__wrapped__().reason
    assert reason == f"{best.name}, 1 thread; not amx: this processor lacks amx_int8, amx_tile"


@pytest.mark.parametrize("level", ["amx", "neon"])
def test_a_level_that_nothing_can_replace_is_declined(level, monkeypatch):
    """One that was asked for, and one that is not on trial."""
    following = [] if level == "amx" else isa.chosen()
    monkeypatch.setattr(isa, "chosen", lambda: [isa.LEVEL[level], *following])
    with pytest.raises(Declined, match=r"^this processor lacks "):
        library.library.__wrapped__()


def test_a_library_that_finds_itself_wrong_is_not_used(monkeypatch):
    class Doubtful:
        """Any function of the library, and a self-check that fails."""

        def __getattr__(self, name):
            return getattr(library.load(isa.chosen()[0]), name)

        def tq_self_check(self):
            return b"sums are wrong"

    doubtful = Doubtful()
    monkeypatch.setattr(build, "load", lambda path: doubtful)
    monkeypatch.delitem(library.FUNCTIONS, "tq_self_check")
    with pytest.raises(Declined, match=r"^sums are wrong$"):
        library.load.__wrapped__(isa.chosen()[0])


def test_a_wrong_level_is_a_mistake_of_the_user(monkeypatch):
    monkeypatch.setenv("TQ_CPU_ISA", "best")
    with pytest.raises(UsageError, match="TQ_CPU_ISA is 'best'"):
        library.library.__wrapped__()


def test_without_a_compiler_there_is_a_reason_and_what_to_do(tmp_path):
    said = fresh(STATE, PATH="/nonexistent", CXX="", XDG_CACHE_HOME=str(tmp_path))
    assert said.startswith("False|no C++ compiler (c++, g++ or clang++) was found|install g++")


def test_nothing_is_made_for_other_systems(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(Declined, match=r"^not made for this system$"):
        library.library.__wrapped__()


def test_a_structure_of_another_size_is_a_mistake_of_ours(monkeypatch):
    class Longer(ctypes.Structure):
        _fields_ = (*library.Rotation._fields_, ("more", ctypes.c_int64))

    monkeypatch.setitem(library.STRUCTURES, "tq_rotation", Longer)
    with pytest.raises(AssertionError, match=r"tq_rotation has .* bytes in C and .* in Longer"):
        library.load.__wrapped__(isa.chosen()[0])


def test_importing_the_package_builds_nothing(tmp_path):
    code = "import tq.cpu.library, tq.cpu.lazy, tq.cpu.blas, tq.engine.ops"
    fresh(code, XDG_CACHE_HOME=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_sources_are_in_the_package():
    names = {path.suffix for path in Path(build.__file__).parent.rglob("*") if path.is_file()}
    assert {".cpp", ".h", ".c"} <= names
