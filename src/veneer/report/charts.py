"""The charts: plain data in, a plotly figure out. Colours of the page (light, dark, print) come from page.js."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from .page import plotly, shown

# told apart by people who see few colours, on white and on black; from the ninth on, dashes tell too
COLOURS = ("#3b82d6", "#e07b2e", "#2a9d6f", "#a06bd6", "#d9527f", "#b98a00", "#21a3b5", "#8a94a0")
FADED, WHISKER = "#a9b1ba", "#69727d"
DASHES = ("solid", "dash", "dot", "dashdot")
SEQUENTIAL = ((0, "#eef4fb"), (0.5, "#a3c6eb"), (0.75, "#3f7cbd"), (1, "#0b4a94"))  # numbers written on it stay readable, by day and by night
MOST_WRITTEN = 12  # classes up to which a confusion matrix has room for its counts
MOST_TICKS = 40


def line(i: int, width: float = 2) -> dict[str, Any]:
    """The line of the i-th of several series."""
    return {"color": COLOURS[i % len(COLOURS)], "dash": DASHES[i // len(COLOURS) % len(DASHES)], "width": width}


def layout(height: int = 340, *, x: str = "", y: str = "", series: int = 1, **more: Any) -> dict[str, Any]:
    """What all charts share; the legend stands above the plot, and takes height of its own as it grows."""
    rows = -(-series // 3) if series > 1 else 0
    return {
        "height": height + 22 * rows,
        "margin": {"l": 60, "r": 16, "t": 14 + 22 * rows, "b": 48},
        "colorway": list(COLOURS),
        "font": {"size": 13},
        "showlegend": series > 1,
        "legend": {"orientation": "h", "y": 1, "yanchor": "bottom", "x": 0, "xanchor": "left", "font": {"size": 12}},
        "hoverlabel": {"align": "left", "namelength": -1},
        "xaxis": {"title": {"text": x, "standoff": 8}, "automargin": True},
        "yaxis": {"title": {"text": y, "standoff": 8}, "automargin": True, "exponentformat": "power"},
        "template": "none",
        **more,
    }


def short(text: str, most: int = 28) -> str:
    """`text` on one line of at most `most` characters, its middle left out."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - most // 3 - 1]}…{text[-(most // 3) :]}"


def curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float | None]]],
    *,
    x: str = "step",
    y: str = "",
    ends: Mapping[str, str] | None = None,
    behind: Collection[str] = (),
) -> Any:
    """A line for each name -> (xs, ys). ends: name -> why its line stops early; it ends in a cross. behind: names drawn
    thin and grey behind the others, told apart by pointing at them."""
    go = plotly()
    figure = go.Figure()
    front = [n for n in series if n not in behind]
    for name in sorted(series, key=lambda n: n not in behind):
        xs, ys = series[name]
        back = name in behind
        figure.add_scatter(
            x=list(xs), y=list(ys), name=name if back else short(name), mode="lines+markers" if len(xs) <= 30 and not back else "lines",
            line={"color": COLOURS[-1], "width": 1} if back else line(front.index(name)), opacity=0.45 if back else 1, marker={"size": 5}, showlegend=not back,
            hovertemplate="%{x}: %{y:.5g}<extra>%{fullData.name}</extra>",
        )  # fmt: skip
    gone = [(name, why) for name, why in (ends or {}).items() if len(series[name][0])]
    if gone:
        colours = [COLOURS[-1] if n in behind else line(front.index(n))["color"] for n, _ in gone]
        figure.add_scatter(
            x=[series[n][0][-1] for n, _ in gone], y=[series[n][1][-1] for n, _ in gone], name="ended early", mode="markers",
            marker={"symbol": "x-thin", "size": 8, "color": colours, "line": {"width": 2, "color": colours}},
            customdata=[f"{n}\n{why}" for n, why in gone], hovertemplate="%{customdata}<extra></extra>",
        )  # fmt: skip
    figure.update_layout(layout(x=x, y=y, series=len(front) + bool(gone)), hovermode="closest" if len(series) > 6 else "x unified")
    return figure


def heat(layers: Sequence[str], columns: Sequence[str], mean: Any, spread: Any) -> Any:
    """Gates: layers down, methods across; each cell its mean (colour and number) and spread. None: no gate there."""
    go = plotly()
    text = [["" if m is None else f"{m:.2f}\n±{s:.2f}" for m, s in zip(ms, ss, strict=True)] for ms, ss in zip(mean, spread, strict=True)]
    known = [m for ms in mean for m in ms if m is not None] or [0.0]
    figure = go.Figure(
        go.Heatmap(
            z=mean, x=list(range(len(columns))), y=list(range(len(layers))), text=text, texttemplate="%{text}", xgap=2, ygap=2,
            colorscale=SEQUENTIAL, zmin=min(known), zmax=max(known) if max(known) > min(known) else min(known) + 1e-6,
            customdata=[[f"layer {n}, {c}" for c in columns] for n in layers],
            hovertemplate="%{customdata}\nmean %{z:.4f}<extra></extra>".replace("\n", "<br>"),
            colorbar={"title": {"text": "mean", "side": "top"}, "thickness": 12, "len": 1, "outlinewidth": 0},
        )
    )  # fmt: skip
    figure.update_layout(layout(90 + 44 * len(layers), y="layer"))
    ticks = [short(c, 24).replace(" ", "\n", 1) for c in columns]
    figure.update_xaxes(
        tickvals=list(range(len(columns))), ticktext=ticks, side="top", showgrid=False, zeroline=False, tickangle=0 if len(columns) <= 6 else -45
    )
    figure.update_yaxes(tickvals=list(range(len(layers))), ticktext=list(layers), autorange="reversed", showgrid=False, zeroline=False)
    figure.update_layout(margin={"t": 60, "b": 16})
    return figure


