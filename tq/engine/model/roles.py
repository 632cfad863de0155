"""What a tensor is for, by generic rules over module types and paths. No architecture has code here."""

import fnmatch
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten


class Role(StrEnum):
    """What a tensor is for. Recipes give bits by role."""

    ATTENTION = "attention"  # all that mixes tokens: attention, its latent projections, linear attention, state spaces
    VALUE = "value"  # the value projection of attention: small where queries are grouped, and the most sensitive
    MLP = "mlp"
    EXPERT = "expert"
    EXPERT_DOWN = "expert_down"
    SHARED_EXPERT = "shared_expert"
    ROUTER = "router"
    EMBEDDING = "embedding"
    HEAD = "head"
    NORM = "norm"
    OTHER = "other"


# Roles whose matrices are quantized. Routers are tiny and decide everything; the rest are vectors.
QUANTIZED_ROLES = (
    Role.ATTENTION,
    Role.VALUE,
    Role.MLP,
    Role.EXPERT,
    Role.EXPERT_DOWN,
    Role.SHARED_EXPERT,
    Role.EMBEDDING,
    Role.HEAD,
)
MIN_FEATURES = 32  # a matrix with fewer inputs or outputs saves nothing

_VALUE = {"v_proj", "wv", "value", "value_proj"}
# Names of the second matrix of an expert, which is the most sensitive one.
_DOWN = {"down_proj", "w2", "fc2", "output_linear", "down"}
# Names that belong to a feed-forward block even inside a block called "mixer" (Nemotron-H names every block so).
_FEED_FORWARD = {"gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2", "w1", "w2", "w3", "c_fc"}
_ATTENTION = re.compile(r"attn|attention", re.I)
_MIXES_TOKENS = re.compile(
    r"attn|attention|^att_|mixer|mamba|ssm|conv|temporal|recurrent|rglru|time_mix|delta|kda|lightning|indexer|mla", re.I
)
_SHARED_EXPERT = re.compile(r"shared?_(expert|mlp)", re.I)
_EXPERT_LIST = re.compile(r"\bexperts\.(\d+)\.")  # experts as modules of their own
_POSITIONS = re.compile(r"(^|_)pos|wpe", re.I)
# Matrices that mlx-lm's architecture multiplies by itself (``x @ module.weight.T``) instead of calling the module, by
# the file of the architecture: there is no call to replace. A * stands for any module path.
_READ_DIRECTLY = {
    "gemma3n": ("*.altup.*_coefs",),
    "kimi_k3": ("*_res_proj",),
    "llama4_text": ("*.embed_tokens",),
    "minicpm": ("*.embed_tokens",),
    "seed_oss": ("*.embed_tokens",),
}
_LAYER = re.compile(r"\.(\d+)\.")
TOO_SMALL = "too small to gain"
NOT_CALLED = "whose weight mlx-lm reads without calling the module"
VETOED = "which mlx-lm does not quantize"


@dataclass(frozen=True)
class Matrix:
    """A module of the model that holds one matrix (or one per expert or head).

    Attributes:
        kind: ``linear``, ``embedding``, ``switch`` (experts) or ``multi`` (one matrix per head).
        shape: (..., out, in).
        kept: Why it stays in full precision whatever a recipe says; None if a recipe decides.
    """

    path: str
    kind: str
    role: Role
    shape: tuple[int, ...]
    kept: str | None = None

    @property
    def quantizable(self) -> bool:
        """Whether a recipe decides on it."""
        return self.kept is None and self.role in QUANTIZED_ROLES

    @property
    def layer(self) -> int | None:
        """Index of the layer that holds it, None outside of layers."""
        found = _LAYER.search(f".{self.path}.")
        return int(found[1]) if found else None


def matrices(model: nn.Module) -> dict[str, Matrix]:
    """Every module of ``model`` that holds a matrix of a kind that tq can replace, by path, in the model's order."""
    modules = dict(model.named_modules())
    parameters = cast(list[tuple[str, mx.array]], tree_flatten(model.parameters()))
    paths = [name.removesuffix(".weight") for name, _ in parameters if name.endswith(".weight")]
    kinds = {path: kind for path in paths if (kind := _kind(modules.get(path)))}
    shapes = {path: tuple(modules[path].weight.shape) for path in kinds}
    context = _Context.of(kinds, shapes)
    found = {}
    for path, kind in kinds.items():
        role = _role(path, kind, shapes[path], context)
        found[path] = Matrix(path, kind, role, shapes[path], _kept(model, path, modules[path]))
    return found


