"""docker-compose.yml and the Dockerfiles as data, without Docker."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Instruction:
    """One line of a Dockerfile, continuations joined, comments gone."""

    name: str
    text: str

    @property
    def words(self) -> list[str]:
        """The exec form's strings, or the words."""
        if self.text.startswith("["):
            return list(json.loads(self.text))
        return self.text.split()


def dockerfile(path: Path) -> list[list[Instruction]]:
    """The stages, each one from its FROM on."""
    text = re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.M)
    text = re.sub(r"\\\n\s*", "", text)
    stages: list[list[Instruction]] = []
    for line in filter(None, (line.strip() for line in text.splitlines())):
        name, _, rest = line.partition(" ")
        if name == "FROM":
            stages.append([])
        stages[-1].append(Instruction(name, rest.strip()))
    return stages


def one(stage: list[Instruction], name: str) -> Instruction:
    (found,) = [instruction for instruction in stage if instruction.name == name]
    return found


def image_environment(stage: list[Instruction]) -> dict[str, str]:
    pairs = [word for line in stage if line.name == "ENV" for word in line.words]
    return dict(pair.split("=", 1) for pair in pairs)


def interpolated(value: Any, variables: Mapping[str, str]) -> Any:
    """${NAME:-default} as Compose replaces it."""
    if isinstance(value, dict):
        return {key: interpolated(item, variables) for key, item in value.items()}
    if isinstance(value, list):
        return [interpolated(item, variables) for item in value]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        return variables.get(match[1]) or match[2]

    return re.sub(r"\$\{(\w+):-([^}]*)\}", replace, value)


def compose(variables: Mapping[str, str] | None = None) -> dict[str, Any]:
    """docker-compose.yml as Compose reads it."""
    whole = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return dict(interpolated(whole, variables or {}))


def seconds(duration: str) -> float:
    units = {"s": 1, "m": 60, "h": 3600}
    return sum(float(number) * units[unit] for number, unit in re.findall(r"([\d.]+)([smh])", duration))


def started_by(service: Mapping[str, Any]) -> tuple[list[str], dict[str, str]]:
    """The command line and the environment of a container of ours."""
    stage = dockerfile(ROOT / service["build"]["dockerfile"])[-1]
    command = [word for line in stage if line.name == "CMD" for word in line.words]
    environment = {**image_environment(stage), **service["environment"]}
    return [*one(stage, "ENTRYPOINT").words, *service.get("command", command)], environment


def without_host_settings() -> dict[str, str]:
    """What a process needs of this machine, and nothing that configures Quire."""
    return {key: value for key, value in os.environ.items() if not re.match(r"QUIRE_|HF_|OTEL_", key)}
