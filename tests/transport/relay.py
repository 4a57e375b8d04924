"""A TCP relay whose connections break as a test says."""

from __future__ import annotations

from simulations.relay import Relay

__all__ = ["Relay"]
