"""As much of a Kubernetes API as helm asks when it renders: its version, its kinds, and secrets."""

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

VERSION = {"major": "1", "minor": "33", "gitVersion": "v1.33.0"}
KINDS = {
    "v1": ("Secret", "Service", "ConfigMap", "ServiceAccount", "Pod"),
    "apps/v1": ("StatefulSet",),
    "policy/v1": ("PodDisruptionBudget",),
    "networking.k8s.io/v1": ("NetworkPolicy",),
    "ray.io/v1": ("RayService",),
}
"""By group and version, what the chart makes by default."""


class Cluster:
    """secrets: those in it, as manifests; all of release `my` and in the namespace that is asked for."""

    def __init__(self, secrets: Sequence[dict[str, Any]] = ()):
        owner = {"meta.helm.sh/release-name": "my", "meta.helm.sh/release-namespace": "default"}
        self._secrets = {
            secret["metadata"]["name"]: secret | {"metadata": secret["metadata"] | {"annotations": owner}}
            for secret in secrets
        }

    def get(self, path: str) -> dict[str, Any] | None:
        parts = path.partition("?")[0].strip("/").split("/")
        match parts:
            case ["version"]:
                return VERSION
            case ["api"]:
                return {"kind": "APIVersions", "versions": ["v1"]}
            case ["apis"]:
                groups = []
                for version in KINDS:
                    name, _, number = version.rpartition("/")
                    if name:
                        of = {"groupVersion": version, "version": number}
                        groups.append({"name": name, "versions": [of], "preferredVersion": of})
                return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
            case ["api", "v1"] | ["apis", _, _]:
                version = "/".join(parts[1:])
                resources = [
                    {"name": f"{kind.lower()}s", "namespaced": True, "kind": kind, "verbs": ["get", "list"]}
                    for kind in KINDS[version]
                ]
                return {"kind": "APIResourceList", "groupVersion": version, "resources": resources}
            case ["api", "v1", "namespaces", _, "secrets"]:
                items = list(self._secrets.values())
                return {"kind": "SecretList", "apiVersion": "v1", "metadata": {}, "items": items}
            case ["api", "v1", "namespaces", _, "secrets", name]:
                return self._secrets.get(name)
        return None

    @contextmanager
    def running_on_loopback(self) -> Iterator[str]:
        get = self.get

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                found = get(self.path)
                status = 200 if found is not None else 404
                absent = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound"}
                body = json.dumps(found or absent | {"code": 404}).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            thread = threading.Thread(target=server.serve_forever, args=(0.02,))
            thread.start()
            try:
                yield f"http://127.0.0.1:{server.server_port}"
            finally:
                server.shutdown()
                thread.join()
