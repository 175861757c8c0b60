"""Load models and tokenizers with transformers, and explain its errors."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer

from ..checkpoints.auto_class import CAUSAL, auto_class
from ..errors import CheckpointError, EngineError
from ..execution.engines import check_device
from ..inputs.hub_ids import parse_hub_id

IMAGE_TEXT = "AutoModelForImageTextToText"  # such a model writes text from text alone, too
SHOWN_WEIGHTS = 3  # missing weights that a message names


def choose_device(name: str) -> torch.device:
    """Return the device of this name; "auto" is the first GPU, or the CPU if there is no GPU.

    Raises:
        UsageError: The name is no device's.
        EngineError: The machine does not have this device.
    """
    check_device(name)
    has_gpu = torch.cuda.is_available()
    device = torch.device(name if name != "auto" else "cuda" if has_gpu else "cpu")
    if device.type == "cuda" and (not has_gpu or (device.index or 0) >= torch.cuda.device_count()):
        count = torch.cuda.device_count() if has_gpu else 0
        raise EngineError(f"device {name}: torch sees {count} GPUs; `device='cpu'` needs none")
    return device


def generating_class(config: Mapping[str, Any]) -> Any:
    """Return the automatic class that loads a model of this config to write text."""
    name = auto_class(config)
    return getattr(transformers, name if name == IMAGE_TEXT else CAUSAL)


def load_model_and_tokenizer(kind: Any, path: str, device: torch.device, trust_remote_code: bool) -> tuple[Any, Any]:
    """Return the model, as load_model() does, and its tokenizer. Raises CheckpointError and EngineError."""
    model = load_model(kind, path, device, trust_remote_code)
    with _explain_errors(kind, path, trust_remote_code):
        name, options = _source(path, trust_remote_code)
        return model, AutoTokenizer.from_pretrained(name, **options)


def load_model(kind: Any, path: str, device: torch.device, trust_remote_code: bool) -> Any:
    """Return a model in its own dtype on a device, in evaluation mode.

    Args:
        kind: AutoModelForCausalLM or another class of that family.
        path: A folder, or a hub id: org/name[@revision].
        device: The device that the weights are moved to.
        trust_remote_code: True if code that comes with the model may run.

    Raises:
        CheckpointError: transformers cannot load the model, or the model lacks weights.
        EngineError: The memory of the device is too small.
    """
    with _explain_errors(kind, path, trust_remote_code):
        name, options = _source(path, trust_remote_code)
        model, info = kind.from_pretrained(name, dtype="auto", output_loading_info=True, **options)
    missing = sorted(info["missing_keys"])
    if missing:
        more = f" and {len(missing) - SHOWN_WEIGHTS} more" if len(missing) > SHOWN_WEIGHTS else ""
        raise CheckpointError(
            f"{path}: as {kind.__name__} it lacks {', '.join(missing[:SHOWN_WEIGHTS])}{more}, which would be random "
            "numbers; is it a model of this kind?"
        )
    try:
        return model.to(device).eval()
    except torch.cuda.OutOfMemoryError as error:
        raise EngineError(
            f"{path} does not fit into the memory of {device}: {str(error).splitlines()[0]}; try `device='cpu'`"
        ) from error


def _source(path: str, trust_remote_code: bool) -> tuple[str, dict[str, Any]]:
    """Return a model's name for transformers, and the options that go with it."""
    hub_id = None if os.path.exists(path) else parse_hub_id(path)
    name, revision = (path, "main") if hub_id is None else (hub_id.repo, hub_id.revision or "main")
    return name, {"revision": revision, "trust_remote_code": trust_remote_code}


@contextlib.contextmanager
def _explain_errors(kind: Any, path: str, trust_remote_code: bool) -> Iterator[None]:
    """Turn every error of a load into a CheckpointError that names the model."""
    try:
        yield
    except Exception as error:  # transformers raises errors of many types, and a model's own code may raise any
        raise CheckpointError(_explain_error(kind, path, error, trust_remote_code)) from error


def _explain_error(kind: Any, path: str, error: Exception, trust_remote_code: bool) -> str:
    """Return the message for a load that failed."""
    first_line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if "trust_remote_code" in str(error) and not trust_remote_code:
        return f"{path}: the model comes with its own code; `trust_remote_code=True` runs it, if you trust its authors"
    return f"{path}: transformers cannot load it as {kind.__name__}: {first_line}"


@contextlib.contextmanager
def explain_gpu_memory_errors(remedy: str) -> Iterator[None]:
    """Turn a GPU's out-of-memory error into an EngineError whose message proposes the remedy."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise EngineError(
            f"the GPU's memory is too small: {str(error).splitlines()[0]}; try a smaller {remedy}. All replies so far "
            "are kept"
        ) from error
