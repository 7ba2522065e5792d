"""Tables for a console."""

from collections.abc import Collection, Iterable, Sequence


def print_table(rows: Iterable[Sequence[str]], left: Collection[int] = (0,)) -> None:
    """Prints rows as a table, see `text_table`."""
    print(text_table(rows, left))


def text_table(rows: Iterable[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """Rows as a table, whose columns `left` are aligned left, the others right."""
    rows, lines = list(rows), []
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = [
            text.ljust(width) if place in left else text.rjust(width) for place, (text, width) in enumerate(zip(row, widths))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
