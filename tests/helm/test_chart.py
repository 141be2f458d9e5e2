"""The chart as a real helm renders it, checked against what reads it: Kubernetes, KubeRay, Serve, Triad."""

import base64
import gzip
import json
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from cluster.config import ClusterConfig
from policies.control.plan import ObservedPlan, ReplicaPlan
from policies.control.store import ClusterView
from policies.modes import Mode, default_plan
from policies.replica_load import ClusterLoad, ObservedLoad, ReplicaLoad
from replicas.messages import DecodingReport, Finished
from router.metrics import Metrics, Outcome
from tests.helm.cluster import Cluster
from tests.helm.helm_binary import find_helm

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "triad"
VALUES = sorted(path.name for path in (CHART / "values").glob("*.yaml"))
CRD = ROOT.parent / "shared" / "data" / "kuberay-rayservice-crd.yaml.gz"
ALL_ON = (
    "serviceMonitor.enabled=true,prometheusRule.enabled=true,grafanaDashboard.enabled=true,gateway.enabled=true,"
    "gateway.parentRefs[0].name=door,ingress.enabled=true,ingress.host=a.example,autoscaling.enabled=true,"
    "serve.max_replicas=3,serve.target_ttft_s=2,serve.downscale_delay_s=120,workers.cacheClaim=a-cache"
)
OTHERS = {"RayService", "ServiceMonitor", "PrometheusRule", "HTTPRoute"}
PASSWORD = "valkey.password=of-16-characters-or-more"
"""Without a cluster to ask the chart draws none."""
DEPRECATED = {
    "deploymentUnhealthySecondThreshold",
    "serviceUnhealthySecondThreshold",
    "enableIngress",
    "ray.io/ft-enabled",
}


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([find_helm(), *arguments], capture_output=True, text=True, timeout=120, check=False)


@cache
def rendered(values: str | None = None, *sets: str) -> list[dict[str, Any]]:
    options = [] if values is None else ["-f", str(CHART / "values" / values)]
    for one in (PASSWORD, *sets):
        options += ["--set", one]
    made = helm("template", "my", str(CHART), "--kube-version", "1.33.0", *options)
    assert made.returncode == 0, made.stderr
    return [document for document in yaml.safe_load_all(made.stdout) if document]


def kind(documents: list[dict[str, Any]], name: str) -> dict[str, Any]:
    (found,) = [document for document in documents if document["kind"] == name]
    return found


