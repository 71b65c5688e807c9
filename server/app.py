"""Wires base, registry, engine and endpoints together."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import shutil
import sys
from collections.abc import AsyncIterator, Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from fastapi import FastAPI

from server import machine
from server.api import adapters, admin, errors, generate, health, limits, page, requestline, usage
from server.api.held import Sampler
from server.api.lanes import EngineLanes, restore
from server.api.schemas import ErrorEnvelope
from server.api.state import State
from server.api.trail import Traces, Trails
from server.engine.blocks import BlockPool
from server.engine.client import EngineClient
from server.engine.engine import Engine
from server.engine.runner import Runner
from server.engine.scheduler import Scheduler
from server.engine.steprunner import StepRunner
from server.errors import AdapterUnavailable, OnebaseError
from server.lora import cores
from server.lora.bank import Bank
from server.lora.eviction import order
from server.lora.weights import AdapterWeights
from server.metrics.http import CountResponses
from server.model.loader import Base, load_base
from server.registry.cache import AdapterCache
from server.registry.registry import Registry
from server.registry.store import Store
from server.settings import Settings
from server.tenants.accounts import Accounts, Outlet
from server.tenants.claim import claimed
from server.tenants.database import open_database
from server.tenants.ledger import Ledger

log = logging.getLogger("onebase.app")

BLOCK_SIZE = 16  # tokens; a prefix is shared in whole blocks
# A prefill chunk holds up every other row for a step, so it is kept short.
_BATCH_TOKENS = {"cpu": 256, "cuda": 2048}
# Automatic KV size: this share of the memory that is free once the base is loaded, within these token bounds.
_KV_SHARE = {"cpu": 0.25, "cuda": 0.85}
_KV_BOUNDS = (2_048, 1_000_000)
_CPU_KV_TOKENS = 32_768
_USUAL_RANK = 16  # room is kept on the GPU for adapters of this rank, or of MAX_RANK if that is less


def create_app(settings: Settings, base: Base | None = None, *, ledger: type[Ledger] = Ledger) -> FastAPI:
    """The ASGI app. Loads the base unless one is given; raises BaseUnavailable when it cannot be had. `ledger` is what
    writes usage down."""
    cores.take(1)  # before the first operation
    base = base or load_base(
        settings.base,
        settings.data_dir,
        dtype=settings.dtype,
        device=settings.device,
        kernels=settings.kernels,
        extra_names=settings.base_names,
    )
    state, engine = build(settings, base)

    app = FastAPI(
        title="onebase",
        version=version("onebase"),
        description="One frozen base model, shared by many LoRA adapters.",
        lifespan=lambda app: running(state, engine, ledger),
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,  # such an answer repeats the Host header
        responses={"4XX": {"model": ErrorEnvelope}, "5XX": {"model": ErrorEnvelope}},
    )
    app.state.onebase = state
    app.add_middleware(Trails, tell=partial(requestline.tell, state))
    app.add_middleware(limits.BodyLimit, limit=limits.by_kind(settings.max_upload_bytes))
    errors.install(app)
    app.add_middleware(CountResponses, responses=state.responses)
    for part in (generate, adapters, usage, admin, health, page):
        app.include_router(part.router)
    return app


@contextlib.asynccontextmanager
async def running(state: State, engine: Engine, ledger: type[Ledger] = Ledger) -> AsyncIterator[None]:
    """Accounts and engine, from the first request to the last. What was opened is closed in reverse, also when
    something after it fails to open."""
    async with contextlib.AsyncExitStack() as stack:
        # What was loaded lives as long as the process; a full collection would walk it all and hold every stream up.
        gc.collect()
        gc.freeze()
        stack.callback(gc.unfreeze)
        stack.push_async_callback(asyncio.to_thread, state.registry.close)  # while the directory is ours
        if state.traces is not None:
            stack.push_async_callback(asyncio.to_thread, state.traces.close)
        claim = await stack.enter_async_context(claimed(state.settings.database))
        database = await open_database(state.settings.database, claim)
        stack.push_async_callback(database.close)
        state.accounts, token = await Accounts.open(database, outlet(state.settings), ledger=ledger)
        stack.push_async_callback(state.accounts.close)
        claim.regained = state.accounts.reload
        if token is not None:
            # Written whole: log lines come too.
            sys.stderr.write(f"\nThe admin key, for AUTH=on; it is shown this once:\n{token}\n\n")
            sys.stderr.flush()
        state.registry.withdraw_where(state.accounts.directory.disabled)
        state.client.attach(engine)
        stack.push_async_callback(state.client.close)
        state.registry.moves.lanes = EngineLanes(state)
        restoring = asyncio.create_task(asyncio.to_thread(restore, state.registry))
        stack.push_async_callback(_ended, restoring)
        await stack.enter_async_context(Sampler(state))
        yield


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})


def traces(settings: Settings, base: Base) -> Traces | None:
    """Where traces go; None: nowhere. The variables that OpenTelemetry itself knows will do as well."""
    named = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    if not settings.otlp_endpoint and not any(os.environ.get(name) for name in named):
        return None
    try:
        from server.api.spans import Spans, exporting  # an extra
    except ImportError:
        log.warning("no traces are sent: they need pip install 'onebase[otel]'")
        return None
    return Spans(exporting(settings.otlp_endpoint), base.info.name)


def outlet(settings: Settings) -> Outlet | None:
    """Where usage events go; None: nowhere."""
    if not settings.events_url:
        return None
    token = settings.events_token.get_secret_value()
    return Outlet(settings.events_url, settings.events_format, token, settings.events_source)


def build(settings: Settings, base: Base) -> tuple[State, Engine]:
    """State and engine, not started."""
    store = Store(settings.data_dir / "adapters")
    registry = Registry(store, base.info, max_rank=settings.max_rank, dtype=base.dtype)
    cache = AdapterCache(registry.load, settings.ram_cache_bytes, order(settings.eviction))
    client = EngineClient(
        max_requests=settings.max_queue_requests,
        max_tokens=settings.max_queue_tokens,
        shared=settings.auth == "on",  # else all is one tenant's
    )
    blocks = kv_tokens(settings, base) // BLOCK_SIZE
    pool = BlockPool(blocks, BLOCK_SIZE)
    longest = min(base.max_context, blocks * BLOCK_SIZE, settings.max_context or base.max_context)
    runner, bank = runner_and_bank(settings, base, blocks, longest)
    engine = Engine(
        runner,
        Scheduler(
            pool,
            max_batch_tokens=settings.max_batch_tokens or _BATCH_TOKENS[base.device.type],
            max_running=settings.max_running,
            prefix_cache=settings.prefix_cache,
        ),
        bank,
        fetch=cache.get if base.device.type == "cpu" else within_rank(cache.get, settings.max_rank),
        emit=client.emit,
        threads=settings.threads or machine.cores(),
        prefetch_bytes=settings.ram_cache_bytes // 2,  # the other half keeps what is popular
        merged_bytes=settings.merged_bytes,
        merged_share=settings.merged_share,
        auto_merge=settings.auto_merge,
    )
    state = State(settings, base, store, registry, cache, client, longest, traces=traces(settings, base))
    if settings.preload is not None:
        preload(state, settings.preload)
    return state, engine


def within_rank(fetch: Callable[[str], AdapterWeights], max_rank: int) -> Callable[[str], AdapterWeights]:
    """`fetch`, refusing adapters that were stored when MAX_RANK was larger: the GPU's tables have no room for them."""

    def checked(key: str) -> AdapterWeights:
        weights = fetch(key)
        if weights.rank > max_rank:
            raise AdapterUnavailable(f"the adapter's rank {weights.rank} is over this server's MAX_RANK of {max_rank}")
        return weights

    return checked


