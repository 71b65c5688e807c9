"""`adapter_config.json` -> `LoraSpec` -> the rank and scaling of every module. The file comes from a stranger.

Fields are read by name, none is ever passed on as a keyword or imported. What would change the model's answer and is
not served is refused by name; a field that this version does not know must be empty.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from server.core import MAX_CONFIG_BYTES, BaseInfo
from server.errors import InvalidAdapter
from server.lora.patterns import DEFAULT_TARGETS, PatternBudget, Targets, pattern_key
from server.lora.strictjson import JsonError, parse_object

MAX_NAMES = 4096
MAX_TEXT = 512
MAX_NUMBER = 2**31 - 1

# Read below, or without any effect on the answer of a trained adapter.
_READ = frozenset({
    "peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "r", "lora_alpha", "use_rslora", "bias",
    "init_lora_weights", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern",
    "alpha_pattern",
})  # fmt: skip
_HARMLESS = frozenset({
    "peft_version", "revision", "inference_mode", "lora_dropout", "fan_in_fan_out", "megatron_core",
    "qalora_group_size", "ensure_weight_tying", "runtime_config", "eva_config", "corda_config", "lora_ga_config",
})  # fmt: skip
# How A and B began. The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) also change the base model's weights, so their
# adapters are only right on a base that nobody has.
_INITS = frozenset({"gaussian", "orthogonal", "eva", "mica"})
_LOCAL_PATH = re.compile(r"[/~.\\]|[A-Za-z]:|.*\\|[^/]*/[^/]*/|.*/$")


@dataclass(frozen=True)
class LoraSpec:
    """What a LoRA config says, checked for itself but not yet against a base model."""

    rank: int
    alpha: float
    use_rslora: bool
    targets: Targets
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    base_name: str
    base_class: str

    def scaling(self, rank: int, alpha: float) -> float:
        """The factor on B A: alpha / rank, or alpha / sqrt(rank) for rank-stabilised LoRA."""
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


@dataclass(frozen=True, slots=True)
class ModuleSpec:
    """One adapted module: its rank and the factor on B A."""

    rank: int
    scaling: float


def _refuse(field: str, reason: str) -> InvalidAdapter:
    return InvalidAdapter(f"adapter_config.json: {field} {reason}", param=field)


def parse_config(raw: bytes) -> LoraSpec:
    """The checked content of an `adapter_config.json`. Raises `InvalidAdapter` naming the field at fault."""
    if len(raw) > MAX_CONFIG_BYTES:
        raise InvalidAdapter(f"adapter_config.json is larger than {MAX_CONFIG_BYTES} bytes", param="config")
    try:
        config = parse_object(raw)
    except JsonError as exc:
        raise InvalidAdapter(f"adapter_config.json is refused: {exc}", param="config") from exc
    _check_kind(config)
    _check_unsupported(config)
    alpha = _number(config.get("lora_alpha", 8), "lora_alpha")
    return LoraSpec(
        rank=_count(config.get("r", 8), "r"),
        alpha=alpha,
        use_rslora=_flag(config, "use_rslora"),
        targets=_targets(config),
        rank_pattern={k: _count(v, "rank_pattern") for k, v in _mapping(config, "rank_pattern").items()},
        alpha_pattern={k: _number(v, "alpha_pattern") for k, v in _mapping(config, "alpha_pattern").items()},
        base_name=_text(config, "base_model_name_or_path"),
        base_class=_base_class(config),
    )


def _check_kind(config: dict[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise _refuse("peft_type", f"is {_show(kind)}; this server serves LORA")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise _refuse("task_type", f"is {_show(config['task_type'])}; this server serves CAUSAL_LM")
    if config.get("bias") not in (None, "none"):
        raise _refuse("bias", f"is {_show(config['bias'])}; trained biases are not supported")
    init = config.get("init_lora_weights")
    known = init is None or isinstance(init, bool) or (isinstance(init, str) and init.lower() in _INITS)
    if not known:
        raise _refuse(
            "init_lora_weights",
            f"is {_show(init)}, which changes the base model's weights; convert the adapter to plain LoRA first "
            "(PEFT: save_pretrained with path_initial_model_for_weight_conversion)",
        )


def _check_unsupported(config: dict[str, Any]) -> None:
    """Every field that is neither read nor harmless must be empty, whether this version knows it or not."""
    for field, value in config.items():
        if field in _READ or field in _HARMLESS or value is None or value is False:
            continue
        if isinstance(value, dict | list | str) and not value:
            continue
        raise _refuse(field[:MAX_TEXT], "is set; this server does not support it")


def _show(value: Any) -> str:
    """A short form of a customer's value for a message."""
    return repr(value)[:80] if isinstance(value, str | int | float | bool | None) else f"a {type(value).__name__}"


