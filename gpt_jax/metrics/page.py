"""`report.html`, a page that stands alone."""

import base64
import html
import re
from collections.abc import Mapping, Sequence

from gpt_jax.metrics.plot import PHASE_COLORS
from gpt_jax.metrics.summary import Summary, _by_size, headlines

CSS = """
body{margin:0;background:#f5f7fa;color:#1f2933;font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",
"PingFang SC","Microsoft YaHei","Noto Sans CJK SC",sans-serif}
main{max-width:60rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:1.9rem;line-height:1.2;margin:0;overflow-wrap:anywhere} .sub{color:#7b8794;margin:.3rem 0 1.8rem}
h2{font-size:1.1rem;margin:2.4rem 0 .8rem} h3{font-size:.9rem;margin:1.1rem 0 .2rem;color:#52606d}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(13.5rem,1fr));gap:.75rem}
.tile,.card{background:#fff;border:1px solid #e4e7eb;border-radius:10px}
.tile{padding:.8rem 1rem} .tile b{display:block;font-size:1.5rem;line-height:1.35;font-variant-numeric:tabular-nums}
.tile span{color:#52606d;font-size:.85rem} .tile small{display:block;color:#7b8794;font-size:.78rem;line-height:1.4}
.tile.first{border-color:#d1495b} .tile.first b{color:#d1495b}
.card{padding:1rem;margin:0 0 .75rem} .card img{display:block;width:100%;height:auto}
.step{color:#7b8794;font-size:.82rem;margin:0 0 .4rem}
pre{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;font:13.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,
"Noto Sans Mono CJK SC",monospace} pre+pre{border-top:1px dashed #e4e7eb;margin-top:.7rem;padding-top:.7rem}
.bar{display:flex;height:1.1rem;border-radius:6px;overflow:hidden;margin-bottom:.7rem}
.legend{display:flex;flex-wrap:wrap;gap:.3rem 1.2rem;font-size:.88rem;font-variant-numeric:tabular-nums}
.legend i{display:inline-block;width:.75rem;height:.75rem;border-radius:3px;margin-right:.4rem;vertical-align:-1px}
summary{cursor:pointer;font-weight:600} table{border-collapse:collapse;width:100%;font-size:.88rem}
td{padding:.22rem .8rem .22rem 0;vertical-align:top;border-top:1px solid #f0f2f5;overflow-wrap:anywhere}
td:first-child{color:#52606d;width:15rem}
"""


def _text(value) -> str:
    """Escaped for HTML; control characters a byte-level model may emit become the replacement
    character."""
    clean = re.sub(
        r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", "\ufffd", str(value).replace("\r\n", "\n")
    )
    return html.escape(clean)


def _table(values: Mapping) -> str:
    rows = (
        f"<tr><td>{_text(key)}</td><td>{_text(value)}</td></tr>" for key, value in values.items()
    )
    return f"<table>{''.join(rows)}</table>"


def _tiles(summary: Summary) -> str:
    tiles = [
        f'<div class="tile{" first" if label == "held-out bits per byte" else ""}"><span>{_text(label)}</span>'
        f"<b>{_text(value)}</b><small>{_text(note)}</small></div>"
        for label, value, note in headlines(summary)
    ]
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _samples(samples: Sequence[Mapping], shown: int = 8) -> str:
    """Samples by step; when there are many, `shown` steps spread evenly, the first and the last
    among them."""
    steps = sorted({sample["step"] for sample in samples})
    if not steps:
        return ""
    chosen = (
        [steps[i * (len(steps) - 1) // (shown - 1)] for i in range(shown)]
        if len(steps) > shown
        else steps
    )
    note = (
        f" ({shown} of {len(steps)} times; all are in metrics.jsonl)" if len(steps) > shown else ""
    )
    cards = []
    for step in chosen:
        texts = "".join(f"<pre>\n{_text(s['text'])}</pre>" for s in samples if s["step"] == step)
        cards.append(f'<div class="card"><p class="step">step {step:,}</p>{texts}</div>')
    return f"<h2>Samples over time{note}</h2>{''.join(cards)}"


def _time_split(phases: Mapping[str, float]) -> str:
    parts = _by_size(phases)
    if not parts:
        return ""
    bar, legend = (
        "".join(
            form.format(color=PHASE_COLORS[phase], part=part, phase=phase) for phase, part in parts
        )
        for form in (
            '<div style="width:{part:.3%};background:{color}"></div>',
            '<span><i style="background:{color}"></i>{phase} {part:.1%}</span>',
        )
    )
    card = f'<div class="card"><div class="bar">{bar}</div><div class="legend">{legend}</div></div>'
    return f"<h2>Where the time went</h2>{card}"


def _config(config: Mapping) -> str:
    top = {key: value for key, value in config.items() if not isinstance(value, Mapping)}
    sections = "".join(
        f"<h3>{_text(name)}</h3>{_table(section)}"
        for name, section in config.items()
        if isinstance(section, Mapping)
    )
    return (
        f'<details class="card"><summary>Configuration</summary>{_table(top)}{sections}</details>'
    )


def make_html(
    title: str,
    summary: Summary,
    png: bytes,
    samples: Sequence[Mapping],
    config: Mapping,
    versions: Mapping[str, str],
) -> str:
    """One HTML page that needs nothing else: no script, no link, the picture inside. All texts
    are escaped."""
    picture = base64.b64encode(png).decode()
    details = _config(config) if config else ""
    if versions:
        details += f'<details class="card" open><summary>Device and versions</summary>{_table(versions)}</details>'
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{CSS}</style></head>'
        f'<body><main><h1>{_text(title)}</h1><p class="sub">trained with gpt_jax</p>{_tiles(summary)}'
        f'<h2>Loss</h2><div class="card"><img alt="loss over steps" src="data:image/png;base64,{picture}"></div>'
        f"{_samples(samples)}{_time_split(summary.phases)}"
        f"{f'<h2>The run</h2>{details}' if details else ''}</main></body></html>\n"
    )
