"use strict";
// Drawings of the tabs: the arena over time, a timetable, a mesh, an attention mask, a roofline.

const Charts = {};

// Colors by rank, the same in both themes. The page shows names next to them.
Charts.COLORS = 10;

/** Return a Map from names to ranks by decreasing weight, 0, 1, ...; from COLORS on, names share one rank. */
Charts.ranks = (weights) => {
  const order = [...weights].sort((a, b) => b[1] - a[1] || (a[0] < b[0] ? -1 : 1));
  return new Map(order.map(([name], at) => [name, Math.min(at, Charts.COLORS)]));
};

Charts.legend = (ranks, most = Charts.COLORS) =>
  T.el("ul", { class: "legend" },
    [...ranks].filter(([, rank]) => rank < most).map(([name, rank]) => T.el("li", {}, T.el("span", { class: `swatch c${rank}` }), name)),
    ranks.size > most ? T.el("li", {}, T.el("span", { class: `swatch c${Charts.COLORS}` }), "others") : null);

Charts.axis = (parts, most, y, left, right, unit) => {
  const lines = [];
  for (let part = 0; part <= parts; part++) {
    const value = (most * part) / parts;
    lines.push(T.svg("line", { class: "rule", x1: left, x2: right, y1: y(value), y2: y(value) }),
      T.svg("text", { class: "tick", x: left - 6, y: y(value) + 4, "text-anchor": "end" }, T.human(value, unit)));
  }
  return lines;
};

