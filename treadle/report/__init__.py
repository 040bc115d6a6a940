"""The report on a compiled model: one HTML file that opens without a network and shows what the compiler did, and why.

    exe = t.compile("bert")
    exe.report().save("bert.html")

`building.py` collects the facts of a compiled model, a decoding step or a sharded model. The facts are programs at each
stage (`stages.py`), their ops (`nodes.py`) as nested boxes (`boxes.py`) with positions (`layout.py`), and the tabs
(`tabs.py`, `memory_tab.py`), which show what `treadle.explaining` and `treadle.reporting` return from `as_dict`.
`writing.py` packs them into the page, whose parts are plain files in `page/`. The page does not derive facts: it
arranges boxes, evaluates formulas of sizes, and shows text.
"""
