"""What is on each dashboard: titles, queries and why somebody would look. Knows no Grafana; generate.py does.

Queries are PromQL. SEL stands for the chosen model and replicas, PER for the time that a rate is taken over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SEL = 'model=~"$model",replica=~"$replica"'
PER = "[$__rate_interval]"


@dataclass(frozen=True)
class Query:
    text: str
    legend: str

    @property
    def expression(self) -> str:
        return self.text.replace("SEL", SEL).replace("PER", PER)


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    why: str
    queries: tuple[Query, ...]
    kind: Literal["lines", "stacked", "number", "matrix"] = "lines"
    matrix: tuple[str, str] = ("", "")  # of a matrix: the labels that make rows and columns
    width: int = 8  # of 24
    gpu: bool = False  # has data only where there are GPUs


@dataclass(frozen=True)
class Dashboard:
    name: str
    title: str
    sections: tuple[tuple[str, tuple[Panel, ...]], ...]
    variables: tuple[str, ...] = ("model", "replica")

    @property
    def panels(self) -> tuple[Panel, ...]:
        return tuple(panel for _, panels in self.sections for panel in panels)


def quantiles(metric: str) -> tuple[Query, ...]:
    return tuple(
        Query(f"histogram_quantile({quantile}, sum by (le) (rate(mixtral_{metric}_bucket{{SEL}}PER)))", name)
        for quantile, name in ((0.5, "median"), (0.95, "95 %"), (0.99, "99 %"))
    )


def rate(metric: str, by: str, legend: str, matching: str = "") -> Query:
    return Query(f"sum by ({by}) (rate(mixtral_{metric}{{SEL{matching}}}PER))", legend)


def mean(metric: str, legend: str) -> Query:
    sums, counts = (f"sum(rate(mixtral_{metric}_{part}{{SEL}}PER))" for part in ("sum", "count"))
    return Query(f"{sums} / {counts}", legend)


def within(metric: str, bound: str, legend: str) -> Query:
    part = f'sum(rate(mixtral_{metric}_bucket{{SEL,le="{bound}"}}PER))'
    return Query(f"{part} / sum(rate(mixtral_{metric}_count{{SEL}}PER))", legend)


def per_step(matching: str = "", by: str = "") -> str:
    """Seconds of the named parts in each step."""
    return f"sum {by}(rate(mixtral_step_seconds_total{{SEL{matching}}}PER))"


STEPS = "sum(rate(mixtral_engine_steps_total{SEL}PER))"
