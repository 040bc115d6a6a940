"use strict";
// Text and elements. Data becomes part of the page only as text nodes and attributes that are made here.

const T = {};

// Characters that a browser hides, or that change the order of others: controls, bidirectional marks, lone surrogates.
T.HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff\u{e0000}-\u{e007f}]/gu;

/** Return text with hidden characters written out, truncated to a length. */
T.shown = (text, most = 4000) => {
  const all = String(text);
  const cut = all.length > most ? `${all.slice(0, most)}… (${all.length.toLocaleString("en")} characters)` : all;
  return cut.replace(T.HIDDEN, (c) => `\\u{${c.codePointAt(0).toString(16)}}`);
};

T.fill = (element, attributes, children) => {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value" || name === "checked" || name === "disabled" || name === "hidden") element[name] = value;
    else element.setAttribute(name, value === true ? "" : name === "d" ? value : T.shown(value));
  }
  for (const child of children.flat()) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child instanceof Node ? child : document.createTextNode(T.shown(child)));
  }
  return element;
};
T.el = (tag, attributes, ...children) => T.fill(document.createElement(tag), attributes, children);
T.svg = (tag, attributes, ...children) =>
  T.fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
T.id = (name) => document.getElementById(name);

/** Return text that fits into a number of characters. */
T.fit = (text, most) => {
  const all = T.shown(text);
  return all.length <= most ? all : `${all.slice(0, Math.max(most - 1, 1))}…`;
};

/** Return a count in three digits: 1.36 G. */
T.human = (count, unit = "") => {
  if (typeof count !== "number") return T.shown(count);
  for (const [scale, prefix] of [[1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (Math.abs(count) >= scale * 0.9995) return `${Number((count / scale).toPrecision(3))} ${prefix}${unit}`;
  }
  return `${Number(count.toPrecision(3))} ${unit}`.trim();
};
T.count = (count) => (typeof count === "number" ? count.toLocaleString("en") : T.shown(count ?? ""));
T.share = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(part / whole < 0.0995 ? 1 : 0)}%` : "");
T.seconds = (s) => (s >= 1 ? `${s.toPrecision(3)} s` : s >= 1e-3 ? `${(s * 1e3).toPrecision(3)} ms` : `${(s * 1e6).toPrecision(3)} µs`);
T.plural = (count, word) => `${T.count(count)} ${word}${count === 1 ? "" : "s"}`;

/** A definition list of pairs; empty values are left out. */
T.pairs = (pairs) => {
  const list = T.el("dl", { class: "pairs" });
  for (const [name, value] of pairs) {
    if (value === null || value === undefined || value === "") continue;
    list.append(T.el("dt", {}, name), T.el("dd", {}, value));
  }
  return list;
};

const FIRST_ROWS = 200;

/** A table. Columns: {name, of: row => text or element, sort: row => key, number: true}. `onrow` makes rows buttons. */
T.table = (columns, rows, { onrow, caption, marked, most = FIRST_ROWS } = {}) => {
  let order = rows.slice();
  let limit = most;
  let by = -1;
  let down = false;
  const body = T.el("tbody");
  const more = T.el("button", { type: "button", class: "more", onclick: () => { limit = Infinity; draw(); } });
  const heads = columns.map((column, at) => {
    const label = column.sort
      ? T.el("button", { type: "button", onclick: () => sort(at) }, column.name)
      : column.name;
    return T.el("th", { scope: "col", class: column.number ? "number" : null, title: column.about }, label);
  });
  const sort = (at) => {
    down = by === at ? !down : Boolean(columns[at].number);
    by = at;
    const key = columns[at].sort;
    order = rows.slice().sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      return (x < y ? -1 : x > y ? 1 : 0) * (down ? -1 : 1);
    });
    heads.forEach((head, place) => head.setAttribute("aria-sort", place !== at ? "none" : down ? "descending" : "ascending"));
    draw();
  };
  const draw = () => {
    body.replaceChildren(
      ...order.slice(0, limit).map((row) => {
        const cells = columns.map((column, at) => {
          const cell = column.of(row);
          const act = onrow && at === (columns.findIndex((c) => c.act) + 1 || 1) - 1 && onrow(row);
          return T.el("td", { "data-name": column.name, class: [column.number ? "number" : "", column.wide ? "wide" : "", column.code ? "code" : "", column.act ? "act" : ""].join(" ").trim() || null },
            act ? T.el("button", { type: "button", class: "link", onclick: act }, cell) : cell,
            column.below && column.below(row) ? T.el("div", { class: "below" }, column.below(row)) : null);
        });
        return T.el("tr", { class: marked && marked(row) ? "marked" : null }, cells);
      }),
    );
    more.hidden = order.length <= limit;
    more.textContent = `Show all ${T.count(order.length)} rows`;
  };
  draw();
  return T.el("div", { class: "table", tabindex: "0", role: "region", "aria-label": caption || "Table" },
    T.el("table", { class: columns.length > 3 ? "many" : null }, caption ? T.el("caption", {}, caption) : null, T.el("thead", {}, T.el("tr", {}, heads)), body), more);
};

/** Lines of which only the visible ones are in the page. `line(at)` returns an element. */
T.lines = (count, line, { height = 18, label = "Text", chars = 100 } = {}) => {
  const inside = T.el("div", { class: "lines-inside" });
  const host = T.el("div", { class: "lines", tabindex: "0", role: "region", "aria-label": label }, inside);
  inside.style.height = `${count * height}px`;
  inside.style.minWidth = `${Math.min(chars, 400)}ch`;
  let drawn = [0, 0];
  const draw = (force) => {
    const first = Math.max(0, Math.floor(host.scrollTop / height) - 40);
    const last = Math.min(count, Math.ceil((host.scrollTop + (host.clientHeight || 800)) / height) + 40);
    if (!force && first >= drawn[0] && last <= drawn[1] && drawn[1] - drawn[0] < 400) return;
    drawn = [Math.max(0, first - 60), Math.min(count, last + 60)];
    inside.replaceChildren();
    for (let at = drawn[0]; at < drawn[1]; at++) {
      const element = line(at);
      element.style.top = `${at * height}px`;
      inside.append(element);
    }
  };
  host.addEventListener("scroll", () => requestAnimationFrame(() => draw(false)));
  host.all = () => { drawn = [0, count]; inside.replaceChildren(...Array.from({ length: count }, (_, at) => { const e = line(at); e.style.top = `${at * height}px`; return e; })); };
  host.to = (at) => { host.scrollTop = Math.max(0, at * height - host.clientHeight / 3); draw(true); };
  requestAnimationFrame(() => draw(true));
  draw(true);
  return host;
};
