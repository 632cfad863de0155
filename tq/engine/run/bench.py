"""Speed of models side by side: tokens per second behind contexts, peak memory, and the share of the memory's speed.

Whatever is compared takes turns in every round, so that a machine that is slow for a while is slow for all, and ratios
are medians of ratios within a round. Text that ships with tq is what is read and "generated": the likeliest token is
computed and another one is fed, so that all rounds and all models do the same work.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx

from tq.engine.events import Note, Progress
from tq.engine.run import memory
from tq.engine.run.contenders import Contender
from tq.engine.run.decode import PREFILL_STEP, Picker, prefill, steps
from tq.engine.run.evaluate import default_text
from tq.engine.run.generate import bos_tokens, context_length, open_context, packing_notes
from tq.engine.run.sampling import GenerateOptions, token_picker
from tq.errors import UsageError


@dataclass(frozen=True)
class BenchOptions:
    """What is measured behind each context.

    Attributes:
        prompt: Tokens of a prompt that are read at once; 0 leaves that out.
        generate: Tokens that are generated one by one; 0 leaves that out.
        contexts: Tokens that the caches hold before.
        rounds: How often.
        prefill_step: Tokens of a prompt that go through the model at once.

    Raises:
        UsageError: A value is out of range.
    """

    prompt: int = 512
    generate: int = 128
    contexts: tuple[int, ...] = (0,)
    rounds: int = 5
    prefill_step: int = PREFILL_STEP

    def __post_init__(self) -> None:
        for name, least in (("prompt", 0), ("generate", 0), ("rounds", 1), ("prefill_step", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} must be {least} or more, not {getattr(self, name)}")
        if self.prompt == self.generate == 0:
            raise UsageError("prompt and generate are both 0: there is nothing to measure")
        if not self.contexts or min(self.contexts) < 0:
            raise UsageError(f"contexts must be 0 or more, not {', '.join(map(str, self.contexts)) or 'none'}")
        if len(set(self.contexts)) < len(self.contexts):
            raise UsageError(f"contexts {', '.join(map(str, self.contexts))} have one twice")


@dataclass(frozen=True)
class SpeedRow:
    """A contender behind a context, after some rounds. None: not measured, or not known.

    Attributes:
        kv_bytes: Of the arrays of its caches when they hold the context.
        peak_memory_bytes: While it read context and prompt and generated, without the other models.
        read_gb_s: What this machine read at most so far: it is measured in every round as well.
        bandwidth_share: Weights, keys and values that a generated token reads, times the best speed, by `read_gb_s`.
        prefill_ratio, decode_ratio: Speed by that of the first contender.
    """

    label: str
    kv: str
    context: int
    rounds: int
    prefill_tokens_per_second: float | None
    prefill_best: float | None
    prefill_ratio: float | None
    decode_tokens_per_second: float | None
    decode_best: float | None
    decode_ratio: float | None
    read_gb_s: float | None
    bandwidth_share: float | None
    kv_bytes: int
    peak_memory_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self)


def check_context(contenders: Sequence[Contender], options: BenchOptions) -> None:
    """Raises UsageError if a model's context is too short."""
    for contender in contenders:
        limit = context_length(contender.loaded.config)
        more = max(options.prompt, options.generate + 1)
        if limit is not None and max(options.contexts) + more > limit:
            raise UsageError(
                f"a context of {max(options.contexts)} tokens and {more} more do not fit {contender.label}, "
                f"which takes {limit}",
                f"--context {max(limit - more, 0)} is the longest that does",
            )


def measure(
    contenders: Sequence[Contender], options: BenchOptions, bandwidth: Callable[[], float | None]
) -> Iterator[Progress | Note | SpeedRow]:
    """Measure the contenders in turn. Each measurement yields the rows of its context again, with what is known then.

    Args:
        bandwidth: Measures GB/s at which memory is read (`selftest.read_bandwidth`); None if nothing here can.

    Raises:
        UsageError: A model's context is too short.
        TQError: Keys and values cannot be packed as asked.
    """
    check_context(contenders, options)
    return _rounds(contenders, options, bandwidth)


def _rounds(
    contenders: Sequence[Contender], options: BenchOptions, bandwidth: Callable[[], float | None]
) -> Iterator[Progress | Note | SpeedRow]:
    from mlx_lm.utils import maybe_set_recommended_wired_limit

    done, total = 0, len(contenders) * len(options.contexts) * (options.rounds + 1)
    memory.settle()
    models = {id(contender.loaded): contender.weights.size_bytes for contender in contenders}
    base_bytes = max(memory.held_bytes() - sum(models.values()), 0)  # without any of the models
    read_gb_s: float | None = None
    wired_limit = maybe_set_recommended_wired_limit()
    for contender in contenders:
        for note in packing_notes(contender.loaded.model, contender.settings):
            yield Note(f"{contender.kv}: {note.message}")
    if not memory.start_peak():
        yield Note("this system does not say how much memory a part of a run takes: peaks are of all so far")
    try:
        for context in options.contexts:
            runs = [_Run(contender, context, options) for contender in contenders]
            for run in runs:
                yield Progress(done, total, "rounds", f"{run.contender.label} reads a context of {context}")
                run.open(base_bytes)
                done += 1
            for n in range(options.rounds):
                read_gb_s = max(filter(None, (read_gb_s, bandwidth())), default=None)
                for run in runs if n % 2 == 0 else reversed(runs):  # whoever comes second may find a warmer machine
                    yield Progress(done, total, "rounds", f"{run.contender.label}, context {context}")
                    run.measure()
                    done += 1
                    yield from (one.row(runs[0], read_gb_s) for one in runs if one.prefill or one.decode)
        yield Progress(done, total, "rounds")
    finally:
        mx.synchronize()
        if wired_limit is not None:
            mx.set_wired_limit(wired_limit)


