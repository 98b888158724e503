"""The house: rooms import from lower floors only, and frameworks in their own files only."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import atoll

SOURCE = Path(atoll.__file__).parent
FLOORS = [
    {"errors"},
    {"core", "view/figure"},
    {"view/html", "view/population"},
    {"data", "aggregation"},
    {"learners"},
    {"algorithms", "view/plots"},
    {"rounds"},
    {"tracking"},
    {"view"},
    {"backends", "protocol"},
    {"simulation", "service", "site"},
    {"federation"},
    {"flower"},
    {"cli", "testing"},
    {"__init__", "__main__"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
#: framework: the files that may import it; a folder stands for all of its files.
FRAMEWORKS = {
    "torch": {"learners/torch/", "learners/keras/on_torch.py", "learners/huggingface.py"},
    "jax": {"learners/jax/", "learners/keras/on_jax.py"},
    "flax": {"learners/jax/models.py"},
    "keras": {"learners/keras/"},
    "sklearn": {"learners/sklearn.py"},
    "matplotlib": {"view/figure.py", "view/population.py"},
    "flwr": {"flower/"},
    "cryptography": {"protocol/", "site/"},
    "sqlalchemy": {"service/"},
    "starlette": {"service/http/", "view/page/app.py"},
    "urllib3": {"site/"},
    "uvicorn": {"service/", "view/page/local.py"},
    "msgspec": {"protocol/messages.py"},
    "rich": {"tracking/progress.py", "cli/tables.py"},
}


def room(path: Path) -> str:
    """The room of a file: its own name where that has a floor, or its folder's."""
    name = str(path.relative_to(SOURCE)).removesuffix(".py")
    return name if name in FLOOR else name.partition("/")[0]


def imports(path: Path):
    """Names of modules a file imports at run time (not for type checking only)."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


FILES = sorted(SOURCE.rglob("*.py"))


def test_every_room_has_a_floor():
    assert {room(path) for path in FILES} == set(FLOOR)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_down(path):
    own = room(path)
    if own == "__init__":
        return  # the lobby shows every room, and opens it when it is asked for
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "atoll" and len(parts) > 1:
            inner = "/".join(parts[1:3])
            other = inner if inner in FLOOR else parts[1]
            if other in FLOOR and other != own:
                assert FLOOR[other] < FLOOR[own], f"{own} imports {name}"


def module_of(path: Path) -> str:
    parts = ("atoll", *path.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The groups of modules that can be reached from each other (Tarjan, 1972)."""
    number, least, stack, found = {}, {}, [], []

    def visit(module):
        number[module] = least[module] = len(number)
        stack.append(module)
        for other in graph[module]:
            if other not in number:
                visit(other)
            if other in stack:
                least[module] = min(least[module], least[other])
        if least[module] == number[module]:
            at = stack.index(module)
            group = stack[at:]
            del stack[at:]
            if len(group) > 1:
                found.append(sorted(group))

    for module in graph:
        if module not in number:
            visit(module)
    return found


def test_circles_are_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"a"}}
    assert circles(graph) == [["b", "c"]]


def test_no_module_imports_itself_by_way_of_others():
    modules = {module_of(path): path for path in FILES if path.name != "__init__.py"}
    graph = {}
    for module, path in modules.items():
        named = {name if name in modules else name.rpartition(".")[0] for name in imports(path)}
        graph[module] = (named & modules.keys()) - {module}
    assert circles(graph) == []


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_frameworks_stay_in_their_files(framework):
    allowed = FRAMEWORKS[framework]
    folders = tuple(place for place in allowed if place.endswith("/"))
    found = {
        str(path.relative_to(SOURCE))
        for path in FILES
        if any(name.split(".")[0] == framework for name in imports(path))
    }
    assert {p for p in found if not p.startswith(folders or "-")} == allowed - set(folders)
    assert not folders or any(p.startswith(folders) for p in found)


def python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout


def test_import_atoll_loads_no_framework():
    loaded = python("import atoll, sys; print(*sys.modules)").split()
    for name in ("numpy", "torch", "sklearn", "matplotlib", "rich", "pandas", "jax"):
        assert name not in loaded


def test_the_numpy_learner_needs_numpy_alone():
    code = (
        "import sys; from atoll import Federation, algorithms, data, learners, schedules\n"
        "print(learners.NumpyLearner, data.synthetic, *sys.modules)"
    )
    loaded = python(code).split()
    for name in ("torch", "sklearn", "matplotlib", "rich", "pandas", "pyarrow", "jax"):
        assert name not in loaded


def test_help_is_instant_for_it_imports_nothing_that_is_slow():
    """Seconds depend on the machine; which packages are loaded does not."""
    code = (
        "import sys; from atoll.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: print(end.code, '--', *sys.modules)"
    )
    shown, _, loaded = python(code).rpartition("--")
    assert shown.split()[-1] == "0"
    for command in ("demo", "simulate", "runs", "serve", "join", "status", "restore"):
        assert re.search(rf"^ +{command} +\w", shown, re.MULTILINE), command
    packages = {name.partition(".")[0] for name in loaded.split()}
    standard = {"atoll", "__main__", *sys.stdlib_module_names}
    # What a virtual environment loads at its start is not the command's.
    started = {name.partition(".")[0] for name in python("import sys; print(*sys.modules)").split()}
    assert packages <= standard | started
    assert "asyncio" not in packages


def test_public_names_exist():
    for name in atoll.__all__:
        assert getattr(atoll, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = atoll.nothing
