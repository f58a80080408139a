"""SLURM: what submitit is given for a job, and how the job continues after its end."""

import os
import sys
from typing import NamedTuple

from gpt_jax.cluster.rendezvous import SECRET
from gpt_jax.errors import RESTART_SECONDS, RESTARTABLE, SIGNALLED, UsageError

SLURM_SAVE_SECONDS = 300  # a job is told to save so long before its time is up
# Options of sbatch that --sbatch may not set, and the way out. Any other option may ask for GPUs.
OWN = {
    "nodes": "use --nodes",
    "ntasks": "use --nodes and --tasks_per_node",
    "ntasks_per_node": "use --tasks_per_node",
    "tasks_per_node": "use --tasks_per_node",
    "gpus_per_node": "leave out one of it and --gpus_per_node",
    "time": "use --time",
    "partition": "use --partition",
    "job_name": "use --name",
    "output": "use --logs",
    "error": "use --logs",
    "gpus_per_task": "leave it out: the tasks of a node share its GPUs out",
    **dict.fromkeys(
        ("signal", "requeue", "no_requeue", "open_mode", "array"),
        "leave it out: the launcher sets it so that the job can resume",
    ),
}


class SlurmTask:
    """What every task of the job runs.

    The program takes the place of submitit's own process, so that signals reach it alone.
    """

    def __init__(self, arguments: list[str]):
        self.arguments = arguments

    def __call__(self):
        os.execv(sys.executable, [sys.executable, "-m", "gpt_jax", *self.arguments])


class SlurmShape(NamedTuple):
    """What is asked of SLURM."""

    nodes: int
    tasks_per_node: int
    gpus_per_node: int
    minutes: int  # the job's time limit
    restarts: int
    name: str


def parse_sbatch_options(options: list[str], gpus: int) -> dict[str, str]:
    """What --sbatch NAME=VALUE says, by name. `gpus` is --gpus_per_node.

    Raises UsageError for an option that the launcher sets, or that is no option.
    """
    values = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not (name and equals):
            raise UsageError(f"--sbatch={option}: expected NAME=VALUE")
        key = name.replace("-", "_")
        if len(name) == 1:
            raise UsageError(
                f"--sbatch={option}: expected the long name of an option, as in mem=64G"
            )
        if key in OWN and (gpus or key != "gpus_per_node"):
            raise UsageError(f"--sbatch={option}: the launcher sets {name}; {OWN[key]}")
        if key in values:
            raise UsageError(f"--sbatch={option}: {name} is given twice; leave one out")
        values[key] = value
    return values


def make_slurm_parameters(shape: SlurmShape, extra: dict[str, str]) -> dict:
    """Arguments of submitit's `update_parameters`. `extra` has further #SBATCH options by name."""
    # The signal goes to the tasks, which save and end with 10.
    own = {"signal": f"USR1@{SLURM_SAVE_SECONDS}", "requeue": True}
    gpus = {"gpus_per_node": shape.gpus_per_node} if shape.gpus_per_node else {}
    return gpus | {
        "job_name": shape.name,
        "nodes": shape.nodes,
        "ntasks_per_node": shape.tasks_per_node,
        "time": shape.minutes,
        "srun_args": ["--kill-on-bad-exit=0"],
        "stderr_to_stdout": True,
        "setup": [
            "trap '' TERM  # the tasks get it too, save, and end; srun has to wait for them",
            make_secret(),
        ],
        "teardown": afterwards(shape.restarts).splitlines(),
        "additional_parameters": own | extra,
    }


def make_secret() -> str:
    """A shell line before srun, which gives all tasks of this start one secret."""
    return f"export {SECRET}=$(od -An -N16 -tx8 /dev/urandom | tr -d ' ')"


def afterwards(restarts: int | str) -> str:
    """Shell lines behind srun, where `$?` is its exit code, the highest of the tasks'.

    They send the job back into the queue where a restart helps. It runs the same script, which
    resumes from its workdir.
    """
    first, most = RESTART_SECONDS
    codes = "|".join(str(code) for code in RESTARTABLE + SIGNALLED)
    return f"""\
code=$? count=${{SLURM_RESTART_COUNT:-0}}
state=$(scontrol show job "$SLURM_JOB_ID" | grep -o 'JobState=[A-Z]*')
case $code in
{codes})
    if [ "$state" != JobState=RUNNING ]; then # cancelled, or preempted: then SLURM requeues it
        echo "gpt-jax: exit code $code, and SLURM has ended the job itself"
    elif [ "$count" -ge {restarts} ]; then
        echo "gpt-jax: exit code $code, restarted $count times: not again"
    else
        if [ "$code" -ne 10 ]; then
            wait=$(({first} << (count < 16 ? count : 16))); sleep $((wait < {most} ? wait : {most}))
        fi
        echo "gpt-jax: exit code $code: back into the queue (restart $((count + 1)) of {restarts})"
        scontrol requeue "$SLURM_JOB_ID"
    fi ;;
0) ;;
*) echo "gpt-jax: exit code $code: a restart would not help" ;;
esac
exit $code"""
