"""vLLM on the CPU, from a virtual environment of its own: `setup.sh vllm` beside this file makes `$PEERS_DIR/vllm`."""

from __future__ import annotations

from pathlib import Path

from loadtest.dialects import OpenAI
from loadtest.peers.peer import RANK, NotThere, Process, Setting
from loadtest.peers.served import Served, answers, free_port

KV_GIB = 2
BASE = "base"


def start(setting: Setting, folder: Path, dtype: str = "bfloat16") -> tuple[Served]:
    """`vllm serve` with the adapters loaded. Raises NotThere."""
    program = folder / "vllm" / "bin" / "vllm"
    if not program.exists():
        raise NotThere("not installed")
    port, rows = free_port(), len(setting.adapters)
    modules = [f"{path.name}={path}" for path in setting.adapters]
    command = [str(program), "serve", str(setting.base), "--served-model-name", BASE, "--dtype", dtype]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--max-model-len", str(setting.context), "--max-num-seqs", str(rows), "--no-enable-prefix-caching"]
    command += ["--enable-lora", "--max-loras", str(rows), "--max-cpu-loras", str(rows), "--max-lora-rank", str(RANK)]
    environment = {
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{setting.threads - 1}",
        "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    process = Process([*command, "--lora-modules", *modules], setting.folder / "vllm.log", environment)
    url = f"http://127.0.0.1:{port}"
    process.wait(lambda: answers(f"{url}/v1/models"))
    return (Served("vLLM", dtype, process, url, OpenAI([path.name for path in setting.adapters], BASE)),)
