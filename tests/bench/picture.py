"""A picture of measured curves as PNG, by Python alone: a machine with a GPU need not have a library that draws.

Curve: points joined by lines, both axes logarithmic; a dashed one beside it says how far it could go
Panel: curves with a title and what the axes count
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, pairwise
from pathlib import Path

Color = tuple[int, int, int]
Point = tuple[float, float]

BLACK, GRAY, WHITE = (0, 0, 0), (210, 210, 210), (255, 255, 255)
COLORS = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189), (255, 127, 14), (23, 190, 207))
PANEL_WIDTH, HEIGHT = 640, 480
LEFT, RIGHT, TOP, BOTTOM = 90, 20, 70, 50  # of the axes, within a panel
SCALE = 2  # pixels of a letter's dot

# Each letter's five rows of three dots, a row as an octal digit.
LETTERS = {
    "0": "75557", "1": "26227", "2": "71747", "3": "71717", "4": "55711", "5": "74717", "6": "74757", "7": "71122",
    "8": "75757", "9": "75717", "A": "25755", "B": "65656", "C": "34443", "D": "65556", "E": "74647", "F": "74644",
    "G": "34553", "H": "55755", "I": "72227", "J": "11152", "K": "55655", "L": "44447", "M": "57755", "N": "65555",
    "O": "25552", "P": "65644", "Q": "25563", "R": "65655", "S": "34216", "T": "72222", "U": "55557", "V": "55552",
    "W": "55775", "X": "55255", "Y": "55222", "Z": "71247", ".": "00002", ",": "00024", ":": "02020", ";": "02024",
    "-": "00700", "+": "02720", "/": "11244", "(": "12221", ")": "42224", "_": "00007", " ": "00000",
}  # fmt: skip


@dataclass(frozen=True)
class Curve:
    name: str
    points: Sequence[Point]
    bounds: Sequence[Point] = ()


@dataclass(frozen=True)
class Panel:
    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]


class Canvas:
    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self._rows = [bytearray(bytes(WHITE) * width) for _ in range(height)]

    def square(self, x: float, y: float, size: int, color: Color) -> None:
        left, top = round(x) - size // 2, round(y) - size // 2
        for row in self._rows[max(top, 0) : max(top + size, 0)]:
            for column in range(max(left, 0), min(left + size, self.width)):
                row[3 * column : 3 * column + 3] = bytes(color)

    def line(self, begin: Point, end: Point, color: Color, *, size: int = 1, dash: int = 0) -> None:
        """Dashes and the gaps between them are `dash` pixels long; 0: there are no gaps."""
        (x, y), (to_x, to_y) = begin, end
        steps = max(1, round(max(abs(to_x - x), abs(to_y - y))))
        for step in range(steps + 1):
            if not dash or step // dash % 2 == 0:
                part = step / steps
                self.square(x + part * (to_x - x), y + part * (to_y - y), size, color)

    def text(self, x: float, y: float, text: str, color: Color = BLACK) -> None:
        """Its upper left corner is there. A letter that has no form is left out."""
        for place, letter in enumerate(text.upper()):
            for row, dots in enumerate(LETTERS.get(letter, "00000")):
                for column in range(3):
                    if int(dots, 8) >> (2 - column) & 1:
                        self.square(x + SCALE * (4 * place + column), y + SCALE * row, SCALE, color)

    def png(self) -> bytes:
        header = struct.pack(">IIBBBBB", self.width, self.height, 8, 2, 0, 0, 0)  # 8 bits of red, green, blue
        pixels = zlib.compress(b"".join(b"\0" + row for row in self._rows))
        return b"\x89PNG\r\n\x1a\n" + b"".join(map(_chunk, (b"IHDR", b"IDAT", b"IEND"), (header, pixels, b"")))


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def width_of(text: str) -> int:
    return SCALE * (4 * len(text) - 1)


class Axis:
    """From numbers to pixels, logarithmically."""

    def __init__(self, values: Sequence[float], first: int, last: int) -> None:
        low, high = math.log10(min(values)), math.log10(max(values))
        margin = 0.05 * (high - low) or 0.1
        self._low, self._span = low - margin, high - low + 2 * margin
        self._first, self._length = first, last - first

    def at(self, value: float) -> float:
        return self._first + (math.log10(value) - self._low) / self._span * self._length

    def ticks(self) -> Iterator[float]:
        """1, 2 and 5 times the powers of ten that it spans."""
        for exponent in range(math.floor(self._low), math.ceil(self._low + self._span) + 1):
            for factor in (1, 2, 5):
                if 0 <= math.log10(factor * 10.0**exponent) - self._low <= self._span:
                    yield factor * 10.0**exponent


def draw(title: str, panels: Sequence[Panel], path: Path) -> None:
    """Side by side. A panel without points is left empty."""
    canvas = Canvas(PANEL_WIDTH * len(panels), HEIGHT)
    canvas.text(LEFT, 12, title)
    for number, panel in enumerate(panels):
        if any(curve.points for curve in panel.curves):
            _draw_panel(canvas, panel, PANEL_WIDTH * number)
    path.write_bytes(canvas.png())


def _draw_panel(canvas: Canvas, panel: Panel, left: int) -> None:
    points = [point for curve in panel.curves for point in (*curve.points, *curve.bounds)]
    x_axis = Axis([x for x, _ in points], left + LEFT, left + PANEL_WIDTH - RIGHT)
    y_axis = Axis([y for _, y in points], HEIGHT - BOTTOM, TOP)
    first_x, last_x = left + LEFT, left + PANEL_WIDTH - RIGHT
    for x in sorted({x for x, _ in points}):
        canvas.line((x_axis.at(x), TOP), (x_axis.at(x), HEIGHT - BOTTOM), GRAY)
        canvas.text(x_axis.at(x) - width_of(f"{x:g}") / 2, HEIGHT - BOTTOM + 8, f"{x:g}")
    for y in y_axis.ticks():
        canvas.line((first_x, y_axis.at(y)), (last_x, y_axis.at(y)), GRAY)
        canvas.text(first_x - 8 - width_of(f"{y:.0f}"), y_axis.at(y) - 5, f"{y:.0f}")
    canvas.text(first_x, 36, f"{panel.title}: {panel.y_label} (dashed: floor)")
    canvas.text((first_x + last_x - width_of(panel.x_label)) / 2, HEIGHT - 22, panel.x_label)
    for number, (curve, color) in enumerate(zip(panel.curves, cycle(COLORS), strict=False)):
        at = [(x_axis.at(x), y_axis.at(y)) for x, y in sorted(curve.points)]
        bounds = [(x_axis.at(x), y_axis.at(y)) for x, y in sorted(curve.bounds)]
        for joined, size, dash in ((at, 2, 0), (bounds, 1, 5)):
            for begin, end in pairwise(joined):
                canvas.line(begin, end, color, size=size, dash=dash)
        for x, y in at:
            canvas.square(x, y, 7, color)
        if at:
            canvas.square(first_x + 16, TOP + 16 + 16 * number, 9, color)
            canvas.text(first_x + 28, TOP + 12 + 16 * number, curve.name, color)
