"""The process behind `static.py`. Arguments: base, dtype, threads, adapter directories.

Says `ready`, then answers one JSON object for each JSON list of requests on standard input. All have the same lengths.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from loadtest.workload import Request


class Clock(StoppingCriteria):
    """Asked after every token; notes when the first one was there, and never stops anything."""

    def __init__(self) -> None:
        self.first: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """False for each row."""
        if self.first is None:
            self.first = time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Models:
    """The base alone, and once more under PEFT with every adapter loaded."""

    def __init__(self, base: Path, dtype: torch.dtype, adapters: list[Path]):
        self._names = [path.name for path in adapters]
        self._alone: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()
        under = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        self._peft: Any = PeftModel.from_pretrained(under, adapters[0], adapter_name=self._names[0])
        for path in adapters[1:]:
            self._peft.load_adapter(path, adapter_name=path.name)
        self._peft.eval()

    def run(self, requests: list[Request]) -> dict[str, float]:
        """One batch, each row on its own adapter or all on the base."""
        ids, new, clock = torch.tensor([one.prompt() for one in requests]), requests[0].output_tokens, Clock()
        adapters = [self._names[one.adapter] for one in requests if one.adapter is not None]
        more = {"adapter_names": adapters} if adapters else {}
        start = time.perf_counter()
        with torch.inference_mode():
            out = (self._peft if adapters else self._alone).generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=2,
                stopping_criteria=StoppingCriteriaList([clock]),
                **more,
            )
        end = time.perf_counter()
        assert out.shape == (len(requests), ids.shape[1] + new)
        assert clock.first is not None
        figures = {
            "seconds": end - start,
            "tokens_per_s": len(requests) * new / (end - start),
            "ttft_ms": (clock.first - start) * 1e3,
        }
        if len(requests) == 1 and new > 1:
            figures["decode_tokens_per_s"] = (new - 1) / (end - clock.first)
        return figures


def main() -> None:
    """Answers until its input ends."""
    base, dtype, threads, *adapters = sys.argv[1:]
    torch.set_num_threads(int(threads))
    models = Models(Path(base), getattr(torch, dtype), list(map(Path, adapters)))
    print("ready", flush=True)
    for line in sys.stdin:
        requests = [Request(**one) for one in json.loads(line)]
        print(json.dumps(models.run(requests)), flush=True)


if __name__ == "__main__":
    main()
