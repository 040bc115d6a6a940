"""The coordinates of a drawing, compared with its frame."""

from __future__ import annotations

import re
from xml.etree import ElementTree

_ALONG = {"x": 0, "x1": 0, "x2": 0, "cx": 0, "y": 1, "y1": 1, "y2": 1, "cy": 1}
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


def outside(drawing: str) -> list[str]:
    """Return the elements of an SVG text with a coordinate outside its viewBox, as `tag attribute=number`."""
    root = ElementTree.fromstring(drawing)
    left, top, wide, high = map(float, root.attrib["viewBox"].split())
    limits = ((left, left + wide), (top, top + high))
    found = []
    for each in root.iter():
        at = [(name, _ALONG[name], float(value)) for name, value in each.attrib.items() if name in _ALONG]
        ends = {"width": "x", "height": "y"} if each is not root else {}
        at += [
            (name, _ALONG[start], float(each.attrib[start]) + float(each.attrib[name]))
            for name, start in ends.items()
            if name in each.attrib and start in each.attrib
        ]
        numbers = [float(n) for n in _NUMBER.findall(each.get("points") or each.get("d") or "")]
        at += [("points", i % 2, number) for i, number in enumerate(numbers)]
        for name, along, number in at:
            low, up = limits[along]
            if not low - 0.05 <= number <= up + 0.05:
                found.append(f"{each.tag.rpartition('}')[2]} {name}={number:g}")
    return found
