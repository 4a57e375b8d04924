"""How a run is started: the section ``launcher`` of the settings, which is no part of the run itself."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import psutil
from pydantic import AfterValidator

from hsplitlora_flwr.cli.overrides import keys_of
from hsplitlora_flwr.cli.room import SHARE_OF_MEMORY
from hsplitlora_flwr.config import Config, ConfigError, unknown_key
from hsplitlora_flwr.methods import shares_half, with_room_for_messages
from hsplitlora_flwr.models.cores import all_cores
from hsplitlora_flwr.schema import checked, setting

_UNSTATED_BYTES = 2e9
"""Assumed memory of a simulated client without a stated budget."""
_AGAINST_RAY = {"superlink": "it starts Ray by itself", "cpus": "the cluster says how many it has"}


def _address(text: str) -> str:
    if text and not re.fullmatch(r"[^\s:/]+:\d+", text):
        raise ValueError("must be HOST:PORT of a Ray cluster, or '' for none")
    return text


Address = Annotated[str, AfterValidator(_address)]


@dataclass(frozen=True)
class Launcher:
    """How a run is started, which is no part of the run itself."""

    engine: Literal["flower", "process"] = setting(
        "flower",
        "flower = Flower, with Ray for the clients; process = threads of one process, the same results, sooner",
    )
    superlink: str = setting(
        "", "a connection of `flwr config list`; empty = start a SuperLink for this run and stop it after"
    )
    client_cpus: int = setting(1, "CPUs of one simulated client; so many clients as fit run at the same time", ge=1)
    cpus: int = setting(
        0,
        "CPUs of simulated clients together; 0 = the machine's, or enough for steps in turn; engine=process: all",
        ge=0,
    )
    ray_address: Address = setting("", "HOST:PORT of a running Ray cluster, whose machines simulate the clients")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Launcher:
        """Build from the composed section.

        Raises
        ------
        ConfigError
            If a key is unknown or a value has the wrong type or is out of range.
        """
        known = keys_of("launcher", cls)
        for key in values:
            if f"launcher.{key}" not in known:
                raise unknown_key(f"launcher.{key}", known)
        launcher: Launcher = checked("launcher", cls, values)
        for name in ("superlink", "ray_address") if launcher.engine == "process" else ():
            if value := getattr(launcher, name):
                raise ConfigError(f"launcher.{name}={value!r} needs launcher.engine=flower")
        address = launcher.ray_address
        for name, why in _AGAINST_RAY.items() if address else ():
            if value := getattr(launcher, name):
                raise ConfigError(f"launcher.{name}={value!r} is not possible with launcher.ray_address: {why}")
        cpus, most = launcher.client_cpus, launcher.cpus or all_cores()
        if cpus > most and not address:
            raise ConfigError(
                f"launcher.client_cpus={cpus!r} must be a whole number from 1 to the {most} CPUs there are"
            )
        return launcher

    def federation(self, config: Config) -> str:
        """The settings of a simulation, as ``flwr run --federation-config`` takes them."""
        settings = {"num-supernodes": config.clients.count, "client-resources-num-cpus": self.client_cpus}
        if cpus := self._counted_cpus(config):
            settings["init-args-num-cpus"] = cpus
        return " ".join(f"{key}={value}" for key, value in settings.items())

    def in_order(self, config: Config) -> Config:
        """The settings with an order of steps that this machine can keep.

        If not all clients can train at the same time, a fixed order makes one wait for another that only starts when
        the first has finished; then steps come in the order of arrival.
        """
        cpus = 0 if self.engine == "process" else self._counted_cpus(config)
        if not cpus or not takes_turns(config) or config.clients.count * self.client_cpus <= cpus:
            return config
        return dataclasses.replace(config, server=dataclasses.replace(config.server, order="arrival"))

    def with_workers(self, config: Config) -> Config:
        """The settings with one message per task, if lasting messages would keep worker processes from other clients of
        the same round."""
        cpus = 0 if self.engine == "process" else self._counted_cpus(config)
        return with_room_for_messages(config, cpus // self.client_cpus) if cpus else config

    def _counted_cpus(self, config: Config) -> int:
        """CPUs that Ray is told of: more than there are if steps take turns and memory holds all clients; 0 if other
        machines say it."""
        if self.cpus or self.ray_address or self.superlink:
            return self.cpus
        wanted, cores = config.clients.count * self.client_cpus, all_cores()
        if wanted <= cores or not takes_turns(config):
            return cores
        budgets = itertools.cycle([gb * 1e9 for gb in config.clients.memory_gb] or [_UNSTATED_BYTES])
        taken = sum(itertools.islice(budgets, config.clients.count))
        return wanted if taken <= SHARE_OF_MEMORY * psutil.virtual_memory().available else cores


def takes_turns(config: Config) -> bool:
    """Whether clients' steps take turns at a shared half, in a fixed order."""
    return shares_half(config) and config.server.order == "fixed" and config.transport.kind != "messages"
