"""How figures are written in a page."""

from __future__ import annotations

MINUS = "\N{MINUS SIGN}"


def percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}"


def signed(value: float, digits: int = 1) -> str:
    text = f"{abs(value):.{digits}f}"
    return text if float(text) == 0 else ("+" if value > 0 else MINUS) + text


def points(share: float) -> str:
    return signed(100 * share)


def p_value(value: float) -> str:
    return "<.001" if value < 0.001 else f"{value:.3f}".removeprefix("0") if value < 1 else "1"


def about(count: int) -> str:
    """To two digits, as 76, 450 or 12,000."""
    return f"{int(float(f'{count:.2g}')):,}"
