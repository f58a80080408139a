"""Pages that stand alone: `report.html`, and the frame and tables of others."""

import base64
import html
import re
from collections.abc import Mapping, Sequence

from gpt_jax.metrics.plot import PHASE_COLORS, draw_details
from gpt_jax.metrics.sessions import Session, find_sessions, session_seconds
from gpt_jax.metrics.summary import Summary, by_size, find_texts, headlines
from gpt_jax.metrics.writers import duration

CSS = """
body{margin:0;background:#f5f7fa;color:#1f2933}
body{font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","PingFang SC",
"Microsoft YaHei","Noto Sans CJK SC",sans-serif}
main{max-width:60rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:1.9rem;line-height:1.2;margin:0;overflow-wrap:anywhere}
.sub{color:#7b8794;margin:.3rem 0 1.8rem}
h2{font-size:1.1rem;margin:2.4rem 0 .8rem}
h3{font-size:.9rem;margin:1.1rem 0 .2rem;color:#52606d}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(13.5rem,1fr));gap:.75rem}
.tile,.card{background:#fff;border:1px solid #e4e7eb;border-radius:10px}
.tile{padding:.8rem 1rem}
.tile b{display:block;font-size:1.5rem;line-height:1.35;font-variant-numeric:tabular-nums}
.tile span{color:#52606d;font-size:.85rem}
.tile small{display:block;color:#7b8794;font-size:.78rem;line-height:1.4}
.tile.first{border-color:#d1495b}
.tile.first b{color:#d1495b}
.card{padding:1rem;margin:0 0 .75rem}
.card img{display:block;width:100%;height:auto}
.step{color:#7b8794;font-size:.82rem;margin:0 0 .4rem}
pre{margin:0;white-space:pre-wrap;overflow-wrap:anywhere}
pre{font:13.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"Noto Sans Mono CJK SC",monospace}
pre+pre{border-top:1px dashed #e4e7eb;margin-top:.7rem;padding-top:.7rem}
pre mark{background:#e3eefa;color:#1d4f86;border-radius:3px;box-decoration-break:clone}
.bar{display:flex;height:1.1rem;border-radius:6px;overflow:hidden;margin-bottom:.7rem}
.legend{display:flex;flex-wrap:wrap;gap:.3rem 1.2rem;font-size:.88rem}
.legend{font-variant-numeric:tabular-nums}
.legend i{display:inline-block;width:.75rem;height:.75rem;border-radius:3px}
.legend i{margin-right:.4rem;vertical-align:-1px}
summary{cursor:pointer;font-weight:600}
table{border-collapse:collapse;width:100%;font-size:.88rem}
th{text-align:left;color:#52606d;font-weight:600;padding:.22rem .8rem .22rem 0}
td{padding:.22rem .8rem .22rem 0;vertical-align:top}
td{border-top:1px solid #f0f2f5;overflow-wrap:anywhere;white-space:pre-line}
td:first-child{color:#52606d;width:15rem}
"""
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")

SAMPLE_STEPS = 8  # shown of a run that has sampled more often

# The facts of a session that the page tells, and their names there.
ORIGIN = {
    "command": "command",
    "preset": "differs from the preset",
    "changed": "differs from the session before",
    "began": "began",
    "host": "host",
    "devices": "devices",
    "code": "code",
    "data": "data",
}


def escape(value) -> str:
    """Text for HTML. Control characters, which a byte-level model may emit, are replaced."""
    clean = CONTROLS.sub("\ufffd", str(value).replace("\r\n", "\n"))
    return html.escape(clean)


def make_html(
    title: str,
    summary: Summary,
    png: bytes,
    rows: Sequence[Mapping],
    samples: Sequence[Mapping],
    config: Mapping,
    versions: Mapping[str, str],
) -> str:
    """One HTML page that needs nothing else: no script, no link, the pictures inside.

    `png` is the picture of the loss, and `rows` are those of metrics.jsonl. `config` is the
    resolved one, as nested values. All texts are escaped.
    """
    prompts = config.get("eval", {}).get("sample_prompts", ())
    sets = [name for name, _ in config.get("eval", {}).get("sets", ())]
    by_source, by_set = find_texts(rows, sets)
    body = [
        format_tiles(summary),
        f"<h2>Loss</h2>{format_picture(png, 'loss over steps')}",
        format_texts("Held-out text by source", "source", by_source),
        format_texts("Held-out sets", "set", by_set),
        format_details(rows, sets),
        format_samples(samples, prompts),
        format_time_split(summary),
        format_run(rows, config, versions),
    ]
    return make_page(title, "trained with gpt_jax", "".join(body))


