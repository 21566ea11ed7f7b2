"""Amounts in words, for sentences on a terminal."""

from __future__ import annotations

__all__ = ["amount", "count", "dollars", "duration", "size", "small_duration"]


def duration(seconds: float) -> str:
    """Seconds in words.

    >>> duration(42), duration(185), duration(7300), duration(200_000)
    ('42 s', '3 min 5 s', '2 h 1 min', '2 d 7 h')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def small_duration(seconds: float) -> str:
    """Two digits of something that may take less than a second.

    >>> small_duration(0.0041), small_duration(0.123), small_duration(1.26), small_duration(75.2)
    ('4.1 ms', '120 ms', '1.3 s', '1 min 15 s')
    """
    if seconds >= 60:
        return duration(seconds)
    if seconds >= 0.9995:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    return f"{float(f'{seconds * 1000:.2g}'):g} ms"


def size(count: float) -> str:
    """Bytes in words, in powers of ten.

    >>> size(900), size(45_300_000), size(1.26e9)
    ('900 bytes', '45 MB', '1.3 GB')
    """
    if count < 1000:
        return f"{count:.0f} bytes"
    power = next((p for p in (3, 6, 9) if count < 0.9995 * 10 ** (p + 3)), 12)
    number = count / 10**power
    return f"{number:.1f} {_UNITS[power]}" if number < 9.95 else f"{number:.0f} {_UNITS[power]}"


_UNITS = {3: "kB", 6: "MB", 9: "GB", 12: "TB"}


def count(number: float) -> str:
    """A large number with three digits.

    >>> count(1.128e6), count(300e9), count(2.0972e11), count(512)
    ('1.13M', '300B', '210B', '512')
    """
    for power, letter in _LETTERS.items():
        if number >= 0.9995 * 10**power:
            return f"{float(f'{number / 10**power:.3g}'):g}{letter}"
    return f"{number:g}"


def amount(text: str) -> float | None:
    """The number that a text such as 300B, 1.5b, 3e12 or 100_000 means; None if it means none.

    >>> amount("300B"), amount("1.5b"), amount("3e12"), amount("many")
    (300000000000.0, 1500000000.0, 3000000000000.0, None)
    """
    scale = {letter: 10.0**power for power, letter in _LETTERS.items()}
    letter = text[-1:].upper()
    try:
        return float(text[:-1]) * scale[letter] if letter in scale else float(text)
    except ValueError:
        return None


def dollars(number: float) -> str:
    """Money with three digits.

    >>> dollars(1_998_600), dollars(12_345), dollars(3.21)
    ('$2.00M', '$12.3k', '$3.21')
    >>> dollars(759.78)
    '$760'
    """
    for power, letter in ((9, "B"), (6, "M"), (3, "k")):
        if number >= 0.9995 * 10**power:
            scaled = number / 10**power
            places = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
            return f"${scaled:.{places}f}{letter}"
    return f"${number:.2f}" if number < 99.995 else f"${number:.0f}"


_LETTERS = {12: "T", 9: "B", 6: "M", 3: "K"}
