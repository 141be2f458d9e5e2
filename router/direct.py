"""The short way of a completion from Serve's HTTP server to the app of the ingress in the same process.

Behind HAProxy each ingress has an HTTP server of Serve's, which puts tasks, queues and records of Serve's
own around every request. None is of use to a completion: the app has its own access log and metrics, watches
its client itself, and the server waits for what is under way when it stops. Serve takes middleware for its
servers from the function that RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names; with `middleware` there,
completions go to the app at once. All else goes Serve's way, and so does a completion where no ingress is on
this event loop: in Serve's proxies, and where the code of deployments runs on a thread of its own.
"""

from typing import Protocol, runtime_checkable

from ray import serve
from ray.serve.exceptions import RayServeException
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from router.paths import COMPLETIONS, DIRECT


@runtime_checkable
class HasDirectApp(Protocol):
    """A deployment whose app may be called past Serve."""

    def direct_app(self) -> ASGIApp | None:
        """The app; None where it does not belong to the running event loop."""
        ...


class DirectDoor:
    """ASGI middleware of Serve's HTTP servers: completions go to the app itself.

    app: Serve's own
    """

    def __init__(self, app: ASGIApp):
        self._serves = app
        self._direct: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._serves
        if scope["type"] == "http" and scope["path"] in COMPLETIONS:
            # Asked again until it is there: the server starts before the ingress is known to be ready.
            self._direct = self._direct or _app_of_this_process()
            if self._direct is not None:
                app = self._direct
                scope[DIRECT] = send
        await app(scope, receive, send)


def middleware() -> list[Middleware]:
    """What Serve is to put around its HTTP servers."""
    return [Middleware(DirectDoor)]


def _app_of_this_process() -> ASGIApp | None:
    try:
        deployment = serve.get_replica_context().servable_object
    except RayServeException:
        return None  # one of Serve's proxies
    return deployment.direct_app() if isinstance(deployment, HasDirectApp) else None
