"""Recognise the folders that trainers leave, and name the file that expo reads or the command that converts them."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Sequence

from .files import ADAPTER_CONFIG, WHOLE_MODELS

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_VARIANT = re.compile(r"model\.[\w-]+\.safetensors")
_MEGATRON = re.compile(r"iter_\d{7}|mp_rank_\d\d(_\d{3})*")

Explain = Callable[[str, Sequence[str]], "str | None"]


def explain_training_folder(folder: str, names: Sequence[str]) -> str | None:
    """Return what a folder without a whole model is, and the file to give or the command that converts it.

    Args:
        folder: The path of the folder.
        names: The names in it, sorted.

    Returns:
        The end of a message; None for a folder that no known trainer leaves.
    """
    return next((text for explain in _KINDS if (text := explain(folder, names))), None)


def _deepspeed(folder: str, names: Sequence[str]) -> str | None:
    if "zero_to_fp32.py" not in names:
        return None
    script, whole = (shlex.quote(each) for each in (os.path.join(folder, "zero_to_fp32.py"), f"{folder}-fp32"))
    return (
        f"DeepSpeed has left the parts of each process: run python {script} {shlex.quote(folder)} {whole}, which "
        f"writes the whole weights into {whole}, and copy config.json there"
    )


def _distributed(folder: str, names: Sequence[str]) -> str | None:
    if ".metadata" in names or not any(name.endswith(".distcp") for name in names):
        return None
    return "a distributed checkpoint of torch without its .metadata: copy that file too, whose name begins with a dot"


def _megatron(folder: str, names: Sequence[str]) -> str | None:
    if "latest_checkpointed_iteration.txt" not in names and not any(map(_MEGATRON.fullmatch, names)):
        return None
    return "a checkpoint of Megatron: convert it into transformers' format with the tool of the library that wrote it"


def _run(folder: str, names: Sequence[str]) -> str | None:
    steps = [int(match[1]) for match in map(_CHECKPOINT.fullmatch, names) if match]
    if not steps:
        return None
    last = os.path.join(folder, f"checkpoint-{max(steps)}")
    others = f"; it has {len(steps)} of them" if len(steps) > 1 else ""
    return f"the folder of a training run: give one of its checkpoints, such as the last one, {last}{others}"


def _two_adapters(folder: str, names: Sequence[str]) -> str | None:
    found = [name for name in names if os.path.exists(os.path.join(folder, name, ADAPTER_CONFIG))]
    if not found:
        return None
    own = next((name for name in ("train", "default") if name in found), found[0])
    return f"it has PEFT adapters in {', '.join(found)}: give {os.path.join(folder, own)} as `aligned`"


def _variant(folder: str, names: Sequence[str]) -> str | None:
    found = [name for name in names if _VARIANT.fullmatch(name)]
    if len(found) != 1:
        return None
    path = os.path.join(folder, found[0])
    return f"its weights have a variant of the usual name: rename {path} to {WHOLE_MODELS[0]}"


def _mistral(folder: str, names: Sequence[str]) -> str | None:
    found = [name for name in names if re.fullmatch(r"consolidated(\.\d\d)?\.(safetensors|pth)", name)]
    if not found:
        return None
    return (
        f"{found[0]} has the names of the model's authors: use the same model in transformers' format, or give such "
        "files as both `sft` and `aligned`"
    )


_KINDS: tuple[Explain, ...] = (
    _deepspeed, _distributed, _run, _megatron, _two_adapters, _variant, _mistral,
)  # fmt: skip
