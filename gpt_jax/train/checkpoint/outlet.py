"""Where finished checkpoints go beside the disk: nowhere, or to a store that the caller knows."""

import concurrent.futures
from collections.abc import Callable

from gpt_jax.cluster import agree_on

SENDING_SECONDS = 1.0  # between two questions of how far the sending is


class Outlet:
    """Keeps finished steps on the disk alone. A kind that sends them has the same methods.

    `metrics` are the steps that were sent earlier, and their value of the best metric or None.
    `is_away` says that steps are sent, so that the disk needs to keep the newest one alone.
    Process 0 alone calls `send` and `remove`.
    """

    is_away = False
    metrics: dict[int, float | None] = {}  # noqa: RUF012 (it stays empty)

    def send(self, step: int) -> None:
        """Sends a finished step. Raises Exit."""

    def remove(self, step: int) -> None:
        """Deletes a step that was sent."""

    def progress(self) -> int:
        """A number that grows while something is sent."""
        return 0

    def check(self) -> None:
        """Raises Exit if nothing may be sent any more."""


NOWHERE = Outlet()


def wait_for(sealed: concurrent.futures.Future, outlet: Outlet, beat: Callable[[], None]) -> None:
    """Waits for a step that is being sent. All processes call it.

    Sending may take longer than a run may stand still. So `beat` tells the watchdog of all
    processes whenever process 0 has sent something.
    """
    before = -1
    while outlet.is_away:
        is_done, sent = agree_on(lambda: [sealed.done(), outlet.progress()])
        if sent > before:
            beat()
        before = sent
        if is_done:
            return
        concurrent.futures.wait([sealed], SENDING_SECONDS)
