"""Token ids of two tokenizers: a warning names those that differ, or says why they were not compared."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from plans import checkpoint, make_plan

import expo
from expo.checkpoints import tokenizer as tokens
from expo.checkpoints.tokenizer import TOKENIZER, compare, find_missing, read_ids
from expo.cli import with_options
from expo.planning.steps import Action

ROOT = Path(__file__).parents[2]
BPE = {"a": 0, "b": 1, "c": 2}


def tokenizer(vocabulary: Any = None, added: Sequence[Any] = (), **more: Any) -> dict[str, Any]:
    model = {"type": "BPE", "vocab": BPE if vocabulary is None else vocabulary, "merges": []}
    return {"version": "1.0", "added_tokens": list(added), "model": model, **more}


def token(at: Any, content: Any) -> dict[str, Any]:
    return {"id": at, "content": content, "special": True, "lstrip": False}


def warning_of(tmp_path: Path, sft: Any, aligned: Any) -> str | None:
    """Return the warning about two tokenizer.json, each given as an object, as text, or as None for no such file."""
    opened = []
    for role, content in (("sft", sft), ("aligned", aligned)):
        made = checkpoint({"w": ("BF16", (1,))}, f"/models/{role}")
        if content is not None:
            path = tmp_path / role / TOKENIZER
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
            made = dataclasses.replace(made, files={TOKENIZER: str(path)})
        opened.append(made)
    return compare(*opened)


# The ids in a tokenizer.json.


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(tokenizer(), {0: "a", 1: "b", 2: "c"}, id="BPE"),
        pytest.param(tokenizer([["<unk>", 0.0], ["▁the", -3.1]]), {0: "<unk>", 1: "▁the"}, id="Unigram"),
        pytest.param(tokenizer(added=(token(3, "<s>"),)), {0: "a", 1: "b", 2: "c", 3: "<s>"}, id="added"),
        pytest.param(tokenizer(added=(token(1, "<s>"),)), {0: "a", 1: "<s>", 2: "c"}, id="added over another"),
        pytest.param(tokenizer([["a", 0.0], ["b", 0.0]], (token(1, "<s>"),)), {0: "a", 1: "<s>"}, id="over Unigram's"),
        pytest.param(tokenizer({}, ()), {}, id="empty"),
        pytest.param({}, {}, id="no model"),
        pytest.param({"model": None, "added_tokens": None}, {}, id="null"),
        pytest.param({"model": [], "added_tokens": {}}, {}, id="other kinds"),
        pytest.param({"model": {"vocab": "a"}, "added_tokens": [token(0, "x")]}, {0: "x"}, id="a string for a vocab"),
        pytest.param(tokenizer({"a": "0", "b": 1.0, "c": None, "d": 3}), {3: "d"}, id="ids that are no integers"),
        pytest.param(tokenizer([["a", 0.0], [], "b", None, [None, 1]]), {0: "a", 4: "None"}, id="odd Unigram entries"),
        pytest.param(
            tokenizer({}, (None, [], {}, {"id": "1", "content": "x"}, {"id": 5})), {5: "None"}, id="odd added tokens"
        ),
        pytest.param(tokenizer({"a": -1, "b": 10**30}), {-1: "a", 10**30: "b"}, id="ids out of any range"),
    ],
)
def test_ids(content: dict[str, Any], expected: dict[int, str]) -> None:
    assert read_ids(content) == expected


# Differences.


@pytest.mark.parametrize(
    ("sft", "aligned"),
    [
        pytest.param(None, None, id="neither has one"),
        pytest.param(tokenizer(), None, id="sft alone"),
        pytest.param(None, tokenizer(), id="aligned alone"),
        pytest.param(None, b"not JSON", id="no JSON, but alone"),
        pytest.param(tokenizer(), tokenizer(), id="the same"),
        pytest.param(b"\0 the same, whatever it is", b"\0 the same, whatever it is", id="the same bytes"),
        pytest.param(tokenizer(), tokenizer(dict(reversed(BPE.items()))), id="in another order"),
        pytest.param(tokenizer(), tokenizer(truncation={"max_length": 8}), id="another setting"),
        pytest.param(tokenizer(), json.dumps(tokenizer(), indent=8).encode(), id="other white space"),
        pytest.param(tokenizer(), tokenizer([[name, 0.0] for name in BPE]), id="another kind of model"),
        pytest.param(
            tokenizer({**BPE, "<s>": 3}), tokenizer(added=(token(3, "<s>"),)), id="added or in the vocabulary"
        ),
        pytest.param(tokenizer(added=(token(2, "c"),)), tokenizer(), id="added and in the vocabulary"),
        pytest.param({}, {"model": {}}, id="nothing in either"),
    ],
)
def test_what_is_no_difference(tmp_path: Path, sft: Any, aligned: Any) -> None:
    assert warning_of(tmp_path, sft, aligned) is None


END = "rows of the embeddings are extrapolated by id"


@pytest.mark.parametrize(
    ("sft", "aligned", "said"),
    [
        pytest.param(
            tokenizer(), tokenizer({"a": 0, "b": 2, "c": 1}),
            "2 token ids (1 is 'b' in sft and 'c' in aligned; 2 is 'c' in sft and 'b' in aligned)", id="moved",
        ),
        pytest.param(
            tokenizer(), tokenizer(added=(token(1, "<s>"),)), "1 token id (1 is 'b' in sft and '<s>' in aligned)",
            id="an added one in another's place",
        ),
        pytest.param(
            tokenizer(), tokenizer(added=(token(3, "<|im_start|>"), token(4, "<|im_end|>"))),
            "2 token ids (2 in aligned alone, the first of them 3 '<|im_start|>')", id="only in aligned",
        ),
        pytest.param(
            tokenizer(added=(token(3, "<pad>"),)), tokenizer(),
            "1 token id (1 in sft alone, the first of them 3 '<pad>')", id="only in sft",
        ),
        pytest.param(
            tokenizer({"a": 0, "x": 1, "s": 7}), tokenizer({"a": 0, "y": 1, "t": 9}),
            "3 token ids (1 is 'x' in sft and 'y' in aligned; 1 in sft alone, the first of them 7 's'; "
            "1 in aligned alone, the first of them 9 't')", id="all three",
        ),
        pytest.param(
            tokenizer([["a", 0.0], ["b", 0.0]]), tokenizer([["b", 0.0], ["a", 0.0]]),
            "2 token ids (0 is 'a' in sft and 'b' in aligned; 1 is 'b' in sft and 'a' in aligned)", id="Unigram",
        ),
        pytest.param(
            tokenizer({}), tokenizer(), "3 token ids (3 in aligned alone, the first of them 0 'a')", id="an empty one",
        ),
    ],
)  # fmt: skip
def test_the_difference_is_said_in_one_line(tmp_path: Path, sft: Any, aligned: Any, said: str) -> None:
    assert warning_of(tmp_path, sft, aligned) == f"the tokenizers differ in {said}: {END}"


def test_a_whole_vocabulary_moved_by_one_is_said_as_briefly(tmp_path: Path) -> None:
    n = 20_000
    sft, aligned = (tokenizer({f"token{i}": i + by for i in range(n)}) for by in (0, 1))
    text = warning_of(tmp_path, sft, aligned)
    assert text is not None
    assert text.startswith(
        "the tokenizers differ in 20001 token ids (1 is 'token1' in sft and 'token0' in aligned; 2 is 'token2' in sft "
        "and 'token1' in aligned; 3 is 'token3' in sft and 'token2' in aligned; 1 in sft alone, the first of them 0 "
        "'token0'; 1 in aligned alone, the first of them 20000 'token19999')"
    )


def test_a_token_that_cannot_be_printed_is_escaped(tmp_path: Path) -> None:
    text = warning_of(tmp_path, tokenizer({"\ud800\n\x1b[2J": 0}), tokenizer({"é": 0}))
    assert text is not None
    assert r"0 is '\ud800\n\x1b[2J' in sft and 'é' in aligned" in text
    text.encode()


def test_files_of_one_size_and_time_are_read(tmp_path: Path) -> None:
    contents = tokenizer({"a": 0}), tokenizer({"b": 0})
    assert warning_of(tmp_path, *contents) is not None
    for role in ("sft", "aligned"):
        os.utime(tmp_path / role / TOKENIZER, (0, 0))
    paths = [str(tmp_path / role / TOKENIZER) for role in ("sft", "aligned")]
    one, other = (dataclasses.replace(checkpoint({"w": ("BF16", (1,))}), files={TOKENIZER: path}) for path in paths)
    text = compare(one, other)
    assert text is not None
    assert "0 is 'a' in sft and 'b' in aligned" in text


# Files that cannot be compared.


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "not JSON"), (b"", "not JSON"), (b"[]", "a JSON list where an object is expected"),
        (b"\xff\xfe\xfd", "not JSON"), (b"[" * 100_000, "not JSON"), (b"1", "a JSON int"),
    ],
    ids=lambda value: str(value)[:12],
)  # fmt: skip
@pytest.mark.parametrize("role", ["sft", "aligned"])
def test_a_malformed_file_is_said_and_stops_nothing(tmp_path: Path, content: bytes, words: str, role: str) -> None:
    files = {"sft": tokenizer(), "aligned": tokenizer(), role: content}
    text = warning_of(tmp_path, files["sft"], files["aligned"])
    assert text is not None
    assert text.startswith(f"token ids were not compared: {tmp_path / role / TOKENIZER}: ")
    assert words in text


def test_a_file_that_vanishes_is_said_and_stops_nothing(tmp_path: Path) -> None:
    one, other = (
        dataclasses.replace(checkpoint({"w": ("BF16", (1,))}), files={TOKENIZER: str(tmp_path / name)})
        for name in ("one", "other")
    )
    text = compare(one, other)
    assert text is not None
    assert text.startswith("token ids were not compared: ")
    assert str(tmp_path / "one") in text


def test_a_file_that_cannot_be_read_is_said_and_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> bool:
        raise PermissionError(13, "Permission denied", "/models/sft/tokenizer.json")

    monkeypatch.setattr(tokens.filecmp, "cmp", refuse)
    text = warning_of(tmp_path, tokenizer(), tokenizer({}))
    assert text is not None
    assert text.startswith("token ids were not compared: ")
    assert "/models/sft/tokenizer.json" in text


@pytest.mark.parametrize("same", ["bytes", "path"])
def test_identical_files_are_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same: str) -> None:
    def refuse(path: str) -> dict[str, Any]:
        raise AssertionError(f"{path} was parsed")

    monkeypatch.setattr(tokens, "load_json", refuse)
    if same == "bytes":
        assert warning_of(tmp_path, tokenizer(), tokenizer()) is None
        with pytest.raises(AssertionError, match="was parsed"):
            warning_of(tmp_path, tokenizer(), tokenizer({}))
    else:
        one = dataclasses.replace(checkpoint({"w": ("BF16", (1,))}), files={TOKENIZER: str(tmp_path / "nowhere")})
        assert compare(one, one) is None


@pytest.mark.parametrize(
    "names",
    [
        ("model.embed_tokens.weight", "lm_head.weight"), ("transformer.wte.weight",), ("gpt_neox.embed_in.weight",),
        ("shared.weight", "lm_head.weight"),
    ],
    ids=str,
)  # fmt: skip
def test_the_option_that_is_offered_keeps_aligneds_embeddings(names: tuple[str, ...], tmp_path: Path) -> None:
    inner = {"model.layers.0.embed_tokens_norm.weight": ("BF16", (4,)), "encoder.layer.0.output.weight": ("BF16", (4,))}
    shapes = {**dict.fromkeys(names, ("BF16", (3, 4))), **inner}
    opened = []
    for role, vocabulary in (("sft", BPE), ("aligned", {**BPE, "a": 2, "c": 0})):
        path = tmp_path / f"{role}.json"
        path.write_text(json.dumps(tokenizer(vocabulary)))
        opened.append(dataclasses.replace(checkpoint(shapes, f"/models/{role}"), files={TOKENIZER: str(path)}))
    note = compare(*opened)
    assert note is not None
    note = with_options(note)
    words = shlex.split(note[note.index("--alpha-for") : note.index(" keeps")])
    pattern, _, alpha = words[1].rpartition("=")
    plan = make_plan(*opened, [0.3], {pattern: float(alpha)})
    plan.check()
    assert {step.name for step in plan.steps if step.action is Action.COPY} == set(names)


# A checkpoint without a tokenizer.


def missing(files: str) -> str:
    return (
        f"aligned has no tokenizer, so the output has none; sft has one: copy {files} from /models/sft into the output "
        "if aligned was trained with it"
    )


@pytest.mark.parametrize(
    ("sft", "aligned", "warning"),
    [
        (["tokenizer.json", "tokenizer_config.json"], ["config.json"],
         missing("tokenizer.json and tokenizer_config.json")),
        (["tokenizer.model"], ["chat_template.jinja", "special_tokens_map.json"], missing("tokenizer.model")),
        (["tokenizer.json"], ["own.tiktoken"], None), (["tokenizer.json"], ["vocab.txt"], None),
        (["tokenizer.json"], ["tokenizer_config.json"], None), (["config.json"], ["config.json"], None),
    ],
)  # fmt: skip
def test_aligned_without_a_tokenizer(sft: list[str], aligned: list[str], warning: str | None) -> None:
    theirs, ours = (
        checkpoint({"w": ("BF16", (1,))}, f"/models/{role}", files=files)
        for role, files in (("sft", sft), ("aligned", aligned))
    )
    assert find_missing(theirs, dataclasses.replace(ours, folder="/models/aligned")) == warning
    assert find_missing(theirs, dataclasses.replace(ours, folder=None)) is None, "nothing is copied beside a bare file"


def test_the_advice_for_an_aligned_without_a_tokenizer_is_right(tmp_path: Path) -> None:
    """The files that the warning names make transformers load the output's tokenizer, which is that of sft."""
    tokenizers = pytest.importorskip("tokenizers")
    for role in ("sft", "aligned"):
        shutil.copytree(ROOT / "expo/demo" / role, tmp_path / role)
    for path in (tmp_path / "aligned").glob("tokenizer*"):
        path.unlink()
    out = tmp_path / "out"
    merged = expo.merge(tmp_path / "sft", tmp_path / "aligned", 0.3, out)
    (warning,) = [warning for warning in merged.warnings if "tokenizer" in warning]
    assert not list(out.glob("tokenizer*"))
    files, _, folder = warning.partition(": copy ")[2].partition(" into ")[0].partition(" from ")
    for name in files.replace(" and ", ", ").split(", "):
        shutil.copy(Path(folder) / name, out)
    assert {path.name for path in out.glob("*token*")} == {path.name for path in (tmp_path / "sft").glob("*token*")}
    one, other = (tokenizers.Tokenizer.from_file(str(each / TOKENIZER)) for each in (tmp_path / "sft", out))
    assert one.encode("The cat").ids == other.encode("The cat").ids
    assert expo.merge(tmp_path / "sft", out, 0.3, tmp_path / "again").warnings == ()


