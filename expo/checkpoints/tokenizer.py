"""Warnings about two tokenizers: rows of embeddings are paired by token id, so both checkpoints need the same ids.

The tokenizers library writes tokenizer.json: model.vocab is an object with the id of each token (BPE, WordPiece,
WordLevel) or a list of [token, score] (Unigram), and added_tokens is a list of objects with id and content.
"""

from __future__ import annotations

import filecmp
import re
from typing import Any

from ..errors import CheckpointError
from .checkpoint import Checkpoint
from .files import load_json
from .model_parts import is_embedding
from .sidecars import has_tokenizer

TOKENIZER = "tokenizer.json"
SHOWN = 3  # ids that a warning names one by one


def compare(sft: Checkpoint, aligned: Checkpoint) -> str | None:
    """Return a warning about ids that differ; None if the tokenizers agree or one of them has no tokenizer.json."""
    paths = [checkpoint.files.get(TOKENIZER) for checkpoint in (sft, aligned)]
    if paths[0] is None or paths[1] is None or paths[0] == paths[1]:
        return None
    try:
        if filecmp.cmp(paths[0], paths[1], shallow=False):
            return None
        sft_tokens, aligned_tokens = (read_ids(load_json(path)) for path in paths if path is not None)
    except (CheckpointError, OSError) as error:
        return f"token ids were not compared: {error}"
    ids = {*sft_tokens, *aligned_tokens}
    differing = sorted(token_id for token_id in ids if sft_tokens.get(token_id) != aligned_tokens.get(token_id))
    if not differing:
        return None
    both = [token_id for token_id in differing if token_id in sft_tokens and token_id in aligned_tokens]
    named = [f"{each} is {sft_tokens[each]!r} in sft and {aligned_tokens[each]!r} in aligned" for each in both[:SHOWN]]
    for role, here, there in (("sft", sft_tokens, aligned_tokens), ("aligned", aligned_tokens, sft_tokens)):
        alone = [token_id for token_id in differing if token_id in here and token_id not in there]
        if alone:
            named.append(f"{len(alone)} in {role} alone, the first of them {alone[0]} {here[alone[0]]!r}")
    return (
        f"the tokenizers differ in {len(differing)} token id{'s' * (len(differing) > 1)} ({'; '.join(named)}): rows of "
        f"the embeddings are extrapolated by id{_way_out(aligned)}"
    )


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
    return "aligned has no tokenizer, so the output has none; sft has one: copy it if aligned was trained with it"


def read_ids(tokenizer: dict[str, Any]) -> dict[int, str]:
    """Return the tokens of a tokenizer.json by their ids; entries that break the format are skipped."""
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    found: dict[int, str] = {}
    if isinstance(vocabulary, dict):
        found = {token_id: token for token, token_id in vocabulary.items() if isinstance(token_id, int)}
    elif isinstance(vocabulary, list):
        entries = enumerate(vocabulary)
        found = {token_id: str(entry[0]) for token_id, entry in entries if isinstance(entry, list) and entry}
    added = tokenizer.get("added_tokens")
    for entry in added if isinstance(added, list) else []:
        if isinstance(entry, dict) and isinstance(entry.get("id"), int):
            found[entry["id"]] = str(entry.get("content"))
    return found
