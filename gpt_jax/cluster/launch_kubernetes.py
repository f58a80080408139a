"""Kubernetes: a JobSet (jobset.x-k8s.io/v1alpha2) for GPU nodes or GKE's TPU slices.

The manifest is plain data, which `dump_yaml` writes.
"""

import math
import posixpath
import re
from collections.abc import Iterable
from typing import NamedTuple

from gpt_jax.cluster.rendezvous import SECRET
from gpt_jax.errors import RESTART_SECONDS, RESTARTABLE, SIGNALLED, UsageError

PORT = 8476
# GKE's accelerator label, chips of a machine in slices of several, dims of the torus. The source is
# GKE's documentation of TPU node pools.
TPU_NODES = {
    "v4": ("tpu-v4-podslice", 4, 3),
    "v5e": ("tpu-v5-lite-podslice", 4, 2),
    "v5p": ("tpu-v5p-slice", 4, 3),
    "v6e": ("tpu-v6e-slice", 4, 2),
    "tpu7x": ("tpu7x", 4, 3),
}
ONE_MACHINE = {"v5e": (1, 4, 8), "v6e": (1, 4, 8)}  # chips of a slice that is one machine

CLAIM = r"(?=.{1,253}$)[a-z0-9]+(-+[a-z0-9]+)*(\.[a-z0-9]+(-+[a-z0-9]+)*)*"  # a DNS subdomain
# Paths of a pod that are taken: the system's, the memory that `container` mounts, the program.
RESERVED = ("/", "/dev", "/dev/shm", "/gpt_jax", "/proc", "/sys")
# A pod adds to the name of its JobSet, and its own name ends at 63 characters.
JOBSET_NAME = r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?"
TEXT_TAG = "tag:yaml.org,2002:str"
VARIABLE_NAME = "[A-Za-z_][A-Za-z0-9_]*"


class KubernetesOptions(NamedTuple):
    """What the flags of `gpt-jax launch kubernetes` say."""

    image: str
    name: str
    nodes: int
    gpus: int
    tpu: str | None  # KIND:SHAPE, as in "v6e:4x4"
    slices: int
    restarts: int
    grace: int
    volumes: tuple[str, ...] = ()
    env: tuple[str, ...] = ()


def make_jobset(options: KubernetesOptions, arguments: list[str]) -> dict:
    """The manifest that runs `gpt-jax` with `arguments`.

    Raises UsageError for options that do not fit together.
    """
    check_options(options)
    # A pod fills in $(NAME), and $$ is a $ for it.
    arguments = [word.replace("$", "$$") for word in arguments]
    job = tpu_job(options, options.tpu, arguments) if options.tpu else gpu_job(options, arguments)
    # The pod's exit code said so, see podFailurePolicy.
    hopeless = {
        "name": "hopeless",
        "action": "FailJobSet",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": options.name, "annotations": job.pop("annotations")},
        "spec": {
            # All processes start again together, and resume. Each attempt's pods have names of
            # their own in the logs.
            "failurePolicy": {"maxRestarts": options.restarts, "rules": [hopeless]},
            "network": {"enableDNSHostnames": True},
            "successPolicy": {"operator": "All"},
            "replicatedJobs": [job],
        },
    }


def check_options(options: KubernetesOptions) -> None:
    """Raises UsageError for options that do not fit together."""
    if not re.fullmatch(JOBSET_NAME, options.name):
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
            f"--nodes={options.nodes}: "
            f"--tpu_topology={options.tpu} says how many machines there are"
        )


def job_template(options: KubernetesOptions, pods: int, pod: dict) -> dict:
    """A Job of `pods` pods that ends with the first failure.

    It tells by the exit code whether it is worth a restart.
    """
    # After an eviction, or preemption of the node, the pod may end with any code. The job starts
    # again.
    disrupted = {
        "action": "Count",
        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
    }
    hopeless = {
        "action": "FailJob",
        "onExitCodes": {
            "containerName": "gpt-jax",
            "operator": "NotIn",
            "values": sorted(RESTARTABLE + SIGNALLED),
        },
    }
    pod_spec = {
        "restartPolicy": "Never",
        # The time from SIGTERM to the end: finish the step, save, exit with 10.
        "terminationGracePeriodSeconds": options.grace,
        **pod,
    }
    return {
        "spec": {
            "parallelism": pods,
            "completions": pods,
            "completionMode": "Indexed",
            "backoffLimit": 0,
            "podFailurePolicy": {"rules": [disrupted, hopeless]},
            "template": {"spec": pod_spec},
        }
    }


def pod_value(name: str, kind: str, key: str) -> dict:
    """The environment variable `name` with what the pod's annotations or labels have at `key`."""
    return {
        "name": name,
        "valueFrom": {"fieldRef": {"fieldPath": f"metadata.{kind}['{key}']"}},
    }


def wait_before(command: list[str]) -> list[str]:
    """`command` behind the wait of the restart policy. A JobSet has none: it only counts."""
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
    """The claim at each path, of --volume.

    Raises UsageError for a text that is no CLAIM:/PATH, and for a path that is taken.
    """
    claims: dict[str, str] = {}
    for text in volumes:
        claim, _, mount = text.partition(":")
        if not (re.fullmatch(CLAIM, claim) and re.fullmatch("/([^/:][^:]*)?", mount)):
            raise UsageError(
                f"--volume={text}: expected CLAIM:/PATH, with a claim of lower-case letters, "
                "digits, '-' and '.'"
            )
        path = posixpath.normpath(mount)
        if path in RESERVED or path in claims:
            owner = f"--volume={claims[path]}:{path}" if path in claims else "the pod itself"
            raise UsageError(f"--volume={text}: {path} is taken by {owner}; choose another path")
        claims[path] = claim
    return claims


