"""The KubeRay manifest: what its definition allows, and what this version of refit can run."""

from __future__ import annotations

import copy
import json
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from refit.run import load_config
from refit.service.placement import bundles_of

ROOT = Path(__file__).resolve().parent.parent.parent
MANIFEST = yaml.safe_load((ROOT / "launch" / "rayjob.yaml").read_text())
SCHEMA = json.loads(Path(__file__).with_name("rayjob_schema.json").read_text())
CLUSTER = MANIFEST["spec"]["rayClusterSpec"]
HEAD, WORKERS = CLUSTER["headGroupSpec"], CLUSTER["workerGroupSpecs"]


def containers() -> list[dict[str, Any]]:
    return [one for group in (HEAD, *WORKERS) for one in group["template"]["spec"]["containers"]]


def test_the_manifest_is_what_kuberay_defines() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(MANIFEST, SCHEMA)


def head_of(spec: dict[str, Any]) -> dict[str, Any]:
    return spec["rayClusterSpec"]["headGroupSpec"]


def head_pod_of(spec: dict[str, Any]) -> dict[str, Any]:
    return head_of(spec)["template"]["spec"]


def head_limits_of(spec: dict[str, Any]) -> dict[str, Any]:
    return head_pod_of(spec)["containers"][0]["resources"]["limits"]


BREAKS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "an unknown field": lambda spec: spec.update(entrypiont="x"),
    "a number where a string belongs": lambda spec: spec["rayClusterSpec"].update(rayVersion=2.6),
    "a start parameter that is no string": lambda spec: head_of(spec)["rayStartParams"].update(
        {"num-cpus": 0}
    ),
    "a group without a name": lambda spec: spec["rayClusterSpec"]["workerGroupSpecs"][0].pop("groupName"),
    "an unknown way to submit": lambda spec: spec.update(submissionMode="Sometimes"),
    "a pod without containers": lambda spec: head_pod_of(spec).pop("containers"),
    "a quantity of no unit": lambda spec: head_limits_of(spec).update(memory="8 GB"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_the_schema_refuses(name: str) -> None:
    broken = copy.deepcopy(MANIFEST)
    BREAKS[name](broken["spec"])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, SCHEMA)


def test_the_entrypoint_is_a_job_that_this_version_composes() -> None:
    config = load_config(overrides=overrides())
    assert config.policy.nccl_xfer_refit
    assert config.cluster.address == "auto"
    mounts = {mount["mountPath"] for one in containers() for mount in one["volumeMounts"]}
    assert any(Path(config.run_dir).is_relative_to(path) for path in mounts), "records outlive the pods"


def test_each_role_has_a_group_of_nodes_with_room_for_its_actors() -> None:
    config = load_config(overrides=overrides())
    bundles, num_trainers = bundles_of(config), config.policy.world_size
    for labels, wanted in (
        (config.cluster.policy_labels, bundles[:num_trainers]),
        (config.cluster.generation_labels, bundles[num_trainers:]),
    ):
        (group,) = [group for group in WORKERS if group["labels"] == labels]
        (worker,) = group["template"]["spec"]["containers"]
        room = group["replicas"] * int(worker["resources"]["limits"]["cpu"])
        assert room >= sum(bundle["CPU"] for bundle in wanted)
    assert HEAD["rayStartParams"]["num-cpus"] == "0"


def test_all_nodes_run_one_image_and_the_ray_that_is_pinned() -> None:
    assert len({one["image"] for one in containers()}) == 1
    pins = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra in ("cpu", "cuda"):
        assert f"ray[default]=={CLUSTER['rayVersion']}" in pins[extra]


def test_nobody_without_the_token_reaches_ray() -> None:
    assert CLUSTER["authOptions"]["mode"] == "token"


def overrides() -> list[str]:
    words = shlex.split(MANIFEST["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "refit.run"]
    return words[3:]
