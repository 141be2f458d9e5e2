import inspect
from pathlib import Path

import pytest
from pydantic import ValidationError

import replicas
from cluster.config import ClusterConfig


def from_command_line(*arguments: str) -> ClusterConfig:
    """As `serve run` passes key=value."""
    return ClusterConfig.model_validate(dict(argument.split("=", 1) for argument in arguments))


def test_the_defaults_serve_the_embedded_model():
    config = ClusterConfig()
    assert config.model_name == "triad-5m"
    assert Path(config.checkpoint).parts[-3:] == ("replicas", "checkpoints", "triad-5m")
    assert config.redis_url is None


def test_a_named_model_needs_its_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(replicas, "__path__", [str(tmp_path)])
    with pytest.raises(ValidationError, match="smollm2 has no weights here yet; `make model`"):
        from_command_line("model=smollm2")
    folder = tmp_path / "checkpoints" / "smollm2-135m"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()
    config = from_command_line("model=smollm2")
    assert (config.checkpoint, config.model_name) == (str(folder), "smollm2")


def test_strings_become_what_they_should_be():
    config = from_command_line(
        "num_replicas=2", "replica_cpus=0.5", "num_threads=1", "dtype=bfloat16", "policy=ar", "max_running=8"
    )
    assert (config.num_replicas, config.replica_cpus, config.num_threads) == (2, 0.5, 1)
    assert (config.dtype, config.policy, config.max_running) == ("bfloat16", "ar", 8)


def test_a_mapping_is_json_on_the_command_line():
    config = from_command_line('policy_params={"stabilise": {"dwell_s": 3}}')
    assert config.policy_params == {"stabilise": {"dwell_s": 3}}


def test_an_empty_value_is_the_default():
    config = from_command_line("model=", "redis_url=", "num_replicas=", "policy=")
    assert config == ClusterConfig()


@pytest.mark.parametrize(
    ("model", "name"), [("/models/llama-8b", "llama-8b"), ("nvidia/Nemotron-3B", "Nemotron-3B")]
)
def test_a_model_is_asked_for_by_its_last_part(model, name):
    config = ClusterConfig(model=model)
    assert (config.checkpoint, config.model_name) == (model, name)
    assert ClusterConfig(model=model, served_model_name="mine").model_name == "mine"


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("num_replica=2", ["num_replica", "did you mean 'num_replicas'?"]),
        ("zzz=1", ["zzz", "the keys are", "redis_url"]),
        ("num_replicas=0", ["num_replicas", "greater than or equal to 1"]),
        ("num_replicas=two", ["num_replicas", "integer"]),
        ("redis_url=localhost:6379", ["redis_url", "redis://"]),
        ("policy=fastest", ["policy", "fastest", "threshold"]),
        ("policy_params=dwell", ["policy_params", "JSON object"]),
        ('policy_params={"dwel_s": 1}', ["dwel_s", "keys"]),
        ("dtype=int8", ["dtype", "bfloat16"]),
        ("max_step_tokens=8", ["max_step_tokens", "192"]),
        ("app=a b", ["app", "pattern"]),
        ("num_gpus=4", ["num_gpus=1", "tensor_parallel=4"]),
        ("kv_dtype=fp8", ["kv_dtype", "num_gpus=1", "leave it out"]),
        ("kv_dtype=int4", ["kv_dtype", "bfloat16", "fp8"]),
        ("quantization=int4", ["quantization", "int8"]),
        ("min_replicas=2", ["min_replicas", "set max_replicas too"]),
        ("downscale_delay_s=60", ["downscale_delay_s", "set max_replicas too"]),
        ("max_replicas=0", ["max_replicas", "greater than or equal to 1"]),
    ],
)
def test_an_error_names_the_key_and_what_to_change(argument, words):
    with pytest.raises(ValidationError) as caught:
        from_command_line(argument)
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("given", "numbers"),
    [
        ({"num_replicas": 3}, (3, 3, 3)),
        ({"max_replicas": 4}, (1, 1, 4)),
        ({"num_replicas": 2, "max_replicas": 4}, (2, 2, 4)),
        ({"min_replicas": 2, "max_replicas": 4}, (2, 2, 4)),
        ({"min_replicas": 1, "num_replicas": 3, "max_replicas": 4}, (1, 3, 4)),
    ],
)
def test_the_numbers_of_replicas(given, numbers):
    config = ClusterConfig(**given)
    assert config.replica_range == numbers


@pytest.mark.parametrize("arguments", [(3, 1, 2), (1, 3, 2), (2, 1, 4)])
def test_numbers_of_replicas_that_do_not_fit_are_told(arguments):
    least, first, most = arguments
    with pytest.raises(ValidationError, match="does not hold: change one"):
        ClusterConfig(min_replicas=least, num_replicas=first, max_replicas=most)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("num_gpus=0.5", "num_gpus=1"),
        ("forward=native", "'torch'"),
        ("replica_cpus=0", "replica_cpus above 0"),
    ],
)
def test_what_a_split_model_cannot_do_is_told(argument, words):
    with pytest.raises(ValidationError, match=words):
        from_command_line("tensor_parallel=2", argument)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("forward=torch", "leave out forward"),
        ("tensor_parallel=2", "leave out .*tensor_parallel"),
    ],
)
def test_what_int8_weights_cannot_be_had_with_is_told(argument, words):
    assert from_command_line("quantization=int8").quantization == "int8"
    with pytest.raises(ValidationError, match=words):
        from_command_line("quantization=int8", argument)


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_gpus_have_weights_in_8_bits_of_either_kind(quantization):
    config = from_command_line(f"quantization={quantization}", "num_gpus=1", "tensor_parallel=2")
    assert config.quantization == quantization


def test_fp8_weights_are_for_gpus():
    with pytest.raises(ValidationError, match="on CPUs set int8"):
        from_command_line("quantization=fp8")


@pytest.mark.parametrize(
    ("given", "dtype"),
    [({}, "float32"), ({"num_gpus": 1}, "bfloat16"), ({"dtype": "float32", "num_gpus": 1}, "float32")],
)
def test_the_dtype_fits_the_device(given, dtype):
    assert ClusterConfig(**given).weights_dtype == dtype


def test_the_password_is_not_shown():
    assert "secret" not in repr(ClusterConfig(redis_url="redis://:secret@host:1/0"))


def test_it_does_not_change():
    with pytest.raises(ValidationError):
        ClusterConfig().num_replicas = 3  # type: ignore[misc]


def test_each_key_is_declared_once():
    annotated = [key for record in ClusterConfig.__mro__ for key in inspect.get_annotations(record)]
    declared = [key for key in annotated if key in ClusterConfig.model_fields]
    assert sorted(declared) == sorted(ClusterConfig.model_fields)
