"""A page of HTML that needs nothing beside it: its style and its pictures are within it, and it loads and runs nothing.

Whatever comes from files, such as names of classes and images, is escaped: `Html` is what has been.
"""

import base64
import html
from collections.abc import Callable, Iterable, Sequence
from typing import NewType

from hpr_jax.inference.figures import DARK, LIGHT, Theme

# Text that is HTML, and nothing else than this project's tags.
Html = NewType("Html", str)

_STYLE = """\
:root { color-scheme: light dark; --ground: #f5f5f4; --card: #fff; --ink: #18181a; --faint: #5c5c64; --line: #dbdbd8;
  --mark: #fff3c4; --lead: #23467e; }
@media (prefers-color-scheme: dark) { :root { --ground: #141415; --card: #1c1c1e; --ink: #eaeaea; --faint: #a4a4a8;
  --line: #3e3e43; --mark: #4a3f14; --lead: #8fb3e2; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 1rem; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: .5rem 0; } h2 { font-size: 1.25rem; margin: 2rem 0 .5rem; color: var(--lead); }
h3 { font-size: 1rem; margin: 1rem 0 .25rem; } p { margin: .5rem 0; max-width: 48rem; }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem; font-size: .9rem; } a { color: var(--lead); }
.note, figcaption { color: var(--faint); font-size: .875rem; }
.wide { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; background: var(--card); font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { border: 1px solid var(--line); padding: .25rem .6rem; text-align: right; }
th:first-child, td:first-child, table.text td, table.text th { text-align: left; }
tr.marked { background: var(--mark); }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
figure { margin: 0; max-width: 100%; } figure.photograph { display: table; }
figcaption { display: table-caption; caption-side: bottom; } img { display: block; max-width: 100%; height: auto; }
summary { cursor: pointer; font-weight: 600; margin: .5rem 0; }
@media (max-width: 45rem) { figure.broad { overflow-x: auto; } figure.broad img { max-width: none; width: 44rem; } }
@media print { body { max-width: none; font-size: 11px; } nav { display: none; } figure, tr { break-inside: avoid; }
  h2 { break-after: avoid; } .wide { overflow: visible; } }
"""


def text(content: object) -> Html:
    """Anything as text."""
    return Html(html.escape(str(content)))


def join(parts: Iterable[Html]) -> Html:
    """HTML, one part after the other."""
    return Html("\n".join(parts))


def paragraph(*sentences: object, note: bool = False) -> Html:
    """Sentences; a note is less conspicuous."""
    kind = ' class="note"' if note else ""
    return Html(f"<p{kind}>{text(' '.join(map(str, sentences)))}</p>")


def heading(title: object) -> Html:
    """A heading within a section."""
    return Html(f"<h3>{text(title)}</h3>")


def table(
    head: Sequence[object], rows: Iterable[Sequence[object]], *, marked: Iterable[int] = (), texts: bool = False
) -> Html:
    """A table.

    Args:
      marked: places of rows that stand out.
      texts: whether all cells are texts; else all but those of the first column are numbers.
    """
    marked = set(marked)
    lines = [_row("th", head, "")]
    lines += [_row("td", row, ' class="marked"' if place in marked else "") for place, row in enumerate(rows)]
    kind = ' class="text"' if texts else ""
    return Html(f'<div class="wide"><table{kind}>{"".join(lines)}</table></div>')


def _row(tag: str, cells: Sequence[object], kind: str) -> str:
    return f"<tr{kind}>{''.join(f'<{tag}>{text(cell)}</{tag}>' for cell in cells)}</tr>"


def folded(title: object, *content: Html) -> Html:
    """Content that is shown when its title is clicked."""
    return Html(f"<details><summary>{text(title)}</summary>{join(content)}</details>")


def figures(*content: Html) -> Html:
    """Figures side by side, as many as there is room for."""
    return Html(f'<div class="figures">{join(content)}</div>')


def drawn(draw: Callable[[Theme], bytes], description: str, *, broad: bool = False) -> Html:
    """A figure that is drawn for a light and for a dark ground, of which a browser shows the one that fits.

    Args:
      broad: whether phones shall move the figure sideways, and not shrink it until nothing can be read.
    """
    light, dark = _inline(draw(LIGHT), "png"), _inline(draw(DARK), "png")
    source = f'<source srcset="{dark}" media="(prefers-color-scheme: dark)">'
    image = f'<img src="{light}" alt="{text(description)}">'
    kind = ' class="broad"' if broad else ""
    return Html(f"<figure{kind}><picture>{source}{image}</picture></figure>")


def photograph(jpeg: bytes, caption: object) -> Html:
    """A picture with a caption."""
    image = f'<img src="{_inline(jpeg, "jpeg")}" alt="{text(caption)}">'
    return Html(f'<figure class="photograph">{image}<figcaption>{text(caption)}</figcaption></figure>')


def _inline(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def page(title: object, sections: Sequence[tuple[str, Html]]) -> Html:
    """A whole page.

    Args:
      sections: titles and contents.
    """
    links = "".join(f'<a href="#part{place}">{text(name)}</a>' for place, (name, _) in enumerate(sections))
    parts = "\n".join(
        f'<section id="part{place}"><h2>{text(name)}</h2>\n{content}</section>'
        for place, (name, content) in enumerate(sections)
    )
    # The policy makes browsers refuse whatever is not in the page, scripts included.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return Html(
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{text(title)}</title>\n'
        f"<style>\n{_STYLE}</style></head>\n<body><h1>{text(title)}</h1><nav>{links}</nav>\n{parts}\n</body></html>\n"
    )
