"""The place of this process in a job of several, from flags or from SLURM's environment."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from gpt_jax.cluster.rendezvous import Place
from gpt_jax.errors import UsageError


class JobFlags(NamedTuple):
    """What a command line says about the job; see `gpt-jax train --help`."""

    coordinator: str | None = None
    num_processes: int = 1
    process_id: int = 0
    local_device: int | None = None
    distributed: bool = False
    join_seconds: int = 300
    heartbeat_seconds: int = 10


SLURM_NEEDS = (
    "SLURM_JOB_ID",
    "SLURM_STEP_NODELIST",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_PROCID",
    "SLURM_LOCALID",
)


def place_of(flags: JobFlags, environ: Mapping[str, str]) -> Place | None:
    """The place that the flags give, or SLURM with --distributed. None: a single process, or one
    whose place JAX finds (a TPU pod). Raises UsageError."""
    if flags.num_processes > 1:
        return Place(flags.coordinator, flags.num_processes, flags.process_id)
    if not flags.distributed or "SLURM_JOB_ID" not in environ:
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


def own_devices(flags: JobFlags, environ: Mapping[str, str]) -> list[int] | None:
    """The accelerators this process may use, by number among those it sees; None: all of them.
    Under SLURM the node's are dealt to its tasks, unless SLURM shows each task its own already;
    one each where SLURM knows of none. Raises UsageError."""
    if flags.local_device is not None:
        return [flags.local_device]
    if not flags.distributed or "SLURM_LOCALID" not in environ:
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
