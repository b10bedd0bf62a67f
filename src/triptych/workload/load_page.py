"""Runs of the load driver as one HTML page that needs nothing else: figures, plots, settings."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from triptych.errors import ConfigError
from triptych.pictures import inline, logarithmic
from triptych.workload.load import Timing
from triptych.workload.load_report import energy_line, rollout_line

STYLE = """
:root{color-scheme:light}
body{font:15px/1.45 system-ui,sans-serif;max-width:1080px;margin:2em auto;padding:0 1em;color:#222;background:#fff}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.25em .8em;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child,.set td{text-align:left}h1{font-size:1.4em}h2{font-size:1.1em;margin-top:2em}
figure{margin:1em 0}figcaption{color:#555;font-size:.9em}svg{width:100%;min-width:640px;height:auto}
.cut{border-left:4px solid #e76f51;padding-left:.6em}.wide,figure,pre{overflow-x:auto}.wide td{white-space:nowrap}
"""
_ROWS = (
    ("time to first token, s", "ttft_s"),
    ("between tokens, s", "itl_s"),
    ("end to end, s", "end_to_end_s"),
    ("tokens per second of a user", "user_tokens_per_s"),
    ("sent late by the driver, s", "late_s"),
)
_SOURCES = (("cached", "cached_tokens"), ("recomputed", "recomputed_tokens"), ("computed", "computed_tokens"))


def write_page(
    path: Path,
    runs: Mapping[str, tuple[dict[str, Any], Sequence[Timing]]],
    about: Mapping[str, Any],
    compared: Sequence[str] = (),
) -> None:
    """Write `runs`, (figures, timings) by name, to `path`. ConfigError if it fails.

    `about`: settings and machine, and as `cut_short` what an interrupt has left, if one came; `compared`: what the runs
    say of each other, as for a terminal.
    """
    body = [f"<p class=cut>{html.escape(about['cut_short'])}"] if about.get("cut_short") else []
    body += [figures_table(name, found) for name, (found, _) in runs.items()]
    if compared:
        body += ["<h2>Against each other</h2>", *(f"<pre>{html.escape(text)}</pre>" for text in compared)]
    body += plots(runs)
    write_html(path, f"Load: {about.get('workload', '')}", body, about)


def write_html(path: Path, title: str, body: Sequence[str], about: Mapping[str, Any]) -> None:
    """A page of HTML pieces that needs nothing else, with `about` as its last table. ConfigError if it fails."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>{html.escape(title)}</title><style>{STYLE}</style>",
        f"<h1>{html.escape(title)}</h1>",
        *body,
        "<h2>How it was run</h2><div class=wide><table class=set>",
        *(f"<tr><td>{html.escape(key)}<td>{html.escape(str(value))}" for key, value in about.items()),
        "</table></div></html>",
    ]
    try:
        path.write_text("\n".join(parts) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}.") from None


def figures_table(name: str, found: dict[str, Any]) -> str:
    """One run's sentences and table as HTML."""
    heads = ("mean", "p50", "p90", "p99", "max")
    cache, goodput = found["cache"], found["goodput"]
    rate = "not told" if cache["hit_rate"] is None else f"{cache['hit_rate']:.1%}"
    sentences = [
        f"{found['requests']:,} requests of {found['sessions']:,} sessions in {found['seconds']:.1f} s, "
        f"{found['failed']} failed",
        f"output {found['output_tokens_per_s']:,.1f} tok/s, prompts {found['prompt_tokens_per_s']:,.1f} tok/s",
        f"goodput {goodput['share']:.1%} within {goodput['ttft_s']:g} s to the first token and {goodput['tpot_s']:g} s "
        "for each further one",
        f"hit rate {rate}: {cache['cached_tokens']:,} of {cache['prompt_tokens']:,} prompt tokens cached, "
        f"{cache['recomputed_tokens']:,} recomputed",
    ]
    if "rollouts" in found:
        sentences.append(rollout_line(found["rollouts"]))
    if "cost" in found:
        cost = found["cost"]
        sentences.append(f"{cost['usd_per_session']:.3g} USD a session at {cost['usd_per_hour']:g} USD an hour")
    if "energy" in found:
        sentences.append(energy_line(found["energy"]))
    columns = [html.escape(name), *heads, "p50, 95 % interval", "p99, 95 % interval"]
    rows = ["<tr>" + "".join(f"<th>{column}" for column in columns)]
    for label, key in _ROWS:
        one = found[key]
        if one is not None:
            spans = [one.get(f"{which}_95") for which in ("p50", "p99")]
            cells = [f"{one[head]:.4g}" for head in heads]
            cells += [f"{span[0]:.3g} to {span[1]:.3g}" if span else "" for span in spans]
            rows.append(f"<tr><td>{label}" + "".join(f"<td>{cell}" for cell in cells))
    listed = "".join(f"<li>{html.escape(sentence)}" for sentence in sentences)
    return f"<h2>{html.escape(name)}</h2><ul>{listed}</ul><div class=wide><table>{''.join(rows)}</table></div>"


def plots(runs: Mapping[str, tuple[dict[str, Any], Sequence[Timing]]]) -> list[str]:
    """Latencies and sources of tokens of all runs as inline SVG. ConfigError without matplotlib."""
    picture = inline(2, 2, (11, 8), lambda grid: _draw(grid, runs))
    return [f"<figure>{picture}<figcaption>Latencies count from the intended time.</figure>"]


def _draw(grid: Any, runs: Mapping[str, tuple[dict[str, Any], Sequence[Timing]]]) -> None:
    (first, gaps), (over, tokens) = grid
    for name, (found, timings) in runs.items():
        good = [one for one in timings if one.error is None and one.arrivals]
        _cumulative(first, [one.first for one in good], name)
        _cumulative(gaps, [one.per_token for one in good if one.per_token == one.per_token], name)
        over.plot([one.intended for one in good], [one.first for one in good], ".", label=name)
        left = 0.0
        for (label, key), shade in zip(_SOURCES, ("#2a9d8f", "#e9c46a", "#e76f51"), strict=True):
            amount = found["cache"][key]
            tokens.barh([name], [amount], left=left, color=shade, label=label if name == next(iter(runs)) else None)
            left += amount
    for axes, label in ((first, "seconds to the first token"), (gaps, "mean seconds between tokens of a request")):
        axes.set_xlabel(label)
        axes.set_ylabel("share of requests")
        axes.set_xscale("log")
        logarithmic(axes.xaxis)
    over.set_xlabel("intended time of the request, s")
    over.set_ylabel("seconds to the first token")
    tokens.set_xlabel("prompt tokens, by where they came from")
    tokens.invert_yaxis()
    tokens.legend(fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))  # bars leave no room inside
    for axes in (first, gaps, over, tokens):
        axes.grid(alpha=0.3)
        if axes is not tokens and axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)


def _cumulative(axes: Any, values: Sequence[float], name: str) -> None:
    """Share of values up to x."""
    if len(values):
        ordered = np.sort(values)
        axes.step(ordered, np.arange(1, len(ordered) + 1) / len(ordered), where="post", label=name)
