"""Write expo/checkpoints/layouts.json from the conversions that the installed transformers has.

python -m tests.helpers.layouts_table          # writes the table
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

TABLE = Path(__file__).parents[2] / "expo" / "checkpoints" / "layouts.json"
# transformers' operations that are views, with the attributes that describe each.
VIEWS = {
    "MergeModulelist": ("stack", ("dim",)),
    "Concatenate": ("concatenate", ("dim",)),
    "Transpose": ("transpose", ("dim0", "dim1")),
    "Chunk": ("chunk", ("dim",)),
}
RENAMES = ("WeightRenaming", "PrefixChange")  # further kinds need state or arithmetic on numbers in names


def make_table() -> dict[str, Any]:
    """Return the table as an object for JSON: see the docstring of expo/checkpoints/layouts.py."""
    import transformers
    from transformers import conversion_mapping
    from transformers.models.auto import modeling_auto

    rows: dict[str, list[str]] = {}
    for name, transforms in conversion_mapping._build_checkpoint_conversion_mapping().items():
        renames = [_rename(each) for each in transforms if type(each).__name__ in RENAMES]
        fusions = [found for each in transforms if (found := _fusion(each)) is not None]
        others = [_others(each) for each in transforms if type(each).__name__ not in RENAMES and _fusion(each) is None]
        if name != "legacy" and (renames or fusions):
            row = {"renames": renames, "fusions": fusions, "others": sorted(set(others))}
            rows.setdefault(json.dumps(row), []).append(name)
    table = [{"models": sorted(names), **json.loads(row)} for row, names in rows.items()]
    known = {name for names in rows.values() for name in names}
    bases = {
        model_type: kind
        for model_type, kind in modeling_auto.MODEL_MAPPING_NAMES.items()
        if model_type not in known and isinstance(kind, str) and kind in known
    }
    return {
        "transformers": transformers.__version__,
        "bases": dict(sorted(bases.items())),
        "rows": sorted(table, key=lambda row: row["models"]),
    }


def _rename(transform: Any) -> list[str]:
    """Return an expression for the text that a rename replaces, and the new text."""
    return [transform.compiled_sources.pattern, transform.target_patterns[0]]


def _others(transform: Any) -> str:
    """Return an expression for the names to which a conversion applies that the table cannot express."""
    own = getattr(transform, "pattern", transform.compiled_sources)
    return str(own.pattern)


def _fusion(transform: Any) -> dict[str, Any] | None:
    """Return a converter as an object for JSON; None for a rename, and for a converter that is no view."""
    operations = getattr(transform, "operations", [])
    if not operations or any(type(each).__name__ not in VIEWS for each in operations):
        return None
    steps = []
    for each in operations:
        verb, attributes = VIEWS[type(each).__name__]
        steps.append([verb, *(getattr(each, attribute) for attribute in attributes)])
    if getattr(operations[0], "num_shards_attribute", None):  # the number of parts is in the config
        return None
    return {
        "sources": [_expression(pattern) for pattern in transform.source_patterns],
        "targets": list(transform.target_patterns),
        "operations": steps,
    }


def _expression(pattern: str) -> str:
    """Return the expression for a source's name, in which the number of the expert is the group `expert`."""
    found = pattern.replace("*.", r"(?P<expert>\d+)\.", 1)
    return found + r"(?!\w)" * bool(re.search(r"[a-zA-Z0-9]$", found))


def text(table: dict[str, Any]) -> str:
    """Return the table as text, with a line for each row."""
    rows = ",\n".join("  " + json.dumps(row) for row in table["rows"])
    first = f'{{"transformers": {json.dumps(table["transformers"])}, "bases": {json.dumps(table["bases"])}, "rows": ['
    return f"{first}\n{rows}\n]}}\n"


if __name__ == "__main__":
    TABLE.write_text(text(make_table()), encoding="utf-8")
    print(f"wrote {TABLE}")
