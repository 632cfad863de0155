"""What a tensor is for, by generic rules over module types and paths. No architecture has code here."""

import fnmatch
import re
from dataclasses import dataclass
from enum import StrEnum

import mlx.nn as nn


class Role(StrEnum):
    """What a tensor is for. Recipes give bits by role."""

    ATTENTION = "attention"  # all that mixes tokens: attention, its latent projections, linear attention, state spaces
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
    Role.MLP,
    Role.EXPERT,
    Role.EXPERT_DOWN,
    Role.SHARED_EXPERT,
    Role.EMBEDDING,
    Role.HEAD,
)
MIN_FEATURES = 32  # a matrix with fewer inputs or outputs saves nothing

# Names of the second matrix of an expert, which is the most sensitive one.
_DOWN = {"down_proj", "w2", "fc2", "output_linear", "down"}
# Names that belong to a feed-forward block even inside a block called "mixer" (Nemotron-H names every block so).
_FEED_FORWARD = {"gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2", "w1", "w2", "w3", "c_fc"}
_MIXES_TOKENS = re.compile(
    r"attn|attention|mixer|mamba|ssm|conv|temporal|recurrent|rglru|time_mix|delta|kda|lightning|indexer|mla", re.I
)
_ROUTER = re.compile(r"(^|_)(gate|router|routing|routers?)(_|$)|router|^gate$", re.I)
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


@dataclass(frozen=True)
class Matrix:
    """A module of the model that holds one matrix (or one per expert or head).

    Attributes:
        kind: ``linear``, ``embedding``, ``switch`` (experts) or ``multi`` (one matrix per head).
        shape: (..., out, in).
    """

    path: str
    kind: str
    role: Role
    shape: tuple[int, ...]

    @property
    def layer(self) -> int | None:
        """Index of the layer that holds it, None outside of layers."""
        found = _LAYER.search(f".{self.path}.")
        return int(found[1]) if found else None


def matrices(model: nn.Module) -> dict[str, Matrix]:
    """Every module of ``model`` that tq can replace, by path, with its role."""
    kinds = {path: kind for path, module in model.named_modules() if (kind := _kind(module))}
    modules = dict(model.named_modules())
    n_experts = {modules[p].weight.shape[0] for p, kind in kinds.items() if kind == "switch"}
    vocabulary = max((modules[p].weight.shape[0] for p, kind in kinds.items() if kind == "embedding"), default=0)
    found = {}
    for path, kind in kinds.items():
        shape = tuple(modules[path].weight.shape)
        role = _role(path, kind, shape, n_experts, vocabulary)
        if not _allowed(model, path, modules[path]):
            role = Role.ROUTER if role == Role.ROUTER else Role.OTHER
        found[path] = Matrix(path, kind, role, shape)
    return found


def _kind(module: nn.Module) -> str | None:
    """The kind of a module whose call tq can replace: the exact types, as a subclass may compute something else."""
    from mlx_lm.models.mla import MultiLinear
    from mlx_lm.models.switch_layers import SwitchLinear

    kinds = {nn.Linear: "linear", nn.Embedding: "embedding", SwitchLinear: "switch", MultiLinear: "multi"}
    return kinds.get(type(module))


def _allowed(model: nn.Module, path: str, module: nn.Module) -> bool:
    """Whether a module can be replaced, and mlx-lm's own veto: architectures name modules that must stay as they are."""
    architecture = type(model).__module__.rpartition(".")[2]
    if any(fnmatch.fnmatchcase(path, pattern) for pattern in _READ_DIRECTLY.get(architecture, ())):
        return False
    predicate = getattr(model, "quant_predicate", None)
    return predicate is None or predicate(path, module) is not False


def _role(path: str, kind: str, shape: tuple[int, ...], n_experts: set[int], vocabulary: int) -> Role:
    parts = path.split(".")
    name = parts[-1]
    if min(shape[-2:]) < MIN_FEATURES:
        return Role.ROUTER if _is_router(name, shape, n_experts) else Role.OTHER
    if kind == "embedding":
        # The token embedding; a table of positions is small and stays.
        return Role.EMBEDDING if shape[0] == vocabulary else Role.OTHER
    if kind == "switch":
        return Role.EXPERT_DOWN if name in _DOWN else Role.EXPERT
    if _is_router(name, shape, n_experts):
        return Role.ROUTER
    in_layer = any(part.isdigit() for part in parts)
    if not in_layer:
        return Role.HEAD if vocabulary and shape[0] >= vocabulary else Role.OTHER
    if any("shared_expert" in part or "shared_mlp" in part for part in parts):
        return Role.SHARED_EXPERT
    scope = parts[:-1]
    if name in _FEED_FORWARD and not any("attn" in part or "attention" in part for part in scope):
        return Role.MLP
    if any(_MIXES_TOKENS.search(part) for part in parts):
        return Role.ATTENTION
    return Role.MLP


def _is_router(name: str, shape: tuple[int, ...], n_experts: set[int]) -> bool:
    return bool(n_experts) and shape[0] in n_experts | {1} and bool(_ROUTER.search(name)) and name != "gate_proj"
