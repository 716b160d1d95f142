"""PostgreSQL: LISTEN in the relay, NOTIFY in the application."""
