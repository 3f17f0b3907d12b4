from __future__ import annotations

import pytest

from cluster.errors import RequestInvalid
from cluster.messages import EncodeRequest, Request, SamplingParams
from cluster.request_check import check_request

VOCABULARY, LENGTH = 100, 16


def generation(prompt: tuple[int, ...] = (1, 2), n: int = 1, max_tokens: int = 4, **sampling: object) -> Request:
    return Request("r", prompt, SamplingParams(max_tokens, **sampling), n=n)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "request_",
    [
        generation(),
        generation(tuple(range(12))),
        generation(
            stop_token_ids=(0, 99), logit_bias=((99, 1.0),), allowed_token_ids=(0, 99), bad_words=((1, 2), (99,))
        ),
        generation(logprobs=0, prompt_logprobs=VOCABULARY),
        EncodeRequest("e", tuple(range(16)), "mean"),
    ],
)
def test_what_can_run_passes(request_: Request | EncodeRequest) -> None:
    check_request(request_, VOCABULARY, LENGTH)


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        (generation(()), "the prompt has 0 tokens"),
        (generation(tuple(range(13))), "13 tokens and 4 more were asked for; together they must be 1 to 16"),
        (EncodeRequest("e", tuple(range(17)), "mean"), "17 tokens and 0 more"),
        (EncodeRequest("e", (5, 100), "mean"), "the prompt: the model's token ids are 0 to 99"),
        (generation((1, -1)), "the prompt: the model's token ids are 0 to 99"),
        (generation(n=0), "n 0 and max_tokens 4 must be at least 1"),
        (generation(max_tokens=0), "must be at least 1"),
        (generation(stop_token_ids=(100,)), "stop_token_ids"),
        (generation(logit_bias=((-1, 1.0),)), "logit_bias"),
        (generation(allowed_token_ids=(100,)), "allowed_token_ids"),
        (generation(allowed_token_ids=()), "must name a token"),
        (generation(bad_words=((1, 100),)), "bad_words"),
        (generation(bad_words=((1,), ())), "each of bad_words"),
        (generation(logprobs=101), "logprobs 101 must be 0 to 100"),
        (generation(prompt_logprobs=-1), "prompt_logprobs -1"),
    ],
)
def test_what_would_fail_in_a_step_is_refused_before_it(request_: Request | EncodeRequest, why: str) -> None:
    with pytest.raises(RequestInvalid, match=why):
        check_request(request_, VOCABULARY, LENGTH)
