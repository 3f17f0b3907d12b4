"""One token sequence on its way through the engine: a choice of a request, or a text to encode.

    token_ids    [ prompt ........ | generated ... ]        tokens whose ids are known
    accepted     [ in pages, and the step that put them there is done ]
    scheduled    [ accepted | in pages once the steps under way are done ..........]
    in flight                                        samples that steps under way will add to token_ids

Only the scheduler writes here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from cluster.messages import (
    LAST_SAMPLED,
    EncodeEvent,
    EncodeRequest,
    FinishReason,
    Pooling,
    Request,
    Routing,
    SamplingParams,
    SequenceChunk,
    SequenceStart,
    TokenEvent,
    TokenLogprob,
)


@dataclass(slots=True, eq=False)
class Sequence:
    number: int  # order of arrival
    key: str  # the engine's name for the request
    choice: int
    token_ids: list[int]
    num_prompt: int
    sampling: SamplingParams | None  # seed drawn; None: nothing is sampled
    pooling: Pooling | None
    priority: int
    user: str
    salt: str
    arrived_s: float
    leader: Sequence | None = None  # the first choice of the same prompt, whose pages may be shared

    group: int = 0  # the data group whose pages it has, while it runs
    num_scheduled: int = 0
    num_accepted: int = 0
    in_flight: int = 0
    life: int = 0  # counts the times its pages were taken away: steps of an earlier life say nothing of this one
    running: bool = False
    gone: bool = False  # ended or aborted
    started: bool = False  # the ranks know it
    answered: bool = False  # an event went out
    waited_s: float | None = None  # from arrival to the first admission
    num_cached: int = 0  # prompt tokens found in the prefix cache at the first admission
    num_stored: int = 0  # first tokens whose keys and values were in shared pages when it was admitted
    pages: list[int] = field(default_factory=list)
    num_pages_sent: int = 0
    num_pages_released: int = 0  # first pages, given back because the sliding window has passed them
    num_pages_published: int = 0  # first pages, that others can find by their content
    digests: list[bytes] = field(default_factory=list)  # of full pages of token_ids, as far as somebody asked
    followers: list[Sequence] = field(default_factory=list)  # choices that wait for this one's prompt
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    pooled: list[tuple[float, ...]] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        key: str,
        request: Request | EncodeRequest,
        number: int,
        now: float,
        choice: int = 0,
        leader: Sequence | None = None,
    ) -> Sequence:
        """A text to encode, or a choice of a request; the first choice leads the others."""
        if isinstance(request, EncodeRequest):
            ids, sampling, pooling, salt = list(request.token_ids), None, request.pooling, ""
        else:
            assert request.sampling.seed is not None
            sampling = replace(request.sampling, seed=request.sampling.seed + choice)
            if choice:
                sampling = replace(sampling, prompt_logprobs=None)  # they are the first choice's to give
            ids, pooling, salt = list(request.prompt_ids), None, request.cache_salt
        return cls(
            number, key, choice, ids, len(ids), sampling, pooling, request.priority, request.user, salt, now, leader
        )

    @property
    def order(self) -> tuple[int, int]:
        """Who comes first when not everybody can."""
        return self.priority, self.number

    @property
    def has_run(self) -> bool:
        return self.waited_s is not None

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def num_missing(self) -> int:
        """Tokens that can be scheduled now: 1 while decoding, 0 if the step under way ends the sequence."""
        if self.in_flight and (
            self.sampling is None or self.num_generated + self.in_flight >= self.sampling.max_tokens
        ):
            return 0
        return len(self.token_ids) + self.in_flight - self.num_scheduled

    @property
    def wants_all_rows(self) -> bool:
        """Every prompt token's hidden state is needed, so none may come from the prefix cache."""
        return self.sampling is None or self.sampling.prompt_logprobs is not None

    def start(self) -> SequenceStart:
        ids = tuple(self.token_ids)
        return SequenceStart(self.number, ids, self.num_prompt, self.sampling, self.pooling, self.group)

    def chunk(self, length: int) -> SequenceChunk:
        """The next `length` tokens; they count as scheduled from now on."""
        first, last = self.num_scheduled, self.num_scheduled + length
        ids = self.token_ids[first:last]
        if len(ids) < length:
            ids.append(LAST_SAMPLED)
        self.num_scheduled = last
        ends = last == len(self.token_ids) + self.in_flight
        new_pages = tuple(self.pages[self.num_pages_sent :])
        self.num_pages_sent = len(self.pages)
        if ends:
            self.in_flight += 1
        return SequenceChunk(self.number, tuple(ids), first, new_pages, ends, max(0, self.num_stored - first))

    def take(
        self, token_id: int, logprob: TokenLogprob | None, routing: Routing | None, eos_ids: frozenset[int]
    ) -> TokenEvent:
        """Append a sampled token; what to tell the caller, with a reason if it ends the sequence."""
        sampling = self.sampling
        assert sampling is not None
        self.token_ids.append(token_id)
        reason: FinishReason | None = None
        if token_id in sampling.stop_token_ids or (token_id in eos_ids and not sampling.ignore_eos):
            reason = "stop"
        elif self.num_generated >= sampling.max_tokens:
            reason = "length"
        prompt_logprobs = None
        if sampling.prompt_logprobs is not None:  # given once, with the first token
            prompt_logprobs = (None, *self.prompt_logprobs)
            self.sampling = replace(sampling, prompt_logprobs=None)
        first = self.choice == 0 and not self.answered
        self.answered = True
        return TokenEvent(
            self.key,
            (token_id,),
            self.choice,
            finish_reason=reason,
            stop_reason=token_id if token_id in sampling.stop_token_ids else None,
            cached_tokens=self.num_cached if first else 0,
            waited_s=self.waited_s if first else None,
            logprobs=() if logprob is None else (logprob,),
            routing=() if routing is None else (routing,),
            prompt_logprobs=prompt_logprobs,
        )

    def failure(self, error: str) -> TokenEvent | EncodeEvent:
        """The last event of a sequence that cannot go on."""
        if self.sampling is None:
            return EncodeEvent(self.key, error=error)
        return TokenEvent(self.key, (), self.choice, finish_reason="error", error=error)

    def lose_pages(self) -> list[int]:
        """The pages it held; it has to begin again."""
        held = self.pages[self.num_pages_released :]
        self.pages = []
        self.num_scheduled = self.num_accepted = self.num_pages_sent = self.num_pages_released = self.num_stored = 0
        self.num_pages_published = 0
        self.prompt_logprobs, self.pooled = [], []
        self.running = False
        self.life += 1
        return held

    def rewind(self) -> None:
        """The steps under way are void and the ranks know it no more, but its pages hold what was accepted."""
        self.num_scheduled = self.num_accepted
        self.in_flight = self.num_pages_sent = 0
        self.started = False
