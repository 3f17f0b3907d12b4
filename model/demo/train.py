"""Train the demo model, write it as a checkpoint directory, and say what it can do.

    python -m model.demo.train --out DIR [--steps N]              train from nothing, write, evaluate
    python -m model.demo.train --out DIR --continue [--steps N]   the same from what DIR holds, for a corpus that grew
    python -m model.demo.train --out DIR --evaluate               evaluate what DIR holds

Owns the training loop alone: the text is in corpus/, packing in data.py, the mathematics in network.py.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
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
LATER_PEAK_RATE = 1.5e-3  # of a run that continues another
FINAL_RATE = 4e-5
WARMUP_STEPS = 50
SKILL_PART = 6  # the first sixth of the steps trains skills alone
WEIGHT_DECAY = 0.05
CLIP_NORM = 1.0
BALANCE_WEIGHT = 0.02
STEPS_PER_CHECKPOINT = 500


@dataclass(frozen=True, slots=True)
class Run:
    """What one training run does, apart from the network it begins with."""

    tokenizer: bytes
    steps: int
    skill_steps: int  # the first of them
    peak_rate: float
    seed: int
    out: Path


def first_run(corpus: Corpus, steps: int, seed: int, out: Path) -> tuple[Network, Run]:
    tokenizer = train_tokenizer(corpus, seed)
    torch.manual_seed(seed)
    network = Network(Shape(vocab_size=Encoder(tokenizer).processor.vocab_size()))
    return network, Run(tokenizer, steps, steps // SKILL_PART, PEAK_RATE, seed, out)


def later_run(steps: int, seed: int, out: Path) -> tuple[Network, Run]:
    network, tokenizer = artefacts.read(out)
    # Another seed, or it would read the conversations of the first run again.
    return network, Run(tokenizer, steps, 0, LATER_PEAK_RATE, seed + 1, out)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """A short rise, then half a cosine down to the final rate."""
    rise = min(1.0, (step + 1) / WARMUP_STEPS)
    fall = 0.5 * (1 + math.cos(math.pi * step / steps))
    return rise * (FINAL_RATE + (peak - FINAL_RATE) * fall)


def curriculum(steps: int, skill_steps: int) -> Iterator[Corpus]:
    """The corpus of each step: first what must be learnt as a skill, then everything."""
    skills, everything = Corpus(SKILLS), Corpus()
    for step in range(steps):
        yield skills if step < skill_steps else everything


def optimizers(network: Network) -> tuple[Muon, torch.optim.AdamW]:
    """Muon for the matrices inside the blocks, AdamW for embedding, head and norms."""
    matrices = [parameter for block in network.blocks for parameter in block.parameters() if parameter.dim() > 1]
    inside = {id(matrix) for matrix in matrices}
    others = [parameter for parameter in network.parameters() if id(parameter) not in inside]
    return Muon(matrices, WEIGHT_DECAY), torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def train(network: Network, run: Run) -> None:
    muon, adam = optimizers(network)
    training = batches(curriculum(run.steps, run.skill_steps), Encoder(run.tokenizer), run.seed)
    progress = tqdm(training, total=run.steps, unit="step")
    smooth_loss = math.log(network.shape.vocab_size)
    for step, batch in enumerate(progress):
        # Weights and gradients stay float32; products in bfloat16 take half of the time.
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = network(batch.token_BL, batch.position_BL, batch.text_BL, batch.wanted_N)
        loss = functional.cross_entropy(output.logits_NV.float(), batch.target_N)
        network.zero_grad()
        (loss + BALANCE_WEIGHT * output.balance_loss).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP_NORM)
        rate = learning_rate(step, run.steps, run.peak_rate)
        for group in adam.param_groups:
            group["lr"] = rate
        adam.step()
        muon.step(rate)
        smooth_loss += 0.05 * (loss.item() - smooth_loss)
        progress.set_postfix(loss=f"{smooth_loss:.4f}", balance=f"{output.balance_loss.item():.3f}", refresh=False)
        if (step + 1) % STEPS_PER_CHECKPOINT == 0:
            artefacts.write(run.out, network, run.tokenizer)
    artefacts.write(run.out, network, run.tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model, or evaluate it.")
    parser.add_argument("--out", type=Path, required=True, help="directory of the checkpoint")
    parser.add_argument("--steps", type=int, default=3000, help="training steps (default: 3000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: 2)")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--continue", action="store_true", dest="further", help="train what the directory holds further")
    mode.add_argument("--evaluate", action="store_true", help="train nothing, evaluate what the directory holds")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    corpus = Corpus()
    if options.further:
        train(*later_run(options.steps, options.seed, options.out))
    elif not options.evaluate:
        train(*first_run(corpus, options.steps, options.seed, options.out))
    # Read back, so that what is evaluated is what was stored: weights rounded to bfloat16.
    network, tokenizer = artefacts.read(options.out)
    for line in evaluate(network, Encoder(tokenizer), corpus, options.seed).lines():
        print(line)


if __name__ == "__main__":
    main()
