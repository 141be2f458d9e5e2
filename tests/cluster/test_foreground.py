"""Why a server could not start, as Serve tells it bit by bit."""

from ray.serve.schema import (
    ApplicationStatus,
    ApplicationStatusOverview,
    DeploymentStatus,
    DeploymentStatusOverview,
    DeploymentStatusTrigger,
)

from cluster.foreground import note_causes

KILLED = "2 retries remaining. Error: The actor is dead because it was killed by `ray.kill`."


def application(**messages: str) -> ApplicationStatusOverview:
    deployments = {
        name: DeploymentStatusOverview(
            status=DeploymentStatus.UPDATING,
            status_trigger=DeploymentStatusTrigger.UNSPECIFIED,
            replica_states={},
            message=message,
        )
        for name, message in messages.items()
    }
    return ApplicationStatusOverview(
        status=ApplicationStatus.DEPLOYING, message="", last_deployed_time_s=0.0, deployments=deployments
    )


def test_of_each_deployment_that_fails_the_last_line_is_told() -> None:
    causes: dict[str, str] = {}
    note_causes(application(Replica="failed to start\nmodel x is missing\n", Redis="", Ingress="no"), causes)
    assert causes == {"Replica": "model x is missing", "Ingress": "no"}


def test_that_serve_ended_a_replica_is_no_cause_where_another_was_told() -> None:
    causes: dict[str, str] = {}
    for message in ("a\nmodel x is missing", KILLED):
        note_causes(application(Replica=message), causes)
    assert causes == {"Replica": "model x is missing"}
    for message in (KILLED, "a\nmodel x is missing"):
        note_causes(application(Redis=message), causes)
    assert causes["Redis"] == "model x is missing"


def test_where_serve_tells_nothing_else_that_is_told() -> None:
    causes: dict[str, str] = {}
    note_causes(application(Replica=KILLED), causes)
    assert causes == {"Replica": KILLED}


def test_what_has_recovered_is_no_cause() -> None:
    causes = {"Ingress": "slow"}
    note_causes(application(Ingress=""), causes)
    assert causes == {}
