"""docker-compose.yml and the Dockerfiles, checked without Docker: there is none where Quire is developed."""

from __future__ import annotations

import argparse
import fnmatch
import importlib.resources
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from server import settings
from tests.helpers.containers import (
    ROOT,
    Instruction,
    compose,
    dockerfile,
    image_environment,
    one,
    seconds,
    started_by,
)

DOCKERFILES = sorted((ROOT / "deploy/docker").glob("Dockerfile.*"))
SERVICES = compose()["services"]
OURS = {name: service for name, service in SERVICES.items() if "build" in service}

each_file = pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
each_service = pytest.mark.parametrize("service", SERVICES.values(), ids=SERVICES)
each_of_ours = pytest.mark.parametrize("service", OURS.values(), ids=OURS)


def runs(stages: list[list[Instruction]]) -> list[str]:
    return [line.text for stage in stages for line in stage if line.name == "RUN"]


def is_pinned(image: str) -> bool:
    """A tag with at least major and minor version, or a digest."""
    return re.search(r":v?\d+\.\d+(\.\d+)?[\w.-]*$|@sha256:[0-9a-f]{64}$", image) is not None


@pytest.mark.parametrize("image", ["python", "python:latest", "python:3", "python:slim", "a/b:5000"])
def test_an_image_without_a_version_is_not_pinned(image: str) -> None:
    assert not is_pinned(image)


# --- Dockerfiles


def test_there_is_one_for_each_profile() -> None:
    assert [path.name for path in DOCKERFILES] == ["Dockerfile.cpu", "Dockerfile.cuda"]
    assert {ROOT / service["build"]["dockerfile"] for service in OURS.values()} == set(DOCKERFILES)


@each_file
def test_base_images_are_pinned_and_the_same(path: Path) -> None:
    stages = dockerfile(path)
    bases = {stage[0].words[0] for stage in stages}
    assert len(stages) == 2 and len(bases) == 1
    assert all(is_pinned(base) for base in bases)
    assert re.search(r":3\.(\d+)", bases.pop())[1] == "11"  # type: ignore[index]  # what constraints.txt is for


@each_file
def test_the_result_has_no_root_and_no_way_to_it(path: Path) -> None:
    last = dockerfile(path)[-1]
    user, group = one(last, "USER").text.split(":")
    assert int(user) >= 1000 and int(group) >= 1000
    names = [line.name for line in last]
    assert names.index("USER") > max(index for index, name in enumerate(names) if name in ("RUN", "COPY"))
    assert f"--uid {user}" in " ".join(runs([last]))
    assert "sudo" not in path.read_text() and "chmod 777" not in path.read_text()


@each_file
def test_nothing_is_left_behind(path: Path) -> None:
    stages = dockerfile(path)
    for run in runs(stages):
        if "apt-get" in run:
            assert run.startswith("apt-get update && apt-get install -y --no-install-recommends ")
            assert run.endswith("&& rm -rf /var/lib/apt/lists/*")
        assert "apt-get upgrade" not in run and "curl" not in run and "wget" not in run
    assert image_environment(stages[0])["PIP_NO_CACHE_DIR"] == "1"
    assert not any("pip install" in run for run in runs(stages[1:]))
    assert not any(line.name == "ADD" for stage in stages for line in stage)


@each_file
def test_every_package_is_pinned(path: Path) -> None:
    installs = re.findall(r"pip install [^&]*", " ".join(run + " && " for run in runs(dockerfile(path))))
    assert len(installs) >= 3
    assert all("-c constraints.txt" in install for install in installs), installs


