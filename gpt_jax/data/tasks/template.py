"""Chat templates of Hugging Face, rendered by a process of their own.

A template is a program of somebody else. It runs in Jinja's sandbox, and in a process that has
bounded memory and is ended after SECONDS, because the sandbox bounds neither.
"""

import atexit
import contextlib
import functools
import json
import os
import select
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpt_jax.data.tasks.options import Pairs
from gpt_jax.errors import UsageError, install_command, plain

# The longest that one conversation may take. Usual templates take some milliseconds.
SECONDS = 20.0
LARGEST_TEXT = 8 << 20  # characters of one answer
MEMORY = 1 << 29  # bytes of address space


class Render(NamedTuple):
    """Messages to be written, perhaps up to the place where the assistant begins to write."""

    messages: Sequence[dict[str, str]]
    add_generation_prompt: bool


def render_chats(template: str, tokens: Pairs, renders: Sequence[Render]) -> list[str]:
    """What a template makes of each. `tokens` are variables of the template.

    Raises ValueError for a template that fails, that takes too long, or that writes too much.
    Raises UsageError if Jinja is not installed.
    """
    asked = {
        "template": template,
        "tokens": dict(tokens),
        "renders": [render._asdict() for render in renders],
    }
    worker = _start(os.getpid())
    answer = _ask(worker, json.dumps(asked))
    if answer is None:
        stop()
        raise ValueError(
            f"the chat template took more than {SECONDS:g} s or {MEMORY >> 20} MiB; give another "
            "template"
        )
    if answer.get("missing"):
        raise UsageError(
            "--task=chat: a chat template needs the package jinja2; "
            f"{install_command('jinja2')}, or give --task_options template=chatml"
        )
    if "error" in answer:
        raise ValueError(f"the chat template fails: {plain(answer['error'])}")
    return answer["texts"]


@functools.lru_cache(1)
def _start(owner: int) -> subprocess.Popen:
    """The process that renders for the process `owner`. It ends when its input does.

    A fork does not share it, because the answers would be mixed up.
    """
    path = Path(__file__).with_name("template_worker.py")
    # -P: the folder of the file holds modules whose names might hide those of others.
    command = [sys.executable, "-P", str(path), str(MEMORY), str(LARGEST_TEXT)]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    atexit.register(worker.kill)
    return worker


def stop() -> None:
    """Ends the process. The next call starts another one."""
    worker = _start(os.getpid())
    _start.cache_clear()
    worker.kill()
    worker.wait()
    for stream in (worker.stdin, worker.stdout):
        if stream:
            with contextlib.suppress(OSError):
                stream.close()


def _ask(worker: subprocess.Popen, line: str) -> dict[str, Any] | None:
    """The answer to a line, or None if there is none in time."""
    assert worker.stdin and worker.stdout
    with contextlib.suppress(OSError):
        worker.stdin.write(f"{line}\n".encode())
        worker.stdin.flush()
        ready, _, _ = select.select([worker.stdout], [], [], SECONDS)
        # The worker writes a line at once, so the rest of it does not keep this process waiting.
        answer = worker.stdout.readline() if ready else b""
        if answer.endswith(b"\n"):
            return json.loads(answer)
    return None
