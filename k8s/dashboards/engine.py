"""What the engine does: batch, pages, where a step's time goes."""

from __future__ import annotations

from k8s.dashboards.panels import STEPS, Dashboard, Panel, Query, per_step, quantiles, rate

ENGINE = Dashboard(
    "engine",
    "Mixtral · Engine",
    (
        (
            "The batch",
            (
                Panel(
                    "Sequences", "short", "What steps compute, and what waits for its turn.",
                    (
                        Query("sum(mixtral_num_requests_running{SEL})", "running"),
                        Query("sum(mixtral_num_requests_waiting{SEL})", "waiting"),
                    ),
                ),
                Panel("Tokens per step", "short", "Prompt pieces and decodes together.", quantiles("iteration_tokens")),
                Panel(
                    "Not taken in", "reqps", "Requests turned away, or failed before a step, by why.",
                    (rate("requests_rejected_total", "reason", "{{reason}}"),),
                ),
            ),
        ),
        (
            "Pages",
            (
                Panel(
                    "KV pages in use", "percentunit", "At 1 sequences are preempted.",
                    (Query("max by (replica) (mixtral_kv_cache_usage_perc{SEL})", "{{replica}}"),),
                ),
                Panel(
                    "Prefix cache", "percentunit", "Share of prompt tokens that need not be computed.",
                    (
                        Query(
                            "sum(rate(mixtral_prefix_cache_hits_total{SEL}PER))"
                            " / sum(rate(mixtral_prefix_cache_queries_total{SEL}PER))",
                            "hits",
                        ),
                    ),
                ),
                Panel(
                    "Preemptions", "short", "Sequences a second that gave their pages back and began again.",
                    (rate("num_preemptions_total", "replica", "{{replica}}"),),
                ),
            ),
        ),
        (
            "The step",
            (
                Panel("Step", "s", "From handing it out to its result.", quantiles("step_duration_seconds")),
                Panel(
                    "Where a step's time goes", "s",
                    "On rank 0 (GPUs: of launching), and in the engine's thread (schedule, postprocess, publish).",
                    (Query(f"{per_step(by='by (part) ')} / scalar({STEPS})", "{{part}}"),), "stacked",
                ),
                Panel("Steps", "ops", "Steps a second.", (rate("engine_steps_total", "replica", "{{replica}}"),)),
                Panel(
                    "Engine's thread", "percentunit", "Share of the time it is busy: at 1 it holds the ranks up.",
                    (Query(per_step(',part=~"schedule|postprocess|publish"', "by (replica) "), "{{replica}}"),),
                ),
                Panel(
                    "Since each rank's last step", "s", "Rises while idle; a rank that rises alone hangs.",
                    (
                        Query(
                            'max by (replica, rank) (mixtral_rank_last_step_age_seconds{SEL,rank=~"$rank"})',
                            "{{replica}} rank {{rank}}",
                        ),
                    ),
                ),
                Panel(
                    "Graphs", "ops", "Steps that replayed a CUDA graph, or did not: prompts, or none fits.",
                    (rate("graph_steps_total", "outcome", "{{outcome}}"),), "stacked",
                ),
            ),
        ),
    ),
    ("model", "replica", "rank"),
)  # fmt: skip