def runner_and_bank(settings: Settings, base: Base, blocks: int, longest: int) -> tuple[StepRunner, Bank]:
    """What runs the steps, for sequences of at most `longest` tokens, and the slots of the adapters that it serves."""
    slots, policy = settings.adapter_slots, order(settings.eviction)
    if base.device.type != "cuda":
        return Runner(base, blocks=blocks, block_size=BLOCK_SIZE), Bank(slots, policy)
    from server.engine.device import DeviceRunner  # needs triton, which comes with torch's CUDA build
    from server.engine.graphs import CudaCapture

    runner = DeviceRunner(
        base,
        blocks=blocks,
        block_size=BLOCK_SIZE,
        slots=slots,
        max_rank=settings.max_rank,
        most_rows=settings.max_running,
        longest=longest,
        capture=CudaCapture(),
    )
    runner.warm()
    return runner, Bank(slots, policy, runner.forget)


def kv_tokens(settings: Settings, base: Base) -> int:
    """Tokens that the KV cache holds."""
    if settings.kv_cache_tokens:
        return max(settings.kv_cache_tokens, BLOCK_SIZE)
    if base.device.type == "cuda":
        free = torch.cuda.mem_get_info(base.device)[0] - adapter_room(settings, base) - settings.merged_bytes
        most = _KV_BOUNDS[1]
    else:
        free = machine.free_memory()
        most = _CPU_KV_TOKENS
    tokens = int(free * _KV_SHARE[base.device.type]) // base.kv_bytes_per_token
    return max(_KV_BOUNDS[0], min(most, tokens))


def adapter_room(settings: Settings, base: Base) -> int:
    """Bytes that the adapters on the device may come to take: every slot full."""
    rank = min(settings.max_rank, _USUAL_RANK)
    values = sum(rank * (shape.in_features + shape.out_features) for shape in base.info.linears.values())
    return settings.adapter_slots * values * base.dtype.itemsize


def preload(state: State, folder: Path) -> list[str]:
    """Registers every adapter directory under `folder` whose name is not taken yet, published from the first: the
    operator has it there for all tenants. Returns the new names. What is registered already stays as it is, private or
    not.

    One that does not fit this base, or whose name another tenant has published, is left out with a warning.
    """
    added = []
    if not folder.is_dir():
        log.warning("there is no directory %s to load adapters from", folder)
    for config in sorted(folder.glob("*/adapter_config.json")):
        name = config.parent.name
        with state.store.stage() as staging:
            try:
                if state.registry.taken(name):
                    continue
                shutil.copyfile(config, staging.config_path)
                shutil.copyfile(config.parent / "adapter_model.safetensors", staging.weights_path)
                state.registry.put(name, staging, public=True)
            except (OnebaseError, OSError) as fault:
                log.warning("adapter %s is not served: %s", name, fault)
                continue
        added.append(name)
    return added
