"""The adapter by Serve's own records; tests/e2e/test_autoscaling.py has a real Serve."""

import time

import pytest
from ray.serve._private.autoscaling_state import DeploymentAutoscalingState
from ray.serve._private.common import DeploymentID, ReplicaID, ReplicaMetricReport, TimeStampedValue
from ray.serve._private.config import DeploymentConfig
from ray.serve._private.deployment_info import DeploymentInfo

from cluster.autoscaling import autoscaling_config
from policies.scaling import DEMAND

DEPLOYMENT = DeploymentID("Replica", "triad")


@pytest.fixture
def state() -> DeploymentAutoscalingState:
    """Serve's, of a deployment that may have 1 to 8 replicas."""
    scaling = autoscaling_config(
        min_replicas=1, initial_replicas=1, max_replicas=8, upscale_delay_s=0.0, downscale_delay_s=0.0
    )
    info = DeploymentInfo(
        deployment_config=DeploymentConfig(autoscaling_config=scaling),
        replica_config=None,
        start_time_ms=0,
        deployer_job_id="",
    )
    made = DeploymentAutoscalingState(DEPLOYMENT)
    made.register(info, 1)
    return made


def decided(state: DeploymentAutoscalingState, shares: list[float | None], num_wanted: int) -> int:
    """With a running replica for each share; None has not reported."""
    replicas = [ReplicaID(f"r{number}", DEPLOYMENT) for number in range(len(shares))]
    state.update_running_replica_ids(replicas)
    now_s = time.time()
    for replica, share in zip(replicas, shares, strict=True):
        if share is not None:
            series = {DEMAND: [TimeStampedValue(now_s - 1.0, share)]}
            state.record_request_metrics_for_replica(ReplicaMetricReport(replica, series, now_s))
    return state.get_decision_num_replicas(num_wanted)


def test_serve_follows_what_replicas_report(state: DeploymentAutoscalingState) -> None:
    assert decided(state, [0.5], 1) == 1
    assert decided(state, [1.5], 1) == 2


def test_serve_keeps_its_bounds(state: DeploymentAutoscalingState) -> None:
    assert decided(state, [9.0] * 6, 6) == 8
    assert decided(state, [0.0] * 6, 6) == 1


def test_none_is_stopped_while_one_has_not_reported(state: DeploymentAutoscalingState) -> None:
    assert decided(state, [0.1, None], 2) == 2
