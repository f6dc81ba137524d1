"""How the code hangs together: imports flow one way, and functions stay short."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from minigpt import errors

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "minigpt"
FILES = sorted(PACKAGE.rglob("*.py"))
STAGE_FILES = ("pretrain", "sft", "dpo", "kto", "lora", "reward")
# A module may import these parts of the package, besides itself, and those that all may.
COMMON = {"__version__", "errors", "files", "machine", "page", "progress", "lightning_internals"}
COMMON |= {"reading", "terminal"}
ALLOWED = {
    "data": set(),
    "accel": {"data"},
    "model": {"data", "accel"},
    "infer": {"data", "model"},
    "stages": {"data", "model", "infer", "accel", "evaluate"},
    "runs": {"data", "model", "accel", "stages"},
    "datatools": {"data", "evaluate"},
    "evaluate": {"data", "model", "infer"},
    "export": {"data", "model", "infer"},
    "report": {"data", "evaluate"},
    "serve": {"data", "infer"},
    "cli": {"data", "model", "infer", "stages", "runs"}
    | {"datatools", "evaluate", "export", "report", "serve"},
    "errors": set(),
    "files": set(),
    "machine": set(),
    "lightning_internals": set(),
    "page": set(),
    "progress": {"data"},
    "reading": set(),
    "terminal": set(),
    "__main__": {"cli"},
}


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield the modules that a file imports, those inside functions as well."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(file: Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def functions(files: list[Path]) -> Iterator[ast.FunctionDef]:
    for file in files:
        yield from (n for n in ast.walk(parsed(file)) if isinstance(n, ast.FunctionDef))


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_flow_one_way(file: Path) -> None:
    internal = (name.split(".") for name in imports(parsed(file)) if name.startswith("minigpt."))
    part = part_of(file)
    wrong = {name[1] for name in internal} - ALLOWED.get(part, set()) - COMMON - {part}
    assert not wrong, f"{part} must not import {wrong}"


def test_speed_has_one_door() -> None:
    """What lies behind `minigpt.accel` can be deleted: nothing else imports it."""
    inside = {f"minigpt.accel.{file.stem}" for file in (PACKAGE / "accel").glob("*.py")}
    for file in FILES:
        assert part_of(file) == "accel" or not inside & set(imports(parsed(file))), file


def test_losses_import_only_torch() -> None:
    for name in ("losses", "policy_losses"):
        names = set(imports(parsed(PACKAGE / "model" / f"{name}.py")))
        names -= {"minigpt.model.losses", "minigpt.model.losses.sum_by"}
        outside = {module.split(".")[0] for module in names}
        assert outside - sys.stdlib_module_names == {"torch"}, name


def test_reading_rows_needs_no_libraries() -> None:
    for name in ("data/formats", "data/order", "evaluate/exam"):
        outside = {n.split(".")[0] for n in imports(parsed(PACKAGE / f"{name}.py"))}
        assert outside - sys.stdlib_module_names <= {"minigpt", "numpy", "_typeshed"}, name


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from minigpt.__main__ import main; code = main(['--help']);"
        "heavy = {'torch', 'transformers', 'lightning', 'numpy'} & set(sys.modules);"
        "sys.exit(f'{heavy}' if heavy else code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "minigpt fit --config configs/pretrain.yaml" in done.stdout


def test_stages_are_short() -> None:
    for stage in STAGE_FILES:
        text = (PACKAGE / "stages" / f"{stage}.py").read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 150, stage


def test_functions_are_short() -> None:
    spans = [node.end_lineno - node.lineno + 1 for node in functions(FILES) if node.end_lineno]
    assert statistics.median(spans) <= 12
    assert statistics.quantiles(spans, n=10)[-1] <= 40


def public(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Yield what users can reach by names without an underscore."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body)


def test_public_things_are_documented() -> None:
    assert all(ast.get_docstring(parsed(file)) for file in FILES)
    things = [node for file in FILES for node in public(parsed(file).body)]
    bare = [node.name for node in things if not ast.get_docstring(node)]
    assert len(bare) <= 0.05 * len(things), bare


def test_functions_are_typed() -> None:
    bare = [
        f"{node.name}:{argument.arg}"
        for node in functions(FILES)
        for argument in [*node.args.args, *node.args.kwonlyargs]
        if argument.annotation is None and argument.arg not in ("self", "cls")
    ]
    bare += [node.name for node in functions(FILES) if node.returns is None]
    assert set(bare) <= {"__init__", "__post_init__"}


def test_errors_are_those_of_the_drawing() -> None:
    drawing = str(errors.__doc__).partition("    MiniGPTError\n")[2]
    drawn = {"MiniGPTError": "Exception"}
    above = ["MiniGPTError"]
    for line in drawing.splitlines():
        if not line.strip():
            break
        depth = line.index("─") // 4
        name = line.partition("── ")[2].split()[0]
        above[depth:] = [name]
        drawn[name] = above[depth - 1]
    classes = {
        name: thing.__bases__[0].__name__
        for name, thing in vars(errors).items()
        if isinstance(thing, type) and issubclass(thing, Exception)
    }
    assert classes == drawn
    codes = {name: getattr(errors, name).exit_code for name in classes}
    assert {name: code for name, code in codes.items() if code != 2} == {"ProcessLost": 1}


def test_no_file_names_a_place_outside_the_repository() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    home = re.compile(r"(?<![\w.$}])/(home|Users|root|work)/")
    found = []
    for name in listed.stdout.splitlines():
        file = ROOT / name
        if file.is_file() and b"\0" not in (content := file.read_bytes()):
            lines = content.decode().splitlines()
            found += [f"{name}: {line:.80}" for line in lines if home.search(line)]
    assert found == []


def test_files_of_tests_have_names_of_their_own() -> None:
    """Pytest imports them by these, without their folders."""
    names = [file.name for file in (PACKAGE.parent / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))
