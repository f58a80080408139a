"""Workdirs in stores for tests: `memory://`, which lives in this process, and `file://`."""

import json
import time
from pathlib import Path

import fsspec
import pytest
import runs

from gpt_jax import config
from gpt_jax.run import lease, mirror, mirror_folder, store

URL = "memory:///bucket/run"
ROOT = "/bucket/run"


@pytest.fixture
def quick(monkeypatch):
    """Waits of milliseconds, and an empty bucket before and after."""
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.01)
    monkeypatch.setattr(store, "WAITS", (0.01, 0.01))
    empty()
    yield
    empty()


def empty() -> None:
    """Deletes all that lies in memory."""
    files = fsspec.filesystem("memory")
    for path in files.find("/"):
        files.rm_file(path)


def listed(below: str = "") -> list[str]:
    """The names of all files in the bucket's run, below a folder."""
    files = fsspec.filesystem("memory")
    return sorted(path.removeprefix(f"{ROOT}/") for path in files.find(f"{ROOT}/{below}"))


def read(name: str) -> bytes:
    return fsspec.filesystem("memory").cat_file(f"{ROOT}/{name}")


def write(name: str, content: bytes) -> None:
    fsspec.filesystem("memory").pipe_file(f"{ROOT}/{name}", content)


def sealed() -> list[int]:
    """The finished steps in the bucket's run."""
    names = [name.split("/") for name in listed("checkpoints")]
    return sorted(int(parts[1]) for parts in names if parts[2] == "manifest.json")


def flip(name: str) -> None:
    """Flips a bit in the middle of a file."""
    content = bytearray(read(name))
    content[len(content) // 2] ^= 1
    write(name, bytes(content))


def write_lease(token: str, age: float = 0.0) -> None:
    """A lease of somebody else, renewed so many seconds ago."""
    values = {"token": token, "host": "elsewhere", "process": 7, "time": time.time() - age}
    write("lease.json", json.dumps(values).encode())


def arguments(folder: Path, url: str, *overrides: str) -> list[str]:
    """The command line of a `train` into a URL: six steps, a checkpoint at every second."""
    return [
        text if not text.startswith("--workdir=") else f"--workdir={url}"
        for text in runs.arguments(
            folder,
            folder,
            "--config.train.steps=6",
            "--config.optim.schedule=constant",
            "--config.optim.warmup_steps=0",
            "--config.log.every_steps=1",
            "--config.log.tensorboard=false",
            "--config.eval.every_steps=2",
            "--config.eval.batches=1",
            "--config.checkpoint.every_steps=2",
            f"--config.checkpoint.mirror={folder / 'mirror'}",
            *overrides,
        )
    ]


def open_mirror(folder: Path, said: list[str], url: str = URL, **policy):
    """A mirror of a run that has not begun, below `folder`."""
    place = mirror_folder.make_folder(url, str(folder))
    return mirror.Mirror(url, place, config.Checkpoint(**policy), said.append)
