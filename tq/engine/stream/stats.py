"""What streaming did: experts asked for, those that were there, and what was read from the disk meanwhile."""

import threading
import time
from dataclasses import dataclass


class Stats:
    """Numbers of one phase: reading a prompt, or writing an answer. Reads may be counted from several threads.

    Attributes:
        passes: Through the model: one for each token, and one for each chunk of a prompt.
        asked, hits: Experts that layers asked for, and those of them that were in memory or on the way.
        early, early_used: Experts read ahead, and those of them that their layer then asked for.
        read_bytes: From the disk.
        reading_seconds: In which at least one read was going on.
        waited_seconds: For experts that were not there.
    """

    def __init__(self) -> None:
        self.passes = self.asked = self.hits = self.early = self.early_used = self.read_bytes = 0
        self.reading_seconds = self.waited_seconds = 0.0
        self._lock = threading.Lock()
        self._busy, self._since = 0, 0.0

    def begin_read(self) -> None:
        with self._lock:
            if not self._busy:
                self._since = time.perf_counter()
            self._busy += 1

    def end_read(self, size_bytes: int) -> None:
        with self._lock:
            self._busy -= 1
            self.read_bytes += size_bytes
            if not self._busy:
                self.reading_seconds += time.perf_counter() - self._since


@dataclass(frozen=True)
class StreamReport:
    """What a person wants to know of a run.

    Attributes:
        budget_bytes: Memory for experts.
        experts_bytes: What all of them take on the disk.
        hit_rate: Of the answer: the share of experts that were in memory when their layer asked for them.
        read_bytes_per_token: Of the answer.
        read_gb_s: From the disk, while something was read.
        waited_seconds_per_token: Of the answer: what layers waited for experts.
        prompt_hit_rate, prompt_read_bytes: Of the prompt.
        early, early_used: Experts of the answer that were read ahead, and those of them that were then wanted.
        early_pays: Whether that is faster, if it was tried for long enough.
    """

    budget_bytes: int
    experts_bytes: int
    hit_rate: float
    read_bytes_per_token: float
    read_gb_s: float
    waited_seconds_per_token: float
    prompt_hit_rate: float
    prompt_read_bytes: int
    early: int
    early_used: int
    early_pays: bool | None


def report(
    prompt: Stats, answer: Stats, budget_bytes: int, experts_bytes: int, early_pays: bool | None
) -> StreamReport:
    """The numbers of both phases for a person."""
    seconds = prompt.reading_seconds + answer.reading_seconds
    return StreamReport(
        budget_bytes=budget_bytes,
        experts_bytes=experts_bytes,
        hit_rate=_ratio(answer.hits, answer.asked),
        read_bytes_per_token=_ratio(answer.read_bytes, answer.passes),
        read_gb_s=_ratio(prompt.read_bytes + answer.read_bytes, seconds) / 1e9,
        waited_seconds_per_token=_ratio(answer.waited_seconds, answer.passes),
        prompt_hit_rate=_ratio(prompt.hits, prompt.asked),
        prompt_read_bytes=prompt.read_bytes,
        early=answer.early,
        early_used=answer.early_used,
        early_pays=early_pays,
    )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