def confusion(labels: Sequence[str], counts: Sequence[Sequence[int]]) -> Any:
    """Truth down, answer across; colour is the share of the true class, the number a count of examples."""
    go = plotly()
    k = len(labels)
    share = [[n / sum(row) if sum(row) else None for n in row] for row in counts]
    what = [
        [f"truth: {t}\nanswer: {g}\n{n} of {sum(row)}" for g, n in zip(labels, row, strict=True)] for t, row in zip(labels, counts, strict=True)
    ]  # fmt: skip
    figure = go.Figure(
        go.Heatmap(
            z=share, x=list(range(k)), y=list(range(k)), text=[[str(n) for n in row] for row in counts], customdata=what, zmin=0, zmax=1,
            texttemplate="%{text}" if k <= MOST_WRITTEN else None, hovertemplate="%{customdata}<extra></extra>", colorscale=SEQUENTIAL, xgap=1, ygap=1,
            colorbar={"title": {"text": "share", "side": "right"}, "thickness": 12, "tickformat": ".0%", "ticklabelposition": "outside bottom",
                      "outlinewidth": 0},
        )
    )  # fmt: skip
    figure.update_layout(layout(min(720, max(320, 150 + 34 * k)), x="answer", y="truth"))
    every = -(-k // MOST_TICKS)
    ticks = {"tickvals": list(range(0, k, every)), "ticktext": [short(n, 16) for n in labels[::every]], "showgrid": False, "zeroline": False}
    figure.update_xaxes(**ticks, tickangle=0 if k <= 4 else -45)
    figure.update_yaxes(**ticks, autorange="reversed")
    figure.update_layout(margin={"t": 30})
    return figure


def bars(names: Sequence[str], values: Sequence[float | None], errors: Sequence[float | None] | None = None, *, x: str, faded: Sequence[bool] = ()) -> Any:
    """Horizontal bars in the order given, from the top; errors: half widths of their whiskers; faded: drawn in grey."""
    go = plotly()
    whiskers = (
        {"error_x": {"type": "data", "array": [e or 0 for e in errors], "thickness": 1.4, "width": 5, "color": WHISKER}} if errors and any(errors) else {}
    )
    colours = [FADED if f else COLOURS[0] for f in faded] or COLOURS[0]
    figure = go.Figure(
        go.Bar(
            x=list(values), y=list(range(len(names))), orientation="h", marker={"color": colours}, **whiskers,
            customdata=[f"{n}\n{shown(v)}" + (f" ± {shown(e)}" if e else "") for n, v, e in zip(names, values, errors or [None] * len(names), strict=True)],
            hovertemplate="%{customdata}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_layout(layout(90 + 30 * len(names), x=x, bargap=0.35))
    figure.update_yaxes(tickvals=list(range(len(names))), ticktext=[short(n) for n in names], autorange="reversed", showgrid=False)
    return figure


def agreement(truth: Sequence[float], answer: Sequence[float]) -> Any:
    """A mark for each example, over the line on which the answer is the truth."""
    go = plotly()
    low, high = min(*truth, *answer), max(*truth, *answer)
    figure = go.Figure()
    figure.add_scatter(x=[low, high], y=[low, high], mode="lines", line={"color": FADED, "dash": "dot", "width": 1.5}, hoverinfo="skip", showlegend=False)
    figure.add_scatter(
        x=list(truth), y=list(answer), mode="markers", marker={"color": COLOURS[0], "size": 6, "opacity": 0.6}, showlegend=False,
        hovertemplate="truth %{x:.4g}, answer %{y:.4g}<extra></extra>",
    )  # fmt: skip
    figure.update_layout(layout(x="truth", y="answer"), hovermode="closest")
    return figure


def logarithmic(figure: Any, values: Sequence[float]) -> None:
    """A logarithmic x axis that fits `values`, with readable ticks also where they span less than a decade. Under half a decade, where
    the ticks 1, 2 and 5 may all lie outside, a plain one, which looks the same there."""
    positive = [v for v in values if v > 0]
    if not positive:
        return
    low, high = math.log10(min(positive)), math.log10(max(positive))
    if high - low < 0.5:
        room = max(0.08 * max(positive), 0.06 * (max(positive) - min(positive)))
        figure.update_xaxes(range=[min(positive) - room, max(positive) + room], tickformat="~s", nticks=8)
        return
    room = 0.06 * (high - low)
    figure.update_xaxes(type="log", range=[low - room, high + room], dtick="D2" if high - low < 1.5 else 1, tickformat="~s")
