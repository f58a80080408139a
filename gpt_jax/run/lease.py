"""One run at a time in a workdir at a URL.

Object stores have no locks. So a run writes `lease.json` there, again every RENEW_SECONDS. A lease
that nobody has renewed for LEASE_SECONDS counts for nothing. The clocks of the machines have to
agree within minutes.
"""

import json
import os
import socket
import time
import uuid
from collections.abc import Collection

from gpt_jax.errors import Busy
from gpt_jax.run.store import Store
from gpt_jax.schema import Misfit, read_json

LEASE = "lease.json"
LEASE_SECONDS = 300.0
RENEW_SECONDS = 60.0
# Of two runs that write at once, the later one has the file. So each looks again after a while.
SETTLE_SECONDS = 2.0
SCHEMA = {"token": "text", "host": "text", "process": "count", "time": "number"}
ENDED = 0.0  # the time in a lease that was given back


def read_lease(raw: bytes | None) -> dict | None:
    """A lease from its file. One that is not there, or cannot be read, is None."""
    try:
        return None if raw is None else read_json(raw, SCHEMA)
    except Misfit:
        return None


def is_held(lease: dict | None) -> bool:
    """Whether the run of a lease was at work not long ago."""
    if lease is None or lease["time"] == ENDED:
        return False
    return time.time() - lease["time"] < LEASE_SECONDS


class Lease:
    """The right to write into the folder of a store, under a token of its own."""

    def __init__(self, store: Store) -> None:
        self.token = uuid.uuid4().hex
        self._store = store

    def look(self) -> dict | None:
        """The lease that lies there. One that cannot be read counts as none."""
        return read_lease(self._store.read(LEASE))

    def _write(self, moment: float) -> None:
        lease = {
            "token": self.token,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "time": moment,
        }
        self._store.write(LEASE, json.dumps(lease).encode())

    def take(self, over: Collection[str]) -> str:
        """Takes the lease, and returns the token of the run before, or "".

        `over` are tokens of runs that are known to be over. Raises Busy if another run has it.
        """
        lease = self.look()
        if lease and lease["token"] not in over and is_held(lease):
            age = max(time.time() - lease["time"], 0)
            raise self._busy(lease, f"was there {age:.0f} s ago")
        self._write(time.time())
        time.sleep(SETTLE_SECONDS)
        self._check(self.look())
        return lease["token"] if lease else ""

    def renew(self) -> None:
        """Writes that the run is alive. Raises Busy if another run has taken the lease."""
        self._check(self.look())
        self._write(time.time())

    def release(self) -> None:
        """Gives the lease back, unless another run has it."""
        lease = self.look()
        if lease and lease["token"] == self.token:
            self._write(ENDED)

    def _check(self, lease: dict | None) -> None:
        if lease and lease["token"] != self.token:
            raise self._busy(lease, "has taken its lease")

    def _busy(self, lease: dict, what: str) -> Busy:
        return Busy(
            f"--workdir={self._store.url}: another run is training into it (process "
            f"{lease['process']} on {lease['host']} {what}); wait for it, stop it, or choose "
            "another --workdir; the lease of a run that was killed ends after "
            f"{LEASE_SECONDS:.0f} s"
        )
