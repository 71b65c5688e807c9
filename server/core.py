"""The nouns that several layers share. Plain Python: no torch, no web framework."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

DEFAULT_TENANT = "default"
MAX_CONFIG_BYTES = 64 * 1024  # of an adapter_config.json


@dataclass(frozen=True, slots=True)
class LinearShape:
    """A linear layer of the decoder, as LoRA sees it: y [out_features] = W x [in_features] + bias."""

    in_features: int
    out_features: int


@dataclass(frozen=True)
class BaseInfo:
    """What an adapter must fit: the base model's identity and its linear layers.

    `known_as` holds the names that an adapter's `base_model_name_or_path` may carry. `linears` maps the full module
    name (as in `named_modules()` of the causal LM, e.g. `model.layers.0.self_attn.q_proj`) to its shape, in model
    order; `other_modules` are the names of every other module, so that a refusal can say why.
    """

    name: str
    known_as: frozenset[str]
    digest: str
    model_type: str
    model_class: str
    linears: Mapping[str, LinearShape]
    other_modules: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """One immutable version of an adapter: what `PUT /adapters/<name>` answers, and the digest of the base that it was
    checked against."""

    name: str
    version: int
    digest: str
    rank: int
    alpha: float
    targets: tuple[str, ...]
    parameters: int
    bytes: int
    kind: str
    base: str
    base_digest: str
    created: float


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """The exact weights that a request runs on, and the tenant that owns them. Answers name the `digest`; caches and
    slots go by the `key`."""

    name: str
    version: int
    digest: str
    rank: int = 0
    tenant: str = DEFAULT_TENANT

    @property
    def key(self) -> str:
        """By what the weights are found in RAM and on the device: digest and owner, so that nobody can tell by their
        being there, or by the time of a load, that another tenant has the same bytes. The digest alone is the default
        tenant's, which often is the only one."""
        return self.digest if self.tenant == DEFAULT_TENANT else f"{self.digest}@{self.tenant}"


def digest_in(key: str) -> str:
    """The digest of an `AdapterRef.key`: where the bytes are on disk, whoever owns them."""
    return key.partition("@")[0]
