"""What a refusal by router.admission_control is over HTTP."""

from replicas.errors import ErrorCode
from router.admission_control import Admission, Shed
from router.errors import Overloaded


def raise_if_shed(verdict: Admission) -> None:
    """Raises Overloaded: UNAVAILABLE (503) where there is no capacity, QUEUE_FULL (429) where it is taken."""
    if not isinstance(verdict, Shed):
        return
    if verdict.contended:
        message = f"The server is full ({verdict.reason}); try again in {verdict.retry_after_s} s."
        raise Overloaded(ErrorCode.QUEUE_FULL, message, verdict.retry_after_s)
    raise Overloaded(ErrorCode.UNAVAILABLE, "No replica can take the request.", verdict.retry_after_s)
