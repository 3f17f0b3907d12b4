"""What a request must be for the ranks to compute it. A pure check at the engine's door, whoever sends the request.

HTTP checks every field and says it better. What passed there by mistake would fail inside a step, where it fails
everybody's, so it is checked again here.
"""

from __future__ import annotations

from collections.abc import Collection

from cluster.errors import RequestInvalid
from cluster.messages import EncodeRequest, Request, SamplingParams


def check_request(request: Request | EncodeRequest, vocab_size: int, max_model_len: int) -> None:
    """Raises RequestInvalid with what was asked and what is possible."""
    if isinstance(request, EncodeRequest):
        token_ids, max_tokens = request.token_ids, 0
    else:
        token_ids, max_tokens = request.prompt_ids, request.sampling.max_tokens
        if request.n < 1 or max_tokens < 1:
            raise RequestInvalid(f"n {request.n} and max_tokens {max_tokens} must be at least 1")
        _check_sampling(request.sampling, vocab_size)
    if not token_ids or len(token_ids) + max_tokens > max_model_len:
        raise RequestInvalid(
            f"the prompt has {len(token_ids)} tokens and {max_tokens} more were asked for; "
            f"together they must be 1 to {max_model_len}"
        )
    _check_ids(token_ids, "the prompt", vocab_size)


def _check_sampling(sampling: SamplingParams, vocab_size: int) -> None:
    _check_ids(sampling.stop_token_ids, "stop_token_ids", vocab_size)
    _check_ids([token_id for token_id, _ in sampling.logit_bias], "logit_bias", vocab_size)
    _check_ids([token_id for word in sampling.bad_words for token_id in word], "bad_words", vocab_size)
    if sampling.allowed_token_ids is not None:
        _check_ids(sampling.allowed_token_ids, "allowed_token_ids", vocab_size)
        if not sampling.allowed_token_ids:
            raise RequestInvalid("allowed_token_ids must name a token at least")
    if not all(sampling.bad_words):
        raise RequestInvalid("each of bad_words must have a token at least")
    for name, wanted in (("logprobs", sampling.logprobs), ("prompt_logprobs", sampling.prompt_logprobs)):
        if wanted is not None and not 0 <= wanted <= vocab_size:
            raise RequestInvalid(f"{name} {wanted} must be 0 to {vocab_size}")


def _check_ids(token_ids: Collection[int], where: str, vocab_size: int) -> None:
    if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
        raise RequestInvalid(f"{where}: the model's token ids are 0 to {vocab_size - 1}")
