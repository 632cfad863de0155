"""The answer to: will it fit, how fast can it be, and what if not."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import mlx.core as mx

from tq.engine.cache.settings import KVSettings
from tq.engine.machine.hardware import THIS
from tq.engine.model.plan import Plan, make_plan
from tq.engine.model.recipe import Recipe
from tq.engine.model.recipe_file import WITHOUT_BITS
from tq.engine.model.remote import open_headers
from tq.engine.model.sources import OWN_MODES, Source, quantization_mode
from tq.engine.run.generate import context_length
from tq.engine.run.plan import skeleton
from tq.engine.run.plan.caches import CacheModel, Kind, Usage
from tq.engine.run.plan.fit import Memory, Need, Requirements, streaming, tokens_per_second
from tq.engine.run.plan.weights import Weights, is_packed, of_checkpoint, of_plan
from tq.engine.run.plan.workspace import WorkspaceModel
from tq.errors import TQError, UsageError

CONTEXTS = (4096, 16384, 32768)  # that are shown, with the model's longest, unless somebody asks for others
TABLE_BITS = (2, 3, 4, 6, 8)
FIT_BITS = (8, 7, 6, 5, 4, 3, 2)
KV_CHOICES = ("8,4", "8,3", "4,4")  # from the best on (docs/kv_cache.md)
STEPS = (512, 256)  # of a prompt, in place of a larger one
Verdict = Literal["fits", "adjust", "stream", "no"]


@dataclass(frozen=True)
class Question:
    """What a person asks.

    Attributes:
        model: A folder, a file or a Hub id.
        memory: The machine, and what stays free on it.
        contexts: Tokens; empty: useful ones.
        kv: How keys and values are packed; None: not at all.
        step: Tokens of a prompt that are read at once.
        conversion: Options of `tq convert` for the weights, as `Recipe.from_options` has them; None is not given.
        dtype, format: As in `make_plan`.
        converts: Whether somebody asks for a conversion; else a checkpoint that is packed is judged as it is.
        fit: Choose the most bits that fit, which is a conversion.
    """

    model: str
    memory: Memory
    contexts: tuple[int, ...] = ()
    kv: KVSettings | None = None
    step: int = 2048
    conversion: Mapping[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    format: str = "tq"
    converts: bool = False
    fit: bool = False
    revision: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Remedy:
    """Something that would make it fit.

    Attributes:
        kind: context, kv-bits, prefill-step, wired-limit, bits or stream.
        value: The context, the bits, MiB, or bytes for experts.
        text: What it is, for people.
        command: What to type, if it is a command.
    """

    kind: str
    value: int | str
    text: str
    command: str | None = None


@dataclass(frozen=True)
class Row:
    """A context, or a number of bits: what it takes, whether it fits, and how fast it can be at best."""

    need: Need
    fits: bool
    tokens_per_second: float | None
    bits: int | None = None
    largest_context: int | None = None


@dataclass(frozen=True)
class Report:
    """The answer.

    Attributes:
        packed: The checkpoint is judged as it is; else as `tq convert` would make it.
        weights: What its weights take.
        kinds: Its caches at the context that is judged.
        rows: By context.
        judged: The context that the verdict is about: the one asked for, or the first row.
        max_context: That the model was made for; None if nothing bounds it.
        largest_context: That fits.
        verdict: fits; adjust: it would with one of the remedies; stream: its experts must stay on the disk; no.
        bits: Of other conversions, by bits.
        convert: The command that makes the checkpoint; None if it exists.
    """

    question: Question
    packed: bool
    weights: Weights
    kinds: list[Kind]
    rows: list[Row]
    judged: int
    max_context: int | None
    largest_context: int
    verdict: Verdict
    remedies: list[Remedy]
    bits: list[Row]
    convert: str | None
    notes: list[str]
    source_bytes: int
    loaded_bytes: int


class Planner:
    """Finds the answer to a question. What depends on the weights' shapes alone is found once.

    Raises:
        TQError: The model does not exist, or is none that mlx-lm knows.
        UsageError: Options do not go together, or a context is longer than the model's.
    """

    def __init__(self, question: Question):
        self.question = question
        self.memory = question.memory
        self.gpu = self.memory.target.gpu_bytes is not None
        self.source: Source = open_headers(question.model, question.revision, question.trust_remote_code)
        self.packed = is_packed(self.source) and not question.converts and not question.fit
        if quantization_mode(self.source.config) in OWN_MODES and not self.packed:
            raise UsageError(f"{question.model} is packed already", "leave --fit and the options for weights out")
        self.max_context = context_length(self.source.config)
        self._check_contexts()
        self._first: Plan | None = None
        self._weights: dict[tuple, Weights] = {}

    def _check_contexts(self) -> None:
        for context in self.question.contexts:
            if context < 1:
                raise UsageError(f"--context {context} must be 1 or more")
            if self.max_context is not None and context > self.max_context:
                raise UsageError(f"--context {context} is more than this model's {self.max_context} tokens")

    @property
    def contexts(self) -> list[int]:
        if self.question.contexts:
            return sorted(set(self.question.contexts))
        most = self.max_context
        shown = [context for context in CONTEXTS if most is None or context < most]
        return shown + ([most] if most is not None else [])

    @property
    def judged(self) -> int:
        """The longest context that was asked for, else the shortest that is shown."""
        return self.contexts[-1] if self.question.contexts else self.contexts[0]

    def weights(self, conversion: Mapping[str, Any]) -> Weights:
        """Of the checkpoint as it is, or as a conversion with these options makes it."""
        key = tuple(sorted((name, value) for name, value in conversion.items() if value is not None))
        if key not in self._weights:
            self._weights[key] = self._count(conversion)
        return self._weights[key]

    def _count(self, conversion: Mapping[str, Any]) -> Weights:
        if self.packed:
            return of_checkpoint(self.source, self.question.trust_remote_code)
        plan = make_plan(
            self.source,
            Recipe.from_options(**conversion),
            dtype=self.question.dtype,
            format=self.question.format,
            trust_remote_code=self.question.trust_remote_code,
            laid_out=self._first.outline if self._first else None,
        )
        self._first = self._first or plan
        return of_plan(plan)

    def answer(self) -> Report:
        conversion = dict(self.question.conversion)
        bits: list[Row] = []
        if self.question.fit:
            if conversion.get("bits") is not None:
                raise UsageError("--fit chooses the bits: leave --bits out")
            bits = self._by_bits(FIT_BITS)
            conversion["bits"] = next((row.bits for row in bits if row.fits), min(FIT_BITS))
        weights = self.weights(conversion)
        needs = self._requirements(weights, self.question.kv, self.question.step)
        rows = [self._row(needs.at(context)) for context in self.contexts]
        need = needs.at(self.judged)
        fits = need.total <= self.memory.limit
        if not (fits or bits or self.packed):
            bits = self._by_bits(TABLE_BITS)
        largest = needs.largest_context(self.memory.limit, self._longest)
        remedies = [] if fits else self._remedies(weights, needs, largest, bits)
        return Report(
            self.question, self.packed, weights, self._caches.kinds(self.judged), rows, self.judged, self.max_context,
            largest, _verdict(fits, remedies), remedies, bits, self._convert_command(conversion), self._notes(weights),
            sum(header.size_bytes for header in self.source.headers.values()), needs.weights,
        )  # fmt: skip

    @property
    def _longest(self) -> int:
        """The longest context that anybody could want."""
        return self.max_context or max(self.judged, CONTEXTS[-1])

    # --- what a model takes ---

    @cached_property
    def _skeleton(self) -> skeleton.Skeleton:
        weights = self.weights(self.question.conversion)
        dtype = weights.dtype if self.gpu else mx.float32
        return skeleton.Skeleton(
            skeleton.Blueprint(
                weights.config, dtype, weights.kept(self.gpu), weights.folder, self.question.trust_remote_code
            )
        )

    @cached_property
    def _caches(self) -> CacheModel:
        return CacheModel(self._skeleton, self.question.kv, step=self.question.step, gpu=self.gpu)

    @cached_property
    def _prompt_failure(self) -> str | None:
        """Why nobody knows what a prompt takes."""
        try:
            self._workspace.size_bytes(self.judged, self.question.step)
        except TQError as error:
            return error.message
        return None

    def _requirements(self, weights: Weights, kv: KVSettings | None, step: int) -> Requirements:
        same = kv == self.question.kv and step == self.question.step
        caches = self._caches if same else CacheModel(self._skeleton, kv, step=step, gpu=self.gpu)
        # Both the activation and what the rotation made of it live until the next one is rotated.
        size = weights.dtype.size if self.gpu else mx.float32.size
        rotated = sum(2 * numbers * rows * size for numbers, rows in weights.rotated.items())

        def prompt(context: int) -> int:
            played = 0 if self._prompt_failure else self._workspace.size_bytes(context, step)
            return played + rotated * min(step, context)

        token = weights.token_bytes
        usage: dict[int, Usage] = {}

        def cache(context: int) -> Usage:
            if context not in usage:
                found = caches.usage(context)
                # Layers that CPU kernels run keep float16: a bound of speed counts that.
                read = found.read_bytes if self.gpu or kv else found.read_bytes // 2
                usage[context] = replace(found, read_bytes=read)
            return usage[context]

        return Requirements(weights.memory_bytes(self.gpu), token, cache, prompt)

    @cached_property
    def _workspace(self) -> WorkspaceModel:
        return WorkspaceModel(self._skeleton, gpu=self.gpu)

    def _row(self, need: Need, bits: int | None = None, largest: int | None = None) -> Row:
        fits = need.total <= self.memory.limit
        speed = tokens_per_second(need.read, self.memory.target.bandwidth_gb_s)
        return Row(need, fits, speed, bits, largest)

    # --- what else there is ---

    def _by_bits(self, choices: tuple[int, ...]) -> list[Row]:
        """The same with other bits in general; what is said of roles stays."""
        rows = []
        for bits in choices:
            conversion = {**self.question.conversion, "bits": bits}
            if conversion.get("codec") in WITHOUT_BITS:
                conversion["codec"] = None
            try:
                weights = self.weights(conversion)
            except TQError:  # the codec or the format has no such bits
                continue
            needs = self._requirements(weights, self.question.kv, self.question.step)
            largest = needs.largest_context(self.memory.limit, self._longest)
            rows.append(self._row(needs.at(self.judged), bits, largest))
        return rows

    def _remedies(self, weights: Weights, needs: Requirements, largest: int, bits: list[Row]) -> list[Remedy]:
        """What would make it fit, each by itself, the least change first."""
        limit, need = self.memory.limit, needs.at(self.judged)
        found = []
        if self.question.kv is None and need.total - need.cache <= limit:
            for text in KV_CHOICES:
                try:
                    packed = self._requirements(weights, KVSettings.parse(text), self.question.step)
                except UsageError:  # none of its caches can be packed
                    break
                if packed.at(self.judged).total <= limit:
                    found.append(Remedy("kv-bits", text, f"with packed keys and values: --kv-bits {text}"))
                    break
        for step in STEPS:
            if step >= self.question.step or need.total - need.prompt > limit:
                continue
            if self._requirements(weights, self.question.kv, step).at(self.judged).total <= limit:
                found.append(Remedy("prefill-step", step, f"with fewer tokens at once: --prefill-step {step}"))
                break
        if largest:
            found.append(Remedy("context", largest, f"with a context of up to {largest} tokens"))
        if (mib := self.memory.wired_limit_mib(need.total)) is not None:
            raised = "with more memory for the GPU (a restart takes it back)"
            found.append(Remedy("wired-limit", mib, raised, f"sudo sysctl iogpu.wired_limit_mb={mib}"))
        fitting = [row.bits for row in bits if row.fits and row.bits is not None]
        if fitting:
            best = max(fitting)
            convert = self._convert_command({**self.question.conversion, "bits": best})
            found.append(Remedy("bits", best, f"with {best} bits for weights", convert))
        if (streamed := self._streamed(weights, need)) is not None:
            found.append(streamed)
        return found

    def _streamed(self, weights: Weights, need: Need) -> Remedy | None:
        if not weights.experts or weights.active is None:
            return None
        plan = streaming(need, weights.experts_bytes, weights.expert_bytes, weights.active, self.memory.limit)
        if plan is None:
            return None
        name, when = (self.question.model, "") if self.packed else ("CONVERTED", " once it is converted")
        budget = f"{plan.budget_bytes / 1e9:.1f}GB" if plan.budget_bytes >= 1e9 else f"{plan.budget_bytes / 1e6:.0f}MB"
        return Remedy(
            "stream",
            plan.budget_bytes,
            f"with experts on the disk{when}: {plan.resident_bytes / 1e9:.1f} GB stay in memory, {plan.share:.0%} of "
            f"all experts fit into the rest, where {plan.least_bytes / 1e6:.0f} MB are the least",
            f"tq stream -m {shlex.quote(name)} --budget {budget} PROMPT",
        )

    def _convert_command(self, conversion: Mapping[str, Any]) -> str | None:
        if self.packed:
            return None
        words = ["tq", "convert", "-m", self.question.model]
        for name, value in {**conversion, "dtype": self.question.dtype}.items():
            if value is not None:
                words += [f"--{name.replace('_', '-')}", str(value)]
        if self.question.format != "tq":
            words += ["--format", self.question.format]
        if self.question.revision is not None:
            words += ["--revision", self.question.revision]
        return shlex.join(words)

    def _notes(self, weights: Weights) -> list[str]:
        notes = [] if self._first is None else list(self._first.notes)
        notes += self._caches.notes
        if self._prompt_failure:
            notes.append(f"{self._prompt_failure}: it is not counted")
        if weights.experts and weights.active is None:
            notes.append("config.json does not say how many experts a token runs through: speed is not known")
        target = self.memory.target
        if target.name == THIS and not self.gpu:
            notes.append("keys and values are counted in float32; layers that CPU kernels run keep them in float16")
        if target.free_bytes is not None and target.free_bytes < self.memory.limit:
            notes.append(
                f"{target.free_bytes / 1e9:.1f} GB are free now: other programs have the rest of "
                f"{self.memory.limit / 1e9:.1f}"
            )
        return notes


def _verdict(fits: bool, remedies: list[Remedy]) -> Verdict:
    kinds = {remedy.kind for remedy in remedies}
    if fits:
        return "fits"
    return "adjust" if kinds - {"stream", "bits"} else "stream" if "stream" in kinds else "no"
