"""The tables of tpu_steps.py in Markdown, and the figures of MaxText in them."""

# MaxText e591f30 with its recipe for Llama 3.1 8B on v6e-256 (rows of 8,192, fsdp 256, 4 rows a
# device), compiled by libtpu 0.0.42.1 and counted by gpt_jax/plan/program/, as ours are.
MAXTEXT = {
    "tokens": 32768,
    "work": {"matmuls": 2.326, "elementwise": 0.685, "copies": 0.462},
    "of_peak": 0.845,
    "schedule": {"open": 0.018, "kernels": 0.681, "step": 4.172, "mfu_full": 0.495},
}
MAXTEXT["schedule"]["mfu_causal"] = 0.440
# What MaxText publishes of that recipe, measured on v6e-256.
MEASURED = {"tokens": 32768, "step": 4.547, "mfu_full": 0.455, "mfu_causal": 0.404}
EIGHT = "llama:8b, v6e-256"
# Rows that stand beside a published MFU of the full map: (begin of our names, MaxText's run, MFU).
PUBLISHED = (
    (EIGHT, "Llama 3.1 8B, v6e-256", 0.455),
    ("llama:70b, v6e-256", "Llama 3.1 70B, v6e-256", 0.503),
    ("llama:70b, v5p-1024", "Llama 2 70B, 512 chips of v5p", 0.654),
)


def format_parts(rows: dict) -> list[str]:
    """Returns the table of one model, part by part: ours, MaxText's, and what was measured."""
    ours = {
        name.removeprefix(f"{EIGHT}, "): row
        for name, row in rows.items()
        if name.startswith(EIGHT) and "error" not in row
    }
    columns = [*ours.values(), MAXTEXT]
    titles = [*(f"ours, {name}" for name in ours), "MaxText", "MaxText, measured"]
    lines = [f"| | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]

    for title, show in PARTS.items():
        cells = [show(row) for row in columns]
        measured = MEASURED_PARTS.get(title, "")
        lines.append(f"| {title} | {' | '.join(cells)} | {measured} |")
    return lines


def _format_seconds(section: str, name: str):
    def show(row: dict) -> str:
        return f"{row[section][name]:.3f} s"

    return show


def _format_matmuls(row: dict) -> str:
    return f"{row['work']['matmuls']:.3f} s at {row['of_peak']:.1%} of peak"


def _format_rate(step: float, tokens: int) -> str:
    return f"{1e6 * step / tokens:.1f}"


def _format_mfu(schedule: dict) -> str:
    return f"{schedule['mfu_full']:.1%} / {schedule['mfu_causal']:.1%}"


RATE = "microseconds a token"
MFU = "MFU, full map / causal"
# Title of a line -> what it shows of a row.
PARTS = {
    "tokens a device and step": lambda row: f"{row['tokens']:,}",
    "matmul fusions": _format_matmuls,
    "elementwise": _format_seconds("work", "elementwise"),
    "copies": _format_seconds("work", "copies"),
    "open collectives": _format_seconds("schedule", "open"),
    "attention, by arithmetic": _format_seconds("schedule", "kernels"),
    "step": _format_seconds("schedule", "step"),
    RATE: lambda row: _format_rate(row["schedule"]["step"], row["tokens"]),
    MFU: lambda row: _format_mfu(row["schedule"]),
}
MEASURED_PARTS = {
    "tokens a device and step": f"{MEASURED['tokens']:,}",
    "step": f"{MEASURED['step']:.3f} s",
    RATE: _format_rate(MEASURED["step"], MEASURED["tokens"]),
    MFU: _format_mfu(MEASURED),
}


def format_steps(rows: dict) -> list[str]:
    """Returns the table of all rows, each beside the MFU that MaxText publishes."""
    titles = (
        "our step",
        "CPU time of the command",
        "peak GiB",
        "step",
        RATE,
        MFU,
        "MaxText, full map, measured",
    )
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name, row in rows.items():
        published = [f"{run}: {mfu:.1%}" for begin, run, mfu in PUBLISHED if name.startswith(begin)]
        if "error" in row:
            lines.append(f"| {name} | {row['error'][:120]} | | | | | {published[0]} |")
            continue

        schedule = row["schedule"]
        cells = [
            name,
            f"{row['cpu_seconds']} s",
            f"{row['peak'] / 2**30:.1f}",
            f"{schedule['step']:.3f} s",
            _format_rate(schedule["step"], row["tokens"]),
            _format_mfu(schedule),
            published[0],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
