"""The files of a checkpoint's folder: their names, its JSON files, and the files beside the weights."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from typing import Any

from ..errors import CheckpointError
from .reader import open_regular_file

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SINGLE_BIN = "pytorch_model.bin"
INDEX_BIN = "pytorch_model.bin.index.json"
ADAPTER = "adapter_model.safetensors"
ADAPTER_BIN = "adapter_model.bin"
ADAPTER_CONFIG = "adapter_config.json"
CONFIG = "config.json"
# A folder with one of these files has a whole model; transformers takes the first of them that it finds.
WHOLE_MODELS = (SINGLE, INDEX, SINGLE_BIN, INDEX_BIN)
# Files that quantisation schemes write beside the weights, and the name of the scheme that writes each.
QUANTIZATION_FILES = {
    "quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt",
    "quanto_qmap.json": "optimum-quanto",
}  # fmt: skip
MAX_JSON = 100_000_000  # most bytes of an index or a config


def load_json(path: str, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the JSON object in a file, or `missing` if there is no such file.

    Raises:
        CheckpointError: The file has no JSON object or cannot be read, or it does not exist and `missing` is None.
    """
    try:
        if os.path.getsize(path) > MAX_JSON:
            raise CheckpointError(f"{path}: {os.path.getsize(path)} bytes, but at most {MAX_JSON} are read")
        with open_regular_file(path) as file:
            value = json.loads(file.read())
    except FileNotFoundError:
        if missing is not None:
            return missing
        raise CheckpointError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON {type(value).__name__} where an object is expected")
    return value


def find_other_files(folder: str, weights: Collection[str]) -> dict[str, str]:
    """Return the path of each regular file of a folder but for its weights, sorted by the path inside the folder.

    Args:
        folder: The folder. Its subfolders are searched too, unless their names begin with a dot.
        weights: The paths, inside the folder, of files to leave out.
    """
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (os.path.join(place, name) for name in names)
        found += [os.path.relpath(path, folder) for path in paths if os.path.isfile(path)]
    return {name: os.path.join(folder, name) for name in sorted(found) if name not in weights}


def find_strays(folder: str, files: Mapping[str, str]) -> dict[str, str]:
    """Return the target of each file that is a link out of the folder, by the path inside the folder.

    The files of a hub snapshot are links to blobs of the hub's cache; these blobs count as inside the snapshot.
    """
    home = os.path.realpath(folder)
    homes = [home]
    if os.path.basename(os.path.dirname(home)) == "snapshots":
        homes.append(os.path.join(os.path.dirname(os.path.dirname(home)), "blobs"))
    places = {name: os.path.realpath(path) for name, path in files.items()}
    inside = tuple(os.path.join(root, "") for root in homes)
    return {name: place for name, place in places.items() if not place.startswith(inside)}
