"""A dashboard as a picture: panels in Grafana's places, with what Prometheus answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k8s.dashboards.panels import Dashboard, Panel

COLUMNS = 24
PANEL_HEIGHT = 2.6  # inches
MOST_NAMES = 12


@dataclass(frozen=True)
class Series:
    name: str
    labels: dict[str, str]
    points: list[tuple[float, float]]


Results = Sequence[tuple[Panel, list[Series]]]


def draw(dashboard: Dashboard, results: Results, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = _rows(results)
    figure = pyplot.figure(figsize=(16, PANEL_HEIGHT * len(rows) + 0.6), layout="constrained")
    figure.suptitle(dashboard.title)
    grid = figure.add_gridspec(len(rows), COLUMNS)
    begin = min((one.points[0][0] for _, found in results for one in found), default=0.0)
    for number, row in enumerate(rows):
        left = 0
        for panel, found in row:
            axes = figure.add_subplot(grid[number, left : left + panel.width])
            left += panel.width
            axes.set_title(f"{panel.title} [{panel.unit}]", fontsize=8, loc="left")
            axes.tick_params(labelsize=6)
            _fill(axes, panel, found, begin)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def _rows(results: Results) -> list[list[tuple[Panel, list[Series]]]]:
    """Panels side by side while they fit."""
    rows: list[list[tuple[Panel, list[Series]]]] = [[]]
    for panel, found in results:
        if sum(one.width for one, _ in rows[-1]) + panel.width > COLUMNS:
            rows.append([])
        rows[-1].append((panel, found))
    return rows


def _fill(axes: Any, panel: Panel, found: list[Series], begin: float) -> None:
    if not found:
        axes.text(0.5, 0.5, "needs a GPU" if panel.gpu else "NO DATA", ha="center", transform=axes.transAxes)
    elif panel.kind == "number":
        axes.text(0.5, 0.5, f"{found[0].points[-1][1]:g}", ha="center", fontsize=24, transform=axes.transAxes)
        axes.set_axis_off()
    elif panel.kind == "matrix":
        _matrix(axes, panel, found)
    else:
        _lines(axes, panel, found, begin)


def _lines(axes: Any, panel: Panel, found: list[Series], begin: float) -> None:
    if panel.kind == "stacked":
        times = sorted({when for one in found for when, _ in one.points})
        values = [[dict(one.points).get(when, 0.0) for when in times] for one in found]
        axes.stackplot([when - begin for when in times], values, labels=[one.name for one in found])
    else:
        for one in found:
            axes.plot([when - begin for when, _ in one.points], [value for _, value in one.points], label=one.name)
    axes.set_ylim(bottom=0)
    if len(found) <= MOST_NAMES:
        axes.legend(fontsize=6, loc="upper left")


def _matrix(axes: Any, panel: Panel, found: list[Series]) -> None:
    rows, columns = (sorted({int(one.labels[label]) for one in found}) for label in panel.matrix)
    end = max(one.points[-1][0] for one in found)  # Grafana asks for this moment alone
    cells = {
        tuple(int(one.labels[label]) for label in panel.matrix): one.points[-1][1]
        for one in found
        if one.points[-1][0] == end
    }
    axes.imshow([[cells.get((row, column), 0.0) for column in columns] for row in rows], aspect="auto", cmap="YlOrRd")
    for label, name in zip(("set_ylabel", "set_xlabel"), panel.matrix, strict=True):
        getattr(axes, label)(name, fontsize=6)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xticks(range(len(columns)), columns)
