"""Users, projects and API keys: what may happen to them, and what has."""
