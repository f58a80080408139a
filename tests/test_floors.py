"""The house keeps its shape: imports go down the floors, and rooms are entered by their faces.

The rules are one table. Each rule is also shown a small house that breaks it.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = (
    {"errors", "files", "schema", "config"},
    {"sharding", "hardware", "cluster", "metrics"},
    {"data", "model", "train"},
    {"infer", "evals", "interop"},
    {"run", "plan", "card"},
    {"commands", "__main__"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
SINGLE_FILES = {"errors", "files", "schema"}  # rooms of one file, which is its own face

# A room imports no neighbour on its floor, except these.
NEIGHBOURS = {
    ("config", "errors"),
    ("config", "files"),
    ("sharding", "hardware"),
    ("evals", "infer"),
    ("plan", "run"),
    ("card", "run"),
    ("card", "plan"),
    ("__main__", "commands"),
}
# What a room must not know although it lies below.
UNKNOWN = {("data", "sharding"), ("data", "cluster")}
# package -> rooms that may import it
FOREIGN = {
    "ml_collections": {"commands"},
    "absl": {"commands"},
    "argparse": {"commands", "cluster"},
    "jax": set(FLOOR) - {"errors", "files", "schema", "config", "data"},
    "flax": {"model"},
    "optax": {"train"},
    "orbax": {"train"},
    "torch": {"card"},
}


def read_house() -> dict[str, str]:
    """Source text by module: {"config": …, "data.stream.rows": …, "data": …}.

    The text of a package is that of its `__init__.py`, and of the stub that lists its face.
    """
    package = ROOT / "gpt_jax"
    house = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        house[name] = path.read_text()
    del house[""]  # gpt_jax/__init__.py has its own test
    return house


def read_faces() -> dict[str, set[str]]:
    """The names that each room offers, by its stub `__init__.pyi`."""
    faces = {}
    for path in sorted((ROOT / "gpt_jax").glob("*/__init__.pyi")):
        tree = ast.parse(path.read_text())
        imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
        faces[path.parent.name] = {alias.name for node in imports for alias in node.names}
    return faces


def imported(source: str) -> list[str]:
    """Every module that `source` may import, at the top and inside functions.

    `from a import b` gives a.b.
    """
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names += [f"{base}.{alias.name}" for alias in node.names]
    return names


def imported_modules(house: dict, source: str) -> set[str]:
    """Modules of the house that `source` imports: the longest known beginning of each name."""
    modules = set()
    for name in imported(source):
        parts = name.split(".")[1:] if name.startswith("gpt_jax.") else []
        prefixes = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
        known = [prefix for prefix in prefixes if prefix in house]
        modules |= set(known[:1])
    return modules


def room(module: str) -> str:
    return module.split(".")[0]


def find_wrong_floors(house: dict) -> list[str]:
    """Rooms on no floor, imports that go up or sideways, and relative imports."""
    faults = [f"{module}: on no floor" for module in house if room(module) not in FLOOR]
    for module, source in house.items():
        relative = [name for name in imported(source) if name.startswith(".")]
        faults += [f"{module}: relative import {name}" for name in relative]
        for other in imported_modules(house, source):
            here = room(module)
            there = room(other)
            is_down = FLOOR.get(there, 9) < FLOOR.get(here, -1)
            is_allowed = is_down or (here, there) in NEIGHBOURS
            if here != there and ((here, there) in UNKNOWN or not is_allowed):
                faults.append(f"{module} imports {other}")
    return faults


def find_cellar_imports(house: dict) -> list[str]:
    """Imports of another room that do not go through its face."""
    faults = []
    for module, source in house.items():
        for other in sorted(imported_modules(house, source)):
            is_own = room(other) == room(module) or room(other) == "commands"
            if not is_own and other not in SINGLE_FILES and "." in other:
                faults.append(f"{module} imports {other}")
    return faults


def find_cycles(house: dict) -> list[str]:
    """Modules that import themselves through others."""
    graph = {module: imported_modules(house, source) for module, source in house.items()}

    def reach(start):
        seen = set()
        todo = list(graph[start])
        while todo:
            module = todo.pop()
            if module not in seen:
                seen.add(module)
                todo += graph[module]
        return seen

    return [module for module in graph if module in reach(module)]


def find_foreigners(house: dict) -> list[str]:
    """Packages that are imported where only other rooms may import them."""
    return [
        f"{module} imports {name}"
        for module, source in house.items()
        for name in imported(source)
        if room(module) not in FOREIGN.get(name.split(".")[0], {room(module)})
    ]


def find_environment_reads(house: dict) -> list[str]:
    """Reads of the environment below the commands."""
    words = {"environ", "environb", "getenv", "getenvb"}

    def reads(source):
        named = {getattr(node, "attr", None) for node in ast.walk(ast.parse(source))}
        return words & (named | {name.rpartition(".")[2] for name in imported(source)})

    return [m for m, source in house.items() if room(m) != "commands" and reads(source)]


RULES = [
    find_wrong_floors,
    find_cellar_imports,
    find_cycles,
    find_foreigners,
    find_environment_reads,
]


@pytest.mark.parametrize("rule", RULES)
def test_house(rule):
    assert rule(read_house()) == []


@pytest.mark.parametrize(
    "rule, house, wanted",
    [
        (find_wrong_floors, {"attic": ""}, ["attic: on no floor"]),
        (
            find_wrong_floors,
            {"model.a": "def f():\n    from gpt_jax.train.b import x", "train.b": ""},
            ["model.a imports train.b"],
        ),
        (
            find_wrong_floors,
            {"model": "from gpt_jax import data", "data": ""},
            ["model imports data"],
        ),
        (
            find_wrong_floors,
            {"data.a": "import gpt_jax.data.b", "data.b": "from gpt_jax import errors"},
            [],
        ),
        (
            find_wrong_floors,
            {"errors": "from gpt_jax import config", "config": ""},
            ["errors imports config"],
        ),
        (
            find_wrong_floors,
            {"data.a": "from gpt_jax import sharding", "sharding": ""},
            ["data.a imports sharding"],
        ),
        (find_wrong_floors, {"data.a": "from . import b"}, ["data.a: relative import ..b"]),
        (
            find_cellar_imports,
            {"run.a": "from gpt_jax.model.b import x", "model": "", "model.b": ""},
            ["run.a imports model.b"],
        ),
        (
            find_cellar_imports,
            {"run.a": "from gpt_jax.model import x", "model": "", "model.x": ""},
            ["run.a imports model.x"],
        ),
        (
            find_cellar_imports,
            {
                "run.a": "from gpt_jax.model import f\nimport gpt_jax.run.b",
                "model": "",
                "run.b": "",
            },
            [],
        ),
        (
            find_cycles,
            {
                "data.a": "from gpt_jax.data import b",
                "data.b": "from gpt_jax.data.c import x",
                "data.c": "def f():\n    import gpt_jax.data.a",
                "config": "",
            },
            ["data.a", "data.b", "data.c"],
        ),
        (
            find_foreigners,
            {
                "config": "from ml_collections import ConfigDict",
                "commands.flags": "import ml_collections",
            },
            ["config imports ml_collections.ConfigDict"],
        ),
        (
            find_foreigners,
            {"data.a": "import jax.numpy as jnp", "model.a": "import jax"},
            ["data.a imports jax.numpy"],
        ),
        (
            find_environment_reads,
            {
                "a": "import os\nx = os.environ['A']",
                "b": "from os import getenv",
                "c": "from os import environ as e",
                "d": "import os\nos.getenv('A')",
                "e": "environment = 1",
                "commands.x": "import os\nos.environ",
            },
            ["a", "b", "c", "d"],
        ),
    ],
)
def test_rules_can_fail(rule, house, wanted):
    assert rule(house) == wanted


def test_faces_are_used():
    """Every name of a face exists, and somebody outside the room, or a test, uses it."""
    words = {}
    for folder in ("gpt_jax", "tests", "benchmarks", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            words[path] = set(re.findall(r"\w+", path.read_text()))

    faces = read_faces()
    faces["config"] = set(__import__("gpt_jax.config", fromlist=["__all__"]).__all__)
    for name, face in faces.items():
        module = __import__(f"gpt_jax.{name}", fromlist=["__all__"])
        assert set(module.__all__) == face
        assert not [entry for entry in face if not hasattr(module, entry)]

        own = ROOT / "gpt_jax" / name
        outside = set().union(*(w for path, w in words.items() if not path.is_relative_to(own)))
        assert face <= outside, (name, face - outside)


@pytest.mark.parametrize("page", ["README.md", "AGENTS.md", "docs/architecture.md"])
def test_drawings_show_every_room(page):
    lines = (ROOT / page).read_text().splitlines()
    for floor, rooms in enumerate(FLOORS):
        drawn = next(line for line in lines if line.startswith(f"{floor} "))
        missing = rooms - {"__main__"} - set(re.findall(r"\w+", drawn))
        assert not missing, f"{page}, floor {floor}"


def test_package_starts_empty():
    """Importing one room must not import the others, nor JAX."""
    names = {"os", "jaxlib.version", "lazy_loader", "gpt_jax.hardware.xla_flags.add_xla_flags"}
    assert set(imported((ROOT / "gpt_jax/__init__.py").read_text())) == names


def test_configs_are_pure_data():
    """Config files import ml_collections, each other, and plain arithmetic."""
    files = list((ROOT / "configs").glob("*.py"))
    neighbours = {path.stem for path in files}
    assert files
    for path in files:
        packages = {name.split(".")[0] for name in imported(path.read_text())}
        allowed = {"ml_collections", "configs", "math", "dataclasses", *neighbours}
        assert packages <= allowed, path.name
