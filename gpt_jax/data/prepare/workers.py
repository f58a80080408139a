"""Where units of work run: in this process, in others of this machine, or on a Ray cluster.

An engine is a row of ENGINES. It calls `function(item, tick)` for every item, and yields (number of
the item, result) as they end, in any order. `tick(documents, bytes)` reports progress inside an
item; on Ray it arrives when the item ends. What a function raises is raised here, after the workers
have been ended. Items and results must be picklable, and few of them are in memory at once.
"""

import contextlib
import logging
import multiprocessing
import os
import re
import signal
import socket
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, NamedTuple

from gpt_jax.errors import Exit, PeerFailed, UsageError, install_command

Tick = Callable[[int, int], None]

# Ray may run a unit again where a machine went away, because it makes the same files.
RAY_RETRIES = 2
RAY_CONNECT_SECONDS = 10  # Ray itself would try for minutes


class Work(NamedTuple):
    """What an engine has to do."""

    function: Callable[[Any, Tick], Any]  # at the top level of a module
    items: Sequence
    workers: int  # at least 1
    tick: Tick
    describe: Callable[[Any], str]  # an item for people
    address: str = "local"  # of a Ray cluster


def _limit_threads(threads: int) -> None:
    """Sets how many threads the tokenizers library may use in this process.

    It must be called before the library makes its first one. It uses putenv and not os.environ,
    because only native code has to see the variables.
    """
    os.putenv("RAYON_NUM_THREADS", str(threads))
    os.putenv("TOKENIZERS_PARALLELISM", "true" if threads > 1 else "false")


def _attempt(function: Callable, item, tick: Tick) -> tuple[str, Any]:
    """("result", what the function gave) or ("error", an exception).

    A planned end is passed on as it was raised. Of a bug the traceback is passed on as text,
    because not every exception survives the way to another process.
    """
    try:
        return "result", function(item, tick)
    except (Exit, OSError, MemoryError) as error:
        return "error", error
    except Exception:
        return "error", RuntimeError(f"in a worker process:\n{traceback.format_exc()}")


def _unwrap(message: tuple[str, Any]) -> Any:
    kind, value = message
    if kind == "error":
        raise value
    return value


def run_in_process(work: Work) -> Iterator[tuple[int, Any]]:
    """Runs one item after the other, here. The tokenizers library may use all cores."""
    for number, item in enumerate(work.items):
        yield number, work.function(item, work.tick)


# ---- worker processes ----