def context() -> list[str]:
    """Patterns of .dockerignore, in their order."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def in_context(name: str) -> bool:
    """As Docker decides: the last pattern that matches the path or a directory above it."""
    parts = name.split("/")
    above = ["/".join(parts[:end]) for end in range(1, len(parts) + 1)]
    inside = True
    for pattern in context():
        plain = pattern.removeprefix("!").removeprefix("**/")
        targets = parts if "**/" in pattern else above
        if any(fnmatch.fnmatchcase(target, plain) for target in targets):
            inside = pattern.startswith("!")
    return inside


def test_the_build_sees_our_sources_and_nothing_else() -> None:
    assert in_context("engine/core.py") and in_context("kernels/native/library.cpp")
    for name in (".git/config", ".env", "models/x", "tests/conftest.py", ".venv/bin/python"):
        assert not in_context(name)
    assert not in_context("engine/__pycache__/core.pyc") and not in_context("kernels/native/_quire.so")


@each_file
def test_everything_copied_exists_and_is_sent_to_the_build(path: Path) -> None:
    copies = [line.words for stage in dockerfile(path) for line in stage if line.name == "COPY"]
    sources = [word for words in copies if not words[0].startswith("--from") for word in words[:-1]]
    assert [source for source in sources if not (ROOT / source).exists()] == []
    assert [source for source in sources if not in_context(source)] == []
    assert {"--from=build"} == {word for words in copies for word in words if word.startswith("--")}


@each_file
def test_everything_the_package_needs_is_copied(path: Path) -> None:
    copied = {word for line in dockerfile(path)[0] if line.name == "COPY" for word in line.words}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {p.rstrip("*") for p in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    files = {"pyproject.toml", "setup.py", project["project"]["readme"], *project["project"]["license-files"]}
    assert packages | files <= copied


@each_file
def test_the_image_says_what_it_is(path: Path) -> None:
    last = dockerfile(path)[-1]
    labels = one(last, "LABEL").text
    for label in ("title", "description", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{label}=" in labels
    assert one(last, "STOPSIGNAL").text == "SIGTERM"
    assert one(last, "ENTRYPOINT").text == '["quire", "serve"]'  # no shell between us and the signal
    environment = image_environment(last)
    assert one(last, "EXPOSE").text == environment["QUIRE_PORT"]
    (volume,) = one(last, "VOLUME").words
    caches = [environment[name] for name in ("HF_HOME", "TRITON_CACHE_DIR") if name in environment]
    assert caches and all(cache.startswith(f"{volume}/") for cache in caches)


@each_file
def test_no_secret_is_baked_in(path: Path) -> None:
    names = [word.split("=")[0] for stage in dockerfile(path) for line in stage for word in line.words
             if line.name in ("ENV", "ARG")]  # fmt: skip
    assert names and not [name for name in names if re.search("KEY|TOKEN|PASSWORD|SECRET", name)]


# --- docker-compose.yml


def test_compose_file_is_valid_compose() -> None:
    schemas = importlib.resources.files("check_jsonschema") / "builtin_schemas/vendor"
    schema = json.loads((schemas / "compose-spec.json").read_text())
    whole = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    jsonschema.validate(whole, schema)
    with pytest.raises(jsonschema.ValidationError):  # it does tell good from bad
        jsonschema.validate({**whole, "services": {"quire": {"prots": []}}}, schema)


@each_service
def test_services_are_locked_down(service: dict[str, Any]) -> None:
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert int(service["user"].split(":")[0]) > 0
    assert not {"privileged", "cap_add", "network_mode", "pid", "ipc"} & set(service)
    assert "build" in service or is_pinned(service["image"])
    assert service["healthcheck"]["test"][0] == "CMD"
    assert all("docker.sock" not in mount for mount in service["volumes"])


@each_service
def test_ports_are_open_to_this_machine_only(service: dict[str, Any]) -> None:
    assert service["ports"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_mounts_are_declared_or_exist() -> None:
    whole = compose()
    for service in SERVICES.values():
        for source, _, *mode in (mount.split(":") for mount in service["volumes"]):
            if not source.startswith("."):
                assert source in whole["volumes"]
                continue
            assert mode == ["ro"]
            assert (ROOT / source).is_dir() or source == "./models"  # made by Docker where it is missing
    assert all((ROOT / secret["file"]).is_file() for secret in whole["secrets"].values())


def test_every_variable_of_the_user_is_explained_or_a_setting() -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    head = text[: text.index("\nname:")]
    known = {flag.variable for flag in (*settings.SERVER_FLAGS, *settings.ENGINE_FLAGS)}
    used = set(re.findall(r"\$\{(\w+)", text))
    ports = {"QUIRE_PUBLISHED_PORT", "PROMETHEUS_PUBLISHED_PORT", "GRAFANA_PUBLISHED_PORT"}
    unexplained = {name for name in used - known - ports - {"HF_TOKEN"} if name not in head}
    assert unexplained == set()
    assert re.findall(r"\$\{\w+(?!\w|:-)", text) == []  # each has a default


@each_of_ours
def test_every_quire_variable_is_a_setting(service: dict[str, Any]) -> None:
    known = {flag.variable for flag in (*settings.SERVER_FLAGS, *settings.ENGINE_FLAGS)} | {"QUIRE_MODEL"}
    _, environment = started_by(service)
    assert {name for name in environment if name.startswith("QUIRE_")} - known == set()


@each_of_ours
def test_the_entry_point_is_understood(service: dict[str, Any]) -> None:
    command, environment = started_by(service)
    assert command[:2] == ["quire", "serve"]
    parser = argparse.ArgumentParser()
    settings.add_arguments(parser)
    chosen = settings.load(parser.parse_args(command[2:]), environment)
    assert (chosen.host, chosen.port, chosen.demo) == ("0.0.0.0", 8000, True)
    assert chosen.engine.device == ("cpu" if "cpu" in service["profiles"] else "cuda")
    assert chosen.api_keys == ()


@each_of_ours
def test_there_is_more_time_to_stop_than_running_requests_get(service: dict[str, Any]) -> None:
    _, environment = started_by(service)
    assert seconds(service["stop_grace_period"]) >= float(environment["QUIRE_SHUTDOWN_TIMEOUT"]) + 10


@each_of_ours
def test_the_image_and_compose_agree(service: dict[str, Any]) -> None:
    last = dockerfile(ROOT / service["build"]["dockerfile"])[-1]
    assert one(last, "USER").text == service["user"]
    _, environment = started_by(service)
    assert all(port.endswith(f":{environment['QUIRE_PORT']}") for port in service["ports"])
    (volume,) = one(last, "VOLUME").words
    assert any(mount.split(":")[1] == volume for mount in service["volumes"])
    own = one(last, "HEALTHCHECK").text.partition(" CMD ")[2]
    assert [re.sub(r"\s+", " ", word) for word in json.loads(own)] == service["healthcheck"]["test"][1:]
    (temporary,) = service["tmpfs"]
    assert temporary.startswith("/tmp:")


def test_prometheus_asks_the_server_under_its_name_and_with_its_key() -> None:
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    job = next(job for job in config["scrape_configs"] if job["job_name"] == "quire")
    for service in OURS.values():
        (alias,) = service["networks"]["default"]["aliases"]
        _, environment = started_by(service)
        assert job["static_configs"][0]["targets"] == [f"{alias}:{environment['QUIRE_PORT']}"]
    (secret,) = SERVICES["prometheus"]["secrets"]
    assert job["authorization"]["credentials_file"] == f"/run/secrets/{secret}"
    assert "/etc/prometheus/prometheus.yml" in SERVICES["prometheus"]["command"][0]
    # A container with a read-only root can be given files as secrets, and nothing else.
    assert set(compose()["secrets"][secret]) == {"file"}


def test_grafana_waits_for_prometheus_and_prometheus_for_nobody() -> None:
    assert SERVICES["grafana"]["depends_on"] == {"prometheus": {"condition": "service_healthy"}}
    assert "depends_on" not in SERVICES["prometheus"]


def test_profiles_choose_the_server() -> None:
    assert {tuple(service.get("profiles", ())) for service in SERVICES.values()} == {(), ("cpu",), ("gpu",)}
