"""The model card of an output: the text of README.md, with the front matter that the Hub reads.

The functions use neither files nor the network nor the clock, so the same arguments give the same bytes. Names come
from folders and from other people's cards. They are escaped, because they may contain Markdown, YAML, or bytes that are
not text.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .._version import __version__

if TYPE_CHECKING:
    from ..checkpoints.checkpoint import CommonBase, Origin
    from .result import Output

MAX_LISTED = 8  # the number of copied or dropped tensors that the card names; the card counts the others
MAX_ID = 96  # the largest number of characters in each part of a model id on the Hub
MAX_MATTER, MAX_DEPTH = 1 << 18, 16  # the most characters, and the deepest nesting, of a front matter that is parsed
MAX_FIELD = 500  # the largest number of characters in a value that is taken over from aligned's card
PAPER = "[*Model Extrapolation Expedites Alignment*, arXiv 2404.16792](https://arxiv.org/abs/2404.16792)"
_MATTER = re.compile(r"\s*---[ \t]*(?:\r\n|\r|\n)(.*?)(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\r|\n|$)", re.DOTALL)
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


@dataclass(frozen=True)
class CardFacts:
    """The names and numbers that a model card contains.

    Attributes:
        sft: The origin of sft.
        aligned: The origin of aligned.
        alpha: The alpha of this output.
        rules: The alphas of `--alpha-for`, by regular expression.
        options: The values of the other options that differ from their defaults, by name.
        command: The command line that reproduces the output.
        name: The name of the output's folder.
        readme: The text of aligned's own README.md, whose licence, languages and task the card takes over; None if
            aligned has none.
        output: The measurements of this output.
        relative_distance: The 2-norm of aligned - sft over that of aligned.
        max_abs_difference: The largest element of |aligned - sft|.
        extrapolated: The number of tensors that are extrapolated.
        copied: (tensor, reason) of each tensor that is copied from aligned.
        dropped: (tensor, reason) of each tensor that only sft has.
        dtype: The dtypes of the weights.
        tokenizer: True if the output has a tokenizer.
        code: True if the output has Python files.
        auto_class: The name of the class of transformers that loads the output.
        base: The base of two adapters; None for all other inputs.
    """

    sft: Origin
    aligned: Origin
    alpha: float
    rules: Mapping[str, float]
    options: Mapping[str, str]
    command: str
    name: str
    readme: str | None
    output: Output
    relative_distance: float
    max_abs_difference: float
    extrapolated: int
    copied: Sequence[tuple[str, str]]
    dropped: Sequence[tuple[str, str]]
    dtype: str
    tokenizer: bool
    code: bool
    auto_class: str
    base: CommonBase | None = None


def card_text(facts: CardFacts) -> str:
    """Return the text of README.md for one output."""
    measurements = _measurements(facts) if facts.extrapolated else []
    parts = [
        f"---\n{_front_matter(_models(facts), facts.readme)}---",
        f"# {_text(facts.name)}",
        _introduction(facts.sft, facts.aligned, facts.alpha),
        "## How it was made",
        _bullets(_settings(facts)),
        _fence(f"$ {facts.command}", "console"),
        "## How much the weights changed",
        _bullets([*measurements, *_tensor_counts(facts)]),
        "## How to use it",
        _fence(_usage(facts.name, facts.auto_class, facts.tokenizer), "python"),
        *_remarks(facts.tokenizer, facts.code),
        "## Citation",
        f"The method, ExPO, is described in {PAPER}.",
    ]
    return "\n\n".join(parts).encode("utf-8", "backslashreplace").decode("utf-8") + "\n"


def _introduction(sft: Origin, aligned: Origin, alpha: float) -> str:
    """Return the first paragraphs: the models and the formula."""
    return (
        f"This language model was computed without training from two models: {_code(sft.name)} (sft), and "
        f"{_code(aligned.name)} (aligned), which was trained from sft. It extrapolates the change of the weights:\n\n"
        f"    out = aligned + alpha * (aligned - sft), alpha = {_number(alpha)}\n\n"
        "Each weight was computed in fp32, or in fp64 if an input has fp64, and was rounded once."
    )


def _settings(facts: CardFacts) -> list[str]:
    """Return the list items about the inputs and the options."""
    return [
        f"aligned: {_origin(facts.aligned)}",
        f"sft: {_origin(facts.sft)}",
        *([] if facts.base is None else [f"base of both adapters: {_origin(facts.base.origin)}", _place(facts.base)]),
        f"alpha: {_number(facts.alpha)}",
        *(f"alpha of tensors that match {_code(pattern)}: {_number(value)}" for pattern, value in facts.rules.items()),
        *(f"{_code(option)}: {_code(value)}" for option, value in facts.options.items()),
        f"dtype: {_text(facts.dtype)}",
        f"made with expo {__version__}, Python {platform.python_version()}",
    ]


def _place(base: CommonBase) -> str:
    """Return the sentence about the model that aligned's adapter was trained on."""
    return _text(base.sentence)


