"""The place of this process in a job of several, from flags or from SLURM's environment."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from gpt_jax.cluster.rendezvous import SECRET, Place
from gpt_jax.errors import UsageError

SLURM_NEEDS = (
    "SLURM_JOB_ID",
    "SLURM_STEP_NODELIST",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_PROCID",
    "SLURM_LOCALID",
)
# A host before the first comma, with what stands in its brackets.
FIRST_OF_LIST = re.compile(r"(?:[^,\[]|\[[^\]]*\])*")
# "8(x2)" is eight tasks on each of two nodes.
TASKS_AND_NODES = re.compile(r"(\d+)(?:\(x(\d+)\))?")


class JobFlags(NamedTuple):
    """What a command line says about the job; see `gpt-jax train --help`."""

    coordinator: str | None = None
    num_processes: int = 1
    process_id: int = 0
    local_device: int | None = None
    distributed: bool = False
    join_seconds: int = 300
    heartbeat_seconds: int = 10


def place_of(flags: JobFlags, environ: Mapping[str, str]) -> Place | None:
    """The place that the flags give, or SLURM with --distributed.

    None for a single process, and for one whose place JAX finds (a TPU pod). Raises UsageError
    inside a SLURM job that was not started by srun, and for a number of SLURM that is no number.
    """
    secret = environ.get(SECRET, "")
    if flags.num_processes > 1 and flags.coordinator:
        return Place(flags.coordinator, flags.num_processes, flags.process_id, secret)
    if not flags.distributed or "SLURM_JOB_ID" not in environ:
        return None
    lacking = [name for name in SLURM_NEEDS if name not in environ]
    if lacking:
        raise UsageError(
            f"--distributed: inside a SLURM job but not under srun ({', '.join(lacking)} not set); "
            "start it by `srun gpt-jax train --distributed …`"
        )

    # Ports from 20000 to 29999 lie below those that Linux gives out, and above those of most
    # services. All tasks get the same one, also after a requeue, and another job another one.
    job = read_number(environ, "SLURM_JOB_ID")
    return Place(
        f"{first_host(environ['SLURM_STEP_NODELIST'])}:{20000 + job % 10000}",
        read_number(environ, "SLURM_STEP_NUM_TASKS"),
        read_number(environ, "SLURM_PROCID"),
        # Two jobs whose numbers share the port do not take each other's tasks for their own.
        f"{secret} slurm {job}",
    )


def read_number(environ: Mapping[str, str], name: str, default: int = 0) -> int:
    """A whole number of SLURM's environment. Raises UsageError for another text."""
    text = environ.get(name) or str(default)
    if not text.isdecimal():
        raise UsageError(f"{name}={text}: expected a whole number, as srun sets it")
    return int(text)


def first_host(nodes: str) -> str:
    """Task 0's host in SLURM's notation.

    "n[1-2,7],m3" -> "n1", "a,b" -> "a", "r[01-02]s[1-3]" -> "r01s1".
    """
    first = FIRST_OF_LIST.match(nodes)
    assert first is not None  # the pattern matches any text
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first.group())


def own_devices(flags: JobFlags, environ: Mapping[str, str]) -> list[int] | None:
    """The accelerators this process may use, by number among those it sees; None for all of them.

    Under SLURM each task takes an equal part of the node's GPUs, unless SLURM shows each task only
    its own. If SLURM reports no GPUs, each task takes one. Raises UsageError if the parts would
    not be equal.
    """
    if flags.local_device is not None:
        return [flags.local_device]
    if not flags.distributed or "SLURM_LOCALID" not in environ:
        return None

    task = read_number(environ, "SLURM_LOCALID")
    tasks = tasks_here(environ)
    seen = count_visible_gpus(environ)
    on_node = read_number(environ, "SLURM_GPUS_ON_NODE")
    if tasks == 1 or seen == 1 or 0 < seen < on_node:
        return None
    count = seen or on_node or tasks
    if count % tasks:
        raise UsageError(
            f"{count} GPUs on this node for {tasks} tasks of SLURM: not the same number for each; "
            "start as many tasks on a node as it has GPUs, or a divisor of that"
        )
    return [*range(task * count // tasks, (task + 1) * count // tasks)]


def count_visible_gpus(environ: Mapping[str, str]) -> int:
    """GPUs that CUDA_VISIBLE_DEVICES names; 0 where it says nothing."""
    shown = environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return 0 if shown[0] in ("", "NoDevFiles") else len(shown)


def tasks_here(environ: Mapping[str, str]) -> int:
    """Tasks on this node, from SLURM's notation for all nodes: "8(x2),4" is 8, 8, 4.

    Raises UsageError if this node is not among them.
    """
    tasks_by_node: list[int] = []
    text = environ.get("SLURM_STEP_TASKS_PER_NODE", "1")
    for tasks, nodes in TASKS_AND_NODES.findall(text):
        tasks_by_node += [int(tasks)] * int(nodes or 1)
    node = read_number(environ, "SLURM_NODEID")
    if node >= len(tasks_by_node):
        raise UsageError(
            f"SLURM_STEP_TASKS_PER_NODE={text}: says nothing of node {node} (SLURM_NODEID); "
            "start it by `srun gpt-jax train --distributed …`"
        )
    return tasks_by_node[node]
