"""The layouts that a model's tensors have in published files and in memory: the table layouts.json, and its reader.

transformers 5 renames and fuses tensors when it loads a model: `experts.0.gate_proj.weight`, `experts.0.up_proj.weight`
and so on become one `experts.gate_up_proj` of shape [experts, 2 * intermediate, hidden]. `save_pretrained` writes the
published layout again, but FSDP, accelerate and `zero_to_fp32.py` write the layout in memory. The table has one row for
each set of models with the same conversions:

    models       model types of config.json, and names of classes, which take precedence, as in transformers
    renames      [expression, text] pairs in order: the first match of the expression in a published name is replaced
                 by the text, in which `\\1` is the first group inside the group that matched
    fusions      one object for each set of tensors that is converted:
      sources    expressions for the published names; the group `expert` is the number of the expert
      targets    the text that replaces the match, one for each tensor in memory
      operations what is done to the sources, in order: ["stack", dim] the tensors of all experts of each source,
                 ["concatenate", dim] the sources, ["transpose", dim, dim] each, or ["chunk", dim] into the targets
    others       expressions for the names to which conversions apply that are in neither list

The object `bases` has the class of the model without a head, for each model type whose conversions only this class has;
they apply where a model of this type is inside another one.

All of these operations are views: no number changes. A conversion that is no view has its names in `others`: what the
tensor is in memory cannot be said, so it has no name in memory. A rename applies
to any part of a name; the renames of a model inside the model (`text_config`, `vision_config`) apply too, except those
that are tied to the beginning of a name, which transformers counts from the inner model. Names are compared without
what wrappers add, and `model.` before a name may be missing. `python -m tests.helpers.layouts_table` makes the table
from the installed transformers.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

from .naming import unwrap

_NOTHING = re.compile(r"(?!)")  # it matches no name
TABLE = os.path.join(os.path.dirname(__file__), "layouts.json")


class Fusion(NamedTuple):
    """A conversion of published tensors into tensors in memory; see the docstring of this module."""

    sources: tuple[re.Pattern[str], ...]
    targets: tuple[str, ...]
    operations: tuple[tuple[Any, ...], ...]

    @property
    def stacks(self) -> bool:
        """True if each source is one tensor for each expert."""
        return any(verb == "stack" for verb, *_ in self.operations)


class Place(NamedTuple):
    """The place of a published tensor in the tensors in memory.

    Attributes:
        fusion: The conversion.
        targets: The names of the tensors in memory.
        source: The number of the source.
        expert: The number of the expert; 0 without experts.
    """

    fusion: Fusion
    targets: tuple[str, ...]
    source: int
    expert: int


class Layout(NamedTuple):
    """The conversions of one model.

    Attributes:
        renames: An expression and the text that replaces its first match, in order.
        fusions: The fusions, of which the first that fits a name counts.
        others: Expressions for the names of tensors that are converted in another way, before or after a rename.
    """

    renames: tuple[tuple[re.Pattern[str], str], ...]
    fusions: tuple[Fusion, ...]
    others: tuple[re.Pattern[str], ...] = ()

    def rename(self, name: str) -> str:
        """Return a published name after all renames, without a wrapper's prefixes; a name in memory stays the same.

        The name of a tensor that is converted in another way stays the same too.
        """
        published = name = unwrap(name)
        for pattern, text in (*self.renames, (_NOTHING, "")):
            if any(other.search(name) for other in self.others):
                return published
            match = pattern.search(name)
            if match is None:
                continue
            if r"\1" in text and match.lastgroup is not None:
                text = text.replace(r"\1", match.group(pattern.groupindex[match.lastgroup] + 1))
            if not _has_around(name, text, match):
                name = name.replace(match.group(0), text, 1)
        return name

    def find_place(self, name: str) -> Place | None:
        """Return the place of a tensor by its renamed name; None if no fusion has the tensor."""
        for fusion in self.fusions:
            for source, pattern in enumerate(fusion.sources):
                match = pattern.search(name)
                if match is not None:
                    targets = tuple(name.replace(match.group(0), text, 1) for text in fusion.targets)
                    return Place(fusion, targets, source, int(match.groupdict().get("expert") or 0))
        return None


def _has_around(name: str, text: str, match: re.Match[str]) -> bool:
    """Return True if a name already has the text that would replace a match, around the match, as names in memory do.

    The expression `post_norm` also matches in `mlp.post_norm`, which replaces it, and `shared_expert.` in
    `shared_experts`, because its point is any character.
    """
    at = name.find(text, max(match.start() - len(text) + 1, 0))
    return 0 <= at <= match.start() and at + len(text) >= match.end()


def find_layouts(*configs: Mapping[str, Any]) -> list[Layout]:
    """Return the layout of the model that the first of these configs with a `model_type` names.

    Returns:
        One layout; none if the table does not have the model; all different layouts if no config names a model.
    """
    config = next((each for each in configs if each.get("model_type")), None)
    if config is None:
        return list(_layouts().values())
    layouts = [found for own, names in _parts(config) if (found := _part(own, names)) is not None]
    if not layouts:
        return []
    return [
        Layout(
            tuple(each for layout in layouts for each in layout.renames),
            tuple(each for layout in layouts for each in layout.fusions),
            tuple(each for layout in layouts for each in layout.others),
        )
    ]


def _parts(config: Mapping[str, Any]) -> Iterator[tuple[bool, list[str]]]:
    """Yield (True, names) for a config, and (False, names) for the configs of the models inside: classes, then type."""
    inner = [each for each in config.values() if isinstance(each, Mapping) and each.get("model_type")]
    for is_whole, each in [(True, config), *((False, each) for each in inner)]:
        classes = each.get("architectures")
        names = [name for name in classes if isinstance(name, str)] if isinstance(classes, list) else []
        model_type = str(each.get("model_type"))
        base = [] if is_whole else [_data()["bases"].get(model_type)]
        yield is_whole, [*names, model_type, *filter(None, base)]


def _part(is_whole: bool, names: list[str]) -> Layout | None:
    """Return the layout of the first of these names that the table has; None if it has none of them."""
    table = _names()
    found = next((_layouts()[table[name]] for name in names if name in table), None)
    if found is None or is_whole:
        return found
    return found._replace(renames=tuple(each for each in found.renames if "^" not in each[0].pattern))


@cache
def _data() -> dict[str, Any]:
    with open(TABLE, encoding="utf-8") as file:
        data: dict[str, Any] = json.load(file)
    return data


@cache
def _names() -> dict[str, int]:
    """Return the number of each model's row."""
    return {name: number for number, row in enumerate(_data()["rows"]) for name in row["models"]}


@cache
def _layouts() -> dict[int, Layout]:
    """Return the layout of each row."""
    return {
        number: Layout(
            tuple((re.compile(pattern), text) for pattern, text in row["renames"]),
            tuple(
                Fusion(
                    tuple(map(re.compile, each["sources"])),
                    tuple(each["targets"]),
                    tuple(tuple(operation) for operation in each["operations"]),
                )
                for each in row["fusions"]
            ),
            tuple(map(re.compile, row["others"])),
        )
        for number, row in enumerate(_data()["rows"])
    }
