"""The house: imports in one direction, a light import, public names, modules and functions of a readable size, words."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import torch_singlim

PACKAGE = Path(torch_singlim.__file__).parent
ROOT = PACKAGE.parent
# demo -> callbacks -> report -> measure -> theory -> noise, geometry -> network -> linalg
ROOMS = {"linalg": set()}
ROOMS["network"] = {"linalg"}
ROOMS["geometry"] = ROOMS["noise"] = {"network", *ROOMS["network"]}
ROOMS["theory"] = {"geometry", "noise", *ROOMS["geometry"]}
ROOMS["measure"] = {"theory", *ROOMS["theory"]}
ROOMS["report"] = {"measure", *ROOMS["measure"]}
ROOMS["callbacks"] = {"report", *ROOMS["report"]}
ROOMS["demo"] = {"callbacks", *ROOMS["callbacks"]}
ROOMS["__main__"] = ROOMS["__init__"] = {"demo", *ROOMS["demo"]}
HEAVY = {"lightning": {"callbacks", "demo"}, "matplotlib": {"report"}}
MODULES = sorted(PACKAGE.rglob("*.py"))

# words that the project replaced, in names, messages and pages; the CHANGELOG may explain
REPLACED = re.compile(
    r"loss[_ ]gap|foot[_ ]?point|\bprob(?:e|es|ed|ing)\b|probe_|_probe|settled|separated|null_cosine|null control|carried|"
    r"not_covered|withdrawn|left[_ ]out|of_first|\bpull(?:s|ed)?\b",
    re.IGNORECASE,
)
PAGES = [
    *MODULES,
    *PACKAGE.rglob("*.jinja"),
    *(ROOT / "recipes").rglob("*.py"),
    *(ROOT / "notebooks").glob("*.ipynb"),
    *(ROOT / "docs").rglob("*.md"),
    ROOT / "README.md",
]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_imports_point_one_way():
    for path in MODULES:
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "torch_singlim":
                target = parts[1] if len(parts) > 1 else "__init__"
                assert target == room or target in ROOMS[room], f"{path} imports {name}"
            if parts[0] in HEAVY:
                assert room in HEAVY[parts[0]], f"{path} imports {name}"


def test_recipes_import_public_names_alone():
    for path in (ROOT / "recipes").rglob("*.py"):
        assert not [name for name in imports(path) if name.startswith("torch_singlim.")], path


def test_import_alone_is_light():
    code = "import sys, torch_singlim; print({'lightning', 'matplotlib', 'pytorch_lightning'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_public_names_exist():
    for name in torch_singlim.__all__:
        assert getattr(torch_singlim, name) is not None
        assert getattr(torch_singlim, name).__doc__


def body_lines(node):
    body = node.body[1:] if ast.get_docstring(node) else node.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_sizes(path):
    """No module above 420 lines, no function body above 60 (without docstring), no class with more than 30 attributes."""
    text = path.read_text()
    assert len(text.splitlines()) <= 420
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert body_lines(node) <= 60, f"{node.name} has {body_lines(node)} lines"
        if isinstance(node, ast.ClassDef):
            stores = [each for each in ast.walk(node) if isinstance(each, ast.Attribute)]
            own = {
                each.attr
                for each in stores
                if isinstance(each.ctx, ast.Store) and isinstance(each.value, ast.Name) and each.value.id == "self"
            }
            assert len(own) <= 30, f"{node.name} sets {len(own)} attributes"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_one_term_for_one_thing(path):
    lines = path.read_text().splitlines()
    # pictures in notebooks are no words
    found = [(i + 1, REPLACED.search(line).group()) for i, line in enumerate(lines) if REPLACED.search(line[:2000])]
    assert not found