class _Run:
    """One contender behind so many tokens: what it has read, and what was measured.

    Attributes:
        prefill, decode: Tokens per second of each round.
    """

    def __init__(self, contender: Contender, behind: int, options: BenchOptions):
        self.contender, self.behind, self.options = contender, behind, options
        model, tokenizer = contender.loaded.model, contender.loaded.tokenizer
        self.tokens = text_tokens(tokenizer, behind + options.prompt + options.generate + 2)
        self.pick = token_picker(GenerateOptions(temp=0, top_p=1, top_k=0, min_p=0), len(tokenizer))
        self.context = open_context(model, contender.settings)
        self.kv_bytes = self.peak_bytes = 0
        self.prefill: list[float] = []
        self.decode: list[float] = []

    def open(self, base_bytes: int) -> None:
        """Read the context, then prompt and answer without a clock: what is compiled or allocated late is, then."""
        memory.settle()
        before = memory.held_bytes()
        fresh = memory.start_peak()
        self._return()
        self.kv_bytes = self.context.nbytes
        if self.options.prompt:
            self._read()
        if self.options.generate:
            self._return()
            self._generate()
        peak = memory.peak_bytes()
        self.peak_bytes = base_bytes + self.contender.weights.size_bytes + peak - before if fresh else peak

    def measure(self) -> None:
        """One round."""
        if self.options.prompt:
            self._return()
            self.prefill.append(self.options.prompt / self._read())
        if self.options.generate:
            self._return()
            self.decode.append(self.options.generate / self._generate())

    def _return(self) -> None:
        """To a context that holds the tokens before the prompt and nothing else."""
        before = self.tokens[: self.behind]
        if self.context.keep(before) < self.behind:
            rest = before[len(self.context.tokens) :]
            for _ in prefill(self.contender.loaded.model, self.context, rest, self.options.prefill_step):
                pass
            self.context.mark()

    def _read(self) -> float:
        """Seconds until a prompt's first new token is known."""
        start = time.perf_counter()
        (end,) = self._steps(self.options.prompt, 1)
        return end - start

    def _generate(self) -> float:
        """Seconds for the tokens after a first one."""
        first, *_, last = self._steps(1, self.options.generate + 1)
        return last - first

    def _steps(self, n: int, limit: int) -> list[float]:
        """When each token that follows n more is known."""
        prompt = self.tokens[: self.behind + n]
        pick = _feeding(self.pick, self.tokens[self.behind + 1 :])
        step = self.options.prefill_step
        found = steps(self.contender.loaded.model, prompt, limit, self.context, [], pick, step)
        times = [time.perf_counter() for _ in found]
        mx.synchronize()
        return times

    def row(self, first: "_Run", read_gb_s: float | None) -> SpeedRow:
        share = None
        token_bytes = self.contender.weights.token_bytes
        if read_gb_s and self.decode and token_bytes is not None:
            share = (token_bytes + self.kv_bytes) * max(self.decode) / (read_gb_s * 1e9)
        return SpeedRow(
            label=self.contender.label,
            kv=self.contender.kv,
            context=self.behind,
            rounds=max(len(self.prefill), len(self.decode)),
            prefill_tokens_per_second=_median(self.prefill),
            prefill_best=max(self.prefill, default=None),
            prefill_ratio=_ratio(self.prefill, first.prefill),
            decode_tokens_per_second=_median(self.decode),
            decode_best=max(self.decode, default=None),
            decode_ratio=_ratio(self.decode, first.decode),
            read_gb_s=read_gb_s,
            bandwidth_share=share,
            kv_bytes=self.kv_bytes,
            peak_memory_bytes=self.peak_bytes,
        )


def text_tokens(tokenizer: Any, n: int) -> list[int]:
    """The first n tokens of the text that ships with tq, as often as it takes."""
    text = tokenizer.encode(default_text()[1], add_special_tokens=False, verbose=False)
    bos = bos_tokens(tokenizer)
    return [*bos, *(text * (n // len(text) + 1))][:n]


def _feeding(pick: Picker, tokens: Sequence[int]) -> Picker:
    """Choose as `pick` does, and feed these tokens in place of its choice."""
    feed = iter(tokens)

    def choose(logits: mx.array) -> tuple[mx.array, mx.array]:
        _, logprob = pick(logits)
        return mx.array([next(feed)], mx.uint32), logprob

    return choose


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def _ratio(values: list[float], first: list[float]) -> float | None:
    """The median of the ratios of each round."""
    return _median([mine / other for mine, other in zip(values, first, strict=False)])
