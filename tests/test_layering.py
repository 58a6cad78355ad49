"""The house rule, read off the imports with ``ast``: a file imports only from the layers below its own."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

# From the ground up; the modules of one row never import one another. Every module has its row.
LAYERS = [
    ["ffn.files", "ffn.packing", "ffn.gpt", "ffn.text", "ffn.interop.swap", "ffn.train"],
    [
        "ffn.activations",
        "ffn.files.dataclass_toml",
        "ffn.files.atomic",
        "ffn.text_table",
        "ffn.version",
        "ffn.train.device",
        "ffn.ops.library",
    ],
    ["ffn.ops.dropout_mask"],
    ["ffn.ops.kernels", "ffn.ops.kernels.language", "ffn.ops.kernels.tilings"],
    [f"ffn.ops.kernels.{name}" for name in ("act", "dact", "linear_act", "linear_dact", "decode")],
    ["ffn.ops.reference", "ffn.ops.eager", "ffn.ops.kernels.backend"],
    ["ffn.ops.compiled"],
    ["ffn.ops.dispatch"],
    ["ffn.ops.dropout"],
    ["ffn.ops.arguments"],
    ["ffn.ops.feed_forward", "ffn.packing.float_copies", "ffn.ops.attention", "ffn.ops.lora"],
    ["ffn.packing.int8_copies"],
    ["ffn.ops"],
    ["ffn.nn.init", "ffn.nn.rotary", "ffn.nn.plain"],
    ["ffn.nn.lora"],
    ["ffn.nn.embedding", "ffn.nn.norm", "ffn.nn.attention", "ffn.nn.feed_forward", "ffn.nn.loss"],
    ["ffn.nn.block", "ffn.nn.head", "ffn.nn.classifier"],
    ["ffn.packing.forwards"],
    ["ffn.nn"],
    ["ffn.gpt.config"],
    [
        "ffn.gpt.transformer",
        "ffn.packing.pack",
        "ffn.text.tokenizer",
        "ffn.classify.metrics",
        "ffn.classify.table_files",
    ],
    ["ffn.interop.swap.plain_modules", "ffn.files.strict_json"],
    ["ffn.interop.swap.statements", "ffn.interop.swap.syntax", "ffn.interop.swap.standin"],
    ["ffn.interop.swap.source"],
    ["ffn.files.shards"],
    ["ffn.interop.swap.probe"],
    ["ffn.interop.swap.reroute"],
    ["ffn.interop.swap.proof", "ffn.interop.swap.report"],
    ["ffn.interop.swap.discover"],
    ["ffn.interop.swap.in_place"],
    ["ffn.interop.timm", "ffn.interop.hf.mlp", "ffn.interop.hf.register"],
    ["ffn.interop.hf.keys", "ffn.interop.hf.names"],
    ["ffn.interop.hf.family", "ffn.interop.hf.rope"],
    ["ffn.interop.hf.decoders", "ffn.interop.hf.encoders"],
    ["ffn.interop.hf.config", "ffn.interop.hf.tables"],
    ["ffn.interop.hf.folder"],
    ["ffn.interop.hf.classifier"],
    ["ffn.interop", "ffn.interop.hf"],
    ["ffn.train.optim", "ffn.gpt.freeze", "ffn.gpt.cost", "ffn.train.report"],
    ["ffn.gpt.adapters"],
    ["ffn.text.corpus", "ffn.classify.labelled", "ffn.text.windows", "ffn.disk", "ffn.gpt.generate"],
    ["ffn.train.base", "ffn.train.interrupts"],
    ["ffn.train.steps", "ffn.train.config"],
    ["ffn.train.start"],
    ["ffn.train.loop", "ffn.classify.vocabulary", "ffn.classify.objective"],
    ["ffn.classify.batches", "ffn.classify.recipe"],
    ["ffn.classify.loop"],
    ["ffn.classify.parts", "ffn.classify.report", "ffn.classify.result"],
    ["ffn.classify.train"],
    ["ffn.classify.commands"],
    ["ffn.classify"],
    ["ffn.cli"],
    ["ffn.__main__", "ffn"],
]
UPWARD = {("ffn.gpt.transformer", "ffn.disk")}  # Transformer.save, which imports when it is called
RANK = {module: rank for rank, row in enumerate(LAYERS) for module in row}


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


def test_the_layers_name_every_module_and_no_other() -> None:
    assert set(RANK) == set(FILES)


@pytest.mark.parametrize("module", FILES)
def test_a_file_imports_only_from_below(module: str) -> None:
    wrong = []
    for line, target, name in all_imports(module):
        if target.split(".")[0] != "ffn":
            continue
        submodule = f"{target}.{name}"
        target = submodule if submodule in FILES else target
        if RANK[target] >= RANK[module] and (module, target) not in UPWARD:
            wrong.append(f"{FILES[module].relative_to(ROOT)}:{line} imports {target}, which is not below it")
    assert not wrong


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
