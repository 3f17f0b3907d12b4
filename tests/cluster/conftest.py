"""One local Ray for the tests of this folder, apart from any other on the machine. Never together with tests/dist,
which forks: `make test` gives each its own pytest."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray

from deployments.local_ray import OBJECT_STORE_BYTES
from tests.e2e.server import ENVIRONMENT
from tests.quiet_ray import QUIET

METRICS = {
    "RAY_metrics_report_interval_ms": "5000",  # for Prometheus; every 10 s otherwise
    "RAY_SERVE_STATUS_GAUGE_REPORT_INTERVAL_S": "1",  # of deployments and replicas; likewise
}


@pytest.fixture(scope="session")
def local_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (ENVIRONMENT | QUIET | METRICS).items():
            patch.setenv(name, value)
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
            object_store_memory=OBJECT_STORE_BYTES,
            _temp_dir=str(tmp_path_factory.mktemp("r")),
        )
        yield
        ray.shutdown()
