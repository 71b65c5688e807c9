"""Where the adapters of a run were found, from the server's own counters before and after."""

from __future__ import annotations

import httpx
from prometheus_client.parser import text_string_to_metric_families

COUNTERS = {
    "ram_hits": "onebase_adapter_hits_total{ram}",
    "ram_misses": "onebase_adapter_misses_total{ram}",
    "device_loads": "onebase_adapter_load_seconds_count{device}",
}


def metrics(url: str) -> dict[str, float] | None:
    """Every sample by name and label values, `onebase_adapter_bytes{ram}`; None where the server has no metrics."""
    try:
        response = httpx.get(f"{url}/metrics", timeout=30)
        response.raise_for_status()
        families = list(text_string_to_metric_families(response.text))
    except (httpx.HTTPError, ValueError):
        return None
    samples = [sample for family in families for sample in family.samples]
    return {one.name + (f"{{{','.join(one.labels.values())}}}" if one.labels else ""): one.value for one in samples}


def counters(url: str) -> dict[str, float] | None:
    """The counters of the tiers now; None where the server has not got them."""
    values = metrics(url) or {}
    found = {name: values[key] for name, key in COUNTERS.items() if key in values}
    return found if len(found) == len(COUNTERS) else None


def shares(
    before: dict[str, float] | None, after: dict[str, float] | None, requests: int
) -> dict[str, float | None] | None:
    """Of `requests` for adapters, the shares that found theirs on the device, in RAM, and only on disk; None where the
    counters are missing. Requests that wait for the same load count as found on the device.
    """
    if before is None or after is None:
        return None
    grown = {name: after[name] - before[name] for name in after}
    missed = grown["ram_hits"] + grown["ram_misses"]
    tiers: dict[str, float | None] = {"device": None, "ram": None, "disk": None}
    if requests:
        tiers = {
            "device": max(0.0, requests - missed) / requests,
            "ram": grown["ram_hits"] / requests,
            "disk": grown["ram_misses"] / requests,
        }
    return tiers | {"device_loads": grown["device_loads"]}
