"""Tiny random models of transformers, saved as Hugging Face folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def save_random(
    name: str, options: dict[str, Any], directory: Path, dtype: torch.dtype = torch.float32, **save: Any
) -> torch.nn.Module:
    """Save a random model whose vectors (norms, biases) are random too, so that none can be lost unnoticed."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**options, attn_implementation="eager")
    model = getattr(transformers, f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")(config).to(dtype)
    with torch.no_grad():
        for tensor in (*model.parameters(), *(buffer for key, buffer in model.named_buffers() if key.endswith("bias"))):
            tensor.add_(0.1 * torch.randn(tensor.shape))
    model.save_pretrained(directory, **save)
    return model.eval()
