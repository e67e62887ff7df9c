"""The shape of the code: imports go one way, the light rooms stay light, nothing is too long."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

_ORDER = """
_version errors progress files geometry boxes scans labels datasets stacks models findings detector device
predict evaluation outputs report training export batch sample diagnosis doctor_samples doctor_decoding
doctor cli
"""
LAYERS = _ORDER.split()
"""Every room may import those before it."""

_LIGHT = """
errors progress files geometry boxes scans labels datasets findings evaluation outputs report sample
detector batch diagnosis doctor_samples doctor_decoding doctor
"""
WITHOUT_TORCH = _LIGHT.split()

LIBRARY = sorted((ROOT / "medvision").rglob("*.py"))
COMMANDS = sorted((ROOT / "cli").glob("*.py"))
SOURCES = LIBRARY + COMMANDS
MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 50
FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "yaml.load", "yaml.unsafe_load", "os.system"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def room_of(path: Path) -> str:
    if path.is_relative_to(ROOT / "cli"):
        return "cli"
    return path.relative_to(ROOT / "medvision").parts[0].removesuffix(".py")


def imported_modules(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_at_start(tree: ast.Module) -> Iterator[str]:
    """Yield what importing the module imports: not what functions or type checks do."""
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from imported_modules(node)


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def public(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    for node in tree.body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        yield node
        if isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, ast.FunctionDef) and not member.name.startswith("_"):
                    yield member


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count the lines that hold code of the body, without docstring and signature."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    lines = {
        line
        for statement in body
        for node in ast.walk(statement)
        if hasattr(node, "lineno")
        for line in (node.lineno, node.end_lineno)
    }
    return len(lines)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_go_one_way(path: Path) -> None:
    room = room_of(path)
    if room in ("__init__", "__main__"):
        return
    assert room in LAYERS, f"{room} has no place in LAYERS yet"
    for module in imported_modules(parse(path)):
        parts = module.split(".")
        if parts[0] == "medvision" and len(parts) > 1 and parts[1] in LAYERS:
            there = LAYERS.index(parts[1])
            assert there <= LAYERS.index(room), f"{room} must not import {module}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_are_absolute(path: Path) -> None:
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_light_rooms_do_not_name_torch(path: Path) -> None:
    if room_of(path) not in (*WITHOUT_TORCH, "cli"):
        return
    # The former asks torch for the GPU, the latter loads weights, each inside one function.
    allowed = {ROOT / "medvision" / "doctor.py", ROOT / "medvision" / "detector.py"}
    tree = parse(path)
    modules = imports_at_start(tree) if path in allowed else imported_modules(tree)
    assert not [module for module in modules if module.split(".")[0] in ("torch", "torchvision")]


def test_light_rooms_import_without_torch() -> None:
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in LIBRARY
        if room_of(path) in WITHOUT_TORCH
    ]
    modules += ["medvision.training.config", "medvision.cli.main"]
    lines = [f"import {module}" for module in modules]
    code = "\n".join(["import sys", *lines, "print('torch' in sys.modules)"])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_library_neither_prints_nor_exits(path: Path) -> None:
    if path.name == "__main__.py":
        return
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("print", "sys.exit", "exit", "quit"), f"line {node.lineno}"
    assert not any(module.split(".")[0] == "typer" for module in imported_modules(parse(path)))


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nothing_runs_code_from_data(path: Path) -> None:
    tree = parse(path)
    assert not FORBIDDEN_IMPORTS.intersection(m.split(".")[0] for m in imported_modules(tree))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in FORBIDDEN_CALLS, f"line {node.lineno}: {called}"
        assert not called.endswith(".extractall"), f"line {node.lineno}: {called}"
        if called == "torch.load":
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert given.get("weights_only") == "True", f"line {node.lineno}: it would unpickle"
        for word in node.keywords:
            unsafe = word.arg in ("allow_pickle", "shell") and ast.unparse(word.value) != "False"
            assert not unsafe, f"line {node.lineno}: {word.arg}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = len(text.splitlines())
    assert lines <= MAX_FILE_LINES
    long = {node.name: code_lines(node) for node in functions(ast.parse(text))}
    assert not {name: lines for name, lines in long.items() if lines > MAX_FUNCTION_LINES}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_public_names_are_documented_and_typed(path: Path) -> None:
    tree = parse(path)
    assert ast.get_docstring(tree), "the module has no docstring"
    for node in public(tree):
        assert ast.get_docstring(node), f"{node.name} has no docstring"
    for function in functions(tree):
        arguments = function.args
        named = arguments.posonlyargs + arguments.args + arguments.kwonlyargs
        named += [one for one in (arguments.vararg, arguments.kwarg) if one is not None]
        bare = [a.arg for a in named if a.annotation is None and a.arg not in ("self", "cls")]
        assert not bare, f"{function.name}: {bare} have no annotation"
        assert function.returns is not None, f"{function.name} has no return annotation"


def test_every_package_is_listed_for_the_wheel() -> None:
    from setuptools.config.setupcfg import read_configuration

    listed = set(read_configuration(str(ROOT / "setup.cfg"))["options"]["packages"])
    there = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in LIBRARY
        if path.name == "__init__.py"
    }
    assert there <= listed, f"setup.cfg leaves out {there - listed}"


def test_the_checks_can_fail() -> None:
    bad = ast.parse("from . import x\nimport pickle\ndef f(a):\n    return eval(a)\n")
    assert "pickle" in set(imported_modules(bad))
    assert any(isinstance(n, ast.ImportFrom) and n.level for n in ast.walk(bad))
    long = ast.parse("def f() -> None:\n" + "    x = 1\n" * 60)
    assert code_lines(next(functions(long))) == 60
