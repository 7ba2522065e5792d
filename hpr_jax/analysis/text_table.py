"""Tables for a console."""

from collections.abc import Collection, Iterable, Sequence


def print_table(rows: Iterable[Sequence[str]], left: Collection[int] = (0,)) -> None:
    """Prints rows as a table, whose columns `left` are aligned left, the others right."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = [
            text.ljust(width) if place in left else text.rjust(width) for place, (text, width) in enumerate(zip(row, widths))
        ]
        print("  ".join(cells).rstrip())
