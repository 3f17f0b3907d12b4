"""What a caller sees of a request's choices: text, stop strings, echo. Made beside the event loop, from ids.

Every API on top gets the same: stop strings are looked for here and nowhere else.
"""

from __future__ import annotations

from dataclasses import replace

from cluster.answer_text import AnswerText
from cluster.messages import Request, TokenEvent
from model.tokenizer import Tokenizer


class Answers:
    """All choices of one request. `open`: those that have not ended."""

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        self._request = request
        self._tokenizer = tokenizer
        self._texts = [self._text() for _ in range(request.n)]
        self._echo = tokenizer.decode(request.prompt_ids) if request.echo else ""
        self._begun: set[int] = set()
        self.open = set(range(request.n))

    def show(self, event: TokenEvent) -> TokenEvent | None:
        """The event as the caller sees it; None if its choice has ended already, at a stop string."""
        if event.finish_reason == "abort":  # of the whole request
            self.open.clear()
            return replace(event, request_id=self._request.request_id)
        if event.choice not in self.open:
            return None
        shown, stop = self._decode(self._texts[event.choice], event)
        if event.choice not in self._begun:
            self._begun.add(event.choice)
            shown = self._echo + shown
        event = replace(event, request_id=self._request.request_id, text=shown)
        if stop is not None:
            event = replace(event, finish_reason="stop", stop_reason=stop)
        if event.finish_reason is not None:
            self.open.discard(event.choice)
        return event

    def _text(self) -> AnswerText:
        sampling = self._request.sampling
        continues = self._request.continues_prompt
        decoder = self._tokenizer.incremental(
            self._request.prompt_ids if continues else (),
            skip_special_tokens=sampling.skip_special_tokens,
            opens_message=not continues,
        )
        return AnswerText(decoder, sampling.stop, include_stop=sampling.include_stop_str_in_output)

    def _decode(self, text: AnswerText, event: TokenEvent) -> tuple[str, str | None]:
        """The event's text. A token that ends the answer is no part of it, unless it was asked for."""
        sampling = self._request.sampling
        hidden = event.finish_reason == "stop" and not (sampling.include_stop_str_in_output and event.stop_reason)
        shown, stop = text.push(event.token_ids[:-1] if hidden else event.token_ids)
        if event.finish_reason is not None and stop is None:
            rest, stop = text.flush()
            shown += rest
        return shown, stop