def _kind(module: nn.Module | None) -> str | None:
    """The kind of a module whose call tq can replace: the exact types, as a subclass may compute something else."""
    from mlx_lm.models.mla import MultiLinear
    from mlx_lm.models.switch_layers import SwitchLinear

    kinds = {nn.Linear: "linear", nn.Embedding: "embedding", SwitchLinear: "switch", MultiLinear: "multi"}
    return kinds.get(type(module))


def _kept(model: nn.Module, path: str, module: nn.Module) -> str | None:
    """Why a matrix is never quantized, or None. Architectures of mlx-lm name modules that must stay as they are."""
    if min(module.weight.shape[-2:]) < MIN_FEATURES:
        return TOO_SMALL
    if is_read_directly(model, path):
        return NOT_CALLED
    predicate = getattr(model, "quant_predicate", None)
    return VETOED if predicate is not None and predicate(path, module) is False else None


def is_read_directly(model: nn.Module, path: str) -> bool:
    """Whether the architecture multiplies with the weight of a module without calling the module."""
    architecture = type(model).__module__.rpartition(".")[2]
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in _READ_DIRECTLY.get(architecture, ()))


@dataclass(frozen=True)
class _Context:
    """What the rest of a model says about one matrix.

    Attributes:
        n_experts: Numbers of experts that a router may choose from.
        expert_blocks: Paths of the blocks that hold experts.
        vocabularies: Rows of the token embeddings.
    """

    n_experts: frozenset[int]
    expert_blocks: frozenset[str]
    vocabularies: frozenset[int]

    @classmethod
    def of(cls, kinds: dict[str, str], shapes: dict[str, tuple[int, ...]]) -> "_Context":
        experts = [path for path, kind in kinds.items() if kind == "switch" and not _ATTENTION.search(path)]
        n_experts = {shapes[path][0] for path in experts}
        if lists := [int(found[1]) for path in kinds if (found := _EXPERT_LIST.search(path))]:
            n_experts.add(max(lists) + 1)
        tokens = [path for path, kind in kinds.items() if kind == "embedding" and not _is_positions(path)]
        return cls(
            frozenset(n_experts),
            frozenset(path.rsplit(".", 2)[0] for path in experts),
            frozenset(shapes[path][0] for path in tokens),
        )


def _role(path: str, kind: str, shape: tuple[int, ...], context: _Context) -> Role:
    *scope, name = parts = path.split(".")
    if kind == "embedding":
        return Role.OTHER if _is_positions(path) else Role.EMBEDDING
    in_attention = any(_ATTENTION.search(part) for part in scope)
    if (kind == "switch" and not in_attention) or _EXPERT_LIST.search(path):
        return Role.EXPERT_DOWN if name in _DOWN else Role.EXPERT
    if _is_router(scope, name, shape[-2], context.n_experts):
        return Role.ROUTER
    if not any(part.isdigit() for part in parts):  # outside of the layers
        return Role.HEAD if shape[-2] in context.vocabularies else Role.OTHER
    if any(_SHARED_EXPERT.search(part) for part in scope):
        return Role.SHARED_EXPERT
    if (name in _FEED_FORWARD and not in_attention) or ".".join(scope) in context.expert_blocks:
        return Role.MLP
    if not any(_MIXES_TOKENS.search(part) for part in parts):
        return Role.MLP
    return Role.VALUE if name in _VALUE else Role.ATTENTION


def _is_positions(path: str) -> bool:
    """Whether an embedding is a table of positions, which is small and added to every activation."""
    return bool(_POSITIONS.search(path.rpartition(".")[2]))


def _is_router(scope: list[str], name: str, rows: int, n_experts: frozenset[int]) -> bool:
    """Whether a matrix decides which experts run: by its name or its block, or a gate with one output per expert."""
    if any("router" in part for part in (*scope, name)) or "gate" in scope:
        return True
    # One output: the gate of a shared expert.
    return bool(n_experts) and rows in n_experts | {1} and (name == "gate" or name.endswith("expert_gate"))
