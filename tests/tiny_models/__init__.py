"""A tiny random model of every model type that the installed mlx-lm can construct."""

import ast
import functools
import importlib
import importlib.util
import json
import pkgutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .dense import DENSE
from .experts import EXPERT_MODELS
from .recurrent import RECURRENT
from .shared import join

_TABLE = {
    name: join(fields, model_type=name) for table in (DENSE, EXPERT_MODELS, RECURRENT) for name, fields in table.items()
}
_ONLY_ON_METAL = {
    "bitnet": "its linear layers are a Metal kernel without a fallback",
    "muse_spark": "its norms and its expert routing are Metal kernels without a fallback",
}
# Cannot run here. All but olmo can be built and written all the same.
UNSUPPORTED: dict[str, str] = {
    "olmo": "mlx-lm exits without ai2-olmo, and then adds the string 'causal' to attention scores",
    "phi3small": "mlx-lm writes to the logits of tokens 100256 to 100351, past the end of a tiny vocabulary",
    **({} if mx.metal.is_available() else _ONLY_ON_METAL),
}
CONFIGS: dict[str, dict[str, Any]] = {name: fields for name, fields in _TABLE.items() if name not in UNSUPPORTED}
# Decoding one token after a prompt gives other logits than the prompt and that token at once.
DECODE_DIFFERS: dict[str, str] = {
    "gemma3n": "layers that share the keys of earlier layers make their own when there is no cache",
    "plamo3": "the mask of a prompt admits one token more than the rotating cache keeps",
}
# `mlx_lm.utils.load_model` of a written checkpoint gives other logits than the model that was written.
RELOAD_DIFFERS: dict[str, str] = {}

# Parameters that need a scale of their own, by the end of their path: (names, low, high).
_RANGES: list[tuple[tuple[str, ...], float, float]] = [
    # Slow decay, so that the first tokens of a prompt still count at its end.
    (("dt_bias", "dt_proj.bias", "recurrent_param"), -4.0, -2.0),
    # The steps of keys and values that are rounded to integers, and of weights that are packed already.
    (("quant_key_scale", "quant_value_scale", ".scales", ".weight_scale"), 0.02, 0.08),
    ((".biases",), -0.12, -0.04),
]


@functools.cache
def model_types() -> list[str]:
    """Return the names of the modules of `mlx_lm.models` that define `Model` and `ModelArgs`, unimported."""
    package = importlib.util.find_spec("mlx_lm")
    folder = Path(package.submodule_search_locations[0], "models")
    return sorted(
        module.name
        for module in pkgutil.iter_modules([str(folder)])
        if {"Model", "ModelArgs"} <= _top_level_names(folder / f"{module.name}.py")
    )


def _top_level_names(source: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
    return names


def config(model_type: str) -> dict[str, Any]:
    """Return a copy of the config.json of a type, of UNSUPPORTED ones too."""
    return join(_TABLE[model_type])


def build(model_type: str, seed: int = 0) -> nn.Module:
    """Return the model with random weights, in evaluation mode; KeyError for a type without a configuration.

    Weights are float32, and evaluated. Only types whose layers are packed by definition (bitnet,
    prism_hadamard_qwen35) have other types. Sets the global random seed of mlx.
    """
    module = importlib.import_module(f"mlx_lm.models.{model_type}")
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(join(_TABLE[model_type])))
    weights = {path: _random_parameter(path, value) for path, value in tree_flatten(model.parameters())}
    if hasattr(model, "sanitize"):  # some types normalise weights when they load them
        weights = model.sanitize(weights)
    model.load_weights(list(weights.items()))
    model.eval()
    mx.eval(model.parameters())
    return model


def _random_parameter(path: str, value: mx.array) -> mx.array:
    """Return `value`, or a random array in its place where mlx-lm starts with a constant."""
    shape, dtype = value.shape, value.dtype
    if dtype == mx.uint32:
        return mx.random.randint(0, 2**31, shape).astype(dtype)
    if dtype == mx.uint8:  # four ternary digits of 2 bits
        return (mx.random.randint(0, 3, (*shape, 4)) * mx.array([1, 4, 16, 64])).sum(-1).astype(dtype)
    if path.endswith(".signs"):
        return mx.where(mx.random.uniform(shape=shape) < 0.5, -1.0, 1.0)
    for names, low, high in _RANGES:
        if path.endswith(names):
            return mx.random.uniform(low, high, shape).astype(dtype)
    if (value == value.flatten()[0]).all():
        return value + 0.1 * mx.random.normal(shape)
    return value


def write_checkpoint(folder: Path | str, model_type: str, seed: int = 0) -> nn.Module:
    """Write `build(model_type, seed)` to `folder` as mlx-lm would, without a tokenizer, and return that model."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = build(model_type, seed)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(_TABLE[model_type], indent=4, sort_keys=True))
    return model
