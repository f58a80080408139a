"""Requests to stop that come while nothing can be saved: once, and never at the very end."""

import signal

REQUESTS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def ignore_requests() -> None:
    """From now on no request to stop interrupts the end of this process, whose code is decided.

    Python gives handlers of its own back before the process has ended, and a signal would then
    end it. What is ignored stays ignored.
    """
    for number in REQUESTS:
        signal.signal(number, signal.SIG_IGN)


def interrupt_once() -> None:
    """Lets the first request raise KeyboardInterrupt here, and ignores all that follow it.

    A shell ignores Ctrl-C for what it starts in the background, and that stays so.
    """

    def interrupt(*_) -> None:
        ignore_requests()
        raise KeyboardInterrupt

    for number in REQUESTS:
        if number != signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, interrupt)
