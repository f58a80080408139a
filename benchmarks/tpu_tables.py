"""The tables of tpu_options.py in Markdown."""


def format_programs(rows: dict, kind: str, titles: str) -> list[str]:
    """Returns the table of limits: milliseconds and part of the peak by program."""
    columns = titles.count("|") + 1
    lines = [
        f"| generation | limit (KiB) | {titles} | compiling (CPU) |",
        "|---" * (columns + 3) + "|",
    ]
    for row in rows.values():
        if row.get("kind") != kind:
            continue
        start = f"| {row['generation']} | {row['limit']} |"
        if "error" in row:
            lines.append(f"{start} {row['error'][:120]} |" + " |" * columns)
            continue

        programs = row["programs"].values()
        cells = [f"{one['milliseconds']:.2f} ms, {one['of_peak']:.0%}" for one in programs]
        if len(cells) > 1:
            together = sum(one["milliseconds"] for one in programs)
            cells.append(f"{together:.2f} ms")
        seconds = sum(one["compile_cpu_seconds"] for one in programs)
        lines.append(f"{start} {' | '.join(cells)} | {seconds:.0f} s |")
    return lines


def format_scans(rows: dict) -> list[str]:
    """Returns the table of collectives: what runs behind the computing, and what does not."""
    lines = [
        "| generation | options | computing | sent behind it | sent in the open | compiling (CPU) |",
        "|---" * 6 + "|",
    ]
    for row in rows.values():
        if row.get("kind") != "scan":
            continue
        start = f"| {row['generation']} | {row['name']} |"
        if "error" in row:
            lines.append(f"{start} {row['error'][:120]} | | | |")
            continue
        lines.append(
            f"{start} {row['computing_milliseconds']:.2f} ms | {row['hidden_bytes'] / 1e6:.0f} MB | "
            f"{row['open_bytes'] / 1e6:.0f} MB | {row['compile_cpu_seconds']:.0f} s |"
        )
    return lines