def _measurements(facts: CardFacts) -> list[str]:
    """Return the list items about the change of the weights."""
    return [
        f"elements changed: {facts.output.changed:.2%}",
        f"norm of the change, relative to aligned's: {facts.output.relative_change:.4g}",
        f"norm of aligned - sft, relative to aligned's: {facts.relative_distance:.4g}",
        f"largest element of |aligned - sft|: {facts.max_abs_difference:.4g}",
        f"elements that are inf or NaN: {facts.output.non_finite}",
    ]


def _tensor_counts(facts: CardFacts) -> list[str]:
    """Return the list items about tensors that were extrapolated, copied and dropped."""
    copied, dropped = facts.copied, facts.dropped
    counts = f"tensors: {facts.extrapolated} extrapolated, {len(copied)} copied, {len(dropped)} dropped"
    return [counts, *_first_few("copied", copied), *_first_few("dropped", dropped)]


def _usage(name: str, auto_class: str, tokenizer: bool) -> str:
    """Return the Python code that loads the model."""
    lines = [
        f"from transformers import {auto_class}{', AutoTokenizer' * tokenizer}",
        "",
        f"name = {name!r}  # the path of this folder, or the id of the uploaded model",
        *["tokenizer = AutoTokenizer.from_pretrained(name)"] * tokenizer,
        f'model = {auto_class}.from_pretrained(name, dtype="auto")',
    ]
    return "\n".join(lines)


def _remarks(tokenizer: bool, code: bool) -> list[str]:
    """Return sentences about a missing tokenizer and about custom code, which the lines of `_usage` do not show."""
    remarks = []
    if not tokenizer:
        remarks.append(
            "This folder has no tokenizer, because aligned has none. Use the tokenizer that aligned was trained with."
        )
    if code:
        calls = "both calls" if tokenizer else "the call"
        remarks.append(
            f"This folder has Python files of aligned that the model needs. Pass `trust_remote_code=True` to {calls}."
        )
    return remarks


def _models(facts: CardFacts) -> list[str]:
    """Return the ids of the models that the output was computed from."""
    origins = [facts.aligned, facts.sft, *([facts.base.origin] if facts.base else [])]
    return list(dict.fromkeys(_model_id(origin.name) for origin in origins))


def _front_matter(models: list[str], readme: str | None) -> str:
    """Return the YAML lines of the front matter."""
    import yaml  # type: ignore[import-untyped]

    fields: dict[str, Any] = {
        "base_model": models,
        "base_model_relation": "merge",
        "library_name": "transformers",
        **_inherited(_parse_front_matter(readme or "")),
        "tags": ["merge", "expo"],
    }
    # The width prevents folded lines, because the rest of a folded line could look like the end of the front matter.
    return str(yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=2**31))


def _parse_front_matter(readme: str) -> dict[Any, Any]:
    """Return the fields of a card's own front matter; {} if the card has none or it cannot be parsed."""
    import yaml

    matter = _MATTER.match(readme.removeprefix("\ufeff")[:MAX_MATTER])
    if matter is None:
        return {}
    try:
        if not _is_safe_to_load(yaml.parse(matter[1], Loader=yaml.SafeLoader)):
            return {}
        fields = yaml.safe_load(matter[1])
    except Exception:  # the constructor of a tag may raise any exception, not only YAMLError
        return {}
    return fields if isinstance(fields, dict) else {}


def _is_safe_to_load(events: Iterable[Any]) -> bool:
    """Return True if YAML has no aliases and no deep nesting.

    Aliases of aliases can grow without bound in memory, and deeply nested collections take very long to parse.
    """
    import yaml

    depth = 0
    for event in events:
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH or isinstance(event, yaml.AliasEvent):
            return False
    return True


