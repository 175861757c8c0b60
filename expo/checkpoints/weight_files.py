"""Open one weight file, a .safetensors file or a file of PyTorch's own format, and read its header alone."""

from __future__ import annotations

import hashlib
import os
import re

from ..errors import CheckpointError
from .reader import FileReader, Identity, open_regular_file
from .safetensors_header import header_length, parse
from .shard import Shard

PICKLED = (".bin", ".pt", ".pth", ".ckpt")  # suffixes of files of PyTorch's own format


def open_shard(path: str) -> Shard:
    """Read the header of a .safetensors or a .bin file. Raises CheckpointError."""
    if path.endswith(PICKLED):
        from .torch_file import open_torch_file

        return open_torch_file(path)
    return open_safetensors(path)


def open_safetensors(path: str) -> Shard:
    """Read and check the header of a .safetensors file. Raises CheckpointError."""
    try:
        with open_regular_file(path) as file:
            identity = Identity.of(file.fileno())
            first = file.read(64)
            if first.startswith(b"GGUF"):
                raise CheckpointError(gguf_message(path))
            length = header_length(path, first, identity.size)
            file.seek(8)
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    header = parse(path, text, identity.size)
    digest = hashlib.sha256(text).hexdigest()
    return Shard(path, identity.size, header, digest, FileReader(path, identity), {})


def gguf_message(path: str) -> str:
    """Return the message about a GGUF file: why it cannot be read, and the way out."""
    name = os.path.basename(path)
    scheme = re.search(
        r"(?<![A-Za-z0-9])(I?Q[1-8](_[A-Z0-9]+)*|MXFP4|BF16|F16|F32)(?![A-Za-z0-9])", name, re.IGNORECASE
    )
    kind = (
        f"quantised as {scheme[0].upper()}" if scheme and "F" not in scheme[0].upper()[:2] else "most often quantised"
    )
    return (
        f"{path}: a GGUF file, {kind}, which cannot be extrapolated; use the checkpoint that it was made from, or load "
        f'it with transformers\' from_pretrained(folder, gguf_file="{name}") and save it with save_pretrained()'
    )
