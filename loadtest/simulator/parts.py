"""The parts of a simulated replica: its limits, the requests that decode, the texts its cache has."""

from collections import OrderedDict
from dataclasses import dataclass

from loadtest.simulator.cost import StepTable
from policies.cost import StepCost
from policies.modes import DecodePlan, Mode

PREFIXES_KEPT = 16


@dataclass(frozen=True, slots=True)
class Hardware:
    """The equipment and limits that all replicas have alike."""

    table: StepTable
    believed: StepCost
    """The step cost that a replica reports to the policy, right or wrong."""
    max_running: int = 128
    max_step_tokens: int = 4096
    max_prefill_tokens: int = 1024
    """Prompt tokens in a step that decodes too, at most."""
    num_pages: int = 65_536
    page_size: int = 16
    modes: tuple[Mode, ...] = tuple(Mode)


class Decoding:
    """A request that decodes: its plan, tokens and forwards, a forward's rows and wanted logits, and the
    count of forwards when it began."""

    __slots__ = ("began", "first_s", "forwards", "pace", "plan", "request", "rows", "tokens", "wanted")

    def __init__(
        self,
        request: int,
        plan: DecodePlan,
        tokens: float,
        forwards: float,
        began: float,
        rows: float,
        wanted: float,
        first_s: float,
    ):
        self.request = request
        self.first_s = first_s
        self.plan = plan
        self.rows = rows
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
        """True if the cache had this text; from now on it has."""
        had = prefix in self._kept
        self._kept[prefix] = None
        self._kept.move_to_end(prefix)
        if len(self._kept) > PREFIXES_KEPT:
            self._kept.popitem(last=False)
        return had

    def clear(self) -> None:
        self._kept.clear()
