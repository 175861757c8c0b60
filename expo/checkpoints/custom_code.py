"""The code that comes with a model: the Python files that its configs name, and the files that these name in turn.

Code is parsed, and never run.
"""

from __future__ import annotations

import json
import os
import posixpath
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from .sidecars import PROCESSORS, Code

if TYPE_CHECKING:
    import ast

CONFIGS = ("config.json", "tokenizer_config.json", *sorted(PROCESSORS), "modules.json")
GENERATE = "custom_generate/generate.py"  # no config names it: transformers finds it by its path
REQUIREMENTS = "custom_generate/requirements.txt"
MAX_CONFIG, MAX_CODE = 100_000_000, 10_000_000  # most bytes of a file that is read
PARSER_ERRORS = (SyntaxError, ValueError, RecursionError, MemoryError)


def find_code(files: Mapping[str, str]) -> Code:
    """Find the code that the configs name, the modules that it imports relatively, and the files that its strings name.

    Args:
        files: The path of each file of the folder, by the path inside the folder. A file that is not downloaded yet is
            not read.
    """
    notes: list[str] = []
    waiting = [name for name in _roots(files, notes) if name in files]
    found: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        if not name.endswith(".py"):
            continue
        tree = _parse(name, files[name], notes)
        if tree is not None:
            waiting += (other for other in _named_files(tree, name) if other in files)
    return Code(frozenset(found), tuple(notes))


def _roots(files: Mapping[str, str], notes: list[str]) -> Iterator[str]:
    """Yield the files that the configs name, whether or not the folder has them."""
    for config in CONFIGS:
        if config not in files:
            continue
        try:
            references = list(_references(_read_json(files[config])))
        except (OSError, ValueError, RecursionError) as error:
            notes.append(f"aligned's {config} cannot be read, so custom code that it may name is left out: {error}")
            continue
        for reference in references:
            # A class in another repository is written org/name--module.Class.
            if "--" not in reference:
                yield from _module_files(reference.rpartition(".")[0].replace(".", "/"))
    if GENERATE in files:
        yield from (GENERATE, REQUIREMENTS)


def _read_json(path: str) -> Any:
    """Return a file's JSON value; None if there is no such file."""
    try:
        return json.loads(_read(path, MAX_CONFIG))
    except FileNotFoundError:
        return None


def _read(path: str, most: int) -> bytes:
    """Return a file's bytes. Raises OSError, and ValueError if there are more than `most`."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise ValueError(f"{size} bytes, but at most {most} are read")
        return file.read(size)


def _references(value: Any) -> Iterator[str]:
    """Yield the names in `auto_map`, in a pipeline's `impl` and in a module's `type`, at any depth of a config."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            auto_map = value.get("auto_map")
            classes = list(auto_map.values()) if isinstance(auto_map, dict) else [auto_map]
            for entry in [*classes, value.get("impl"), value.get("type")]:
                yield from (text for text in (entry if isinstance(entry, list) else [entry]) if isinstance(text, str))
            waiting += value.values()


def _module_files(path: str) -> Iterator[str]:
    """Yield the files that a module of this path may be, and those of the packages that it lies in."""
    if not path:
        return
    yield f"{path}.py"
    parts = path.split("/")
    yield from ("/".join([*parts[:count], "__init__.py"]) for count in range(1, len(parts) + 1))


def _parse(name: str, path: str, notes: list[str]) -> ast.AST | None:
    """Return the syntax tree of a file; None if there is no such file, or if it is not Python of this version."""
    import ast

    try:
        text = _read(path, MAX_CODE)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as those about escapes in the code
            return ast.parse(text, name)
    except FileNotFoundError:
        return None
    except (OSError, *PARSER_ERRORS) as error:
        notes.append(
            f"aligned's {name} cannot be parsed ({error}), so files that it imports may be left out: `carry` takes "
            "them along"
        )
        return None


def _named_files(tree: ast.AST, name: str) -> Iterator[str]:
    """Yield the files that a module's relative imports may mean, and the relative paths among its strings."""
    import ast

    folder = os.path.dirname(name)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = posixpath.normpath(posixpath.join(folder, *[".."] * (node.level - 1)))
            base = posixpath.normpath(posixpath.join(above, *(node.module or "").split(".")))
            yield from _module_files(base if node.module else "")
            paths = (posixpath.normpath(f"{base}/{alias.name}") for alias in node.names)
            yield from (file for path in paths for file in _module_files(path))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and 0 < len(node.value) < 256:
            yield posixpath.normpath(node.value)
            yield posixpath.normpath(posixpath.join(folder, node.value))
