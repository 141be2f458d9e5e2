"""What a simulated replica is made of: its limits, the requests that decode, the texts its cache has."""

from collections import OrderedDict
from dataclasses import dataclass

from loadtest.simulate_cost import StepTable
from policies.cost import StepCost
from policies.modes import DecodePlan, Mode

PREFIXES_KEPT = 16


@dataclass(frozen=True, slots=True)
class Hardware:
    """What every replica is. believed: the step cost it reports to the policy, right or wrong.

    max_prefill_tokens: prompt tokens in a step that decodes too.
    """

    table: StepTable
    believed: StepCost
    max_running: int = 128
    max_step_tokens: int = 4096
    max_prefill_tokens: int = 1024
    num_pages: int = 65_536
    page_size: int = 16
    modes: tuple[Mode, ...] = tuple(Mode)


class Decoding:
    """A request that decodes: what of which plan, since which count of forwards."""

    __slots__ = ("began", "first_s", "forwards", "pace", "plan", "request", "tokens", "wanted")

    def __init__(
        self,
        request: int,
        plan: DecodePlan,
        tokens: float,
        forwards: float,
        began: float,
        wanted: float,
        first_s: float,
    ):
        self.request = request
        self.first_s = first_s
        self.plan = plan
        self.wanted = wanted
        self.tokens = tokens
        self.forwards = forwards
        self.began = began
        self.pace = tokens / forwards


class RecentPrefixes:
    """The common texts that a prefix cache has: the last ones used."""

    def __init__(self) -> None:
        self._kept: OrderedDict[int, None] = OrderedDict()

    def has(self, prefix: int) -> bool:
        """Whether it had this one; from now on it does."""
        had = prefix in self._kept
        self._kept[prefix] = None
        self._kept.move_to_end(prefix)
        if len(self._kept) > PREFIXES_KEPT:
            self._kept.popitem(last=False)
        return had

    def clear(self) -> None:
        self._kept.clear()
