"""Redis: SUBSCRIBE in the relay, PUBLISH in the application."""
