"""`gpt-jax launch local|slurm|kubernetes … train …`: starts a job of several processes."""

import argparse
import os
import posixpath
import re
import shutil
import sys
import tempfile
from pathlib import Path

from gpt_jax import config as configs
from gpt_jax.cluster import parse_mounts, split_address
from gpt_jax.commands.config_file import find_workdir, load_config
from gpt_jax.commands.flags import Flags
from gpt_jax.commands.output import emit
from gpt_jax.commands.runtime import MOST_CPU_DEVICES, check_runtime
from gpt_jax.data import EMPTY_PATHS
from gpt_jax.errors import Exit, UsageError, complain, install_command
from gpt_jax.files import describe_error

# Flags that say a process's place in the job. The launcher gives them.
PLACES = ("--coordinator", "--num_processes", "--process_id", "--local_device", "--distributed")
# The most of anything that is counted here. A larger number is a mistake.
MOST = 10**6
# The commands that run as several processes.
COMMANDS = ("train", "evaluate", "generate")


class Ended(Exit):
    """The job's own end. Its processes have said why."""

    def __init__(self, code: int, line: str):
        super().__init__(f"launch: {line}")
        self.code = code


def main(arguments: list[str]) -> None:
    """Raises UsageError for what cannot be started, and Ended for the job's own failure."""
    if not arguments or arguments[0] in ("-h", "--help"):
        rows = [f"  {name:<10} {line}" for name, (_, line) in LAUNCHERS.items()]
        emit("\n".join(["usage: gpt-jax launch <engine> [flags] train [its flags]", "", *rows]))
        sys.exit(0)

    name, *rest = arguments
    if name not in LAUNCHERS:
        raise UsageError(f"unknown engine {name!r}: choose one of {', '.join(LAUNCHERS)}")
    LAUNCHERS[name][0](rest)


# ---- for every launcher ----


