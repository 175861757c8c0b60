"""The check of `--check`: transformers loads an output, and each weight in the files must fit one of the model.

The loader of transformers decides this, because it renames, converts and ties weights. The loader gets the names and
shapes in the files, as tensors on torch's meta device, and no data. No custom code runs. Only this module and its
callers import transformers, and only if the check is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any

from ..checkpoints.checkpoint import Checkpoint, open_checkpoint
from ..checkpoints.files import CONFIG
from ..checkpoints.model_parts import EMBEDDING, HEAD
from ..checkpoints.safetensors_header import TensorInfo
from ..dtypes import TABLE
from ..errors import OutputError, UsageError

MAX_LISTED = 36  # the number of problems in a message, which then has at most 40 lines
COMPARED_BYTES = 1 << 20  # the bytes of each of two tensors that are compared at a time
LEAVE_OUT = "leave `check` out"


class Unloadable(OutputError):
    """An output that transformers does not load completely, although its bytes are computed as planned."""


def model_class(aligned: Checkpoint) -> Any:
    """Return the class of transformers that loads the output: the class that aligned's config names.

    Raises:
        UsageError: There is no such class. A merge calls this function before it computes.
    """
    if aligned.folder is None or CONFIG not in aligned.files:
        reason = "is one bare file" if aligned.folder is None else f"has no {CONFIG}"
        raise UsageError(f"`check` loads a folder with a {CONFIG}, but aligned {aligned.path} {reason}; {LEAVE_OUT}")
    library = _import_transformers()
    config = aligned.config
    architectures, model_type = config.get("architectures"), config.get("model_type")
    if isinstance(architectures, list) and architectures:
        name, loader = f"class {architectures[0]}", getattr(library, str(architectures[0]), None)
    else:
        known = model_type in library.CONFIG_MAPPING
        name = f"model_type {model_type!r}"
        loader = library.MODEL_MAPPING.get(library.CONFIG_MAPPING[model_type], None) if known else None
    if hasattr(loader, "from_pretrained") and hasattr(loader, "config_class"):
        return loader
    if config.get("auto_map"):
        raise UsageError(
            f"`check` cannot check this model: its {name} is custom code (auto_map in aligned's {CONFIG}), which is "
            f"not run; {LEAVE_OUT}"
        )
    raise UsageError(
        f"`check` cannot check this model: transformers {library.__version__} does not know the {name} of "
        f"aligned's {CONFIG}; install a version that does, or {LEAVE_OUT}"
    )


def _import_transformers() -> Any:
    """Return the module transformers. Raises UsageError if it or accelerate is missing or broken."""
    try:
        import transformers

        library: Any = transformers
        complete = library.utils.is_accelerate_available()
    except Exception as error:  # the import of a broken installation may raise any exception
        raise UsageError(f"`check` needs transformers, which cannot be imported ({error}); {LEAVE_OUT}") from error
    if not complete:
        raise UsageError(f"`check` needs accelerate, which transformers loads with: install it, or {LEAVE_OUT}")
    return library


def check_output(loader: Any, folder: str, out: str) -> None:
    """Load an output without its data, and compare the model's weights with those in the files.

    Args:
        loader: The class of transformers that `model_class` returned.
        folder: The folder of the complete output.
        out: The output's path in messages.

    Raises:
        Unloadable: Weights are missing, unexpected or of another shape, or are tied and stored apart.
    """
    with closing(open_checkpoint(folder)) as output:
        model, info = _load(loader, folder, out, output.tensors)
        problems = [f"missing: {name}" for name in sorted(info["missing_keys"])]
        problems += [f"unexpected: {name}" for name in sorted(info["unexpected_keys"])]
        problems += [
            f"mismatched: {name}: {list(in_files)} in the files, {list(in_model)} in the model"
            for name, in_files, in_model in sorted(info["mismatched_keys"])
        ]
        problems += [str(text) for text in info.get("error_msgs") or ()]
        problems += [
            f"tied by the config, but stored apart with other values: {target} and {source}"
            for target, source in _stored_ties(model, output.tensors)
            if not _are_equal(output, target, source)
        ]
    if problems:
        more = [f"and {len(problems) - MAX_LISTED} more"] if len(problems) > MAX_LISTED else []
        raise Unloadable("\n  ".join([_heading(loader, out), *problems[:MAX_LISTED], *more]))


def _heading(loader: Any, out: str) -> str:
    """Return the first line of a message about an output that cannot be loaded."""
    import transformers

    return f"{out}: transformers {transformers.__version__} does not load it completely as {loader.__name__}:"


def _load(loader: Any, folder: str, out: str, tensors: Mapping[str, TensorInfo]) -> tuple[Any, dict[str, Any]]:
    """Return the model on the meta device, and transformers' lists of weights that do not fit. Raises Unloadable."""
    import torch

    state = {
        name: torch.empty(tensor.shape, dtype=getattr(torch, TABLE[tensor.dtype].torch), device="meta")
        for name, tensor in tensors.items()
    }
    try:
        with _silent_transformers():
            config = loader.config_class.from_pretrained(folder, local_files_only=True)
            model, info = loader.from_pretrained(
                None, config=config, state_dict=state, device_map="meta", output_loading_info=True,
                ignore_mismatched_sizes=True,
            )  # fmt: skip
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()][:MAX_LISTED]
        raise Unloadable("\n  ".join([_heading(loader, out), f"{type(error).__name__}:", *lines])) from error
    return model, info


@contextmanager
def _silent_transformers() -> Iterator[None]:
    """Turn off transformers' reports and progress bars, and restore its settings at the end."""
    logging: Any = importlib.import_module("transformers.utils.logging")
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _stored_ties(model: Any, tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, str]]:
    """Yield pairs of tensors that are stored apart, although the model's config ties them."""
    for target, source in _ties(model).items():
        first, second = _name_in_files(target, tensors), _name_in_files(source, tensors)
        if first is not None and second is not None and first != second:
            yield first, second


def _ties(model: Any) -> dict[str, str]:
    """Return, for the name of each tied parameter, the name of the parameter that it is tied to."""
    ties = getattr(model, "all_tied_weights_keys", None)
    if isinstance(ties, dict):
        return ties
    # Models of transformers before version 5 lack this attribute, but their head and embedding show the tie.
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or embedding is None or not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return {}
    names = {module: f"{name}.weight" for name, module in model.named_modules()}
    return {names[head]: names[embedding]}


def _name_in_files(name: str, tensors: Mapping[str, TensorInfo]) -> str | None:
    """Return the name that a parameter of the model has in the files; None if the files do not have the parameter.

    A head or an embedding may have another name in the files, if the files have only one head or embedding.
    """
    if name in tensors:
        return name
    pattern = next((pattern for pattern in (HEAD, EMBEDDING) if pattern.search(name)), None)
    matches = [other for other in tensors if pattern is not None and pattern.search(other)]
    return matches[0] if len(matches) == 1 else None


def _are_equal(checkpoint: Checkpoint, first: str, second: str) -> bool:
    """Return True if two tensors of a checkpoint have the same dtype, shape and bytes."""
    one, other = checkpoint.tensors[first], checkpoint.tensors[second]
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    length = one.stop - one.start
    buffers = bytearray(COMPARED_BYTES), bytearray(COMPARED_BYTES)
    for offset in range(0, length, COMPARED_BYTES):
        parts = [memoryview(buffer)[: min(COMPARED_BYTES, length - offset)] for buffer in buffers]
        for part, tensor in zip(parts, (one, other), strict=True):
            checkpoint.reader(tensor.name).read(tensor.start + offset, part)
        if parts[0] != parts[1]:
            return False
    return True
