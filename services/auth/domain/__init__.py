"""Users, projects, API keys and OAuth clients."""
