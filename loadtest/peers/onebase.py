"""onebase itself, over HTTP."""

from __future__ import annotations

import sys
from pathlib import Path

import httpx

from loadtest.adapters import upload
from loadtest.dialects import Onebase
from loadtest.peers.peer import NotThere, Process, Setting
from loadtest.peers.served import Served, answers, free_port
from server.model.bundled import DEFAULT_DATA_DIR


def serve(folder: Path, program: str = "server.cli", /, **settings: object) -> tuple[Process, str]:
    """A server with its data and its log in `folder`, which is made, once it is ready; and its address.

    The converted base is the one that all share. `program` is the module that has the `onebase` command. Raises
    NotThere.
    """
    port = free_port()
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "models").symlink_to(DEFAULT_DATA_DIR.expanduser() / "models")
    settings = {"data_dir": folder / "data", **settings}
    environment = {f"ONEBASE_{name.upper()}": str(value) for name, value in settings.items()}
    command = [sys.executable, "-m", program, "serve", "--port", str(port)]
    process = Process(command, folder / "log", environment)
    url = f"http://127.0.0.1:{port}"
    process.wait(lambda: answers(f"{url}/readyz"))
    return process, url


def start(setting: Setting, dtype: str) -> tuple[Served]:
    """A server with the adapters registered. Raises NotThere."""
    slots = len(setting.adapters)
    process, url = serve(setting.folder / f"onebase-{dtype}", device="cpu", dtype=dtype, adapter_slots=slots)
    try:
        with httpx.Client(base_url=url, timeout=120) as http:
            for path in setting.adapters:
                config = (path / "adapter_config.json").read_bytes()
                upload(http, path.name, config, (path / "adapter_model.safetensors").read_bytes())
    except httpx.HTTPError as fault:
        process.stop()
        raise NotThere(str(fault)) from None
    return (Served("onebase", dtype, process, url, Onebase([path.name for path in setting.adapters])),)
