"""The demo model: its corpus, its files, and that it answers, through transformers and through our own forward."""

from __future__ import annotations

import json
import os
import random
import re
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

from model.checkpoint import load_weights
from model.config import load_config
from model.demo import artefacts
from model.demo.corpus import sums
from model.demo.corpus.conversation import WEIGHTS, Conversation, Corpus, seeded
from model.demo.corpus.entries import expand, expansions, parse, part
from model.demo.corpus.phrasing import mistype
from model.demo.corpus.turns import Turn
from model.demo.data import BOS, EOS, SHORT, UNKNOWN, Encoder, batches
from model.demo.evaluation import KINDS, ask, evaluate, greedy
from model.demo.muon import orthogonal
from model.demo.network import Network, Shape
from model.demo.train import curriculum, optimizers
from model.exchange import OneRank
from model.kv_cache import KVCache
from model.mixtral import Mixtral
from model.shard import Shard
from model.tokenizer import load_tokenizer
from tests.paged_texts import PAGE, PagedTexts

DEMO = Path(artefacts.__file__).parent
MOST_BYTES = 12_000_000
MOST_TOKENS = 120
DRAWN = 15_000 if os.environ.get("MIXTRAL_TEST_ALL") else 6_000

# A question, and what its answer must contain.
QUESTIONS = (
    ("What is mixtral-serve?", "Ray Serve"),
    ("how many experts does mixtral have", "8 experts"),
    ("What happens when a worker dies?", "No token is lost"),
    ("Which route tells whether the server is ready?", "/ready"),
    ("What is the difference between all_to_all and all_reduce?", "all_to_all sends each token"),
    ("Tell me a story about a fox named Zorbin who finds a bell.", "a fox named Zorbin"),
    ("What is 8 + 7?", "8 + 7 = 15."),
    ("what is 38 + 47", "= 85."),
    ("What is the capital of France?", "I don't know"),
    ("What is a volcano?", "I don't know what a volcano is."),
    ("Thank you!", "You're welcome!"),
    ("hi", "Hello!"),
    ("what is this?", "demo model of mixtral-serve"),
    ("how do I run it", "make serve"),
    ("does it need a GPU?", "A GPU is not needed"),
    ("what is mixtral", "mixture of experts"),
    ("why ray", "Ray starts the workers"),
    ("can you write code", "I cannot write code."),
)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus()


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder((DEMO / "tokenizer.model").read_bytes())


