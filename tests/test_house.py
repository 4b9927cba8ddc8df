"""The house: imports in one direction, a light import, public names that exist."""

import ast
import subprocess
import sys
from pathlib import Path

import torch_singlim

PACKAGE = Path(torch_singlim.__file__).parent
# each room and the rooms that it may import
ROOMS = {
    "linalg": set(),
    "loss": set(),
    "functional": set(),
    "products": set(),
    "memory": set(),
    "team": set(),
    "gram": {"functional", "team"},
    "problem": {"linalg", "loss", "functional", "products", "gram", "memory", "team"},
    "geometry": {"linalg", "gram", "problem"},
    "theory": {"linalg", "loss", "functional", "gram", "problem", "geometry"},
    "agreement": {"linalg"},
    "observe": {"linalg", "gram", "problem", "geometry", "theory", "agreement"},
    "verdict": {"agreement", "observe"},
    "scaling": {"linalg"},
    "report": {"linalg", "observe", "scaling", "verdict"},
    "callbacks": {
        "linalg",
        "loss",
        "functional",
        "gram",
        "problem",
        "team",
        "geometry",
        "theory",
        "observe",
        "verdict",
        "report",
    },
    "__main__": {"callbacks", "report", "verdict"},
    "__init__": {"linalg", "problem", "geometry", "theory", "agreement", "callbacks"},
}
HEAVY = {"lightning": {"callbacks"}, "matplotlib": {"report"}}


def imports():
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                yield room, name, path


def test_imports_point_one_way():
    for room, name, path in imports():
        parts = name.split(".")
        if parts[0] == "torch_singlim":
            target = parts[1] if len(parts) > 1 else "__init__"
            assert target == room or target in ROOMS[room], f"{path} imports {name}"
        if parts[0] in HEAVY:
            assert room in HEAVY[parts[0]], f"{path} imports {name}"


def test_import_alone_is_light():
    code = "import sys, torch_singlim; print({'lightning', 'matplotlib', 'pytorch_lightning'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_public_names_exist():
    for name in torch_singlim.__all__:
        assert getattr(torch_singlim, name) is not None
        assert getattr(torch_singlim, name).__doc__
