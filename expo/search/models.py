"""Models and tokenizers as transformers loads them, with its errors explained."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoTokenizer

from ..errors import CheckpointError, EngineError
from ..execution.engines import check_device
from ..inputs.hub_ids import parse_hub_id


def device_of(name: str) -> torch.device:
    """auto is the first GPU where there is one. Raises UsageError and EngineError."""
    check_device(name)
    found = torch.cuda.is_available()
    device = torch.device(name if name != "auto" else "cuda" if found else "cpu")
    if device.type == "cuda" and (not found or (device.index or 0) >= torch.cuda.device_count()):
        count = torch.cuda.device_count() if found else 0
        raise EngineError(f"device {name}: torch sees {count} GPUs here; --device cpu works without")
    return device


def load(kind: Any, path: str, device: torch.device, trust_remote_code: bool) -> tuple[Any, Any]:
    """Return load_model()'s model and its tokenizer. Raises CheckpointError and EngineError."""
    model = load_model(kind, path, device, trust_remote_code)
    with _explained(kind, path, trust_remote_code):
        where, how = _source(path, trust_remote_code)
        return model, AutoTokenizer.from_pretrained(where, **how)


def load_model(kind: Any, path: str, device: torch.device, trust_remote_code: bool) -> Any:
    """Return a model of its own dtype, ready for inference.

    kind: AutoModelForCausalLM or another of the family. path: a folder, or org/name[@revision].
    Raises CheckpointError, and EngineError where the memory is too small.
    """
    with _explained(kind, path, trust_remote_code):
        where, how = _source(path, trust_remote_code)
        model, info = kind.from_pretrained(where, dtype="auto", output_loading_info=True, **how)
    missing = sorted(info["missing_keys"])
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CheckpointError(
            f"{path}: as {kind.__name__} it lacks {', '.join(missing[:3])}{more}, which would be random numbers; "
            "is it a model of this kind?"
        )
    try:
        return model.to(device).eval()
    except torch.cuda.OutOfMemoryError as error:
        raise EngineError(
            f"{path} does not fit into the memory of {device}: {str(error).splitlines()[0]}; try --device cpu"
        ) from error


def _source(path: str, trust_remote_code: bool) -> tuple[str, dict[str, Any]]:
    """Return what transformers takes as a model's name, and its options."""
    hub_id = None if os.path.exists(path) else parse_hub_id(path)
    where, revision = (path, "main") if hub_id is None else (hub_id.repo, hub_id.revision or "main")
    return where, {"revision": revision, "trust_remote_code": trust_remote_code}


@contextlib.contextmanager
def _explained(kind: Any, path: str, trust_remote_code: bool) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # transformers raises all kinds, custom code any
        raise CheckpointError(_cannot(kind, path, error, trust_remote_code)) from error


def _cannot(kind: Any, path: str, error: Exception, trusted: bool) -> str:
    said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if "trust_remote_code" in str(error) and not trusted:
        return f"{path}: it comes with code of its own; --trust-remote-code runs that, if you trust its authors"
    return f"{path}: transformers cannot load it as {kind.__name__}: {said}"


@contextlib.contextmanager
def memory_explained(smaller: str) -> Iterator[None]:
    """Turns a GPU's lack of memory into an EngineError that says what to make smaller."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise EngineError(
            f"the GPU's memory is too small: {str(error).splitlines()[0]}; try a smaller {smaller}, "
            "what is done is kept"
        ) from error
