"""The loops of attention in one pass over the keys, for `FlashAttention` and for attention over caches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from treadle.backends.tvm.kernels.arithmetic.exponentials import exp_nonpositive
from treadle.backends.tvm.kernels.attention.attention_masks import WRITERS
from treadle.backends.tvm.kernels.attention.part_keeping import PartKeeper
from treadle.backends.tvm.kernels.attention.row_softmax import RowSoftmax, ScoreRow
from treadle.backends.tvm.kernels.attention.scratch import BLOCK, GROUP, PANEL, SPAN, Scratch, tile_rows
from treadle.ir.types import DTYPES, DType, boolean, f32, i64

if TYPE_CHECKING:
    from treadle.backends.tvm.kernels.attention.flash_attention import FlashAttention
    from treadle.backends.tvm.kernels.emitter import Emitter, Expr

_LINE = 16
"""Number of float32 elements in a cache line."""


class AttentionWriter(PartKeeper):
    """A writer of attention kernels. Index variables are named as in the formula: b, g, r, i (query), j (key).

    Queries and keys have positions, which determine masks and the beginnings of blocks. In this class, a position is an
    index in the row; subclasses for caches change this.

    origin     position of the row's first query
    limit      position after the row's last key
    key_row    the row of keys that the row's queries attend to
    """

    origin: Expr = 0
    limit: Expr
    key_row: Expr

    def __init__(self, spec: FlashAttention, k: Emitter) -> None:
        super().__init__(spec, k)
        self.tile = tile_rows(k.isa)
        self.width = PANEL * self.lanes
        self._arguments()

    def _arguments(self) -> None:
        k, spec = self.k, self.spec
        dtypes = {"q": DTYPES[spec.operands], "keys": self._held, "values": self._held}
        pointers = {name: k.pointer(name, dtype) for name, dtype in dtypes.items()}
        self._ask_read()
        lengths = [k.pointer(f"lengths{n}", i64) for n in range(spec.padded)]
        self.terms = [WRITERS[code](k, n) for n, code in enumerate(spec.terms)]
        pointers["out"] = k.pointer("out", f32)
        parts = ("packed_keys", "packed_values", "queries", "scores", "sums", "rows")
        scratch = [k.pointer(name, f32) for name in parts]
        self._ask_written()
        self.b, self.g, self.r, self.s, self.t = (k.size(name) for name in "bgrst")
        self.key_rows = self._ask_key_rows()
        self.low, self.high = k.size("low"), k.size("high")
        self.most, self.slots = k.size("most"), k.size("slots")
        parts = self._ask_parts()
        heads = self.g * self.r
        shapes = {
            "q": [self.b, heads, self.s, spec.d],
            "keys": [self.key_rows, self.g, self.t, spec.d],
            "values": [self.key_rows, self.g, self.t, spec.e],
            "out": [self.b, heads, self.s, spec.e],
        }
        strides = {name: [k.size(f"{name}_stride{n}") for n in range(3)] for name in shapes}
        for term in self.terms:
            term.ask()
        views = {name: k.view(pointers[name], shape, [*strides[name], 1]) for name, shape in shapes.items()}
        self.q, self.key, self.value, self.out = (views[n] for n in ("q", "keys", "values", "out"))
        self.lengths = [k.view(p, [self.b]) for p in lengths]
        for term in self.terms:
            term.bind(self.b, heads, self.s, self.t)
        part = self._scratch()
        rows = self.r * self.most
        queries = [GROUP, part.queries // GROUP]
        held = [[part.keys], [part.values], queries, [GROUP, BLOCK], [rows, part.sums], [rows, part.rows]]
        places = [self.slots] * 4 + [parts] * 2
        made = [k.view(p, [n, *shape]) for p, n, shape in zip(scratch, places, held, strict=True)]
        self.packed_keys, self.packed_values, self.queries, self.scores, self.sums, self.rows = made
        self.softmax = RowSoftmax(k, spec.softcap, self.terms, self.scores, self.rows, self._exp, self._keep_weights)

    @property
    def _exp(self) -> Callable[[Emitter, Expr, int], Expr]:
        """Function that emits e^x for x <= 0."""
        return exp_nonpositive

    def _scratch(self) -> Scratch:
        """Return the workspace of the kernel."""
        return Scratch.of(self.spec.d, self.spec.e, self.k.isa)

    @property
    def _held(self) -> DType:
        """Dtype of keys and values in memory."""
        return DTYPES[self.spec.operands]

    @property
    def _depth(self) -> int:
        """Number of words in a key or a query. A word is a number, or a pair of bf16 numbers."""
        return self.spec.d

    def _widened(self, view: Any, index: Sequence[Expr], lanes: int = 1) -> Expr:
        """Load elements of a query, a key or a value, and return them in float32."""
        read = self.k.load(view, index, lanes)
        return read if self._held is f32 else self.k.let(self.k.cast(self.k.let(read), f32, lanes))

    def _ask_read(self) -> None:
        """Declare further pointers that come after the values."""

    def _ask_written(self) -> None:
        """Declare further pointers that come after all others."""

    def _ask_key_rows(self) -> Expr:
        """Return the number of rows of keys. Sizes declared here come after t."""
        return self.b

    def _ask_parts(self) -> Expr:
        """Return the number of parts in memory. Sizes declared here come after the number of slots."""
        return self.slots

    # -- tasks -----------------------------------------------------------------------------------------------

    def write(self) -> None:
        """Emit the kernel: every slot runs its share of the tasks one after the other, in its own workspace."""
        k = self.k
        chunks = self._index(k.greatest(self._ceil(self.s, self.most), k.index(1)), "chunks")
        self.chunk = self._index(self._ceil(self._ceil(self.s, chunks), GROUP) * GROUP, "chunk")  # of about equal size
        tasks = self._index(self.b * self.g * chunks, "tasks")
        active = self._index(k.least(self.slots, tasks), "active")
        with k.parallel(active, "slot") as slot:
            self.slot = self.part = self.previous = slot
            self._share(slot, tasks, active, chunks)

    def _share(self, slot: Expr, tasks: Expr, active: Expr, chunks: Expr) -> None:
        """Emit the tasks of one slot. All slots have the same number of tasks."""
        k = self.k
        first = self._index(k.floor_divide(slot * tasks, active), "first")
        last = self._index(k.floor_divide((slot + 1) * tasks, active), "last")
        with k.loop(last - first, "n") as n:
            task = self._index(first + n, "task")
            at = self._index(k.floor_mod(task, chunks), "at")
            pair = self._index(k.floor_divide(task, chunks), "pair")
            # In causal attention, late queries take the most time, so each slot alternates between early and late ones.
            half = self._index(k.floor_divide(at, 2), "half")
            chunk = self._index(k.select(k.equal(k.floor_mod(at, 2), k.index(0)), half, chunks - 1 - half), "part")
            row, g = self._index(k.floor_divide(pair, self.g), "row"), self._index(k.floor_mod(pair, self.g), "g")
            self.key_row, self.limit = row, self._limited(row, self.t)
            with k.when(k.both(n < last - first - 1, k.equal(chunks, k.index(1)))):
                after = self._index(task + 1, "after")
                self._bring(self._index(k.floor_divide(after, self.g), "next_row"), k.floor_mod(after, self.g))
            self._task(row, g, chunk)

    def _bring(self, b: Expr, g: Expr) -> None:
        """Prefetch the cache lines of the next task's queries, and of its first keys and values.

        Rows of one head are not contiguous, so the hardware prefetcher does not predict them.
        """
        k, spec = self.k, self.spec
        g = self._index(g, "next_head")
        line = _LINE * 4 // self._held.bytes
        with k.loop(k.least(self.t, k.index(BLOCK)), "j") as j:
            for view, wide in ((self.key, spec.d), (self.value, spec.e)):
                for c in range(0, wide, line):
                    k.prefetch(view, [b, g, j, c])
        with k.loop(self.r, "r") as r, k.loop(k.least(self.s, k.index(BLOCK)), "i") as i:
            for c in range(0, spec.d, line):
                k.prefetch(self.q, [b, g * self.r + r, i, c])

    def _limited(self, b: Expr, limit: Expr) -> Expr:
        """Return a limit of keys, or the smallest length of the row if it is less."""
        for n, lengths in enumerate(self.lengths):
            limit = self._index(self.k.least(limit, self.k.load(lengths, [b])), f"limit{n}")
        return limit

    def _task(self, b: Expr, g: Expr, chunk: Expr) -> None:
        """Emit a task: attention of some queries of all heads that share keys."""
        k = self.k
        self.at_b, self.at_g = b, g
        first = self.first = self._index(chunk * self.chunk, "first_query")
        count = self.count = self._index(k.greatest(k.least(self.chunk, self.s - first), k.index(0)), "queries_here")
        groups = self._index(self._ceil(count, GROUP), "groups")
        begin, end = self._seen(first, count)
        self._enter(begin, end)
        span, spans = self._spans(begin, end)
        self._begin(k.least(groups * GROUP, self.chunk))
        with k.loop(spans, "n") as n:
            self._span(begin, end, self._index(span + n, "span"), groups, n, spans)
        with k.when(k.equal(spans, k.index(1))):
            self._finish(count)

    def _spans(self, begin: Expr, end: Expr) -> tuple[Expr, Expr]:
        """Return the span that contains the first of these keys, and the number of spans up to the last; at least 1."""
        k = self.k
        first = self._index(k.floor_divide(begin, SPAN), "first_span")
        return first, self._index(k.greatest(self._ceil(end, SPAN) - first, k.index(1)), "spans")

    def _span(self, begin: Expr, end: Expr, span: Expr, groups: Expr, at: Expr, spans: Expr) -> None:
        """Emit attention of the task's queries to the keys from `begin` to below `end` that are in a span, block by
        block.

        at, spans   the number of the span within the task, and the number of the task's spans. If there are several,
                    each group of queries is merged after its last block, while its sums are in the CPU cache
        """
        k = self.k
        begin, end = self._within(begin, end, span)
        block = self._index(k.floor_divide(begin, BLOCK), "first_block")
        blocks = self._index(k.greatest(self._ceil(end, BLOCK) - block, k.index(0)), "blocks")
        with k.loop(blocks, "block") as n:
            self.base = self._index((block + n) * BLOCK, "base")
            c0, c1 = self._columns(begin, end)
            self._pack_keys(c0, c1)
            self._pack_values(c0, c1)
            merges = k.kept(k.both(n > blocks - 2, spans > k.index(1)), boolean, name="merges")
            with k.loop(self.r, "r") as r, k.loop(groups, "group") as group:
                self._group(r, group)
                with k.when(merges):
                    first = self._index(group * GROUP, "first")
                    count = k.least(self.count - first, k.index(GROUP))
                    self._merge(r, first, count, at, spans, again=True)

    def _within(self, begin: Expr, end: Expr, span: Expr) -> tuple[Expr, Expr]:
        """Return the intersection of the span with the positions from `begin` to below `end`."""
        k = self.k
        first = self._index(k.greatest(begin, span * SPAN), "span_begin")
        return first, self._index(k.least(end, (span + 1) * SPAN), "span_end")

    def _enter(self, begin: Expr, end: Expr) -> None:
        """Emit the preparation for the spans of a task, whose keys have positions from `begin` to below `end`."""

    def _seen(self, first: Expr, count: Expr) -> tuple[Expr, Expr]:
        """Return the range of key positions (begin and end) that at least one of these queries sees."""
        k, position = self.k, first + self.origin
        begin = self._index(k.greatest(position + self.low, self.oldest), "begin")
        end = self._index(k.least(self.limit, position + count + self.high), "end")
        return begin, end

    @property
    def oldest(self) -> Expr:
        """The position of the row's first key."""
        return self.k.index(0)

    def _keys_at(self, column: Expr) -> list[Expr]:
        """Return the indices of the keys in a vector of columns; after the last key, its index is repeated."""
        k = self.k
        left = self._index(self.t - 1 - (self.base + column), "left")
        return [self._index(self.base + column + k.least(k.index(x), left), "key") for x in range(self.lanes)]

    def _value_at(self, column: Expr) -> Expr:
        """Return the index of the value of a column."""
        return self.base + column

    def _columns(self, begin: Expr, end: Expr) -> tuple[Expr, Expr]:
        """Return the range of the block's columns that have keys from `begin` to below `end`."""
        k = self.k
        c0 = self._index(k.greatest(begin - self.base, k.index(0)), "from_column")
        c1 = self._index(k.least(end - self.base, k.index(BLOCK)), "to_column")
        return c0, c1

    # -- packing ---------------------------------------------------------------------------------------------

    @property
    def _block(self) -> int:
        """Number of words of values in a block: a word per key, or per pair of keys."""
        return BLOCK

    def _key_words(self, key: Expr, start: Expr, lanes: int = 1) -> Expr:
        """Return `lanes` words of a key, from word `start` on."""
        return self._widened(self.key, [self.key_row, self.at_g, key, start], lanes)

    def _pack_keys(self, c0: Expr, c1: Expr) -> None:
        """Emit the loop that packs the keys of the block's columns [c0, c1), in whole vectors."""
        k, lanes, d = self.k, self.lanes, self._depth
        begin = self._index(k.floor_divide(c0, lanes), "from_vector")
        with k.loop(self._ceil(c1, lanes) - begin, "n") as n:
            column = self._index((begin + n) * lanes, "column")
            keys = self._keys_at(column)
            panel = self._index(k.floor_divide(column, self.width), "panel")
            to = self._index(panel * (d * self.width) + (column - panel * self.width), "to")

            def square(start: Expr) -> None:
                read = [self._key_words(j, start, lanes) for j in keys]
                for x, vector in enumerate(k.transposed(read)):
                    k.store(self.packed_keys, [self.slot, to + (start + x) * self.width], vector, lanes)

            if d < lanes:
                with k.loop(d, "c") as c:
                    for x, j in enumerate(keys):
                        k.store(self.packed_keys, [self.slot, to + c * self.width + x], self._key_words(j, c))
                return
            with k.loop(d // lanes, "c") as c:
                square(self._index(c * lanes, "start"))
            if d % lanes:
                square(k.index(d - lanes))  # the last square may overlap the previous one

    def _pack_values(self, c0: Expr, c1: Expr) -> None:
        k, lanes = self.k, self.lanes
        whole, rest = divmod(self.spec.e, lanes)
        with k.loop(c1 - c0, "n") as n:
            column = self._index(c0 + n, "column")
            at = [self.key_row, self.at_g, self._value_at(column)]
            with k.loop(whole // PANEL, "panel") as panel, k.unroll(PANEL, "v") as v:
                vector = self._widened(self.value, [*at, panel * self.width + v * lanes], lanes)
                k.store(self.packed_values, [self.slot, self._packed(panel, PANEL, column, v)], vector, lanes)
            for v in range(whole // PANEL * PANEL, whole):
                self._pack_vector(column, v, self._widened(self.value, [*at, v * lanes], lanes))
            if rest:
                padded = k.registers(lanes, f32, "padded")
                k.store(padded, [0], k.number(0.0, f32, lanes), lanes)
                with k.unroll(rest, "c") as c:
                    k.store(padded, [c], self._widened(self.value, [*at, whole * lanes + c]))
                self._pack_vector(column, whole, k.load(padded, [0], lanes))

    def _pack_vector(self, column: Expr, v: int, vector: Expr) -> None:
        panel, inside = divmod(v, PANEL)
        at = self._packed(panel, min(PANEL, self.vectors - panel * PANEL), column, inside)
        self.k.store(self.packed_values, [self.slot, at], vector, self.lanes)

    def _packed(self, panel: Any, vectors: int, column: Expr, v: Any) -> Expr:
        """Return a vector of the value in this column, from a panel of `vectors` vectors."""
        return panel * (self._block * self.width) + column * (vectors * self.lanes) + v * self.lanes

    # -- a group of queries ----------------------------------------------------------------------------------

    def _group(self, r: Expr, group: Expr) -> None:
        """Emit attention of a group of queries of one head to the block."""
        k = self.k
        first = self._index(self.first + group * GROUP, "group_first")
        count = self._index(k.least(self.count - group * GROUP, k.index(GROUP)), "group_count")
        begin, end = self._seen(first, count)
        c0, c1 = self._columns(begin, end)
        with k.when(c0 < c1):
            p0 = self._index(k.floor_divide(c0, self.width), "from_panel")
            p1 = self._index(self._ceil(c1, self.width), "to_panel")
            # One or two remaining queries run one by one; more remaining queries form a tile padded with zeros.
            full = self._index(k.floor_divide(count, self.tile), "full")
            left = self._index(count - full * self.tile, "left")
            tiles = self._index(full + k.select(left > k.index(2), k.index(1), k.index(0)), "tiles")
            single = self._index(k.greatest(count - tiles * self.tile, k.index(0)), "single")
            self._scale(r, first, count, tiles * self.tile)
            with k.loop(p1 - p0, "n") as n:
                panel = self._index(p0 + n, "panel")
                with k.loop(tiles, "tile") as tile:
                    self._score(self._index(tile * self.tile, "tile_row"), self.tile, panel)
                with k.loop(single, "row") as row:
                    self._score(self._index(tiles * self.tile + row, "tile_row"), 1, panel)
            state = self._index(r * self.chunk + group * GROUP, "state")
            with k.loop(count, "row") as row:
                self._softmax(self._head(r), first + row, row, state + row, p0 * self.width, p1 * self.width)
            panels, rest = divmod(self.vectors, PANEL)

            def sums(panel: Any, vectors: int) -> None:
                with k.loop(tiles, "tile") as tile:
                    self._sum(self._index(tile * self.tile, "tile_row"), self.tile, state, panel, vectors, c0, c1)
                with k.loop(single, "row") as row:
                    self._sum(self._index(tiles * self.tile + row, "tile_row"), 1, state, panel, vectors, c0, c1)

            with k.loop(panels, "panel") as panel:
                sums(panel, PANEL)
            if rest:
                sums(panels, rest)

    def _scale(self, r: Expr, first: Expr, count: Expr, rows: Expr) -> None:
        """Emit storing of the group's queries times scale, padded with zeros to `rows` rows. Also prefetch rows of
        out.
        """
        k, lanes, d = self.k, self.lanes, self._depth
        head = self._head(r)
        step = lanes if d >= lanes else 1
        starts = [*range(0, d - step + 1, step), *([d - step] if d % step else [])]
        with k.loop(count, "row") as row:
            for c in range(0, self.spec.e, _LINE):
                k.prefetch(self.out, [self.at_b, head, first + row, c])
            for c in starts:
                x = self._query_words([self.at_b, head, first + row], c, step)
                k.store(self.queries, [self.slot, row, c], x, step)
        with k.loop(k.greatest(rows - count, k.index(0)), "row") as row:
            for c in starts:
                k.store(self.queries, [self.slot, count + row, c], k.number(0.0, f32, step), step)

    def _query_words(self, at: Sequence[Expr], start: int, lanes: int) -> Expr:
        """Return `lanes` words of a query times scale, from word `start` on."""
        return self._widened(self.q, [*at, start], lanes) * self.k.number(self.spec.scale, f32, lanes)

    def _added(self, sums: Expr, x: Expr, y: Expr) -> Expr:
        """Return sums + x y, word by word."""
        return sums + x * y

    def _scaled(self, scores: Expr) -> Expr:
        """Return a vector of scores times scale. Here, the queries are already scaled."""
        return scores

    def _score(self, first: Expr, rows: int, panel: Expr) -> None:
        """Compute a tile of scores of `rows` queries and a panel of keys. Accumulators stay in registers during the
        loop over d.
        """
        k, lanes, d = self.k, self.lanes, self._depth
        acc = k.registers(rows * self.width, f32)
        with k.unroll(rows * PANEL, "n") as n:
            k.store(acc, [n * lanes], k.number(0.0, f32, lanes), lanes)
        with k.loop(d, "c") as c, k.unroll(rows, "i") as i:
            x = k.splat(k.load(self.queries, [self.slot, first + i, c]), lanes)
            with k.unroll(PANEL, "j") as j:
                at = (i * PANEL + j) * lanes
                y = k.load(self.packed_keys, [self.slot, (panel * d + c) * self.width + j * lanes], lanes)
                k.store(acc, [at], self._added(k.load(acc, [at], lanes), x, y), lanes)
        with k.unroll(rows, "i") as i, k.unroll(PANEL, "j") as j:
            value = self._scaled(k.load(acc, [(i * PANEL + j) * lanes], lanes))
            k.store(self.scores, [self.slot, first + i, panel * self.width + j * lanes], value, lanes)

    def _sum(self, first: Expr, rows: int, state: Expr, panel: Any, vectors: int, c0: Expr, c1: Expr) -> None:
        """Compute sums = sums * factor + weights @ values, for a tile of queries and a panel of the values'
        elements.
        """
        k, lanes = self.k, self.lanes
        acc = k.registers(rows * vectors * lanes, f32)
        with k.unroll(rows, "i") as i:
            factor = k.splat(k.load(self.rows, [self.part, state + first + i, 2]), lanes)
            with k.unroll(vectors, "v") as v:
                held = k.load(self.sums, [self.part, state + first + i, panel * self.width + v * lanes], lanes)
                k.store(acc, [(i * vectors + v) * lanes], held * factor, lanes)
        begin, count = self._words_of(c0, c1)
        with k.loop(count, "n") as n, k.unroll(rows, "i") as i:
            x = k.splat(self._weight(first + i, begin + n), lanes)
            with k.unroll(vectors, "v") as v:
                at = (i * vectors + v) * lanes
                y = k.load(self.packed_values, [self.slot, self._packed(panel, vectors, begin + n, v)], lanes)
                k.store(acc, [at], self._added(k.load(acc, [at], lanes), x, y), lanes)
        with k.unroll(rows, "i") as i, k.unroll(vectors, "v") as v:
            made = k.load(acc, [(i * vectors + v) * lanes], lanes)
            k.store(self.sums, [self.part, state + first + i, panel * self.width + v * lanes], made, lanes)

    def _words_of(self, c0: Expr, c1: Expr) -> tuple[Expr, Expr]:
        """Return the first word of the weights and values of columns c0 to below c1, and the number of words."""
        return c0, c1 - c0

    def _weight(self, row: Expr, word: Expr) -> Expr:
        """Return a word of a query's softmax weights."""
        return self.k.load(self.scores, [self.slot, row, word])

    def _keep_weights(self, at: ScoreRow, column: Expr, weights: Sequence[Expr]) -> None:
        """Emit storing of a panel of a query's softmax weights."""
        for u, weight in enumerate(weights):
            self.k.store(self.scores, [at.slot, at.row, column + u * self.lanes], weight, self.lanes)

    def _softmax(self, head: Expr, i: Expr, row: Expr, state: Expr, c0: Expr, c1: Expr) -> None:
        """Turn the scores of a query in columns c0 to below c1 into softmax weights."""
        k = self.k
        i = self._index(i, "query")
        position = self._index(i + self.origin, "position")
        lo = self._index(self._first_seen(position) - self.base, "first_column")
        hi = self._index(k.least(self.limit, position + self.high + 1) - self.base, "past_column")
        inside = self._index(self.t - self.base, "inside")
        at = ScoreRow(self.slot, row, self.part, state, self.at_b, head, i, position, lo, hi, self.base, inside)
        self.softmax.write(at, c0, c1)

    def _first_seen(self, position: Expr) -> Expr:
        """Return the first position that a query sees; it may precede the row's first key."""
        return position + self.low

    def _head(self, r: Expr) -> Expr:
        """Return the index of a query head."""
        return self._index(self.at_g * self.r + r, "head")

    def _ceil(self, x: Expr, n: Any) -> Expr:
        return self.k.floor_divide(x + (n - 1), n)
