"""What the processes of a job tell each other (floor 2; called by checkpoint, digest, experiment
and loop)."""

import hashlib
import json

import jax
import numpy as np
from jax.experimental import multihost_utils

from gpt_jax.errors import Exit, PeerFailed, exit_of

MESSAGE_BYTES = 4096  # of one `agree`: one shape, hence one compilation


def agree_on(decide):
    """`decide()` (a JSON value) as process 0 finds it, on every process; exceptions too. All
    processes must call it.

    An `Exit` raised by process 0 is raised everywhere with the same text; any other exception
    stays its own there and is PeerFailed elsewhere. With one process this is a plain call."""
    if jax.process_count() == 1:
        return decide()
    verdict, crash = {}, None
    if jax.process_index() == 0:
        try:
            verdict = {"value": decide()}
            if len(json.dumps(verdict)) > MESSAGE_BYTES:
                raise ValueError(
                    f"{len(json.dumps(verdict))} bytes do not fit into one message of {MESSAGE_BYTES}"
                )
        except Exit as error:
            verdict = {"code": error.code, "text": str(error)}
        except Exception as error:  # raised below, once the others know
            verdict, crash = (
                {"code": PeerFailed.code, "text": f"process 0 failed: {error!r}"},
                error,
            )
    while (
        len(message := json.dumps(verdict).encode()) > MESSAGE_BYTES
    ):  # escapes count, so cut until it fits
        verdict["text"] = verdict["text"][: len(verdict["text"]) // 2] + " …"
    message = np.frombuffer(message.ljust(MESSAGE_BYTES), np.uint8)
    verdict = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(message)).tobytes())
    if crash is not None:
        raise crash
    if "code" in verdict:
        raise exit_of(verdict["code"], verdict["text"])
    return verdict["value"]


def find_disagreements(facts: dict[str, object]) -> list[str]:
    """The names whose values are not the same on every process, the same list everywhere.
    `facts`: values that `repr` tells apart, under the same names in the same order on all
    processes, which must all call this."""
    if jax.process_count() == 1:
        return []
    mine = np.stack(
        [
            np.frombuffer(hashlib.sha256(repr(value).encode()).digest(), np.uint8)
            for value in facts.values()
        ]
    )
    everyone = np.asarray(multihost_utils.process_allgather(mine))  # [processes, facts, 32]
    return [
        name for name, values in zip(facts, everyone.swapaxes(0, 1)) if (values != values[0]).any()
    ]
