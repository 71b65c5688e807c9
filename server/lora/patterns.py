"""Which modules a LoRA config names, by PEFT's own rules, with the customer's patterns kept on a short lead.

Python's `re` has no timeout and holds the interpreter's lock while it matches, so one evil pattern would stop the
whole server. The patterns are matched by the `regex` package instead, which has a timeout and lets other threads
run. `re` only compiles them first: what PEFT's `re` would refuse is refused here too.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import regex

from server.errors import InvalidAdapter

MAX_PATTERN = 1024
MAX_COMPILED = 512
MATCH_SECONDS = 0.25
# `regex` writes a counted repetition out while it compiles, so nested counts would take all memory: their product
# is bounded. Every other brace would be a fuzzy match there and literal text in `re`.
_BRACE = re.compile(r"\{(\d{0,2})(?:,(\d{0,2}))?\}")
MAX_REPEATS = 64
# Character escapes can make a set of a million characters, and back-references make matching exponential; no module
# name needs either. POSIX classes mean something in `regex` and nothing in `re`.
_FOREIGN = re.compile(r"\\[uUNx0-9]|\[\[|\[:|\(\?P=")
_PLAIN = re.compile(r"[A-Za-z0-9_.]+")

# What `target_modules: null` means: PEFT's default for each decoder family (a test compares it with PEFT's table).
DEFAULT_TARGETS: Mapping[str, tuple[str, ...] | str] = {
    "gpt2": ("c_attn",),
    "bloom": ("query_key_value",),
    "opt": ("q_proj", "v_proj"),
    "gptj": ("q_proj", "v_proj"),
    "gpt_neox": ("query_key_value",),
    "gpt_neo": ("q_proj", "v_proj"),
    "llama": ("q_proj", "v_proj"),
    "llama4": ("q_proj", "v_proj"),
    "gpt_bigcode": ("c_attn",),
    "mpt": ("Wqkv",),
    "falcon": ("query_key_value",),
    "codegen": ("qkv_proj",),
    "mistral": ("q_proj", "v_proj"),
    "mixtral": ("q_proj", "v_proj"),
    "stablelm": ("q_proj", "v_proj"),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "gemma": ("q_proj", "v_proj"),
    "gemma2": ("q_proj", "v_proj"),
    "gemma3_text": ("q_proj", "v_proj"),
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "qwen2": ("q_proj", "v_proj"),
    "qwen3": ("q_proj", "v_proj"),
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
}


class PatternBudget:
    """The time that one adapter's patterns may take together, and how many of them there may be."""

    def __init__(self, seconds: float = MATCH_SECONDS):
        self._left = seconds
        self._compiled: dict[str, Any] = {}

    def match(self, template: str, pattern: str, module: str, field: str, *, whole: bool = False) -> Any:
        """Match `template`, with `{}` replaced by `pattern`, at the start of `module` or over the whole of it.

        Raises `InvalidAdapter` naming `field` when the pattern is refused or its time is up.
        """
        full = template.replace("{}", pattern)
        started = time.perf_counter()
        compiled = self._compiled.get(full)
        if compiled is None:
            compiled = self._compiled[full] = self._compile(full, pattern, field)
        try:
            if self._left <= 0:
                raise TimeoutError
            method = compiled.fullmatch if whole else compiled.match
            return method(module, timeout=self._left, concurrent=True)
        except TimeoutError as exc:
            self._left = 0.0
            raise InvalidAdapter(f"the patterns in {field} take too long to match", param=field) from exc
        finally:
            self._left -= time.perf_counter() - started

    def _compile(self, full: str, pattern: str, field: str) -> Any:
        reason = _refusal(pattern)
        if len(self._compiled) >= MAX_COMPILED:
            reason = f"there are more than {MAX_COMPILED} patterns"
        if reason:
            raise InvalidAdapter(f"a pattern in {field} is refused: {reason}", param=field)
        try:
            re.compile(full)
            return regex.compile(full, flags=regex.V0)
        except (re.error, regex.error, RecursionError, OverflowError, Warning) as exc:
            raise InvalidAdapter(f"a pattern in {field} is not a valid regular expression", param=field) from exc


