"""A model's tensors as the plan needs them, whether they lie in files or in memory."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from .adapter import Adapter
    from .safetensors_header import TensorInfo


class ModelTensors(Protocol):
    """Names, dtypes and shapes of one model's tensors; a `Checkpoint` is one.

    Attributes:
        path: The name of the model in messages: its path, or for a model in memory a name that the caller gives.
        tensors: The tensors by name.
        config: The object of config.json; {} where there is none.
        files: The paths of the folder's other files by name; {} for a model in memory.
        adapters: The adapters over these tensors; () for a whole model.
        notes: Sentences for the user about oddities that do no harm.
        dequantized: The names of the tensors whose numbers are computed from quantised ones, in fp32.
    """

    @property
    def path(self) -> str: ...
    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...
    @property
    def config(self) -> Mapping[str, Any]: ...
    @property
    def files(self) -> Mapping[str, str]: ...
    @property
    def adapters(self) -> tuple[Adapter, ...]: ...
    @property
    def notes(self) -> tuple[str, ...]: ...
    @property
    def dequantized(self) -> Collection[str]: ...
