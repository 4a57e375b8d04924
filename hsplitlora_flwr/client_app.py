"""The Flower ``ClientApp`` of the command line and of deployments: data and budget as settings and node say."""

from __future__ import annotations

from hsplitlora_flwr.client.handlers import split_client_app

app = split_client_app()
