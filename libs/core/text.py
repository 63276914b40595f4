"""Texts from callers, which may contain bytes that are not UTF-8."""

DIGITS_MAX = 18


def is_text(text: str) -> bool:
    """False where bytes that are not UTF-8 were kept as lone surrogates: neither JSON nor a database can hold those."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def readable(text: str) -> str:
    """The text with a question mark for each byte that is not UTF-8."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def number_of(text: str) -> int | None:
    """The number written in ASCII digits, None for whatever else ``int`` accepts: signs, spaces, ``1_0``, ``١``."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= DIGITS_MAX else None
