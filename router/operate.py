"""The operators' routes: Prometheus's figures, and the policy at run time."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import FastAPI, Request
from prometheus_client.metrics_core import Metric
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError
from starlette.responses import Response

from policies.control.loop import run_every
from policies.control.policy_setting import PolicyChoice, PolicyWatch
from policies.control.store import LoadStore, StoreUnavailable
from policies.failures import Failures
from policies.registry import PolicyError, policy_names
from replicas.errors import ErrorCode, TriadError
from router.errors import json_response
from router.fields import json_len
from router.metrics import CONTENT_TYPE, OPEN_METRICS, Metrics
from router.openapi import OTHER_RESPONSES, POLICY_RESPONSES
from router.state import plain

logger = logging.getLogger(__name__)

READING_PERIOD_S = 10.0
"""The period of reading for metrics that are pushed; a scrape reads afresh."""


MAX_PARAMETER = 1e9
MAX_PARAMS_LEN = 64 * 2**10


def _readable(params: dict[str, Any]) -> dict[str, Any]:
    """The parameters, if all that decide can read them from Redis and reckon with them."""
    waiting: list[Any] = [params]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict | list):
            waiting += value.values() if isinstance(value, dict) else value
        elif isinstance(value, int | float) and not abs(value) <= MAX_PARAMETER:
            raise PydanticCustomError(
                "parameter", "A number is from -{most} to {most}", {"most": f"{MAX_PARAMETER:g}"}
            )
    if json_len(params, "The object") > MAX_PARAMS_LEN:
        raise PydanticCustomError("too_long", "They have at most {most} bytes", {"most": MAX_PARAMS_LEN})
    return params


class PolicyBody(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    policy: Annotated[str, Field(min_length=1, max_length=200)]
    policy_params: Annotated[dict[str, Any], AfterValidator(_readable)] = Field(default_factory=dict)


Siblings = Callable[[], Awaitable[list[Metric]]]
"""Gives the other ingresses' metrics; raises nothing, and leaves out those that don't answer."""


def add_metrics_route(app: FastAPI, metrics: Metrics, store: LoadStore, siblings: Siblings | None) -> None:
    @app.get("/metrics", response_class=Response)
    async def prometheus(request: Request) -> Response:
        others: list[Metric] = []
        if siblings is not None:
            others = await siblings()
        await read_cluster(metrics, store)
        is_open = OPEN_METRICS in request.headers.get("accept", "").lower()
        content_type = f"{OPEN_METRICS}; version=1.0.0; charset=utf-8" if is_open else CONTENT_TYPE
        return Response(metrics.exposition(others, is_open), headers={"content-type": content_type})


def add_policy_routes(app: FastAPI, watch: PolicyWatch) -> None:
    """Adds the routes of the policy; changing it needs an admin key, which router.middleware sees to."""

    @app.get("/v1/triad/policy", response_class=Response, responses=OTHER_RESPONSES)
    async def policy() -> Response:
        return json_response(policy_state(watch))

    @app.put("/v1/triad/policy", response_class=Response, responses=POLICY_RESPONSES)
    async def set_policy(body: PolicyBody) -> Response:
        choice = PolicyChoice(body.policy, body.policy_params)
        # A dotted name imports code, so over HTTP it is only the one that the configuration has.
        known = (*policy_names(), watch.configured.policy)
        if choice.policy not in known:
            message = f"Unknown policy '{choice.policy}': choose one of {', '.join(dict.fromkeys(known))}."
            raise TriadError(ErrorCode.INVALID_REQUEST, message, "policy")
        return await _set(watch, choice)

    @app.delete("/v1/triad/policy", response_class=Response, responses=POLICY_RESPONSES)
    async def configured_policy() -> Response:
        return await _set(watch, None)


async def read_cluster(metrics: Metrics, store: LoadStore) -> None:
    """Reads the cluster for the gauges; when the store is lost they show nothing of the replicas."""
    try:
        metrics.seen.view = await store.read_view()
        metrics.seen.store_available = True
    except StoreUnavailable:
        metrics.seen.view = None
        metrics.seen.store_available = False


async def keep_reading(metrics: Metrics, store: LoadStore) -> None:
    """Reads the cluster for the gauges again and again, until cancelled."""

    async def step() -> None:
        await read_cluster(metrics, store)

    failures = Failures("reading the metrics")
    await run_every(READING_PERIOD_S, step, asyncio.Event(), time.monotonic, asyncio.sleep, failures)


def policy_state(watch: PolicyWatch) -> dict[str, Any]:
    """The policy that decides now, and the one that would without a setting."""
    setting = watch.setting
    return {
        "in_force": plain(watch.in_force),
        "configured": plain(watch.configured),
        "set_at_run_time": setting is not None and setting.choice is not None,
        "version": None if setting is None else setting.version,
    }


async def _set(watch: PolicyWatch, choice: PolicyChoice | None) -> Response:
    try:
        await watch.set(choice)
    except PolicyError as error:
        raise TriadError(ErrorCode.INVALID_REQUEST, str(error), "policy_params") from error
    except StoreUnavailable as error:
        logger.warning("the policy could not be set: %s", error)
        raise TriadError(ErrorCode.UNAVAILABLE, "Redis, which keeps the policy, does not answer.") from error
    logger.info("policy set to %s", "the configured one" if choice is None else choice.policy)
    return json_response(policy_state(watch))
