"""LoRA configs: PEFT's own rules are the oracle for which modules a config names and with which rank."""

import json
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_DEFAULTS
from peft.utils.other import get_pattern_key

from server.errors import InvalidAdapter
from server.lora.patterns import DEFAULT_TARGETS, MATCH_SECONDS, PatternBudget, pattern_key
from server.lora.spec import MAX_CONFIG_BYTES, check_base, parse_config, resolve
from tests.adapters import config, tiny_base

BASE = tiny_base(12)
MODULES = list(BASE.linears)


def spec_of(**changes):
    return parse_config(json.dumps(config(**changes)).encode())


def refused(**changes) -> InvalidAdapter:
    def check():
        spec = spec_of(**changes)
        check_base(spec, BASE)
        resolve(spec, BASE, max_rank=64)

    with pytest.raises(InvalidAdapter) as caught:
        check()
    return caught.value


def by_peft(**fields) -> list[str]:
    oracle = LoraConfig(**fields)
    return [module for module in MODULES if check_target_module_exists(oracle, module)]


CHOICES = [
    {"target_modules": ["q_proj"]},
    {"target_modules": ["q_proj", "mlp.down_proj", "nothing"]},
    {"target_modules": ["model.layers.3.self_attn.q_proj", "layers.11.mlp.up_proj"]},
    {"target_modules": ["proj", "attn.q_proj", "k_proj"]},
    {"target_modules": "q_proj|.*v_proj"},
    {"target_modules": r".*\.(q|v)_proj"},
    {"target_modules": r"model\.layers\.(1|1[01])\..*(up|down)_proj"},
    {"target_modules": r"(?i).*Q_PROJ"},
    {"target_modules": r".*layers\.\d{2}\.mlp\.\w+_proj"},
    {"target_modules": r"model.layers.[0-3].self_attn.[qkvo]_proj"},
    {"target_modules": r"^model.*o_proj$"},
    {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["layers.2.self_attn.q_proj", "k_proj"]},
    {"target_modules": ["q_proj"], "exclude_modules": r".*\.1\d?\..*"},
    {"target_modules": r".*_proj", "exclude_modules": ["self_attn.q_proj", "model.layers.0.mlp.up_proj"]},
    {"target_modules": ["q_proj"], "layers_to_transform": 3},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 11, 99]},
    {"target_modules": ["q_proj"], "layers_to_transform": []},
    {"target_modules": ["q_proj"], "layers_to_transform": [1, 2], "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": []},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["layers|x"]},
]


@pytest.mark.parametrize("fields", CHOICES, ids=lambda fields: str(fields)[:60])
def test_modules_are_those_that_peft_chooses(fields):
    expected = by_peft(**fields)
    if expected:
        assert list(resolve(spec_of(**fields), BASE)) == expected
    else:
        assert refused(**fields).param == "target_modules"


names = st.sampled_from(
    ["q_proj", "k_proj", "up_proj", "self_attn.o_proj", "layers.1.mlp.down_proj", "1", "proj", *MODULES]
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(names, min_size=1, max_size=5),
    st.lists(names, max_size=3),
    st.none() | st.integers(-1, 13) | st.lists(st.integers(0, 12), max_size=4),
    st.none() | st.sampled_from(["layers", "h", ["h", "layers"], []]),
)
def test_any_choice_by_name_agrees_with_peft(target, exclude, layers, pattern):
    fields = {"target_modules": target, "exclude_modules": exclude, "layers_to_transform": layers}
    if pattern and layers not in (None, []):
        fields["layers_pattern"] = pattern
    targets = spec_of(**fields).targets
    budget = PatternBudget(30)
    assert [module for module in MODULES if targets.include(module, budget)] == by_peft(**fields)


keys = st.sampled_from(
    [
        "q_proj",
        "proj",
        "self_attn.q_proj",
        "layers.1",
        "self_attn_q_proj",
        r".*q_proj",
        r"^model.layers.0.*",
        r"[qk]_proj",
        r"layers\.1\..*",
        "q_proj|up_proj",
        r"mlp.(up|down)_proj",
        "selfXattn.q_proj",
        r"1\d?.mlp.\w+",
        *MODULES[:9],
    ]
)


