"""The GPU benchmark runs through on a tiny shape, so that no lent device's minutes go into a slip of the pen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from loadtest import gpu_bench
from tests.kernelcases import DEVICE

SMALL = (
    "--shape tiny --dtype float32 --rows 2 --prompt 3 --new 4 --rank 4 --rounds 1 --registered 1 40 --requests 3 "
    "--slots 2 --profile"
)


def test_the_report_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report.json"
    gpu_bench.main([*SMALL.split(), "--device", DEVICE.type, "--commit", "abc", "--out", str(out)])
    report = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == report
    assert report["command"].startswith("python -m loadtest.gpu_bench --shape tiny")
    assert report["commit"] == "abc"
    assert out.with_suffix(".txt").read_text().count("adapters: ") == 2
    decode = report["decode"]
    for side in ("base", "adapters", "base_without_graphs"):
        assert decode[side]["errors"] == 0
        assert decode[side]["steps"] >= 1
        assert min(decode[side]["step_ms"], decode[side]["period_ms"]) > 0
        assert decode[side]["tokens_per_s"] > 0
    layers, hidden, inner, kv = 2, 64, 96, 32
    per_layer = 2 * (hidden + hidden) + 2 * (hidden + kv) + 3 * (hidden + inner)
    assert decode["adapter_bytes"] == 2 * 4 * 4 * layers * per_layer
    attention, mlp, head = 2 * hidden * hidden + 2 * hidden * kv, 3 * hidden * inner, 320 * hidden
    assert decode["weight_bytes"] == 4 * (layers * (attention + mlp + 2 * hidden) + hidden + head)
    assert 0 < decode["bytes_allow"] < 1
    assert [entry["registered"] for entry in report["registered"]] == [1, 40]
    assert all(entry["errors"] == 0 and entry["tokens_per_s"] > 0 for entry in report["registered"])
    assert report["registered"][1]["loads"] >= 1
