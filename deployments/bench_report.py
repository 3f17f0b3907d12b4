"""What a load generator saw: how long what took, how much of it there was, and that as JSON or as a page to read.

Memory is bounded however long it runs: of very many durations a fair choice is kept. Knows no HTTP.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from math import ceil
from typing import Any

MOST_KEPT = 1_000_000
MOST_KINDS = 20  # of errors; what comes later is counted as "other"
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


class Durations:
    """Seconds. Mean and maximum are exact; quantiles too, up to MOST_KEPT of them."""

    def __init__(self, most: int = MOST_KEPT) -> None:
        self._most = most
        self._kept: list[float] = []
        self._count = 0
        self._sum = 0.0
        self._max = 0.0
        self._chance = random.Random(0)  # noqa: S311  which are kept is no secret

    def add(self, seconds: float) -> None:
        self._count += 1
        self._sum += seconds
        self._max = max(self._max, seconds)
        if len(self._kept) < self._most:
            self._kept.append(seconds)
        elif (place := self._chance.randrange(self._count)) < self._most:
            self._kept[place] = seconds

    def summary(self) -> dict[str, float] | None:
        """None of none."""
        if not self._count:
            return None
        kept = sorted(self._kept)
        quantiles = {name: kept[ceil(share * len(kept)) - 1] for name, share in QUANTILES.items()}
        return {"count": self._count, "mean": self._sum / self._count, **quantiles, "max": self._max}


class Measurements:
    """Told by the load generator as things happen."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.first_token = Durations()
        self.between_tokens = Durations()
        self.whole_answer = Durations()
        self.started = 0
        self.finished = 0
        self.errors: Counter[str] = Counter()
        self.prompt_tokens = 0
        self.output_tokens = 0
        self._began = clock()
        self._ended: float | None = None

    def failed(self, kind: str) -> None:
        self.errors[kind if kind in self.errors or len(self.errors) < MOST_KINDS else "other"] += 1

    def end(self) -> None:
        self._ended = self.clock()

    @property
    def seconds(self) -> float:
        return (self.clock() if self._ended is None else self._ended) - self._began

    def report(self) -> dict[str, Any]:
        """For programs. Answers that were cut off at the end count with the tokens that came."""
        failed = self.errors.total()
        amounts = {"requests": self.finished, "prompt_tokens": self.prompt_tokens, "output_tokens": self.output_tokens}
        return {
            "seconds": self.seconds,
            "requests": {
                "finished": self.finished,
                "failed": failed,
                "cut_off": self.started - self.finished - failed,
            },
            "errors": dict(self.errors),
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "per_second": {name: amount / self.seconds for name, amount in amounts.items()},
            "first_token_s": self.first_token.summary(),
            "between_tokens_s": self.between_tokens.summary(),
            "whole_answer_s": self.whole_answer.summary(),
        }


class AnswerTimer:
    """One request, from being sent to whatever became of it."""

    def __init__(self, measured: Measurements, prompt_tokens: int) -> None:
        self._measured = measured
        self._prompt_tokens = prompt_tokens
        self._tokens = 0
        self._began = measured.clock()
        self._last: float | None = None
        measured.started += 1

    def text(self) -> None:
        """Some came: a token's, as far as anybody can see from outside."""
        measured, now = self._measured, self._measured.clock()
        if self._last is None:
            measured.first_token.add(now - self._began)
            measured.prompt_tokens += self._prompt_tokens
        else:
            measured.between_tokens.add(now - self._last)
        self._last = now
        self._tokens += 1
        measured.output_tokens += 1

    def finished(self, tokens: int) -> None:
        """The answer is complete; so many tokens it had, by the server's own count."""
        self._measured.finished += 1
        self._measured.whole_answer.add(self._measured.clock() - self._began)
        self._measured.output_tokens += tokens - self._tokens


def page(report: dict[str, Any]) -> str:
    """For people."""
    requests, rates = report["requests"], report["per_second"]
    lines = [
        f"{requests['finished']} requests finished in {report['seconds']:.1f} s, {requests['failed']} failed, "
        f"{requests['cut_off']} were cut off at the end.",
        "",
        f"  a second          {rates['requests']:.2f} requests, {rates['prompt_tokens']:.1f} prompt tokens, "
        f"{rates['output_tokens']:.1f} tokens of answers",
        "",
        f"  milliseconds    {'mean':>10}{'median':>10}{'90 %':>10}{'99 %':>10}{'longest':>10}",
    ]
    for name in ("first_token", "between_tokens", "whole_answer"):
        if (found := report[f"{name}_s"]) is not None:
            cells = (f"{found[column] * 1000:10.1f}" for column in ("mean", *QUANTILES, "max"))
            lines.append(f"  {name.replace('_', ' '):16}{''.join(cells)}")
    if report["errors"]:
        lines += ["", "Errors:", *(f"  {count} x {kind}" for kind, count in Counter(report["errors"]).most_common())]
    return "\n".join(lines)
