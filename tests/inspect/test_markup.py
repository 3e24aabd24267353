from html import unescape
from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from dist_fusion.inspect.markup import Markup, joined, page, table, tag


class Seen(HTMLParser):
    """The elements and texts of a page."""

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)


@given(st.text(st.characters(codec="utf-8")))
def test_whatever_a_string_says_it_makes_no_element_and_no_attribute(string):
    seen = Seen(tag("p.kind", string, attributes={"title": string}).html)
    ((name, attributes),) = seen.elements
    assert name == "p" and attributes.keys() == {"class", "title"}


def test_what_is_printed_is_shown_as_it_is_and_commands_are_spelt_out():
    assert unescape(tag("p", "<b> & 'é' 家 👩\u200d👩\n").html) == "<p><b> & 'é' 家 👩\u200d👩\n</p>"
    assert tag("p", "\x1b[31m \u202egnp \ud800").html == r"<p>\x1b[31m \u202egnp \ud800</p>"


def test_markup_is_put_in_as_it_is():
    assert joined(["<", Markup("<b></b>")], " & ").html == "&lt; &amp; <b></b>"
    row = '<tr><td class="number">1,000</td><td><b>x</b></td></tr>'
    assert row in table(["", ""], [[1000, tag("b", "x")]]).html


def test_a_page_says_that_it_fetches_nothing():
    seen = Seen(page("<title>", tag("p", "x")))
    policies = [attributes["content"] for _, attributes in seen.elements if "http-equiv" in attributes]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
    assert "<title>" in "".join(seen.texts)
