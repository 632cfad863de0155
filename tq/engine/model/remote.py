"""A model of the Hugging Face Hub without its weights: its config, and the headers of its shards by ranged requests."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tq.engine.model import hub
from tq.engine.model.safetensors import DTYPES, TensorHeader, read_folder_headers, size_bytes
from tq.engine.model.sources import FolderSource, GGUFSource, Source, read_config
from tq.errors import TQError

if TYPE_CHECKING:
    import mlx.core as mx

# What `read_config` looks at.
CONFIG_FILES = ["config.json", "generation_config.json", "hf_quant_config.json"]


class RemoteSource(Source):
    """A repository of the Hub of which nothing but headers is known. It can be planned, not converted.

    Raises:
        TQError: There is no such repository, no access, no network, or a header contradicts itself.
    """

    folder = None

    def __init__(self, model: str, revision: str | None = None):
        self.name = self.base_model = model
        folder = hub.download(model, revision, CONFIG_FILES)
        self.revision = folder.name
        self.config: dict[str, Any] = read_config(folder)
        self.headers = _headers(hub.safetensors_metadata(model, self.revision), model)

    def weights(self) -> "dict[str, mx.array]":
        """Arrays that have a shape and a type, and no data."""
        import mlx.core as mx

        return {
            name: mx.broadcast_to(mx.zeros((), getattr(mx, DTYPES[header.dtype][1])), header.shape)
            for name, header in self.headers.items()
        }

    def materialize(self, array: "mx.array") -> "mx.array":
        raise TQError(f"the weights of {self.name} are not here: only their headers were read")

    def copy_side_files(self, folder: Path) -> None:
        raise TQError(f"the files of {self.name} are not here: only their headers were read")

    def fingerprint(self) -> str:
        return str(self.revision)


def open_headers(model: str, revision: str | None = None, trust_remote_code: bool = False) -> Source:
    """A model to plan: a folder or file as `open_source` opens it, packed ones too, or a Hub id of which only headers
    are fetched. A snapshot that is in the Hub's cache with its weights is read there.

    Raises:
        TQError: It does not exist, is not a model, or cannot be read.
    """
    path = Path(model).expanduser()
    if path.exists() or not hub.is_hub_id(model):
        path = hub.resolve(model, revision, trust_remote_code=trust_remote_code)  # for its errors
        if path.is_dir():
            return FolderSource(path, name=model, trust_remote_code=trust_remote_code)
        if path.suffix != ".gguf":
            raise TQError(f"{model} is not a model: give a folder, a .gguf file or a Hub id")
        return GGUFSource(path, name=model)
    folder = hub.download(model, revision, CONFIG_FILES)
    try:
        read_folder_headers(folder)
    except TQError:
        return RemoteSource(model, revision)
    return FolderSource(folder, name=model, base_model=model, revision=folder.name, trust_remote_code=trust_remote_code)


def _headers(metadata: Any, model: str) -> dict[str, TensorHeader]:
    """As `read_folder_headers`, of what huggingface_hub read."""
    found: dict[str, TensorHeader] = {}
    for file, shard in metadata.files_metadata.items():
        for name, tensor in shard.tensors.items():
            if metadata.weight_map.get(name, file) != file:
                continue
            shape = tuple(tensor.shape)
            if tensor.dtype not in DTYPES:
                raise TQError(f"{model}: tensor {name} has dtype {tensor.dtype}; tq reads {', '.join(DTYPES)}")
            size = size_bytes(tensor.dtype, shape)
            if tensor.data_offsets[1] - tensor.data_offsets[0] != size:
                raise TQError(f"{model}: tensor {name} of {file} does not have the bytes of its shape {shape}")
            found[name] = TensorHeader(name, tensor.dtype, shape, size, Path(file), tensor.data_offsets[0])
    if not found:
        raise TQError(f"{model} has no tensors in safetensors files")
    return found
