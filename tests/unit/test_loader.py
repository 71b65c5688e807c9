"""Where a base comes from, what it is known as, and that it is told apart by its content."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from server.model import bundled
from server.model.attention import UnsupportedAttention, probe
from server.model.bundled import BaseUnavailable, convert_gguf
from server.model.kv import KVShape
from server.model.loader import directory_digest, load_base, resolve
from tests.families import save_model


@pytest.fixture(scope="module")
def folder(models: Path) -> Path:
    path = models / "loader-llama"
    return path if path.exists() else save_model("llama", path)


def test_a_directory_is_described(folder: Path, tmp_path: Path) -> None:
    base = load_base(str(folder), tmp_path, dtype="float32", device="cpu", extra_names=["acme/tiny"])
    assert base.info.name == folder.name
    assert {folder.name, "acme/tiny"} <= base.info.known_as
    assert base.info.model_class == "LlamaForCausalLM"
    assert base.info.linears["model.layers.0.self_attn.k_proj"].out_features == 32
    assert "lm_head" not in base.info.linears
    assert base.kv_shapes == dict.fromkeys(range(3), KVShape(2, 16, 16))
    assert base.eos_ids == {2}
    assert base.max_context == 512
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


def test_the_digest_follows_the_content_and_not_the_place(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert directory_digest(copy, tmp_path) == directory_digest(folder, tmp_path)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert directory_digest(copy, tmp_path) != directory_digest(folder, tmp_path)


@pytest.mark.parametrize("spec", ["/no/such/dir", "./nothing", "no-such-name", "missing.gguf", "a/b/c"])
def test_what_is_not_there_is_refused_with_its_name(spec: str, tmp_path: Path) -> None:
    with pytest.raises(BaseUnavailable, match=spec.replace(".", r"\.")):
        resolve(spec, tmp_path)


def test_pickled_weights_are_not_read(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "pickled")
    (copy / "model.safetensors").unlink()
    torch.save({}, copy / "pytorch_model.bin")
    with pytest.raises(BaseUnavailable):
        load_base(str(copy), tmp_path, device="cpu")


def test_a_changed_bundled_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "package"
    fake.mkdir()
    (fake / bundled.FILE).write_bytes(b"GGUF, but another")
    with pytest.raises(BaseUnavailable, match="SHA-256"):
        convert_gguf(fake / bundled.FILE, tmp_path, "x", expected_sha256=bundled.SHA256)
    assert not list((tmp_path / "models").glob("*")) if (tmp_path / "models").exists() else True


def test_attention_that_goes_another_way_is_refused(folder: Path, tmp_path: Path) -> None:
    base = load_base(str(folder), tmp_path, dtype="float32", device="cpu", kernels=False)
    base.model.config._attn_implementation = "eager"
    with pytest.raises(UnsupportedAttention, match="0 of 3 layers"):
        probe(base.model)


@pytest.mark.real
def test_a_gguf_file_loads_like_the_bundled_base(smollm2: Path, tmp_path: Path) -> None:
    """The same file by its path: converted, loaded, and bit-equal to the bundled base."""
    source = bundled._wheel_file()
    path, name, known_as = resolve(str(source), tmp_path)
    assert name in known_as
    assert name == source.stem
    ours, theirs = (directory_digest(one, tmp_path) for one in (path, smollm2))
    assert ours == theirs


@pytest.mark.parametrize("content", [None, "{", "{}"], ids=["missing", "not JSON", "empty"])
def test_a_base_without_a_usable_tokenizer_is_refused(content: str | None, folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "mute")
    (copy / "tokenizer.json").unlink()
    if content is not None:
        (copy / "tokenizer.json").write_text(content)
    with pytest.raises(BaseUnavailable, match="'mute' has no usable tokenizer: "):
        load_base(str(copy), tmp_path, device="cpu")


@pytest.mark.parametrize("family", ["gpt2", "gemma"])
def test_a_tokenizer_made_of_nothing_is_refused(family: str, tmp_path: Path) -> None:
    """For these families transformers makes one that knows special tokens only, and says nothing."""
    folder = save_model(family, tmp_path / family)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(BaseUnavailable, match="knows no text"):
        load_base(str(folder), tmp_path, device="cpu")


def test_truncated_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "short")
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(BaseUnavailable, match="'short' does not load: SafetensorError"):
        load_base(str(copy), tmp_path, device="cpu")


@pytest.mark.parametrize(("cuda", "reason"), [(None, "is a build for the CPU only"), ("13.0", "sees no usable GPU")])
def test_cuda_that_is_not_there_is_refused(
    cuda: str | None, reason: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(BaseUnavailable, match=f"device 'cuda' cannot be used: torch .* {reason}"):
        load_base(str(folder), tmp_path, device="cuda")
    assert load_base(str(folder), tmp_path, device="auto").device.type == "cpu"


@pytest.mark.parametrize("what", ["cuda", "tokenizer"])
def test_serve_says_why_it_cannot_start_and_ends_with_1(what: str, folder: Path, tmp_path: Path) -> None:
    """In a process of its own: what a user sees is the reason, and no traceback."""
    copy = shutil.copytree(folder, tmp_path / "mute")
    if what == "tokenizer":
        (copy / "tokenizer.json").unlink()
    command = [sys.executable, "-m", "server.cli", "serve", "--base", str(copy), "--data-dir", str(tmp_path / "data")]
    device = "cuda" if what == "cuda" else "cpu"
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, "--device", device], env=hidden, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert {"cuda": "device 'cuda' cannot be used", "tokenizer": "has no usable tokenizer"}[what] in done.stderr
    assert "Traceback" not in done.stderr
