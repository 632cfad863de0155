"""`tq doctor`: every finding, in both forms, and exit code 1 when something is broken."""

import json
import sys

import pytest

NAMES = [
    "system", "chip", "memory", "disk", "python", "blas", "mlx", "mlx-lm", "device", "kernels", "backends", "hub",
    "settings", "profile",
]  # fmt: skip


def test_a_working_machine_has_every_finding_and_code_0(tq):
    result = tq("doctor")
    assert (result.code, result.err) == (0, "")
    rows = result.out.split("\n\n")[0].splitlines()[1:]
    assert [row.split()[1] for row in rows] == NAMES
    assert {row.split()[0] for row in rows} <= {"ok", "note"}


def test_json_has_fact_and_fix(tq):
    findings = json.loads(tq("doctor", "--json").out)["findings"]
    assert [finding["name"] for finding in findings] == NAMES
    assert all(set(finding) == {"name", "ok", "fact", "fix"} for finding in findings)


def test_kernels_are_run_and_shown(tq, monkeypatch):
    from tq.engine.ops import selftest

    monkeypatch.setattr(selftest, "SPEED_BYTES", 1 << 20)
    monkeypatch.setattr(selftest, "SPECS", selftest.SPECS[:2])
    kernels = json.loads(tq("doctor", "--kernels", "--json").out)["kernels"]
    assert {record["operation"] for record in kernels} == {"matmul", "gather_matmul", "embed"}
    assert all(record["ok"] for record in kernels)
    assert "matmul" in tq("doctor", "--kernels").out


def test_a_report_has_every_kernel_and_nothing_private(tq, monkeypatch, tmp_path):
    from tq.engine.ops import selftest

    monkeypatch.setattr(selftest, "SPEED_BYTES", 1 << 20)
    monkeypatch.setattr(selftest, "ALL_SPECS", selftest.SPECS[:2])
    result = tq("doctor", "--certify", str(tmp_path / "report.json"))
    assert result.code == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report) == {"tq", "machine", "kernels"}
    assert set(report["machine"]) == set(NAMES) - {"disk", "blas", "hub", "settings", "profile"}
    assert {(k["operation"], k["codes"]) for k in report["kernels"]} == {
        (op, spec.label()) for op in ("matmul", "gather_matmul", "embed") for spec in selftest.ALL_SPECS
    }
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_a_report_needs_a_folder(tq, tmp_path):
    result = tq("doctor", "--certify", str(tmp_path / "none" / "report.json"))
    assert result.code == 2
    assert "no file that can be written" in result.err


def test_a_wrong_kernel_fails(tq, monkeypatch):
    from tq.engine.ops import selftest

    monkeypatch.setattr(selftest, "SPEED_BYTES", 1 << 20)
    monkeypatch.setattr(selftest, "SPECS", selftest.SPECS[:1])
    monkeypatch.setattr(selftest, "INT8_ERROR", -1.0)
    monkeypatch.setattr(selftest, "FLOAT_ERROR", -1.0)
    result = tq("doctor", "--kernels")
    assert result.code == 1
    assert "FAIL  matmul" in result.out


def test_a_wrong_setting_is_broken(tq, monkeypatch):
    monkeypatch.setenv("TQ_BACKEND", "fast")
    result = tq("doctor")
    assert result.code == 1
    assert "FAIL  backends" in result.out
    assert "TQ_BACKEND=fast is not one of" in result.out


def test_an_mlx_lm_of_another_version_is_broken(tq, monkeypatch):
    from tq.engine.machine import doctor

    real = doctor.metadata.version
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "0.31.9" if name == "mlx-lm" else real(name))
    result = tq("doctor")
    assert result.code == 1
    assert "mlx-lm: pip install 'mlx-lm>=0.32.2,<0.33'" in result.out


def test_the_versions_of_mlx_lm_are_those_of_the_package():
    import tomllib
    from pathlib import Path

    from tq.engine.machine.doctor import MLX_LM

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    first, beyond = (".".join(map(str, version)) for version in MLX_LM)
    assert f"mlx-lm>={first}.2,<{beyond}" in project["dependencies"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a choice of BLAS")
def test_a_slow_blas_is_a_note_with_its_reason(program, tmp_path):
    result = program("doctor", PATH="/nonexistent", XDG_CACHE_HOME=str(tmp_path))
    assert result.code == 0
    assert "note  blas" in result.out
    assert "no C compiler" in result.out


def finding(tq, name):
    return next(found for found in json.loads(tq("doctor", "--json").out)["findings"] if found["name"] == name)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has CPU kernels")
def test_kernels_say_their_instruction_set_their_threads_and_how_they_are_called(tq):
    from tq.cpu import isa

    found = finding(tq, "kernels")
    assert (found["ok"], found["fix"]) == (True, None)
    assert found["fact"] == f"{isa.chosen()[0].name}, 1 thread, lazy operations of MLX"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has CPU kernels")
def test_kernels_that_cannot_be_built_are_a_note_with_what_to_do(program, tmp_path):
    result = program("doctor", PATH="/nonexistent", XDG_CACHE_HOME=str(tmp_path))
    assert result.code == 0
    assert "note  kernels" in result.out
    assert "no C++ compiler" in result.out
    assert "install g++" in result.out


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has CPU kernels")
def test_kernels_that_are_called_directly_are_a_note_with_what_to_do(tq, monkeypatch):
    from tq.cpu import lazy

    monkeypatch.setattr(lazy, "state", lambda: lazy.LazyState(False, "nanobind is not installed", "pip install it"))
    found = finding(tq, "kernels")
    assert found["ok"]
    assert found["fact"].endswith(", called directly: nanobind is not installed")
    assert found["fix"] == "models run faster with lazy operations: pip install it"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has CPU kernels")
def test_a_wrong_instruction_set_is_broken(program):
    result = program("doctor", TQ_CPU_ISA="best")
    assert result.code == 1
    assert "FAIL  kernels" in result.out
    assert "TQ_CPU_ISA is 'best'" in result.out
