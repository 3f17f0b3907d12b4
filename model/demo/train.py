"""Train the demo model, write it as a checkpoint directory, and say what it can do.

    python -m model.demo.train --out DIR [--steps N]              train, write, evaluate
    python -m model.demo.train --out DIR --continue [--steps N]   train what DIR holds further
    python -m model.demo.train --out DIR --evaluate               evaluate what DIR holds

Owns the training loop alone: the text is in corpus/, packing in data.py, the mathematics in network.py.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional
from tqdm import tqdm

from model.demo import artefacts
from model.demo.corpus.conversation import LATER_WEIGHTS, Corpus
from model.demo.data import Encoder, batches, train_tokenizer
from model.demo.evaluation import evaluate
from model.demo.network import Network, Shape

PEAK_RATE = 3e-3
LATER_PEAK_RATE = 2e-3  # of a run that continues another
FINAL_RATE = 3e-5
WARMUP_STEPS = 100
WEIGHT_DECAY = 0.05
CLIP_NORM = 1.0
BALANCE_WEIGHT = 0.02
STEPS_PER_CHECKPOINT = 500


def learning_rate(step: int, steps: int, peak: float) -> float:
    """A short rise, then half a cosine down to the final rate."""
    rise = min(1.0, (step + 1) / WARMUP_STEPS)
    fall = 0.5 * (1 + math.cos(math.pi * step / steps))
    return rise * (FINAL_RATE + (peak - FINAL_RATE) * fall)


@dataclass(frozen=True, slots=True)
class Run:
    """One training run: from the network as it is, to weights in out."""

    corpus: Corpus
    tokenizer: bytes
    steps: int
    peak_rate: float
    seed: int
    out: Path


def first_run(options: argparse.Namespace) -> tuple[Network, Run]:
    corpus = Corpus()
    tokenizer = train_tokenizer(corpus, options.seed)
    torch.manual_seed(options.seed)
    network = Network(Shape(vocab_size=Encoder(tokenizer).processor.vocab_size()))
    return network, Run(corpus, tokenizer, options.steps, PEAK_RATE, options.seed, options.out)


def later_run(options: argparse.Namespace) -> tuple[Network, Run]:
    network, tokenizer = artefacts.read(options.out)
    # Another seed, or the run would read the same conversations again.
    return network, Run(Corpus(LATER_WEIGHTS), tokenizer, options.steps, LATER_PEAK_RATE, options.seed + 1, options.out)


def train(network: Network, run: Run) -> None:
    matrices = [parameter for parameter in network.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in network.parameters() if parameter.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=True,
    )
    training = batches(run.corpus, Encoder(run.tokenizer), run.steps, run.seed)
    progress = tqdm(training, total=run.steps, unit="step")
    smooth_loss = math.log(network.shape.vocab_size)
    for step, batch in enumerate(progress):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, run.steps, run.peak_rate)
        output = network(batch.token_BL, batch.position_BL, batch.text_BL, batch.wanted_N)
        loss = functional.cross_entropy(output.logits_NV, batch.target_N)
        optimizer.zero_grad()
        (loss + BALANCE_WEIGHT * output.balance_loss).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP_NORM)
        optimizer.step()
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

    if not options.evaluate:
        train(*(later_run(options) if options.further else first_run(options)))
    # Read back, so that what is evaluated is what was stored: weights rounded to bfloat16.
    network, tokenizer = artefacts.read(options.out)
    for line in evaluate(network, Encoder(tokenizer), Corpus(), options.seed).lines():
        print(line)


if __name__ == "__main__":
    main()
