"""Tiny models of transformers for tests: pairs of two states of one model, and the logits of a loaded folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from checkpoint_files import quiet

LOAD = transformers.AutoModelForCausalLM.from_pretrained
IDS = torch.tensor([[1, 2, 3, 4]])


def pair_of(model: Any, folder: Path) -> tuple[Path, Path]:
    """Save a model twice in bf16, as `sft` and, with other numbers, as `aligned`; return both folders."""
    model = model.to(torch.bfloat16)
    model.save_pretrained(folder / "sft")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.003)
    model.save_pretrained(folder / "aligned")
    return folder / "sft", folder / "aligned"


def loaded(folder: Path, dtype: Any = "auto") -> Any:
    """Return the model of a folder, and check that the folder has exactly the model's weights."""
    with quiet():
        model, info = LOAD(folder, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def logits(folder: Path) -> torch.Tensor:
    """Return the logits of a folder's model in fp32."""
    with quiet(), torch.no_grad():
        found: torch.Tensor = loaded(folder, torch.float32)(IDS).logits
    return found
