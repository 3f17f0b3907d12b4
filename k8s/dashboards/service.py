"""What callers get: traffic, errors, times, goodput."""

from __future__ import annotations

from k8s.dashboards.panels import Dashboard, Panel, Query, mean, quantiles, rate, within

SERVICE = Dashboard(
    "service",
    "Mixtral · Service",
    (
        (
            "What callers get",
            (
                Panel(
                    "Requests", "reqps", "Answers by route and status.",
                    (
                        Query(
                            "sum by (route, status) (rate(mixtral_http_requests_total{SEL}PER)) > 0",
                            "{{status}} {{route}}",
                        ),
                    ),
                    "stacked",
                ),
                Panel(
                    "Failures", "percentunit", "Share of answers with a 5xx.",
                    (
                        Query(
                            '(sum(rate(mixtral_http_requests_total{SEL,status=~"5.."}PER)) or vector(0))'
                            " / sum(rate(mixtral_http_requests_total{SEL}PER))",
                            "5xx",
                        ),
                    ),
                ),
                Panel(
                    "Errors by code", "reqps", "What callers were told, in streams too.",
                    (rate("http_errors_total", "code", "{{code}}"),),
                ),
                Panel(
                    "Tokens", "short", "Tokens a second: computed for prompts, taken from the prefix cache, generated.",
                    (
                        rate("prompt_tokens_total", "model", "prompt"),
                        rate("prefix_cache_hits_total", "model", "cached"),
                        rate("generation_tokens_total", "model", "generated"),
                    ),
                ),
                Panel(
                    "Answers by how they end", "reqps", "stop, length; abort: the client left; error: ours.",
                    (rate("request_success_total", "finished_reason", "{{finished_reason}}"),), "stacked",
                ),
                Panel(
                    "Tokens by key", "short", "Tokens a second by the name of the API key.",
                    (rate("key_tokens_total", "key, kind", "{{key}} {{kind}}"),), "stacked",
                ),
            ),
        ),
        (
            "How fast",
            (
                Panel("Time to first token", "s", "Queue and prefill.", quantiles("time_to_first_token_seconds")),
                Panel("Between two tokens", "s", "As they leave.", quantiles("inter_token_latency_seconds")),
                Panel("Whole answer", "s", "From arrival to last token.", quantiles("e2e_request_latency_seconds")),
                Panel(
                    "In the queue", "s", "From arrival to the first step; high: more replicas are needed.",
                    quantiles("request_queue_time_seconds"),
                ),
                Panel(
                    "Where an answer's time goes", "s", "Means of its three parts.",
                    (
                        mean("request_queue_time_seconds", "queue"),
                        mean("request_prefill_time_seconds", "prefill"),
                        mean("request_decode_time_seconds", "decode"),
                    ),
                    "stacked",
                ),
                Panel(
                    "Longest wait", "s", "Of a request that has no token yet. What the autoscaler looks at.",
                    (Query("max by (replica) (mixtral_longest_wait_seconds{SEL})", "{{replica}}"),),
                ),
            ),
        ),
        (
            "Goodput",
            (
                Panel(
                    "Within the objective", "percentunit", "Shares of first tokens, and of tokens, that came in time.",
                    (
                        within("time_to_first_token_seconds", "$slo_first", "first token within $slo_first s"),
                        within("inter_token_latency_seconds", "$slo_between", "token within $slo_between s"),
                    ),
                    width=12,
                ),
                Panel(
                    "Good requests", "reqps", "Requests a second whose first token came in time, beside all.",
                    (
                        Query(
                            'sum(rate(mixtral_time_to_first_token_seconds_bucket{SEL,le="$slo_first"}PER))', "in time"
                        ),
                        Query("sum(rate(mixtral_time_to_first_token_seconds_count{SEL}PER))", "all"),
                    ),
                    width=12,
                ),
            ),
        ),
    ),
    ("model", "replica", "slo_first", "slo_between"),
)  # fmt: skip