@cache
def transformers_answers() -> dict[str, list[int]]:
    """Greedy token ids per question, </s> included if it came."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(DEMO)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(DEMO)
    tokenizer.pad_token, tokenizer.padding_side = "</s>", "left"
    chats = [[{"role": "user", "content": question}] for question, _ in QUESTIONS]
    prompts = tokenizer.apply_chat_template(chats, return_tensors="pt", padding=True)
    whole = model.generate(**prompts, max_new_tokens=MOST_TOKENS, do_sample=False, pad_token_id=EOS)
    answers = {}
    for (question, _), row in zip(QUESTIONS, whole[:, prompts["input_ids"].shape[1] :].tolist(), strict=True):
        answers[question] = row[: row.index(EOS) + 1] if EOS in row else row
    return answers


def plain(question: str) -> str:
    return re.sub(r"[^a-z0-9+*/ -]", "", question.lower()).strip()


# The corpus.


def test_the_same_seed_gives_the_same_text(corpus: Corpus) -> None:
    first, second, other = seeded("test", 3), seeded("test", 3), seeded("test", 4)
    conversations = [corpus.conversation(first) for _ in range(300)]
    again = Corpus()
    assert conversations == [again.conversation(second) for _ in range(300)]
    assert conversations != [corpus.conversation(other) for _ in range(300)]


def test_training_never_asks_a_held_out_question(corpus: Corpus) -> None:
    rng = seeded("test", 0)
    trained = {plain(turn.question) for _ in range(DRAWN) for turn in corpus.conversation(rng).turns}
    # A name may be one of thousands; the words around it must be new, whatever the name.
    assert not any(question.startswith(("hello my name is", "please call me")) for question in trained)
    for kind in KINDS:
        if kind != "name":
            asked = {plain(corpus.held_out_turn(rng, kind).question) for _ in range(400)}
            assert asked.isdisjoint(trained), kind


def test_training_never_does_a_held_out_sum(corpus: Corpus) -> None:
    rng = seeded("test", 1)
    seen = 0
    for _ in range(DRAWN):
        for turn in corpus.conversation(rng).turns:
            for a, operator, b in re.findall(r"(?<![-+] )\b(\d+) ([-+*]) (\d+)(?: =|\) =)", turn.answer):
                seen += 1
                assert not sums.is_held_out(operator, int(a), int(b)), turn
    assert seen > 1000


def test_every_step_of_every_sum_is_right(corpus: Corpus) -> None:
    rng = seeded("test", 2)
    checked = 0
    for held_out in (False, True):
        for _ in range(2000):
            answer = sums.turn(rng, held_out).answer
            if "=" in answer:
                for chain in answer.rstrip(".").split(", "):
                    steps = chain.split(" = ")
                    assert len({eval(step) for step in steps}) == 1, answer
                    checked += 1
    assert checked > 3000


@pytest.mark.parametrize(
    ("operator", "a", "b", "steps"),
    [
        ("+", 3, 4, "3 + 4 = 7"),
        ("+", 38, 40, "38 + 40 = 78"),
        ("+", 38, 47, "38 + 47 = 38 + 40 + 7 = 78 + 7 = 85"),
        ("-", 52, 38, "52 - 38 = 52 - 30 - 8 = 22 - 8 = 14"),
        ("-", 3, 8, "3 - 8 = -(8 - 3) = -5"),
        ("*", 12, 11, "12 * 11 = 132"),
    ],
)
def test_two_digit_numbers_are_added_in_steps(operator: str, a: int, b: int, steps: str) -> None:
    assert sums.chain(operator, a, b) == steps


def test_one_question_has_one_answer(corpus: Corpus) -> None:
    """Two answers to one question would make greedy decoding a tie."""
    rng = seeded("test", 5)
    answers: dict[str, str] = {}
    for _ in range(DRAWN):
        turn = corpus.turn(rng)
        assert answers.setdefault(turn.question.lower(), turn.answer) == turn.answer, turn.question


def test_every_fact_has_questions_to_train_on_and_one_kept(corpus: Corpus) -> None:
    facts = [entry for file in corpus.facts for entry in file]
    assert len(facts) > 200
    for entry in [*facts, *corpus.chat, *corpus.off_topic]:
        assert entry.questions, entry
        assert entry.held_out, entry


def test_no_alternative_is_a_kept_question_or_has_a_second_answer(corpus: Corpus) -> None:
    entries = [*(entry for file in corpus.facts for entry in file), *corpus.chat, *corpus.off_topic]
    kept = {plain(question) for entry in entries for question in entry.held_out + entry.visitors}
    answers: dict[str, str] = {}
    for entry in entries:
        for question in (found for line in entry.questions for found in expansions(line)):
            assert plain(question) not in kept, question
            assert answers.setdefault(question.lower(), entry.answer) == entry.answer, question
    assert len(answers) > 10_000


def test_alternatives_are_drawn_one_by_one() -> None:
    line = "(How (big|large)|What size) is it( here|)?"
    every = set(expansions(line))
    assert every == {f"{how} is it{here}?" for how in ("How big", "How large", "What size") for here in (" here", "")}
    rng = seeded("test", 8)
    assert {expand(rng, line) for _ in range(200)} == every
    assert expand(rng, "def main(): pass") == "def main(): pass"


def test_a_slip_changes_little() -> None:
    rng = seeded("test", 9)
    question = "Which worker holds model.safetensors and /health?"
    slips = {mistype(rng, question) for _ in range(1000)} - {question}
    assert len(slips) > 10
    for slip in slips:
        assert "model.safetensors" in slip
        assert "/health" in slip
        assert abs(len(slip) - len(question)) <= 1
    assert "What Ray?" in {mistype(rng, "What is Ray?") for _ in range(200)}


def test_a_line_without_mark_is_refused() -> None:
    with pytest.raises(ValueError, match="no line of a corpus file starts with 'W'"):
        parse("= a page\nWhat is this?")


def test_a_list_is_split_into_two_parts_without_overlap() -> None:
    words = list("abcdefghij")
    assert part(words, held_out=False) + part(words, held_out=True) == words
    assert part(words, held_out=True) == ["i", "j"]


# Packing.


def test_packed_rows_give_the_logits_of_each_text_alone(corpus: Corpus, encoder: Encoder) -> None:
    torch.manual_seed(0)
    network = Network(Shape(vocab_size=encoder.processor.vocab_size(), num_layers=2))
    batch = next(batches([corpus], encoder, seed=0))
    assert batch.token_BL.shape == SHORT
    token_L, text_L, position_L = batch.token_BL[0], batch.text_BL[0], batch.position_BL[0]
    assert len(set(text_L.tolist())) > 2, "a row with several texts"
    with torch.inference_mode():
        everywhere = torch.arange(len(token_L))
        packed_LV = network(token_L[None], position_L[None], text_L[None], everywhere).logits_NV
        for text in set(text_L.tolist()):
            inside = (text_L == text).nonzero().flatten()
            alone = torch.arange(len(inside))
            logits_NV = network(token_L[inside][None], alone[None], torch.zeros_like(alone)[None], alone).logits_NV
            if token_L[inside[0]] == BOS:
                torch.testing.assert_close(logits_NV, packed_LV[inside], rtol=1e-4, atol=1e-4)


def test_only_answers_are_learnt(encoder: Encoder) -> None:
    turns = (Turn("chat", "Hi!", "Hello."), Turn("chat", "Bye!", "Goodbye!"))
    text = encoder.text(Conversation(turns, system="Be kind."))
    learnt = [token for token, is_answer in zip(text.token_ids, text.is_answer, strict=True) if is_answer]
    assert learnt == encoder.answer("Hello.") + encoder.answer("Goodbye!")
    assert encoder.prompt(Conversation(turns, system="Be kind.")) + encoder.answer("Goodbye!") == text.token_ids


# The training.


@pytest.mark.parametrize("shape", [(3, 16, 40), (40, 16), (24, 24)])
def test_muon_steps_in_every_direction_alike(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    directions = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
    assert directions.min() > 0.3
    assert directions.max() < 1.3


def test_muon_and_adam_share_the_parameters_and_lower_the_loss(corpus: Corpus, encoder: Encoder) -> None:
    torch.manual_seed(0)
    network = Network(Shape(vocab_size=encoder.processor.vocab_size(), num_layers=1))
    muon, adam = optimizers(network)
    assert len(muon.momenta) + len(adam.param_groups[0]["params"]) == len(list(network.parameters()))
    batch = next(batches([corpus], encoder, seed=0))
    few = slice(0, 6)
    inside_N = batch.wanted_N < batch.token_BL[few].numel()
    wanted_N, target_N = batch.wanted_N[inside_N], batch.target_N[inside_N]
    losses = []
    for _ in range(4):
        logits = network(batch.token_BL[few], batch.position_BL[few], batch.text_BL[few], wanted_N).logits_NV
        loss = torch.nn.functional.cross_entropy(logits, target_N)
        losses.append(loss.item())
        network.zero_grad()
        torch.autograd.backward(loss)
        muon.step(1e-2)
        adam.param_groups[0]["lr"] = 1e-2
        adam.step()
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 1


def test_skills_come_first_then_everything() -> None:
    kinds = [set(corpus.weights) for corpus in curriculum(steps=12, skill_steps=2)]
    assert kinds[:2] == [{"sum", "repeat"}] * 2
    assert kinds[2:] == [set(WEIGHTS)] * 10
    assert set(KINDS) - set(WEIGHTS) == {"visitor"}


# The tokenizer.


def test_the_tokenizer_gives_every_text_back(corpus: Corpus, encoder: Encoder) -> None:
    rng = seeded("test", 6)
    sentences = [
        text for _ in range(2000) for turn in corpus.conversation(rng).turns for text in (turn.question, turn.answer)
    ]
    for sentence in [*sentences, "naïve café 東京 🦊", "two  spaces\nand a line"]:
        ids = encoder.processor.encode(sentence)
        assert encoder.processor.decode(ids) == sentence
        assert UNKNOWN not in ids


def test_special_tokens_have_their_usual_ids(encoder: Encoder) -> None:
    assert [encoder.processor.id_to_piece(token) for token in (UNKNOWN, BOS, EOS)] == ["<unk>", "<s>", "</s>"]


@pytest.mark.parametrize("system", ["", "Be brief."])
def test_training_server_and_transformers_write_a_conversation_alike(system: str, encoder: Encoder) -> None:
    turns = (Turn("sum", "What is 2 + 3?", "2 + 3 = 5."), Turn("follow-up", "Are you sure?", "I think so."))
    expected = encoder.prompt(Conversation(turns, system))
    messages = [{"role": "system", "content": system}] if system else []
    messages += [
        {"role": "user", "content": turns[0].question},
        {"role": "assistant", "content": turns[0].answer},
        {"role": "user", "content": turns[1].question},
    ]
    theirs: Any = transformers.AutoTokenizer.from_pretrained(DEMO)
    assert theirs.apply_chat_template(messages)["input_ids"] == expected
    assert load_tokenizer(DEMO).chat_prompt(messages) == expected


# The files.


def test_the_directory_is_small() -> None:
    files = [path for path in DEMO.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= MOST_BYTES


def test_config_and_weights_agree() -> None:
    config = json.loads((DEMO / "config.json").read_text())
    shape = Shape(vocab_size=config["vocab_size"])
    assert config == artefacts.config(shape)
    expected = {name: tuple(tensor.shape) for name, tensor in Network(shape).checkpoint().items()}
    with safe_open(DEMO / "model.safetensors", framework="pt") as stored:
        found = {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
        assert {stored.get_slice(name).get_dtype() for name in found} == {"BF16"}
    assert found == expected


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    network, tokenizer = artefacts.read(DEMO)
    artefacts.write(tmp_path, network, tokenizer)
    for name in (
        "config.json",
        "generation_config.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "model.safetensors",
    ):
        assert (tmp_path / name).read_bytes() == (DEMO / name).read_bytes(), name


# The answers.


@pytest.mark.parametrize(("question", "wanted"), QUESTIONS)
def test_answers_contain_what_they_must_and_end(question: str, wanted: str, encoder: Encoder) -> None:
    *answer, last = transformers_answers()[question]
    assert wanted in encoder.decode(answer)
    assert last == EOS


def test_the_training_forward_gives_transformers_text(encoder: Encoder) -> None:
    network, _ = artefacts.read(DEMO)
    questions = [question for question, _ in QUESTIONS[::2]]  # each of its steps computes the whole text
    answers = greedy(network, [encoder.prompt(ask(question)) for question in questions])
    assert [[*answer.token_ids, EOS] for answer in answers] == [
        transformers_answers()[question] for question in questions
    ]


def test_the_serving_forward_gives_transformers_text() -> None:
    """All questions in one batch: as long as each answer is the expected one so far, its next token is too."""
    config, tokenizer = load_config(DEMO), load_tokenizer(DEMO)
    cpu = torch.device("cpu")
    model = Mixtral(config, load_weights(DEMO, config, Shard(), dtype=torch.float32, device=cpu))
    kv = KVCache(config, Shard(), num_pages=1000, page_size=PAGE, dtype=torch.float32, device=cpu)
    prompts = [tokenizer.chat_prompt([{"role": "user", "content": question}]) for question, _ in QUESTIONS]
    texts = [
        prompt + transformers_answers()[question] for prompt, (question, _) in zip(prompts, QUESTIONS, strict=True)
    ]
    sequences = PagedTexts(texts, 1000, random.Random(0))
    lengths = [len(prompt) for prompt in prompts]
    while any(lengths):
        batch = sequences.step(lengths)
        last_rows = torch.tensor([span.row + span.length - 1 for span in batch.spans])
        logits = model.logits(
            model.forward(replace(batch, logits_rows=last_rows), kv, OneRank(config.num_local_experts))
        )
        open_texts = [number for number, length in enumerate(lengths) if length]
        assert logits.argmax(dim=-1).tolist() == [texts[number][sequences.done[number]] for number in open_texts]
        lengths = [int(done + 1 < len(text)) for done, text in zip(sequences.done, texts, strict=True)]


def test_all_experts_work(corpus: Corpus, encoder: Encoder) -> None:
    """At least half of an even share in every layer, on questions of every kind."""
    network, _ = artefacts.read(DEMO)
    batch = next(islice(batches([corpus, corpus], encoder, seed=9), 1, None))
    with torch.inference_mode():
        share_LE = network(batch.token_BL, batch.position_BL, batch.text_BL, batch.wanted_N).share_LE
    assert share_LE.shape == (4, 8)
    assert share_LE.min() > 0.5 / 8


def test_the_evaluation_counts_what_an_untrained_model_cannot_do(
    corpus: Corpus, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.demo.evaluation.PER_KIND", 2)
    monkeypatch.setattr("model.demo.evaluation.LONGEST_ANSWER", 4)
    monkeypatch.setattr("model.demo.evaluation.LONG_CONVERSATIONS", 1)
    torch.manual_seed(0)
    network = Network(Shape(vocab_size=encoder.processor.vocab_size(), num_layers=1))
    report = evaluate(network, encoder, corpus, seed=0)
    assert sum(report.right.values()) == 0
    assert set(report.asked.values()) == {2}
    assert report.generated == len(report.wrong) == 2 * len(KINDS)
    assert report.loss > 5
    assert len(report.stretches) == 4
    assert not any(any(right) for right in report.stretches)
    assert all(len(right) > 3 for right in report.stretches)
    assert any("held-out loss" in line for line in report.lines())
