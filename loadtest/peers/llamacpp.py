"""llama.cpp's server with 16-bit weights, from `$PEERS_DIR`, which `setup.sh` beside this file fills.

Its base and adapters are GGUF twins of ours, made once; the adapters by llama.cpp's own converter.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from loadtest.dialects import Llama
from loadtest.peers import gguf_base
from loadtest.peers.peer import NotThere, Process, Setting
from loadtest.peers.served import Served, answers, free_port


def start(setting: Setting, folder: Path) -> tuple[Served]:
    """A server with one slot and one adapter for each row. Raises NotThere."""
    python = folder / "llama" / "bin" / "python"
    if not python.exists():
        raise NotThere("not installed")
    base = gguf_base.make(folder / "onebase" / "base-f16.gguf")
    adapters = [_twin(folder, path, setting.base) for path in setting.adapters]
    port = free_port()
    sizes = [str(port), str(setting.threads), str(setting.context), str(len(adapters))]
    program = Path(__file__).parent / "llamacpp_main.py"
    command = [str(python), str(program), str(base), *sizes, *map(str, adapters)]
    process = Process(command, setting.folder / "llamacpp.log")
    url = f"http://127.0.0.1:{port}"
    process.wait(lambda: answers(f"{url}/health"))
    return (Served("llama.cpp", "float16", process, url, Llama(list(range(len(adapters))))),)


def _twin(folder: Path, adapter: Path, base: Path) -> Path:
    """The adapter's GGUF, made unless it is there."""
    made = folder / "onebase" / f"{adapter.name}.gguf"
    if made.exists():
        return made
    found = sorted((folder / "venv").rglob("convert_lora_to_gguf.py"))
    if not found:
        raise NotThere("convert_lora_to_gguf.py is not installed")
    partly = made.with_suffix(".partly")
    command = [folder / "venv" / "bin" / "python", found[0], adapter, "--base", base, "--outtype", "f16"]
    done = subprocess.run(
        [*map(str, command), "--outfile", str(partly)],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise NotThere(f"an adapter could not be converted: {done.stderr.strip()[-300:]}")
    return partly.rename(made)
