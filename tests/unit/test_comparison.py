"""`make bench`: its arithmetic on figures made by hand, and turns in which one side at a time computes."""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from typing import Any

import pytest

from loadtest import compare, comparison
from loadtest.peers.peer import Case, NotThere, Process, cases

FLOORS = {
    "read GB/s": 10.0,
    "matmul float32 256 rows GFLOP/s": 100.0,
    "matmul float32 16 rows, head GFLOP/s": 1e6,
    "matmul bfloat16 256 rows GFLOP/s": 200.0,
    "matmul bfloat16 16 rows, head GFLOP/s": 1e6,
}
REPORT: dict[str, Any] = {
    "rows": 16,
    "prompt": 128,
    "new": 128,
    "machine": "M",
    "command": "c",
    "commit": "d",
    "when": "w",
    "absent": {"vLLM bfloat16": "not installed"},
    "floors": comparison.compare_floors(FLOORS, FLOORS),
    "medians": {
        "onebase float32": {"adapters": {"tokens_per_s": 200.0}, "base": {"tokens_per_s": 250.0}},
        "onebase bfloat16": {
            "adapters": {"tokens_per_s": 300.0, "ttft_ms": 900.0},
            "base": {"tokens_per_s": 320.0},
            "one": {"tokens_per_s": 30.0, "decode_tokens_per_s": 60.0, "ttft_ms": 50.0},
            "prefill": {"seconds": 4.0},
        },
        "bare engine bfloat16": {"adapters": {"tokens_per_s": 320.0}, "base": {"tokens_per_s": 400.0}},
        "transformers bfloat16": {"base": {"tokens_per_s": 100.0}, "one": {"decode_tokens_per_s": 20.0}},
        "PEFT float32": {"adapters": {"tokens_per_s": 50.0}},
        "llama.cpp float16": {
            "adapters": {"tokens_per_s": 60.0},
            "base": {"tokens_per_s": 160.0},
            "one": {"decode_tokens_per_s": 100.0},
        },
    },
    "rounds": {"llama.cpp float16": {"adapters": [{"tokens_per_s": 60.0}, {"error": "2 requests failed"}]}},
}


def test_ratios_are_those_of_the_bars() -> None:
    found = comparison.ratios(REPORT)
    assert found["adapters, float32: onebase / PEFT"] == 4
    assert found["adapters, bfloat16: onebase / PEFT"] is None
    assert found["onebase float32: adapters / base"] == pytest.approx(0.8)
    assert found["adapters, bfloat16: over HTTP / the bare engine"] == pytest.approx(300 / 320)
    assert found["adapters: onebase / better of llama.cpp and vLLM"] == 5
    assert found["base: onebase / best peer of 16-bit weights"] == 2
    assert found["one request, decode: onebase / llama.cpp"] == pytest.approx(0.6)
    assert found["one request, decode, bfloat16: onebase / transformers"] == 3
    flop = 2 * 16 * (128 * comparison.BLOCKS + comparison.HEAD)
    done = found["prefill, bfloat16: arithmetic done / what the machine's matmul does"]
    assert done == pytest.approx(flop / 4.0 / 200e9)


def test_the_floor_is_the_bytes_of_each_step_and_the_arithmetic_of_the_prefill() -> None:
    found = comparison.roofline(REPORT, "bfloat16")
    weights = 2 * (comparison.BLOCKS + comparison.HEAD)
    assert found["one"]["decode_tokens_per_s"] == pytest.approx(10e9 / weights)
    prefill = 2 * (128 * comparison.BLOCKS + comparison.HEAD) / 200e9
    assert found["one"]["ttft_ms"] == pytest.approx(prefill * 1e3)
    assert found["base"]["tokens_per_s"] == pytest.approx(16 * 128 / (16 * prefill + 127 * weights / 10e9))
    assert comparison.roofline(REPORT, "float32")["one"]["decode_tokens_per_s"] == pytest.approx(5e9 / weights)


