"""A conversion that is killed, raced or fails: the base is whole or not there, and nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
import threading
from pathlib import Path

import gguf
import numpy as np
import pytest
from tokenizers import pre_tokenizers

from server.model import bundled
from server.model.bundled import BaseUnavailable, convert_gguf
from server.model.loader import load_base

ROOT = Path(__file__).resolve().parents[2]
_WIDTH, _INNER = 32, 48
_TENSORS = {
    "attn_norm": (_WIDTH,), "attn_q": (_WIDTH, _WIDTH), "attn_k": (_WIDTH, _WIDTH), "attn_v": (_WIDTH, _WIDTH),
    "attn_output": (_WIDTH, _WIDTH), "ffn_norm": (_WIDTH,), "ffn_gate": (_INNER, _WIDTH), "ffn_up": (_INNER, _WIDTH),
    "ffn_down": (_WIDTH, _INNER),
}  # fmt: skip


@pytest.fixture(scope="module")
def source(models: Path) -> Path:
    """A Llama of one layer with a byte-level tokenizer, as a GGUF file."""
    path = models / "tiny.gguf"
    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(_WIDTH)
    writer.add_feed_forward_length(_INNER)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {"token_embd": (len(tokens), _WIDTH), "output_norm": (_WIDTH,), "output": (len(tokens), _WIDTH)}
    random = np.random.default_rng(0)
    for name, shape in (shapes | {f"blk.0.{name}": shape for name, shape in _TENSORS.items()}).items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def quick(source: Path, target: Path) -> None:
    """Stands in for the conversion where only what surrounds it is tested."""
    (target / "model.safetensors").write_text("weights")
    (target / "config.json").write_text(source.name)


def entries(data_dir: Path) -> list[str]:
    return sorted(path.name for path in (data_dir / "models").iterdir())


def converting(source: Path, data_dir: Path, first: str = "") -> list[str]:
    """The command line of a process that converts, after `first`."""
    work = f"from pathlib import Path; from server.model import bundled; {first}"
    return [sys.executable, "-c", f"{work}\nbundled.convert_gguf(Path({str(source)!r}), Path({str(data_dir)!r}), 'x')"]


def test_bytes_and_names_reach_the_disk_before_the_rename(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut may keep a rename and lose the bytes of what was renamed, unless they were flushed."""
    done: list[str] = []
    fsync, rename = os.fsync, os.rename

    def seen_fsync(descriptor: int) -> None:
        done.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def seen_rename(old: Path, new: Path) -> None:
        done.append("rename")
        assert {str(old), *(str(path) for path in old.iterdir())} <= set(done)
        rename(old, new)

    monkeypatch.setattr(bundled, "_write_safetensors", quick)
    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "rename", seen_rename)
    target = convert_gguf(source, tmp_path, "x")
    assert done[-2:] == ["rename", str(tmp_path / "models")]
    assert len(done) == 5
    assert entries(tmp_path) == [".lock", target.name]


def test_what_a_killed_conversion_left_goes_with_the_next_one(source: Path, tmp_path: Path) -> None:
    """SIGKILL after the weights were written, before the rename. It frees the lock, too."""
    kill = "import os, signal; bundled._flush = lambda path: os.kill(os.getpid(), signal.SIGKILL)"
    killed = subprocess.run(converting(source, tmp_path, kill), cwd=ROOT, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = [name for name in entries(tmp_path) if name.startswith(".converting-")]
    assert len(left) == 1
    assert (tmp_path / "models" / left[0] / "model.safetensors").stat().st_size > 0
    target = convert_gguf(source, tmp_path, "x")
    assert entries(tmp_path) == [".lock", target.name]
    assert load_base(str(target), tmp_path, device="cpu").tokenizer("ab").input_ids == [258]


def test_the_second_waits_for_the_first_and_finds_it_done(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two data directories share their models through a link. A second conversion would remove the first's files."""
    (tmp_path / "one/models").mkdir(parents=True)
    (tmp_path / "two").mkdir()
    (tmp_path / "two/models").symlink_to(tmp_path / "one/models")
    begun, go_on, made = threading.Event(), threading.Event(), []

    def slow(source: Path, target: Path) -> None:
        made.append(target)
        begun.set()
        assert go_on.wait(30)
        quick(source, target)

    monkeypatch.setattr(bundled, "_write_safetensors", slow)
    results: dict[str, Path] = {}
    threads = [
        threading.Thread(target=lambda name=name: results.update({name: convert_gguf(source, tmp_path / name, "x")}))
        for name in ("one", "two")
    ]
    with caplog.at_level("INFO", "onebase.model"):
        threads[0].start()
        assert begun.wait(30)
        threads[1].start()
        threads[1].join(0.5)
        assert threads[1].is_alive()
        assert made[0].is_dir()
        go_on.set()
        for thread in threads:
            thread.join(30)
    assert "waiting for it" in caplog.text
    assert len(made) == 1
    assert results["one"].resolve() == results["two"].resolve()
    assert entries(tmp_path / "two") == [".lock", results["one"].name]


def test_a_base_without_its_config_is_made_again(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled, "_write_safetensors", quick)
    target = convert_gguf(source, tmp_path, "x")
    (target / "config.json").unlink()
    assert convert_gguf(source, tmp_path, "x") == target
    assert (target / "config.json").read_text() == source.name


@pytest.mark.parametrize("keep", [0, 3000, -500], ids=["empty", "half a header", "short of tensors"])
def test_a_broken_file_is_refused_with_its_name_and_leaves_nothing(keep: int, source: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(source.read_bytes()[:keep])
    with pytest.raises(BaseUnavailable, match=r"broken\.gguf cannot be converted"):
        load_base(str(broken), tmp_path, device="cpu")
    assert entries(tmp_path) == [".lock"]


def test_a_full_disk_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundled, "_flush", full)
    with pytest.raises(BaseUnavailable, match="No space left"):
        convert_gguf(source, tmp_path, "x")
    assert entries(tmp_path) == [".lock"]


def on_a_terminal(command: list[str]) -> str:
    """What the command writes to a stderr that is a terminal."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))  # on one without a width tqdm draws nothing
    process = subprocess.Popen(command, cwd=ROOT, stderr=theirs, stdout=subprocess.DEVNULL)
    os.close(theirs)
    text = b""
    with contextlib.suppress(OSError):  # how Linux says that the other end is closed
        while piece := os.read(ours, 4096):
            text += piece
    os.close(ours)
    assert process.wait(60) == 0, text
    return text.decode()


def test_a_log_gets_no_progress_bars_and_a_terminal_does(source: Path, tmp_path: Path) -> None:
    """A whole conversion and a load of its result, in processes of their own."""
    bars = ("de-quantizing", "Loading weights", "it/s")
    command = converting(source, tmp_path, "from server.model.loader import load_base")
    command[-1] += f"\nload_base({str(source)!r}, Path({str(tmp_path)!r}), device='cpu')"
    quiet = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert quiet.returncode == 0, quiet.stderr
    assert not [bar for bar in bars if bar in quiet.stderr + quiet.stdout]
    shutil.rmtree(tmp_path / "models")
    shown = on_a_terminal(command)
    assert [bar for bar in bars if bar in shown] == list(bars)
