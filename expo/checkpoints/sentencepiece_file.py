"""Read the tokens of a SentencePiece model, tokenizer.model, without the library.

The file is one message of protocol buffers, `ModelProto` in github.com/google/sentencepiece,
src/sentencepiece_model.proto: its field 1 is repeated, once for each token in the order of the ids, and is a message
whose field 1 is the token's text. A field begins with a number, 8 times the field's own number plus the kind of its
value: 0 a number, 1 eight bytes, 2 bytes with their length before them, 5 four bytes. Numbers have 7 bits in a byte,
the lowest first, and every byte but the last has its highest bit set.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from ..errors import CheckpointError
from .files import MAX_JSON
from .reader import open_regular_file

_BYTES, _FIXED = 2, {1: 8, 5: 4}


def read_pieces(path: str) -> list[str]:
    """Return the tokens of a SentencePiece model in the order of their ids.

    Raises:
        CheckpointError: The file has another format (Llama 3's tokenizer.model is tiktoken's), or cannot be read.
    """
    try:
        if os.path.getsize(path) > MAX_JSON:
            raise CheckpointError(f"{path}: {os.path.getsize(path)} bytes, but at most {MAX_JSON} are read")
        with open_regular_file(path) as file:
            data = file.read()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    try:
        pieces = [_text(data[start:stop]) for field, start, stop in _fields(data) if field == 1]
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"{path}: not a SentencePiece model") from error
    if not pieces:
        raise CheckpointError(f"{path}: not a SentencePiece model")
    return pieces


def _text(piece: bytes) -> str:
    """Return the text of one token's message. Raises ValueError and IndexError for another kind of message."""
    return next(piece[start:stop].decode() for field, start, stop in _fields(piece) if field == 1)


def _fields(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield the number of each field that has bytes, and the place (start, stop) of the bytes.

    Raises:
        ValueError: A field has an unknown kind or ends behind the data.
        IndexError: A number ends behind the data.
    """
    at = 0
    while at < len(data):
        tag, at = _number(data, at)
        field, kind = tag >> 3, tag & 7
        if kind == _BYTES:
            length, at = _number(data, at)
            yield field, at, at + length
            at += length
        elif kind in _FIXED:
            at += _FIXED[kind]
        elif kind == 0:
            _, at = _number(data, at)
        else:
            raise ValueError(f"a field of the kind {kind}")
    if at > len(data):
        raise ValueError("a field ends behind the data")


def _number(data: bytes, at: int) -> tuple[int, int]:
    """Return the number at a place, and the place behind it. Raises ValueError and IndexError."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
