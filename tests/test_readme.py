"""The README is true: its tree exists, its code runs, its links and names resolve, CI runs its command."""

import pkgutil
import re
from pathlib import Path, PurePosixPath

import pytest

from tests.conftest import ROOT

README = ROOT / "README.md"
SILENT = {"__init__.py", "py.typed"}  # need no line in the tree
NAME = re.compile(r"[\w.-]+(/|\.\w+)")
WRITTEN = "ffn/ops/kernels/tilings.json"  # by `python -m benchmarks tune`


def fences(*languages: str) -> list[str]:
    """Return the fenced blocks in these languages, in order; "" is a fence without a language."""
    blocks: list[tuple[str, list[str]]] = []
    inside = False
    for line in README.read_text("utf-8").splitlines():
        if line.startswith("```"):
            inside = not inside
            if inside:
                blocks.append((line[3:].strip(), []))
        elif inside:
            blocks[-1][1].append(line)
    return ["\n".join(lines) for language, lines in blocks if language in languages]


def tree_paths(block: str) -> list[PurePosixPath]:
    """Return the paths of a drawn tree: names before two spaces or a #, nested by indentation."""
    paths = []
    parents: list[tuple[int, PurePosixPath]] = []
    for line in block.splitlines():
        body = line.lstrip(" │├└─")
        indent = len(line) - len(body)
        names = re.split(r"\s{2,}|\s#", body)[0].split()
        if not names or not all(NAME.fullmatch(name) for name in names):
            continue
        while parents and parents[-1][0] >= indent:
            parents.pop()
        folder = parents[-1][1] if parents else PurePosixPath()
        paths += [folder / name for name in names]
        if names[-1].endswith("/"):
            parents.append((indent, paths[-1]))
    return paths


def listing(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name != "__pycache__" and path.name[0] != "."}


def the_tree() -> list[PurePosixPath]:
    blocks = [block for block in fences("", "text") if re.match(r"(ffn/|\.$)", block, re.MULTILINE)]
    assert len(blocks) == 1, "the README draws one tree, in a fence that begins with ffn/"
    return tree_paths(blocks[0])


def test_every_path_of_the_tree_exists() -> None:
    paths = the_tree()
    assert [str(path) for path in paths if not (ROOT / path).exists()] == []
    assert len(set(paths)) == len(paths), "a path is listed twice"
    assert {"ffn", "benchmarks", "configs", "tests"} <= {path.parts[0] for path in paths}


def test_every_file_is_in_the_tree() -> None:
    paths = the_tree()
    opened = {path.parent for path in paths if len(path.parts) > 1}
    missing = []
    for folder in sorted(opened):
        listed = {path.name for path in paths if path.parent == folder}
        missing += [str(folder / name) for name in sorted(listing(ROOT / folder) - listed - SILENT)]
    assert missing == []


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each runs alone in an empty folder."""
    blocks = fences("python")
    assert blocks
    monkeypatch.chdir(tmp_path)
    for number, block in enumerate(blocks, start=1):
        exec(compile(block, f"README.md, python block {number}", "exec"), {"__name__": "readme"})


def test_links_point_to_files() -> None:
    for page in (README, ROOT / "docs" / "measured.md"):
        targets = re.findall(r"\]\(([^)#\s]+)", page.read_text("utf-8"))
        assert targets
        assert [t for t in targets if "://" not in t and not (page.parent / t).exists()] == []


def resolves(path: str) -> bool:
    try:
        pkgutil.resolve_name(path)
    except (ImportError, AttributeError):
        return False
    return True


def test_every_dotted_name_and_file_that_is_mentioned_exists() -> None:
    """Modules, classes, functions and attributes, in prose, docstrings, comments and code."""
    wrong = []
    name, path = (
        re.compile(r"(?<![\w./\"-])ffn(?:\.\w+)+"),
        re.compile(r"(?<![\w/.-])(?:ffn|tests)/[\w/-]+\.\w+"),
    )
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    for file in (*pages, *(ROOT / "ffn").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")):
        if file.name == "LOG.md":  # past experiments name past code
            continue
        text = file.read_text("utf-8")
        broken = [found for found in name.findall(text) if not resolves(found)]
        broken += [found for found in path.findall(text) if not (ROOT / found).exists() and found != WRITTEN]
        wrong += [f"{file.relative_to(ROOT)}: {found}" for found in broken]
    assert wrong == []


def test_readme_gives_the_two_commands_and_ci_runs_the_second() -> None:
    text = README.read_text("utf-8")
    assert "pip install -c constraints.txt '.[app]' && ffn train" in text
    assert "pip install -c constraints.txt '.[dev]' && pytest" in text
    assert "pip install -c constraints.txt '.[dev]' && pytest" in (ROOT / ".ci" / "run").read_text("utf-8")
