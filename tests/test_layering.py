"""The house rule, read off the imports with ``ast``: data flows through the rooms one way, in no circle."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT

# The rooms in the order data flows: a room imports only from those before it, and from itself.
ROOMS = [
    "version", "activations", "text_table", "files", "ops", "nn", "packing", "gpt", "text", "interop", "disk",
    "train", "classify", "cli", "__main__",
]  # fmt: skip


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted((ROOT / "ffn").rglob("*.py"))}


def imports(node: ast.AST, module: str) -> Iterator[tuple[str, str | None]]:
    """(module, name taken from it) of one import statement, relative ones made absolute."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield alias.name, None
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
            anchor = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*anchor, *filter(None, [node.module])])
        for alias in node.names:
            yield base, alias.name


def all_imports(module: str) -> Iterator[tuple[int, str, str | None]]:
    """(line, module, name) of every import in the file, those inside functions too."""
    for node in ast.walk(ast.parse(FILES[module].read_text("utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((node.lineno, *found) for found in imports(node, module))


def run_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The statements that run when the file is imported: no function bodies, no ``if TYPE_CHECKING``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from (grandchild for other in child.orelse for grandchild in run_at_import(other))
            continue
        yield child
        yield from run_at_import(child)


def requirements(*extras: str) -> set[str]:
    """The import names of the core dependencies and of the extras that pyproject.toml declares."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    lines = [*project["dependencies"]]
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    return {re.split(r"[^\w-]", line)[0].replace("-", "_") for line in lines}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imported_modules(module: str) -> Iterator[tuple[int, str]]:
    """(line, module of ffn) of every import of this package in the file."""
    for line, target, name in all_imports(module):
        if target.split(".")[0] == "ffn":
            submodule = f"{target}.{name}"
            yield line, submodule if submodule in FILES else target


def test_the_rooms_are_the_tree() -> None:
    assert {room(module) for module in FILES} - {""} == set(ROOMS)


@pytest.mark.parametrize("module", FILES)
def test_a_room_imports_only_from_those_before_it(module: str) -> None:
    if module == "ffn":  # names what is public
        return
    allowed = ROOMS[: ROOMS.index(room(module)) + 1]
    wrong = [
        f"{FILES[module].relative_to(ROOT)}:{line} imports {target}, whose room comes later"
        for line, target in imported_modules(module)
        if room(target) not in allowed
    ]
    assert not wrong


def test_no_import_goes_in_a_circle() -> None:
    """Imports inside functions count too."""
    graph = {module: {target for _, target in imported_modules(module)} for module in FILES}
    assert list(TopologicalSorter(graph).static_order())  # raises CycleError where there is one


@pytest.mark.parametrize("module", FILES)
def test_triton_stays_in_the_kernels(module: str) -> None:
    if not module.startswith("ffn.ops.kernels"):
        assert "triton" not in {target.split(".")[0] for _, target, _ in all_imports(module)}


@pytest.mark.parametrize("module", FILES)
def test_optional_packages_are_imported_where_they_are_used(module: str) -> None:
    core = requirements() | {"ffn"} | set(sys.stdlib_module_names)
    if module.startswith("ffn.ops.kernels"):  # which dispatch imports where triton is
        core |= {"triton"}
    tree = ast.parse(FILES[module].read_text("utf-8"))
    at_import = {target.split(".")[0] for node in run_at_import(tree) for target, _ in imports(node, module)}
    assert at_import <= core, "at module level only the core dependencies"
    anywhere = {target.split(".")[0] for _, target, _ in all_imports(module)}
    assert anywhere <= core | requirements("app", "hf") | {"triton"}, "a package that no extra declares"