def _inherited(original: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the licence, languages and task of aligned's front matter, as far as they are plain text."""
    fields: dict[str, Any] = {}
    licence = _plain_text(original.get("license"))
    if licence is not None:
        fields["license"] = licence = _lower(licence)
        if not all(re.fullmatch(r"[a-z0-9.+-]+", part) for part in _as_list(licence)):
            fields |= {"license": "other", "license_name": "-".join(map(_slug, _as_list(licence)))}
        if fields["license"] == "other":
            fields |= _strings(original, "license_name", "license_link")
    language = original.get("language")
    parts = ["no" if part is False else part for part in _as_list(language)]  # YAML reads Norwegian's code as False
    language = _plain_text(parts if isinstance(language, list) else parts[0])
    return fields | ({} if language is None else {"language": language}) | _strings(original, "pipeline_tag")


def _strings(original: Mapping[Any, Any], *keys: str) -> dict[str, Any]:
    """Return the fields with these keys whose values are strings of plain text."""
    return {key: original[key] for key in keys if isinstance(original.get(key), str) and _plain_text(original[key])}


def _plain_text(value: Any) -> Any:
    """Return the value if it is a string of one printable line or a list of such strings; None for any other."""
    parts = _as_list(value)
    printable = all(isinstance(part, str) and part.strip() and part.isprintable() for part in parts)
    return value if parts and printable and sum(map(len, parts)) <= MAX_FIELD else None


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _lower(value: Any) -> Any:
    return [part.lower() for part in value] if isinstance(value, list) else value.lower()


def _slug(text: str) -> str:
    """Return a licence's name in the lower-case letters, digits, dots and hyphens that the Hub wants."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or "unnamed"


def _model_id(name: str) -> str:
    """Return a name as an id that the Hub accepts, `org/name` or `name`; a path gives its last part."""
    parts = name.split("/") if _HUB_ID.fullmatch(name) else [name.rstrip("/").rpartition("/")[2]]
    return "/".join(_id_part(part) for part in parts)


def _id_part(text: str) -> str:
    """Return a text as one part of an id: allowed characters, no double `-` or `.`, at most MAX_ID of them."""
    text = re.sub(r"[^A-Za-z0-9_.-]+", "-", text)
    text = re.sub(r"-{2,}|\.{2,}", lambda run: run[0][0], text)
    text = text[:MAX_ID].strip("-.")
    while text.endswith(".git"):
        text = text.removesuffix(".git").rstrip("-.")
    return text or "unnamed"


def _origin(origin: Origin) -> str:
    """Return an origin with its commit, as a link if it is a hub id."""
    if origin.commit is None:
        return _code(origin.name)
    commit = _code(origin.commit)
    if _HUB_ID.fullmatch(origin.name) and re.fullmatch(r"[\w.-]+", origin.commit, re.ASCII):
        return f"[{_code(origin.name)}](https://huggingface.co/{origin.name}/tree/{origin.commit}), commit {commit}"
    return f"{_code(origin.name)}, commit {commit}"


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _first_few(action: str, tensors: Sequence[tuple[str, str]]) -> list[str]:
    """Return the first tensors with their reasons, and the number of the others."""
    lines = [f"{action}: {_code(name)} ({_text(reason)})" for name, reason in tensors[:MAX_LISTED]]
    return lines + ([f"{action}: {len(tensors) - MAX_LISTED} more"] if len(tensors) > MAX_LISTED else [])


def _number(value: float) -> str:
    return repr(float(value)).removesuffix(".0")


def _line(text: str) -> str:
    """Return the text as one line, with Python's escapes for the characters that cannot be printed."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _text(text: str) -> str:
    """Return one line of plain text, in which the punctuation of Markdown and HTML is escaped."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$&!])", r"\\\1", _line(text)).strip() or "unnamed"


def _code(text: str) -> str:
    """Return one line of Markdown code. Its delimiters are longer than any run of backticks in the code."""
    text = _line(text) or " "
    ticks = "`" * (_longest_run(text) + 1)
    padding = " " if text.startswith("`") or text.endswith("`") or text != text.strip() else ""
    return f"{ticks}{padding}{text}{padding}{ticks}"


def _fence(text: str, language: str) -> str:
    """Return a block of code between fences that are longer than any run of backticks in it."""
    ticks = "`" * max(3, _longest_run(text) + 1)
    return f"{ticks}{language}\n{text}\n{ticks}"


def _longest_run(text: str) -> int:
    """Return the largest number of backticks in a row."""
    return max(map(len, re.findall("`+", text)), default=0)
