"""Why an attempt failed, in one text."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from services.worker.report import StreamReport

ERROR_CHARACTERS_MAX = 2_000
MESSAGE_CHARACTERS_MAX = 700
STREAMS_NAMED_MAX = 5


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a stream or the whole attempt failed.

    Args:
        retryable: another attempt may succeed.
        stream: the stream that failed, None for the attempt.
    """

    message: str
    retryable: bool
    stream: StreamReport | None = None

    @property
    def cause(self) -> str:
        """The message without the stream's names, so that it is equal for streams with the same problem."""
        if self.stream is None:
            return self.message
        plan = self.stream.plan
        dotted = "|".join(re.escape(str(name)) for name in (plan.stream, plan.target))
        single = "|".join(re.escape(name) for name in (plan.stream.name, plan.target.table))
        text = re.sub(rf"(?<![\w.])({dotted})(?!\w)", "…", self.message).removeprefix("…: ")
        return re.sub(rf"(?<=['\"])({single})(?=['\"])|(?<=\btable )({single})(?!\w)", "…", text)


def failures_text(failures: Sequence[Failure], streams: int) -> str:
    """All failures, equal causes once. If the text would get too long, it ends with the number of those left out."""
    if len(failures) == 1:
        return failures[0].message[:ERROR_CHARACTERS_MAX]
    groups: dict[str, list[Failure]] = {}
    for failure in failures:
        groups.setdefault(failure.cause, []).append(failure)
    text = f"{len(failures)} failures in {streams} streams: "
    left = len(failures)
    for group in groups.values():
        part, rest = _group_text(group), f" (and {left} more, see the log)"
        if len(text) + len(part) + len(rest) > ERROR_CHARACTERS_MAX:
            return text.removesuffix("; ") + rest
        text += f"{part}; "
        left -= len(group)
    return text.removesuffix("; ")


def _group_text(group: Sequence[Failure]) -> str:
    """The first failure, and the other streams with the same cause."""
    text = group[0].message[:MESSAGE_CHARACTERS_MAX]
    others = [str(failure.stream.plan.stream) for failure in group[1:] if failure.stream is not None]
    if not others:
        return text
    more = len(others) - STREAMS_NAMED_MAX
    listed = ", ".join(others[:STREAMS_NAMED_MAX]) + (f" and {more} more" if more > 0 else "")
    return f"{text} (the same: {listed})"


def named(stream: StreamReport, message: str) -> str:
    """The message, prefixed with the stream's name unless it contains it."""
    name = str(stream.plan.stream)
    return message if name in message else f"{name}: {message}"
