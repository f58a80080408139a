"""This process as one of a job of several: where its place comes from, and how it learns that
another is gone (called by flags and train)."""

import argparse
import ctypes
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from gpt_jax.errors import Exit, PeerFailed, UsageError
from gpt_jax.meeting import Place, meet

ABORT_HANDLERS = []  # C keeps an address only, so they must never be collected
SLURM_NEEDS = (
    "SLURM_JOB_ID",
    "SLURM_STEP_NODELIST",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_PROCID",
    "SLURM_LOCALID",
)


def place_of(args: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> Place | None:
    """The place that the flags give, or SLURM with --distributed. None: a single process, or one
    whose place JAX finds (a TPU pod). Raises UsageError."""
    if args.num_processes > 1:
        return Place(args.coordinator, args.num_processes, args.process_id)
    if not args.distributed or "SLURM_JOB_ID" not in environ:
        return None
    if lacking := [name for name in SLURM_NEEDS if name not in environ]:
        raise UsageError(
            f"--distributed: inside a SLURM job but not under srun ({', '.join(lacking)} not set); start it by "
            "`srun gpt-jax train --distributed …`"
        )
    # Below Linux's and above most services' ports; the same for all tasks and after a requeue,
    # another for another job.
    port = 20000 + int(environ["SLURM_JOB_ID"]) % 10000
    return Place(
        f"{first_host(environ['SLURM_STEP_NODELIST'])}:{port}",
        int(environ["SLURM_STEP_NUM_TASKS"]),
        int(environ["SLURM_PROCID"]),
    )


def first_host(nodes: str) -> str:
    """Task 0's host in SLURM's notation: "n[1-2,7],m3" -> "n1", "a,b" -> "a", "r[01-02]s[1-3]"
    -> "r01s1"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes).group()
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first)


def own_devices(
    args: argparse.Namespace, environ: Mapping[str, str] = os.environ
) -> list[int] | None:
    """The accelerators this process may use, by number among those it sees; None: all of them.
    Under SLURM the node's are dealt to its tasks, unless SLURM shows each task its own already;
    one each where SLURM knows of none. Raises UsageError."""
    if args.local_device is not None:
        return [args.local_device]
    if not args.distributed or "SLURM_LOCALID" not in environ:
        return None
    task, tasks = int(environ["SLURM_LOCALID"]), tasks_here(environ)
    shown = environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    seen, on_node = (
        len(shown) * (shown[0] not in ("", "NoDevFiles")),
        int(environ.get("SLURM_GPUS_ON_NODE") or 0),
    )
    if tasks == 1 or seen == 1 or 0 < seen < on_node:
        return None
    if (count := seen or on_node or tasks) % tasks:
        raise UsageError(
            f"{count} GPUs on this node for {tasks} tasks of SLURM: not the same number for each; start as "
            "many tasks on a node as it has GPUs, or a divisor of that"
        )
    return [*range(task * count // tasks, (task + 1) * count // tasks)]


def tasks_here(environ: Mapping[str, str]) -> int:
    """Tasks on this node in SLURM's notation for all nodes of the step: "8(x2),4" is 8, 8, 4."""
    nodes = re.findall(r"(\d+)(?:\(x(\d+)\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    return [int(tasks) for tasks, times in nodes for _ in range(int(times or 1))][
        int(environ.get("SLURM_NODEID", 0))
    ]


@contextmanager
def telling(args: argparse.Namespace) -> Iterator[None]:
    """What a process of a job finds wrong before it joins is told to the others, who would wait
    for it."""
    try:
        yield
    except Exit as error:
        place = place_of(args)
        if place and place.processes > 1:
            meet(place, args.join_seconds, failed=error)
        raise


def join(args: argparse.Namespace) -> None:
    """Makes this process one of a job. Raises PeerFailed when the others do not turn up within
    `--join_seconds`."""
    import jax
    from jax.experimental import multihost_utils

    from gpt_jax.stops import JOBS, Job

    place, seconds = place_of(args), args.join_seconds
    with telling(args):
        devices = own_devices(args)
    keep_stdout()
    if place:
        meet(place, seconds)
        given = dict(
            coordinator_address=place.address,
            num_processes=place.processes,
            process_id=place.process,
            local_device_ids=devices,
            cluster_detection_method="deactivate",
        )  # else JAX takes SLURM's word
    else:
        given = dict(local_device_ids=devices)
    leave_on_abort(
        f"the processes of this job did not all meet{f' at {place.address}' if place else ''} within "
        f"--join_seconds={seconds}: one has failed (its log has the reason)"
    )
    try:
        jax.distributed.initialize(
            **given,
            initialization_timeout=seconds,
            heartbeat_timeout_seconds=args.heartbeat_seconds,
        )
    except ValueError as error:  # JAX found no cluster
        raise UsageError(
            f"--distributed: no TPU pod and no SLURM job found here ({error}); give --coordinator=HOST:PORT "
            "--num_processes=N --process_id=K"
        ) from None
    if jax.process_count() > 1:
        JOBS.append(Job())
    same_devices()
    # The processes connect here: the first exchange waits 30 s for the others, later ones as long
    # as it takes (to prepare data, say).
    multihost_utils.sync_global_devices("joined")
    leave_on_abort(
        "aborted: usually {gone} (killed, or its machine failed; its log may have the reason). If it is not, the "
        "lines above show a fault of this process itself"
    )


def same_devices() -> None:
    """UsageError, on all processes alike, where they bring different numbers of devices: no mesh
    of JAX's has room for that."""
    import jax

    counts = Counter(device.process_index for device in jax.devices())
    few, most = min(counts, key=counts.get), max(counts, key=counts.get)
    if counts[few] != counts[most]:
        raise UsageError(
            f"the processes of this job have different numbers of devices: process {few} has {counts[few]}, "
            f"process {most} has {counts[most]}; give each the same --cpu_devices, or as many accelerators"
        )


def leave_on_abort(line: str) -> None:
    """From now on abort() means `line`, with what is known of who left for "{gone}", and exit
    code 40. JAX's process group ends a process that way when it finds a peer gone (at once if
    that was process 0, else when its heartbeats are missed), in a thread of its own, where
    Python's signal handlers do not run, and its callback cannot be used (jaxlib 0.10:
    std::bad_cast): so C calls this handler."""
    from gpt_jax.stops import JOBS

    def leave(_):
        try:
            gone = JOBS[0].gone() if JOBS else "a peer process is gone without a word"
            os.write(2, f"gpt-jax: {line.replace('{gone}', gone)}\n".encode())
        finally:
            os._exit(PeerFailed.code)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(leave)
    ABORT_HANDLERS.append(handler)
    ctypes.CDLL(None).signal(signal.SIGABRT, handler)


def keep_stdout() -> None:
    """Standard output for Python alone: gloo greets its peers there, in the middle of a text or
    of JSON. What native code prints goes to standard error from now on."""
    sys.stdout.flush()
    own = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = open(own, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)
