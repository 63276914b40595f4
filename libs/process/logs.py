"""Logs: one line per event, JSON or readable on a terminal, with the request's and the trace's ids and no secrets."""

import asyncio
import logging
import re
import sys
from collections.abc import Mapping, MutableMapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import orjson
import structlog
from opentelemetry import trace
from structlog.typing import EventDict, FilteringBoundLogger, Processor, WrappedLogger

from libs.process.setting_types import LogLevel
from libs.process.settings import StoreSettings

MASK = "***"
DEPTH_MAX = 8
REQUEST_LINES_SECONDS = 0.05

log = structlog.get_logger(__name__)

# Every pattern below needs one of these words. Nearly all texts have none, so one search is enough for them.
_SUSPICIOUS = re.compile(r"://|ds_|bearer|basic|passw|secret|key|token", re.IGNORECASE)

_SECRET_KEY = re.compile(
    r"passw(or)?d|passphrase|secret|token|authorization|cookie|api_?key|private_?key|signing_?key|credential|dsn$",
    re.IGNORECASE,
)
_SECRET_TEXT: tuple[tuple[re.Pattern[str], str], ...] = (
    # Credentials in URLs: scheme://user:password@host. Like URL parsers, this ends them at the last @ before a slash.
    (re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s/:@?#]*):[^\s/]*@", re.IGNORECASE), rf"\1:{MASK}@"),
    (re.compile(r"\bds_([a-z]{3,4})_[0-9A-Za-z]+"), rf"ds_\1_{MASK}"),
    (re.compile(r"\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE), rf"\1 {MASK}"),
    (
        re.compile(r"\b(password|passwd|secret|api_?key|access_?token)(\s*[=:]\s*)[^\s&,;'\"]+", re.IGNORECASE),
        rf"\1\2{MASK}",
    ),
)


def configure_logs(service: str, settings: StoreSettings) -> None:
    """Send this process's logs, including those of its libraries, to stdout; they follow ``log_level``."""
    readable = settings.log_format == "console" or (settings.log_format == "auto" and sys.stdout.isatty())
    shared = _shared_processors(service)
    renderer: Processor = structlog.dev.ConsoleRenderer() if readable else _render_json
    # A class of its own: loggers are cached, so a change of the level must reach the loggers that exist.
    logger = type("Logger", (structlog.make_filtering_bound_logger(logging.DEBUG),), {})
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=logger,
        logger_factory=structlog.PrintLoggerFactory(sys.stdout) if readable else _lines_to_stdout,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stdout)
    formatter_chain: list[Processor] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer]
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
            processors=[*formatter_chain, _as_text] if not readable else formatter_chain,
        )
    )
    logging.basicConfig(handlers=[handler], force=True)

    def apply(name: LogLevel) -> None:
        level = logging.getLevelNamesMapping()[name]
        _log_from(level, logger)
        logging.getLogger().setLevel(max(level, logging.WARNING))
        REQUEST_LINES.service = service if level == logging.INFO and not readable else None

    apply(settings.log_level.value)
    settings.log_level.subscribe(apply)


def _log_from(level: int, logger: type[FilteringBoundLogger]) -> None:
    """Have every logger of the class drop what is below a level, at no cost."""
    for name, method in vars(structlog.make_filtering_bound_logger(level)).items():
        if not name.startswith("__"):
            setattr(logger, name, method)


class RequestLines:
    """Writes the lines of requests without structlog's processors, which took a fifth of the gateway's time.

    Args:
        service: None passes the lines to structlog like all others.
    """

    def __init__(self) -> None:
        self.service: str | None = None
        self._is_flush_due = False

    def write(self, line: dict[str, Any]) -> None:
        """Write a line; the operating system gets it at most 50 ms later, together with others."""
        sys.stdout.buffer.write(orjson.dumps(line, default=str, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_UTC_Z))
        if not self._is_flush_due:
            self._is_flush_due = True
            asyncio.get_running_loop().call_later(REQUEST_LINES_SECONDS, self._flush)

    def _flush(self) -> None:
        self._is_flush_due = False
        sys.stdout.buffer.flush()


REQUEST_LINES = RequestLines()


def log_request(
    request_id: str,
    method: str,
    path: str,
    status: int,
    duration_ms: float,
    traceparent: str | None,
    *,
    principal: str | None,
    client_address: str | None,
) -> None:
    """Write the line of a request."""
    line = {
        "event": "http_request",
        "method": method,
        "path": path,
        "status": status,
        "duration_ms": duration_ms,
        "request_id": request_id,
        "trace_id": None if traceparent is None else traceparent[3:35],
        "principal": principal,
        "client_address": client_address,
    }
    service = REQUEST_LINES.service
    if service is None:
        log.info(**line)
        return
    line["path"] = redact_text(path)
    REQUEST_LINES.write({**line, "level": "info", "timestamp": datetime.now(UTC), "service": service})


def redact(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Mask secrets: values whose key names one, credentials in URLs, our own tokens."""
    for key, value in event.items():
        event[key] = _redacted(key, value, 0)
    return event


def redact_text(text: str) -> str:
    """``text`` with every recognisable credential masked."""
    if _SUSPICIOUS.search(text) is None:
        return text
    for pattern, replacement in _SECRET_TEXT:
        text = pattern.sub(replacement, text)
    return text


def _redacted(key: str, value: Any, depth: int) -> Any:
    match value:
        case None | bool() | int() | float():
            return value
        case _ if _is_secret(key):
            return MASK
        case str():
            return redact_text(value)
        case Mapping() if depth < DEPTH_MAX:
            return {str(name): _redacted(str(name), item, depth + 1) for name, item in value.items()}
        case list() | tuple() | set() | frozenset() if depth < DEPTH_MAX:
            return [_redacted(key, item, depth + 1) for item in value]
        case _:
            return redact_text(str(value))


@lru_cache(maxsize=4096)
def _is_secret(key: str) -> bool:
    return _SECRET_KEY.search(key) is not None


def _shared_processors(service: str) -> list[Processor]:
    return [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _bind_service(service),
        _bind_trace,
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,
        redact,
    ]


def _bind_service(service: str) -> Processor:
    def bind(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
        event["service"] = event.get("service", service)
        return event

    return bind


def _bind_trace(_: WrappedLogger, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        event["trace_id"] = f"{context.trace_id:032x}"
        event["span_id"] = f"{context.span_id:016x}"
    return event


def _render_json(_: WrappedLogger, __: str, event: EventDict) -> bytes:
    return orjson.dumps(event, default=str)


def _as_text(_: WrappedLogger, __: str, line: Any) -> str:
    return bytes(line).decode()


def _lines_to_stdout(*_: Any) -> structlog.BytesLogger:
    return structlog.BytesLogger(sys.stdout.buffer)
