"""The renames by which the installed transformers turns the names in a model's files into the names in memory.

    python tests/architectures/memory_names.py

writes them to expo/checkpoints/memory_names.json, from which `expo.checkpoints.memory_names` reads them. The renames of
a model depend on the models inside it, so each model is made, without memory for its weights.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
import transformers  # noqa: E402
from tiny_configs import tiny_config  # noqa: E402
from tiny_pairs import auto_class, model_types  # noqa: E402

TABLE = HERE.parents[1] / "expo" / "checkpoints" / "memory_names.json"
KINDS = ("causal", "vision-language", "seq2seq", "encoder")
PLAIN = ("WeightRenaming", "PrefixChange")  # the transforms that one expression describes


def renames_of(model: Any) -> list[list[str]]:
    """Return the renames of a model: [the part it belongs to, that part's prefix, an expression, the replacement]."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    found = []
    for transform in get_model_conversion_mapping(model, add_legacy=False):
        if type(transform).__name__ in PLAIN:
            scope, base = ("" if each is None else f"{each}." if each else "" for each in
                           (transform.scope_prefix, transform.base_model_prefix))  # fmt: skip
            found.append([scope, base, transform.compiled_sources.pattern, transform.target_patterns[0]])
    return found


def declared_renames() -> dict[str, list[list[str]]]:
    """Return the renames of all models that have any, by the name of the class and the model type."""
    found: dict[str, list[list[str]]] = {}
    for kind in KINDS:
        for model_type in model_types(kind):
            try:
                with torch.device("meta"):
                    model = auto_class(kind).from_config(tiny_config(model_type))
            except Exception:  # some models need a library that is not installed here
                continue
            renames = renames_of(model)
            if renames:
                found.setdefault(f"{type(model).__name__} {model_type}", renames)
    return found


def table_text(found: dict[str, list[list[str]]]) -> str:
    """Return the text of the table: one line for each list of renames, with the models that have it."""
    models: dict[str, list[str]] = {}
    for name in sorted(found):
        models.setdefault(json.dumps(found[name]), []).append(name)
    lines = [f'  {{"models": {json.dumps(names)}, "renames": {renames}}}' for renames, names in models.items()]
    return f'{{"transformers": "{transformers.__version__}", "rows": [\n' + ",\n".join(lines) + "\n]}\n"


if __name__ == "__main__":
    TABLE.write_text(table_text(declared_renames()), encoding="utf-8")
