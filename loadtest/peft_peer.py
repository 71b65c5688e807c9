"""What PEFT itself reaches with 16 adapters in one batch (`adapter_names`): its best case, a static batch."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from loadtest.workload import prompts


class PeftPeer:
    """transformers and PEFT with every adapter loaded."""

    def __init__(self, base: Path, adapters: list[Path], dtype: str):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
        self.names = [path.name for path in adapters]
        self.model: Any = PeftModel.from_pretrained(model, adapters[0], adapter_name=self.names[0])
        for path in adapters[1:]:
            self.model.load_adapter(path, adapter_name=path.name)
        self.model.eval()

    def run(self, rows: int, length: int, new: int, seed: int) -> dict[str, float]:
        """One static batch, row i on adapter i; tokens a second, prefill included."""
        ids = torch.tensor(prompts(rows, length, seed))
        names = [self.names[at % len(self.names)] for at in range(rows)]
        start = time.perf_counter()
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=2,
                adapter_names=names,
            )
        seconds = time.perf_counter() - start
        assert out.shape[1] == length + new
        return {"seconds": seconds, "tokens_per_s": rows * new / seconds}


def main() -> None:
    """Answers one JSON line per line `rows length new seed` on standard input; loads first, then says `ready`."""
    base, folder, dtype = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(int(sys.argv[4]))
    peer = PeftPeer(base, sorted(path.parent for path in folder.glob("*/adapter_config.json")), dtype)
    print("ready", flush=True)
    for line in sys.stdin:
        rows, length, new, seed = map(int, line.split())
        print(json.dumps(peer.run(rows, length, new, seed)), flush=True)


if __name__ == "__main__":
    main()
