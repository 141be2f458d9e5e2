"""All that the routes work with."""

from dataclasses import dataclass, field

from opentelemetry.trace import Tracer

from policies.control.policy_setting import PolicyWatch
from policies.control.store import LoadStore
from router.auth import KeyRing
from router.config import IngressConfig
from router.dispatch import Dispatcher
from router.errors import ApiError
from router.limits import KeyLimiter
from router.load_view import LoadView
from router.metrics import Metrics
from router.operate import Siblings
from router.responses import chunk_interval_s


@dataclass(frozen=True, slots=True)
class AppState:
    """All that the routes work with."""

    dispatcher: Dispatcher
    view: LoadView
    store: LoadStore
    model_name: str
    """The name clients ask for, which answers have."""
    created: int
    """The time when the model was loaded, in seconds since 1970."""
    config: IngressConfig = field(default_factory=IngressConfig)
    keys: KeyRing = field(default_factory=KeyRing)
    limiter: KeyLimiter | None = None
    """None counts nothing."""
    policy: PolicyWatch | None = None
    """None: the policy can't be changed at run time."""
    metrics: Metrics | None = None
    siblings: Siblings | None = None
    """The figures that /metrics shows beside this ingress's own."""
    tracer: Tracer | None = None
    """None traces nothing."""
    answers_id: bool = True
    """True if answers have the request's id from here, and not from what serves the app."""

    @property
    def model_names(self) -> tuple[str, ...]:
        """The names by which clients may ask for the model."""
        return (self.model_name, *self.config.model_aliases)

    def interval_s(self) -> float:
        """Returns the least time between two chunks of a stream as things are."""
        if self.config.stream_interval_ms is None:
            return chunk_interval_s(self.dispatcher.num_in_flight)
        return self.config.stream_interval_ms / 1000.0

    def check_model(self, name: str | None) -> None:
        """Raises ApiError for a model that is not served; None stands for the one that is."""
        if name is not None and name not in self.model_names:
            had = ", ".join(f"'{known}'" for known in self.model_names)
            message = f"The model '{name}' does not exist; this server has {had}."
            raise ApiError(404, "model_not_found", message, "model")
