"""How far `gpt-jax prepare` is, for people who watch it."""

import contextlib
import sys
import time

from gpt_jax.errors import escape

# Seconds between two signs of progress, where standard error is no terminal, and on one.
LINE_SECONDS = 10.0
BAR_SECONDS = 0.2


class Display:
    """Progress for people on standard error: a bar on a terminal, else a line now and then."""

    def __init__(self):
        self.bar = None
        self.phase = ""
        self.phase_began = 0.0
        self.last_told = 0.0

    def say(self, line: str) -> None:
        """Prints a line.

        The work carries on if nobody reads it (`2>&1 | head`), or if the disk is full.
        """
        self.close()
        with contextlib.suppress(OSError):
            print(f"prepare: {escape(line)}", file=sys.stderr, flush=True)

    def show(self, progress) -> None:
        """Shows the progress, if it is time to. It may be called several times a second."""
        now = time.monotonic()
        if progress.phase != self.phase:
            self.close()
            self.phase = progress.phase
            self.phase_began = now
            self.last_told = now

        is_terminal = sys.stderr.isatty()
        if now - self.last_told < (BAR_SECONDS if is_terminal else LINE_SECONDS):
            return
        self.last_told = now

        seconds = max(now - self.phase_began, 1e-9)
        documents = progress.documents / seconds
        megabytes = progress.bytes / seconds / 1e6
        speed = f"{documents:,.0f} documents/s, {megabytes:,.2f} MB/s of text"
        if is_terminal:
            self._draw(progress, speed)
            return
        left = "the first units are under way"
        if progress.done:
            left = f"{seconds * (progress.total - progress.done) / progress.done:,.0f} s left"
        sizes = f"{progress.done / 1e6:,.0f} of {progress.total / 1e6:,.0f} MB of input"
        self.say(f"{progress.phase}: {sizes}, {speed}, {left}")

    def _draw(self, progress, speed: str) -> None:
        from tqdm import tqdm

        if self.bar is None:
            layout = (
                "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}B "
                "[{elapsed}<{remaining}]{postfix}"
            )
            self.bar = tqdm(
                total=progress.total,
                desc=progress.phase,
                unit_scale=True,
                bar_format=layout,
                leave=False,
            )
        self.bar.set_postfix_str(speed, refresh=False)
        self.bar.n = progress.done
        self.bar.refresh()

    def close(self) -> None:
        """Takes the bar away. The next `show` may make another one."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
