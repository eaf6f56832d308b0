"""The rooms: data flows down the list, a room imports only from rooms above it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent / "normconv"
ROOMS = (
    "errors",
    "files",
    "report",
    "plan",
    "numerics",
    "layers",
    "graph",
    "targets",
    "surgery",
    "folding",
    "sources",
    "bridges",
    "proof",
    "auditing",
    "calibration",
    "privacy",
    "training",
    "deploy",
    "recheck",
    "api",
    "demo",
    "cli",
)
TORCHLESS = ("errors", "files", "report", "plan")
MAX_LINES = 380
FILES = sorted(ROOT.rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def room_of(path: Path) -> str:
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def imports_of(path: Path) -> list[tuple[str, bool]]:
    """Every imported module of a file, and whether only the type checker sees it."""
    found: list[tuple[str, bool]] = []

    def walk(node: ast.AST, typing_only: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                walk(child, True)
            for child in node.orelse:
                walk(child, typing_only)
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name, typing_only) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.append((inner if inner in MODULES else node.module or "", typing_only))
        for child in ast.iter_child_nodes(node):
            walk(child, typing_only)

    walk(ast.parse(path.read_text(encoding="utf-8")), False)
    return found


def test_every_file_is_in_a_room() -> None:
    strangers = {room_of(path) for path in FILES} - {*ROOMS, "__init__", "__main__"}
    assert strangers == set(), "a new room needs its place in the order"
    missing = [
        room for room in ROOMS if not (ROOT / room).is_dir() and not (ROOT / f"{room}.py").is_file()
    ]
    assert missing == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_room_imports_only_from_rooms_above(path: Path) -> None:
    room = room_of(path)
    if room in ("__init__", "__main__"):
        pytest.skip("the front door names every room")
    upward = []
    for module, typing_only in imports_of(path):
        parts = module.split(".")
        if parts[0] != "normconv" or len(parts) < 2 or typing_only:
            continue
        if parts[1] in ROOMS and ROOMS.index(parts[1]) > ROOMS.index(room):
            upward.append(module)
    assert upward == []


def test_no_cycle_between_modules() -> None:
    graph: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        graph[name] = set()
        for imported, typing_only in imports_of(path):
            if typing_only or name == "normconv":
                continue
            if imported in MODULES and imported != "normconv":
                graph[name].add(imported)
    # A package's own files import one another by full name; its __init__ imports them all.
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        for imported in graph[name]:
            visit(imported, (*path, name))
        done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_stay_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize("room", TORCHLESS)
def test_no_torch_where_none_is_promised(room: str) -> None:
    for path in FILES:
        if room_of(path) == room:
            heavy = {m.partition(".")[0] for m, typing_only in imports_of(path) if not typing_only}
            assert not heavy & {"torch", "numpy", "onnx", "torchvision", "timm"}, path


@pytest.mark.parametrize(
    "statement",
    [
        "import normconv; normconv.__version__; dir(normconv)",
        "import normconv.errors, normconv.files, normconv.report, normconv.plan",
        "import normconv; normconv.Plan, normconv.Recipe, normconv.Report, normconv.PlanError",
    ],
)
def test_light_imports_load_no_torch(statement: str) -> None:
    code = f"import sys\n{statement}\nassert not {{'torch', 'numpy', 'onnx'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent)


def test_a_serving_machine_needs_no_torch() -> None:
    """What checks a certificate loads no torch, nor anything that does, through every room it uses."""
    code = (
        "import sys\nfor name in ('torch', 'onnxscript', 'torchvision', 'timm', 'transformers'):\n"
        "    sys.modules[name] = None\n"  # so that importing it raises ImportError
        "import normconv.recheck, normconv.cli.app, normconv\n"
        "normconv.verify_certificate, normconv.recheck.checking"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent)


def test_proof_needs_no_sources() -> None:
    """The sources room is the outer world: a proof must not need files, specs or their packages."""
    code = (
        "import sys\nimport normconv.proof, normconv.folding\n"
        "assert 'normconv.sources' not in sys.modules\n"
        "assert not {'timm', 'torchvision', 'transformers', 'onnxruntime'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent)
