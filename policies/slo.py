"""The `slo` policy: as many requests within their targets as can be, and throughput after that."""

from pydantic import Field

from policies.cost_model import CostModelParameters, CostModelPolicy
from policies.forecast import Forecast
from policies.replica_load import ReplicaLoad

NUM_DIGITS = 6
"""Of a number of requests: what differs behind them does by rounding, and must not outweigh throughput."""


class SloParameters(CostModelParameters):
    """The parameters of SloPolicy besides cost_model's. All requests are of one class of service."""

    ttft_s: float = Field(default=1.0, gt=0.0)
    """The target for the time to the first token, in seconds."""
    tpot_s: float = Field(default=0.05, gt=0.0)
    """The target for the time of each token after the first, in seconds."""
    headroom: float = Field(default=0.1, ge=0.0, lt=1.0)
    """The share of a target by which a plan that does not run must stay below it to count as within; the plan
    that runs counts up to the target itself."""


class SloPolicy(CostModelPolicy):
    """Chooses the plan with the most requests expected within their targets; of such plans the fastest."""

    name = "slo"
    Parameters = SloParameters

    def __init__(self, parameters: SloParameters):
        super().__init__(parameters)
        self._targets = parameters

    def _score(self, load: ReplicaLoad, expected: Forecast, is_running: bool) -> tuple[float, float]:
        limit = 1.0 if is_running else 1.0 - self._targets.headroom
        paced = sum(count for count, tpot_s in expected.tpots if tpot_s <= limit * self._targets.tpot_s)
        # As a share: under a plan that answers sooner fewer are in flight, and that is no fault of it.
        share = paced / sum(count for count, _ in expected.tpots)
        in_time = load.num_waiting if ttft_s(load, expected) <= limit * self._targets.ttft_s else 0
        return round(share * load.num_clients + in_time, NUM_DIGITS), self._worth(expected)


def ttft_s(load: ReplicaLoad, expected: Forecast) -> float:
    """Returns the expected seconds to the first token of the last request that waits, or of the next to come.

    Its prompt is prefilled after those before it, in the room that steps leave; where no place is free,
    after as many requests as wait have ended, each with the tokens that a running one still wants.
    """
    step_s = expected.step_ms / 1000.0
    num_free = load.max_step_tokens - sum(count for count, _ in expected.tpots) * expected.plan.block_length
    room = max(0.25 * load.max_step_tokens, num_free)
    prefill_s = step_s * (1.0 + load.waiting_prompt_tokens / room)
    num_blocking = load.num_in_flight - load.max_running
    if num_blocking <= 0 or load.mean_remaining is None:
        return prefill_s
    return prefill_s + num_blocking * load.mean_remaining / expected.tokens_per_s
