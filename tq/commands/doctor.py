"""`tq doctor`: what tq finds on this machine, and what to do about it."""

import dataclasses
from typing import Annotated, Any

import typer

from tq.commands import options
from tq.output import Output, render

EPILOG = options.examples("tq doctor", "tq doctor --kernels", "tq doctor --json")


def doctor(
    *,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Also show which backend runs each operation, and why the others do not.")
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
        from tq.engine.ops import matrix

        document["kernels"] = matrix()
        text += "\n\n" + render(document["kernels"], "table")
    out.result(document, text)
    if not healthy:
        raise typer.Exit(1)


def mark(ok: bool, fix: str | None) -> str:
    return "FAIL" if not ok else "note" if fix else "ok"
