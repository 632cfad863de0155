"""Leaves the experts of a checkpoint on the disk: finds their bytes, makes slots for them, and streamed modules."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import psutil
from mlx.utils import tree_unflatten

from tq.engine import ops
from tq.engine.model import turboquant
from tq.engine.model.layers import QuantSwitchLinear, Rotation
from tq.engine.model.safetensors import TensorHeader
from tq.engine.model.streamed import CompactSwitchLinear, StreamedExperts, in_order
from tq.engine.ops import proof
from tq.engine.quantize import PackedTensor, layout
from tq.engine.quantize.packed import SHARED
from tq.engine.stream.pager import Arena, Pager, StoredLayer, StoredMatrix
from tq.engine.stream.replay import shares
from tq.engine.stream.residency import Policy
from tq.engine.stream.settings import StreamSettings
from tq.engine.stream.slots import ArraySlots, Form, PreparedSlots, Slots
from tq.engine.stream.store import Piece, Store
from tq.engine.stream.words import FLOATS
from tq.errors import TQError

MATRICES = {"SwitchGLU": ("gate_proj", "up_proj", "down_proj"), "SwitchMLP": ("fc1", "fc2")}
# Names that configs give to the number of experts that a token runs through.
ACTIVE_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
CONVERT = "tq convert makes a checkpoint whose experts can be"
DECODED_BYTES = 256 << 20  # of experts that the reference decodes at once
SPARE_SHARE, SPARE_BYTES = 0.1, 1_000_000_000  # of the free memory that an automatic budget leaves alone


@dataclass
class _Group:
    """Layers whose experts look alike."""

    layers: list[StoredLayer]
    slots: dict[str, Slots]

    @property
    def n_experts(self) -> int:
        return max(layer.n_experts for layer in self.layers)

    @property
    def total(self) -> int:
        return sum(layer.n_experts for layer in self.layers)

    @property
    def slot_bytes(self) -> int:
        return sum(slots.slot_bytes for slots in self.slots.values())


class Experts:
    """The experts of a checkpoint that are to be streamed.

    Args:
        model: mlx-lm's, before its matrices are replaced.
        packed: Its quantized matrices; those of experts are taken out.
        weights: Its other tensors; the biases of experts are taken out.
        headers: Where every tensor is.

    Raises:
        TQError: There are none that can be streamed.
    """

    def __init__(
        self,
        model: nn.Module,
        packed: dict[str, PackedTensor],
        weights: dict[str, mx.array],
        headers: dict[str, TensorHeader],
        config: dict[str, Any],
    ):
        self.shared: dict[str, dict[str, mx.array]] = {}
        self.layers: list[StoredLayer] = []
        self._headers: list[TensorHeader] = []
        modules = dict(model.named_modules())
        for path in sorted((path for path in modules if _names(modules[path])), key=in_order):
            paths = {name: f"{path}.{name}" for name in _names(modules[path])}
            if not all(matrix in packed for matrix in paths.values()):
                continue
            taken = {name: packed.pop(matrix) for name, matrix in paths.items()}
            stored = {name: _stored(paths[name], taken[name], headers, config) for name in paths}
            for name, matrix in paths.items():
                self.shared[matrix] = {k: v for k, v in taken[name].arrays.items() if k in SHARED}
                weights.pop(f"{matrix}.bias", None)
                self._headers += [headers[f"{matrix}.{piece.name}"] for piece in stored[name].pieces]
            self.layers.append(StoredLayer(path, next(iter(taken.values())).shape[0], stored))
        if not self.layers:
            raise TQError("this model has no quantized experts that can stay on disk", "tq run runs it from memory")

    @property
    def size_bytes(self) -> int:
        """On disk."""
        return sum(layer.n_experts * layer.expert_bytes for layer in self.layers)

    def install(
        self, model: nn.Module, settings: StreamSettings, dtype: mx.Dtype, rotations: dict[int, Rotation], resident: int
    ) -> tuple[Pager, list[str]]:
        """Let the modules of ``model`` that run experts run streamed ones.

        Args:
            rotations: By the identity of signs: those that other modules have already.
            resident: Bytes of the rest of the model, which is in memory already.

        Returns:
            What brings them, and notes for a person.

        Raises:
            TQError: The budget is too small, or the files have changed.
        """
        notes = proof.switch_off_wrong(self._metal_work(), dtype)
        if settings.max_active_experts is not None:
            n = settings.max_active_experts
            notes.append(f"at most {n} expert{'s' if n > 1 else ''} of a token run: answers are not those of the model")
        groups = self._groups(dtype)
        budget = settings.budget_bytes if settings.budget_bytes is not None else _free_budget()
        least = sum(group.slot_bytes for group in groups)
        if budget < least:
            what = f"a budget of {budget / 1e6:.2f} MB holds no expert"
            if settings.budget_bytes is None:
                what = f"beside the {resident / 1e9:.1f} GB that always stay, there is no memory for experts"
            raise TQError(f"{what}: this model needs at least {least / 1e6:.2f} MB", "give a larger --budget")
        placed: dict[str, tuple[StoredLayer, Arena, int]] = {}
        n_slots = shares(budget, [(group.total, group.slot_bytes) for group in groups])
        for group, n in zip(groups, n_slots, strict=True):
            policy = Policy.named(settings.policy)
            arena = Arena(group.slots, len(group.layers), group.n_experts, n, policy)
            for index, layer in enumerate(group.layers):
                placed[layer.path] = layer, arena, index
        # What is in memory anyway needs no second copy in the system's cache.
        cached = psutil.virtual_memory().available > self.size_bytes
        store = Store(cached)
        store.open(self._headers)
        pager = Pager([placed[layer.path] for layer in self.layers], store, settings.workers, settings.prefetch)
        waiting: list[mx.array] = []
        for number, layer in enumerate(self.layers):
            module = self._module(model, number, layer, placed[layer.path][1], rotations, dtype, pager, waiting)
            model.update_modules(tree_unflatten([(layer.path, module)]))
        return pager, notes

    def _metal_work(self) -> Iterator[proof.Work]:
        for layer in self.layers:
            for matrix in layer.matrices.values():
                yield "gather_matmul", matrix.form.spec
                yield "gate_up", matrix.form.spec

    def _groups(self, dtype: mx.Dtype) -> list[_Group]:
        groups: dict[tuple, _Group] = {}
        for layer in self.layers:
            alike = tuple((name, matrix.form) for name, matrix in layer.matrices.items())
            if alike not in groups:
                groups[alike] = _Group([], {name: _slots(matrix, dtype) for name, matrix in layer.matrices.items()})
            groups[alike].layers.append(layer)
        return list(groups.values())

    def _module(
        self,
        model: nn.Module,
        number: int,
        layer: StoredLayer,
        arena: Arena,
        rotations: dict[int, Rotation],
        dtype: mx.Dtype,
        pager: Pager,
        waiting: list[mx.array],
    ) -> StreamedExperts:
        container: Any = model
        for part in layer.path.split("."):
            container = container[int(part)] if part.isdigit() else container[part]
        decoded = 0
        for name, matrix in layer.matrices.items():
            shared = self.shared[f"{layer.path}.{name}"]
            packed, bias = arena.slots[name].packed(shared, layer.n_experts)
            rotation = None
            if packed.spec.rotation == "hadamard":
                rotation = rotations.setdefault(id(shared["signs"]), Rotation(shared["signs"]))
            slow = ops.select("gather_matmul", packed, dtype) is ops.reference
            kind = CompactSwitchLinear if slow else QuantSwitchLinear
            container[name] = _over_slots(kind(packed, rotation, bias), packed, matrix.form.bias is not None)
            if slow:
                decoded += dtype.size * prod(packed.shape[1:])
        most = max(1, DECODED_BYTES // decoded) if decoded else layer.n_experts
        return StreamedExperts(container, pager, number, most, waiting)


def fewer_active(config: dict[str, Any], most: int | None) -> dict[str, Any]:
    """The config of the same model with at most so many experts for each token.

    Raises:
        TQError: It does not say how many there are.
    """
    if most is None:
        return config
    found = False
    changed = dict(config)
    for name in ACTIVE_EXPERTS:
        if isinstance(config.get(name), int):
            changed[name], found = min(config[name], most), True
    if isinstance(config.get("text_config"), dict):
        try:
            changed["text_config"], found = fewer_active(config["text_config"], most), True
        except TQError:
            pass
    if not found:
        raise TQError("config.json does not say how many experts are active", "leave --max-active-experts out")
    return changed


def _over_slots(module: QuantSwitchLinear, packed: PackedTensor, has_bias: bool) -> QuantSwitchLinear:
    """A module whose matrix is in the memory order of the CPU kernels already, if it is."""
    if packed.prepared is not None:
        module.hidden.prepared, module.hidden.has_bias = packed, has_bias
        if module.rotation is not None:
            module.rotation.prepare()
    return module


def _names(module: nn.Module) -> tuple[str, ...]:
    """The matrices of a module that runs experts; none of another one. The exact types: a subclass may do more."""
    kind = type(module)
    return MATRICES.get(kind.__name__, ()) if kind.__module__ == "mlx_lm.models.switch_layers" else ()


def _stored(path: str, packed: PackedTensor, headers: dict[str, TensorHeader], config: dict[str, Any]) -> StoredMatrix:
    names = [*layout(packed.spec, packed.shape), "bias"]
    pieces = tuple(Piece.of(name, headers[f"{path}.{name}"]) for name in names if f"{path}.{name}" in headers)
    for piece in pieces:
        if piece.name != "weight" and piece.dtype not in (*FLOATS, "U32"):
            raise TQError(f"{path}.{piece.name} is {piece.dtype}; tq streams {', '.join(FLOATS)}")
    used = 32
    if turboquant.is_turboquant(config) and packed.spec.codec != "affine":
        used = 32 // packed.spec.bits * packed.spec.bits if packed.spec.bits else 32  # whole codes; trits use all
    _, rows, columns = packed.shape
    bias = next((piece.dtype for piece in pieces if piece.name == "bias"), None)
    return StoredMatrix(Form(packed.spec, rows, columns, bias, used), pieces)


def _slots(matrix: StoredMatrix, dtype: mx.Dtype) -> Slots:
    """Slots in the order that the backend of a matrix wants."""
    form = matrix.form
    question = PackedTensor(form.spec, (1, form.rows, form.columns), {})
    if ops.select("gather_matmul", question, dtype) is not ops.cpu:
        return ArraySlots(form, dtype)
    odd = [piece for piece in matrix.pieces if piece.name in ("scales", "biases") and piece.dtype != "F16"]
    if odd:
        raise TQError(f"experts with {odd[0].dtype} {odd[0].name} cannot be streamed on a CPU", CONVERT)
    return PreparedSlots(form)


def _free_budget() -> int:
    """What an automatic budget is: the memory that is free now, when the rest of the model is there, less a reserve."""
    free = psutil.virtual_memory().available
    if mx.default_device() != mx.Device(mx.cpu):
        info = mx.device_info()
        if most := int(info.get("max_recommended_working_set_size", 0)):
            free = min(free, most - mx.get_active_memory())
    return int(free * (1 - SPARE_SHARE)) - SPARE_BYTES
