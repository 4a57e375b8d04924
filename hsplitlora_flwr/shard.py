"""The server shard: the base model, and the server's half of every client's training behind the stream."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from hsplitlora_flwr.config import Config
from hsplitlora_flwr.lora.aggregation import Factors
from hsplitlora_flwr.lora.layers import AdapterSpec, inject
from hsplitlora_flwr.models.loading import pick_device
from hsplitlora_flwr.training.schedule import AdapterOptimizer
from hsplitlora_flwr.training.server import ServerTrainer, SharedBase, StepReport
from hsplitlora_flwr.transport.stream import StreamServer


class Shard:
    """One base model and one port, for all clients of a run.

    Parameters
    ----------
    config : Config
        Which model, where it goes, and which port to open.

    Raises
    ------
    StreamError
        If the port cannot be opened; it is, before the model is loaded.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._stream = StreamServer(config.transport.address, config.transport.port)
        self.base = SharedBase(config.model.path, config.model.dtype, pick_device(config.model.device))

    @property
    def address(self) -> str:
        """``host:port`` of the stream."""
        return self._stream.address

    def admit(
        self,
        split: int,
        specs: Mapping[str, AdapterSpec],
        seed: str,
        start: Mapping[str, Factors],
        *,
        freeze_a: bool,
        report: Callable[[StepReport], None],
    ) -> tuple[str, ServerTrainer]:
        """Set up the server's half of one client's training.

        Parameters
        ----------
        split : int
            Number of blocks of the client.
        specs, seed, start, freeze_a
            Its adapters, as for :func:`hsplitlora_flwr.lora.layers.inject`; the same on the client.
        report : Callable[[StepReport], None]
            Called after every step.

        Returns
        -------
        tuple[str, ServerTrainer]
            The token that the client's stream must show, and the trainer behind it.
        """
        model = self.base.server_part(split)
        optimizer = AdapterOptimizer(inject(model, specs, seed, start, freeze_a=freeze_a), self._config.train)
        trainer = ServerTrainer(model.train(), optimizer, report, self._threads)
        return self._stream.admit(trainer), trainer

    def dismiss_all(self) -> None:
        """End the life of the round's tokens."""
        self._stream.dismiss_all()

    def _threads(self) -> int:
        """Threads for each of the clients that train now."""
        return max((os.cpu_count() or 1) // max(self._stream.open_streams, 1), 1)

    def stop(self) -> None:
        """Close the port."""
        self._stream.stop()
