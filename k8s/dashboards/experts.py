"""How evenly experts are used, where they are, and what the exchange costs."""

from __future__ import annotations

from k8s.dashboards.panels import STEPS, Dashboard, Panel, Query, per_step, rate

EXPERTS = Dashboard(
    "experts",
    "Mixtral · Experts",
    (
        (
            "Load",
            (
                Panel(
                    "Rows by layer and expert", "short", "Rows a second: layers down, experts across.",
                    (
                        Query(
                            "sum by (layer, expert) (rate(mixtral_expert_tokens_total{SEL}PER))", "{{layer}}/{{expert}}"
                        ),
                    ),
                    "matrix", ("layer", "expert"), width=12,
                ),
                Panel(
                    "Experts of layer $layer", "percentunit", "Each expert's share of the layer's rows.",
                    (
                        Query(
                            'sum by (expert) (rate(mixtral_expert_tokens_total{SEL,layer=~"$layer"}PER))'
                            ' / scalar(sum(rate(mixtral_expert_tokens_total{SEL,layer=~"$layer"}PER)))',
                            "expert {{expert}}",
                        ),
                    ),
                    "stacked", width=12,
                ),
                Panel(
                    "Imbalance", "short", "Rows of the busiest rank over the mean; 1: even. The rest wait for it.",
                    (
                        Query("max(mixtral_expert_imbalance_ratio{SEL})", "worst layer"),
                        Query("avg(mixtral_expert_imbalance_ratio{SEL})", "mean of layers"),
                    ),
                ),
                Panel(
                    "Imbalance by layer", "short", "Which layers would gain from a rebalance.",
                    (Query("max by (layer) (mixtral_expert_imbalance_ratio{SEL})", "layer {{layer}}"),), width=16,
                ),
            ),
        ),
        (
            "Placement",
            (
                Panel(
                    "Who holds what, layer $layer", "short", "Experts down, ranks across; in how many replicas.",
                    (
                        Query(
                            'sum by (expert, rank) (mixtral_expert_location{SEL,layer=~"$layer",rank=~"$rank"} > 0)',
                            "{{expert}}/{{rank}}",
                        ),
                    ),
                    "matrix", ("expert", "rank"), width=12,
                ),
                Panel(
                    "Rebalances", "short", "Times that experts were moved, and slots that were given another one.",
                    (
                        Query("sum(increase(mixtral_rebalances_total{SEL}PER))", "rebalances"),
                        Query("sum(increase(mixtral_expert_moves_total{SEL}PER))", "slots"),
                        Query("max(mixtral_expert_placement{SEL})", "placement"),
                    ),
                    width=12,
                ),
            ),
        ),
        (
            "Exchange",
            (
                Panel(
                    "Time per step", "s", "Exchange (waiting for the slowest rank included), router, experts.",
                    (
                        Query(
                            per_step(',part=~"exchange|router|experts"', "by (part) ") + f" / scalar({STEPS})",
                            "{{part}}",
                        ),
                    ),
                    "stacked",
                ),
                Panel(
                    "Share of the step in collectives", "percentunit", "What tensor and expert parallelism cost.",
                    (
                        Query(
                            per_step(',part="exchange"')
                            + " / "
                            + per_step(',part!~"schedule|postprocess|publish"'),
                            "exchange",
                        ),
                    ),
                ),
                Panel(
                    "Steps by exchange", "ops", "auto changes from all_reduce to all_to_all with the size of the step.",
                    (rate("steps_by_exchange_total", "exchange", "{{exchange}}"),), "stacked",
                ),
                Panel(
                    "Canaries", "short", "Steps that prove idle slots and collectives, by outcome.",
                    (Query("sum by (outcome) (increase(mixtral_canaries_total{SEL}PER))", "{{outcome}}"),), width=12,
                ),
                Panel(
                    "Since the last canary", "s", "Traffic proves what it uses: only what lies idle needs one.",
                    (Query("max by (replica) (mixtral_canary_age_seconds{SEL})", "{{replica}}"),), width=12,
                ),
            ),
        ),
    ),
    ("model", "replica", "rank", "layer"),
)  # fmt: skip
