"""What ``migrate`` does for the history of events."""
