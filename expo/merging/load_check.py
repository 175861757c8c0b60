"""--check: whether transformers loads an output with every weight in its place.

transformers' own loading decides, so that its renames, conversions and ties count; it gets the names and shapes that
the files hold, on torch's meta device, and no data. No custom code is run. transformers is imported here, when asked.
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

SHOWN = 36  # findings that a message lists; with its other lines it stays within 40
BLOCK = 1 << 20  # bytes of two tensors that are compared at a time
LEAVE_OUT = "leave --check out"


class Unloadable(OutputError):
    """An output that transformers does not load as it should; what was computed is sound."""


def model_class(aligned: Checkpoint) -> Any:
    """Return the class of transformers that an output is to be loaded with: the one that the config names.

    Raises UsageError where there is none, before a merge has done its work.
    """
    if aligned.folder is None or CONFIG not in aligned.files:
        lack = "is one bare file" if aligned.folder is None else f"has no {CONFIG}"
        raise UsageError(f"--check loads a folder with a {CONFIG}, but aligned {aligned.path} {lack}; {LEAVE_OUT}")
    library = _library()
    config = aligned.config
    architectures, kind = config.get("architectures"), config.get("model_type")
    if isinstance(architectures, list) and architectures:
        what, found = f"class {architectures[0]}", getattr(library, str(architectures[0]), None)
    else:
        known = kind in library.CONFIG_MAPPING
        what = f"model_type {kind!r}"
        found = library.MODEL_MAPPING.get(library.CONFIG_MAPPING[kind], None) if known else None
    if hasattr(found, "from_pretrained") and hasattr(found, "config_class"):
        return found
    if config.get("auto_map"):
        raise UsageError(
            f"--check cannot check this model: its {what} is custom code (auto_map in aligned's {CONFIG}), which is "
            f"not run; {LEAVE_OUT}"
        )
    raise UsageError(
        f"--check cannot check this model: transformers {library.__version__} does not know the {what} of "
        f"aligned's {CONFIG}; install a version that does, or {LEAVE_OUT}"
    )


def _library() -> Any:
    """Return transformers. Raises UsageError where it cannot do what is wanted of it."""
    try:
        import transformers

        library: Any = transformers
        complete = library.utils.is_accelerate_available()
    except Exception as error:  # an installation may be broken in many ways
        raise UsageError(f"--check needs transformers, which cannot be imported ({error}); {LEAVE_OUT}") from error
    if not complete:
        raise UsageError(f"--check needs accelerate, which transformers loads with: install it, or {LEAVE_OUT}")
    return library


def check_output(loader: Any, folder: str, out: str) -> None:
    """Load an output without its data, and compare what the model has with what the files hold.

    Args:
        loader: A class of transformers, of `model_class`.
        folder: Where the output is, complete.
        out: What messages call it.

    Raises:
        Unloadable: Weights are missing, unexpected or of another shape, or are tied and stored apart.
    """
    with closing(open_checkpoint(folder)) as held:
        model, found = _load(loader, folder, out, held.tensors)
        problems = [f"missing: {name}" for name in sorted(found["missing_keys"])]
        problems += [f"unexpected: {name}" for name in sorted(found["unexpected_keys"])]
        problems += [
            f"mismatched: {name}: {list(here)} in the files, {list(there)} in the model"
            for name, here, there in sorted(found["mismatched_keys"])
        ]
        problems += [str(text) for text in found.get("error_msgs") or ()]
        problems += [
            f"tied by the config, but stored apart with other values: {target} and {source}"
            for target, source in _stored_ties(model, held.tensors)
            if not _equal(held, target, source)
        ]
    if problems:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise Unloadable("\n  ".join([_verdict(loader, out), *problems[:SHOWN], *more]))


def _verdict(loader: Any, out: str) -> str:
    import transformers

    return f"{out}: transformers {transformers.__version__} does not load it whole as {loader.__name__}:"


def _load(loader: Any, folder: str, out: str, tensors: Mapping[str, TensorInfo]) -> tuple[Any, dict[str, Any]]:
    """Return the model, on the meta device, and transformers' lists of what did not fit."""
    import torch

    state = {
        name: torch.empty(tensor.shape, dtype=getattr(torch, TABLE[tensor.dtype].torch), device="meta")
        for name, tensor in tensors.items()
    }
    try:
        with _quiet():
            config = loader.config_class.from_pretrained(folder, local_files_only=True)
            model, found = loader.from_pretrained(
                None, config=config, state_dict=state, device_map="meta", output_loading_info=True,
                ignore_mismatched_sizes=True,
            )  # fmt: skip
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()][:SHOWN]
        raise Unloadable("\n  ".join([_verdict(loader, out), f"{type(error).__name__}:", *lines])) from error
    return model, found


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' reports and bars, and put its settings back."""
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
    """Yield the pairs of stored tensors that the model has as one: those that its config ties."""
    for target, source in _ties(model).items():
        stored = _stored(target, tensors), _stored(source, tensors)
        if stored[0] is not None and stored[1] is not None and stored[0] != stored[1]:
            yield stored[0], stored[1]


def _ties(model: Any) -> dict[str, str]:
    """Return the model's tied parameters, each with the one that it is tied to."""
    ties = getattr(model, "all_tied_weights_keys", None)
    if isinstance(ties, dict):
        return ties
    # Before transformers 5 only a head says what it is tied to.
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or embedding is None or not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return {}
    names = {module: f"{name}.weight" for name, module in model.named_modules()}
    return {names[head]: names[embedding]}


def _stored(name: str, tensors: Mapping[str, TensorInfo]) -> str | None:
    """Return what the files call a head or an embedding of the model; None where it is not in them."""
    if name in tensors:
        return name
    kind = next((each for each in (HEAD, EMBEDDING) if each.search(name)), None)
    found = [other for other in tensors if kind is not None and kind.search(other)]
    return found[0] if len(found) == 1 else None


def _equal(held: Checkpoint, first: str, second: str) -> bool:
    """Return whether two tensors are of one dtype and shape and have the same bytes."""
    one, other = held.tensors[first], held.tensors[second]
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    length = one.stop - one.start
    buffers = bytearray(BLOCK), bytearray(BLOCK)
    for at in range(0, length, BLOCK):
        parts = [memoryview(buffer)[: min(BLOCK, length - at)] for buffer in buffers]
        for part, tensor in zip(parts, (one, other), strict=True):
            held.reader(tensor.name).read(tensor.start + at, part)
        if parts[0] != parts[1]:
            return False
    return True