@pytest.mark.real
def test_the_parameters_are_those_of_the_bundled_base(smollm2: Path) -> None:
    from safetensors import safe_open

    with safe_open(smollm2 / "model.safetensors", "numpy") as tensors:
        sizes = {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118
    matrices = {key: shape[0] * shape[1] for key, shape in sizes.items() if len(shape) == 2}
    assert matrices.pop("model.embed_tokens.weight") == comparison.HEAD
    matrices.pop("lm_head.weight", None)
    assert sum(matrices.values()) == comparison.BLOCKS


def test_floors_that_moved_are_told() -> None:
    after = {**FLOORS, "read GB/s": 8.9, "matmul float32 256 rows GFLOP/s": 109.0}
    found = comparison.compare_floors(FLOORS, after)
    assert found["moved"] == {"read GB/s": pytest.approx(0.89)}
    report = {**REPORT, "floors": found}
    assert "measure again: read GB/s." in comparison.notes(report)
    assert "measure again" not in comparison.notes(REPORT)


def test_the_page_has_every_side_what_is_absent_and_what_failed() -> None:
    page = comparison.page(REPORT)
    assert "| **onebase bfloat16** | 300 | 320 | 60 | 900 | 50 |" in page
    assert "| PEFT float32 | 50 | - | - | - | - |" in page
    assert "vLLM bfloat16: not installed." in page
    assert "llama.cpp float16, adapters: 2 requests failed." in page
    assert "| adapters, float32: onebase / PEFT | 4 |" in page


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    comparison.plot(copy.deepcopy(REPORT), tmp_path / "compare.png")
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_medians_leave_failures_out() -> None:
    assert compare.medians([{"a": 1.0}, {"error": "x"}, {"a": 3.0}, {"a": 2.0}]) == {"a": 2.0}
    assert compare.medians([{"error": "x"}]) == {}


def test_requests_are_the_same_for_every_side_and_new_in_every_round() -> None:
    adapters, base, one, prefill = cases(4)
    assert {request.output_tokens for request in prefill.requests(8, 4, 1)} == {1}
    assert [request.adapter for request in adapters.requests(8, 4, 1)] == [0, 1, 2, 3]
    assert {request.adapter for request in base.requests(8, 4, 1)} == {None}
    assert len(one.requests(8, 4, 1)) == 1
    assert adapters.requests(8, 4, 1) == adapters.requests(8, 4, 1)
    assert adapters.requests(8, 4, 1)[0].prompt() != adapters.requests(8, 4, 2)[0].prompt()


class Side:
    """A peer that writes down what happens to it."""

    dtype = "float32"

    def __init__(self, name: str, log: list[str], only: str = "", fails: bool = False):
        self.name, self.process, self._log, self._only, self._fails = name, self, log, only, fails

    def pause(self) -> None:
        self._log.append(f"{self.name} paused")

    def resume(self) -> None:
        self._log.append(f"{self.name} resumed")

    def can(self, case: Case) -> bool:
        return self._only in ("", case.key)

    def measure(self, case: Case, requests: list[Any]) -> dict[str, float]:
        self._log.append(f"{self.name} {case.key} {requests[0].output_tokens}")
        if self._fails:
            raise RuntimeError("broken")
        return {"tokens_per_s": 1.0}


def test_sides_take_turns_after_a_warm_up_and_only_one_is_awake() -> None:
    log: list[str] = []
    sides: list[Any] = [Side("a", log), Side("b", log, only="adapters"), Side("c", log, fails=True)]
    arguments = argparse.Namespace(rows=2, prompt=4, new=9, rounds=2)
    found = compare.take_turns(sides, arguments)
    awake: set[str] = set()
    for line in log:
        name, _, what = line.partition(" ")
        if what == "resumed":
            awake.add(name)
        assert awake == {name}
        if what == "paused":
            awake.discard(name)
    assert {line for line in log if line.endswith(" 4")} == {"a adapters 4", "b adapters 4", "c adapters 4",
                                                             "a base 4", "c base 4", "a one 4", "c one 4"}  # fmt: skip
    measured = [line for line in log if line.endswith(" 9")]
    assert [line for line in measured if "adapters" in line][:3] == ["b adapters 9", "c adapters 9", "a adapters 9"]
    assert len(found["a float32"]["base"]) == 2
    assert set(found["b float32"]) == {"adapters"}
    assert found["c float32"]["one"] == [{"error": "broken"}] * 2


def test_a_process_that_does_not_start_says_why(tmp_path: Path) -> None:
    process = Process([sys.executable, "-c", "raise SystemExit('no such model')"], tmp_path / "log")
    with pytest.raises(NotThere, match="no such model"):
        process.wait(lambda: False)


def test_a_paused_process_stands_still_and_can_be_stopped(tmp_path: Path) -> None:
    process = Process([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log")
    process.pause()
    status = Path(f"/proc/{process.popen.pid}/stat")
    while status.read_text().rpartition(")")[2].split()[0] != "T":
        assert process.popen.poll() is None
    process.stop()
    assert process.popen.poll() is not None
    process.stop()
