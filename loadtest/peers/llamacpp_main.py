"""llama.cpp's HTTP server, run by the Python of `$PEERS_DIR/llama`, which has the xllamacpp wheel and nothing of ours.

Arguments: base GGUF, port, threads, tokens of context a slot, slots, adapters' GGUFs.
"""

from __future__ import annotations

import signal
import sys

import xllamacpp


def main() -> None:
    """Serves until it is told to stop."""
    model, port, threads, context, slots, *adapters = sys.argv[1:]
    params = xllamacpp.CommonParams()
    params.model.path, params.port, params.n_gpu_layers = model, int(port), 0
    params.n_parallel, params.n_ctx = int(slots), int(context) * int(slots)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
    loaded = []
    for path in adapters:
        one = xllamacpp.CommonAdapterLoraInfo()
        one.path, one.scale = path, 0.0
        loaded.append(one)
    params.lora_adapters, params.lora_init_without_apply = loaded, True
    server = xllamacpp.Server(params)
    print("listening", server.listening_address, flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
