"""HTML that cannot be broken by what it shows: a string is escaped where it is put in, and only Markup is not.

A page fetches nothing and runs nothing, and says so to the browser, too.
"""

from collections.abc import Iterable, Mapping
from html import escape
from typing import NamedTuple
from unicodedata import category


class Markup(NamedTuple):
    """A piece of HTML."""

    html: str


Inside = str | Markup
Cell = Inside | int
NONE: Mapping[str, object] = {}
HARMLESS = "\n\t\u200c\u200d"
"""Characters that do not print, and that texts need: the last two join letters, or parts of an emoji."""
FETCHES_NOTHING = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
STYLE = """
:root { color-scheme: light dark; --ground: #f6f7f9; --card: #fff; --ink: #1d2228; --quiet: #5d6773; --line: #dde1e6;
  --bar: #4878a8; --mark: #b4481e; --masked: #fde3c8; --token: #eceff3; --bad: #b3261e }
@media (prefers-color-scheme: dark) { :root { --ground: #14171b; --card: #1d2126; --ink: #d5dae0; --quiet: #929ca8;
  --line: #333a42; --bar: #6c9bcb; --mark: #e08a5b; --masked: #5b3a1b; --token: #2a3037; --bad: #f2938c } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1240px; padding: 24px 20px 60px; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 24px; margin: 0 0 4px } h2 { font-size: 19px; margin: 34px 0 10px } h3 { font-size: 14px; margin: 0 }
p { margin: 4px 0 } .quiet { color: var(--quiet) } .bad { color: var(--bad) } .small { font-size: 13px }
table { border-collapse: collapse } th, td { padding: 3px 18px 3px 0; text-align: left; vertical-align: top }
th { font-weight: 600; color: var(--quiet); font-size: 13px } tr + tr td { border-top: 1px solid var(--line) }
.plain { white-space: nowrap } .number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.untrusted { unicode-bidi: isolate; overflow-wrap: anywhere } td > .untrusted { overflow-wrap: break-word }
.box { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px }
.side { display: grid; align-items: start; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(380px, 1fr)) }
.scroll { overflow-x: auto }
svg { display: block; width: 100%; height: auto; margin-top: 8px } svg text { fill: var(--quiet); font-size: 11.5px }
.bar { fill: var(--bar) } .axis { stroke: var(--line) } .mark { stroke: var(--mark); stroke-dasharray: 4 3 }
svg .told { fill: var(--mark) } .length { background: var(--bar); height: 10px; border-radius: 2px; min-width: 1px }
.sample { display: grid; grid-template-columns: 248px minmax(0, 1fr); gap: 6px 24px; margin-bottom: 14px }
.sample > .key { grid-column: 1 / -1 }
.views { display: grid; grid-template-columns: repeat(3, 1fr); gap: 4px; margin-bottom: 10px }
.views img { width: 100%; display: block; border-radius: 3px } .views .seen { grid-column: 1 / -1 }
.said { border-top: 1px solid var(--line); padding: 6px 0 8px } .said:first-child { border-top: 0; padding-top: 0 }
.tokens { line-height: 2; font: 13px/2 ui-monospace, monospace }
.tokens > * { background: var(--token); border-radius: 3px; padding: 1px 4px; margin-right: 3px; white-space: pre-wrap }
.tokens mark { background: var(--masked); color: inherit } .tokens s { opacity: .65 }
@media (max-width: 760px) { .sample { grid-template-columns: 1fr } .side { grid-template-columns: 1fr } }
"""


def tag(name: str, *inside: Inside, attributes: Mapping[str, object] = NONE) -> Markup:
    """An element, its classes behind dots: `tag("td.number", "12")`. Strings inside and attributes are escaped."""
    kind, *classes = name.split(".")
    given = {**({"class": " ".join(classes)} if classes else {}), **attributes}
    said = "".join(f' {key}="{_escaped(str(value))}"' for key, value in given.items())
    return Markup(f"<{kind}{said}>" + joined(inside).html + ("" if kind in ("img", "meta") else f"</{kind}>"))


def joined(pieces: Iterable[Inside], between: str = "") -> Markup:
    """Pieces one behind another; strings among them are escaped."""
    made = (piece.html if isinstance(piece, Markup) else _escaped(piece) for piece in pieces)
    return Markup(_escaped(between).join(made))


def table(heads: Iterable[str], rows: Iterable[Iterable[Cell]]) -> Markup:
    """A table whose whole numbers stand right, with their thousands apart."""
    lines = [
        tag("tr", *(tag("td.number", f"{cell:,}") if isinstance(cell, int) else tag("td", cell) for cell in row))
        for row in rows
    ]
    return tag("div.scroll", tag("table", tag("tr", *(tag("th", head) for head in heads)), *lines))


def page(title: str, *sections: Markup) -> str:
    """A whole HTML file."""
    head = tag(
        "head",
        tag("meta", attributes={"charset": "utf-8"}),
        tag("meta", attributes={"http-equiv": "Content-Security-Policy", "content": FETCHES_NOTHING}),
        tag("meta", attributes={"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        tag("title", title),
        tag("style", Markup(STYLE)),
    )
    return "<!doctype html>\n" + tag("html", head, tag("body", *sections), attributes={"lang": "en"}).html + "\n"


def _escaped(string: str) -> str:
    """A string that shows as it is: no character of it commands, and what UTF-8 cannot hold is spelt out."""
    visible = "".join(one if _harmless(one) else one.encode("unicode_escape").decode() for one in string)
    return escape(visible)


def _harmless(one: str) -> bool:
    return one.isprintable() or one in HARMLESS or category(one) == "Zs"
