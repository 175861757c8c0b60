"""The names that transformers gives in memory to the tensors of a model's files.

The two differ for many models: a state dict from memory (FSDP, accelerate, `zero_to_fp32.py`) then has other names than
the files of `save_pretrained`, which writes the names that the published checkpoint has. The renames are those of the
table of layouts.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from .layouts import Layout, find_layouts
from .naming import unwrap


class MemoryNames:
    """The names in memory of the tensors of the model that a config describes."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config

    @cached_property
    def _layout(self) -> Layout | None:
        """The layout of the model, which is read at the first use: most merges need no other name."""
        return next(iter(find_layouts(self._config)), None) if self._config.get("model_type") else None

    def __bool__(self) -> bool:
        """Return True if the table of layouts has the model."""
        return self._layout is not None

    def find(self, name: str) -> str:
        """Return the name in memory of a tensor of a file, without a wrapper's prefixes.

        A name in memory stays as it is.
        """
        if self._layout is None:
            return unwrap(name)
        # The language model inside a vision-language model has no `model.` of its own, which the table does not say.
        return self._layout.rename(name).replace("language_model.model.", "language_model.", 1)
