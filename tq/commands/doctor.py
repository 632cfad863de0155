"""`tq doctor`: what tq finds on this machine, and what to do about it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tq.commands import options
from tq.output import Output, render

if TYPE_CHECKING:
    from tq.engine.ops.selftest import KernelCheck

EPILOG = options.examples("tq doctor", "tq doctor --kernels", "tq doctor --json")


def doctor(
    *,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Also run each kernel: is it right, and how fast does it read weights.")
    ] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Check this machine; exit with 1 if something is broken."""
    out = Output(json=json, quiet=quiet)

    from tq.engine.machine.doctor import examine

    findings = list(examine())
    document: dict[str, Any] = {"findings": [dataclasses.asdict(finding) for finding in findings]}
    text = render(
        [{"": mark(finding.ok, finding.fix), "name": finding.name, "found": finding.fact} for finding in findings],
        "table",
    )
    fixes = [f"{finding.name}: {finding.fix}" for finding in findings if finding.fix]
    if fixes:
        text += "\n\n" + "\n".join(fixes)
    healthy = all(finding.ok for finding in findings)
    if kernels and healthy:
        from tq.engine.ops.selftest import check_kernels

        checks = list(out.follow(check_kernels(), "kernels"))
        document["kernels"] = [dataclasses.asdict(check) for check in checks]
        text += "\n\n" + render([_row(check) for check in checks], "table")
        healthy = all(check.ok for check in checks)
    out.result(document, text)
    if not healthy:
        raise typer.Exit(1)


def _row(check: KernelCheck) -> dict[str, str]:
    share = "" if check.bandwidth_share is None else f"{check.bandwidth_share:.0%}"
    return {
        "": "ok" if check.ok else "FAIL",
        "operation": check.operation,
        "codes": check.codes,
        "backend": check.backend,
        "error": f"{check.error:.1e}",
        "GB/s": "" if check.gb_s is None else f"{check.gb_s:.1f}",
        "of memory": share,
        "declined": "; ".join(f"{name}: {reason}" for name, reason in check.declined.items()),
    }


def mark(ok: bool, fix: str | None) -> str:
    return "FAIL" if not ok else "note" if fix else "ok"