/** The arena over time. At the sizes of the report, storages are drawn at their planned offsets; at other sizes, they are stacked. */
Charts.arena = (timeline, memory, sizes, onpick) => {
  const [width, height, left, bottom, top] = [640, 308, 62, 42, 22];
  const boxes = [];
  for (let at = 0; at < timeline.boxes.length; at += 6) {
    const [first, end, low, bytes, size, maker] = timeline.boxes.slice(at, at + 6);
    boxes.push({ first, end, low, bytes, size, maker: timeline.makers[maker] });
  }
  const weights = new Map(); // at the sizes of the report, so that other sizes have the same colors
  for (const box of boxes) weights.set(box.maker[2], (weights.get(box.maker[2]) || 0) + box.bytes * (box.end - box.first));
  const own = Object.keys(sizes).every((name) => sizes[name] === memory.sizes[name]);
  const live = new Float64Array(timeline.steps + 1);
  if (!own) {
    const computed = timeline.sizes.map((terms) => Sizes.aligned(Sizes.at(terms, sizes), memory.unit));
    for (const box of boxes) {
      box.bytes = computed[box.size];
      for (let step = box.first; step < box.end; step++) live[step] += box.bytes;
    }
    Charts.stack(boxes, timeline.steps);
  } else timeline.live.forEach((bytes, step) => { live[step] = bytes; });
  const high = Math.max(own ? timeline.arena || 0 : 0, ...boxes.map((box) => box.low + box.bytes), 1);
  const peak = live.reduce((best, bytes, step) => (bytes > live[best] ? step : best), 0);
  const x = (step) => left + (step / Math.max(timeline.steps, 1)) * (width - left - 10);
  const y = (bytes) => height - bottom - (bytes / high) * (height - bottom - top);
  const ranks = Charts.ranks(weights);
  const shapes = Charts.axis(4, high, y, left, width - 10, "B");
  for (const box of boxes) {
    const [name, , op, line, node] = box.maker;
    const [w, h] = [x(box.end) - x(box.first), y(box.low) - y(box.low + box.bytes)];
    shapes.push(T.svg("rect", {
      class: `life c${ranks.get(op)}${box.first <= peak && peak < box.end ? " at-peak" : ""}`, x: x(box.first), y: y(box.low + box.bytes), width: Math.max(w, 0.6), height: Math.max(h, 0.6),
      onclick: node === null ? null : () => onpick(node),
    }, T.svg("title", {}, `${name}: ${T.human(box.bytes, "B")} (${T.count(box.bytes)} bytes), for ${op}  ${line}`)));
    if (w > 7 * op.length + 8 && h > 14) shapes.push(T.svg("text", { class: "in-life", x: x(box.first) + w / 2, y: y(box.low + box.bytes / 2) + 4, "text-anchor": "middle" }, op));
  }
  let d = "";
  for (let step = 0; step < timeline.steps; step++) d += `${step ? "L" : "M"}${x(step).toFixed(1)} ${y(live[step]).toFixed(1)}L${x(step + 1).toFixed(1)} ${y(live[step]).toFixed(1)}`;
  shapes.push(T.svg("path", { class: "alive", d }));
  shapes.push(T.svg("line", { class: "peak", x1: x(peak + 0.5), x2: x(peak + 0.5), y1: top, y2: height - bottom }),
    T.svg("text", { class: "peak-name", x: x(peak + 0.5) + (peak > timeline.steps * 0.9 ? -5 : 5), y: top - 8, "text-anchor": peak > timeline.steps * 0.9 ? "end" : "start" }, `peak ${T.human(live[peak], "B")}`));
  timeline.bands.forEach(([first, end, depth, name], at) => {
    const low = height - bottom + 6 + 16 * Math.min(depth, 2);
    shapes.push(T.svg("rect", { class: `band b${at % 2}`, x: x(first), y: low, width: Math.max(x(end) - x(first) - 1, 0.5), height: 14 }, T.svg("title", {}, name)));
    if (x(end) - x(first) > 7 * name.length + 6) shapes.push(T.svg("text", { class: "tick", x: (x(first) + x(end)) / 2, y: low + 11, "text-anchor": "middle" }, name));
  });
  return [
    T.svg("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Arena over time; the peak is ${T.human(live[peak], "B")} at step ${peak} of ${timeline.steps}` }, shapes),
    Charts.legend(ranks),
    T.el("p", { class: "note" }, own
      ? "Time runs to the right, in steps of a run; a rectangle is the lifetime of a storage at its offset. The line is the number of bytes alive."
      : "At these sizes the storages are stacked: the formulas give their bytes, and a run at these sizes computes their offsets."),
  ];
};

/** Stack lifetimes without an overlap: each at the lowest offset that is free during its lifetime. */
Charts.stack = (boxes, steps) => {
  const placed = [];
  for (const box of [...boxes].sort((a, b) => b.bytes - a.bytes || a.first - b.first)) {
    let low = 0;
    for (const other of placed.filter((o) => o.first < box.end && box.first < o.end).sort((a, b) => a.low - b.low)) {
      if (other.low - low >= box.bytes) break;
      low = Math.max(low, other.low + other.bytes);
    }
    box.low = low;
    if (boxes.length < 4000) placed.push(box);
  }
  return steps;
};

/** The timetable of a rank: a lane for work, and one for each set of axes over which ranks communicate. */
Charts.timetable = (table) => {
  const lanes = ["", ...new Set(table.busy.map((each) => each[1]).filter(Boolean))];
  const [width, left, lane] = [640, 64, 32];
  const height = lanes.length * lane + 30;
  const x = (time) => left + (time / Math.max(table.seconds, 1e-30)) * (width - left - 10);
  const weights = new Map();
  for (const each of table.busy) {
    const name = each[1] ? each[0] : each[8];
    weights.set(name, (weights.get(name) || 0) + each[6]);
  }
  const ranks = Charts.ranks(weights);
  const shapes = lanes.map((name, at) => T.svg("text", { class: "tick", x: left - 8, y: at * lane + 20, "text-anchor": "end" }, name ? `over ${name}` : "work"));
  for (const [op, over, because, scope, line, start, seconds, sent, limit] of table.busy) {
    const text = `${op}  ${T.seconds(seconds)}${over ? `, ${T.human(sent, "B")} sent: ${because}` : `, limited by ${limit}`}\n${line}  ${scope}`;
    shapes.push(T.svg("rect", { class: `life c${ranks.get(over ? op : limit)}`, x: x(start), y: lanes.indexOf(over) * lane + 4, width: Math.max(x(start + seconds) - x(start), 0.5), height: lane - 10 }, T.svg("title", {}, text)));
  }
  for (let part = 0; part <= 4; part++) {
    const time = (table.seconds * part) / 4;
    shapes.push(T.svg("text", { class: "tick", x: x(time), y: height - 8, "text-anchor": part === 4 ? "end" : "middle" }, T.seconds(time)));
  }
  return [T.svg("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "Timetable of a rank" }, shapes), Charts.legend(ranks)];
};

/** The ranks of a mesh in a grid, with the first axis to the right. Ranks of one node share a shade. */
Charts.mesh = (axes, node) => {
  const [[, across], ...rest] = axes;
  const down = rest.reduce((product, [, size]) => product * size, 1);
  const [columns, rows] = [Math.min(across, 40), Math.min(down, 16)];
  const cell = Math.min(40, 640 / columns);
  const shapes = [];
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      const rank = row * across + column;
      shapes.push(T.svg("rect", { class: `rank n${Math.floor(rank / node) % 4}`, x: column * cell, y: row * cell, width: cell - 3, height: cell - 3, rx: 4 }, T.svg("title", {}, `rank ${rank}, node ${Math.floor(rank / node)}`)));
      if (cell > 18) shapes.push(T.svg("text", { class: "tick", x: column * cell + cell / 2 - 1, y: row * cell + cell / 2 + 3, "text-anchor": "middle" }, rank));
    }
  }
  const [w, h] = [columns * cell, rows * cell];
  return T.svg("svg", { class: "mesh", viewBox: `0 0 ${w} ${h}`, width: w, height: h, role: "img", "aria-label": `Mesh of ${across * down} ranks` }, shapes);
};

/** The keys that each query sees, by position: a square of up to 48 cells along each side. */
Charts.mask = (each) => {
  const cells = Math.min(48, each.queries, Math.max(each.keys, 1));
  const side = 132;
  const unit = side / cells;
  const [low, high] = each.reach;
  const [perQuery, perKey] = [each.queries / cells, each.keys / cells];
  let d = "";
  for (let row = 0; row < cells; row++) {
    const query = Math.floor(row * perQuery);
    const first = Math.max(0, low === null ? 0 : Math.floor((query + low) / perKey));
    const last = Math.min(cells - 1, high === null ? cells - 1 : Math.floor((query + high) / perKey));
    if (last >= first) d += `M${(first * unit).toFixed(1)} ${(row * unit).toFixed(1)}h${((last - first + 1) * unit).toFixed(1)}v${unit.toFixed(2)}h${(-(last - first + 1) * unit).toFixed(1)}z`;
  }
  return T.svg("svg", { class: "mask", viewBox: `0 0 ${side} ${side}`, role: "img", "aria-label": "Keys that each query sees by position" },
    T.svg("rect", { class: "mask-all", width: side, height: side }), T.svg("path", { class: "mask-seen", d }));
};

/** Kernels by intensity and rate, under the machine's limits; both axes are logarithmic. */
Charts.roofline = (found) => {
  const rows = found.kernels.filter((row) => row.flops && row.bytes);
  if (!rows.length) return [];
  const [width, height, left, bottom] = [640, 280, 84, 30];
  const xs = rows.map((row) => Math.log10(row.flops / row.bytes));
  const top = Math.log10(Math.max(...Object.values(found.rates), 1)) + 0.15;
  const [x0, x1] = [Math.min(...xs, 0) - 0.3, Math.max(...xs, 2) + 0.3];
  const y0 = Math.min(...rows.map((row) => Math.log10(row.flops / row.seconds)), top - 2) - 0.2;
  const x = (v) => left + ((v - x0) / (x1 - x0)) * (width - left - 12);
  const y = (v) => height - bottom - ((v - y0) / (top - y0)) * (height - bottom - 12);
  const shapes = [];
  for (let at = Math.ceil(y0); at <= top; at++) shapes.push(T.svg("line", { class: "rule", x1: left, x2: width - 12, y1: y(at), y2: y(at) }), T.svg("text", { class: "tick", x: left - 6, y: y(at) + 4, "text-anchor": "end" }, T.human(10 ** at, "FLOP/s")));
  for (let at = Math.ceil(x0); at <= x1; at++) shapes.push(T.svg("text", { class: "tick", x: x(at), y: height - 14, "text-anchor": "middle" }, `${Number((10 ** at).toPrecision(3))} FLOP/B`));
  const read = Math.log10(found.read);
  for (const rate of new Set(Object.values(found.rates))) {
    const knee = Math.log10(rate) - read;
    shapes.push(T.svg("path", { class: "roof", d: `M${x(Math.max(x0, y0 - read))} ${y(Math.max(x0, y0 - read) + read)}L${x(knee)} ${y(Math.log10(rate))}L${x(x1)} ${y(Math.log10(rate))}` }));
  }
  const most = Math.max(...rows.map((row) => row.calls * row.seconds));
  for (const row of rows) {
    shapes.push(T.svg("circle", { class: "kernel", cx: x(Math.log10(row.flops / row.bytes)), cy: y(Math.log10(row.flops / row.seconds)), r: 3 + 11 * Math.sqrt((row.calls * row.seconds) / most) },
      T.svg("title", {}, `${row.kernel}  ${row.what}: ${T.seconds(row.calls * row.seconds)}, ${T.share(row.least, row.seconds)} of the limit`)));
  }
  return [T.svg("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "Roofline" }, shapes),
    T.el("p", { class: "note" }, "A circle is a kernel; its area is its share of the time. The lines are the limits of this machine.")];
};
