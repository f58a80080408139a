"""Where units of work run: here, in worker processes of this machine, or on a Ray cluster (called
by prepare).

An engine is a row of ENGINES: it calls `function(item, tick)` for every item and yields (number of
the item, result) as they end, in any order. `tick(documents, bytes)` tells of progress inside an
item (of Ray: when it ends). What a function raises is raised here, and the workers are ended first.
Items and results must be picklable, and few of them are under way at once.
"""

import contextlib
import multiprocessing
import os
import re
import signal
import socket
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from gpt_jax.errors import Exit, PeerFailed, UsageError

Tick = Callable[[int, int], None]


class Work(NamedTuple):
    """What an engine has to do."""

    function: Callable[[Any, Tick], Any]  # at the top level of a module
    items: Sequence
    workers: int  # at least 1
    tick: Tick
    describe: Callable[[Any], str]  # an item for people
    address: str = "local"  # of a Ray cluster


def _limit_threads(threads: int) -> None:
    """How many threads the tokenizers library may use in this process; before it makes its first
    one. putenv and not os.environ: only native code has to see it."""
    os.putenv("RAYON_NUM_THREADS", str(threads))
    os.putenv("TOKENIZERS_PARALLELISM", "true" if threads > 1 else "false")


def _attempt(function: Callable, item, tick: Tick) -> tuple[str, Any]:
    """("result", …) or ("error", exception): planned ends as they are, bugs with their traceback
    as text, because not every exception survives the way to another process."""
    try:
        return "result", function(item, tick)
    except (Exit, OSError, MemoryError) as error:
        return "error", error
    except Exception:
        return "error", RuntimeError(f"in a worker process:\n{traceback.format_exc()}")


def _result(message: tuple[str, Any]):
    kind, value = message
    if kind == "error":
        raise value
    return value


def in_process(work: Work) -> Iterator[tuple[int, Any]]:
    """One after the other, here. The tokenizers library may use all cores."""
    for number, item in enumerate(work.items):
        yield number, work.function(item, work.tick)


# ---- worker processes ----


def _follow_parent() -> None:
    """Ends this process when its parent is gone, whatever killed it: nobody would take its
    results."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _serve(function: Callable, pipe: Connection, threads: int) -> None:
    """The life of a worker: an item comes in, ticks and a message go out, until the pipe is
    closed."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole group; the parent decides
    threading.Thread(target=_follow_parent, daemon=True).start()
    _limit_threads(threads)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            item = pipe.recv()
            pipe.send(
                _attempt(
                    function, item, lambda documents, size: pipe.send(("tick", (documents, size)))
                )
            )


class Worker(NamedTuple):
    process: multiprocessing.Process
    pipe: Connection


def _start(work: Work, threads: int) -> Worker:
    # spawn, not fork: a fork copies the locks of threads that do not exist in the child.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(work.function, theirs, threads), daemon=True)
    process.start()
    theirs.close()  # so that the end of the worker is the end of the pipe
    return Worker(process, ours)


def _end(workers: Sequence[Worker], force: bool) -> None:
    for worker in workers:
        worker.pipe.close()
        if force:
            worker.process.kill()
    for worker in workers:
        worker.process.join()


def _lost(worker: Worker, what: str) -> PeerFailed:
    worker.process.join(5)
    code = worker.process.exitcode
    reason = (
        f"killed by signal {-code}"
        if code is not None and code < 0
        else f"gone with exit code {code}"
    )
    return PeerFailed(
        f"a worker process was {reason} at {what}; what is finished stays: the same command goes on from "
        "there (with fewer --workers if memory ran out)"
    )


