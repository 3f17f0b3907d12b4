"""The GPU bench's table as it grows, and the picture of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.bench.picture import Curve, Panel, draw

THEIRS = "transformers"
HEADER = (
    f"{'weights':<13}{'work':<9}{'size':>6}{'ms':>10}{'tokens/s':>11}{'floor ms':>10}{'of floor':>10}"
    f"{'no graph ms':>13}{'theirs':>10} {'':<11}{'ratio':>6}"
)


@dataclass(frozen=True)
class Line:
    """One row of the table. `seconds` of one step, or of one prompt."""

    weights: str  # or THEIRS
    work: str
    size: int  # texts of a decode step, or tokens of a prompt
    seconds: float
    floor: float | None = None
    without_graph: float | None = None
    way: str = ""  # of computing experts
    theirs: Line | None = None

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.size / self.seconds

    def __str__(self) -> str:
        row = f"{self.weights:<13}{self.work:<9}{self.size:>6}{1e3 * self.seconds:>10.2f}{self.speed:>11.0f}"
        row += f"{1e3 * self.floor:>10.2f}{100 * self.floor / self.seconds:>8.0f} %" if self.floor else f"{'':>20}"
        row += f"{1e3 * self.without_graph:>13.2f}" if self.without_graph else f"{'':>13}"
        if self.theirs is None:
            return f"{row}{'':>10} {self.way}".rstrip()
        return f"{row}{self.theirs.speed:>10.0f} {self.theirs.way:<11}{self.theirs.seconds / self.seconds:>6.2f}"


class Report:
    """The table as it grows, printed, and kept in a directory if there is one for it."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._title = ""  # the first line
        self.lines: list[Line] = []
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / "speed.txt").write_text("")

    def add(self, line: Line | str) -> None:
        print(line, flush=True)
        self._title = self._title or str(line)
        if isinstance(line, Line):
            self.lines.append(line)
        if self._directory is not None:
            with (self._directory / "speed.txt").open("a") as file:
                file.write(f"{line}\n")

    def failed(self, what: str, error: Exception) -> None:
        reason = str(error).partition("\n")[0]
        self.add(f"# {what} failed: {type(error).__name__}: {reason}")

    def draw(self) -> None:
        if self._directory is not None:
            panels = [self._panel("decode", "texts"), self._panel("prefill", "tokens of the prompt")]
            draw(self._title, panels, self._directory / "speed.png")

    def _panel(self, work: str, sizes: str) -> Panel:
        curves = []
        for weights in dict.fromkeys(line.weights for line in self.lines):
            some = [line for line in self.lines if (line.weights, line.work) == (weights, work)]
            bounds = [(line.size, line.size / line.floor) for line in some if line.floor]
            curves.append(Curve(weights, [(line.size, line.speed) for line in some], bounds))
        return Panel(work, sizes, "tokens per second", curves)
