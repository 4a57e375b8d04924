"""Reporting a run: the event log on disk, the console that follows it, the summary and the pages."""

from hsplitlora_flwr.reporting.console import RunConsole
from hsplitlora_flwr.reporting.events import EVENTS_FILE, EventLog, Listener, event_text, read_events

__all__ = ["EVENTS_FILE", "EventLog", "Listener", "RunConsole", "event_text", "read_events"]
