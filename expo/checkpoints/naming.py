"""Names of tensors as text: what a wrapper around a model adds to them, and what many names have in common.

torch.compile, DistributedDataParallel, FSDP, PEFT and trainers wrap a model in another module, and a state dict of the
wrapper has longer names than the model's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

# These names belong to a wrapper at any place of a tensor's name: no model has a module of its own with such a name.
INNER_WRAPPER = re.compile(
    r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module|_ddp_module)\."
)
# A model could use these names too: they belong to a wrapper only as the first parts of a name.
OUTER_WRAPPER = re.compile(r"^((module|base_model\.model|pretrained_model|policy|actor)\.)+")


def unwrap(name: str) -> str:
    """Return the name without what known wrappers add: `lm_head.weight` for `module._orig_mod.lm_head.weight`."""
    return OUTER_WRAPPER.sub("", INNER_WRAPPER.sub("", name))


def find_wrapper_prefix(names: Iterable[str], other_names: Iterable[str]) -> str:
    """Return the prefix that all names share, and without which most of them are among other_names.

    The result is "" if there is no such prefix.
    """
    names, other = list(names), set(other_names)
    if len(names) < 2:
        return ""
    cuts = [match.end() for match in re.finditer(r"\.", find_common_prefix(names))]
    fits = (names[0][:cut] for cut in cuts if 2 * sum(name[cut:] in other for name in names) > len(names))
    return next(fits, "")


def find_common_prefix(names: Sequence[str]) -> str:
    """Return the longest beginning that all names share, up to a dot."""
    first, last = min(names), max(names)  # all names between these two begin with what these two share
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[: first.rfind(".", 0, length) + 1]


def mask_numbers(name: str) -> str:
    """Return the name with a star for every number in it: the same for all layers, and for all experts."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
