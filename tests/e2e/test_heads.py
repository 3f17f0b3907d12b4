"""Checkpoints with other heads, against transformers on the same weights: labels, tokens' labels, answers in a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.e2e.in_process import application
from tests.tiny import CONFIG, sentencepiece_model

TEXTS = ["the quick brown fox", "five boxing wizards watch"]


def checkpoint(directory: Path, kind: str) -> Any:
    """transformers' model with random weights, saved with a tokenizer beside it."""
    torch.manual_seed(0)
    labels = {} if kind == "QuestionAnswering" else {"id2label": {0: "bad", 1: "good", 2: "so-so"}}
    own = {name: value for name, value in CONFIG.items() if name != "architectures"}
    model = getattr(transformers, f"MixtralFor{kind}")(transformers.MixtralConfig(**own | labels | {"pad_token_id": 0}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(directory)
    (directory / "tokenizer.model").write_bytes(sentencepiece_model())
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    )
    return model.eval()


async def post(directory: Path, path: str, **fields: Any) -> tuple[Any, list[list[int]]]:
    """The answer, and the ids of the texts in it."""
    async with application(directory) as http:
        response = await http.post(path, json={"model": "tiny"} | fields)
        assert response.status_code == 200, response.text
        texts = fields.get("input") or [fields["question"], fields["context"]]
        ids = [(await http.post("/tokenize", json={"prompt": text})).json()["tokens"] for text in texts]
        refused = await http.post("/v1/completions", json={"model": "tiny", "prompt": "a"})
        assert refused.status_code == 400
    return response.json(), ids


async def test_classify(tmp_path: Path) -> None:
    model = checkpoint(tmp_path, "SequenceClassification")
    answer, all_ids = await post(tmp_path, "/classify", input=TEXTS)
    for item, ids in zip(answer["data"], all_ids, strict=True):
        with torch.inference_mode():
            expected = model(torch.tensor([ids])).logits[0].softmax(-1)
        assert item["probs"] == pytest.approx(expected.tolist(), abs=1e-4)
        assert item["label"] == model.config.id2label[int(expected.argmax())]


async def test_token_classify(tmp_path: Path) -> None:
    model = checkpoint(tmp_path, "TokenClassification")
    answer, all_ids = await post(tmp_path, "/token_classify", input=TEXTS)
    for item, ids in zip(answer["data"], all_ids, strict=True):
        with torch.inference_mode():
            expected = model(torch.tensor([ids])).logits[0].softmax(-1)
        assert [token["id"] for token in item["tokens"]] == ids
        for token, row in zip(item["tokens"], expected, strict=True):
            assert token["probs"] == pytest.approx(row.tolist(), abs=1e-4)
            assert token["label"] == model.config.id2label[int(row.argmax())]


async def test_question_answering(tmp_path: Path) -> None:
    model = checkpoint(tmp_path, "QuestionAnswering")
    question, context = "who watches?", "the lazy dog, while five boxing wizards watch"
    fields = {"question": question, "context": context, "max_answer_tokens": 6}
    answer, (asked, given) = await post(tmp_path, "/question_answering", **fields)
    with torch.inference_mode():
        scores = model(torch.tensor([asked + given]))
    starts = scores.start_logits[0, len(asked) :].softmax(-1)
    ends = scores.end_logits[0, len(asked) :].softmax(-1)
    best = max(
        float(starts[first] * ends[last])
        for first in range(len(given))
        for last in range(max(first, 1), min(first + 6, len(given)))  # given[0] is <s>, which has no text
    )
    assert answer["score"] == pytest.approx(best, rel=1e-3)
    assert context[answer["start"] : answer["end"]] == answer["answer"] != ""
    assert answer["usage"]["prompt_tokens"] == len(asked) + len(given)