def local(work: Work) -> Iterator[tuple[int, Any]]:
    """Worker processes. One thread of the tokenizers library in each, unless there are fewer
    items than workers: such processes encode as fast as the library's own threads in one (2
    cores, BPE of 16,384: 3.1 and 3.3 MB/s of English), and reading, hashing and writing run
    beside each other as well. Figures: benchmarks/prepare.py."""
    if work.workers == 1 or not work.items:
        yield from in_process(work)
        return
    count = min(work.workers, len(work.items))
    todo, workers, busy, whole = list(enumerate(work.items))[::-1], [], {}, False
    try:
        for _ in range(count):
            workers.append(_start(work, max(1, work.workers // count)))
        idle = list(workers)
        while todo or busy:
            while todo and idle:
                worker, task = idle.pop(), todo.pop()
                busy[worker.pipe] = worker, *task
                with contextlib.suppress(BrokenPipeError):  # a dead worker: its pipe's end tells
                    worker.pipe.send(task[1])
            for pipe in wait(list(busy)):
                worker, number, item = busy[pipe]
                try:
                    message = pipe.recv()
                except (EOFError, ConnectionResetError):
                    raise _lost(worker, work.describe(item)) from None
                if message[0] == "tick":
                    work.tick(*message[1])
                    continue
                del busy[pipe]
                idle.append(worker)
                yield number, _result(message)
        whole = True
    finally:
        _end(workers, force=not whole)


# ---- Ray ----


def _remote(function: Callable, item) -> tuple[tuple[str, Any], int, int]:
    """(message, documents, bytes): Ray has no pipe for ticks under way, so they are added up and
    told at the end."""
    _limit_threads(1)
    seen = []
    message = _attempt(function, item, lambda documents, size: seen.append((documents, size)))
    return message, sum(documents for documents, _ in seen), sum(size for _, size in seen)


def _join_ray(work: Work):
    """The package, connected once for the whole program: that ends with the program, and with it
    a cluster that was started here."""
    try:
        import ray
    except ImportError:
        raise UsageError(
            "--engine=ray: needs the package ray; pip install 'gpt_jax[ray]', or use --engine=local"
        ) from None
    given = {"num_cpus": work.workers} if work.address == "local" else {}
    try:
        if host := re.fullmatch(r"([\w.-]+):(\d+)", work.address):  # Ray itself tries for minutes
            socket.create_connection((host[1], int(host[2])), timeout=10).close()
        if not ray.is_initialized():
            ray.init(
                work.address,
                **given,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
            )
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"--ray_address={work.address}: no cluster there: {' '.join(str(error).split())}; "
            "start one with ray start --head"
        ) from None
    return ray


def _last_line(error: Exception) -> str:
    """Ray's errors are pages, the reason at the end."""
    return str(error).strip().splitlines()[-1].strip()


def on_ray(work: Work) -> Iterator[tuple[int, Any]]:
    """Tasks of a Ray cluster, which must see input and output under the same paths (a shared
    file system). `address`: as ray.init takes it; `local` starts a cluster of `workers` CPUs
    here."""
    ray = _join_ray(work)
    # A unit that is run twice makes the same files, so Ray may try again where a machine went away.
    task = ray.remote(num_cpus=1, max_retries=2)(_remote)
    slots = work.workers if work.address == "local" else int(ray.cluster_resources().get("CPU", 1))
    todo, busy = list(enumerate(work.items))[::-1], {}
    try:
        while todo or busy:
            while todo and len(busy) < 2 * slots:
                number, item = todo.pop()
                busy[task.remote(work.function, item)] = number, item
            for reference in ray.wait(list(busy))[0]:
                number, item = busy.pop(reference)
                try:
                    message, documents, size = ray.get(reference)
                except ray.exceptions.RayError as error:
                    raise PeerFailed(
                        f"a Ray worker failed at {work.describe(item)}: {_last_line(error)}; what is "
                        "finished stays: the same command goes on from there"
                    ) from None
                work.tick(documents, size)
                yield number, _result(message)
    finally:
        for reference in busy:
            ray.cancel(reference, force=True)


ENGINES = {"local": local, "ray": on_ray}
