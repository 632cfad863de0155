"""Whether something pays, found out by doing it: passes with and without it in turn, then the better way for a while.

Reading experts ahead hides the disk behind the computation, or takes bandwidth, slots and processor time for guesses
that are wrong: which one, depends on the model, the disk, the budget and the text.
"""

from statistics import median

ROUND = 6  # passes of one kind before the other kind's turn
ROUNDS = 3  # of each kind in a trial
HELD = 192  # passes until the next trial
GAIN = 0.98  # of the time without it, from which it pays


class Trial:
    """Switches something on and off.

    Args:
        mode: "on", "off", or "auto".

    Attributes:
        active: Whether it is on in this pass.
        verdict: What the last trial found, or None: whether it pays.
    """

    def __init__(self, mode: str):
        self._auto = mode == "auto"
        self.active = mode == "on"
        self.verdict: bool | None = None
        self._seconds: dict[bool, list[float]] = {True: [], False: []}
        self._in_round = self._held = 0

    def passed(self, seconds: float) -> None:
        """A pass took so long."""
        if not self._auto:
            return
        if self._held:
            self._held -= 1
            return
        # The first pass of a round still lives on what the round before has left behind.
        if self._in_round:
            self._seconds[self.active].append(seconds)
        self._in_round += 1
        if self._in_round < ROUND:
            return
        self._in_round = 0
        self.active = not self.active
        if all(len(each) >= ROUNDS * (ROUND - 1) for each in self._seconds.values()):
            self.verdict = median(self._seconds[True]) < GAIN * median(self._seconds[False])
            self.active, self._held = self.verdict, HELD
            self._seconds = {True: [], False: []}
