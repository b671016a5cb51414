"""The arena's part of a page: two films side by side, four questions, and the table of what people said."""

from __future__ import annotations

import base64
import html
from typing import Any

import gradio as gr

from infworld.app.modules import read_static
from infworld.arena.hall import Hall
from infworld.arena.ranking import BASE, Standing, standings
from infworld.arena.votes import QUESTIONS, Votes

_HTML, _CSS, _JS = (read_static(f"arena.{kind}") for kind in ("html", "css", "js"))

DONE = "You have seen every pair. Thank you."
EXPIRED = "The last pair had expired; here is another."
REFRESH = 5  # seconds between looks at the votes while the table is open
HEAD = ("", "Rating", "95 %", "Elo", "Won", "Same", "Lost")


class Duel(gr.HTML):
    """Value: what `Hall.view` returns, or {"note": text} when there is nothing to show.

    Events: `ask` (voter) when the page opens, `vote` (voter, pair, question, choice).
    """

    def __init__(self, **kwargs: Any):
        super().__init__(
            value=None, html_template=_HTML, css_template=_CSS, js_on_load=_JS, apply_default_css=False, **kwargs
        )

    def api_info(self) -> dict[str, Any]:
        return {"type": "object"}


def arena(hall: Hall) -> None:
    """Lays out the arena within the Blocks that are open. The hall's stage must be among their allowed paths."""

    def ask(event: gr.EventData) -> dict:
        return hall.next(_sent(event, "voter")) or {"note": DONE}

    def vote(event: gr.EventData) -> dict:
        voter, token = _sent(event, "voter"), _sent(event, "pair")
        try:
            hall.vote(voter, token, _sent(event, "question"), _sent(event, "choice"))
        except ValueError:  # as after a restart of the server
            return (hall.next(voter) or {}) | {"note": EXPIRED}
        return hall.view(token) or hall.next(voter) or {"note": DONE}

    at_once: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}
    duel = Duel(elem_id="duel")
    duel.ask(ask, None, duel, **at_once)
    duel.vote(vote, None, duel, **at_once)
    with gr.Accordion("Results", open=False, elem_id="results-panel") as panel:
        results = gr.HTML("", apply_default_css=False, elem_id="results")
        timer = gr.Timer(REFRESH, active=False)
    panel.expand(lambda: (results_html(hall.votes), gr.Timer(active=True)), None, [results, timer], **at_once)
    panel.collapse(lambda: gr.Timer(active=False), None, timer, **at_once)
    timer.tick(lambda: results_html(hall.votes), None, results, **at_once)


def results_html(votes: Votes) -> str:
    """The tables of all questions with their plots, and the votes as files."""
    every = votes.all()
    if not every:
        return "<p>Nobody has voted yet.</p>"
    voters = len({vote.voter for vote in every})
    parts = [f"<p>{len(every)} answers of {voters} voter{'s' * (voters != 1)}.</p>"]
    for question in reversed(QUESTIONS):  # overall first
        table = standings([vote for vote in every if vote.question == question])
        if table:
            parts.append(f"<h3>{question.capitalize()}</h3>{_table(table)}{_plot(table)}")
    files = (("votes.csv", "text/csv", votes.as_csv()), ("votes.json", "application/json", votes.as_json()))
    links = " ".join(_download(*file) for file in files)
    return f"{''.join(parts)}<p>All votes: {links}. Ratings are Bradley-Terry on Elo's scale, mean {BASE:.0f}.</p>"


def _table(lines: list[Standing]) -> str:
    head = "".join(f"<th>{name}</th>" for name in HEAD)
    rows = "".join(
        f"<tr><th>{html.escape(line.name)}</th><td>{line.rating:.0f}</td><td>{line.low:.0f} to {line.high:.0f}</td>"
        f"<td>{line.elo:.0f}</td><td>{line.wins}</td><td>{line.draws}</td><td>{line.losses}</td></tr>"
        for line in lines
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _plot(lines: list[Standing]) -> str:
    """Ratings with their intervals as SVG."""
    low, high = min(line.low for line in lines), max(line.high for line in lines)
    scale = 300 / max(high - low, 1)
    marks = []
    for row, line in enumerate(lines):
        y, (start, at, end) = 14 + 22 * row, ((v - low) * scale + 150 for v in (line.low, line.rating, line.high))
        marks.append(
            f'<text x="140" y="{y + 4}" text-anchor="end" font-size="12" fill="currentColor">{html.escape(line.name)}'
            f'</text><path d="M{start:.1f} {y}H{end:.1f}" stroke="currentColor"/>'
            f'<circle cx="{at:.1f}" cy="{y}" r="4" fill="var(--color-accent, teal)"/>'
        )
    size = f'viewBox="0 0 470 {22 * len(lines) + 6}" width="470"'
    return f'<svg {size} role="img" aria-label="ratings with intervals">{"".join(marks)}</svg>'


def _download(name: str, kind: str, text: str) -> str:
    data = base64.b64encode(text.encode()).decode()
    return f'<a download="{name}" href="data:{kind};base64,{data}">{name}</a>'


def _sent(event: gr.EventData, name: str) -> str:
    """A text of an event's data, which comes from a browser; "" where there is none."""
    value = getattr(event, name, "")
    return value if isinstance(value, str) else ""
