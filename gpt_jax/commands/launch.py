"""`gpt-jax launch local|slurm|kubernetes … train …`: starts a command as a job of several
processes."""

import argparse
import posixpath
import re
import shutil
import sys
import tempfile
from pathlib import Path

from gpt_jax import config as configs
from gpt_jax.cluster import split_address
from gpt_jax.commands.config_file import load_config, local_workdir
from gpt_jax.commands.flags import Flags
from gpt_jax.commands.output import emit
from gpt_jax.commands.runtime import MOST_CPU_DEVICES, check_runtime
from gpt_jax.data import EMPTY_PATHS
from gpt_jax.errors import Exit, UsageError, complain

LAUNCHERS = {
    "local": "several processes on this machine, restarted where that helps",
    "slurm": "submits a job to SLURM, requeued where that helps",
    "kubernetes": "writes a JobSet for Kubernetes to standard output",
}
PLACES = ("--coordinator", "--num_processes", "--process_id", "--local_device", "--distributed")
MOST = 10**6  # of anything that is counted here; what is more was typed wrong
COMMANDS = ("train", "evaluate", "generate")  # what runs as several processes


def main(arguments: list[str]) -> None:
    """Raises UsageError for what cannot be started, and what the job ended with."""
    if not arguments or arguments[0] in ("-h", "--help"):
        rows = [f"  {name:<10} {line}" for name, line in LAUNCHERS.items()]
        emit("\n".join(["usage: gpt-jax launch <engine> [flags] train [its flags]", "", *rows]))
        sys.exit(0)
    name, *rest = arguments
    if name not in LAUNCHERS:
        raise UsageError(f"unknown engine {name!r}: choose one of {', '.join(LAUNCHERS)}")
    {"local": local, "slurm": slurm, "kubernetes": kubernetes}[name](rest)


