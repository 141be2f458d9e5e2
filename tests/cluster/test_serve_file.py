import subprocess
import sys

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from cluster.config import ClusterConfig
from cluster.serve_file import serve_file


def test_it_holds_what_was_asked_for_and_nothing_else():
    text = serve_file(
        ["port=8001", "num_replicas=2", "model=", 'policy_params={"stabilise": {"dwell_s": 2}}']
    )
    schema = ServeDeploySchema.model_validate(yaml.safe_load(text))
    assert (schema.http_options.host, schema.http_options.port) == ("127.0.0.1", 8001)
    (application,) = schema.applications
    assert application.args == {"num_replicas": 2, "policy_params": {"stabilise": {"dwell_s": 2}}}
    assert ClusterConfig.model_validate(application.args).num_replicas == 2


def test_a_password_is_kept():
    text = serve_file(["redis_url=redis://:secret@host:1/0"])
    assert yaml.safe_load(text)["applications"][0]["args"]["redis_url"] == "redis://:secret@host:1/0"


@pytest.mark.parametrize(
    ("argument", "words"),
    [("port=99999", "port: "), ("num_replica=1", "did you mean 'num_replicas'?"), ("policy", "key=value")],
)
def test_a_mistake_is_told_in_a_line_before_anything_starts(argument, words):
    command = [sys.executable, "-m", "cluster.serve_file", argument]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert outcome.returncode == 1
    assert words in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert outcome.stdout == ""
