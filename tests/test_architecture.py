"""These tests check the rules of the layout: the imports between packages, no cycles, few levels, and small sizes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# The list goes from the top to the bottom: a module may import from its own package and from packages below it.
PACKAGES = (
    ("fast", "search", "diff", "demo", "op", "ranks"),
    ("merging",),
    ("tensors",),
    ("output",),
    ("execution",),
    ("planning",),
    ("inputs",),
    ("checkpoints",),
    ("options", "cli"),
    ("kernels",),
    ("dtypes", "text", "memory", "errors", "_version"),
)
MOST_LEVELS, MOST_LINES, MOST_FUNCTION_LINES, MOST_PARAMETERS = 11, 400, 50, 8
# The functions that may break a rule of size, with the reasons.
LARGE = {
    "expo.merging.merge.merge": "its parameters are the options that users name, and its docstring explains each",
    "expo.tensors.streaming.stream": "its parameters are the options that users name",
    "expo.search.alpha_search.search_alpha": "its parameters are the options that users name, all explained",
    "expo.diff.comparison.compare": "its parameters are the options that users name",
    "expo.tensors.live.Live.__init__": "its parameters are the options that users name",
}


def modules() -> dict[str, Path]:
    """Return the path of each module of the package, by its dotted name."""
    found = {f"expo.kernels.{path.stem}": path for path in (ROOT / "kernels").glob("*.py")}
    for path in (ROOT / "expo").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[1] != "kernels":
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def package_of(module: str) -> str:
    """Return the part below `expo`: a package's name, or that of a module that is in no package; "" for expo itself."""
    return module.split(".")[1] if "." in module else ""


def level_of(module: str) -> int:
    """Return the number of the module's row in PACKAGES, counted from the top; expo itself is above all of them."""
    package = package_of(module)
    return next(i for i, names in enumerate(PACKAGES) if package in names) if package else -1


def targets(module: str, node: ast.ImportFrom) -> Iterator[str]:
    """Yield the modules of this project that one statement imports."""
    base = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    for _ in range(node.level - 1):
        base = base.rpartition(".")[0]
    start = ".".join(filter(None, [base if node.level else "", node.module or ""]))
    for alias in node.names:
        found = next((name for name in (f"{start}.{alias.name}", start) if name in MODULES), None)
        if found is not None and found != module:
            yield found


def imports(module: str, everywhere: bool = True) -> set[str]:
    """Return the modules that a module imports: in functions and for type checking too, or at its top level alone."""
    tree = TREES[module]
    nodes = ast.walk(tree) if everywhere else iter(tree.body)
    return {found for node in nodes if isinstance(node, ast.ImportFrom) for found in targets(module, node)}


def test_every_module_belongs_to_a_package_of_the_list() -> None:
    known = {name for names in PACKAGES for name in names}
    assert {package_of(name) for name in MODULES} - known - {""} == set()
    assert known - {package_of(name) for name in MODULES} == set(), "a row names what is not there"


def test_no_import_points_upwards() -> None:
    upwards = [
        f"{module} imports {found}, which is above it"
        for module in MODULES
        for found in sorted(imports(module))
        if level_of(found) < level_of(module)
    ]
    assert upwards == []


def test_a_package_of_the_top_row_imports_no_other_one() -> None:
    """search, diff and demo stand side by side: each command works without the others' modules."""
    across = [
        f"{module} imports {found}, which stands beside it"
        for module in MODULES
        for found in sorted(imports(module))
        if level_of(found) == level_of(module) == 0 and package_of(found) != package_of(module)
    ]
    assert across == []


def test_no_modules_import_each_other() -> None:
    found = cycle({module: imports(module) for module in MODULES if module != "expo"})
    assert found is None, f"these import each other: {' -> '.join(found or ())}"


def test_imports_form_few_levels() -> None:
    graph = {module: imports(module, everywhere=False) for module in MODULES}
    chain = longest_chain(graph)
    assert len(chain) <= MOST_LEVELS, f"{len(chain)} levels: {' -> '.join(chain)}"


def cycle(graph: dict[str, set[str]]) -> list[str] | None:
    """Return modules that import each other in a circle, the first again at the end; None for no such circle."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str] | None:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return None
        for found in sorted(graph.get(module, ())):
            circle = visit(found, [*path, module])
            if circle:
                return circle
        done.add(module)
        return None

    return next((found for module in graph if (found := visit(module, []))), None)


def longest_chain(graph: dict[str, set[str]]) -> list[str]:
    """Return the longest chain of modules each of which imports the next one; the graph has no circle."""
    chains: dict[str, list[str]] = {}

    def chain(module: str) -> list[str]:
        if module not in chains:
            chains[module] = [module, *max((chain(found) for found in graph[module]), key=len, default=[])]
        return chains[module]

    return max((chain(module) for module in graph), key=len)


def test_the_rules_see_what_breaks_them() -> None:
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None
    assert longest_chain({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == ["a", "b", "c"]
    assert "expo.errors" in imports("expo.options") or "expo.errors" in imports("expo.cli")


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_short(module: str) -> None:
    lines = len(MODULES[module].read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES or module in LARGE, f"{module} has {lines} lines"


def functions(tree: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Yield every function and method with its dotted name."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{prefix}.{node.name}", node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from functions(node, f"{prefix}.{node.name}")


FUNCTIONS = {name: node for module, tree in TREES.items() for name, node in functions(tree, module)}


def test_functions_are_short_and_have_few_parameters() -> None:
    large = []
    for name, node in FUNCTIONS.items():
        lines = node.end_lineno - node.lineno + 1 if node.end_lineno else 0
        arguments = node.args
        names = [each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        count = len([each for each in names if each not in ("self", "cls")])
        is_kernel = any("triton.jit" in ast.unparse(each) for each in node.decorator_list)  # its parameters are a GPU's
        count = 0 if is_kernel else count
        if (lines > MOST_FUNCTION_LINES or count > MOST_PARAMETERS) and name not in LARGE:
            large.append(f"{name}: {lines} lines, {count} parameters")
    assert large == []


def test_every_exception_is_needed_and_has_a_reason() -> None:
    for name, reason in LARGE.items():
        assert name in FUNCTIONS or name in MODULES, f"{name} is not there any more"
        assert len(reason.split()) > 4


def rows(heading: str) -> list[list[str]]:
    """Return the cells of the table below a heading of the page on architecture."""
    section = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2]
    lines = [line for line in section.partition("\n## ")[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_page_on_architecture_lists_the_packages_in_this_order() -> None:
    assert [tuple(re.findall(r"`(\w+)`", row[0])) for row in rows("Packages")] == list(PACKAGES)


@pytest.mark.parametrize("row", rows("Sizes"), ids=lambda row: row[0])
def test_the_page_on_architecture_has_the_sizes_of_the_code(row: list[str]) -> None:
    module, _, name = row[0].strip("`").rpartition(".")
    number, _, unit = row[1].partition(" ")
    assert getattr(import_module(module), name) == int(number) * {"": 1, "KiB": 1 << 10, "MiB": 1 << 20}[unit]