def _follow_parent() -> None:
    """Ends this process when its parent has ended, because nobody would take its results."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    parent.join()
    os._exit(1)


def _serve(function: Callable, pipe: Connection, threads: int) -> None:
    """The life of a worker: an item comes in, ticks and a result go out, until the pipe closes."""
    # Ctrl-C reaches the whole group of processes, and a scheduler's signal may. The parent decides.
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()
    _limit_threads(threads)

    def tick(documents: int, size: int) -> None:
        pipe.send(("tick", (documents, size)))

    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            item = pipe.recv()
            pipe.send(_attempt(function, item, tick))


class Worker(NamedTuple):
    """A worker process, and this end of the pipe to it."""

    process: SpawnProcess
    pipe: Connection


def _start(work: Work, threads: int) -> Worker:
    # spawn, not fork: a fork copies the locks of threads that do not exist in the child.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(work.function, theirs, threads), daemon=True)
    process.start()
    theirs.close()  # so the end of the worker is the end of the pipe
    return Worker(process, ours)


def _end(workers: Sequence[Worker], force: bool) -> None:
    for worker in workers:
        worker.pipe.close()
        if force:
            worker.process.kill()
    for worker in workers:
        worker.process.join()


def _explain_loss(worker: Worker, what: str) -> PeerFailed:
    """The exception for a worker that ended in the middle of an item."""
    worker.process.join(5)
    code = worker.process.exitcode
    if code is not None and code < 0:
        reason = f"killed by signal {-code}"
    else:
        reason = f"gone with exit code {code}"
    return PeerFailed(
        f"a worker process was {reason} at {what}; what is finished stays: the same command goes "
        "on from there (with fewer --workers if memory ran out)"
    )


def _serve_all(work: Work, workers: Sequence[Worker]) -> Iterator[tuple[int, Any]]:
    """Gives every item to a worker that has nothing to do, and yields the results."""
    todo = list(enumerate(work.items))[::-1]
    idle = list(workers)
    busy = {}
    while todo or busy:
        while todo and idle:
            worker = idle.pop()
            number, item = todo.pop()
            busy[worker.pipe] = worker, number, item
            with contextlib.suppress(BrokenPipeError):  # the end of the pipe tells of a dead worker
                worker.pipe.send(item)

        for pipe in wait(list(busy)):
            worker, number, item = busy[pipe]
            try:
                message = worker.pipe.recv()
            except (EOFError, ConnectionResetError):
                raise _explain_loss(worker, work.describe(item)) from None
            if message[0] == "tick":
                work.tick(*message[1])
                continue
            del busy[pipe]
            idle.append(worker)
            yield number, _unwrap(message)


def run_locally(work: Work) -> Iterator[tuple[int, Any]]:
    """Runs items in worker processes, or in this one if there is one worker.

    Each process has one thread of the tokenizers library, unless there are fewer items than
    workers. Such processes encode as fast as the library's own threads in one process, and they
    also read, hash and write beside each other. On 2 cores with a BPE of 16,384 they encode 3.1
    MB/s of English, and the threads 3.3 MB/s (benchmarks/prepare.py).
    """
    if work.workers == 1 or not work.items:
        yield from run_in_process(work)
        return

    count = min(work.workers, len(work.items))
    workers = []
    whole = False
    try:
        for _ in range(count):
            workers.append(_start(work, max(1, work.workers // count)))
        yield from _serve_all(work, workers)
        whole = True
    finally:
        _end(workers, force=not whole)


# ---- Ray ----


def _run_remotely(function: Callable, item) -> tuple[tuple[str, Any], int, int]:
    """The message of an item, and its documents and bytes.

    Ray has no pipe for ticks, so they are added up and told at the end.
    """
    _limit_threads(1)
    ticks = []

    def tick(documents: int, size: int) -> None:
        ticks.append((documents, size))

    message = _attempt(function, item, tick)
    return message, sum(documents for documents, _ in ticks), sum(size for _, size in ticks)


def _join_ray(work: Work):
    """The package, connected once for the whole program.

    The connection ends with the program, and with it a cluster that was started here. Raises
    UsageError without the package, and where no cluster answers.
    """
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise UsageError(
            f"--engine=ray: needs the package ray; {install_command('ray')}, or use --engine=local"
        ) from None

    cpus = work.workers if work.address == "local" else None
    host = re.fullmatch(r"([\w.-]+):(\d+)", work.address)
    try:
        if host:
            socket.create_connection((host[1], int(host[2])), RAY_CONNECT_SECONDS).close()
        if not ray.is_initialized():
            ray.init(
                work.address,
                num_cpus=cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(
            f"--ray_address={work.address}: no cluster there: {reason}; start one with "
            "ray start --head"
        ) from None
    return ray


def _last_line(error: Exception) -> str:
    """The reason of one of Ray's errors, which are pages with the reason at the end."""
    return str(error).strip().splitlines()[-1].strip()


def run_on_ray(work: Work) -> Iterator[tuple[int, Any]]:
    """Runs items as tasks of a Ray cluster.

    It must see input and output under the same paths, such as on a shared file system. The address
    is what ray.init takes; `local` starts a cluster of `workers` CPUs here.
    """
    ray = _join_ray(work)
    task = ray.remote(num_cpus=1, max_retries=RAY_RETRIES)(_run_remotely)
    slots = work.workers
    if work.address != "local":
        slots = int(ray.cluster_resources().get("CPU", 1))

    todo = list(enumerate(work.items))[::-1]
    busy = {}
    try:
        while todo or busy:
            while todo and len(busy) < 2 * slots:  # so no worker waits for its next item
                number, item = todo.pop()
                busy[task.remote(work.function, item)] = number, item
            for reference in ray.wait(list(busy))[0]:
                number, item = busy.pop(reference)
                try:
                    message, documents, size = ray.get(reference)
                except ray.exceptions.RayError as error:
                    raise PeerFailed(
                        f"a Ray worker failed at {work.describe(item)}: {_last_line(error)}; what "
                        "is finished stays: the same command goes on from there"
                    ) from None
                work.tick(documents, size)
                yield number, _unwrap(message)
    finally:
        for reference in busy:
            ray.cancel(reference, force=True)


ENGINES = {"local": run_locally, "ray": run_on_ray}
