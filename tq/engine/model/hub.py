"""A model's name to a local path: a path stays as it is, a Hugging Face Hub id is downloaded into the Hub's cache.

HF_HOME, HF_TOKEN, HF_HUB_OFFLINE and HF_ENDPOINT mean what they mean to huggingface_hub.
"""

import errno
import logging
import re
from pathlib import Path
from typing import Any

from tq.errors import TQError, UsageError

# What mlx-lm fetches, without *.py: no pickle (*.bin, *.pt), no GGUF, no second copy of the weights.
ALLOW_PATTERNS = [
    "*.json",
    "model*.safetensors",
    "tokenizer.model",
    "*.tiktoken",
    "tiktoken.model",
    "*.txt",
    "*.jsonl",
    "*.jinja",
]
CODE_PATTERN = "*.py"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
CONNECT_SECONDS = 5.0

logger = logging.getLogger(__name__)


def resolve(model: str, revision: str | None = None, *, trust_remote_code: bool = False) -> Path:
    """The local path of a model: a folder or file, or the snapshot of a Hub id.

    Where the Hub cannot be reached but the snapshot is cached, the cached one is used and a warning logged.

    Args:
        model: A local path, or a Hub id "organization/name". An existing path wins and needs no network.
        revision: A branch, tag or commit of a Hub id.
        trust_remote_code: Fetch the repository's Python files too.

    Raises:
        UsageError: A revision for a local path.
        TQError: No such path or repository, no access, no network, no space.
    """
    path = Path(model).expanduser()
    if model and path.exists():
        if revision is not None:
            raise UsageError(f"{model} is a local path: --revision is for ids of the Hugging Face Hub")
        return path
    if not is_hub_id(model):
        hint = "give a model folder, a .gguf file, or a Hugging Face Hub id such as mlx-community/Qwen3-0.6B-bf16"
        raise TQError(f"no such model: {model}", hint)
    return download(model, revision, ALLOW_PATTERNS + [CODE_PATTERN] * trust_remote_code)


def is_hub_id(model: str) -> bool:
    """Whether a name that is no local path can be a Hub repository."""
    return HUB_ID.fullmatch(model) is not None and not model.endswith((".gguf", ".safetensors"))


def download(model: str, revision: str | None, patterns: list[str]) -> Path:
    """The snapshot of a Hub id, with the files that these patterns name. See `resolve`."""
    import huggingface_hub
    from huggingface_hub import constants

    def snapshot(local_files_only: bool) -> Path:
        folder = huggingface_hub.snapshot_download(
            model, revision=revision, allow_patterns=patterns, local_files_only=local_files_only
        )
        return Path(folder)

    offline = constants.HF_HUB_OFFLINE
    try:
        if not offline:
            # snapshot_download has no limit of its own on this first request.
            huggingface_hub.HfApi().model_info(model, revision=revision, timeout=CONNECT_SECONDS)
        return snapshot(local_files_only=offline)
    except Exception as error:
        if _is_network_error(error) and not offline:
            try:
                path = snapshot(local_files_only=True)
            except FileNotFoundError:  # what LocalEntryNotFoundError is: not, or not wholly, in the cache
                pass
            else:
                logger.warning("the Hugging Face Hub cannot be reached: using the cached %s", path)
                return path
        explained = _explain(error, model, revision)
        if explained is None:
            raise
        raise explained from error


def safetensors_metadata(model: str, revision: str | None) -> Any:
    """The headers of a repository's shards (`huggingface_hub.SafetensorsRepoMetadata`), fetched by ranged requests.

    Raises:
        TQError: There are no safetensors, a header is damaged, no access, or no network.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE:
        hint = "unset HF_HUB_OFFLINE to read its headers, or give a local path"
        raise TQError(f"{model} is not in the Hub's cache, and HF_HUB_OFFLINE forbids the network", hint)
    try:
        return huggingface_hub.get_safetensors_metadata(model, revision=revision)
    except errors.NotASafetensorsRepoError as error:
        raise TQError(
            f"{model} has no safetensors weights", "look for a safetensors version, or give a .gguf file"
        ) from error
    except errors.SafetensorsParsingError as error:
        raise TQError(f"a safetensors header of {model} is damaged: {str(error).splitlines()[0]}") from error
    except Exception as error:
        explained = _explain(error, model, revision)
        if explained is None:
            raise
        raise explained from error


def _explain(error: Exception, model: str, revision: str | None) -> TQError | None:
    """One sentence for what huggingface_hub raised; None for what it should never raise."""
    from huggingface_hub import constants, errors

    url = f"{constants.ENDPOINT}/{model}"
    if isinstance(error, errors.GatedRepoError):
        hint = f"accept its terms at {url} and set HF_TOKEN to a token of that account"
        return TQError(f"{model} is gated: its owner must grant you access", hint)
    if isinstance(error, errors.RevisionNotFoundError):
        return TQError(f"{model} has no revision {revision}", f"see {url}/tree/main for its branches and tags")
    if isinstance(error, errors.RepositoryNotFoundError):
        hint = "check the spelling; a private repository needs HF_TOKEN"
        return TQError(f"{model} is neither a local path nor a repository of the Hugging Face Hub", hint)
    if isinstance(error, errors.DisabledRepoError):
        return TQError(f"{model} has been disabled on the Hugging Face Hub")
    if isinstance(error, errors.HFValidationError):
        return TQError(f"no such model: {model} is neither a local path nor a valid Hugging Face Hub id")
    if isinstance(error, errors.LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE:
        part = "only partly" if type(error).__name__ == "IncompleteSnapshotError" else "not"  # newer versions only
        hint = "unset HF_HUB_OFFLINE to download it, or give a local path"
        return TQError(f"{model} is {part} in the Hub's cache, and HF_HUB_OFFLINE forbids the network", hint)
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        return TQError(f"the Hugging Face Hub answered {status} for {model}", "try again later; check HF_TOKEN")
    if _is_network_error(error):
        hint = "check the network, give a local path, or set HF_HUB_OFFLINE=1 to use what is cached"
        return TQError(f"{model} is no local path, and the Hugging Face Hub cannot be reached", hint)
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else error.strerror or str(error)
        hint = "free some space or set HF_HOME to another disk; the download goes on where it stopped"
        return TQError(f"{model} cannot be stored in {constants.HF_HUB_CACHE}: {reason}", hint if full else None)
    return None


def _is_network_error(error: BaseException | None) -> bool:
    """Whether a failed connection is at the root. The HTTP library differs between versions of huggingface_hub."""
    from huggingface_hub.errors import HfHubHTTPError

    while error is not None:
        if isinstance(error, HfHubHTTPError):
            return False  # an answer came
        names = {kind.__name__ for kind in type(error).__mro__}
        if names & {"TransportError", "ConnectionError", "TimeoutError", "ConnectTimeout", "gaierror", "Timeout"}:
            return True
        error = error.__cause__
    return False
