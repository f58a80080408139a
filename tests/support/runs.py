"""Runs for tests: a text, tiny configs, and the program in this process or in others."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import forks
import jax
import numpy as np

from gpt_jax import config as configs
from gpt_jax.cluster.launch_local import find_free_port
from gpt_jax.commands import config_file, main as commands
from gpt_jax.data.stream import dataset
from gpt_jax.data.stream.batches import make_eval_batches, make_stream
from gpt_jax.errors import Exit
from gpt_jax.evals import heldout
from gpt_jax.metrics.sums import divide_sums
from gpt_jax.metrics.writers import read_jsonl
from gpt_jax.run import loop, parts as run_parts, resume
from gpt_jax.sharding import rows
from gpt_jax.sharding.mesh import make_mesh
from gpt_jax.train import CHECKPOINT_FOLDER
from gpt_jax.train.checkpoint import checkpoints

ROOT = Path(__file__).resolve().parents[2]
TINY = str(ROOT / "configs/tiny.py")
HOST = socket.gethostname()
STARTED: list["Process"] = []
SECONDS = 240  # after which a process counts as stuck; idle machines need a tenth


def write_text(path: Path, words: int = 4000, documents: int = 1) -> Path:
    """Writes words from a lexicon of sixty, so that a tiny model learns something.

    Several documents are lines of .jsonl.
    """
    draw = random.Random(0)
    lexicon = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(60)]
    texts = [" ".join(draw.choices(lexicon, k=words // documents)) for _ in range(documents)]
    path.write_text(
        texts[0] if documents == 1 else "".join(json.dumps({"text": text}) + "\n" for text in texts)
    )
    return path


def arguments(folder: Path, workdir: Path, *overrides: str) -> list[str]:
    """The command line of `train` on the text in `folder`.

    The text is made if it is missing, and its tokens are cached there.
    """
    text = folder / "text.txt"
    if not text.exists():
        write_text(text)
    return [
        "train",
        f"--config={TINY}",
        f"--workdir={workdir}",
        f"--config.data.path={text}",
        f"--config.data.cache={folder / 'cache'}",
        "--config.log.progress=false",
        # Decoding is a third of what a tiny run costs.
        "--config.eval.samples=0",
        *overrides,
    ]


def load(folder: Path, *overrides: str) -> configs.Config:
    """The Config that `arguments` stands for."""
    flags = [
        text
        for text in arguments(folder, Path("unused"), *overrides)
        if text.startswith("--config.")
    ]
    return config_file.load_config(TINY, flags)


def build(config: configs.Config, data: int = 1, fsdp: int = 1, tensor: int = 1) -> run_parts.Parts:
    """The parts of a run on the first devices of this process."""
    loaded = dataset.load_dataset(config.data, lambda line: None)
    shape = {"data": data, "fsdp": fsdp, "tensor": tensor}
    mesh = make_mesh(shape, jax.devices()[: data * fsdp * tensor])
    return run_parts.build_on(config, mesh, loaded)


@contextmanager
def own_signals():
    """Gives this process its signal handlers back after a run has changed them."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run(parts: run_parts.Parts, workdir: Path | str, say=lambda line: None, profile=None):
    """Runs `parts` in this process."""
    with own_signals():
        return loop.run_training(parts, workdir, profile, say)


def losses(parts: run_parts.Parts, steps: int = 20) -> list[float]:
    """The training losses of the first steps, without evaluation, checkpoints and samples."""
    config, mesh, out = parts.config, parts.mesh, []
    size = config.train.batch_size
    stream = make_stream(parts.examples, size, rows.process_rows(mesh, size))
    with jax.set_mesh(mesh):
        state = parts.init()
        for _ in range(steps):
            state, sums = parts.train_step(state, rows.to_devices(mesh, next(stream), size))
            out.append(divide_sums(jax.device_get(sums))["loss"])
    stream.close()
    return out


def heldout_loss(parts: run_parts.Parts, workdir: Path) -> float:
    """The evaluation loss of the newest checkpoint in `workdir`, on the mesh of `parts`."""
    config, mesh, data = parts.config, parts.mesh, parts.data
    size = config.eval.batch_size
    batches = make_eval_batches(
        data.parts[0].eval,
        data.tokenizer,
        config.data,
        config.train.seq_len,
        size,
        rows.process_rows(mesh, size),
    )
    with jax.set_mesh(mesh):
        saved = checkpoints.open_checkpoints(
            workdir / CHECKPOINT_FOLDER, config.checkpoint, lambda line: None
        )
        state = resume.start_state(parts, saved, lambda line: None).state
        saved.close()
        return divide_sums(heldout.sum_heldout(parts.eval_step, state.params, batches, mesh, size))[
            "loss"
        ]