def make_page(title: str, subtitle: str, body: str) -> str:
    """A page around HTML that is escaped already. It needs nothing else."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}</title>"
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{CSS}</style></head><body><main><h1>{escape(title)}</h1>"
        f'<p class="sub">{escape(subtitle)}</p>{body}</main></body></html>\n'
    )


def format_tiles(summary: Summary) -> str:
    tiles = []
    for label, value, note in headlines(summary):
        first = " first" if label == "held-out bits per byte" else ""
        tiles.append(
            f'<div class="tile{first}"><span>{escape(label)}</span>'
            f"<b>{escape(value)}</b><small>{escape(note)}</small></div>"
        )
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def format_picture(png: bytes, what: str) -> str:
    data = base64.b64encode(png).decode()
    return f'<div class="card"><img alt="{what}" src="data:image/png;base64,{data}"></div>'


def format_table(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    """A table; an empty header is left out."""
    lines = []
    if header:
        lines.append("".join(f"<th>{escape(cell)}</th>" for cell in header))
    lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def format_pairs(values: Mapping) -> str:
    return format_table((), [*values.items()])


def format_texts(title: str, what: str, texts: Mapping[str, Mapping[str, float]]) -> str:
    """The last held-out numbers of each of several texts, which are sources or sets."""
    if not texts:
        return ""
    metrics = [*dict.fromkeys(metric for row in texts.values() for metric in row)]
    lines = []
    for text, row in texts.items():
        lines.append([text, *(f"{row[name]:.4f}" if name in row else "" for name in metrics)])
    header = [what, *(name.replace("_", " ") for name in metrics)]
    return f'<h2>{title}</h2><div class="card">{format_table(header, lines)}</div>'


def format_details(rows: Sequence[Mapping], sets: Sequence[str]) -> str:
    png = draw_details(rows, sets)
    if png is None:
        return ""
    return f"<h2>Rates, norms and loads</h2>{format_picture(png, 'rates, norms and loads')}"


def format_samples(
    samples: Sequence[Mapping], prompts: Sequence[str] = (), shown: int = SAMPLE_STEPS
) -> str:
    """Samples by step, their prompts marked.

    When there are many, `shown` steps spread evenly, the first and the last among them.
    """
    steps = sorted({sample["step"] for sample in samples})
    if not steps:
        return ""

    note = ""
    if len(steps) > shown:
        note = f" ({shown} of {len(steps)} times; all are in metrics.jsonl)"
        steps = [steps[i * (len(steps) - 1) // (shown - 1)] for i in range(shown)]
    cards = []
    for step in steps:
        texts = [sample["text"] for sample in samples if sample["step"] == step]
        marked = "".join(f"<pre>\n{mark_prompt(text, prompts)}</pre>" for text in texts)
        cards.append(f'<div class="card"><p class="step">step {step:,}</p>{marked}</div>')
    return f"<h2>Samples over time{note}</h2>{''.join(cards)}"


def mark_prompt(text: str, prompts: Sequence[str]) -> str:
    """`text` for HTML, with the longest of `prompts` that begins it set apart."""
    fitting = [prompt for prompt in prompts if prompt.strip() and text.startswith(prompt)]
    if not fitting:
        return escape(text)
    prompt = max(fitting, key=len)
    return f'<mark title="prompt">{escape(prompt)}</mark>{escape(text.removeprefix(prompt))}'


def format_time_split(summary: Summary) -> str:
    parts = by_size(summary.phases)
    if not parts:
        return ""
    bar = []
    legend = []
    for phase, part in parts:
        color = PHASE_COLORS[phase]
        bar.append(f'<div style="width:{part:.3%};background:{color}"></div>')
        legend.append(f'<span><i style="background:{color}"></i>{phase} {part:.1%}</span>')
    note = " in the last session" if (summary.sessions or 1) > 1 else ""
    return (
        f'<h2>Where the time went{note}</h2><div class="card"><div class="bar">{"".join(bar)}</div>'
        f'<div class="legend">{"".join(legend)}</div></div>'
    )


def format_run(rows: Sequence[Mapping], config: Mapping, versions: Mapping[str, str]) -> str:
    """Where the run comes from: its sessions, config, device and libraries."""
    sessions = find_sessions(rows)
    cards = []
    if sessions:
        cards.append(format_card("Where it comes from", format_origin(sessions[-1]), is_open=True))
    if len(sessions) > 1:
        table = format_session_table(sessions, session_seconds(rows))
        cards.append(format_card("Sessions", table, is_open=True))
    if config:
        cards.append(format_card("Configuration", format_config(config)))
    if versions:
        cards.append(format_card("Device and versions", format_pairs(versions), is_open=True))
    return f"<h2>The run</h2>{''.join(cards)}" if cards else ""


def format_card(title: str, content: str, is_open: bool = False) -> str:
    """A card that opens and closes."""
    state = " open" if is_open else ""
    return f'<details class="card"{state}><summary>{escape(title)}</summary>{content}</details>'


def format_origin(session: Session) -> str:
    facts = {
        label: session.facts[name] for name, label in ORIGIN.items() if session.facts.get(name)
    }
    return format_pairs(facts)


def format_session_table(sessions: Sequence[Session], seconds: Sequence[float]) -> str:
    """A row for each session, with what it did otherwise than the one before."""
    lines = []
    for session, wall in zip(sessions, seconds, strict=True):
        began, host, code, changed = (
            session.facts.get(name, "") for name in ("began", "host", "code", "changed")
        )
        step = f"{session.step:,}"
        lines.append([session.number, step, began, duration(wall), host, code, changed])
    header = ["session", "from step", "began", "wall time", "host", "code", "changed"]
    return format_table(header, lines)


def format_config(config: Mapping) -> str:
    top = {key: value for key, value in config.items() if not isinstance(value, Mapping)}
    sections = {key: value for key, value in config.items() if isinstance(value, Mapping)}
    tables = [f"<h3>{escape(key)}</h3>{format_pairs(value)}" for key, value in sections.items()]
    return format_pairs(top) + "".join(tables)