@settings(max_examples=100, deadline=None)
@given(st.lists(keys, max_size=5, unique=True), st.sampled_from(MODULES))
def test_pattern_keys_agree_with_peft(patterns, module):
    mine = pattern_key(patterns, module, "rank_pattern", PatternBudget(30))
    theirs = get_pattern_key(patterns, module)
    assert mine == (theirs if theirs in patterns else None)


def test_ranks_and_scalings_follow_the_patterns():
    spec = spec_of(
        target_modules="all-linear",
        r=8,
        lora_alpha=16,
        use_rslora=True,
        rank_pattern={"q_proj": 4, r"layers\.1\..*": 2},
        alpha_pattern={"model.layers.1.mlp.up_proj": 6.5},
    )
    modules = resolve(spec, BASE)
    assert list(modules) == MODULES
    assert modules["model.layers.1.self_attn.q_proj"].rank == 4  # the first key that matches, in the file's order
    assert modules["model.layers.1.mlp.up_proj"].rank == 2
    assert modules["model.layers.1.mlp.up_proj"].scaling == pytest.approx(6.5 / 2**0.5)
    assert modules["model.layers.0.mlp.up_proj"].scaling == pytest.approx(16 / 8**0.5)


def test_the_default_targets_are_those_of_peft():
    for model_type, default in DEFAULT_TARGETS.items():
        theirs = PEFT_DEFAULTS[model_type]
        assert default == (theirs if isinstance(theirs, str) else tuple(theirs)), model_type
    assert {m.rsplit(".", 1)[-1] for m in resolve(spec_of(target_modules=None), BASE)} == {"q_proj", "v_proj"}
    with pytest.raises(InvalidAdapter, match="no default"):
        resolve(spec_of(target_modules=None), tiny_base(model_type="unheard-of"))


def test_what_peft_saves_by_itself_passes(tmp_path):
    saved = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", base_model_name_or_path="someone/tiny"
    )
    saved.save_pretrained(tmp_path)
    spec = parse_config((tmp_path / "adapter_config.json").read_bytes())
    check_base(spec, BASE)
    assert len(resolve(spec, BASE, max_rank=4)) == 24


UNSUPPORTED = {
    "peft_type": "LOHA",
    "task_type": "SEQ_CLS",
    "bias": "all",
    "use_dora": True,
    "lora_bias": True,
    "use_qalora": True,
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": [1],
    "target_parameters": ["experts"],
    "layer_replication": [[0, 4]],
    "alora_invocation_tokens": [1, 2],
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 1},
    "megatron_config": {"x": 1},
    "monteclora_config": {"x": 1},
    "kasa_config": {"x": 1},
    "velora_config": {"x": 1},
    "loftq_config": {"loftq_bits": 4},
    "something_new": 0,
    "init_lora_weights": "pissa_niter_4",
}
MALFORMED = {
    "r": [0, -1, True, 2.0, "8", None, 10**30],
    "lora_alpha": [True, "8", None, 10**400],
    "use_rslora": ["yes", 1],
    "rank_pattern": [{"q_proj": 0}, ["q_proj"], {"q_proj": True}, {"q_proj": 65}, {"(": 4}],
    "alpha_pattern": [{"q_proj": "x"}, "q_proj", {"[": 1}],
    "target_modules": [
        [],
        "",
        [1],
        {"a": 1},
        ["nothing"],
        "(",
        ["lm_head", "q_proj"],
        ["embed_tokens"],
        ".*self_attn.*",
    ],
    "layers_to_transform": ["1", [True], [1.0]],
    "layers_pattern": ["layers"],
    "auto_mapping": ["x", {"base_model_class": "GPT2LMHeadModel"}, {"base_model_class": 3}],
    "base_model_name_or_path": [3, "x" * 600, "acme/other", "other"],
    "init_lora_weights": ["olora", "corda", "loftq", "lora_ga", "pissa", "magic", 3],
}


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_what_is_not_served_is_refused_by_name(field):
    assert refused(**{field: UNSUPPORTED[field]}).param == field


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in MALFORMED.items() for v in values], ids=str)
def test_malformed_fields_are_refused_by_name(field, value):
    assert refused(**{field: value}).param == field


