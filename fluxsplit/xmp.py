"""Two texts out of an XMP packet, without an XML parser: no entity is defined there, so none can grow.

XMP specification part 1: a property stands as an element, as an attribute, or as an `rdf:Alt` list of languages.
"""

from __future__ import annotations

import html
import re

MAX_XMP_CHARS = 4 << 20
_TAG = re.compile(r"<[^<>]{0,2000}>")


def xmp_text(xmp: str, name: str) -> str:
    """The text of the property `name` (as `exif:UserComment`); empty where there is none."""
    if len(xmp) > MAX_XMP_CHARS:
        return ""
    start, end = xmp.find(f"<{name}"), xmp.find(f"</{name}>")
    if 0 <= start < end:
        body = xmp[xmp.find(">", start) + 1 : end]
        return html.unescape(_TAG.sub("", body)).strip()
    at = xmp.find(f' {name}="')
    if at < 0:
        return ""
    first = at + len(name) + 3
    last = xmp.find('"', first)
    return html.unescape(xmp[first:last]).strip() if last > 0 else ""
