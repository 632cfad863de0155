"""`tq doctor`: what tq finds on this machine, and what to do about it."""

from __future__ import annotations

import dataclasses
import json as jsonlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import tq
from tq.commands import options
from tq.errors import UsageError
from tq.output import Output, render

if TYPE_CHECKING:
    from tq.engine.ops.selftest import KernelCheck

EPILOG = options.examples("tq doctor", "tq doctor --kernels", "tq doctor --certify m4-max.json", "tq doctor --json")
REPORTED = ("system", "chip", "memory", "python", "mlx", "mlx-lm", "device", "kernels", "backends")  # with --certify


def doctor(
    *,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Also run each kernel: is it right, and how fast does it read weights.")
    ] = False,
    certify: Annotated[
        Path | None,
        typer.Option(
            "--certify",
            metavar="FILE",
            help="Run every kernel on all codes and types, minutes long, and write a JSON report for others to read.",
        ),
    ] = None,
    profile: options.Profile = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Check this machine, and show every setting and where it comes from; exit with 1 if something is broken."""
    out = Output(json=json, quiet=quiet)
    if certify is not None and (certify.is_dir() or not certify.absolute().parent.is_dir()):
        raise UsageError(f"{certify} is no file that can be written", "name a file in a folder that exists")

    from tq.engine.machine.doctor import examine, setting_rows
    from tq.engine.machine.settings import resolve

    chosen = resolve({"profile": profile})
    findings = list(examine(chosen))
    rows = setting_rows(chosen)
    document: dict[str, Any] = {"findings": [dataclasses.asdict(finding) for finding in findings], "settings": rows}
    text = render(
        [{"": mark(finding.ok, finding.fix), "name": finding.name, "found": finding.fact} for finding in findings],
        "table",
    )
    fixes = [f"{finding.name}: {finding.fix}" for finding in findings if finding.fix]
    if fixes:
        text += "\n\n" + "\n".join(fixes)
    text += "\n\n" + render(
        [{"setting": row["name"], "value": row["value"], "from": row["where"]} for row in rows], "table"
    )
    healthy = all(finding.ok for finding in findings)
    if (kernels or certify) and healthy:
        from tq.engine.ops.selftest import check_kernels

        checks = list(out.follow(check_kernels(everything=certify is not None), "kernels"))
        document["kernels"] = [dataclasses.asdict(check) for check in checks]
        text += "\n\n" + render([_row(check) for check in checks], "table")
        healthy = all(check.ok for check in checks)
        if certify is not None:
            _write_report(certify, document)
    out.result(document, text)
    if not healthy:
        raise typer.Exit(1)


def _write_report(path: Path, document: dict[str, Any]) -> None:
    """What others need to judge the kernels of this machine, and nothing that is private."""
    facts = {found["name"]: found["fact"] for found in document["findings"] if found["name"] in REPORTED}
    partial = path.with_name(path.name + ".partial")
    report = {"tq": tq.__version__, "machine": facts, "kernels": document["kernels"]}
    partial.write_text(jsonlib.dumps(report, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def _row(check: KernelCheck) -> dict[str, str]:
    share = "" if check.bandwidth_share is None else f"{check.bandwidth_share:.0%}"
    return {
        "": "ok" if check.ok else "FAIL",
        "operation": check.operation,
        "codes": check.codes,
        "type": check.dtype,
        "backend": check.backend,
        "error": f"{check.error:.1e}",
        "GB/s": "" if check.gb_s is None else f"{check.gb_s:.1f}",
        "of memory": share,
        "to affine": "" if check.affine_ratio is None else f"{check.affine_ratio:.2f}",
        "declined": "; ".join(f"{name}: {reason}" for name, reason in check.declined.items()),
    }


def mark(ok: bool, fix: str | None) -> str:
    return "FAIL" if not ok else "note" if fix else "ok"
