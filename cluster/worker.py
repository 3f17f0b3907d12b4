"""One rank: holds a shard of the weights and its pages, and turns plans into sampled tokens.

    StepPlan ──prepare──▶ Prepared ──compute──▶ StepOutput ──result──▶ StepResult
               host        (beside it)          waits for a device

It decides nothing. What it remembers between steps is, per sequence, what plans told it: page table, sampling
parameters, the token sampled last. Knows no requests, no HTTP, no ray; who calls what from which thread is
step_line.py's business.

R rows whose hidden states are wanted.  M of these, that are sampled from.  D model width.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from time import monotonic, perf_counter

import torch
from torch import Tensor

from cluster.all_to_all import SlotTables, exchange_for
from cluster.canary import Canary, tokens_of_groups
from cluster.config import EngineConfig
from cluster.errors import CanaryFailed, StepFailed
from cluster.held_experts import HeldExperts, fetch, hold
from cluster.messages import Grammar, StepPlan, StepResult, StepTimes, WorkerFacts
from cluster.messages import Routing as TokenRouting
from cluster.padded_exchange import PaddedExchange
from cluster.placement import Placement
from cluster.rank_loader import RankLoader
from cluster.rank_state import RankState, StepInput
from cluster.readout import Readout
from cluster.routing import routing_of
from cluster.step_output import OnTheWay, StepOutput
from model.batch import Batch
from model.comm import Groups
from model.exchange import SlotLoad
from model.grammar import CompiledGrammar, GrammarCompiler
from model.graphs import DecodeGraphs, PaddedSteps
from model.kv_cache import KVCache
from model.mixtral import Mixtral
from model.moe import Routing
from model.stages import Stages
from model.tokenizer import load_tokenizer


@dataclass(frozen=True, slots=True)
class Prepared:
    """A step that only has to be computed."""

    plan: StepPlan
    step: StepInput
    group_tokens: tuple[int, ...]  # of every data group
    seconds: float  # that preparing took


class Worker:
    def __init__(self, rank: int, config: EngineConfig, placement: Placement) -> None:
        self.rank = rank
        self._group, tensor_rank = divmod(rank, config.parallel.tensor)
        self._samples = tensor_rank == 0
        self._config = config
        self._placement = placement
        self._stages = Stages()
        self._kv: KVCache | None = None
        self._fetched: HeldExperts | None = None
        self._canary: Canary | None = None
        self._graphs: DecodeGraphs | None = None
        torch.set_num_threads(config.parallel.threads_per_rank)

    def load(self, progress: Callable[[int, int], None] | None = None) -> WorkerFacts:
        """Read this rank's share of the checkpoint."""
        began = monotonic()
        self._loader = RankLoader(self.rank, self._config, self._placement)
        self._model_config = self._loader.model_config
        weights = self._loader.weights(progress)
        self._held = hold(self._model_config, self.rank, self._placement, weights)
        self._tokenizer = load_tokenizer(self._loader.directory)
        self._compiler = GrammarCompiler(
            self._tokenizer.vocabulary, self._tokenizer.eos_ids, self._model_config.vocab_size
        )
        return WorkerFacts(
            pid=os.getpid(),
            node=socket.gethostname(),
            device=str(self._loader.device),
            weight_bytes=weights.nbytes,
            load_seconds=monotonic() - began,
            bytes_per_page=self._loader.bytes_per_page,
            free_bytes=self._loader.bytes_for_pages(),
        )

    def join(self, groups: Groups, num_pages: int) -> None:
        """Take a place among the ranks and get ready for the first step. Pages keep what they held."""
        torch.set_num_threads(self._config.parallel.threads_per_rank)  # each thread's own, and this one will compute
        self._groups = groups
        if self._kv is None or self._kv.num_pages != num_pages:
            self._kv = None  # its memory is free before the new one's is taken
            self._kv = self._loader.pages(num_pages)
        limits = self._config.scheduler
        self._last_ids = torch.zeros(limits.max_running, dtype=torch.int64, device=self._loader.device)
        self._use(self._held)
        self._state = RankState(
            self._tokenizer.eos_ids,
            self._model_config.vocab_size,
            lambda grammar: self.compile(grammar).matcher(),
            self._kv,
            seats=limits.max_running,
            max_tokens=limits.max_step_tokens,
            group=self._group,
            samples=self._samples,
        )
        self.next_step = self._next_computed = 0

    def _use(self, held: HeldExperts) -> None:
        """Compute with these experts from now on."""
        self._held = held
        self._model = Mixtral(self._model_config, held.weights, tensor=self._groups.tensor, stages=self._stages)
        self._readout = Readout(
            self._model,
            self._groups.tensor,
            self._last_ids,
            self._stages,
            samples=self._samples,
            classifies=not self._model_config.is_language_model and held.weights.head is not None,
        )
        self._tables = SlotTables(held.placement, self._loader.device)
        self._load = SlotLoad(self._model_config.num_hidden_layers, held.placement.slots_per_rank)
        self._canary = None
        self._graphs = None

    def drop_graphs(self) -> None:
        """Before the group is left: NCCL frees nothing that a graph has captured."""
        self._graphs = None

    @torch.inference_mode()
    def fetch(self, placement: Placement) -> None:
        """Read what this placement needs here and is not here yet; a plan that names its number makes it the one used.

        Callable beside steps, from another thread. Both placements' experts are in memory until then.
        """
        self._fetched = None
        if placement.number != self._held.placement.number:
            self._fetched = fetch(self._held, placement, self.rank, self._model_config, self._loader.experts)

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Compile a grammar into the cache, so that no step has to. Callable beside a step. ModelError if it cannot."""
        return self._compiler.compile(grammar.kind, grammar.text, opens_text=grammar.opens_text)

    def step(self, plan: StepPlan) -> StepResult:
        """The whole of a step, where nothing runs beside it."""
        return self.compute(self.prepare(plan)).result()

    @torch.inference_mode()
    def prepare(self, plan: StepPlan) -> Prepared:
        """What of a step does not need the one before: work of the host alone, beside whose computing it may run.

        In the order of steps, at most two of which are prepared and not computed.
        """
        if plan.step != self.next_step:
            raise StepFailed(f"rank {self.rank} was given step {plan.step} but expected step {self.next_step}")
        assert plan.step < self._next_computed + 2, "its numbers would be written over those of a step to be computed"
        began = perf_counter()
        step = self._state.take(plan)
        group_tokens = plan.group_tokens or (plan.num_tokens,)
        assert plan.canary or plan.capture or step.numbers.tokens == group_tokens[self._group], (
            "ranks would disagree about shapes"
        )
        self.next_step += 1
        return Prepared(plan, step, group_tokens, perf_counter() - began)

    @torch.inference_mode()
    def compute(self, prepared: Prepared) -> StepOutput:
        """In the order of steps, on the thread that joined. A GPU may still be at it when this returns."""
        assert prepared.plan.step == self._next_computed
        self._stages.start("build")
        self._settle(prepared.plan.placement)
        if prepared.plan.canary:
            self._prove(prepared.plan)
            output = StepOutput(self._result(prepared))
        elif prepared.plan.capture:
            self._capture(prepared.plan.capture)
            output = StepOutput(self._result(prepared))
        else:
            output = self._forward(prepared)
        self._next_computed += 1
        return output

    def _forward(self, prepared: Prepared) -> StepOutput:
        plan, step = prepared.plan, prepared.step
        tensors = step.numbers.send(self._last_ids)
        routing: dict[int, TokenRouting] = {}
        if plan.graph:
            assert self._graphs is not None
            self._stages.start("attention")
            hidden_RD = self._graphs.replay(tensors.batch, plan.graph, prepared.group_tokens)
        else:
            hidden_RD, routing = self._launch(prepared, tensors.batch)
        prompt_logprobs = self._readout.judge(step, hidden_RD)
        ids_M, logprobs = self._readout.sample(step, tensors, hidden_RD)
        if not self._samples:
            return StepOutput(self._result(prepared), OnTheWay(ids_M[:0]))  # its result waits all the same
        pooled = self._readout.pool(step, hidden_RD)
        known = replace(
            self._result(prepared),
            seqs=tuple(state.start.seq for state in step.sampled),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            pooled=pooled,
            failed={s.start.seq: s.sampled.error for s in step.states if s.sampled is not None and s.sampled.error},
            routing=routing,
            graph=None if self._graphs is None else plan.graph > 0,
        )
        return StepOutput(known, OnTheWay(ids_M))

    def _launch(self, prepared: Prepared, batch: Batch) -> tuple[Tensor, dict[int, TokenRouting]]:
        """The wanted rows' hidden states, kernel by kernel, and of whoever wants to know it the routing."""
        plan, step = prepared.plan, prepared.step
        assert self._kv is not None
        exchange = exchange_for(plan.exchange, self._groups, self._tables, prepared.group_tokens, self._load)
        told = [m for m, state in enumerate(step.sampled) if state.routed]
        routings: list[Routing] | None = [] if told else None
        hidden_RD = self._model.forward(batch, self._kv, exchange, routings)
        if routings is None:
            return hidden_RD, {}
        routing = routing_of(routings, exchange, batch.logits_rows, [step.sampled_rows[m] for m in told])
        return hidden_RD, {step.sampled[m].start.seq: one for m, one in zip(told, routing, strict=True)}

    def _capture(self, rows: int) -> None:
        """From now on plans may name the graph of so many rows."""
        if self._graphs is None:
            assert self._kv is not None
            limits, groups = self._config.scheduler, self._config.parallel.data
            exchange = PaddedExchange(self._groups, self._tables, self._load)
            self._graphs = self._model.decode_graphs(PaddedSteps(self._kv, limits.max_running, exchange, groups))
        self._graphs.capture(rows)

    def _result(self, prepared: Prepared) -> StepResult:
        """What every rank says of a step."""
        slot_rows = self._load.take() if prepared.plan.report_load else ()
        seconds = self._stages.take()
        seconds["build"] += prepared.seconds
        return StepResult(prepared.plan.step, (), (), StepTimes(**seconds), slot_rows=slot_rows)

    def _settle(self, placement: int) -> None:
        """Use the placement that the plan names."""
        if placement == self._held.placement.number:
            return
        fetched, self._fetched = self._fetched, None
        if fetched is None or fetched.placement.number != placement:
            raise StepFailed(
                f"rank {self.rank} was to use expert placement {placement} but has not fetched it; "
                f"it holds {self._held.placement.number}"
            )
        self._use(fetched)

    def _prove(self, plan: StepPlan) -> None:
        """Every expert and collective gives what it should, or CanaryFailed."""
        if self._canary is None:
            self._canary = Canary(self._held, self.rank, self._groups)
        group_tokens = tokens_of_groups(self._held.placement, self._groups)
        exchange = exchange_for(plan.exchange, self._groups, self._canary.tables, group_tokens)
        fault = self._canary.fault(self._model, exchange)
        if fault is not None:
            raise CanaryFailed(f"a canary found on rank {self.rank}: {fault}")
