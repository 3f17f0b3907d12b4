"""What Ray is told under test: to leave out work that nobody there asks for, half of what a server takes that waits.

Benches do not tell it so: what they measure is what users have.
"""

from __future__ import annotations

QUIET = {
    "RAY_prestart_worker_first_driver": "0",  # workers in reserve
    "RAY_task_events_report_interval_ms": "0",  # a record of every call
    "RAY_event_stats": "0",
    "REPORTER_UPDATE_INTERVAL_MS": "60000",  # samples of all its processes; every 5 s otherwise
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.25",  # 0.1 otherwise
    "RAY_USAGE_STATS_ENABLED": "0",
}
NO_METRICS = {"RAY_enable_metrics_collection": "0", "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "60000"}  # Ray's own
