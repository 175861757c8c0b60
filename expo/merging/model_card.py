"""The model card of an output: README.md with the front matter that the Hub wants, from names and numbers alone.

Pure: no file is read, no network asked, no clock looked at; the same arguments give the same bytes. Names come from
folders and from other people's cards, so none of them is trusted to be Markdown, YAML or even text.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .._version import __version__

if TYPE_CHECKING:
    from ..checkpoints.checkpoint import Origin
    from .result import Output

SHOWN = 8  # copied or dropped tensors that are named one by one
MAX_ID = 96  # characters of each part of a model id, as the Hub has it
MAX_MATTER, MAX_DEPTH = 1 << 18, 16  # characters, and lists in lists, of a front matter that is parsed
MAX_FIELD = 500  # characters of a string that is taken over from aligned's card
PAPER = "[*Model Extrapolation Expedites Alignment*, arXiv 2404.16792](https://arxiv.org/abs/2404.16792)"
_MATTER = re.compile(r"\s*---[ \t]*(?:\r\n|\r|\n)(.*?)(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\r|\n|$)", re.DOTALL)
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


@dataclass(frozen=True)
class CardFacts:
    """What a model card says.

    Attributes:
        sft, aligned: The origins of both inputs.
        alpha: The alpha of this output.
        rules: Alphas by regular expression, as `--alpha-for` has them.
        options: The values of the other options that are not at their defaults, by name.
        command: The command line that makes the output again.
        name: The name of the output's folder.
        readme: Aligned's own README.md, whose licence, languages and task the card takes over; None without one.
        output: The measurements of this output.
        relative_distance: The norm of aligned - sft over that of aligned.
        max_abs_difference: The largest element of |aligned - sft|.
        extrapolated: The number of tensors that are extrapolated.
        copied, dropped: (tensor, reason) of the others.
        dtype: The dtypes of the weights.
        tokenizer: True if a tokenizer comes with the output.
        code: True if Python files come with the output.
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


def card_text(facts: CardFacts) -> str:
    """Return the text of README.md for one output."""
    measured = _measured(facts) if facts.extrapolated else []
    parts = [
        f"---\n{_front_matter(facts.sft, facts.aligned, facts.readme)}---",
        f"# {_text(facts.name)}",
        _introduction(facts.sft, facts.aligned, facts.alpha),
        "## How it was made",
        _items(_settings(facts)),
        _fence(f"$ {facts.command}", "console"),
        "## How far it moved",
        _items([*measured, *_tensors(facts)]),
        "## How to use it",
        _fence(_usage(facts.name, facts.tokenizer), "python"),
        *_remarks(facts.tokenizer, facts.code),
        "## Citation",
        f"The method, ExPO, is described in {PAPER}.",
    ]
    return "\n\n".join(parts).encode("utf-8", "backslashreplace").decode("utf-8") + "\n"


def _introduction(sft: Origin, aligned: Origin, alpha: float) -> str:
    return (
        f"A language model made without training, by going on from {_code(sft.name)} through {_code(aligned.name)}: "
        "the weights of the second, which was trained from the first, and a further step the same way.\n\n"
        f"    out = aligned + alpha * (aligned - sft), alpha = {_number(alpha)}\n\n"
        "It was computed in fp32 (fp64 where an input is) and rounded once."
    )


def _settings(facts: CardFacts) -> list[str]:
    return [
        f"aligned: {_origin(facts.aligned)}",
        f"sft: {_origin(facts.sft)}",
        f"alpha: {_number(facts.alpha)}",
        *(f"alpha of tensors that match {_code(pattern)}: {_number(value)}" for pattern, value in facts.rules.items()),
        *(f"{_code(option)}: {_code(value)}" for option, value in facts.options.items()),
        f"dtype: {_text(facts.dtype)}",
        f"made with expo {__version__}, Python {platform.python_version()}",
    ]


def _measured(facts: CardFacts) -> list[str]:
    return [
        f"elements changed: {facts.output.changed:.2%}",
        f"norm of the change, relative to aligned's: {facts.output.relative_change:.4g}",
        f"norm of aligned - sft, relative to aligned's: {facts.relative_distance:.4g}",
        f"largest element of |aligned - sft|: {facts.max_abs_difference:.4g}",
        f"elements that are inf or NaN: {facts.output.non_finite}",
    ]


def _tensors(facts: CardFacts) -> list[str]:
    copied, dropped = facts.copied, facts.dropped
    counts = f"tensors: {facts.extrapolated} extrapolated, {len(copied)} copied, {len(dropped)} dropped"
    return [counts, *_some("copied", copied), *_some("dropped", dropped)]


def _usage(name: str, tokenizer: bool) -> str:
    lines = [
        f"from transformers import AutoModelForCausalLM{', AutoTokenizer' * tokenizer}",
        "",
        f"name = {name!r}  # this folder, or the id under which it was uploaded",
        *["tokenizer = AutoTokenizer.from_pretrained(name)"] * tokenizer,
        'model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")',
    ]
    return "\n".join(lines)


def _remarks(tokenizer: bool, code: bool) -> list[str]:
    """What the lines of `_usage` do not say."""
    remarks = []
    if not tokenizer:
        remarks.append("No tokenizer is here, as aligned came without one: use the one that aligned was trained with.")
    if code:
        calls = "both calls" if tokenizer else "the call"
        remarks.append(f"Python files of aligned's come with this model: pass `trust_remote_code=True` to {calls}.")
    return remarks


