"""What a run tells: an event log on disk, and a console that shows it while it grows."""

from hsplitlora_flwr.reporting.console import RunConsole
from hsplitlora_flwr.reporting.events import EVENTS_FILE, EventLog, Listener, event_text, read_events

__all__ = ["EVENTS_FILE", "EventLog", "Listener", "RunConsole", "event_text", "read_events"]
