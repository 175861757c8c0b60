"""Warnings about two tokenizers: rows of embeddings are paired by token id, so both checkpoints need the same ids.

The tokens are read from the first of these files that a checkpoint has, as transformers does:

- tokenizer.json, which the tokenizers library writes: model.vocab is an object with the id of each token (BPE,
  WordPiece, WordLevel) or a list of [token, score] (Unigram), and added_tokens is a list of objects with id and
  content.
- vocab.json: an object with the id of each token.
- tokenizer.model: a SentencePiece model.

added_tokens.json and added_tokens_decoder of tokenizer_config.json name further tokens beside the last two.
"""

from __future__ import annotations

import filecmp
import re
from collections.abc import Mapping
from typing import Any

from ..errors import CheckpointError
from .checkpoint import Checkpoint
from .files import load_json
from .model_parts import is_embedding
from .sentencepiece_file import read_pieces
from .sidecars import TOKENIZER as TOKENIZER_FILES
from .sidecars import VOCABULARY, has_tokenizer

TOKENIZER, VOCAB, SENTENCEPIECE = "tokenizer.json", "vocab.json", "tokenizer.model"
ADDED, SETTINGS = "added_tokens.json", "tokenizer_config.json"
SHOWN = 3  # ids that a warning names one by one

Tokens = dict[int, str]


def compare(sft: Checkpoint, aligned: Checkpoint) -> str | None:
    """Return a warning about ids that differ; None if the tokenizers agree or one of them has no file of tokens."""
    files = sft.files, aligned.files
    kinds = [next((kind for kind in (TOKENIZER, VOCAB, SENTENCEPIECE) if kind in each), None) for each in files]
    if kinds[0] is None or kinds[1] is None or files[0][kinds[0]] == files[1][kinds[1]]:
        return None
    try:
        if kinds[0] == kinds[1] and _same_files(*files, kinds[0]):
            return None
        sft_tokens, aligned_tokens = (read_tokens(each, kind) for each, kind in zip(files, kinds, strict=True) if kind)
    except (CheckpointError, OSError) as error:
        return f"token ids were not compared: {error}"
    ids = {*sft_tokens, *aligned_tokens} if kinds[0] == kinds[1] else {*sft_tokens} & {*aligned_tokens}
    differing = sorted(each for each in ids if not _same_token(sft_tokens.get(each), aligned_tokens.get(each)))
    if not differing:
        return None
    if kinds[0] != kinds[1] and 2 * len(differing) > len(ids):  # the same tokens may have other spellings there
        return (
            f"token ids were not compared: sft has {kinds[0]}, aligned has {kinds[1]}, and most of their tokens are "
            "not spelled alike"
        )
    return (
        f"the tokenizers differ in {len(differing)} token id{'s' * (len(differing) > 1)} "
        f"({_describe(differing, sft_tokens, aligned_tokens)}): rows of the embeddings are extrapolated by id"
        f"{_way_out(aligned)}"
    )


def _same_files(sft: Mapping[str, str], aligned: Mapping[str, str], kind: str) -> bool:
    """Return True if all files that `read_tokens` would read are the same in both checkpoints. Raises OSError."""
    names = [kind] if kind == TOKENIZER else [kind, *({ADDED, SETTINGS} & {*sft, *aligned})]
    return all(each in sft and each in aligned and filecmp.cmp(sft[each], aligned[each], False) for each in names)


def _same_token(one: str | None, other: str | None) -> bool:
    """Return True for equal tokens; Gemma's tokenizer.json has a tab where its SentencePiece model has a byte."""
    return one == other or {one, other} == {"\t", "<0x09>"}


def _describe(differing: list[int], sft: Tokens, aligned: Tokens) -> str:
    """Return the first ids that differ with both tokens, and the number of ids that one of the two lacks."""
    both = [token_id for token_id in differing if token_id in sft and token_id in aligned]
    named = [f"{each} is {sft[each]!r} in sft and {aligned[each]!r} in aligned" for each in both[:SHOWN]]
    for role, here, there in (("sft", sft, aligned), ("aligned", aligned, sft)):
        alone = [token_id for token_id in differing if token_id in here and token_id not in there]
        if alone:
            named.append(f"{len(alone)} in {role} alone, the first of them {alone[0]} {here[alone[0]]!r}")
    return "; ".join(named)


def _way_out(aligned: Checkpoint) -> str:
    """Return the option that keeps aligned's embeddings as they are; "" if no tensor has the name of an embedding."""
    names = [re.escape(name.removesuffix(".weight")) for name in aligned.tensors if is_embedding(name)]
    if not names:
        return ""
    return f"; `alpha_for={{r'^({'|'.join(names)})\\.weight$': 0}}` keeps aligned's"


def find_missing(sft: Checkpoint, aligned: Checkpoint) -> str | None:
    """Return a warning if sft has a tokenizer and aligned, whose files are copied into the output, has none."""
    if aligned.folder is None or has_tokenizer(aligned.files) or not has_tokenizer(sft.files):
        return None
    *first, last = [name for name in sft.files if name in TOKENIZER_FILES or VOCABULARY.fullmatch(name)]
    files = f"{', '.join(first)} and {last}" if first else last
    return (
        f"aligned has no tokenizer, so the output has none; sft has one: copy {files} from {sft.path} into the output "
        "if aligned was trained with it"
    )


def read_tokens(files: Mapping[str, str], kind: str) -> Tokens:
    """Return a checkpoint's tokens by their ids; entries that break the format are skipped.

    Args:
        files: The paths of the checkpoint's files by name.
        kind: The file to read: TOKENIZER, VOCAB or SENTENCEPIECE.

    Raises:
        CheckpointError: A file cannot be read.
    """
    if kind == TOKENIZER:
        return read_ids(load_json(files[kind]))
    found = _by_id(load_json(files[kind])) if kind == VOCAB else dict(enumerate(read_pieces(files[kind])))
    settings = load_json(files[SETTINGS]) if SETTINGS in files else {}
    decoder = settings.get("added_tokens_decoder")
    for text, entry in decoder.items() if isinstance(decoder, dict) else ():
        if text.isdecimal() and isinstance(entry, dict) and isinstance(entry.get("content"), str):
            found[int(text)] = entry["content"]
    return found | (_by_id(load_json(files[ADDED])) if ADDED in files else {})


def _by_id(ids: Mapping[str, Any]) -> Tokens:
    """Return the tokens by their ids, of an object with the id of each token."""
    return {token_id: token for token, token_id in ids.items() if isinstance(token_id, int)}


def read_ids(tokenizer: dict[str, Any]) -> Tokens:
    """Return the tokens of a tokenizer.json by their ids; entries that break the format are skipped."""
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    found: Tokens = {}
    if isinstance(vocabulary, dict):
        found = _by_id(vocabulary)
    elif isinstance(vocabulary, list):
        entries = enumerate(vocabulary)
        found = {token_id: str(entry[0]) for token_id, entry in entries if isinstance(entry, list) and entry}
    added = tokenizer.get("added_tokens")
    for entry in added if isinstance(added, list) else []:
        if isinstance(entry, dict) and isinstance(entry.get("id"), int):
            found[entry["id"]] = str(entry.get("content"))
    return found
