"""The fields of a generation body as the engine's SamplingParams, checked against this model's vocabulary."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from cluster.messages import Grammar, SamplingParams
from deployments.errors import invalid
from deployments.prompts import Prompts
from deployments.protocol import GenerationRequest


def sampling_params(
    body: GenerationRequest, prompts: Prompts, grammar: Grammar | None, *, longest: int, show_special_tokens: bool
) -> SamplingParams:
    """For every prompt of the body; `fitting` makes room for each of them."""
    biases = {int(token): bias for token, bias in body.logit_bias.items()}
    for name, ids in (
        ("stop_token_ids", body.stop_token_ids),
        ("logit_bias", list(biases)),
        ("allowed_token_ids", body.allowed_token_ids or []),
    ):
        prompts.check_ids(ids, name)
    echo = getattr(body, "echo", False)
    return SamplingParams(
        max_tokens=body.max_new_tokens or longest,
        min_tokens=body.min_tokens,
        temperature=body.temperature,
        top_k=max(0, body.top_k),
        top_p=body.top_p,
        min_p=body.min_p,
        seed=None if body.seed is None else body.seed % (1 << 62),  # samplers know no negative seeds; choices add to it
        stop=tuple(body.stop),
        include_stop_str_in_output=body.include_stop_str_in_output,
        stop_token_ids=tuple(body.stop_token_ids),
        ignore_eos=body.ignore_eos,
        skip_special_tokens=not show_special_tokens,
        repetition_penalty=body.repetition_penalty,
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        logit_bias=tuple(biases.items()),
        allowed_token_ids=None if body.allowed_token_ids is None else tuple(dict.fromkeys(body.allowed_token_ids)),
        bad_words=tuple(_bad_words(body.bad_words, prompts)),
        grammar=grammar,
        logprobs=body.wanted_logprobs,
        return_routing=body.return_routing,
        prompt_logprobs=body.wanted_logprobs if echo and body.prompt_logprobs is None else body.prompt_logprobs,
    )


def fitting(sampling: SamplingParams, room: int) -> SamplingParams:
    """`room`: tokens that fit behind a prompt, at least one."""
    max_tokens = min(room, sampling.max_tokens)
    if sampling.min_tokens > max_tokens:
        raise invalid(
            f"min_tokens: {sampling.min_tokens} is more than the {max_tokens} tokens that this answer may have.",
            "min_tokens",
        )
    return replace(sampling, max_tokens=max_tokens)


def _bad_words(words: Iterable[str], prompts: Prompts) -> Iterable[tuple[int, ...]]:
    """Each as it is at the start of a text and behind a space, which are other tokens."""
    sequences: dict[tuple[int, ...], None] = {}
    for word in words:
        for text in (word.lstrip(), " " + word.lstrip()):
            if ids := prompts.tokenizer.encode(text, add_special_tokens=False):
                sequences[tuple(ids)] = None
    return sequences
