"""The `vllm:` metrics that the Kubernetes inference gateway reads, by its model server protocol (docs/metrics.md)."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator

from prometheus_client.core import Metric

from server.engine.stats import Stats
from server.metrics.families import Family

RUNNING = Family("gauge", "vllm:num_requests_running", "As onebase_num_requests_running.", "sequences")
WAITING = Family(
    "gauge", "vllm:num_requests_waiting", "As onebase_num_requests_waiting: the requests in the queue.", "sequences"
)
KV_USE = Family("gauge", "vllm:kv_cache_usage_perc", "As onebase_kv_cache_usage_perc, 0 to 1.", "ratio")
CACHE = Family(
    "gauge",
    "vllm:cache_config_info",
    "1, with the size and number of KV blocks.",
    "1",
    ("block_size", "num_gpu_blocks"),
)
LORA = Family(
    "gauge",
    "vllm:lora_requests_info",
    "Seconds since 1970, with the number of device slots, the adapters on the device and those that requests wait for.",
    "seconds",
    ("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
)


def families(stats: Stats, running: Collection[str]) -> Iterator[Metric]:
    """All of this module; `running` are the names of the adapters that requests need not wait for."""
    yield RUNNING.of(stats.running)
    yield WAITING.of(stats.waiting)
    yield KV_USE.of(stats.blocks_used / stats.blocks if stats.blocks else 0.0)
    yield CACHE.by({(str(stats.block_size), str(stats.blocks)): 1})
    adapters = ",".join(sorted(running)), ",".join(sorted(stats.wanted))
    yield LORA.by({(str(stats.slots), *adapters): time.time()})