def test_a_rank_over_the_limit_names_where_it_comes_from():
    assert refused(r=65).param == "r"
    spec_of(r=65, rank_pattern={"proj": 4, "[qv]_proj": 4})
    assert len(resolve(spec_of(r=65, rank_pattern={"[qv]_proj": 4}), BASE, max_rank=64)) == 24


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"peft_type": "LORA", "r": NaN}',
        b'{"peft_type": "LORA", "peft_type": "LORA"}',
        b"[" * 60_000,
        b'{"a":' * 12_000,
        b'{"a": ' + b"[" * 20 + b"]" * 20 + b"}",
        b'{"r": ' + b"9" * 5000 + b"}",
        b" " * (MAX_CONFIG_BYTES + 1),
    ],
    ids=lambda raw: repr(raw[:20]),
)
def test_what_is_no_plain_json_object_is_refused(raw):
    with pytest.raises(InvalidAdapter) as caught:
        parse_config(raw)
    assert caught.value.param == "config"


@pytest.mark.parametrize(
    "name",
    ["", None, "acme/tiny", "other/TINY-LLAMA", "./x", "/models/x", "~/x", "C:\\models\\x", "a/b/c", "..\\x", "out/"],
)
def test_names_that_may_be_this_base_pass(name):
    check_base(spec_of(base_model_name_or_path=name), BASE)


def test_another_base_is_told_what_this_one_is_known_as():
    error = refused(base_model_name_or_path="acme/other")
    assert error.code == "base_mismatch"
    assert "acme/Tiny-Llama" in error.message
    assert "ONEBASE_BASE_NAMES" in error.message


EVIL = [
    r"(\w|\w\w|\.)+[!?]",
    r"((\w|\.)+)+!",
    r"(?:(?:\w*)*\.*)*!",
    r"(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)!",
    "(((a{99}){99}){99}){99}",
    "[^a-z]{65535}" * 20,
    "(?:" * 400 + "a" + ")" * 400,
    "(?i)[\\0-\\U0010ffff]" * 20,
    "a" * 2000,
    r"(a)\1",
    "(?:a){e}",
    "é",
]


@pytest.mark.parametrize("pattern", EVIL, ids=lambda pattern: pattern[:20])
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "layers_pattern"])
def test_evil_patterns_end_soon_and_name_their_field(field, pattern):
    fields = {"rank_pattern": {pattern: 4}} if field == "rank_pattern" else {field: pattern}
    if field == "layers_pattern":
        fields["layers_to_transform"] = [1]
    started = time.perf_counter()
    reasons = []
    try:
        resolve(spec_of(**fields), BASE)  # some only look evil, and match nothing at once
    except InvalidAdapter as exc:
        reasons.append(exc.param)
    assert set(reasons) <= {field, "target_modules"}
    assert time.perf_counter() - started < 6 * MATCH_SECONDS


def test_many_patterns_share_one_budget():
    fields = {"rank_pattern": {rf"(\w|\w\w|\.)+[!?]|z{number}": 4 for number in range(300)}}
    started = time.perf_counter()
    assert refused(**fields).param == "rank_pattern"
    assert time.perf_counter() - started < 6 * MATCH_SECONDS


def test_a_config_that_names_every_module_is_quick():
    big = tiny_base(80)
    spec = spec_of(target_modules=list(big.linears), rank_pattern=dict.fromkeys(list(big.linears)[:400], 4))
    started = time.perf_counter()
    assert len(resolve(spec, big)) == 560
    assert time.perf_counter() - started < 1
    assert all(re.fullmatch(r"[\w.]+", module) for module in big.linears)
