"""Does a model fit a machine, and how fast can it be: arithmetic over what weights, caches and prompts take."""

from collections.abc import Callable
from dataclasses import dataclass

from tq.engine.machine.hardware import Target
from tq.engine.model.plan import BASE_MEMORY
from tq.engine.run.plan.caches import Usage

MIB = 2**20
WIRED_STEP_MIB = 512  # to which a raised limit is rounded up
RESERVE_BYTES = 2_500_000_000  # for the system and other programs: macOS with little open takes 2 to 3 GB
CONTEXT_STEP = 256  # tokens in which caches grow
CACHED_BYTES = 256_000_000  # last-level caches: up to 96 MB of Apple's chips, 256 MB of servers' (per socket, mostly)


@dataclass(frozen=True)
class Need:
    """What running a model takes at a context, in bytes.

    Attributes:
        weights: Once loaded.
        cache: Keys, values and states at the end.
        prompt: What reading the prompt takes beside that.
        read: What the next token reads: weights and cache; None if nobody knows how many experts run.
    """

    context: int
    weights: int
    cache: int
    prompt: int
    read: int | None

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.prompt


@dataclass(frozen=True)
class Memory:
    """What a machine has for a model.

    Attributes:
        target: The machine.
        reserve: For the system and other programs.
        budget: For the model, in place of what the machine allows its GPU; None: that.
    """

    target: Target
    reserve: int = RESERVE_BYTES
    budget: int | None = None

    @property
    def most(self) -> int:
        """What is left of the memory beside the reserve and the program itself."""
        return max(self.target.memory_bytes - self.reserve - BASE_MEMORY, 0)

    @property
    def limit(self) -> int:
        """What a model may take as the machine is set now."""
        if self.budget is not None:
            return self.budget
        return self.most if self.target.gpu_bytes is None else min(self.target.gpu_bytes, self.most)

    def wired_limit_mib(self, size_bytes: int) -> int | None:
        """A limit for the GPU that lets it take so much, in MiB; None where memory is too small or not shared."""
        if self.target.gpu_bytes is None or self.budget is not None or size_bytes > self.most:
            return None
        return min(-(-size_bytes // (WIRED_STEP_MIB * MIB)) * WIRED_STEP_MIB, self.most // MIB)


class Requirements:
    """What a model takes at any context.

    Args:
        weights: Bytes once loaded.
        token: Bytes of weights that a token reads; None if nobody knows.
        caches, prompt: What these take at a context.
    """

    def __init__(self, weights: int, token: int | None, caches: Callable[[int], Usage], prompt: Callable[[int], int]):
        self.weights, self.token, self._caches, self._prompt = weights, token, caches, prompt

    def at(self, context: int) -> Need:
        usage = self._caches(context)
        read = None if self.token is None else self.token + usage.read_bytes
        beside = usage.peak_bytes - usage.size_bytes + self._prompt(context)
        return Need(context, self.weights, usage.size_bytes, beside, read)

    def with_weights(self, weights: int, token: int | None) -> "Requirements":
        """The same model with other weights."""
        return Requirements(weights, token, self._caches, self._prompt)

    def largest_context(self, limit: int, most: int) -> int:
        """The longest context, in steps of 256 tokens, that fits into so many bytes; 0 if none does.

        What is needed grows with the context, almost in a line: it is followed to where it meets the limit, and the
        exact numbers there say on which side that is.
        """
        if self.weights > limit:
            return 0
        need_low, need_high = self.weights, self.at(most).total
        if need_high <= limit:
            return most
        low, high = 0, -(-most // CONTEXT_STEP)  # in steps: low fits, high does not
        guessing = True
        while high - low > 1:
            share = (limit - need_low) / (need_high - need_low) if guessing else 0.5
            guess = min(max(low + int((high - low) * share), low + 1), high - 1)
            need = self.at(guess * CONTEXT_STEP).total
            if need <= limit:
                low, need_low = guess, need
            else:
                high, need_high = guess, need
            guessing = not guessing  # the line may bend: every other step halves what is left
        return low * CONTEXT_STEP


@dataclass(frozen=True)
class Streaming:
    """A mixture of experts whose experts stay on the disk.

    Attributes:
        resident_bytes: What must be in memory in any case: all but the experts, the cache and the prompt.
        least_bytes: Of memory for experts: those that a token runs through in two layers, one that computes and the
            next, which is being read.
        budget_bytes: That is left for experts.
        share: Of all experts that it holds, at most 1.
    """

    resident_bytes: int
    least_bytes: int
    budget_bytes: int
    share: float


def streaming(need: Need, experts_bytes: int, expert_bytes: int, active: int, limit: int) -> Streaming | None:
    """How a mixture of experts would be streamed; None if not even the least fits.

    Args:
        experts_bytes: Of all experts.
        expert_bytes: Of the largest one of a layer.
        active: Experts of a layer that a token runs through.
        limit: Bytes for the model.
    """
    resident = need.total - experts_bytes
    least = 2 * active * expert_bytes
    budget = limit - resident
    if budget < least:
        return None
    return Streaming(resident, least, budget, min(budget / experts_bytes, 1.0))


def tokens_per_second(read_bytes: int | None, bandwidth_gb_s: float | None) -> float | None:
    """The most tokens that a machine can generate in a second: each one reads so many bytes.

    None if not known: also of a model so small that a processor's cache may hold it, which memory does not bound.
    """
    if read_bytes is None or bandwidth_gb_s is None or read_bytes < CACHED_BYTES:
        return None
    return bandwidth_gb_s * 1e9 / read_bytes
