"""The ties of transformers' model classes as the installed version declares them.

    python tests/architectures/tied_classes.py

writes them to expo/checkpoints/tied_weights.json, from which `expo.checkpoints.tied_weights` reads them. Each model
class has an attribute `_tied_weights_keys`, {name of a tied weight: name of the weight that it is tied to}.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers

TABLE = Path(__file__).parents[2] / "expo" / "checkpoints" / "tied_weights.json"


def modeling_modules() -> Iterator[Any]:
    """Yield all modules of transformers that define models and can be imported."""
    library: Any = transformers
    for package in pkgutil.iter_modules(library.models.__path__):
        path = f"transformers.models.{package.name}"
        for module in pkgutil.iter_modules(importlib.import_module(path).__path__):
            if module.name.startswith("modeling_"):
                try:
                    yield importlib.import_module(f"{path}.{module.name}")
                except ImportError:  # some models need a library that is not installed here
                    continue


def declared_ties() -> dict[str, dict[str, str]]:
    """Return the ties of all model classes by the class's name."""
    library: Any = transformers
    found: dict[str, dict[str, str]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in modeling_modules():
            for name, kind in vars(module).items():
                if not isinstance(kind, type) or not issubclass(kind, library.PreTrainedModel):
                    continue
                ties = getattr(kind, "_tied_weights_keys", None)
                if isinstance(ties, dict) and ties and kind.__module__ == module.__name__:
                    found[name] = dict(ties)
    return found


def table_text(found: dict[str, dict[str, str]]) -> str:
    """Return the text of the table: one line for each set of ties, with the classes that have it."""
    classes: dict[str, list[str]] = {}
    for name in sorted(found):
        classes.setdefault(json.dumps(found[name], sort_keys=True), []).append(name)
    lines = [f'  {{"classes": {json.dumps(names)}, "ties": {ties}}}' for ties, names in classes.items()]
    return f'{{"transformers": "{transformers.__version__}", "rows": [\n' + ",\n".join(lines) + "\n]}\n"


if __name__ == "__main__":
    TABLE.write_text(table_text(declared_ties()), encoding="utf-8")
