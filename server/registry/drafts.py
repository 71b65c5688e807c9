"""An upload as a version of an adapter, before it has a number."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from server.core import MAX_CONFIG_BYTES, AdapterVersion, BaseInfo
from server.errors import InvalidAdapter
from server.lora.weights import inspect_adapter
from server.registry.store import Staging, storage_errors


@dataclass(frozen=True)
class Checks:
    """What every upload must fit."""

    base: BaseInfo
    max_rank: int
    dtype: torch.dtype

    def draft(self, name: str, staging: Staging, allow_zero: bool) -> AdapterVersion:
        """Checks everything; this is the slow part. Raises InvalidAdapter."""
        with storage_errors("read the upload back"):
            config_size, weights_size = staging.config_path.stat().st_size, staging.weights_path.stat().st_size
            if config_size > MAX_CONFIG_BYTES:
                raise InvalidAdapter(f"adapter_config.json is larger than {MAX_CONFIG_BYTES} bytes", param="config")
            config = staging.config_path.read_bytes()
        summary = inspect_adapter(
            config,
            staging.weights_path,
            self.base,
            max_rank=self.max_rank,
            dtype=self.dtype,
            allow_zero=allow_zero,
        )
        return AdapterVersion(
            name=name,
            version=0,
            digest=staging.digest(),
            rank=summary.rank,
            alpha=summary.alpha,
            targets=summary.targets,
            parameters=summary.parameters,
            bytes=config_size + weights_size,
            kind=summary.kind,
            base=self.base.name,
            base_digest=self.base.digest,
            created=time.time(),
        )


def known_base(base: BaseInfo, version: AdapterVersion) -> None:
    """Raises InvalidAdapter for a version of another base than the one that is served."""
    if version.base_digest != base.digest:
        raise InvalidAdapter(
            f"the adapter {version.name} was uploaded for another base model ({version.base}) than the one served "
            f"now ({base.name}); upload it again if it fits",
            param="adapter",
            code="base_mismatch",
        )
