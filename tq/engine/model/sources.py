"""What a model is converted from: a Hugging Face folder or a GGUF file, as config, headers and lazy arrays."""

import hashlib
import json
import shutil
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tq.engine.model import hub
from tq.engine.model.safetensors import SHARD_PATTERN, TensorHeader, read_folder_headers
from tq.errors import TQError

if TYPE_CHECKING:
    import mlx.core as mx

__all__ = ["FolderSource", "GGUFSource", "Source", "TensorHeader", "open_source", "read_config"]

PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}
SIDE_FILES = ("*.json", "*.jsonl", "*.jinja", "*.txt", "*.tiktoken", "*.model", "LICENSE*", "NOTICE*", "USE_POLICY*")
# Made anew for the result, or true of the source only.
NOT_SIDE_FILES = {"config.json", "hf_quant_config.json", "quantize_config.json", "quant_config.json"}
OWN_MODES = ("tq", "turboquant")


class Source(ABC):
    """A model to convert.

    Attributes:
        name: What the user typed.
        folder: Where config.json is, or None.
        base_model: The Hub id that the model card names, or None.
        revision: The commit of a Hub snapshot, or None.
        config: config.json as mlx-lm reads it.
        headers: Every tensor by name, without its data.
    """

    name: str
    folder: Path | None
    base_model: str | None
    revision: str | None
    config: dict[str, Any]
    headers: dict[str, TensorHeader]

    @abstractmethod
    def weights(self) -> "dict[str, mx.array]":
        """Lazy arrays by source name, in the source's dtypes (FP8 as uint8).

        An array that was evaluated stays in memory while anything refers to it, this dict too: take arrays out of
        it with ``pop``.
        """

    @abstractmethod
    def materialize(self, array: "mx.array") -> "mx.array":
        """The data of an array of ``weights()``."""

    @abstractmethod
    def copy_side_files(self, folder: Path) -> None:
        """Puts the tokenizer, chat template, generation config and license into ``folder``."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash that changes when a file of the weights, or the config, changes: names, sizes and mtimes."""


class FolderSource(Source):
    """A folder with config.json and safetensors."""

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        base_model: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ):
        self.folder: Path = folder
        self.name = name
        self.base_model = base_model
        self.revision = revision
        self._trust_remote_code = trust_remote_code
        _check_model_folder(folder)
        self.config = read_config(folder)
        if not trust_remote_code and (module := self.config.get("model_file")):
            raise TQError(
                f"{self.name} runs its own code ({module}) to build the model",
                "give --trust-remote-code if you trust it",
            )
        self.headers = read_folder_headers(folder)

    def weights(self) -> "dict[str, mx.array]":
        import mlx.core as mx

        arrays: dict[str, mx.array] = {}
        for path in dict.fromkeys(header.path for header in self.headers.values()):
            try:
                # Reads the header; the data are read when an array is evaluated.
                shard = cast("dict[str, mx.array]", mx.load(str(path)))
            except RuntimeError as error:
                raise TQError(f"{path} cannot be read by MLX: {error}") from error
            arrays.update((name, shard[name]) for name in shard if self.headers[name].path == path)
        return {name: arrays[name] for name in self.headers}

    def materialize(self, array: "mx.array") -> "mx.array":
        return array

    def copy_side_files(self, folder: Path) -> None:
        patterns = (*SIDE_FILES, hub.CODE_PATTERN) if self._trust_remote_code else SIDE_FILES
        for pattern in (*patterns, "additional_chat_templates/*.jinja"):
            for path in self.folder.glob(pattern):
                if path.is_file() and path.name not in NOT_SIDE_FILES and not path.name.endswith(".index.json"):
                    target = folder / path.relative_to(self.folder)
                    target.parent.mkdir(exist_ok=True)
                    shutil.copyfile(path, target)

    def fingerprint(self) -> str:
        files = {header.path for header in self.headers.values()} | {self.folder / "config.json"}
        return _fingerprint(files)


class GGUFSource(Source):
    """One GGUF file. Its tensors are read and dequantized one at a time, by ``materialize``."""

    folder = None

    def __init__(self, path: Path, *, name: str):
        from tq.engine.model.gguf import GGUFFile

        self.path = path
        self.name = name
        self.file = GGUFFile(path)
        self.base_model = self.file.base_model
        self.revision = None
        self.config = self.file.config
        self.headers = {
            name: TensorHeader(name, _gguf_dtype(tensor.quantization), tuple(tensor.shape), tensor.size_bytes, path)
            for name, tensor in self.file.tensors.items()
        }
        self._placeholders: dict[int, tuple[str, mx.array]] = {}

    def weights(self) -> "dict[str, mx.array]":
        """Placeholders: lazy zeros of the tensors' shapes, which ``materialize`` recognises by identity."""
        import mlx.core as mx

        dtypes = {"F32": mx.float32, "BF16": mx.bfloat16, "F16": mx.float16}
        arrays = {name: mx.zeros(header.shape, dtypes[header.dtype]) for name, header in self.headers.items()}
        # The array is kept beside its id, because the id of a dead object is given to another.
        self._placeholders = {id(array): (name, array) for name, array in arrays.items()}
        return arrays

    def materialize(self, array: "mx.array") -> "mx.array":
        import mlx.core as mx

        if id(array) not in self._placeholders:
            # Anything derived from a placeholder would be zeros.
            raise ValueError(f"an array of shape {array.shape} is none of the tensors of {self.path}")
        name, placeholder = self._placeholders[id(array)]
        return mx.array(self.file.tensors[name].read()).astype(placeholder.dtype)

    def copy_side_files(self, folder: Path) -> None:
        self.file.write_tokenizer(folder)

    def fingerprint(self) -> str:
        return _fingerprint({self.path})