def _refusal(pattern: str) -> str | None:
    """Why this pattern is not even compiled, or None."""
    if len(pattern) > MAX_PATTERN:
        return f"it is longer than {MAX_PATTERN} characters"
    if not pattern.isascii() or _FOREIGN.search(pattern):
        return "it uses escapes, references or classes that no module name needs"
    repeats = 1
    for low, high in _BRACE.findall(pattern):
        repeats *= max(int(low or 1), int(high or 1), 1)
    if "{" in _BRACE.sub("", pattern):
        return "a brace in it is not a count of one or two digits"
    return f"its counts multiply to more than {MAX_REPEATS}" if repeats > MAX_REPEATS else None


@dataclass(frozen=True, slots=True)
class Targets:
    """The fields of a LoRA config that choose modules.

    `modules` and `exclude` as text are regular expressions for the whole name; None stands for PEFT's default of the
    model type, and matches nothing until it is filled in. No `layers` means every layer.
    """

    modules: str | frozenset[str] | None
    exclude: str | frozenset[str] = frozenset()
    layers: frozenset[int] = frozenset()
    layers_pattern: tuple[str, ...] = ()

    def include(self, module: str, budget: PatternBudget) -> bool:
        """Whether PEFT would put an adapter on this module (its `check_target_module_exists`)."""
        if self.exclude and _named(self.exclude, module, "exclude_modules", budget):
            return False
        if self.modules is None or not _named(self.modules, module, "target_modules", budget):
            return False
        # PEFT asks for the layer only where the end of the name matched: a full name says its layer itself.
        if isinstance(self.modules, str) or module in self.modules or not self.layers:
            return True
        return self._layer_of(module, budget) in self.layers

    def _layer_of(self, module: str, budget: PatternBudget) -> int | None:
        if not self.layers_pattern:
            found = re.match(r".*?\.[^.]*\.(?P<idx>\d+)\.", module)
            return int(found["idx"]) if found else None
        for pattern in self.layers_pattern:
            found = budget.match(r"(?:^|.*?\.){}\.(?P<idx>\d+)\.", pattern, module, "layers_pattern")
            if found:  # the pattern may have an alternative that matches without the index
                return int(found["idx"]) if found["idx"] else None
        return None


def _named(wanted: str | frozenset[str], module: str, field: str, budget: PatternBudget) -> bool:
    """A text is a pattern for the whole name; a set holds names and endings of names at a dot."""
    if isinstance(wanted, str):
        return budget.match("{}", wanted, module, field, whole=True) is not None
    tail = module
    while tail not in wanted:
        _, dot, tail = tail.partition(".")
        if not dot:
            return False
    return True


def pattern_key(keys: Collection[str], module: str, field: str, budget: PatternBudget) -> str | None:
    """The first key of `rank_pattern` or `alpha_pattern` that PEFT would apply to this module, or None."""
    for key in keys:
        if _PLAIN.fullmatch(key):
            if _plain_match(key, module):
                return key
        elif budget.match(r"(.*\.)?({})$", key, module, field):
            return key
    # PEFT falls back to looking the whole module name up, which a pattern that cannot match itself may still equal.
    return module if module in keys else None


def _plain_match(key: str, module: str) -> bool:
    """`re.match(rf"(.*\\.)?({key})$", module)` for a key of letters, digits, `_` and `.` (a dot matches anything).

    Configs that name every module would otherwise cost one compiled pattern a module.
    """
    start = len(module) - len(key)
    if start < 0 or (start > 0 and module[start - 1] != "."):
        return False
    return all(want in (".", got) for want, got in zip(key, module[start:], strict=True))
