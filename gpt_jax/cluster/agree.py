"""What the processes of a job tell each other."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from gpt_jax.errors import Exit, PeerFailed, exit_of

MESSAGE_BYTES = 4096  # of one `agree_on`: one shape, hence one compilation


def agree_on(decide: Callable[[], Any]) -> Any:
    """What `decide()` gives on process 0, a JSON value, on every process.

    All processes must call it. With one process this is a plain call. An `Exit` that process 0
    raises is raised everywhere with the same text. Any other exception stays its own there, and is
    PeerFailed elsewhere.
    """
    if jax.process_count() == 1:
        return decide()

    verdict: dict[str, Any] = {}
    crash = None
    if jax.process_index() == 0:
        try:
            verdict = {"value": decide()}
            size = len(json.dumps(verdict))
            if size > MESSAGE_BYTES:
                raise ValueError(f"{size} bytes do not fit into one message of {MESSAGE_BYTES}")
        except Exit as error:
            verdict = {"code": error.code, "text": str(error)}
        except Exception as error:  # raised below, once the others know
            verdict = {"code": PeerFailed.code, "text": f"process 0 failed: {error!r}"}
            crash = error

    message = np.frombuffer(encode_verdict(verdict).ljust(MESSAGE_BYTES), np.uint8)
    verdict = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(message)).tobytes())
    if crash is not None:
        raise crash
    if "code" in verdict:
        raise exit_of(verdict["code"], verdict["text"])
    return verdict["value"]


def encode_verdict(verdict: dict[str, Any]) -> bytes:
    """`verdict` as JSON of at most MESSAGE_BYTES, its text cut where that is too long."""
    message = json.dumps(verdict).encode()
    # Escapes count too, so the text is halved until it fits.
    while len(message) > MESSAGE_BYTES:
        text = verdict["text"]
        verdict = verdict | {"text": text[: len(text) // 2] + " …"}
        message = json.dumps(verdict).encode()
    return message


def exchange(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The report of every process, JSON values of at most MESSAGE_BYTES, in the order of processes.

    All processes must call it.
    """
    if jax.process_count() == 1:
        return [report]

    message = json.dumps(report).encode()
    if len(message) > MESSAGE_BYTES:
        raise ValueError(f"{len(message)} bytes do not fit into one message of {MESSAGE_BYTES}")
    mine = np.frombuffer(message.ljust(MESSAGE_BYTES), np.uint8)
    everyone = np.asarray(multihost_utils.process_allgather(mine))  # [processes, MESSAGE_BYTES]
    return [json.loads(row.tobytes()) for row in everyone]


def find_disagreements(facts: dict[str, object]) -> list[str]:
    """The names whose values are not the same on every process, the same list everywhere.

    All processes must call it, with the same names in the same order. Values are compared by
    `repr`.
    """
    if jax.process_count() == 1:
        return []

    digests = [hashlib.sha256(repr(value).encode()).digest() for value in facts.values()]
    mine = np.stack([np.frombuffer(digest, np.uint8) for digest in digests])
    everyone = np.asarray(multihost_utils.process_allgather(mine))  # [processes, facts, 32]
    differs = (everyone != everyone[0]).any(axis=(0, 2))
    return [name for name, is_different in zip(facts, differs, strict=True) if is_different]
