"""Kubernetes: a JobSet (jobset.x-k8s.io/v1alpha2) for GPU nodes or GKE's TPU slices, as plain
data."""

import math
import posixpath
import re
from collections.abc import Iterable
from typing import NamedTuple

from gpt_jax.errors import RESTART_SECONDS, RESTARTABLE, SIGNALLED, UsageError

PORT = 8476
# GKE's accelerator label, chips of a machine in slices of several, dims of the torus. From GKE's
# documentation of TPU node pools.
TPU_NODES = {
    "v4": ("tpu-v4-podslice", 4, 3),
    "v5e": ("tpu-v5-lite-podslice", 4, 2),
    "v5p": ("tpu-v5p-slice", 4, 3),
    "v6e": ("tpu-v6e-slice", 4, 2),
    "tpu7x": ("tpu7x", 4, 3),
}
ONE_MACHINE = {"v5e": (1, 4, 8), "v6e": (1, 4, 8)}  # chips of a slice that is one machine

CLAIM = r"(?=.{1,253}$)[a-z0-9]+(-+[a-z0-9]+)*(\.[a-z0-9]+(-+[a-z0-9]+)*)*"  # a DNS subdomain
RESERVED = (
    "/",
    "/dev",
    "/dev/shm",
    "/gpt_jax",
    "/proc",
    "/sys",
)  # the system's, the memory of `container`, the program


class KubernetesOptions(NamedTuple):
    """What the flags of `gpt-jax launch kubernetes` say. `tpu`: "v6e:4x4" or None."""

    image: str
    name: str
    nodes: int
    gpus: int
    tpu: str | None
    slices: int
    restarts: int
    grace: int
    volumes: tuple[str, ...] = ()
    env: tuple[str, ...] = ()


