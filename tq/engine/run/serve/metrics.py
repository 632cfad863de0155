"""Figures of what was served: a record of each HTTP request, and sums of them in Prometheus' text format.

https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tq.engine.run.serve.requests import Done, Stats

Samples = Sequence[tuple[dict[str, Any], float]]  # labels, value
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass
class Record:
    """One HTTP request and what became of it.

    Attributes:
        route: The route that took it, or "other".
        status: Of HTTP; 499: the client went away.
        seconds: From its first line to the end of the answer.
        prompt_tokens, cached_tokens, completion_tokens: Of all its answers; None where nothing was generated.
        prefill_seconds, decode_seconds: Of the answer that took longest.
        error: What was said instead of an answer, or in the middle of one.
        ignored: Fields of the body that mean nothing here.
    """

    id: str
    client: str
    method: str
    path: str
    route: str = "other"
    status: int = 0
    seconds: float = 0.0
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    prefill_seconds: float | None = None
    decode_seconds: float | None = None
    error: str | None = None
    ignored: tuple[str, ...] = ()

    def generated(self, ends: Iterable[Done]) -> None:
        """Take the figures of finished answers over."""
        done = list(ends)
        if not done:
            return
        self.prompt_tokens = sum(end.prompt_tokens for end in done)
        self.cached_tokens = sum(end.cached_tokens for end in done)
        self.completion_tokens = sum(end.completion_tokens for end in done)
        self.prefill_seconds = max(end.prefill_seconds for end in done)
        self.decode_seconds = max(end.decode_seconds for end in done)

    @property
    def tokens_per_second(self) -> float | None:
        """Of all answers together, after the first token."""
        if not self.decode_seconds or not self.completion_tokens or self.completion_tokens < 2:
            return None
        return (self.completion_tokens - 1) / self.decode_seconds


class Metrics:
    """Sums of records. Several threads may add."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: collections.Counter[tuple[str, int]] = collections.Counter()
        self._seconds = {"prefill": 0.0, "decode": 0.0}

    def add(self, record: Record) -> None:
        with self._lock:
            self._requests[record.route, record.status] += 1
            for name in self._seconds:
                self._seconds[name] += getattr(record, f"{name}_seconds") or 0.0

    def text(self, stats: Stats, model: str) -> str:
        """All figures, those of the scheduler among them."""
        with self._lock:
            requests, seconds = sorted(self._requests.items()), dict(self._seconds)
        routes: Samples = [({"route": route, "status": status}, count) for (route, status), count in requests]
        ends: Samples = [({"end": end}, getattr(stats, end)) for end in ("finished", "cancelled", "failed")]
        families: list[tuple[str, str, str, Samples]] = [
            ("tq_model_info", "gauge", "The model that is served.", [({"model": model, "mode": stats.mode}, 1)]),
            ("tq_http_requests_total", "counter", "HTTP requests by route and status.", routes),
            ("tq_answers_total", "counter", "Answers by how they ended.", ends),
            ("tq_answers_running", "gauge", "Answers that the model works on.", [({}, stats.running)]),
            ("tq_answers_queued", "gauge", "Requests that wait for their turn.", [({}, stats.queued)]),
            ("tq_prompt_tokens_total", "counter", "Tokens of prompts.", [({}, stats.prompt_tokens)]),
            ("tq_cached_tokens_total", "counter", "Tokens of prompts that were not read.", [({}, stats.cached_tokens)]),
            ("tq_completion_tokens_total", "counter", "Tokens generated.", [({}, stats.completion_tokens)]),
            ("tq_prefill_seconds_total", "counter", "Time in prompts.", [({}, seconds["prefill"])]),
            ("tq_decode_seconds_total", "counter", "Time in answers.", [({}, seconds["decode"])]),
            ("tq_kv_bytes", "gauge", "Memory of running answers' caches.", [({}, stats.kv_bytes)]),
            ("tq_prefix_entries", "gauge", "Contexts kept for requests to come.", [({}, stats.prefix_entries)]),
            ("tq_prefix_bytes", "gauge", "Memory of these.", [({}, stats.prefix_bytes)]),
            ("tq_prefix_budget_bytes", "gauge", "Memory these may take.", [({}, stats.prefix_budget_bytes)]),
        ]
        lines = []
        for name, kind, about, samples in families:
            lines += [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
            lines += [f"{name}{_labels(labels)} {value}" for labels, value in samples]
        return "\n".join(lines) + "\n"


def _labels(labels: dict[str, Any]) -> str:
    if not labels:
        return ""
    escaped = {
        name: str(value).replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n") for name, value in labels.items()
    }
    return "{" + ",".join(f'{name}="{value}"' for name, value in escaped.items()) + "}"
