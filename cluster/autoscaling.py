"""Ray Serve's autoscaler, deciding by what replicas say of themselves; policies.scaling is the decision.

Serve's own count of requests would mislead it: submitting one is a call that ends at once, and a
channel, which never ends, stands for any number of them.
"""

from typing import Any

from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from policies.scaling import DEMAND, wanted_replicas

REPORT_PERIOD_S = 2.0
"""The period at which each replica reports to Serve's controller."""
LOOK_BACK_S = 4.0
"""The time over which the mean demand is taken."""


def scale(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """The number of replicas wanted, for Serve's controller, which then applies its delays and bounds."""
    said = (context.aggregated_metrics or {}).get(DEMAND, {})
    shares = [said[replica] for replica in context.running_replicas if replica in said]
    return wanted_replicas(shares, context.current_num_replicas, context.target_num_replicas), {}


def autoscaling_config(
    *,
    min_replicas: int,
    initial_replicas: int,
    max_replicas: int,
    upscale_delay_s: float,
    downscale_delay_s: float,
) -> AutoscalingConfig:
    return AutoscalingConfig(
        min_replicas=min_replicas,
        initial_replicas=initial_replicas,
        max_replicas=max_replicas,
        upscale_delay_s=upscale_delay_s,
        downscale_delay_s=downscale_delay_s,
        # Deprecated in favour of an environment variable, which Ray 2.60 does not read yet.
        metrics_interval_s=REPORT_PERIOD_S,
        look_back_period_s=LOOK_BACK_S,
        policy=AutoscalingPolicy.model_validate({"policy_function": f"{__name__}:{scale.__name__}"}),
    )
