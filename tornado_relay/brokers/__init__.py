"""The brokers: each package holds the reader that a worker runs beside the publisher of ``notify()``."""
