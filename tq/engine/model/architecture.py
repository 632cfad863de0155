"""From a config and a source to the model that mlx-lm would build, its weights under its own names, all of it lazy.

Nothing is read here but headers: MLX arrays are graphs until they are evaluated, and so are mlx-lm's ``sanitize``
functions, which rename, split and stack tensors. A tensor is read when the converter evaluates it.
"""

import difflib
import importlib.util
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from tq.engine.model.dequantize import dequantize_modules, dequantize_raw
from tq.engine.model.roles import Matrix, Role, matrices
from tq.engine.model.sources import Source
from tq.errors import TQError

# Parts of a checkpoint that mlx-lm's text models leave out.
_OTHER_MODALITIES = ("vision", "visual", "audio", "multi_modal", "mm_projector", "image_newline", "sound")


@dataclass(repr=False)  # to show the arrays would read them
class Outline:
    """A source as mlx-lm sees it.

    Attributes:
        model: The model, its parameters never evaluated.
        weights: Lazy arrays by parameter path, in the order of the model's parameters.
        matrices: Modules that can be quantized, by path.
        tied_head: The embedding is the output head too.
        notes: What a person should know.
    """

    model: nn.Module
    weights: dict[str, mx.array]
    matrices: dict[str, Matrix]
    tied_head: bool
    notes: list[str]


def parameters(model: nn.Module) -> dict[str, mx.array]:
    """Every parameter of a model by path."""
    return cast(dict[str, mx.array], dict(tree_flatten(model.parameters())))


def build_model(config: dict, folder: Path | None = None, trust_remote_code: bool = False) -> nn.Module:
    """The mlx-lm model of a config, with lazy random parameters.

    Raises:
        TQError: mlx-lm has no such architecture, the config is not complete, or it wants code of its own to run.
    """
    from mlx_lm.utils import _get_classes

    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise TQError("config.json has no model_type", "is this a language model in Hugging Face format?")
    try:
        if model_file := config.get("model_file"):
            classes = _custom_classes(folder, model_file, trust_remote_code)
        else:
            classes = _get_classes(config)
    except ValueError:
        raise TQError(f"mlx-lm has no architecture {model_type!r}", _nearest_architecture(model_type)) from None
    model_class, args_class = classes
    try:
        return model_class(args_class.from_dict(config))
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise TQError(f"config.json does not describe a {model_type} model: {error}") from error


def _custom_classes(folder: Path | None, model_file: str, trust_remote_code: bool) -> tuple[Any, Any]:
    if not trust_remote_code or folder is None:
        raise TQError(
            f"this model wants to run code of its own ({model_file})",
            "if you trust its authors, add --trust-remote-code",
        )
    spec = importlib.util.spec_from_file_location("custom_model", folder / model_file)
    if spec is None or spec.loader is None or not (folder / model_file).is_file():
        raise TQError(f"config.json names {model_file}, which is not there")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Model, module.ModelArgs


def architectures() -> list[str]:
    """Names of mlx-lm's model files."""
    import mlx_lm.models

    return sorted(module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__))


def _nearest_architecture(model_type: str) -> str:
    import mlx_lm

    near = difflib.get_close_matches(model_type, architectures(), 3)
    similar = f"similar names: {', '.join(near)}; " if near else ""
    return f"{similar}mlx-lm {mlx_lm.__version__} is installed, a newer one may have it"


def outline(source: Source, trust_remote_code: bool = False) -> Outline:
    """Read the headers of ``source`` and lay its tensors out as mlx-lm's model has them.

    Raises:
        TQError: The architecture is unknown, or tensors are missing or have another shape than the config says.
    """
    model = build_model(source.config, source.folder, trust_remote_code)
    raw = dequantize_raw(source.weights(), source.config)
    try:
        weights = model.sanitize(raw) if hasattr(model, "sanitize") else raw
    except (KeyError, IndexError, ValueError) as error:
        kind = source.config["model_type"]
        raise TQError(f"the tensors of {source.name} are not those of a {kind} model: {error}") from error
    found = matrices(model)
    weights = dequantize_modules(weights, source.config, {m.path: m.shape for m in found.values()})
    packed = [
        name for name in weights if name.endswith(".scales") and name.removesuffix("scales") + "weight" in weights
    ]
    if packed:
        raise TQError(
            f"{source.name} holds packed matrices of its own kind ({packed[0].removesuffix('.scales')})",
            "convert the model that it was made from",
        )
    notes = _check(model, weights, source)
    ordered = {name: weights[name] for name in parameters(model)}
    # A head that is a parameter and not a module is none of the matrices.
    has_head = any(m.role == Role.HEAD for m in found.values()) or "lm_head" in ordered
    return Outline(model, ordered, found, tied_head=not has_head, notes=notes)


def _check(model: nn.Module, weights: dict[str, mx.array], source: Source) -> list[str]:
    """Compare the weights with the parameters that the model wants. Returns notes on what is left out."""
    wanted = parameters(model)
    missing = [name for name in wanted if name not in weights]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise TQError(f"{source.name} has no tensor for {missing[0]}{more}", "is a shard missing?")
    for name, parameter in wanted.items():
        if tuple(weights[name].shape) != tuple(parameter.shape):
            raise TQError(
                f"{name} has shape {tuple(weights[name].shape)}, but config.json wants {tuple(parameter.shape)}"
            )
    notes = []
    other = [h for name, h in source.headers.items() if any(part in name for part in _OTHER_MODALITIES)]
    if other:
        size = sum(h.size_bytes for h in other) / 1e9
        notes.append(f"left out: {len(other)} vision or audio tensors ({size:.2f} GB), which mlx-lm does not run")
    extra = [name for name in weights if name not in wanted and not any(p in name for p in _OTHER_MODALITIES)]
    if extra:
        notes.append(f"left out: {len(extra)} tensors that the model does not use, such as {extra[0]}")
    return notes
