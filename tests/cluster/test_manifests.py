"""What is put on Kubernetes: valid strictly by KubeRay's schemas, and whole by our own rules.

The schemas are not part of the repository: KUBERAY_CRDS names a folder with its CustomResourceDefinitions.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from jsonschema import Draft202012Validator

from tests.cluster.manifests import OVERLAYS, RAY_JOB, ROOT, built, ray_clusters, templates

PLACES = [pytest.param(path, id="/".join(path.parts[-2:])) for path in (*OVERLAYS, RAY_JOB)]


@pytest.fixture(params=PLACES)
def objects(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    path: Path = request.param
    return [yaml.safe_load(path.read_text())] if path.is_file() else built(path)


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """As Kubernetes reads a schema, but no property goes that it does not list."""
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    kept = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes")}
    if "properties" in kept:
        kept["properties"] = {name: strict(inner) for name, inner in kept["properties"].items()}
        kept.setdefault("additionalProperties", False)
    for name in ("items", "additionalProperties"):
        if isinstance(kept.get(name), dict):
            kept[name] = strict(kept[name])
    return kept


@pytest.fixture(scope="module")
def schemas() -> dict[str, dict[str, Any]]:
    """The schema of each kind of object."""
    folder = os.environ.get("KUBERAY_CRDS")
    if folder is None:
        pytest.skip("KUBERAY_CRDS names no folder of KubeRay's CustomResourceDefinitions")
    found = {}
    for path in Path(folder).glob("*.yaml"):
        definition = yaml.load(path.read_text(), yaml.CSafeLoader)["spec"]  # megabytes
        [version] = [version for version in definition["versions"] if version["name"] == "v1"]
        schema = strict(version["schema"]["openAPIV3Schema"])
        schema["properties"]["metadata"] = {}
        found[definition["names"]["kind"]] = schema
    return found


def test_objects_are_valid_by_kuberay_s_schemas(
    schemas: dict[str, dict[str, Any]], objects: list[dict[str, Any]]
) -> None:
    for found in objects:
        if found["apiVersion"] == "ray.io/v1":
            errors = list(Draft202012Validator(schemas[found["kind"]]).iter_errors(found))
            assert not errors, errors[0].message


def test_the_schemas_do_find_a_mistake(schemas: dict[str, dict[str, Any]]) -> None:
    job = yaml.safe_load(RAY_JOB.read_text())
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplica"] = 1
    [error] = Draft202012Validator(schemas["RayJob"]).iter_errors(job)
    assert "maxReplica" in error.message


def test_each_cluster_is_closed_runs_as_nobody_and_says_this_ray(objects: list[dict[str, Any]]) -> None:
    for cluster in (cluster for found in objects for cluster in ray_clusters(found)):
        assert cluster["rayVersion"] == ray.__version__
        assert cluster["authOptions"] == {"mode": "token"}
        for pod in templates(cluster):
            assert pod["securityContext"]["runAsNonRoot"] is True
            assert pod["terminationGracePeriodSeconds"] >= 600
            [container] = pod["containers"]
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert not container["securityContext"]["allowPrivilegeEscalation"]
            assert container["image"].count(":") == 1 and not container["image"].endswith(":latest")
            assert {"secretRef": {"name": "prophy-secrets", "optional": True}} in container["envFrom"]
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            assert {volume["name"] for volume in pod["volumes"]} == mounted
        [group] = cluster["workerGroupSpecs"]
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        if group["minReplicas"] < group["maxReplicas"]:
            assert cluster["enableInTreeAutoscaling"] and cluster["autoscalerOptions"]["version"] == "v2"
        [worker] = group["template"]["spec"]["containers"]
        assert worker["resources"]["limits"]["nvidia.com/gpu"]
        assert {toleration["key"] for toleration in group["template"]["spec"]["tolerations"]} == {
            "nvidia.com/gpu"
        }


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: "/".join(path.parts[-2:]))
def test_a_budget_counts_the_pods_of_one_cluster(path: Path) -> None:
    """A RayCluster has no scale, by which `maxUnavailable` and shares are counted: no pod may go then."""
    objects = built(path)
    clusters = {found["metadata"]["name"] for found in objects if found["kind"] == "RayCluster"}
    budgets = [found["spec"] for found in objects if found["kind"] == "PodDisruptionBudget"]
    assert bool(budgets) == bool(clusters)
    for budget in budgets:
        assert budget.keys() == {"minAvailable", "selector"}
        assert isinstance(budget["minAvailable"], int)
        assert budget["selector"]["matchLabels"]["ray.io/cluster"] in clusters
        assert budget["selector"]["matchLabels"]["ray.io/node-type"] == "head"


def test_all_pods_of_one_kind_are_the_same_pod_but_for_ports() -> None:
    places = [built(overlay) for overlay in OVERLAYS] + [[yaml.safe_load(RAY_JOB.read_text())]]
    clusters = [cluster for objects in places for found in objects for cluster in ray_clusters(found)]
    assert len(clusters) == 5
    pods = [templates(cluster) for cluster in clusters]
    for container in (container for group in pods for pod in group for container in pod["containers"]):
        container.pop("ports", None)
    assert all(group == pods[0] for group in pods)


@pytest.fixture
def with_redis(tmp_path: Path) -> dict[str, Any]:
    """The service of a preset whose head keeps in Redis what it knows, as the README says."""
    lines = "\n".join(
        f"{kind}: [{os.path.relpath(place, tmp_path)}]"
        for kind, place in (
            ("resources", ROOT / "cluster/overlays/wan2.1-1.3b/service"),
            ("components", ROOT / "cluster/components/redis"),
        )
    )
    (tmp_path / "kustomization.yaml").write_text(lines)
    [service] = built(tmp_path)
    return service


def test_the_head_of_a_service_may_keep_in_redis_what_it_knows(with_redis: dict[str, Any]) -> None:
    [service] = built(ROOT / "cluster/overlays/wan2.1-1.3b/service")
    options = with_redis["spec"]["rayClusterConfig"].pop("gcsFaultToleranceOptions")
    assert options["redisAddress"] == "redis:6379"
    assert options["redisPassword"]["valueFrom"]["secretKeyRef"]["name"] == "prophy-secrets"
    assert with_redis == service


def test_a_service_with_redis_is_valid_by_kuberay_s_schemas(
    schemas: dict[str, dict[str, Any]], with_redis: dict[str, Any]
) -> None:
    assert not list(Draft202012Validator(schemas["RayService"]).iter_errors(with_redis))
