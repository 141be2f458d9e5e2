"""The console's page, and what it calls beside OpenAI's routes: the cluster as it goes, a burst of load."""

from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from policies.control.store import LoadStore
from router.auth import key_of
from router.burst import Burst, BurstBody
from router.cluster_feed import ClusterFeed
from router.console_files import add_console
from router.dispatch import Dispatcher
from router.errors import json_response
from router.latencies import RecentLatencies
from router.load_view import LoadView
from router.metrics import Metrics
from router.middleware import ONLY_HEAD
from router.responses import EVENT_STREAM, run_until_disconnect


def add_console_routes(
    app: FastAPI,
    dispatcher: Dispatcher,
    view: LoadView,
    store: LoadStore,
    model_name: str,
    metrics: Metrics | None,
) -> Burst:
    """Adds all routes of the console; returns what runs its bursts, to be closed at the end.

    Where there are API keys, watching and bursts take an admin's, which router.middleware sees to.
    """
    latencies = RecentLatencies() if metrics is None else metrics.latencies
    feed = ClusterFeed(dispatcher, view, store, latencies)
    burst = Burst(dispatcher, model_name, metrics)
    add_console(app)

    # Not in the OpenAPI document, whose other answers end by themselves and start nothing that stays.
    @app.get("/v1/triad/events", response_class=Response, include_in_schema=False)
    async def events() -> Response:
        feed.check_room()
        return WatchResponse(feed)

    @app.post("/v1/triad/burst", response_class=Response, include_in_schema=False)
    async def start_burst(request: Request, body: BurstBody) -> Response:
        burst.start(body, key_of(request))
        state: dict[str, Any] = {"num_requests": body.num_requests, "duration_s": body.duration_s}
        return json_response(state, 202)

    return burst


class WatchResponse(Response):
    """Sends the feed's events until they end or the client goes."""

    def __init__(self, feed: ClusterFeed):
        super().__init__(headers=EVENT_STREAM)
        # Of a body that is not known yet there is no length.
        del self.headers["content-length"]
        self._feed = feed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        if not scope.get(ONLY_HEAD):
            await run_until_disconnect(receive, lambda: self._send_events(send))
        await send({"type": "http.response.body", "body": b""})

    async def _send_events(self, send: Send) -> None:
        async with aclosing(self._feed.watch()) as events:
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
