"""The tiny model of `recovery.py` on a peer's side, and how its processes say which step they have done."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch
from recovery import BATCH, LENGTH, MODEL, PACE_S, RANKS
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_model() -> nn.Module:
    """Of the same sizes as ours."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=MODEL["vocab"],
        hidden_size=MODEL["hidden"],
        intermediate_size=MODEL["ffn"],
        num_hidden_layers=MODEL["layers"],
        num_attention_heads=MODEL["heads"],
        num_key_value_heads=MODEL["kv_heads"],
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def batch_of(step: int, rank: int) -> Tensor:
    """A rank's sequences of a step."""
    draws = torch.Generator().manual_seed(1000 * step + rank)
    time.sleep(PACE_S)
    return torch.randint(MODEL["vocab"], (BATCH // RANKS, LENGTH), generator=draws)


def beat(rank: int, step: int) -> None:
    """Says that a rank has done a step."""
    line = json.dumps({"rank": rank, "pid": os.getpid(), "step": step, "time": time.time()})
    with Path(os.environ["BEATS"]).open("a") as beats:
        beats.write(line + "\n")
