"""Replicas, ranks, recoveries, nodes."""

from __future__ import annotations

from k8s.dashboards.panels import Dashboard, Panel, Query

FLEET = Dashboard(
    "fleet",
    "Mixtral · Fleet",
    (
        (
            "Replicas",
            (
                Panel("Ready", "short", "Replicas that take requests.", (Query("sum(mixtral_ready{SEL})", "ready"),),
                      "number", width=4),
                Panel("Wanted", "short", "By the autoscaler, or as configured.",
                      (Query("sum(ray_serve_autoscaling_target_replicas) or count(mixtral_healthy{SEL})", "wanted"),),
                      "number", width=4),
                Panel(
                    "Ready and healthy", "short", "Not ready but healthy: recovering, or draining.",
                    (
                        Query("sum(mixtral_ready{SEL})", "ready"),
                        Query("sum(mixtral_healthy{SEL})", "healthy"),
                    ),
                ),
                Panel(
                    "Sequences by replica", "short", "Uneven: look at how requests are spread.",
                    (Query("sum by (replica) (mixtral_num_requests_running{SEL})", "{{replica}}"),), "stacked",
                ),
            ),
        ),
        (
            "Ranks and recoveries",
            (
                Panel(
                    "Ranks", "short", "1: ready. 0: loading, frozen or dead.",
                    (
                        Query(
                            'min by (replica, rank) (mixtral_rank_up{SEL,rank=~"$rank"})', "{{replica}} rank {{rank}}"
                        ),
                    ),
                    width=6,
                ),
                Panel(
                    "Ranks by node", "short", "Where they are; one that is dead is nowhere.",
                    (Query("sum by (node, device) (mixtral_rank_info{SEL})", "{{node}} {{device}}"),),
                    "stacked", width=6,
                ),
                Panel(
                    "Failures by cause", "short", "Each begins a recovery.",
                    (Query("sum by (cause) (increase(mixtral_rank_failures_total{SEL}PER))", "{{cause}}"),), "stacked",
                    width=6,
                ),
                Panel(
                    "Pause of a recovery", "s", "For so long streams said nothing.",
                    (
                        Query("sum(increase(mixtral_recovery_pause_seconds_sum{SEL}PER))"
                              " / (sum(increase(mixtral_recovery_pause_seconds_count{SEL}PER)) > 0)", "mean"),
                    ),
                    width=6,
                ),
            ),
        ),
        (
            "Nodes",
            (
                Panel("CPU", "percent", "Of each node.",
                      (Query("max by (ip) (ray_node_cpu_utilization)", "{{ip}}"),)),
                Panel("Memory", "percentunit", "Of each node; at 1 ranks are killed.",
                      (Query("max by (ip) (ray_node_mem_used / ray_node_mem_total)", "{{ip}}"),)),
                Panel("Processes", "bytes", "Resident memory of ranks and replicas.",
                      (Query('sum by (ip) (ray_component_rss_bytes{Component=~"ray::(RayRank|ServeReplica).*"})',
                             "{{ip}}"),)),
                Panel("GPU", "percent", "Of each GPU.",
                      (Query("max by (ip, GpuIndex) (ray_node_gpus_utilization)",
                             "{{ip}} {{GpuIndex}}"),), width=12, gpu=True),
                Panel("GPU memory", "mbytes", "Weights and pages; steady by design.",
                      (Query("max by (ip, GpuIndex) (ray_node_gram_used)", "{{ip}} {{GpuIndex}}"),),
                      width=12, gpu=True),
            ),
        ),
    ),
    ("model", "replica", "rank"),
)  # fmt: skip