def _front_matter(sft: Origin, aligned: Origin, readme: str | None) -> str:
    import yaml  # type: ignore[import-untyped]

    fields: dict[str, Any] = {
        "base_model": list(dict.fromkeys((_model_id(aligned.name), _model_id(sft.name)))),
        "base_model_relation": "merge",
        "library_name": "transformers",
        **_inherited(_load(readme or "")),
        "tags": ["merge", "expo"],
    }
    # a line that were folded could begin with anything
    return str(yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=2**31))


def _load(readme: str) -> dict[Any, Any]:
    """A card's own front matter; {} where there is none, or none that can be read."""
    import yaml

    found = _MATTER.match(readme.removeprefix("\ufeff")[:MAX_MATTER])
    if found is None:
        return {}
    try:
        if not _harmless(yaml.parse(found[1], Loader=yaml.SafeLoader)):
            return {}
        fields = yaml.safe_load(found[1])
    except Exception:  # a tag with the wrong content raises whatever its constructor meets, not YAMLError alone
        return {}
    return fields if isinstance(fields, dict) else {}


def _harmless(events: Iterable[Any]) -> bool:
    """No aliases, as aliases of aliases grow without bound, and no deep nesting, in which parsing takes for ever."""
    import yaml

    depth = 0
    for event in events:
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH or isinstance(event, yaml.AliasEvent):
            return False
    return True


def _inherited(theirs: Mapping[Any, Any]) -> dict[str, Any]:
    """Licence, languages and task of aligned's card; only what is plain text."""
    found: dict[str, Any] = {}
    licence = _plain(theirs.get("license"))
    if licence is not None:
        found["license"] = licence = _lower(licence)
        if not all(re.fullmatch(r"[a-z0-9.+-]+", part) for part in _listed(licence)):
            found |= {"license": "other", "license_name": "-".join(map(_slug, _listed(licence)))}
        if found["license"] == "other":
            found |= _strings(theirs, "license_name", "license_link")
    language = theirs.get("language")  # YAML takes Norwegian's code for False
    norwegian = ["no" if part is False else part for part in _listed(language)]
    language = _plain(norwegian if isinstance(language, list) else norwegian[0])
    return found | ({} if language is None else {"language": language}) | _strings(theirs, "pipeline_tag")


def _strings(theirs: Mapping[Any, Any], *keys: str) -> dict[str, Any]:
    return {key: theirs[key] for key in keys if isinstance(theirs.get(key), str) and _plain(theirs[key])}


def _plain(value: Any) -> Any:
    """The value where it is a string of one printable line, or a list of such strings; else None."""
    parts = _listed(value)
    fine = all(isinstance(part, str) and part.strip() and part.isprintable() for part in parts)
    return value if parts and fine and sum(map(len, parts)) <= MAX_FIELD else None


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _lower(value: Any) -> Any:
    return [part.lower() for part in value] if isinstance(value, list) else value.lower()


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or "unnamed"


def _model_id(name: str) -> str:
    """The name as the Hub would take it for a model's id: `org/name` or `name`, whatever it was."""
    parts = name.split("/") if _HUB_ID.fullmatch(name) else [name.rstrip("/").rpartition("/")[2]]
    return "/".join(_id_part(part) for part in parts)


def _id_part(text: str) -> str:
    text = re.sub(r"[^A-Za-z0-9_.-]+", "-", text)
    text = re.sub(r"-{2,}|\.{2,}", lambda run: run[0][0], text)
    text = text[:MAX_ID].strip("-.")
    while text.endswith(".git"):
        text = text.removesuffix(".git").rstrip("-.")
    return text or "unnamed"


def _origin(origin: Origin) -> str:
    if origin.commit is None:
        return _code(origin.name)
    commit = _code(origin.commit)
    if _HUB_ID.fullmatch(origin.name) and re.fullmatch(r"[\w.-]+", origin.commit, re.ASCII):
        return f"[{_code(origin.name)}](https://huggingface.co/{origin.name}/tree/{origin.commit}), commit {commit}"
    return f"{_code(origin.name)}, commit {commit}"


def _items(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _some(what: str, tensors: Sequence[tuple[str, str]]) -> list[str]:
    """The first of them with their reasons, and how many there are besides."""
    lines = [f"{what}: {_code(name)} ({_text(reason)})" for name, reason in tensors[:SHOWN]]
    return lines + ([f"{what}: {len(tensors) - SHOWN} more"] if len(tensors) > SHOWN else [])


def _number(value: float) -> str:
    return repr(float(value)).removesuffix(".0")


def _line(text: str) -> str:
    """The text on one line: what cannot be printed as the escape that Python has for it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _text(text: str) -> str:
    """One line of plain text: punctuation that Markdown or HTML could take for its own is escaped."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$&!])", r"\\\1", _line(text)).strip() or "unnamed"


def _code(text: str) -> str:
    """One line of code, between backticks that do not occur in it."""
    text = _line(text) or " "
    ticks = "`" * (_longest_run(text) + 1)
    room = " " if text.startswith("`") or text.endswith("`") or text != text.strip() else ""
    return f"{ticks}{room}{text}{room}{ticks}"


def _fence(text: str, language: str) -> str:
    """A block of code, between fences longer than any run of backticks in it."""
    ticks = "`" * max(3, _longest_run(text) + 1)
    return f"{ticks}{language}\n{text}\n{ticks}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