def split(flags: Flags, arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The launcher's flags, wherever they stand, and the command that it is to run."""
    args, rest = flags.parse_known_args(arguments)
    rest = rest[1:] if rest[:1] == ["--"] else rest
    if not rest or rest[0] not in COMMANDS:
        what = f"{rest[0]!r} is no flag of it, and " if rest else ""
        raise UsageError(
            f"{flags.prog}: {what}what is to run is missing: expected one of {', '.join(COMMANDS)} "
            "and its "
            "flags"
        )
    return args, rest


def refuse(command: list[str], *more: str) -> None:
    """UsageError for flags that say a process's place in the job, which is the launcher's to
    say."""
    for flag in (*PLACES, *more):
        if any(word.split("=")[0] == flag for word in command):
            raise UsageError(f"{flag}: the launcher gives it to each process; leave it out")


def within(args: argparse.Namespace, *names: str, least: int = 1, most: int = MOST) -> None:
    for name in names:
        if not least <= getattr(args, name) <= most:
            raise UsageError(f"--{name}={getattr(args, name)}: expected {least} to {most}")


def local(arguments: list[str]) -> None:
    from gpt_jax.cluster import MOST_PROCESSES, LocalGroup, run_processes

    flags = Flags(prog="gpt-jax launch local", description=LAUNCHERS["local"])
    flags.add_argument(
        "--processes", type=int, default=1, metavar="N", help="processes of this machine"
    )
    flags.add_argument(
        "--devices_per_process",
        type=int,
        default=0,
        metavar="M",
        help="fake CPU devices of each; 0: accelerator k of this machine for process k",
    )
    flags.add_argument(
        "--restarts", type=int, default=0, metavar="K", help="how often to start again"
    )
    flags.add_argument(
        "--nodes", type=int, default=1, help="machines that each run this with as many processes"
    )
    flags.add_argument("--node", type=int, default=0, help="which of them this is")
    flags.add_argument(
        "--coordinator",
        default="",
        metavar="HOST:PORT",
        help="address on node 0, needed with --nodes; default '%(default)s': a free port of this "
        "machine",
    )
    args, rest = split(flags, arguments)
    within(args, "nodes")
    within(args, "processes", most=MOST_PROCESSES)
    within(args, "devices_per_process", least=0, most=MOST_CPU_DEVICES)
    within(args, "restarts", least=0)
    if args.nodes > 1 and not args.coordinator:
        raise UsageError(f"--nodes={args.nodes}: needs --coordinator=HOST:PORT of node 0")
    if args.coordinator:
        split_address(args.coordinator)
    if not 0 <= args.node < args.nodes:
        raise UsageError(f"--node={args.node}: expected 0 to {args.nodes - 1}")
    if args.nodes > 1 and args.restarts:
        raise UsageError(
            f"--restarts={args.restarts}: one machine of several cannot restart the job; its "
            "scheduler does"
        )
    refuse(rest, "--cpu_devices")

    each = args.devices_per_process or (
        args.processes > 1
    )  # a machine's only process takes all that it has: not known
    check_train(rest, args.processes * args.nodes * each)
    code, line = run_processes(
        LocalGroup(
            args.processes, args.devices_per_process, args.coordinator, args.nodes, args.node
        ),
        rest,
        args.restarts,
        complain,
    )
    if code:
        raise Ended(code, line)


class Ended(Exit):
    """The job's own end; its processes have said why."""

    def __init__(self, code: int, line: str):
        super().__init__(f"launch: {line}")
        self.code = code


def slurm(arguments: list[str]) -> None:
    from gpt_jax.cluster import (
        SLURM_SAVE_SECONDS,
        SlurmShape,
        SlurmTask,
        make_slurm_parameters,
        parse_sbatch_options,
    )

    flags = Flags(
        prog="gpt-jax launch slurm",
        description=LAUNCHERS["slurm"] + ". Other options of sbatch are given as "
        "--sbatch NAME=VALUE, as in --sbatch mem=64G.",
    )
    flags.add_argument("--nodes", type=int, default=1, help="machines")
    flags.add_argument(
        "--gpus_per_node", type=int, default=0, help="GPUs of each; 0: none is asked for"
    )
    flags.add_argument(
        "--tasks_per_node",
        type=int,
        default=0,
        help="processes of a node, to which its GPUs are dealt; 0: one for each GPU, at least one",
    )
    flags.add_argument(
        "--time",
        type=int,
        required=True,
        metavar="MINUTES",
        help="time limit, whole minutes; the job goes on behind it",
    )
    flags.add_argument("--partition", help="where to queue")
    flags.add_argument("--name", default="gpt-jax", help="of the job, as squeue shows it")
    flags.add_argument(
        "--restarts",
        type=int,
        default=20,
        help="how often the job goes back into the queue, for time limits too: 40 days in jobs of "
        "one need 40",
    )
    flags.add_argument(
        "--logs",
        default="runs/slurm",
        metavar="DIR",
        help="for the script and the output of every task",
    )
    flags.add_argument(
        "--sbatch", action="append", default=[], metavar="NAME=VALUE", help="a further option"
    )
    args, rest = split(flags, arguments)
    within(args, "nodes")
    within(
        args, "time", least=SLURM_SAVE_SECONDS // 60 + 1
    )  # else it is told to save as soon as it begins
    within(args, "gpus_per_node", "tasks_per_node", "restarts", least=0)
    extra = parse_sbatch_options(args.sbatch, args.gpus_per_node) | (
        {"partition": args.partition} if args.partition else {}
    )
    gpus, tasks = args.gpus_per_node, args.tasks_per_node or max(1, args.gpus_per_node)
    if gpus % tasks:
        raise UsageError(
            f"--tasks_per_node={tasks}: {gpus} GPUs of a node cannot be dealt to so many evenly"
        )
    refuse(rest)
    check_train(rest, args.nodes * gpus, args.nodes * tasks)
    try:
        import submitit
    except ImportError:
        raise UsageError(
            "gpt-jax launch slurm: needs submitit: pip install 'gpt_jax[slurm]'; or submit "
            "launch/slurm.sbatch"
        ) from None
    shape = SlurmShape(args.nodes, tasks, gpus, args.time, args.restarts, args.name)
    logs = make_logs(args.logs)
    if lacking := [name for name in ("sbatch", "srun") if shutil.which(name) is None]:
        raise UsageError(
            f"launch slurm: there is no {lacking[0]} here; call it where a SLURM cluster takes "
            "jobs, or use "
            "launch local"
        )
    try:
        executor = submitit.SlurmExecutor(folder=logs, max_num_timeout=0)
        executor.update_parameters(**make_slurm_parameters(shape, extra))
        job = executor.submit(SlurmTask([*rest, "--distributed"]))
    except (RuntimeError, OSError) as error:  # sbatch refused
        raise UsageError(
            f"launch slurm: sbatch did not take it: {' '.join(str(error).split())}"
        ) from None
    emit(f"submitted job {job.job_id}; output: {job.paths.stdout}")


def make_logs(text: str) -> Path:
    """The folder of --logs, made where missing. Raises UsageError."""
    try:
        Path(text).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=text or ".").close()
    except OSError as error:
        raise UsageError(
            f"--logs={text}: cannot be written ({error.strerror}); choose another folder"
        ) from None
    return Path(text).resolve()


