"""An exported edit as those see it who do not have errata: plain transformers, and PEFT for an adapter. Called by ledger.py.

    python benchmarks/served.py BASE EXPORT IDS.json LOGITS.safetensors

BASE: the unedited model; EXPORT: an adapter, or a whole model. IDS: one list of token ids a prompt. Each prompt goes through by itself.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


def main(base: str, exported: str, ids: str, to: str) -> None:
    if (Path(exported) / "adapter_config.json").exists():
        from peft import PeftModel

        plain = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
        model = PeftModel.from_pretrained(plain, exported).merge_and_unload().eval()
    else:
        model = AutoModelForCausalLM.from_pretrained(exported, dtype="auto").eval()
    assert "errata" not in sys.modules
    with torch.no_grad():
        logits = {str(i): model(torch.tensor([row])).logits[0].contiguous() for i, row in enumerate(json.loads(Path(ids).read_text()))}
    save_file(logits, to)


if __name__ == "__main__":
    main(*sys.argv[1:])