# Tokens of other files.

PIECES = ("<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "▁ab", "é", "日")


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def field(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def sentencepiece(pieces: Sequence[str] = PIECES) -> bytes:
    """Return a SentencePiece model with scores and kinds of pieces, a trainer's settings, and fields of each kind."""
    made = b""
    for number, piece in enumerate(pieces):
        kind = {0: 2, 1: 3, 2: 3}.get(number, 6 if piece.startswith("<0x") else 1)
        made += field(1, field(1, piece.encode()) + b"\x15" + struct.pack("<f", -number) + b"\x18" + varint(kind))
    settings = b"\x18\x02" + b"\x20" + varint(len(pieces)) + b"\x09" + struct.pack("<d", 0.5) + field(15, b"\x0a\x00")
    return made + field(2, settings) + field(3, field(1, b"identity"))


def warning_about(tmp_path: Path, sft: dict[str, Any], aligned: dict[str, Any]) -> str | None:
    """Return the warning about two checkpoints with these files: bytes, or objects for JSON."""
    opened = []
    for role, files in (("sft", sft), ("aligned", aligned)):
        folder = tmp_path / role
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        made = checkpoint({"model.embed_tokens.weight": ("BF16", (4, 2))}, f"/models/{role}")
        opened.append(dataclasses.replace(made, files={name: str(folder / name) for name in files}))
    return compare(*opened)


SWAPPED = (*PIECES[:-2], PIECES[-1], PIECES[-2])
LAST = len(PIECES)
AS_JSON = {piece: number for number, piece in enumerate(PIECES)}
MODEL, JSON, VOCAB = "tokenizer.model", "tokenizer.json", "vocab.json"
ADDED, SETTINGS = "added_tokens.json", "tokenizer_config.json"
PAD = {"added_tokens_decoder": {str(LAST): {"content": "<pad>", "special": True}}}
SWAP = f"{LAST - 2} is 'é' in sft and '日' in aligned; {LAST - 1} is '日' in sft and 'é' in aligned"


@pytest.mark.parametrize(
    ("sft", "aligned", "said"),
    [
        pytest.param({MODEL: sentencepiece()}, {MODEL: sentencepiece()}, None, id="equal models"),
        pytest.param({MODEL: sentencepiece()}, {MODEL: sentencepiece(SWAPPED)}, SWAP, id="two models"),
        pytest.param({MODEL: sentencepiece()}, {MODEL: sentencepiece((*PIECES, "x"))}, "1 in aligned alone", id="more"),
        pytest.param({MODEL: sentencepiece()}, {JSON: tokenizer(AS_JSON)}, None, id="a model and its JSON"),
        pytest.param(
            {MODEL: sentencepiece()}, {JSON: tokenizer({each: n for n, each in enumerate(SWAPPED)})}, SWAP,
            id="a model and another JSON",
        ),
        pytest.param({JSON: tokenizer(AS_JSON)}, {MODEL: sentencepiece()}, None, id="a JSON and its model"),
        pytest.param(
            {MODEL: sentencepiece()}, {JSON: tokenizer(AS_JSON, [token(LAST, "<|im_end|>")])}, None,
            id="an id that a model does not define",
        ),
        pytest.param(
            {MODEL: sentencepiece(), SETTINGS: PAD}, {JSON: tokenizer(AS_JSON, [token(LAST, "<|im_end|>")])},
            f"{LAST} is '<pad>' in sft and '<|im_end|>' in aligned", id="an added token of a model's settings",
        ),
        pytest.param(
            {MODEL: sentencepiece(), ADDED: {"<pad>": LAST}}, {MODEL: sentencepiece(), ADDED: {"<eot>": LAST}},
            f"{LAST} is '<pad>' in sft and '<eot>' in aligned", id="added tokens of equal models",
        ),
        pytest.param(
            {MODEL: sentencepiece(), SETTINGS: {"chat_template": "x"}}, {MODEL: sentencepiece(), SETTINGS: {}}, None,
            id="equal models with other templates",
        ),
        pytest.param({VOCAB: AS_JSON}, {VOCAB: AS_JSON, "merges.txt": b"a b"}, None, id="equal vocabularies"),
        pytest.param({VOCAB: BPE}, {VOCAB: {"a": 0, "b": 2, "c": 1}}, "1 is 'b' in sft and 'c' in", id="vocabularies"),
        pytest.param({VOCAB: BPE}, {JSON: tokenizer()}, None, id="a vocabulary and its JSON"),
        pytest.param(
            {VOCAB: BPE, ADDED: {"<pad>": 3}}, {JSON: tokenizer(added=[token(3, "<eot>")])},
            "1 token id (3 is '<pad>' in sft and '<eot>' in aligned)", id="an added token beside a vocabulary",
        ),
        pytest.param({VOCAB: {"en": {"a": 0}}}, {JSON: tokenizer()}, None, id="a vocabulary of another form"),
        pytest.param(
            {MODEL: sentencepiece()}, {JSON: tokenizer({f"Ġ{n}": n for n in range(LAST)})},
            "token ids were not compared: sft has tokenizer.model, aligned has tokenizer.json, and", id="spellings",
        ),
        pytest.param(
            {MODEL: b"IQ== 0\nIg== 1\n"}, {MODEL: sentencepiece()}, "sft/tokenizer.model: not a SentencePiece model",
            id="tiktoken's",
        ),
        pytest.param({MODEL: sentencepiece()}, {MODEL: b""}, "aligned/tokenizer.model: not a S", id="an empty file"),
        pytest.param({MODEL: sentencepiece()}, {MODEL: sentencepiece()[:-1]}, "not a SentencePiece model", id="cut"),
        pytest.param({MODEL: sentencepiece()}, {MODEL: b"\xff" * 20}, "not a SentencePiece model", id="a long number"),
        pytest.param({MODEL: sentencepiece()}, {MODEL: field(1, b"\x0a\x01\xff")}, "not a Sent", id="no UTF-8"),
        pytest.param(
            {MODEL: sentencepiece(), SETTINGS: b"{"}, {MODEL: sentencepiece()}, "tokenizer_config.json: not JSON",
            id="damaged settings",
        ),
        pytest.param({MODEL: sentencepiece()}, {"vocab.txt": b"a"}, None, id="no file that is read"),
    ],
)  # fmt: skip
def test_tokens_of_other_files(sft: dict[str, Any], aligned: dict[str, Any], said: str | None, tmp_path: Path) -> None:
    warning = warning_about(tmp_path, sft, aligned)
    assert (warning is None) is (said is None), warning
    assert said is None or (warning is not None and said in warning)


def test_a_tab_that_gemmas_conversion_renames_is_no_difference(tmp_path: Path) -> None:
    vocabulary = {"\t" if piece == "<0x09>" else piece: number for number, piece in enumerate(PIECES)}
    assert warning_about(tmp_path, {MODEL: sentencepiece()}, {JSON: tokenizer(vocabulary)}) is None


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["LlamaTokenizer", "GemmaTokenizer"])
def test_a_conversion_by_transformers_is_no_difference(name: str, tmp_path: Path) -> None:
    """transformers 5 builds the tokenizer from the pieces and the merges that their scores imply, and saves it."""
    transformers = pytest.importorskip("transformers")
    from transformers.convert_slow_tokenizer import generate_merges

    pieces = ("<pad>", "<eos>", "<bos>", "<unk>", *PIECES[3:]) if name == "GemmaTokenizer" else PIECES
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    made = getattr(transformers, name)(vocab=dict(vocabulary), merges=generate_merges(vocabulary))
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    made.save_pretrained(tmp_path / "saved")
    converted = (tmp_path / "saved" / JSON).read_bytes()
    assert warning_about(tmp_path, {MODEL: sentencepiece(pieces)}, {JSON: converted}) is None
