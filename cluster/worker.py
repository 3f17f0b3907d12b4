"""One rank: holds a shard of the weights and its pages, and turns plans into sampled tokens.

It decides nothing. What it remembers between steps is, per sequence, what plans told it: sampling parameters,
page table, how many tokens were sampled. Knows no requests, no HTTP, no ray.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

import torch
from torch import Tensor

from cluster.all_to_all import AllReduce, AllToAll, SlotTables
from cluster.config import EngineConfig
from cluster.errors import StepFailed
from cluster.messages import SamplingParams, StepPlan, StepResult, StepTimes, WorkerFacts
from cluster.placement import Placement
from model.batch import Batch, SequenceSpan, page_runs
from model.checkpoint import load_weights
from model.comm import Comm, SoloComm
from model.config import MixtralConfig, load_config
from model.exchange import Exchange, OneRank
from model.kv_cache import KVCache
from model.mixtral import Mixtral
from model.sampler import SamplingRow, sample
from model.shard import Shard
from model.stages import Stages

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(slots=True)
class _SequenceState:
    sampling: SamplingParams
    num_generated: int
    pages: list[int] = field(default_factory=list)


class Worker:
    def __init__(self, rank: int, config: EngineConfig, placement: Placement) -> None:
        self.rank = rank
        self._config = config
        self._placement = placement
        self._device = torch.device(config.device)
        self._stages = Stages()
        self._sequences: dict[int, _SequenceState] = {}
        self._next_step = 0
        self._comm: Comm = SoloComm()
        torch.set_num_threads(config.parallel.threads_per_rank)

    def load(self, progress: Callable[[int, int], None] | None = None) -> WorkerFacts:
        """Read this rank's share of the checkpoint."""
        began = monotonic()
        directory = Path(self._config.model_path)
        self._model_config: MixtralConfig = load_config(directory)
        dtype = DTYPES[self._config.dtype]
        self._shard = Shard(self.rank, self._config.parallel.tensor, self._placement.slots_of(self.rank))
        read = 0

        def count(done: int, total: int) -> None:
            nonlocal read
            read = done
            if progress is not None:
                progress(done, total)

        self._weights = load_weights(
            directory, self._model_config, self._shard, dtype=dtype, device=self._device, progress=count
        )
        page = KVCache.bytes_per_page(self._model_config, self._shard, self._config.kv.page_size, dtype)
        return WorkerFacts(
            pid=os.getpid(),
            node=socket.gethostname(),
            device=str(self._device),
            weight_bytes=read,
            load_seconds=monotonic() - began,
            bytes_per_page=page,
            free_bytes=self._free_bytes(),
        )

    def join(self, comm: Comm, num_pages: int) -> None:
        """Take a place among the ranks and get ready for the first step."""
        self._comm = comm
        self._model = Mixtral(self._model_config, self._weights, tensor=comm, stages=self._stages)
        self._tables = SlotTables(self._placement, self.rank, self._device)
        self._kv = KVCache(
            self._model_config,
            self._shard,
            num_pages=num_pages,
            page_size=self._config.kv.page_size,
            dtype=DTYPES[self._config.dtype],
            device=self._device,
        )
        self._sequences.clear()
        self._next_step = 0

    @torch.inference_mode()
    def step(self, plan: StepPlan) -> StepResult:
        if plan.step != self._next_step:
            raise StepFailed(f"rank {self.rank} was given step {plan.step} but expected step {self._next_step}")
        self._next_step += 1
        self._stages.start("build")
        batch = self._build(plan)
        exchange = self._exchange(plan)
        hidden_RD = self._model.forward(batch, self._kv, exchange)
        logits_RV = self._model.logits(hidden_RD)
        self._stages.start("sample")
        sampled = [chunk.seq for chunk in plan.chunks if chunk.sample]
        token_ids = self._sample(sampled, logits_RV)
        return StepResult(plan.step, tuple(sampled), token_ids, StepTimes(**self._stages.take()))

    def _build(self, plan: StepPlan) -> Batch:
        for number in plan.releases:
            del self._sequences[number]
        for start in plan.starts:
            self._sequences[start.seq] = _SequenceState(start.sampling, start.num_generated)
        page_size = self._config.kv.page_size
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        spans: list[SequenceSpan] = []
        logits_rows: list[int] = []
        for chunk in plan.chunks:
            pages = self._sequences[chunk.seq].pages
            pages.extend(chunk.new_pages)
            end = chunk.start + len(chunk.token_ids)
            spans.append(SequenceSpan(len(token_ids), len(chunk.token_ids), end, page_runs(pages)))
            token_ids.extend(chunk.token_ids)
            positions.extend(range(chunk.start, end))
            slots.extend(pages[p // page_size] * page_size + p % page_size for p in range(chunk.start, end))
            if chunk.sample:
                logits_rows.append(len(token_ids) - 1)
        return Batch(
            self._tensor(token_ids),
            self._tensor(positions),
            self._tensor(slots),
            tuple(spans),
            self._tensor(logits_rows),
        )

    def _exchange(self, plan: StepPlan) -> Exchange:
        match plan.exchange:
            case "none":
                return OneRank(self._model_config.num_local_experts)
            case "all_to_all":
                return AllToAll(self._comm, self._tables, plan.num_tokens)
            case "all_reduce":
                return AllReduce(self._comm, self._tables)

    def _sample(self, sampled: list[int], logits_RV: Tensor) -> tuple[int, ...]:
        rows = []
        for number in sampled:
            state = self._sequences[number]
            params = state.sampling
            assert params.seed is not None
            rows.append(
                SamplingRow(
                    params.temperature, params.top_k, params.top_p, params.min_p, params.seed, state.num_generated
                )
            )
            state.num_generated += 1
        if self.rank != 0 or not rows:  # only rank 0 answers
            return ()
        return tuple(sample(logits_RV, rows).tolist())

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def _free_bytes(self) -> int:
        if self._device.type == "cuda":
            return int(torch.cuda.mem_get_info(self._device)[0])
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