def curve(workdir: Path, key: str = "train/loss") -> dict[int, float]:
    """{step: value} of metrics.jsonl. Raises AssertionError if a step comes twice or late."""
    lines = [row for row in read_jsonl(workdir / "metrics.jsonl") if key in row]
    steps = [row["step"] for row in lines]
    assert steps == sorted(set(steps)), f"{key} is out of order in {workdir}: {steps}"
    return {row["step"]: row[key] for row in lines}


def restored(parts: run_parts.Parts, workdir: Path):
    """The TrainState of the newest checkpoint, as the run would start from it."""
    with jax.set_mesh(parts.mesh):
        saved = checkpoints.open_checkpoints(
            workdir / CHECKPOINT_FOLDER, parts.config.checkpoint, lambda line: None
        )
        state = resume.start_state(parts, saved, lambda line: None).state
        saved.close()
    return state


def by_path(tree) -> dict[str, np.ndarray]:
    """Every array of a tree by its path."""
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def final_state(parts: run_parts.Parts, workdir: Path) -> tuple[int, dict[str, np.ndarray]]:
    """(step, every array of the newest checkpoint by path), with those of the optimiser."""
    arrays = by_path(restored(parts, workdir))
    return int(arrays[".step"]), arrays


def differing(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> list[str]:
    """Paths of the arrays that are not the same to the bit."""
    assert a.keys() == b.keys()
    return [
        path
        for path in a
        if (a[path].dtype, a[path].tobytes()) != (b[path].dtype, b[path].tobytes())
    ]


# ---- the program ----


def call(*given: str) -> str:
    """Runs a command line in this process. Raises Exit as the program would end."""
    with own_signals():
        return commands.run([str(text) for text in given])


def refusal(*given: str) -> tuple[int, str]:
    """(exit code, message) of a command line that the program refuses."""
    try:
        call(*given)
    except Exit as end:
        return end.code, str(end)
    raise AssertionError(f"not refused: {' '.join(map(str, given))}")


class Process:
    """`python -m gpt_jax …` (or other Python) with its output in files, so that no pipe ever
    fills.

    It is a fork, or with `start=subprocess.Popen` an interpreter of its own.
    """

    def __init__(self, folder: Path, given, python=("-m", "gpt_jax"), start=forks.Popen):
        folder.mkdir(parents=True, exist_ok=True)
        number = len(list(folder.glob("*.out")))
        self.paths = folder / f"{number}.out", folder / f"{number}.err"
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        with open(self.paths[0], "wb") as out, open(self.paths[1], "wb") as err:
            self.popen = start(
                [sys.executable, *python, *map(str, given)],
                stdout=out,
                stderr=err,
                cwd=ROOT,
                env=env,
            )
        STARTED.append(self)

    @property
    def out(self) -> str:
        return self.paths[0].read_text()

    @property
    def err(self) -> str:
        return self.paths[1].read_text()

    def signal(self, number: int) -> None:
        self.popen.send_signal(number)

    def until(self, reached, what: str) -> None:
        """Waits for `reached()` while the process runs."""
        end = time.monotonic() + SECONDS
        while not reached():
            assert self.popen.poll() is None, (
                f"ended with {self.popen.returncode} before {what}:\n{self.err}"
            )
            assert time.monotonic() < end, f"no {what} within {SECONDS} s:\n{self.out}\n{self.err}"
            time.sleep(0.005)

    def end(self, code: int | None = None, seconds: float = SECONDS) -> int:
        """Waits for the end and returns the exit code, which must be `code` if that is given."""
        try:
            found = self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            raise AssertionError(
                f"still running after {seconds} s:\n{self.out}\n{self.err}"
            ) from None
        assert code is None or found == code, (
            f"exit code {found}, not {code}:\n{self.out}\n{self.err}"
        )
        return found

    def kill(self) -> None:
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGKILL)
        self.popen.wait()


def logged(workdir: Path, step: int):
    """Whether metrics.jsonl of a running process has got to `step`."""
    path = workdir / "metrics.jsonl"

    def reached() -> bool:
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        return bool(lines) and json.loads(lines[-1])["step"] >= step

    return reached


def job(
    folder: Path,
    processes: int,
    given,
    devices: int = 1,
    own=None,
    python=None,
    start=forks.Popen,
) -> list[Process]:
    """One job of several processes with `devices` fake devices each; `own`: further arguments of
    each, `python`: what each runs instead of the program, `start`: forks or new interpreters."""
    port = find_free_port()
    own, python = own or [[]] * processes, python or [("-m", "gpt_jax")] * processes
    return [
        Process(
            folder,
            [
                *given,
                f"--cpu_devices={devices}",
                f"--coordinator=127.0.0.1:{port}",
                f"--num_processes={processes}",
                f"--process_id={k}",
                *own[k],
            ],
            python[k],
            start,
        )
        for k in range(processes)
    ]


def kill_all() -> None:
    """Ends what a failed test left running."""
    while STARTED:
        STARTED.pop().kill()
