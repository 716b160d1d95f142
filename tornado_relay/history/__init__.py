"""The events that a broker keeps for streams that come back."""
