"""Imports go down the floors of the house, and nothing below the commands reads flags or the
environment.

The rules are one table; each of them is also shown a small house that breaks it.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = (
    {
        "errors",
        "config",
        "sharding",
        "placing",
        "metrics",
        "writers",
        "devices",
        "compiler",
        "stops",
        "meeting",
        "version",
    },
    {"model", "data"},
    {"train", "infer", "interop"},
    {"evals", "experiment", "progress", "loop", "report", "load", "scaling", "plan", "launch"},
    {"commands", "__main__"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Neighbours on a floor do not import each other, except these. errors and config are what
# everything stands on, errors first; the one loop uses its progress, the evaluators and the report;
# __main__ is the door of commands.
NEIGHBOURS = {
    (room, base)
    for room in FLOORS[0]
    for base in ("errors", "config")
    if room not in ("errors", base)
} | {
    ("experiment", "evals"),
    ("progress", "experiment"),
    ("loop", "progress"),
    ("loop", "experiment"),
    ("loop", "evals"),
    ("loop", "report"),
    ("plan", "experiment"),
    ("__main__", "commands"),
    ("placing", "sharding"),
}
APART = {
    ("train", "model"),
    ("train", "data"),
    ("data", "sharding"),
    ("data", "placing"),
}  # lower, and still not theirs to know
FOREIGN = {
    "ml_collections": {"commands"},
    "absl": {"commands"},
    "argparse": {"commands"},  # package -> rooms that may
    "jax": set(FLOOR) - {"errors", "config", "data"},
    "flax": {"model"},
    "optax": {"train"},
    "orbax": {"train"},
    "torch": set(),
}


def read_house() -> dict[str, str]:
    """Source text by module: {"config": …, "data.rows": …, "data": … for data/__init__.py}."""
    package, found = ROOT / "gpt_jax", {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    del found[""]  # gpt_jax/__init__.py has its own test
    return found


def imported(source: str) -> list[str]:
    """Every module that `source` may import, at the top and inside functions; `from a import b`
    gives a.b."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names += [f"{base}.{alias.name}" for alias in node.names]
    return names


def inner(house: dict, source: str) -> set[str]:
    """Modules of the house that `source` imports: the longest known beginning of each name."""
    found = set()
    for name in imported(source):
        parts = name.split(".")[1:] if name.startswith("gpt_jax.") else []
        known = [
            ".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in house
        ]
        found |= set(known[:1])
    return found


def room(module: str) -> str:
    return module.split(".")[0]


def wrong_floors(house: dict) -> list[str]:
    """Rooms on no floor, imports that go up or sideways, and relative imports."""
    found = [f"{module}: on no floor" for module in house if room(module) not in FLOOR]
    for module, source in house.items():
        found += [
            f"{module}: relative import {name}" for name in imported(source) if name.startswith(".")
        ]
        for other in inner(house, source):
            pair = here, there = room(module), room(other)
            down = FLOOR.get(there, 9) < FLOOR.get(here, -1)
            if here != there and (pair in APART or not (down or pair in NEIGHBOURS)):
                found.append(f"{module} imports {other}")
    return found


def cycles(house: dict) -> list[str]:
    """Modules that import themselves by some way round."""
    graph = {module: inner(house, source) for module, source in house.items()}

    def reach(start):
        seen, todo = set(), list(graph[start])
        while todo:
            module = todo.pop()
            if module not in seen:
                seen.add(module)
                todo += graph[module]
        return seen

    return [module for module in graph if module in reach(module)]


def foreigners(house: dict) -> list[str]:
    """Packages imported where they have no business."""
    return [
        f"{module} imports {name}"
        for module, source in house.items()
        for name in imported(source)
        if room(module) not in FOREIGN.get(name.split(".")[0], {room(module)})
    ]


def environment(house: dict) -> list[str]:
    """Reads of the environment below the commands."""
    words = {"environ", "environb", "getenv", "getenvb"}

    def reads(source):
        named = {
            getattr(node, "attr", getattr(node, "id", None)) for node in ast.walk(ast.parse(source))
        }
        return words & (named | {name.rpartition(".")[2] for name in imported(source)})

    return [
        module for module, source in house.items() if room(module) != "commands" and reads(source)
    ]


@pytest.mark.parametrize("rule", [wrong_floors, cycles, foreigners, environment])
def test_house(rule):
    assert rule(read_house()) == []


@pytest.mark.parametrize(
    "rule, house, wanted",
    [
        (wrong_floors, {"attic": ""}, ["attic: on no floor"]),
        (
            wrong_floors,
            {"model.layers": "def f():\n    from gpt_jax.train.loss import x", "train.loss": ""},
            ["model.layers imports train.loss"],
        ),
        (wrong_floors, {"model": "from gpt_jax import data", "data": ""}, ["model imports data"]),
        (
            wrong_floors,
            {
                "data.a": "import gpt_jax.data.b",
                "data.b": "from gpt_jax import errors",
                "errors": "",
            },
            [],
        ),
        (
            wrong_floors,
            {"errors": "from gpt_jax import config", "config": ""},
            ["errors imports config"],
        ),
        (
            wrong_floors,
            {
                "metrics": "from gpt_jax import config",
                "config": "import gpt_jax.errors",
                "errors": "",
            },
            [],
        ),
        (
            wrong_floors,
            {"metrics": "from gpt_jax import sharding", "sharding": ""},
            ["metrics imports sharding"],
        ),
        (
            wrong_floors,
            {"train.step": "from gpt_jax.model import layers", "model.layers": ""},
            ["train.step imports model.layers"],
        ),
        (
            wrong_floors,
            {"data.a": "from . import b", "data.b": ""},
            ["data.a: relative import ..b"],
        ),
        (
            cycles,
            {
                "data.a": "from gpt_jax.data import b",
                "data.b": "from gpt_jax.data.c import x",
                "data.c": "def f():\n    import gpt_jax.data.a",
                "config": "",
            },
            ["data.a", "data.b", "data.c"],
        ),
        (
            foreigners,
            {
                "config": "from ml_collections import ConfigDict",
                "commands.flags": "import ml_collections",
            },
            ["config imports ml_collections.ConfigDict"],
        ),
        (
            foreigners,
            {"data.rows": "import jax.numpy as jnp", "model.a": "import jax"},
            ["data.rows imports jax.numpy"],
        ),
        (
            environment,
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


def test_package_starts_empty():
    """Importing one room must not import the others."""
    assert imported((ROOT / "gpt_jax/__init__.py").read_text()) == []


def test_configs_are_pure_data():
    """Config files import ml_collections and each other (and the plain arithmetic of the
    standard library)."""
    files = list((ROOT / "configs").glob("*.py"))
    neighbours = {path.stem for path in files}
    assert files
    for path in files:
        packages = {name.split(".")[0] for name in imported(path.read_text())}
        assert packages <= {"ml_collections", "configs", "math", "dataclasses", *neighbours}, (
            path.name
        )
