"use strict";
// The drawing of a graph: nested boxes, whose rows and centers come with the data. A `GraphView` draws one stage of a
// `GraphModel`; several views may show several models side by side.

const STEP = "\u001e"; // separates the boxes in the path of an item on the screen
const PORT = { width: 132, height: 22 };
const PAD = 14;
const HEAD = 28;

/** Return the starts of a row's entries, as near as possible to the requested positions without an overlap. */
const spread = (entries, gap) => {
  const groups = [];
  for (const entry of entries) {
    let start = entry.wanted - entry.w / 2;
    let number = 1;
    let wide = entry.w + gap;
    while (groups.length && groups[groups.length - 1][0] + groups[groups.length - 1][2] > start) {
      const [before, count, width] = groups.pop();
      start = (before * count + (start - width) * number) / (count + number);
      number += count;
      wide += width;
    }
    groups.push([start, number, wide]);
  }
  let at = 0;
  for (const [begin, number] of groups) {
    let start = begin;
    for (let each = 0; each < number; each++, at++) {
      entries[at].x = start;
      start += entries[at].w + gap;
    }
  }
};

class GraphView {
  constructor(host, options) {
    this.host = host;
    this.options = options;
    this.open = new Set();
    this.scale = 1;
    this.stage = 0;
    this.hold = false;
    this.heat = "flops";
    this.selected = { numbers: new Set(), value: null, key: null };
    this.group = T.svg("g", {});
    this.svg = T.svg("svg", { class: "drawing", "aria-hidden": "true" }, this.group);
    this.hint = T.el("p", { class: "hidden", id: `hint-${Math.random().toString(36).slice(2)}` },
      "Arrow keys move between ops, Enter opens or folds a box, Escape leaves it.");
    this.scroll = T.el("div", { class: "scroll", tabindex: "0", role: "application", "aria-label": "Graph of ops", "aria-describedby": this.hint.id }, this.svg);
    host.replaceChildren(this.scroll, this.hint);
    this.scroll.addEventListener("scroll", () => this.later());
    this.scroll.addEventListener("click", (event) => this.click(event));
    this.scroll.addEventListener("dblclick", (event) => this.click(event, true));
    this.scroll.addEventListener("keydown", (event) => this.key(event));
    this.scroll.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.metaKey) return;
      event.preventDefault();
      this.zoom(event.deltaY < 0 ? 1.12 : 1 / 1.12, event);
    }, { passive: false });
    new ResizeObserver(() => { this.shown = null; this.later(); }).observe(this.scroll);
  }

  /** Maximum number of items that "Open all" shows. */
  static MOST = 6000;
  /** Smallest scale at which the names of ops can be read. */
  static READABLE = 0.7;

  // -- state -----------------------------------------------------------------------------------------------------

  load(model) {
    this.model = model;
    const entries = model.entries(model.passes.length - 1);
    this.main = `${STEP}b:${entries.includes("step") ? "step" : entries.at(-1)}`;
    this.open = new Set([this.main]);
    this.selected = { numbers: new Set(), value: null, key: null };
  }

  show(stage, hold) {
    const anchor = this.anchor();
    this.stage = stage;
    this.hold = hold;
    this.info = this.model.at(stage);
    this.before = stage ? this.model.at(stage - 1) : null;
    this.arrange();
    this.restore(anchor);
    this.draw();
  }

  refresh(anchorKey) {
    const anchor = this.anchor(anchorKey);
    this.arrange();
    this.restore(anchor);
    this.draw();
  }

  /** Return an item on the screen, with its place there, so that it can stay where it is. */
  anchor(key) {
    if (!this.flat) return null;
    const view = this.view();
    const inside = (e) => e.ax + e.w > view.x && e.ax < view.x + view.w && e.ay + e.h > view.y && e.ay < view.y + view.h;
    const entry = (key && this.byKey.get(key)) || (this.byKey.get(this.selected.key) && inside(this.byKey.get(this.selected.key)) && this.byKey.get(this.selected.key)) || this.flat.find((e) => !e.child && e.ay >= view.y && inside(e));
    return entry ? { key: entry.key, x: entry.ax - view.x, y: entry.ay - view.y } : null;
  }

  restore(anchor) {
    const entry = anchor && this.byKey.get(anchor.key);
    if (!entry) return;
    this.scroll.scrollLeft = (entry.ax - anchor.x) * this.scale;
    this.scroll.scrollTop = (entry.ay - anchor.y) * this.scale;
  }

  view() {
    const s = this.scale;
    return { x: this.scroll.scrollLeft / s, y: this.scroll.scrollTop / s, w: this.scroll.clientWidth / s, h: this.scroll.clientHeight / s };
  }

  // -- arrangement -----------------------------------------------------------------------------------------------

  arrange() {
    const entries = this.model.entries(this.stage);
    this.single = entries.length === 1 ? entries[0] : null;
    this.root = this.single ? this.box(this.single, `${STEP}b:${this.single}`) : this.box("", "");
    this.flat = [];
    this.byKey = new Map();
    const margin = 24;
    const place = (box, x, y, parent) => {
      for (const entry of box.entries) {
        entry.ax = x + entry.x;
        entry.ay = y + entry.y;
        entry.parent = parent;
        if (entry.kind === "via") continue;
        this.flat.push(entry);
        this.byKey.set(entry.key, entry);
        if (entry.child) place(entry.child, entry.ax + PAD, entry.ay + HEAD, entry);
      }
      box.ax = x;
      box.ay = y;
    };
    place(this.root, margin, margin, null);
    this.width = this.root.w + 2 * margin;
    this.height = this.root.h + 2 * margin;
    this.resize();
  }

  resize() {
    const { width, height, scale } = this;
    const left = Math.max(0, (this.scroll.clientWidth / scale - width) / 2);
    this.left = left;
    this.svg.setAttribute("width", Math.ceil((width + left) * scale));
    this.svg.setAttribute("height", Math.ceil(height * scale));
    this.group.setAttribute("transform", `scale(${scale}) translate(${left} 0)`);
  }

  /** Return the only op of a box, which is drawn in its place, or null. */
  only(path, info) {
    let body = info.boxes.get(path);
    for (let depth = 0; body && depth < 20; depth++) {
      const inner = body.items.filter((item) => item.kind !== "in" && item.kind !== "out");
      if (inner.length !== 1) return null;
      if (inner[0].kind !== "box") return inner[0].kind === "op" ? inner[0] : null;
      body = info.boxes.get(inner[0].path);
    }
    return null;
  }

  entry(item, key, ghost, info) {
    const { width, height } = this.model.metrics;
    const entry = { item, ghost, kind: item.kind, key: `${key}${STEP}${item.key}`, w: width, h: height, op: null, child: null };
    if (item.kind === "in" || item.kind === "out") return Object.assign(entry, { w: PORT.width, h: PORT.height });
    if (item.kind === "op") entry.op = item;
    if (item.kind === "box") {
      const only = this.only(item.path, info);
      if (only) return Object.assign(entry, { op: only, kind: "op" });
    }
    if ((item.kind === "box" || item.kind === "call") && !ghost && this.open.has(entry.key) && info.boxes.has(item.path)) {
      entry.child = this.box(item.path, entry.key);
      entry.w = Math.max(width, entry.child.w + 2 * PAD);
      entry.h = entry.child.h + HEAD + PAD;
    }
    return entry;
  }

  box(path, key) {
    const { down, across, height } = this.model.metrics;
    const body = this.info.boxes.get(path);
    const entries = [];
    const byItem = new Map();
    for (const item of body.items) {
      const entry = this.entry(item, key, false, this.info);
      entry.value = item.value === undefined ? null : GraphModel.qualified(path.split(SEP)[0], item.value);
      byItem.set(item.key, entry);
      entries.push(entry);
    }
    const old = this.hold && this.before ? this.before.boxes.get(path) : null;
    if (old && old !== body) {
      for (const item of old.items) {
        if (!body.byKey.has(item.key) && item.kind !== "in" && item.kind !== "out") {
          entries.push(this.entry(item, key, true, this.before));
        }
      }
    }
    const rows = new Map();
    const put = (row, entry, wanted) => {
      entry.wanted = wanted;
      entry.row = row;
      if (!rows.has(row)) rows.set(row, []);
      rows.get(row).push(entry);
    };
    for (const entry of entries) {
      if (this.hold) put(entry.item.heldRow, entry, entry.item.heldX);
      else put(entry.item.row, entry, entry.item.x);
    }
    const edges = [];
    const home = path.split(SEP)[0];
    for (const edge of body.edges) {
      const drawn = { home, from: byItem.get(edge.from.key), to: byItem.get(edge.to.key), value: GraphModel.qualified(home, edge.value), several: edge.several && new Set(edge.several.map((each) => GraphModel.qualified(home, each))), vias: [] };
      const bends = this.hold ? edge.heldBends : edge.bends;
      if (bends) {
        bends.forEach((x, at) => {
          const via = { kind: "via", w: 10, h: 0, item: null };
          put((this.hold ? edge.from.heldRow : edge.from.row) + 1 + at, via, x);
          entries.push(via);
          drawn.vias.push(via);
        });
      }
      edges.push(drawn);
    }
    if (this.hold) this.keepSlots(path, rows, put);
    let top = 0;
    let least = Infinity;
    const last = Math.max(...rows.keys());
    for (let row = 0; row <= last; row++) {
      const held = (rows.get(row) || []).sort((a, b) => a.wanted - b.wanted);
      const high = held.length ? Math.max(...held.map((e) => e.h)) : 0;
      const tall = high;
      spread(held, across);
      for (const entry of held) {
        entry.y = top + (entry.child || tall > 2 * height ? 0 : (tall - entry.h) / 2);
        entry.rowTop = top;
        entry.rowEnd = top + tall;
        least = Math.min(least, entry.x);
      }
      if (tall) top += tall + down;
    }
    let right = 0;
    for (const held of rows.values()) {
      for (const entry of held) {
        entry.x -= least;
        right = Math.max(right, entry.x + entry.w);
      }
    }
    return { path, key, entries, edges, w: right, h: Math.max(top - down, 0) };
  }

  /** Put empty slots where a box has items and bends at other stages, so that nothing else moves. */
  keepSlots(path, rows, put) {
    const { width, height } = this.model.metrics;
    const slots = this.model.slots[path] || [];
    const taken = new Map();
    const mark = (row, x) => `${row} ${x}`;
    for (const [row, held] of rows) for (const entry of held) taken.set(mark(row, entry.wanted), (taken.get(mark(row, entry.wanted)) || 0) + 1);
    for (let at = 0; at < slots.length; at += 3) {
      const [kind, row, x] = [slots[at], slots[at + 1], slots[at + 2]];
      const left = taken.get(mark(row, x)) || 0;
      if (left) taken.set(mark(row, x), left - 1);
      else put(row, { kind: "via", item: null, w: kind === 2 ? 10 : kind ? PORT.width : width, h: kind === 2 ? 0 : kind ? PORT.height : height }, x);
    }
  }

  // -- drawing ---------------------------------------------------------------------------------------------------

  later() {
    if (this.waiting) return;
    this.waiting = requestAnimationFrame(() => {
      this.waiting = 0;
      if (this.root) this.draw(true);
    });
  }

  draw(lazily) {
    const view = this.view();
    const seen = this.shown;
    if (lazily && seen && view.x >= seen.x && view.y >= seen.y && view.x + view.w <= seen.x + seen.w && view.y + view.h <= seen.y + seen.h) return;
    this.resize();
    const margin = 300 / this.scale;
    this.shown = { x: view.x - margin, y: view.y - margin, w: view.w + 2 * margin, h: view.h + 2 * margin };
    this.paint(this.shown);
  }

  /** Draw the whole graph, also what is outside the window. */
  drawAll() {
    this.paint({ x: -Infinity, y: -Infinity, w: Infinity, h: Infinity });
    this.shown = null;
  }

  paint(area) {
    const left = this.left || 0;
    const x0 = area.x - left;
    const [x1, y0, y1] = [area.x + area.w - left, area.y, area.y + area.h];
    const infinite = area.w === Infinity;
    const hits = (x, y, w, h) => infinite || (x + w >= x0 && x <= x1 && y + h >= y0 && y <= y1);
    const edges = [];
    const labels = [];
    const nodes = [];
    this.drawn = [];
    this.lines = [];
    const visit = (box) => {
      this.edges(box, hits, edges, labels);
      for (const entry of box.entries) {
        if (entry.kind === "via" || !hits(entry.ax, entry.ay, entry.w, entry.h)) continue;
        nodes.push(this.element(entry));
        if (entry.child) {
          nodes.push(...this.nested(entry, visit));
        }
      }
    };
    this.layers = { edges, labels, nodes };
    visit(this.root);
    this.group.replaceChildren(...edges, ...labels, ...nodes);
  }

  /** The contents of an opened box: edges above its background. */
  nested(entry, visit) {
    const outer = this.layers;
    const layer = { edges: [], labels: [], nodes: [] };
    const before = [outer.edges.length, outer.labels.length, outer.nodes.length];
    visit(entry.child);
    // The inner visit appended its elements to the shared lists: take them out again.
    layer.edges = outer.edges.splice(before[0]);
    layer.labels = outer.labels.splice(before[1]);
    layer.nodes = outer.nodes.splice(before[2]);
    return [...layer.edges, ...layer.labels, ...layer.nodes];
  }

  edges(box, hits, edges, labels) {
    const labelled = new Set();
    const incoming = new Map();
    for (const edge of box.edges) {
      if (!edge.from || !edge.to) continue;
      if (!incoming.has(edge.to)) incoming.set(edge.to, []);
      incoming.get(edge.to).push(edge);
    }
    for (const list of incoming.values()) list.sort((a, b) => (a.vias.at(-1) || a.from).ax - (b.vias.at(-1) || b.from).ax);
    for (const edge of box.edges) {
      const { from, to } = edge;
      if (!from || !to) continue;
      const list = incoming.get(to);
      const room = Math.min(16, (to.w - 30) / Math.max(list.length, 1));
      const tx = to.ax + to.w / 2 + (list.indexOf(edge) - (list.length - 1) / 2) * room;
      const points = [[from.ax + from.w / 2, from.ay + from.h]];
      for (const via of edge.vias) points.push([via.ax + via.w / 2, box.ay + via.rowTop - 4], [via.ax + via.w / 2, box.ay + via.rowEnd + 4]);
      points.push([tx, to.ay]);
      const xs = points.map((p) => p[0]);
      const ys = points.map((p) => p[1]);
      const [lx, ly] = [Math.min(...xs), Math.min(...ys)];
      if (!hits(lx, ly, Math.max(...xs) - lx, Math.max(...ys) - ly)) continue;
      const state = this.edgeState(edge);
      const d = GraphView.curve(points);
      edges.push(T.svg("path", { class: `edge ${edge.several ? "several " : ""}${state}`, d }), T.svg("path", { class: "edge-hit", d, "data-value": this.lines.push(edge) - 1 }));
      const mark = from.key;
      if (!labelled.has(mark) && this.scale > 0.6 && from.kind !== "in") {
        labelled.add(mark);
        const type = edge.several ? (from.item.values || to.item.values ? "" : `${edge.several.size} values`) : this.typeOf(edge);
        if (type) labels.push(T.svg("text", { class: `edge-label ${state}`, x: from.ax + from.w / 2 + 7, y: from.ay + from.h + 13 }, T.fit(type, 24)));
      }
    }
  }

  static curve(points) {
    let d = `M${points[0][0].toFixed(1)} ${points[0][1].toFixed(1)}`;
    for (let at = 1; at < points.length; at++) {
      const [x0, y0] = points[at - 1];
      const [x1, y1] = points[at];
      if (Math.abs(x0 - x1) < 0.5 && y1 >= y0) d += `L${x1.toFixed(1)} ${y1.toFixed(1)}`;
      else {
        const bend = Math.max(Math.abs(y1 - y0) / 2, y1 < y0 ? 60 : 12);
        d += `C${x0.toFixed(1)} ${(y0 + bend).toFixed(1)} ${x1.toFixed(1)} ${(y1 - bend).toFixed(1)} ${x1.toFixed(1)} ${y1.toFixed(1)}`;
      }
    }
    return d;
  }

  typeOf(edge) {
    if (edge.to.item.type && edge.to.value === edge.value) return edge.to.item.type;
    const [number, index] = edge.value.split(".");
    const node = this.model.light(Number(number), this.stage);
    return node && index === "0" ? node.type : "";
  }

  edgeState(edge) {
    if (this.selected.value === edge.value || (edge.several && edge.several.has(this.selected.value))) return "value";
    const ends = [edge.from, edge.to].some((entry) => entry.key === this.selected.key);
    return ends ? "near" : "";
  }

  isMarked(entry) {
    const numbers = this.selected.numbers;
    if (!numbers.size) return false;
    if (entry.op) return numbers.has(entry.op.number);
    if (entry.item.numbers) return entry.item.numbers.some((n) => numbers.has(n)) || this.holds(entry.item.path, entry.ghost);
    return entry.kind === "box" && this.holds(entry.item.path, entry.ghost);
  }

  holds(path, ghost) {
    const where = (ghost ? this.before : this.info).where;
    for (const number of this.selected.numbers) {
      const home = where.get(number);
      if (home !== undefined && (home === path || home.startsWith(path + SEP))) return true;
    }
    return false;
  }

  element(entry) {
    const at = this.drawn.push(entry) - 1;
    const { item } = entry;
    const classes = ["item", entry.kind];
    const parts = [];
    const [x, y, w, h] = [entry.ax, entry.ay, entry.w, entry.h].map((n) => Math.round(n * 10) / 10);
    if (entry.kind === "in" || entry.kind === "out") {
      parts.push(T.svg("rect", { class: "shape", width: w, height: h, rx: h / 2 }));
      parts.push(T.svg("text", { class: "port-name", x: w / 2, y: h / 2 + 4, "text-anchor": "middle" }, T.fit(`${entry.kind === "in" ? "↓ " : ""}${item.label}${entry.kind === "out" ? " ↓" : ""}`, 20)));
      if (this.selected.value === entry.value) classes.push("value");
    } else if (entry.op) {
      const info = entry.ghost ? this.before : this.info;
      const node = this.model.light(entry.op.number, info.stage);
      if (entry.ghost) classes.push("removed");
      else if (this.info.added.has(entry.op.number)) classes.push("added");
      parts.push(T.svg("rect", { class: "shape", width: w, height: h, rx: 6 }));
      if (this.scale > 0.3) {
        const name = entry.ghost ? "removed" : node.name && node.name !== node.op ? node.name : GraphView.tail(node.scope);
        parts.push(T.svg("text", { class: "op-name", x: 11, y: 18 }, T.fit(node.op, 22)));
        parts.push(T.svg("text", { class: "op-sub", x: 11, y: 33 }, T.fit(name || "", 20)));
      }
      parts.push(...this.bar(entry));
    } else {
      const marks = this.info.marks.get(item.path);
      const fresh = item.kind === "call" ? item.numbers.every((n) => this.info.added.has(n)) : marks && marks.added === this.info.counts.get(item.path);
      if (entry.ghost) classes.push("removed");
      else if (fresh && (item.kind === "call" || !entry.child)) classes.push("added");
      const label = item.kind === "call" ? item.path : GraphView.last(item.path);
      const times = item.kind === "call" && item.numbers.length > 1 ? ` ×${item.numbers.length}` : "";
      if (entry.child) classes.push("open");
      parts.push(T.svg("rect", { class: "shape", width: w, height: h, rx: 9 }));
      parts.push(T.svg("path", { class: "fold", d: entry.child ? "M11 11l4 5 4-5" : "M12 9l5 4-5 4" }));
      parts.push(T.svg("text", { class: "box-name", x: 25, y: 19 }, T.fit(label, times ? 15 : 18), times ? T.svg("tspan", { class: "times" }, times) : null));
      if (!entry.child && this.scale > 0.3) {
        const count = this.info.counts.get(item.path) || 0;
        parts.push(T.svg("text", { class: "op-sub", x: 25, y: 34 }, T.plural(count, "op")));
      }
      if (!entry.child) parts.push(...this.bar(entry));
      if (marks) {
        const text = [marks.added ? `+${marks.added}` : "", marks.removed ? `−${marks.removed}` : ""];
        let right = w - 10;
        for (const [part, kind] of [[text[1], "minus"], [text[0], "plus"]]) {
          if (!part) continue;
          parts.push(T.svg("text", { class: `mark ${kind}`, x: right, y: 19, "text-anchor": "end" }, part));
          right -= 8 * part.length + 4;
        }
      }
    }
    if (entry.key === this.selected.key) classes.push("selected");
    if (!entry.child && this.isMarked(entry)) classes.push("marked");
    if (entry.op && !entry.ghost && entry.op.number === this.selected.stop) classes.push("stopped");
    return T.svg("g", { class: classes.join(" "), transform: `translate(${x} ${y})`, "data-at": at }, parts);
  }

  /** The share of an op or a folded box in the cost of a run, as a bar and in percent. */
  bar(entry) {
    if (entry.ghost || !this.heat || (this.heat === "seconds" && !this.times)) return [];
    const { items, boxes, total } = this.model.costs(this.stage, this.heat, this.times);
    const cost = entry.op ? items.get(entry.op.number) : entry.kind === "call" ? items.get(entry.item.number) : boxes.get(entry.item.path);
    if (!cost || !total) return [];
    const share = Math.min(1, cost / total);
    const bar = T.svg("rect", { class: "bar", x: 1.5, y: entry.h - 4, width: Math.max(2, (entry.w - 3) * share), height: 2.5, rx: 1 });
    return this.scale > 0.3 && share >= 0.005 ? [bar, T.svg("text", { class: "op-sub", x: entry.w - 9, y: entry.op ? 33 : 34, "text-anchor": "end" }, T.share(share, 1))] : [bar];
  }

  static last(path) {
    return path.slice(path.lastIndexOf(SEP) + 1);
  }

  static tail(scope) {
    return scope.split(".").slice(-2).join(".");
  }

  // -- interaction -----------------------------------------------------------------------------------------------

  click(event, twice) {
    const at = event.target.closest("[data-at]");
    const value = event.target.closest("[data-value]");
    this.scroll.focus({ preventScroll: true });
    if (at) {
      const entry = this.drawn[Number(at.dataset.at)];
      const folds = !entry.op && (entry.kind === "box" || entry.kind === "call") && !entry.ghost;
      if (folds && !twice) this.toggle(entry);
      if (!twice) this.choose(entry);
    } else if (value && !twice) {
      const edge = this.lines[Number(value.dataset.value)];
      const port = [edge.from, edge.to].find((each) => each.item.values);
      if (port) this.choose(port);
      else if (edge.several) this.options.onvalues([...edge.several]);
      else this.options.onvalue(edge.value);
    }
  }

  choose(entry) {
    this.selected.key = entry.key;
    if (entry.item.values) this.options.onbox(entry.item, entry.key);
    else if (entry.kind === "in" || entry.kind === "out") this.options.onvalue(entry.value, entry.key);
    else if (entry.op) this.options.onnode(entry.op.number, entry.key, entry.ghost);
    else this.options.onbox(entry.item, entry.key);
  }

  toggle(entry) {
    if (this.open.has(entry.key)) this.open.delete(entry.key);
    else this.open.add(entry.key);
    this.refresh(entry.key);
    this.options.onopen();
  }

  /** Mark ops and a value. `stop` is the op at which a match stopped. */
  select({ numbers = [], value = null, key = null, stop = null }) {
    this.selected = { numbers: new Set(numbers), value, key, stop };
    this.draw();
  }

  /** Return the key of the box at a path on the screen, and the keys of all enclosing boxes. */
  chain(path) {
    const home = path.split(SEP)[0];
    const keys = [];
    let key = `${STEP}b:${home}`;
    if (home !== this.single) {
      const caller = this.info.callers.get(home);
      if (caller) {
        const outer = this.chain(caller.path);
        keys.push(...outer);
        key = `${outer.at(-1) ?? `${STEP}b:${this.single}`}${STEP}${caller.item.key}`;
      }
      keys.push(key);
    }
    for (const prefix of GraphModel.prefixes(path).slice(1)) {
      key += `${STEP}b:${prefix}`;
      keys.push(key);
    }
    return keys;
  }

  /** Open the boxes that contain an op, and return the op's key. */
  reveal(number) {
    const path = this.info.where.get(number);
    if (path === undefined) return null;
    const keys = this.chain(path);
    for (const key of keys) this.open.add(key);
    this.arrange();
    const body = this.info.boxes.get(path);
    const item = body.items.find((each) => each.number === number || (each.numbers && each.numbers.includes(number)));
    let key = `${keys.at(-1) ?? `${STEP}b:${this.single}`}${STEP}${item.key}`;
    for (let at = keys.length - 1; at >= 0 && !this.byKey.has(key); at--) key = keys[at];
    return key;
  }

  revealBox(path) {
    const keys = this.chain(path);
    for (const key of keys.slice(0, -1)) this.open.add(key);
    this.arrange();
    return keys.at(-1) ?? null;
  }

  /**
   * Scroll to an item. With `readable`, also enlarge the graph until its text can be read; with `others`, show these
   * items as well if they fit.
   */
  center(key, { readable = false, others = [] } = {}) {
    const entry = this.byKey.get(key);
    if (!entry) return;
    const host = [this.scroll.clientWidth, this.scroll.clientHeight];
    let box = { x: entry.ax, y: entry.ay, w: entry.w, h: entry.h };
    let scale = this.scale;
    if (readable) {
      const all = [entry, ...others.map((each) => this.byKey.get(each)).filter(Boolean)];
      const [x, y] = [Math.min(...all.map((e) => e.ax)), Math.min(...all.map((e) => e.ay))];
      const whole = { x, y, w: Math.max(...all.map((e) => e.ax + e.w)) - x, h: Math.max(...all.map((e) => e.ay + e.h)) - y };
      const fits = (each) => Math.min((host[0] - 40) / each.w, (host[1] - 40) / each.h);
      if (fits(whole) >= GraphView.READABLE) box = whole;
      scale = Math.max(GraphView.READABLE, Math.min(scale < GraphView.READABLE ? 0.9 : scale, fits(box)));
    }
    const zoomed = Math.abs(scale - this.scale) > 1e-6;
    if (zoomed) {
      this.scale = scale;
      this.resize();
    }
    const view = this.view();
    const x = box.x + (this.left || 0);
    const [w, h] = [Math.min(box.w, view.w), Math.min(box.h, view.h)];
    if (zoomed || x < view.x || x + w > view.x + view.w || box.y < view.y || box.y + (readable ? h : Math.min(box.h, 80)) > view.y + view.h) {
      this.scroll.scrollLeft = (x + w / 2 - view.w / 2) * this.scale;
      this.scroll.scrollTop = (box.y + h / 2 - view.h / 2) * this.scale;
    }
    this.draw();
  }

  all(open) {
    if (!open) this.open = new Set([this.main]);
    else {
      let before = -1;
      for (let depth = 0; depth < 12 && before !== this.open.size; depth++) {
        before = this.open.size;
        let left = GraphView.MOST - this.flat.length;
        for (const entry of this.flat) {
          if (entry.op || entry.ghost || entry.child || (entry.kind !== "box" && entry.kind !== "call")) continue;
          left -= this.info.boxes.get(entry.item.path).items.length;
          if (left < 0) break;
          this.open.add(entry.key);
        }
        this.arrange();
      }
    }
    this.refresh();
  }

  zoom(by, event) {
    const box = this.scroll.getBoundingClientRect();
    const [px, py] = event ? [event.clientX - box.left, event.clientY - box.top] : [box.width / 2, box.height / 2];
    const x = (this.scroll.scrollLeft + px) / this.scale;
    const y = (this.scroll.scrollTop + py) / this.scale;
    this.scale = Math.min(2.5, Math.max(0.02, this.scale * by));
    this.resize();
    this.scroll.scrollLeft = x * this.scale - px;
    this.scroll.scrollTop = y * this.scale - py;
    this.draw();
  }

  fit(whole) {
    const wide = this.scroll.clientWidth / this.width;
    const high = this.scroll.clientHeight / this.height;
    this.scale = Math.min(1, Math.max(whole ? 0.02 : GraphView.READABLE, whole ? Math.min(wide, high) : wide));
    this.resize();
    const main = this.byKey.get(this.main);
    const middle = main && !whole ? main.ax + main.w / 2 : this.width / 2;
    this.scroll.scrollLeft = (this.left + middle) * this.scale - this.scroll.clientWidth / 2;
    this.scroll.scrollTop = 0;
    this.draw();
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const move = { ArrowDown: "down", ArrowUp: "up", ArrowLeft: "left", ArrowRight: "right" }[event.key];
    const current = this.byKey.get(this.selected.key);
    if (move) {
      event.preventDefault();
      const next = current ? this.neighbor(current, move) : this.flat[0];
      if (next) {
        this.choose(next);
        this.center(next.key);
      }
    } else if ((event.key === "Enter" || event.key === " ") && current) {
      event.preventDefault();
      if (!current.op && (current.kind === "box" || current.kind === "call") && !current.ghost) {
        const opens = !this.open.has(current.key);
        this.toggle(current);
        const opened = this.byKey.get(current.key);
        if (opens && opened.child) this.choose(opened.child.entries.find((e) => e.kind !== "via"));
        else this.choose(opened);
        this.center(this.selected.key);
      } else this.options.onfacts();
    } else if (event.key === "Escape" && current && current.parent) {
      event.preventDefault();
      this.choose(current.parent);
      this.center(current.parent.key);
    }
  }

  neighbor(current, move) {
    const box = current.parent ? current.parent.child : this.root;
    const others = box.entries.filter((entry) => entry.kind !== "via" && entry !== current);
    const x = (entry) => entry.ax + entry.w / 2;
    const near = (list) => list.sort((a, b) => Math.abs(a.row - current.row) - Math.abs(b.row - current.row) || Math.abs(x(a) - x(current)) - Math.abs(x(b) - x(current)))[0];
    if (move === "left") return near(others.filter((e) => e.row === current.row && e.ax < current.ax));
    if (move === "right") return near(others.filter((e) => e.row === current.row && e.ax > current.ax));
    const forth = move === "down";
    const linked = box.edges.filter((e) => (forth ? e.from : e.to) === current).map((e) => (forth ? e.to : e.from)).filter((e) => e && (forth ? e.row > current.row : e.row < current.row));
    return near(linked) || near(others.filter((e) => (forth ? e.row > current.row : e.row < current.row))) || current.parent;
  }
}
