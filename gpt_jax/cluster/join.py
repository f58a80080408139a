"""This process as one of a job of several: where its place comes from, and how it learns that
another is gone (called by flags and train)."""

import ctypes
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from gpt_jax.cluster.place import JobFlags, own_devices, place_of
from gpt_jax.cluster.rendezvous import meet
from gpt_jax.errors import Exit, PeerFailed, UsageError

ABORT_HANDLERS = []  # C keeps an address only, so they must never be collected


@contextmanager
def tell_problems(flags: JobFlags, environ: Mapping[str, str]) -> Iterator[None]:
    """What a process of a job finds wrong before it joins is told to the others, who would wait
    for it."""
    try:
        yield
    except Exit as error:
        place = place_of(flags, environ)
        if place and place.processes > 1:
            meet(place, flags.join_seconds, failed=error)
        raise


def join_job(flags: JobFlags, environ: Mapping[str, str]) -> None:
    """Makes this process one of a job. Raises PeerFailed when the others do not turn up within
    `--join_seconds`."""
    import jax
    from jax.experimental import multihost_utils

    from gpt_jax.cluster.job import JOBS, Membership

    place, seconds = place_of(flags, environ), flags.join_seconds
    with tell_problems(flags, environ):
        devices = own_devices(flags, environ)
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
            heartbeat_timeout_seconds=flags.heartbeat_seconds,
        )
    except ValueError as error:  # JAX found no cluster
        raise UsageError(
            f"--distributed: no TPU pod and no SLURM job found here ({error}); give --coordinator=HOST:PORT "
            "--num_processes=N --process_id=K"
        ) from None
    if jax.process_count() > 1:
        JOBS.append(Membership())
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
    from gpt_jax.cluster.job import JOBS

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
