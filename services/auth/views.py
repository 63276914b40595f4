"""How users, projects, keys and their histories look in answers."""

from typing import Any

import orjson

from libs.core.clock import isoformat_z
from libs.core.envelope import Envelope
from libs.core.principal import Role
from libs.eventsourcing.command_handler import Entity
from libs.mongodb.client import Document
from services.auth.domain.api_key import ApiKey
from services.auth.domain.oauth_client import OauthClient
from services.auth.domain.project import Project
from services.auth.domain.user import User
from services.auth.keys import IssuedKey
from services.auth.oauth import IssuedClient

JsonObject = dict[str, Any]


def user_view(user: Entity[User]) -> JsonObject:
    return {
        "id": user.id,
        "username": user.state.username,
        "email": user.state.email,
        "created_at": isoformat_z(user.state.created_at),
        "updated_at": isoformat_z(user.state.updated_at),
    }


def project_view(project: Entity[Project], role: Role) -> JsonObject:
    return {
        "id": project.id,
        "name": project.state.name,
        "role": role,
        "created_at": isoformat_z(project.state.created_at),
    }


def project_detail(project: Entity[Project], role: Role) -> JsonObject:
    return project_view(project, role) | {"members": [member.model_dump() for member in project.state.members]}


def key_view(key: Entity[ApiKey], project_id: int, usage: Document | None) -> JsonObject:
    """``usage``: what has been written down of the key's use, which is some seconds behind."""
    state = key.state
    ends = [secret.valid_until for secret in state.earlier_secrets] or None
    return {
        "id": key.id,
        "name": state.name,
        "prefix": state.prefix,
        "permission": state.permission,
        "scopes": state.scopes,
        "project_id": project_id,
        "developer_id": state.developer_id,
        "plan": state.plan,
        "created_at": isoformat_z(state.created_at),
        "created_by": state.created_by,
        "expires_at": state.expires_at and isoformat_z(state.expires_at),
        "rotated_at": state.rotated_at and isoformat_z(state.rotated_at),
        "previous_secret_valid_until": ends and isoformat_z(max(ends)),
        "revoked_at": state.revoked_at and isoformat_z(state.revoked_at),
        **_used(usage),
    }


def client_view(client: Entity[OauthClient], project_id: int, usage: Document | None) -> JsonObject:
    state = client.state
    return {
        "id": client.id,
        "name": state.name,
        "scopes": state.scopes,
        "project_id": project_id,
        "developer_id": state.developer_id,
        "plan": state.plan,
        "created_at": isoformat_z(state.created_at),
        "created_by": state.created_by,
        "revoked_at": state.revoked_at and isoformat_z(state.revoked_at),
        **_used(usage),
    }


def issued_client_view(issued: IssuedClient, project_id: int) -> JsonObject:
    """The one answer that holds the client's secret."""
    named = {"client_id": issued.entity.id, "client_secret": issued.secret}
    return {**client_view(issued.entity, project_id, None), **named}


def _used(usage: Document | None) -> JsonObject:
    return {
        "last_used_at": None if usage is None else isoformat_z(usage["last_used_at"]),
        "uses": 0 if usage is None else usage["uses"],
    }


def issued_key_view(issued: IssuedKey, project_id: int) -> JsonObject:
    """The one answer that holds the key itself."""
    return {**key_view(issued.entity, project_id, None), "secret": issued.secret}


def event_view(envelope: Envelope) -> JsonObject:
    return {
        "id": envelope.id,
        "version": envelope.version,
        "type": envelope.type,
        "time": isoformat_z(envelope.time),
        "actor": envelope.metadata.actor,
        "data": orjson.Fragment(envelope.data_json),
    }
