"""A page as tests look at it."""

from html.parser import HTMLParser

VOID = {"meta", "source", "img", "br", "wbr"}


class Page(HTMLParser):
    """Tags and attributes of a page, its text, and whether every tag is closed in order."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        # A void element of a drawing.
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.text += text

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]