def _count(value: Any, field: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= MAX_NUMBER:
        raise _refuse(field, "must be a positive whole number")
    return value


def _number(value: Any, field: str) -> float:
    if not isinstance(value, bool) and isinstance(value, int | float) and abs(value) <= MAX_NUMBER:
        return float(value)
    raise _refuse(field, f"must be a number of at most {MAX_NUMBER}")


def _flag(config: dict[str, Any], field: str) -> bool:
    value = config.get(field)
    if value is not None and not isinstance(value, bool):
        raise _refuse(field, "must be true or false")
    return bool(value)


def _text(config: dict[str, Any], field: str) -> str:
    value = config.get(field)
    if value is None:
        return ""
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise _refuse(field, f"must be text of at most {MAX_TEXT} characters")
    return value


def _base_class(config: dict[str, Any]) -> str:
    """The class that `auto_mapping` says the base is. It is compared with the served one, never imported."""
    mapping = config.get("auto_mapping")
    if mapping is None:
        return ""
    if not isinstance(mapping, dict):
        raise _refuse("auto_mapping", "must be an object")
    name = mapping.get("base_model_class") or ""
    if not isinstance(name, str) or len(name) > MAX_TEXT:
        raise _refuse("auto_mapping", "must name the base model's class as text")
    return name


def _mapping(config: dict[str, Any], field: str) -> dict[str, Any]:
    value = config.get(field) or {}
    if not isinstance(value, dict) or len(value) > MAX_NAMES:
        raise _refuse(field, f"must be an object of at most {MAX_NAMES} entries")
    return value


def _names(config: dict[str, Any], field: str) -> list[str]:
    value = config.get(field)
    value = [value] if isinstance(value, str) else value or []
    if not isinstance(value, list) or len(value) > MAX_NAMES or not all(isinstance(name, str) for name in value):
        raise _refuse(field, f"must be text or a list of at most {MAX_NAMES} names")
    return value


def _layers(config: dict[str, Any]) -> frozenset[int]:
    value = config.get("layers_to_transform")
    layers = [] if value is None else value if isinstance(value, list) else [value]
    if len(layers) > MAX_NAMES or not all(isinstance(n, int) and not isinstance(n, bool) for n in layers):
        raise _refuse("layers_to_transform", "must be a whole number or a list of them")
    return frozenset(layers)


def _targets(config: dict[str, Any]) -> Targets:
    wanted = config.get("target_modules")
    names = _names(config, "target_modules")
    layers, layers_pattern = _layers(config), tuple(_names(config, "layers_pattern"))
    if isinstance(wanted, str) and (layers or layers_pattern):
        raise _refuse("layers_to_transform", "cannot stand beside target_modules that is one pattern")
    if layers_pattern and not layers:
        raise _refuse("layers_pattern", "needs layers_to_transform")
    if wanted == "" or (wanted is not None and not names):
        raise _refuse("target_modules", "is empty")
    excluded = config.get("exclude_modules")
    return Targets(
        modules=None if wanted is None else wanted if isinstance(wanted, str) else frozenset(names),
        exclude=excluded if isinstance(excluded, str) else frozenset(_names(config, "exclude_modules")),
        layers=layers,
        layers_pattern=layers_pattern,
    )


def check_base(spec: LoraSpec, base: BaseInfo) -> None:
    """Refuse an adapter that says it was made for another model (code `base_mismatch`).

    A path on somebody's disk says nothing about the model, so it passes and the shapes decide. A hub id counts by its
    last component: copies of a model live under many owners.
    """
    if spec.base_class and spec.base_class != base.model_class:
        raise InvalidAdapter(
            f"adapter_config.json: auto_mapping says the base is a {spec.base_class[:80]}; "
            f"this server serves a {base.model_class}",
            param="auto_mapping",
            code="base_mismatch",
        )
    name = spec.base_name
    if not name or _LOCAL_PATH.match(name):
        return
    known = {known_as.rsplit("/", 1)[-1].casefold() for known_as in base.known_as}
    if name.rsplit("/", 1)[-1].casefold() not in known:
        raise InvalidAdapter(
            f"the adapter was made for {name[:120]!r}; this server serves {base.name}, known as "
            f"{', '.join(sorted(base.known_as)) or 'nothing else'} (the setting ONEBASE_BASE_NAMES adds names)",
            param="base_model_name_or_path",
            code="base_mismatch",
        )


def resolve(spec: LoraSpec, base: BaseInfo, *, max_rank: int | None = None) -> dict[str, ModuleSpec]:
    """The rank and scaling of every module that the config adapts, in the base model's order.

    Raises `InvalidAdapter` when it adapts nothing, something that is not a linear layer of the decoder, or a module
    with a rank over `max_rank`.
    """
    budget = PatternBudget()
    targets = _concrete(spec.targets, base)
    modules: dict[str, ModuleSpec] = {}
    for module in base.linears:
        if not targets.include(module, budget):
            continue
        rank_key = pattern_key(spec.rank_pattern, module, "rank_pattern", budget)
        alpha_key = pattern_key(spec.alpha_pattern, module, "alpha_pattern", budget)
        rank = spec.rank if rank_key is None else spec.rank_pattern[rank_key]
        alpha = spec.alpha if alpha_key is None else spec.alpha_pattern[alpha_key]
        if max_rank is not None and rank > max_rank:
            field = "r" if rank_key is None else "rank_pattern"
            raise _refuse(field, f"gives {module} rank {rank}; this server takes at most {max_rank}")
        modules[module] = ModuleSpec(rank, spec.scaling(rank, alpha))
    for module in sorted(base.other_modules):
        if targets.include(module, budget):
            raise _refuse("target_modules", f"names {module}, which is not a linear layer that this server adapts")
    if not modules:
        raise _refuse("target_modules", f"matches no linear layer of {base.name}")
    return modules


def _concrete(targets: Targets, base: BaseInfo) -> Targets:
    """The same choice with `null` and "all-linear" replaced by what they mean for this base model."""
    wanted = targets.modules
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        return replace(targets, modules=frozenset(base.linears))
    if wanted is not None:
        return targets
    default = DEFAULT_TARGETS.get(base.model_type)
    if default is None:
        raise _refuse("target_modules", f"is not given, and PEFT has no default for a {base.model_type} model")
    return replace(targets, modules=default if isinstance(default, str) else frozenset(default))
