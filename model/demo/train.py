"""Train the demo model, write it as a checkpoint directory, and say what it can do.

    python -m model.demo.train --out DIR [--steps N]   train from nothing, write, evaluate
    python -m model.demo.train --out DIR --evaluate    evaluate what DIR holds

Owns the training loop alone: the text is in corpus/, packing in data.py, the mathematics in network.py.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn import functional
from tqdm import tqdm

from model.demo import artefacts
from model.demo.corpus.conversation import SKILLS, Corpus
from model.demo.data import Encoder, batches, train_tokenizer
from model.demo.evaluation import evaluate
from model.demo.muon import Muon
from model.demo.network import Network, Shape

PEAK_RATE = 4e-3
FINAL_RATE = 4e-5
WARMUP_STEPS = 50
SKILL_PART = 6  # the first sixth of the steps trains skills alone
WEIGHT_DECAY = 0.05
CLIP_NORM = 1.0
BALANCE_WEIGHT = 0.02
STEPS_PER_CHECKPOINT = 500


def learning_rate(step: int, steps: int) -> float:
    """A short rise, then half a cosine down to the final rate."""
    rise = min(1.0, (step + 1) / WARMUP_STEPS)
    fall = 0.5 * (1 + math.cos(math.pi * step / steps))
    return rise * (FINAL_RATE + (PEAK_RATE - FINAL_RATE) * fall)


def curriculum(steps: int) -> Iterator[Corpus]:
    """The corpus of each step: first what must be learnt as a skill, then everything."""
    skills, everything = Corpus(SKILLS), Corpus()
    for step in range(steps):
        yield skills if step < steps // SKILL_PART else everything


def optimizers(network: Network) -> tuple[Muon, torch.optim.AdamW]:
    """Muon for the matrices inside the blocks, AdamW for embedding, head and norms."""
    matrices = [parameter for block in network.blocks for parameter in block.parameters() if parameter.dim() > 1]
    inside = {id(matrix) for matrix in matrices}
    others = [parameter for parameter in network.parameters() if id(parameter) not in inside]
    return Muon(matrices, WEIGHT_DECAY), torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def train(tokenizer: bytes, steps: int, seed: int, out: Path) -> None:
    encoder = Encoder(tokenizer)
    torch.manual_seed(seed)
    network = Network(Shape(vocab_size=encoder.processor.vocab_size()))
    muon, adam = optimizers(network)
    progress = tqdm(batches(curriculum(steps), encoder, seed), total=steps, unit="step")
    smooth_loss = math.log(network.shape.vocab_size)
    for step, batch in enumerate(progress):
        output = network(batch.token_BL, batch.position_BL, batch.text_BL, batch.wanted_N)
        loss = functional.cross_entropy(output.logits_NV, batch.target_N)
        network.zero_grad()
        (loss + BALANCE_WEIGHT * output.balance_loss).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP_NORM)
        rate = learning_rate(step, steps)
        for group in adam.param_groups:
            group["lr"] = rate
        adam.step()
        muon.step(rate)
        smooth_loss += 0.05 * (loss.item() - smooth_loss)
        progress.set_postfix(loss=f"{smooth_loss:.4f}", balance=f"{output.balance_loss.item():.3f}", refresh=False)
        if (step + 1) % STEPS_PER_CHECKPOINT == 0:
            artefacts.write(out, network, tokenizer)
    artefacts.write(out, network, tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model, or evaluate it.")
    parser.add_argument("--out", type=Path, required=True, help="directory of the checkpoint")
    parser.add_argument("--steps", type=int, default=3000, help="training steps (default: 3000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: 2)")
    parser.add_argument("--evaluate", action="store_true", help="train nothing, evaluate what the directory holds")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    corpus = Corpus()
    if not options.evaluate:
        train(train_tokenizer(corpus, options.seed), options.steps, options.seed, options.out)
    # Read back, so that what is evaluated is what was stored: weights rounded to bfloat16.
    network, tokenizer = artefacts.read(options.out)
    for line in evaluate(network, Encoder(tokenizer), corpus, options.seed).lines():
        print(line)


if __name__ == "__main__":
    main()
