"""Who may come in: owns users, projects with their members, and API keys; opens and ends sessions.

It consumes nothing and emits ``datasync.auth.v1``. The gateway asks it, by an internal call, whom a credential
belongs to. Password hashes, key hashes and sessions are plain documents of its database and never reach an event.
"""
