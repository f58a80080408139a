"""Whether two runs measured the same, to the bit: their metrics.jsonl without what may differ.

    python tests/support/same_losses.py runs/before runs/after

Everything that is logged is compared: losses, gradient norms, samples. Only `time/`, `throughput/`
and `session/` may differ; the last tells where and when a run was started. Prints the first
difference of each quantity. Exit code 0: all values are equal, 1: some are not.
"""

import json
import sys
from pathlib import Path

MAY_DIFFER = ("time/", "throughput/", "session/")


def measured(workdir: Path) -> dict[tuple[int, str], object]:
    """{(step, quantity): value} of a run, without what may differ."""
    values = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for name, value in row.items():
            if name != "step" and not name.startswith(MAY_DIFFER):
                values[row["step"], name] = value
    return values


def differences(before: dict, after: dict) -> list[str]:
    """A line for each quantity that differs: the first step, and both values."""
    lines = {}
    for step, name in sorted(before.keys() | after.keys()):
        pair = before.get((step, name)), after.get((step, name))
        # repr, because nan is not equal to itself and 0.0 is equal to -0.0.
        if repr(pair[0]) != repr(pair[1]):
            lines.setdefault(name, f"{name} at step {step}: {pair[0]!r} before, {pair[1]!r} after")
    return list(lines.values())


def main(before: str, after: str) -> int:
    old = measured(Path(before))
    new = measured(Path(after))
    lines = differences(old, new)
    print("\n".join(lines) if lines else f"{len(new)} values equal to the bit")
    return 1 if lines or not new else 0


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python tests/support/same_losses.py WORKDIR WORKDIR")
    sys.exit(main(*sys.argv[1:]))