def kubernetes(arguments: list[str]) -> None:
    from gpt_jax.cluster import TPU_NODES, KubernetesOptions, dump_yaml, make_jobset, parse_mounts

    flags = Flags(prog="gpt-jax launch kubernetes", description=LAUNCHERS["kubernetes"])
    flags.add_argument("--image", required=True, help="made from launch/Dockerfile")
    flags.add_argument(
        "--name", default="gpt-jax", help="of the JobSet: lower-case letters, digits, dashes"
    )
    flags.add_argument("--nodes", type=int, default=1, help="machines with GPUs")
    flags.add_argument("--gpus_per_node", type=int, default=0, help="one process for each")
    flags.add_argument(
        "--tpu_topology",
        metavar="KIND:SHAPE",
        help=f"a GKE TPU slice, as v6e:4x4; kinds: {', '.join(TPU_NODES)}",
    )
    flags.add_argument("--slices", type=int, default=1, help="TPU slices")
    flags.add_argument("--restarts", type=int, default=20, help="how often the JobSet starts again")
    flags.add_argument(
        "--grace_seconds",
        type=int,
        default=600,
        help="from SIGTERM to SIGKILL: a step and a save have to fit",
    )
    flags.add_argument(
        "--volume",
        action="append",
        default=[],
        metavar="CLAIM:PATH",
        help="a PersistentVolumeClaim, mounted in all pods; the workdir has to be in one",
    )
    flags.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="for every pod"
    )
    args, rest = split(flags, arguments)
    within(args, "nodes", "slices", "grace_seconds")
    if not args.image or re.search(r"\s", args.image):
        raise UsageError(
            f"--image={args.image}: expected the name of the one that was made from "
            "launch/Dockerfile"
        )
    within(args, "gpus_per_node", "restarts", least=0)
    made = make_jobset(
        KubernetesOptions(
            args.image,
            args.name,
            args.nodes,
            args.gpus_per_node,
            args.tpu_topology,
            args.slices,
            args.restarts,
            args.grace_seconds,
            tuple(args.volume),
            tuple(args.env),
        ),
        rest,
    )
    refuse(rest, "--cpu_devices")
    workdir = check_train(rest, count_devices(args), slices=args.slices if args.tpu_topology else 0)
    inside = Path(
        posixpath.normpath(re.sub("^/+", "/", workdir))
    )  # in the pod, which has not this machine's links
    if workdir and not any(inside.is_relative_to(path) for path in parse_mounts(args.volume)):
        raise UsageError(
            f"--workdir={workdir}: lies in no --volume, and a pod's own disk is lost with it; as "
            "in "
            f"--volume=CLAIM:/data -- train --workdir=/data/{inside.name}"
        )
    emit(dump_yaml(made).rstrip("\n"))


def count_devices(args: argparse.Namespace) -> int:
    """JAX's devices of the whole job. Raises UsageError for a slice that nobody offers."""
    if not args.tpu_topology:
        return args.nodes * args.gpus_per_node
    from gpt_jax.plan import parse_topology

    return parse_topology(args.tpu_topology, args.slices, "--tpu_topology").devices


def check_train(command: list[str], devices: int, processes: int = 0, slices: int = 0) -> str:
    """UsageError now for what would end `train` at its start on every machine; other commands
    are not looked at. `devices` of the whole job, 0: not known, unless the command says
    --cpu_devices for each of `processes`; `slices` of TPUs, 0: none. Returns the workdir, "" of
    other commands."""
    if command[0] != "train":
        return ""
    from gpt_jax.commands.train import make_flags, parse_profile

    args, rest = make_flags().parse_known_args(command[1:])
    check_runtime(args)
    if args.print_config:
        raise UsageError(
            "--print_config: prints and trains nothing; call gpt-jax train for it, without the "
            "launcher"
        )
    config = configs.resolve(load_config(args.config, rest))
    if not args.workdir:
        raise UsageError("--workdir is missing: where should the run's files go?")
    local_workdir(args.workdir)
    if args.profile:
        parse_profile(args.profile, config.train.steps)
    if not (config.data.path or config.data.sources):
        raise UsageError("config.data.path" + EMPTY_PATHS)
    configs.check(
        config, devices or processes * args.cpu_devices or configs.least_devices(config.mesh)
    )
    if slices and (problem := configs.slices_problem(configs.cross_slice(config.mesh), slices)):
        raise UsageError(problem)
    return args.workdir