def open_source(model: str, revision: str | None = None, trust_remote_code: bool = False) -> Source:
    """Opens a model folder, a GGUF file, or a Hugging Face Hub id.

    Raises:
        TQError: It does not exist, is not a model, cannot be read, or was already converted.
    """
    path = hub.resolve(model, revision, trust_remote_code=trust_remote_code)
    if path.is_file():
        if path.suffix != ".gguf":
            hint = "give the folder that holds it" if path.suffix == ".safetensors" else None
            raise TQError(f"{model} is not a model: a file must be a .gguf", hint)
        return GGUFSource(path, name=model)
    if path == Path(model).expanduser():
        source = FolderSource(path, name=model, trust_remote_code=trust_remote_code)
    else:  # snapshots of the Hub's cache are named by their commit
        source = FolderSource(
            path, name=model, base_model=model, revision=path.name, trust_remote_code=trust_remote_code
        )
    mode = quantization_mode(source.config)
    if mode in OWN_MODES:
        raise TQError(f"{model} was already converted ({mode})", "convert the model that it was made from")
    return source


def quantization_mode(config: dict[str, Any]) -> str | None:
    """The ``mode`` of the config's quantization: "tq", "turboquant", one of MLX's, or None."""
    for key in ("quantization", "quantization_config"):
        if isinstance(quantization := config.get(key), dict) and "mode" in quantization:
            return quantization["mode"]
    return None


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as mlx-lm's ``load_config`` and ``load_model`` see it.

    Tagged floats become floats, ``eos_token_id`` comes from generation_config.json where that has one, and
    ``quantization_config`` is also found in ``text_config`` and in NVIDIA's hf_quant_config.json.

    Raises:
        TQError: A file is missing or not a JSON object, or there is no ``model_type``.
    """
    config = _untag_floats(_read_json_object(folder / "config.json"))
    if not isinstance(config.get("model_type"), str):
        raise TQError(f"{folder / 'config.json'} has no model_type, so its architecture is unknown")
    generation = folder / "generation_config.json"
    if generation.is_file() and (eos := _read_json_object(generation).get("eos_token_id")):
        config["eos_token_id"] = eos
    if "quantization_config" not in config:
        text = config.get("text_config")
        modelopt = folder / "hf_quant_config.json"
        if isinstance(text, dict) and "quantization_config" in text:
            config["quantization_config"] = text["quantization_config"]
        elif modelopt.is_file():
            config["quantization_config"] = _read_json_object(modelopt)
    return config


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TQError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise TQError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise TQError(f"{path} is not a JSON object")
    return parsed


def _untag_floats(value: Any) -> Any:
    """transformers writes a non-finite float as {"__float__": "Infinity"}."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
            return float(value["__float__"])
        return {key: _untag_floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_untag_floats(item) for item in value]
    return value


def _check_model_folder(folder: Path) -> None:
    """Says what a folder lacks to be a model, before anything in it is read."""
    has_weights = any(folder.glob(SHARD_PATTERN)) or any(folder.glob("*.safetensors.index.json"))
    missing = ["config.json"] * (not (folder / "config.json").is_file()) + [SHARD_PATTERN] * (not has_weights)
    if not missing:
        return
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles and not has_weights:
        raise TQError(
            f"{folder} holds pickle weights ({pickles[0]}), which tq does not read",
            "pickle can run code: look for a safetensors version of the model",
        )
    hint = None
    if gguf := sorted(folder.glob("*.gguf")):
        hint = f"give the file itself: {gguf[0]}"
    elif not has_weights and (other := sorted(path.name for path in folder.glob("*.safetensors"))):
        hint = f"it holds {other[0]}, which is not named {SHARD_PATTERN}"
    raise TQError(f"not a model folder: {folder} has no {' and no '.join(missing)}", hint)


def _gguf_dtype(quantization: str) -> str:
    """The dtype a GGUF tensor has here: quantized blocks are read as float16."""
    return quantization if quantization in ("F32", "BF16") else "F16"


def _fingerprint(files: set[Path]) -> str:
    facts = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files)
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
