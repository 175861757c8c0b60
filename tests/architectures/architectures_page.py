"""The page docs/architectures.md: which model types the sweep has checked, and with which results."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
PASSED = "passed"
_KINDS = {
    "causal": "Causal language models",
    "seq2seq": "Sequence-to-sequence models",
    "vision-language": "Vision-language models",
    "encoder": "Encoders",
}


def page_text(data: Mapping[str, Any], adapters: Mapping[str, Any]) -> str:
    """Return the text of the page for the results of a sweep, and of the sweep of adapters."""
    results: Mapping[str, Mapping[str, str]] = data["results"]
    passed, checked = (sum(map(count, results.values())) for count in (_passed, len))
    rows = [f"| {_KINDS[kind]} | {len(found)} | {_passed(found)} |" for kind, found in results.items()]
    return "\n".join([
        "# Architectures", "",
        f"This page lists the model types of transformers {data['transformers']} that a sweep of tests has checked:",
        f"{passed} of {checked} passed. This command repeats the sweep, which takes about a quarter of an hour:", "",
        "    python tests/architectures/sweep.py --again all", "",
        "For each model type the sweep makes a tiny model with random weights and a second one that differs a little,",
        "and saves both with `save_pretrained`. It makes these checks, bit for bit against torch's own arithmetic:", "",
        "- the merged files have the formula's numbers;",
        "- transformers loads the merge with nothing missing, and ties the weights that it ties in aligned;",
        "- `Live` over the loaded model and sft's folder gives the loaded merge, and aligned again at its end;",
        "- the whole state dict of one model, as FSDP and `zero_to_fp32.py` save it, merges with the other's folder.",
        "", "| kind | model types | passed |", "|---|---|---|", *rows, "",
        *[line for kind, found in results.items() for line in _section(_KINDS[kind], found)],
        *_adapters_section(adapters["results"]),
    ])  # fmt: skip


def _adapters_section(results: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Return the lines about the sweep of adapters: the numbers, and a row for each model type that did not pass."""
    passed, checked = (sum(map(count, results.values())) for count in (_passed, len))
    failed = [
        f"| {_KINDS[kind]} | `{name}` | {_short(result)} |"
        for kind, found in results.items()
        for name, result in found.items()
        if result != PASSED
    ]
    return [
        "## Adapters", "",
        "For each model type `python tests/architectures/adapters.py` makes a LoRA adapter of all linear modules with",
        f"PEFT, and compares a merge at alpha 0 with PEFT's own merge: {passed} of {checked} passed.", "",
        "| kind | model type | result |", "|---|---|---|", *failed, "",
    ]  # fmt: skip


def _passed(found: Mapping[str, str]) -> int:
    return sum(result == PASSED for result in found.values())


def _section(title: str, found: Mapping[str, str]) -> list[str]:
    """Return the lines about one kind: the model types that passed, and a row for each of the others."""
    passed = [f"`{name}`" for name, result in found.items() if result == PASSED]
    failed = [f"| `{name}` | {_short(result)} |" for name, result in found.items() if result != PASSED]
    table = ["These did not pass:", "", "| model type | result |", "|---|---|", *failed, ""] if failed else []
    return [f"## {title}", "", "These passed:", "", *_wrapped(", ".join(passed) + "."), "", *table]


def _short(result: str) -> str:
    """Return a result as one cell of a table."""
    line = result.splitlines()[-1 if result.startswith("not checked") else 0].strip()
    line = f"not checked: {line}" if result.startswith("not checked") and not line.startswith("not checked") else line
    line = re.sub(r"/tmp/\S*/", "", line)
    return line[:200].replace("|", "\\|").replace("<", "\\<")


def _wrapped(text: str) -> list[str]:
    import textwrap

    return textwrap.wrap(text, 118, break_on_hyphens=False)