def make_variables(own: list[dict], texts: Iterable[str]) -> list[dict]:
    """The launcher's `own` environment variables and those of --env.

    Raises UsageError for a text that is no NAME=VALUE, and for a name that is set already.
    """
    variables = {item["name"]: item for item in own}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (equals and re.fullmatch(VARIABLE_NAME, name)):
            raise UsageError(
                f"--env={text}: expected NAME=VALUE, with a NAME of letters, digits and '_'"
            )
        if name in variables:
            how = "twice" if "value" in variables[name] else "by the launcher"
            raise UsageError(f"--env={text}: {name} is set {how}; leave it out")
        variables[name] = {"name": name, "value": value}
    return [*variables.values()]


def container(
    options: KubernetesOptions, command: list[str], limits: dict, env: list[dict]
) -> dict:
    """The one container of a pod, with the pod's volumes beside it."""
    claims = parse_mounts(options.volumes)
    # A volume's name may hold no dot, and a claim's may.
    names = {claim: f"volume-{k}" for k, claim in enumerate(dict.fromkeys(claims.values()))}
    mounts = [{"name": names[claim], "mountPath": path} for path, claim in claims.items()]
    volumes = [
        {"name": name, "persistentVolumeClaim": {"claimName": claim}}
        for claim, name in names.items()
    ]
    # Memory that NCCL and the data workers share.
    memory = {"name": "shared-memory", "emptyDir": {"medium": "Memory"}}
    attempt = pod_value("RESTART_ATTEMPT", "annotations", "jobset.sigs.k8s.io/restart-attempt")
    return {
        "containers": [
            {
                "name": "gpt-jax",
                "image": options.image,
                "command": wait_before(command),
                "env": make_variables([attempt, *env], options.env),
                "resources": {"limits": limits},
                "volumeMounts": [{"name": memory["name"], "mountPath": "/dev/shm"}, *mounts],
            }
        ],
        "volumes": [memory, *volumes],
    }


def gpu_job(options: KubernetesOptions, arguments: list[str]) -> dict:
    """One pod a machine, and in it `gpt-jax launch local` with one process a GPU.

    Pod 0 has the coordinator.
    """
    node = pod_value("NODE", "annotations", "batch.kubernetes.io/job-completion-index")
    # All pods have the same one, each attempt has another one, and a stranger cannot guess it.
    secret = pod_value(SECRET, "labels", "batch.kubernetes.io/controller-uid")
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
    pod = container(options, command, {"nvidia.com/gpu": options.gpus}, [node, secret])
    pod["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    return {
        "name": "worker",
        "replicas": 1,
        "annotations": {},
        "template": job_template(options, options.nodes, pod),
    }


def tpu_job(options: KubernetesOptions, tpu: str, arguments: list[str]) -> dict:
    """One Job a slice, and one pod a machine of it.

    GKE tells the pods of a JobSet their places, and JAX reads them. Raises UsageError for a slice
    that GKE does not offer.
    """
    kind, _, shape = tpu.lower().partition(":")
    if kind not in TPU_NODES:
        raise UsageError(
            f"--tpu_topology={tpu}: expected KIND:SHAPE, with KIND one of {', '.join(TPU_NODES)}"
        )
    label, chips, dims = TPU_NODES[kind]
    if not re.fullmatch("x".join([r"[1-9]\d*"] * dims), shape):
        raise UsageError(f"--tpu_topology={tpu}: expected {kind}:{'x'.join('N' * dims)}")
    size = math.prod(map(int, shape.split("x")))
    if size in ONE_MACHINE.get(kind, ()) or size < chips:
        chips = size
    if size % chips:
        raise UsageError(f"--tpu_topology={tpu}: {size} chips are no whole machines of {chips}")

    command = ["gpt-jax", *arguments, "--distributed"]
    pod = container(options, command, {"google.com/tpu": chips}, [])
    pod["nodeSelector"] = {
        "cloud.google.com/gke-tpu-accelerator": label,
        "cloud.google.com/gke-tpu-topology": shape,
    }
    # The host's own network is that between slices at full speed.
    pod["hostNetwork"] = True
    pod["dnsPolicy"] = "ClusterFirstWithHostNet"
    topology = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    return {
        "name": "slice",
        "replicas": options.slices,
        "annotations": topology,
        "template": job_template(options, size // chips, pod),
    }


def dump_yaml(manifest: dict) -> str:
    """The manifest as YAML that readers of YAML 1.1 and of YAML 1.2 take for the same.

    They differ on what a word without quotes is: y, 1e3, 0o17 and 1:30 are text to one of them and
    a truth value or a number to the other. So every text has quotes, or is a block of lines.
    """
    import yaml

    class Quoting(yaml.SafeDumper):
        pass

    def represent_text(dumper, text: str):
        is_script = text.endswith("\n") and not text[0].isspace()
        return dumper.represent_scalar(TEXT_TAG, text, style="|" if is_script else '"')

    Quoting.add_representer(str, represent_text)
    # A folded line is legal YAML. Nobody can read it, though.
    return yaml.dump(manifest, Dumper=Quoting, sort_keys=False, width=math.inf)
