"""What the tests of launchers share: a run for them, and parts of a JobSet."""

import runs

LAUNCH = runs.ROOT / "launch"
LLAMA = f"--config={runs.ROOT}/configs/llama.py:1b"
LLAMA_RUN = ["train", LLAMA, "--workdir=/w/runs", "--config.data.path=/w/text"]


def parts(made):
    """The job of a JobSet, its spec, the spec of its pod, and that of the container."""
    (job,) = made["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    return job, spec, spec["template"]["spec"], spec["template"]["spec"]["containers"][0]
