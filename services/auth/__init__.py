"""Owns users, projects with their members, API keys and OAuth clients; opens and ends
sessions, grants OAuth tokens.

It consumes nothing and emits ``datasync.auth.v1``. The gateway asks it, by an internal call, whom a credential
belongs to. Password hashes, key hashes and sessions are plain documents of its database and never reach an event.
"""
