"""How this process becomes one of a job of several, and learns that another is gone."""

import ctypes
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from gpt_jax.cluster.place import JobFlags, own_devices, place_of
from gpt_jax.cluster.rendezvous import Place, meet
from gpt_jax.errors import Exit, PeerFailed, UsageError

ABORT_HANDLERS = []  # C keeps an address only, so they must never be collected


@contextmanager
def tell_problems(flags: JobFlags, environ: Mapping[str, str]) -> Iterator[None]:
    """Tells the others of the job what this process finds wrong in here, before it joins.

    They would otherwise wait for it.
    """
    try:
        yield
    except Exit as error:
        place = place_of(flags, environ)
        if place and place.processes > 1:
            meet(place, flags.join_seconds, failed=error)
        raise


def join_job(flags: JobFlags, environ: Mapping[str, str]) -> None:
    """Makes this process one of a job.

    Raises PeerFailed if the others do not turn up within `--join_seconds`, and UsageError if they
    do not fit together.
    """
    import jax
    from jax.experimental import multihost_utils

    from gpt_jax.cluster.job import JOBS, Membership

    place = place_of(flags, environ)
    seconds = flags.join_seconds
    with tell_problems(flags, environ):
        devices = own_devices(flags, environ)
    keep_stdout()

    where = ""
    if place:
        meet(place, seconds)
        where = f" at {place.address}"
    leave_on_abort(
        f"the processes of this job did not all meet{where} within --join_seconds={seconds}: "
        "one has failed (its log has the reason)"
    )
    start_jax(place, devices, flags)
    if jax.process_count() > 1:
        JOBS.append(Membership())
    check_devices()

    # The processes connect here. The first exchange waits 30 s for the others, and later ones as
    # long as it takes, to prepare data say.
    multihost_utils.sync_global_devices("joined")
    leave_on_abort(
        "aborted: usually {gone} (killed, or its machine failed; its log may have the reason). "
        "If it is not, the lines above show a fault of this process itself"
    )


def start_jax(place: Place | None, devices: list[int] | None, flags: JobFlags) -> None:
    """Starts JAX's part of a job. Raises UsageError if there is no place and JAX finds none."""
    import jax

    address = place.address if place else None
    if place and place.processes == 1:
        # A process that meets only itself need not find its machine's name in the network.
        address = f"127.0.0.1:{place.address.rpartition(':')[2]}"
    try:
        jax.distributed.initialize(
            coordinator_address=address,
            num_processes=place.processes if place else None,
            process_id=place.process if place else None,
            local_device_ids=devices,
            # Without it JAX would take SLURM's word for the place.
            cluster_detection_method="deactivate" if place else None,
            initialization_timeout=flags.join_seconds,
            heartbeat_timeout_seconds=flags.heartbeat_seconds,
        )
    except ValueError as error:  # JAX has found no cluster.
        raise UsageError(
            f"--distributed: no TPU pod and no SLURM job found here ({error}); "
            "give --coordinator=HOST:PORT --num_processes=N --process_id=K"
        ) from None


def group_size() -> int:
    """The processes of JAX's process group; 1 without one. No device is opened."""
    # There is no public door, and jax.process_count() would open the devices.
    from jax._src import distributed

    state = distributed.global_state
    return 1 if state.client is None else state.num_processes or 1


def check_devices() -> None:
    """Raises UsageError, on all processes alike, if they bring different numbers of devices.

    No mesh of JAX has room for that.
    """
    import jax

    counts = Counter(device.process_index for device in jax.devices())
    fewest = min(counts, key=lambda process: counts[process])
    most = max(counts, key=lambda process: counts[process])
    if counts[fewest] != counts[most]:
        raise UsageError(
            "the processes of this job have different numbers of devices: "
            f"process {fewest} has {counts[fewest]}, process {most} has {counts[most]}; "
            "give each the same --cpu_devices, or as many accelerators"
        )


def leave_on_abort(line: str) -> None:
    """From now on abort() prints `line` and ends the process with exit code 40.

    "{gone}" in the line becomes what is known of who left. JAX's process group calls abort() when
    it finds a peer gone: at once if that was process 0, else when its heartbeats are missed. It
    does so in a thread of its own, where Python's signal handlers do not run. Its callback cannot
    be used (jaxlib 0.10: std::bad_cast). So C calls this handler.
    """
    from gpt_jax.cluster.job import GONE, JOBS

    def leave(_):
        try:
            gone = JOBS[0].gone() if JOBS else GONE
            os.write(2, f"gpt-jax: {line.replace('{gone}', gone)}\n".encode())
        finally:
            os._exit(PeerFailed.code)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(leave)
    ABORT_HANDLERS.append(handler)
    ctypes.CDLL(None).signal(signal.SIGABRT, handler)


def keep_stdout() -> None:
    """Keeps standard output for Python alone.

    What native code prints goes to standard error from now on. Gloo greets its peers on standard
    output, in the middle of a text or of JSON.
    """
    sys.stdout.flush()
    own = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = open(own, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)  # noqa: SIM115 (it stays open)