def split(flags: Flags, arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns (the launcher's flags, wherever they stand; the command that it is to run)."""
    args, rest = flags.parse_known_args(arguments)
    if rest[:1] == ["--"]:
        rest = rest[1:]
    if not rest or rest[0] not in COMMANDS:
        what = f"{rest[0]!r} is no flag of it, and " if rest else ""
        raise UsageError(
            f"{flags.prog}: {what}what is to run is missing: "
            f"expected one of {', '.join(COMMANDS)} and its flags"
        )
    return args, rest


def refuse_places(command: list[str], *more: str) -> None:
    """Raises UsageError if the command has a flag of PLACES or of `more`."""
    for flag in (*PLACES, *more):
        if any(word.split("=")[0] == flag for word in command):
            raise UsageError(f"{flag}: the launcher gives it to each process; leave it out")


def check_range(args: argparse.Namespace, *names: str, least: int = 1, most: int = MOST) -> None:
    """Raises UsageError for a flag that is not from `least` to `most`."""
    for name in names:
        if not least <= getattr(args, name) <= most:
            raise UsageError(f"--{name}={getattr(args, name)}: expected {least} to {most}")


def check_train(command: list[str], devices: int, processes: int = 0, slices: int = 0) -> str:
    """Raises UsageError now for what would end `train` at its start on every machine.

    Other commands are not checked. The job has `devices`. If that is 0, it has what --cpu_devices
    gives to each of `processes`, and otherwise any number. `slices` of TPUs may be 0 for none.
    Returns the flag of the folder that all machines share, or "" for other commands.
    """
    if command[0] != "train":
        return ""
    from gpt_jax.commands.train import make_flags, parse_profile

    args, rest = make_flags().parse_known_args(command[1:])
    check_runtime(args)
    if args.print_config:
        raise UsageError(
            "--print_config: prints and trains nothing; "
            "call gpt-jax train for it, without the launcher"
        )
    config = configs.resolve(load_config(args.config, rest))
    if not args.workdir:
        raise UsageError("--workdir is missing: where should the run's files go?")
    if args.profile:
        parse_profile(args.profile, config.train.steps)
    if not (config.data.path or config.data.sources):
        raise UsageError("config.data.path" + EMPTY_PATHS)

    count = devices or processes * args.cpu_devices or configs.least_devices(config.mesh)
    if config.init.model != "checkpoint":  # whose weights need not be on this machine
        configs.check(config, count)
    if slices and (problem := configs.slices_problem(configs.cross_slice(config.mesh), slices)):
        raise UsageError(problem)
    if isinstance(find_workdir(args.workdir), str):
        return f"--config.checkpoint.mirror={config.checkpoint.mirror}"
    return f"--workdir={args.workdir}"


# ---- local ----


def make_local_flags() -> Flags:
    flags = Flags(prog="gpt-jax launch local", description=LAUNCHERS["local"][1])
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
    flags.add_argument("--restarts", type=int, default=0, metavar="K", help="how often it restarts")
    flags.add_argument(
        "--nodes", type=int, default=1, help="machines that each run this with as many processes"
    )
    flags.add_argument("--node", type=int, default=0, help="which of them this is")
    flags.add_argument(
        "--coordinator",
        default="",
        metavar="HOST:PORT",
        help="address on node 0, needed with --nodes; default '%(default)s': "
        "a free port of this machine",
    )
    return flags


def local(arguments: list[str]) -> None:
    """Runs the command on this machine. Raises Ended if the job fails."""
    from gpt_jax.cluster import MOST_PROCESSES, LocalGroup, run_processes

    args, rest = split(make_local_flags(), arguments)
    check_range(args, "nodes")
    check_range(args, "processes", most=MOST_PROCESSES)
    check_range(args, "devices_per_process", least=0, most=MOST_CPU_DEVICES)
    check_range(args, "restarts", least=0)
    check_nodes(args)
    refuse_places(rest, "--cpu_devices")

    # The only process of a machine takes all its accelerators, whose number is not known here.
    each = args.devices_per_process or (1 if args.processes > 1 else 0)
    check_train(rest, args.processes * args.nodes * each)
    group = LocalGroup(
        args.processes, args.devices_per_process, args.coordinator, args.nodes, args.node
    )
    code, line = run_processes(group, rest, args.restarts, complain, os.environ)
    if code:
        raise Ended(code, line)


def check_nodes(args: argparse.Namespace) -> None:
    """Raises UsageError for flags of several machines that do not fit together."""
    if args.nodes > 1 and not args.coordinator:
        raise UsageError(f"--nodes={args.nodes}: needs --coordinator=HOST:PORT of node 0")
    if args.coordinator:
        split_address(args.coordinator)
    if not 0 <= args.node < args.nodes:
        raise UsageError(f"--node={args.node}: expected 0 to {args.nodes - 1}")
    if args.nodes > 1 and args.restarts:
        raise UsageError(
            f"--restarts={args.restarts}: one machine of several cannot restart the job; "
            "its scheduler does"
        )


# ---- slurm ----


def make_slurm_flags() -> Flags:
    flags = Flags(
        prog="gpt-jax launch slurm",
        description=LAUNCHERS["slurm"][1] + ". Other options of sbatch are given as "
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
        help="processes of a node, which share its GPUs; 0: one for each GPU, at least one",
    )
    flags.add_argument(
        "--time",
        type=int,
        required=True,
        metavar="MINUTES",
        help="time limit, whole minutes; the job resumes after it",
    )
    flags.add_argument("--partition", help="where to queue")
    flags.add_argument("--name", default="gpt-jax", help="of the job, as squeue shows it")
    flags.add_argument(
        "--restarts",
        type=int,
        default=20,
        help="how often the job goes back into the queue. Each time limit counts: "
        "a run of 40 days in one-day jobs needs 40.",
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

    return flags


def slurm(arguments: list[str]) -> None:
    """Submits the command to SLURM. Raises UsageError if it cannot be submitted."""
    from gpt_jax.cluster import SLURM_SAVE_SECONDS, SlurmShape, parse_sbatch_options

    args, rest = split(make_slurm_flags(), arguments)
    check_range(args, "nodes")
    # A shorter job would be told to save as soon as it begins.
    check_range(args, "time", least=SLURM_SAVE_SECONDS // 60 + 1)
    check_range(args, "gpus_per_node", "tasks_per_node", "restarts", least=0)
    extra = parse_sbatch_options(args.sbatch, args.gpus_per_node)
    if args.partition:
        extra["partition"] = args.partition

    gpus = args.gpus_per_node
    tasks = args.tasks_per_node or max(1, gpus)
    if gpus % tasks:
        raise UsageError(
            f"--tasks_per_node={tasks}: {gpus} GPUs of a node cannot be shared by so many evenly"
        )
    refuse_places(rest)
    check_train(rest, args.nodes * gpus, args.nodes * tasks)

    shape = SlurmShape(args.nodes, tasks, gpus, args.time, args.restarts, args.name)
    submit(rest, shape, extra, args.logs)


def submit(command: list[str], shape, extra: dict[str, str], logs: str) -> None:
    """Submits the command and prints the job's number. Raises UsageError."""
    from gpt_jax.cluster import SlurmTask, make_slurm_parameters

    try:
        import submitit
    except ImportError:
        raise UsageError(
            f"gpt-jax launch slurm: needs the package submitit; {install_command('submitit')}; "
            "or submit launch/slurm.sbatch"
        ) from None
    folder = make_logs(logs)
    missing = [name for name in ("sbatch", "srun") if shutil.which(name) is None]
    if missing:
        raise UsageError(
            f"launch slurm: there is no {missing[0]} here; "
            "call it where a SLURM cluster takes jobs, or use launch local"
        )

    try:
        executor = submitit.SlurmExecutor(folder=folder, max_num_timeout=0)
        executor.update_parameters(**make_slurm_parameters(shape, extra))
        job = executor.submit(SlurmTask([*command, "--distributed"]))
    except (RuntimeError, OSError) as error:  # sbatch refused
        reason = " ".join(str(error).split())
        raise UsageError(f"launch slurm: sbatch did not take it: {reason}") from None
    emit(f"submitted job {job.job_id}; output: {job.paths.stdout}")


def make_logs(text: str) -> Path:
    """The folder of --logs, which is made if it is missing. Raises UsageError."""
    try:
        Path(text).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=text or ".").close()
    except OSError as error:
        raise UsageError(
            f"--logs={text}: cannot be written ({describe_error(error)}); choose another folder"
        ) from None
    return Path(text).resolve()


# ---- kubernetes ----


def make_kubernetes_flags() -> Flags:
    from gpt_jax.cluster import TPU_NODES

    flags = Flags(prog="gpt-jax launch kubernetes", description=LAUNCHERS["kubernetes"][1])
    flags.add_argument("--image", required=True, help="made from launch/Dockerfile")
    flags.add_argument(
        "--name", default="gpt-jax", help="of the JobSet: lower-case letters, digits, dashes"
    )
    flags.add_argument("--nodes", type=int, default=1, help="machines with GPUs")
    flags.add_argument("--gpus_per_node", type=int, default=0, help="one process for each")
    flags.add_argument(
        "--tpu_topology",
        metavar="KIND:SHAPE",
        help=f"a GKE TPU slice, as in v6e:4x4; kinds: {', '.join(TPU_NODES)}",
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

    return flags


def kubernetes(arguments: list[str]) -> None:
    """Prints a manifest that runs the command. Raises UsageError."""
    from gpt_jax.cluster import KubernetesOptions, dump_yaml, make_jobset

    args, rest = split(make_kubernetes_flags(), arguments)
    check_range(args, "nodes", "slices", "grace_seconds")
    if not args.image or re.search(r"\s", args.image):
        raise UsageError(
            f"--image={args.image}: expected the name of the one that was made from "
            "launch/Dockerfile"
        )
    check_range(args, "gpus_per_node", "restarts", least=0)
    options = KubernetesOptions(
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
    )
    jobset = make_jobset(options, rest)

    refuse_places(rest, "--cpu_devices")
    slices = args.slices if args.tpu_topology else 0
    check_volumes(check_train(rest, count_devices(args), slices=slices), args.volume)
    emit(dump_yaml(jobset).rstrip("\n"))


def check_volumes(flag: str, volumes: list[str]) -> None:
    """Raises UsageError if the folder of a flag, if there is one, lies in no volume."""
    # The path is one of the pod, so this machine's links do not count.
    name, _, folder = flag.partition("=")
    inside = Path(posixpath.normpath(re.sub("^/+", "/", folder)))
    if flag and not any(inside.is_relative_to(path) for path in parse_mounts(volumes)):
        raise UsageError(
            f"{flag}: lies in no --volume, and a pod's own disk is lost with it; "
            f"as in --volume=CLAIM:/data -- train {name}=/data/{inside.name}"
        )


def count_devices(args: argparse.Namespace) -> int:
    """JAX's devices of the whole job. Raises UsageError for a slice that nobody offers."""
    if not args.tpu_topology:
        return args.nodes * args.gpus_per_node
    from gpt_jax.plan import parse_topology

    return parse_topology(args.tpu_topology, args.slices, "--tpu_topology").devices


# name -> (what runs it, its help)
LAUNCHERS = {
    "local": (local, "several processes on this machine, restarted where that helps"),
    "slurm": (slurm, "submits a job to SLURM, requeued where that helps"),
    "kubernetes": (kubernetes, "writes a JobSet for Kubernetes to standard output"),
}
