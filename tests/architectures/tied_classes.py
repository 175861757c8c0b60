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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto import modeling_auto

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
    """Return the ties of all model classes, with those of the models that they contain, by the class's name.

    The name `decoder TYPE` stands for the decoder of this model type in a model that was put together of two.
    """
    library: Any = transformers
    found: dict[str, dict[str, str]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in modeling_modules():
            kinds = [kind for kind in vars(module).values() if isinstance(kind, type)]
            models = [
                kind
                for kind in kinds
                if kind.__module__ == module.__name__ and issubclass(kind, library.PreTrainedModel)
            ]
            for kind in models:
                ties = _inner_ties(kind, models) | _own_ties(kind)
                if ties:
                    found[kind.__name__] = ties
    decoders = {f"decoder {name}": kind for name, kind in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()}
    return found | {name: found[kind] for name, kind in decoders.items() if kind in found}


def _own_ties(kind: Any) -> dict[str, str]:
    ties = getattr(kind, "_tied_weights_keys", None)
    return dict(ties) if isinstance(ties, dict) else {}


def _inner_ties(kind: Any, models: Sequence[Any]) -> dict[str, str]:
    """Return the ties of the model without a head that a class has as its attribute `base_model_prefix`."""
    bases = set(modeling_auto.MODEL_MAPPING_NAMES.values())
    prefix = kind.base_model_prefix
    inner = [each for each in models if each.__name__ in bases and each is not kind
             and each.config_class is kind.config_class and kind.__name__ not in bases]  # fmt: skip
    if not prefix or len(inner) != 1:
        return {}
    return {f"{prefix}.{tied}": f"{prefix}.{source.strip('^')}" for tied, source in _own_ties(inner[0]).items()}


def table_text(found: dict[str, dict[str, str]]) -> str:
    """Return the text of the table: one line for each set of ties, with the classes that have it."""
    classes: dict[str, list[str]] = {}
    for name in sorted(found):
        classes.setdefault(json.dumps(found[name], sort_keys=True), []).append(name)
    lines = [f'  {{"classes": {json.dumps(names)}, "ties": {ties}}}' for ties, names in classes.items()]
    return f'{{"transformers": "{transformers.__version__}", "rows": [\n' + ",\n".join(lines) + "\n]}\n"


if __name__ == "__main__":
    TABLE.write_text(table_text(declared_ties()), encoding="utf-8")