def make_jobset(options: KubernetesOptions, arguments: list[str]) -> dict:
    """The manifest that runs `gpt-jax` with `arguments`. Raises UsageError."""
    if not re.fullmatch(
        r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", options.name
    ):  # pods add to it, and names end at 63
        raise UsageError(
            f"--name={options.name}: expected lower-case letters, digits and dashes, at most 40"
        )
    if bool(options.gpus) == bool(options.tpu):
        raise UsageError(
            f"--gpus_per_node={options.gpus} --tpu_topology={options.tpu}: give one of the two"
        )
    if options.gpus and options.slices > 1:
        raise UsageError(
            f"--slices={options.slices}: slices are of TPUs; GPU machines are counted by --nodes"
        )
    if options.tpu and options.nodes > 1:
        raise UsageError(
            f"--nodes={options.nodes}: --tpu_topology={options.tpu} says how many machines there are"
        )
    arguments = [
        word.replace("$", "$$") for word in arguments
    ]  # a pod's $(NAME) is filled in, and $$ is a $
    job = gpu_job(options, arguments) if options.gpus else tpu_job(options, arguments)
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": options.name, "annotations": job.pop("annotations")},
        "spec": {
            # All processes start again together, resuming; each attempt's pods have names of their
            # own in the logs.
            "failurePolicy": {
                "maxRestarts": options.restarts,
                "rules": [
                    # The pod's exit code said so (podFailurePolicy below).
                    {
                        "name": "hopeless",
                        "action": "FailJobSet",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "network": {"enableDNSHostnames": True},
            "successPolicy": {"operator": "All"},
            "replicatedJobs": [job],
        },
    }


def job_template(options: KubernetesOptions, pods: int, pod: dict) -> dict:
    """A Job of `pods` pods that ends with the first failure, and tells by the exit code whether
    it is worth a restart."""
    return {
        "spec": {
            "parallelism": pods,
            "completions": pods,
            "completionMode": "Indexed",
            "backoffLimit": 0,
            "podFailurePolicy": {
                "rules": [
                    # Eviction, preemption of the node: the pod may end with any code, the job
                    # starts again.
                    {
                        "action": "Count",
                        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                    },
                    {
                        "action": "FailJob",
                        "onExitCodes": {
                            "containerName": "gpt-jax",
                            "operator": "NotIn",
                            "values": sorted(RESTARTABLE + SIGNALLED),
                        },
                    },
                ]
            },
            "template": {
                "spec": {
                    "restartPolicy": "Never",
                    # SIGTERM: finish the step, save, exit with 10
                    "terminationGracePeriodSeconds": options.grace,
                    **pod,
                }
            },
        }
    }


def annotation(name: str, key: str) -> dict:
    """The environment variable `name` with the value of the pod's annotation `key`."""
    return {
        "name": name,
        "valueFrom": {"fieldRef": {"fieldPath": f"metadata.annotations['{key}']"}},
    }


def patient(command: list[str]) -> list[str]:
    """`command` behind the wait of the restart policy, which a JobSet has not: it only counts."""
    first, most = RESTART_SECONDS
    script = f"""\
if [ "${{RESTART_ATTEMPT:-0}}" -gt 0 ]; then
    count=$((RESTART_ATTEMPT < 16 ? RESTART_ATTEMPT - 1 : 16))
    seconds=$(({first} << count))
    trap 'exit 143' TERM  # what runs first in a container ignores it otherwise
    sleep $((seconds < {most} ? seconds : {most})) &
    wait $!
    trap - TERM
fi
exec "$0" "$@"
"""
    return ["sh", "-c", script, *command]


def parse_mounts(volumes: Iterable[str]) -> dict[str, str]:
    """The claim at each path, of --volume. Raises UsageError."""
    made = {}
    for text in volumes:
        claim, _, given = text.partition(":")
        if not (re.fullmatch(CLAIM, claim) and re.fullmatch("/([^/:][^:]*)?", given)):
            raise UsageError(
                f"--volume={text}: expected CLAIM:/PATH, with a claim of lower-case letters, digits, '-' and '.'"
            )
        path = posixpath.normpath(given)
        if path in RESERVED or path in made:
            raise UsageError(
                f"--volume={text}: {path} is taken by "
                f"{f'--volume={made[path]}:{path}' if path in made else 'the pod itself'}; choose another path"
            )
        made[path] = claim
    return made


def variables(own: list[dict], texts: Iterable[str]) -> list[dict]:
    """The launcher's `own` and those of --env. Raises UsageError."""
    made = {item["name"]: item for item in own}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (equals and re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name)):
            raise UsageError(
                f"--env={text}: expected NAME=VALUE, with a NAME of letters, digits and '_'"
            )
        if name in made:
            raise UsageError(
                f"--env={text}: {name} is set {'twice' if 'value' in made[name] else 'by the launcher'}; leave "
                "it out"
            )
        made[name] = {"name": name, "value": value}
    return [*made.values()]


def container(
    options: KubernetesOptions, command: list[str], limits: dict, env: list[dict]
) -> dict:
    """The one container of a pod, with the pod's volumes beside it."""
    claims = parse_mounts(options.volumes)
    volumes = {
        claim: f"volume-{k}" for k, claim in enumerate(dict.fromkeys(claims.values()))
    }  # a claim's may hold no dot
    memory = {
        "name": "shared-memory",
        "emptyDir": {"medium": "Memory"},
    }  # NCCL, and the data workers
    return {
        "containers": [
            {
                "name": "gpt-jax",
                "image": options.image,
                "command": patient(command),
                "env": variables(
                    [annotation("RESTART_ATTEMPT", "jobset.sigs.k8s.io/restart-attempt"), *env],
                    options.env,
                ),
                "resources": {"limits": limits},
                "volumeMounts": [
                    {"name": memory["name"], "mountPath": "/dev/shm"},
                    *(
                        {"name": volumes[claim], "mountPath": path}
                        for path, claim in claims.items()
                    ),
                ],
            }
        ],
        "volumes": [
            memory,
            *(
                {"name": name, "persistentVolumeClaim": {"claimName": claim}}
                for claim, name in volumes.items()
            ),
        ],
    }


def gpu_job(options: KubernetesOptions, arguments: list[str]) -> dict:
    """One pod a machine, in it one process a GPU (`gpt-jax launch local`); pod 0 has the
    coordinator."""
    own = annotation("NODE", "batch.kubernetes.io/job-completion-index")
    # JobSet's name for pod 0: SET-JOB-REPLICA-POD.SUBDOMAIN
    host = f"{options.name}-worker-0-0.{options.name}"
    command = [
        "gpt-jax",
        "launch",
        "local",
        f"--processes={options.gpus}",
        f"--nodes={options.nodes}",
        "--node=$(NODE)",
        f"--coordinator={host}:{PORT}",
        *arguments,
    ]
    pod = container(options, command, {"nvidia.com/gpu": options.gpus}, [own])
    pod["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    return {
        "name": "worker",
        "replicas": 1,
        "annotations": {},
        "template": job_template(options, options.nodes, pod),
    }


def tpu_job(options: KubernetesOptions, arguments: list[str]) -> dict:
    """One Job a slice, one pod a machine of it. GKE tells the pods of a JobSet their places, JAX
    reads them."""
    kind, _, shape = options.tpu.lower().partition(":")
    if kind not in TPU_NODES:
        raise UsageError(
            f"--tpu_topology={options.tpu}: expected KIND:SHAPE, with KIND one of {', '.join(TPU_NODES)}"
        )
    label, chips, dims = TPU_NODES[kind]
    if not re.fullmatch("x".join([r"[1-9]\d*"] * dims), shape):
        raise UsageError(f"--tpu_topology={options.tpu}: expected {kind}:{'x'.join('N' * dims)}")
    size = math.prod(map(int, shape.split("x")))
    chips = size if size in ONE_MACHINE.get(kind, ()) or size < chips else chips
    if size % chips:
        raise UsageError(
            f"--tpu_topology={options.tpu}: {size} chips are no whole machines of {chips}"
        )
    pod = container(
        options, ["gpt-jax", *arguments, "--distributed"], {"google.com/tpu": chips}, []
    )
    pod["nodeSelector"] = {
        "cloud.google.com/gke-tpu-accelerator": label,
        "cloud.google.com/gke-tpu-topology": shape,
    }
    pod["hostNetwork"], pod["dnsPolicy"] = (
        True,
        "ClusterFirstWithHostNet",
    )  # the network between slices at full speed
    return {
        "name": "slice",
        "replicas": options.slices,
        "annotations": {
            "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
        },
        "template": job_template(options, size // chips, pod),
    }


def dump_yaml(manifest: dict) -> str:
    import yaml

    return yaml.safe_dump(manifest, sort_keys=False, width=120)
