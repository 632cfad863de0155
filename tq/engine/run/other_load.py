"""Whether a measurement had the machine for itself."""

import psutil


class OtherLoad:
    """How much of the processors' time others took, from the beginning to `percent()`."""

    def __init__(self) -> None:
        self._start = self._now()

    def percent(self) -> float:
        busy, mine, all_time = (now - then for now, then in zip(self._now(), self._start, strict=True))
        return 100 * max(busy - mine, 0) / all_time if all_time > 0 else 0.0

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Seconds of all processors that were busy, of this process, and of all processors."""
        times, own = psutil.cpu_times(), psutil.Process().cpu_times()
        idle = times.idle + getattr(times, "iowait", 0)
        # A guest's time is in the user's already.
        whole = sum(times) - getattr(times, "guest", 0) - getattr(times, "guest_nice", 0)
        return whole - idle, own.user + own.system, whole