def pods(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    cluster = kind(documents, "RayService")["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    found = [group["template"]["spec"] for group in groups]
    for document in documents:
        if document["kind"] == "StatefulSet":
            found.append(document["spec"]["template"]["spec"])
        if document["kind"] == "Pod":
            found.append(document["spec"])
    return found


CASES = [(None, ()), (None, (ALL_ON,)), *((name, ()) for name in VALUES)]


@pytest.mark.parametrize("values", [None, *VALUES])
def test_lint(values: str | None) -> None:
    options = [] if values is None else ["-f", str(CHART / "values" / values)]
    linted = helm("lint", "--strict", str(CHART), *options)
    assert linted.returncode == 0, linted.stdout + linted.stderr


@pytest.mark.parametrize(("values", "sets"), CASES)
def test_core_objects_fit_kubernetes_schemas(values: str | None, sets: tuple[str, ...]) -> None:
    documents = rendered(values, *sets)
    names = [(document["kind"], document["metadata"]["name"]) for document in documents]
    assert len(set(names)) == len(names)
    for document in documents:
        if document["kind"] not in OTHERS:
            kubernetes_validate.validate(document, "1.33", strict=True)


@pytest.mark.parametrize(("values", "sets"), CASES)
def test_the_rayservice_fits_its_crd(values: str | None, sets: tuple[str, ...]) -> None:
    if not CRD.exists():
        pytest.skip("KubeRay's CRD is not at ../shared/data")
    crd = yaml.safe_load(gzip.decompress(CRD.read_bytes()))
    (version,) = [version for version in crd["spec"]["versions"] if version["name"] == "v1"]
    service = kind(rendered(values, *sets), "RayService")
    schema = strictly(version["schema"]["openAPIV3Schema"])
    jsonschema.validate(service, schema)
    cluster = service["spec"]["rayClusterConfig"]
    wrong = service["spec"] | {"rayClusterConfig": cluster | {"gcsFaultTolerance": {}}}
    with pytest.raises(jsonschema.ValidationError, match="gcsFaultTolerance"):
        jsonschema.validate(service | {"spec": wrong}, schema)


def strictly(schema: Any) -> Any:
    """An unknown field is dropped by Kubernetes without a word; here it is an error."""
    if isinstance(schema, list):
        return [strictly(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strictly(value) for key, value in schema.items()}
    keeps = schema.get("x-kubernetes-preserve-unknown-fields") or schema.get("x-kubernetes-embedded-resource")
    if isinstance(schema.get("properties"), dict) and "type" in schema and not keeps:
        made.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
    return made


@pytest.mark.parametrize(("values", "sets"), CASES)
def test_the_serve_config_is_serves_and_ours(
    values: str | None, sets: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_PASSWORD", "p@ss/word")
    service = kind(rendered(values, *sets), "RayService")
    text = service["spec"]["serveConfigV2"]
    assert "p@ss" not in text
    schema = ServeDeploySchema.model_validate(yaml.safe_load(text))
    (application,) = schema.applications
    config = ClusterConfig.model_validate(application.args)
    most = 4 if values == "gpu-14b-multi.yaml" else None
    assert (config.max_replicas, config.target_ttft_s) == ((3, 2.0) if ALL_ON in sets else (most, 1.0))
    assert config.redis_url is not None
    assert ":p%40ss%2Fword@" in config.redis_url
    for pod in pods([service]):
        assert pod["terminationGracePeriodSeconds"] >= config.drain_timeout_s + 30
    assert service["spec"]["rayClusterDeletionDelaySeconds"] >= config.drain_timeout_s
    assert application.import_path == "cluster.app:deploy"
    assert schema.http_options.host == "0.0.0.0"


@pytest.mark.parametrize(("values", "sets"), CASES)
def test_the_rayservice_is_as_it_should_be(values: str | None, sets: tuple[str, ...]) -> None:
    service = kind(rendered(values, *sets), "RayService")
    assert not any(name in json.dumps(service) for name in DEPRECATED)
    cluster = service["spec"]["rayClusterConfig"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert "redisAddress" in cluster["gcsFaultToleranceOptions"]
    (group,) = cluster["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    config = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]["args"]
    gpus = int(container["resources"].get("limits", {}).get("nvidia.com/gpu", 0))
    assert (gpus > 0) == (config.get("num_gpus", 0) > 0)
    assert ("max_replicas" in config) == cluster["enableInTreeAutoscaling"]
    assert config["policy"] == ClusterConfig().policy
    assert (
        gpus * group["replicas"]
        >= config.get("num_gpus", 0) * config.get("tensor_parallel", 1) * config["num_replicas"]
    )


@pytest.mark.parametrize(("values", "sets"), CASES)
def test_nothing_runs_as_root_or_writes_its_root_or_has_no_bounds(
    values: str | None, sets: tuple[str, ...]
) -> None:
    for pod in pods(rendered(values, *sets)):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] is True
            assert security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert {"cpu", "memory"} <= set(container["resources"]["requests"])
            assert "memory" in container["resources"]["limits"]
            names = {volume["name"] for volume in pod.get("volumes", [])} | {"data"}
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= names


def test_services_and_policies_select_pods_that_there_are() -> None:
    documents = rendered(None, ALL_ON)
    cluster = kind(documents, "RayService")["spec"]["rayClusterConfig"]
    templates = [g["template"] for g in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    templates.append(kind(documents, "StatefulSet")["spec"]["template"])
    labels = [template["metadata"]["labels"] for template in templates]

    def num_selected(selector: dict[str, str]) -> int:
        return sum(selector.items() <= of.items() for of in labels)

    for document in documents:
        if document["kind"] == "Service":
            assert num_selected(document["spec"]["selector"]) == 1
    assert num_selected(kind(documents, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"]) == 1
    assert num_selected(kind(documents, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"]) == 3
    monitor = kind(documents, "ServiceMonitor")["spec"]["selector"]["matchLabels"]
    services = [d for d in documents if d["kind"] == "Service"]
    assert sum(monitor.items() <= service["metadata"]["labels"].items() for service in services) == 1
    dns = next(rule for rule in kind(documents, "NetworkPolicy")["spec"]["egress"] if "to" not in rule)
    assert {(port["port"], port["protocol"]) for port in dns["ports"]} == {(53, "UDP"), (53, "TCP")}


def test_workers_keep_kernels_and_costs_where_a_claim_is_named() -> None:
    head, worker = pods(rendered(None, "workers.cacheClaim=a-cache"))[:2]
    (container,) = worker["containers"]
    env = {entry["name"]: entry.get("value") for entry in container["env"]}
    (mount,) = [mount for mount in container["volumeMounts"] if mount["name"] == "cache"]
    (volume,) = [volume for volume in worker["volumes"] if volume["name"] == "cache"]
    assert volume["persistentVolumeClaim"] == {"claimName": "a-cache"}
    assert env["XDG_CACHE_HOME"] == mount["mountPath"]
    assert env["TRITON_CACHE_DIR"].startswith(mount["mountPath"])
    for pod in (head, *pods(rendered())[:2]):
        assert "cache" not in {volume["name"] for volume in pod["volumes"]}


def test_an_external_redis_is_used_and_then_no_valkey_runs() -> None:
    documents = rendered("gpu-8b.yaml")
    assert not [document for document in documents if document["kind"] in ("StatefulSet", "Secret")]
    service = kind(documents, "RayService")
    assert "redis://:${REDIS_PASSWORD}@redis.data.svc:6379/0" in service["spec"]["serveConfigV2"]
    password = service["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]["redisPassword"]
    assert password["valueFrom"]["secretKeyRef"] == {"name": "redis", "key": "password"}
    assert "rediss://" in kind(rendered("gpu-14b-multi.yaml"), "RayService")["spec"]["serveConfigV2"]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("image.taget=cpu", "taget"),
        ("serve.redis_url=redis://a", "serve"),
        ("weights.source=s3", "source"),
        ("weights.source=pvc", "claimName"),
        ("serve.num_gpus=2", "num_gpus"),
        ("serve.num_gpus=0", "workers.gpus"),
        ("autoscaling.enabled=true", "serve.max_replicas"),
        ("serve.max_replicas=0", "max_replicas"),
        ("serve.quantization=int4", "quantization"),
        ("serve.num_gpus=1,serve.tensor_parallel=2", "tensor_parallel"),
        ("ingress.enabled=true", "ingress.host"),
        ("telemetry.env.HOME=x", "HOME"),
        ("valkey.password=a b c d e f g h i j k", "password"),
        ("valkey.password=short", "password"),
        ("valkey.password=", "valkey.existingSecret or valkey.password"),
    ],
)
def test_a_wrong_value_is_told(setting: str, words: str) -> None:
    made = helm("template", "my", str(CHART), "--set", PASSWORD, "--set", setting)
    assert made.returncode != 0
    assert words in made.stderr


def password_of(documents: list[dict[str, Any]]) -> str:
    return base64.b64decode(kind(documents, "Secret")["data"]["password"]).decode()


def test_each_rendering_without_a_cluster_has_the_password_that_was_given() -> None:
    first, second = (rendered.__wrapped__(None) for _ in range(2))
    assert first == second
    assert password_of(first) == PASSWORD.partition("=")[2]
    without = rendered(None, "valkey.existingSecret=mine", "valkey.password=")
    assert not [document for document in without if document["kind"] == "Secret"]
    assert "mine" in json.dumps(kind(without, "StatefulSet"))


UNCHECKED = ("--disable-openapi-validation",)
"""By the cluster, which has no schemas; other tests have Kubernetes' own."""


def asked(cluster: Cluster, *sets: str) -> list[dict[str, Any]]:
    """What an install or an upgrade in this cluster would lay there."""
    options = [part for one in sets for part in ("--set", one)]
    with cluster.running_on_loopback() as url:
        made = helm(
            "template", "my", str(CHART), "--dry-run=server", "--kube-apiserver", url, *UNCHECKED, *options
        )
    assert made.returncode == 0, made.stderr
    return [document for document in yaml.safe_load_all(made.stdout) if document]


def test_an_install_draws_a_password_and_upgrades_keep_it() -> None:
    drawn = [kind(asked(Cluster()), "Secret") for _ in range(2)]
    passwords = {password_of([secret]) for secret in drawn}
    assert len(passwords) == 2
    assert all(re.fullmatch("[A-Za-z0-9]{40}", password) for password in passwords)
    kept = asked(Cluster(secrets=[drawn[0]]))
    assert password_of(kept) == password_of([drawn[0]])
    assert password_of(asked(Cluster(secrets=[drawn[0]]), PASSWORD)) == PASSWORD.partition("=")[2]


def test_the_notes_say_how_to_reach_the_api_and_the_console() -> None:
    made = helm("install", "my", str(CHART), "--dry-run=client", "--set", PASSWORD)
    assert made.returncode == 0, made.stderr
    _, _, notes = made.stdout.partition("NOTES:")
    assert "port-forward svc/my-triad 8000" in notes
    assert "the console: http://127.0.0.1:8000/" in notes
    (name,) = {d["metadata"]["name"] for d in rendered() if d["kind"] == "RayService"}
    assert name == "my-triad"


def test_alerts_and_dashboard_ask_for_what_triad_measures() -> None:
    measured = set(re.findall(r"^(\w+?)(?:\{| )", exposition(), re.MULTILINE))
    documents = rendered(None, ALL_ON)
    rules = kind(documents, "PrometheusRule")["spec"]["groups"][0]["rules"]
    (dashboard,) = kind(documents, "ConfigMap")["data"].values()
    panels = json.loads(dashboard)["panels"]
    queries = [rule["expr"] for rule in rules] + [t["expr"] for panel in panels for t in panel["targets"]]
    named = {name for query in queries for name in re.findall(r"\b(?:triad|gen_ai)_\w+", query)}
    assert len(named) > 12
    assert named - measured == set()


def exposition() -> str:
    """Everything there is to measure, each at least once."""
    metrics = Metrics("m", "i")
    report = DecodingReport({Mode.AR: 3, Mode.DIFFUSION: 4}, 5, 1, "threshold", "a")
    metrics.ended(Outcome("chat", 1.0, 0.1, Finished("r", 5, 7, report), None))
    metrics.made(report, 7)
    metrics.used("k", 5, 7)
    metrics.answered("/v1/models", 200)
    plan = default_plan(Mode.SELF_SPECULATION)
    load = ReplicaLoad("a", 1, 2, 3, 4, 5, 6, tokens_per_forward={Mode.SELF_SPECULATION: 2.0}, decode=plan)
    plans = {"a": ObservedPlan(ReplicaPlan(1, plan, "threshold", "why"), 0.1, 2.0)}
    metrics.seen.view = ClusterView(ClusterLoad((ObservedLoad(load, 0.1),)), plans)
    return metrics.exposition().decode()
