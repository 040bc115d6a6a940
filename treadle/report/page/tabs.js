"use strict";
// The tabs. Each function returns the elements that show the data of a tab. A tab with damaged data shows the error.

const Tabs = { held: new Map() };

/** Return the elements of a tab with its own section, or the reason why it has no data. */
Tabs.of = async (app, name, more) => {
  const found = await Data.section(name);
  if (!found) return [T.el("p", {}, "This report has no such part.")];
  if (found.error) return [T.el("p", { class: "error" }, found.error.split("\n")[0]), T.el("pre", { class: "code", tabindex: "0" }, found.error)];
  if (found.missing) return [T.el("p", {}, `No data: ${found.missing}.`), T.el("p", {}, "This command produces it:"), T.el("pre", { class: "code command", tabindex: "0" }, found.command)];
  return Tabs[name](app, found.data, more).filter(Boolean);
};

Tabs.link = (app, number, text, stage) => (number === null || number === undefined ? text : Details.op(app, number, text, stage));
Tabs.last = (app) => app.model.passes.length - 1;

Tabs.ports = (ports, most = 12) => ports.slice(0, most).map((p) => `${p.name}: ${p.dtype}[${p.axes.join(", ")}]`).join(", ") + (ports.length > most ? ` and ${ports.length - most} more` : "");

/** The differences of two builds. `chosen` is an op of the second graph without a counterpart. */
Tabs.diff = (app, data, chosen) => {
  const names = app.head.programs;
  const known = Object.entries(data.quantities).filter(([, each]) => each.b !== null && each.b !== undefined);
  const side = (at) => {
    const model = app.models[at];
    const stage = model ? model.passes.length - 1 : 0;
    const rows = model ? data.only[at].map((number) => model.light(number, stage)).filter(Boolean) : [];
    const pick = (row) => (at === app.state.program ? app.go({ number: row.number, stage }) : app.pickOther(row.number));
    return rows.length ? [T.el("h3", {}, `Only in ${T.shown(names[at], 60)}`), T.table([
      { name: "op", of: (row) => T.el("button", { type: "button", class: "link", onclick: () => pick(row) }, row.op), sort: (row) => row.op }, { name: "type", of: (row) => row.type, code: true }, { name: "scope", of: (row) => row.scope, sort: (row) => row.scope }, { name: "line", of: (row) => row.line },
    ], rows, { caption: `Ops that are only in ${names[at]}` })] : [];
  };
  return [
    T.el("h2", {}, "Differences"),
    chosen ? T.el("p", { class: "big" }, `${chosen.op} ${chosen.scope || chosen.name} is only in ${T.shown(names[1 - app.state.program], 60)}: ${chosen.type}  ${chosen.line}`) : null,
    data.related && data.differs ? null : T.el("p", {}, data.text[0]),
    T.el("p", { class: "note" }, "An op that is selected in one graph is selected in the other, too, with the ops that compute the same there."),
    T.table([{ name: "quantity", of: ([name]) => name }, { name: "a", of: ([, each]) => T.count(each.a ?? ""), number: true }, { name: "b", of: ([, each]) => T.count(each.b), number: true }, { name: "meaning", of: ([name]) => data.about[name] }], known, { caption: "Quantities of both builds" }),
    ...side(0), ...side(1),
    T.el("h3", {}, "As text"), T.el("pre", { class: "code", tabindex: "0" }, data.text.join("\n")),
  ];
};

Tabs.overview = (app, data) => {
  const ops = Object.entries(data.ops);
  const stageName = (at, name) => (at ? `after pass ${at} of ${data.passes}, ${name}` : "as declared");
  return [
    T.el("h2", {}, data.model, T.el("small", {}, ` on ${data.backend}, ${data.target}`)),
    T.pairs([
      ["Parameters", `${T.human(data.parameters)} (${T.human(data.parameter_bytes, "B")} as stored)`],
      ["A run", `${T.human(data.flops, "FLOPs")}, ${T.human(data.bytes, "B")} read and written${app.sizesText()}${data.stages.length > 2 ? `, before the backend's passes` : ""}`],
      ["Inputs", T.el("code", {}, Tabs.ports(data.inputs))],
      ["Outputs", T.el("code", {}, Tabs.ports(data.outputs))],
      ["Ops in a run", data.stages.map(([at, name, count]) => `${T.count(count)} ${stageName(at, name)}`).join(", ")],
      ["Unused tensors", data.unused.length ? data.unused.slice(0, 20).join(", ") : ""],
      ["Unknown keys", data.unread.length ? data.unread.join(", ") : ""],
    ]),
    T.el("h3", {}, "Questions"),
    T.el("ul", { class: "questions" },
      [["costs", "Which ops cost the most?"], ["fusion", "Why was an attention, a norm or a product not fused?"], ["memory", "What is alive at the peak of memory?"], ["weights", "Which weights are the largest, and in which encoding?"], ["log", "Which passes changed something, and what did they refuse?"], ["selected", "What did the selected pass change?"]]
        .filter(([name]) => app.hasTab(name)).map(([name, text]) => T.el("li", {}, T.el("button", { type: "button", class: "link", onclick: () => app.openTab(name) }, text)))),
    T.el("h3", {}, "Ops of a run"),
    T.table([{ name: "op", of: ([op]) => op, sort: ([op]) => op }, ...data.stages.map(([at, name], place) => ({ name: at ? `after ${name}` : name, of: ([, counts]) => counts[place] || "", sort: ([, counts]) => counts[place], number: true }))], ops, { caption: "Ops of a run" }),
    T.el("h3", {}, "Functions"),
    T.table([{ name: "function", of: (f) => f.name }, { name: "ops", of: (f) => T.count(f.ops), sort: (f) => f.ops, number: true }, { name: "calls", of: (f) => T.count(f.calls), sort: (f) => f.calls, number: true }], data.functions, { caption: "Functions" }),
  ];
};

/** The ops that run, the costliest first. An op of a repeated block has the cost of all its calls. */
Tabs.costs = (app, data) => {
  const last = Tabs.last(app);
  const rows = data.ops.map(([number, flops, bytes, calls, seconds]) => ({ ...app.model.light(number, last), number, flops, bytes, calls, seconds }));
  const time = rows.reduce((sum, row) => sum + (row.seconds || 0), 0);
  const column = (name, unit, total) => [
    { name: unit, of: (row) => T.human(row[name], name === "bytes" ? "B" : ""), sort: (row) => row[name], number: true },
    { name: "share", of: (row) => T.share(row[name], total), sort: (row) => row[name], number: true },
  ];
  return [
    T.el("h2", {}, "Costs"), T.el("p", { class: "big" }, `${T.human(data.flops, "FLOPs")}, ${T.human(data.bytes, "B")} read and written in a run${app.sizesText()}`),
    T.el("p", { class: "note" }, "The ops that run, after the last pass; an op of a repeated block with all its calls. Bars in the graph show the same shares, also of folded boxes. Ops that depend on weights alone are computed before a run."),
    T.el("div", { class: "filters" }, ["flops", "bytes", ...(data.timed ? ["seconds"] : [])].map((name) => T.el("button", { type: "button", onclick: () => app.setHeat(name) }, `Bars: ${{ flops: "FLOPs", bytes: "bytes", seconds: "time" }[name]}`))),
    T.table([
      { name: "op", of: (row) => row.op, sort: (row) => row.op, act: true, below: (row) => row.scope || row.name }, ...column("flops", "FLOPs", data.flops), ...column("bytes", "bytes", data.bytes),
      ...(data.timed ? [{ name: "time", of: (row) => (row.seconds ? T.seconds(row.seconds) : ""), sort: (row) => row.seconds || 0, number: true }, { name: "share", of: (row) => T.share(row.seconds || 0, time), sort: (row) => row.seconds || 0, number: true }] : []),
      { name: "calls", of: (row) => T.count(row.calls), sort: (row) => row.calls, number: true }, { name: "line", of: (row) => row.line, sort: (row) => row.line, code: true },
    ], rows, { caption: "Ops of a run, the costliest first", onrow: (row) => () => app.go({ stage: last, number: row.number, tab: "costs" }) }),
  ];
};

const WORDS = { fused: "fused", already: "one op already", refused: "not fused: refused", nearly: "not fused: nearly matched", missed: "not fused: no rule matches" };

Tabs.fusion = (app, data) => {
  const host = T.el("div", {});
  const kinds = [...new Set(data.sites.map((site) => site.kind))].sort();
  const status = T.el("select", { id: "fusion-status" }, T.el("option", { value: "" }, "all outcomes"), T.el("option", { value: "open" }, "not fused"), Object.keys(WORDS).filter((each) => data.totals[each]).map((each) => T.el("option", { value: each }, WORDS[each])));
  const kind = T.el("select", { id: "fusion-kind" }, T.el("option", { value: "" }, "all kinds"), kinds.map((each) => T.el("option", { value: each }, each)));
  const open = (site) => data.unfused.includes(site.status);
  const show = (site) => T.el("button", { type: "button", class: "link", onclick: () => app.go({ stage: 0, numbers: site.nodes, stop: site.stop, tab: "fusion" }) }, (site.places || []).join("  ") || site.function);
  const line = (number) => { const found = app.model.light(number, 0); return found && found.line ? ` at ${found.line}` : ""; };
  const card = (group) => {
    const [site] = group;
    const count = group.reduce((sum, each) => sum + each.calls, 0);
    return T.el("li", { class: `site ${open(site) ? "open" : "done"}` },
      T.el("h3", {}, T.el("span", { class: "status" }, open(site) ? "not fused" : site.status === "already" ? "already one op" : "fused"), ` ${site.kind}`, site.op ? T.el("small", {}, ` ${site.op}`) : null, count > 1 ? T.el("small", {}, ` ×${count} in a run`) : null),
      T.el("p", { class: "place" }, T.el("code", {}, (site.places || []).join("  ")), " ", T.el("span", { class: "dim" }, `in ${site.function}${group.length > 1 ? ` and ${group.length - 1} more places` : ""}`)),
      T.pairs([
        ["Stopped at", site.edge ? T.el("span", {}, `${site.edge}${site.at ? `  ${site.at}` : ""} `, site.stop === undefined ? "" : T.el("button", { type: "button", class: "link", onclick: () => app.go({ stage: 0, numbers: [site.stop], stop: site.stop, tab: "fusion" }) }, `Show it${line(site.stop)}`)) : ""],
        ["Why", site.reason],
        ["Try", site.hint],
        ["Rule", (site.rules || []).join(", ")],
        ["Matched", (site.matched || []).join(", ") || (site.status === "refused" ? "all of it" : "")],
        ["Note", (site.notes || []).join(" ")],
      ]),
      site.nodes.length ? T.el("button", { type: "button", onclick: () => app.go({ stage: 0, numbers: site.nodes, stop: site.stop, tab: "fusion" }) }, `Show its ${T.plural(site.nodes.length, "op")} as declared`) : null,
      site.made ? T.el("button", { type: "button", onclick: () => app.go({ stage: site.stage, numbers: site.made, tab: "fusion" }) }, `Show the ${site.op}`, app.model.passes[site.stage] ? ` after ${app.model.passes[site.stage].name}` : "") : null,
      group.length > 1 ? T.el("details", {}, T.el("summary", {}, `${group.length} places`), T.el("ul", { class: "values" }, group.slice(0, 300).map((each) => T.el("li", {}, show(each))))) : null);
  };
  const alike = (sites) => {
    const groups = new Map();
    for (const site of sites) {
      const key = JSON.stringify([site.kind, site.status, site.op, site.reason, site.hint, site.rules, site.matched, site.edge, site.notes]);
      if (!groups.has(key)) groups.set(key, []);
      groups.get(key).push(site);
    }
    return [...groups.values()];
  };
  const draw = () => {
    const shown = data.sites.filter((site) => (!kind.value || site.kind === kind.value) && (!status.value || (status.value === "open" ? open(site) : site.status === status.value)));
    const groups = alike(shown);
    const most = 150;
    host.replaceChildren(T.el("p", { class: "note" }, `${T.plural(shown.length, "site")} in the distinct functions; sites with the same outcome share an entry${groups.length > most ? `, and the first ${most} entries are shown: choose a kind or an outcome` : ""}.`), T.el("ul", { class: "sites" }, groups.slice(0, most).map(card)));
  };
  for (const each of [status, kind]) each.addEventListener("change", draw);
  draw();
  const total = Object.entries(data.totals).filter(([, n]) => n).map(([name, n]) => `${T.count(n)} ${WORDS[name]}`);
  return [T.el("h2", {}, "Fusion"), T.el("p", {}, `Sites where a fused op could stand, in a run: ${total.join(", ") || "none"}.`),
    T.el("div", { class: "filters" }, T.el("label", {}, "Outcome ", status), T.el("label", {}, "Kind ", kind)), host];
};

Tabs.memory = (app, data) => {
  const sizes = (app.sizes ??= { ...data.sizes }); // kept while other tabs are shown
  const picture = T.el("div", {});
  const sentence = T.el("p", { class: "big" });
  const pick = (number) => app.go({ stage: Tabs.last(app), number, tab: "memory" });
  const draw = () => {
    const values = data.formulas.map((terms) => Sizes.at(terms, sizes));
    const own = Object.keys(sizes).every((name) => sizes[name] === data.sizes[name]);
    const peak = own ? data.peak : Math.max(...values);
    const where = Object.entries(sizes).map(([name, size]) => `${name}=${size}`).join(", ");
    sentence.textContent = T.shown(`${T.human(peak, "B")} (${T.count(peak)} bytes) at the peak${where ? ` at ${where}` : ""}${own ? "" : ", by the formula"}`);
    picture.replaceChildren(...(data.timeline ? Charts.arena(data.timeline, data, sizes, pick) : [T.el("p", { class: "note" }, "There is no arena to draw: the library allocates each array, or a run has too many storages.")]));
  };
  const sliders = Object.entries(data.axes).filter(([name]) => name in sizes).map(([name, axis]) => {
    const number = T.el("input", { type: "number", min: axis.low, max: axis.bounded ? axis.high : null, value: sizes[name], "aria-label": `Size of ${name}` });
    const slider = T.el("input", { type: "range", min: axis.low, max: axis.high, value: sizes[name], "aria-label": `Size of ${name}, slider` });
    const set = (from, to) => { const size = Math.max(axis.low, Math.min(axis.bounded ? axis.high : 1e9, Math.round(Number(from.value) || axis.low))); to.value = size; sizes[name] = size; draw(); };
    slider.addEventListener("input", () => set(slider, number));
    number.addEventListener("change", () => { set(number, slider); number.value = sizes[name]; });
    return T.el("label", { class: "size" }, T.el("b", {}, name), slider, number);
  });
  draw();
  return [
    T.el("h2", {}, "Memory"), sentence,
    T.el("p", {}, "At the peak runs ", Tabs.link(app, data.step_node, data.step, Tabs.last(app)), "."),
    T.el("div", { class: "sizes" }, sliders), picture,
    T.el("h3", {}, "Alive at the peak"),
    T.el("p", { class: "note" }, `At the sizes of the report${app.sizesText()}, while ${data.step.trim()} runs${data.at.length > 1 ? ` (${data.at.map(([f]) => f).join(" › ")})` : ""}.`),
    T.table([
      { name: "storage", of: (row) => `${row.name}${row.function === "main" ? "" : ` of ${row.function}`}`, act: true, below: (row) => row.line },
      { name: "bytes", about: "At the sizes of the report, and at any sizes", of: (row) => T.human(row.bytes, "B"), sort: (row) => row.bytes, number: true, below: (row) => row.size }, { name: "share", of: (row) => T.share(row.bytes, data.peak), sort: (row) => row.bytes, number: true },
      { name: "peak without it", of: (row) => (row.saves ? `−${T.human(row.saves, "B")}` : T.el("span", { title: "another step is as high" }, "unchanged")), sort: (row) => row.saves, number: true },
      { name: "why", of: (row) => row.why, wide: true },
    ], data.alive, { caption: "Storages that are alive at the peak, the largest first", onrow: (row) => (row.node === null || row.node === undefined ? null : () => pick(row.node)) }),
    data.alive.some((row) => row.workspace) ? T.el("p", { class: "note" }, "A storage that a kernel needs is its workspace, such as operands that it packs for a matrix product (panels). It is alive while that kernel runs, and leads to the kernel's op.") : null,
    T.el("h3", {}, "Not included"), T.pairs(Object.entries(data.apart).map(([name, bytes]) => [name, bytes ? T.human(bytes, "B") : ""])),
    T.el("h3", {}, "Formula"), T.el("p", {}, "At any sizes the peak is the largest of these, in bytes:"), T.el("ul", { class: "values" }, data.formula.map((each) => T.el("li", {}, T.el("code", {}, each)))),
    data.reordered.length || data.donated.length ? T.el("ul", { class: "values" }, [...data.donated, ...data.reordered].map((line) => T.el("li", {}, line))) : null,
    T.el("p", { class: "note" }, data.arena === null ? "The library allocates each array by itself." : `One arena of ${T.count(data.arena)} bytes${data.host ? `; values that die before ${data.host} is written share its memory` : ""}${data.foreign ? `; at most ${T.human(data.foreign, "B")} more are allocated by the library` : ""}.`),
  ];
};

Tabs.weights = (app, data) => {
  const forms = new Map();
  for (const each of data.weights) {
    const key = each.encoding || `plain, ${each.bits} bits`;
    const found = forms.get(key) || { key, count: 0, bytes: 0, error: null };
    found.count += 1;
    if (each.error !== null) found.error = Math.max(found.error ?? 0, each.error);
    found.bytes += each.bytes;
    forms.set(key, found);
  }
  const errors = (name) => (data.measured ? [{ name, of: (each) => (each.error === null ? "" : `${(100 * each.error).toPrecision(3)}%`), sort: (each) => each.error ?? -1, number: true }] : []);
  const why = data.weights.some((each) => each.encoding) && !data.measured ? T.el("p", { class: "note" }, "Errors of the encodings were not measured: the weights before quantization were not at hand. treadle report FOLDER --quantize ... reads them.") : null;
  return [
    T.el("h2", {}, "Weights"), T.el("p", { class: "big" }, `${T.human(data.bytes, "B")} in ${T.plural(data.weights.length, "weight")}`),
    T.table([{ name: "encoding", of: (f) => f.key }, { name: "weights", of: (f) => T.count(f.count), sort: (f) => f.count, number: true }, { name: "bytes", of: (f) => T.human(f.bytes, "B"), sort: (f) => f.bytes, number: true }, { name: "share", of: (f) => T.share(f.bytes, data.bytes), number: true }, ...errors("largest error")],
      [...forms.values()].sort((a, b) => b.bytes - a.bytes), { caption: "Bytes by encoding" }),
    T.el("h3", {}, "Every weight, the largest first"),
    T.table([
      { name: "weight", of: (w) => w.name, sort: (w) => w.name, act: true, about: "A click selects an op that reads the weight", below: (w) => w.type },
      { name: "encoding", about: "plain: numbers as declared. int8_rows: 8-bit integers with a scale for each row. int4_groups(n): 4-bit integers with a scale for each n of a row", of: (w) => w.encoding || "plain", sort: (w) => w.encoding || "" },
      { name: "bits", of: (w) => Number(w.bits.toPrecision(3)), sort: (w) => w.bits, number: true }, { name: "bytes", of: (w) => T.human(w.bytes, "B"), sort: (w) => w.bytes, number: true }, { name: "share", of: (w) => T.share(w.bytes, data.bytes), sort: (w) => w.bytes, number: true }, ...errors("error"),
      ...(data.weights.some((w) => w.reason) ? [{ name: "why", of: (w) => w.reason || "", sort: (w) => w.reason || "", wide: true }] : []),
    ], data.weights, { caption: "Every weight, the largest first", onrow: (w) => (w.reader === null ? null : () => app.go({ stage: data.stage, number: w.reader, tab: "weights" })) }),
    T.el("h3", {}, "Quantization"),
    data.measured ? T.el("p", { class: "note" }, "An error is the root mean square of the difference between the decoded weight and the original one, relative to the root mean square of the original one.") : why,
    data.notes.length ? T.el("details", {}, T.el("summary", {}, data.notes[0]), T.el("pre", { class: "code", tabindex: "0" }, data.notes.slice(1).join("\n").trim())) : T.el("p", {}, "No pass quantized weights. The option --quantize int8-weights or --quantize int4 does; errors of results are measured by treadle perplexity and treadle verify."),
  ];
};

const PANELS = "panels(n), pairs(n), quads(n): the rows of a matrix in groups of n, in the order in which a product reads them";

Tabs.storage = (app, data) => {
  const parts = [T.el("h2", {}, "Storage"), T.el("p", {}, data.note, data.strided ? "" : ". The library chooses strides itself.")];
  for (const each of data.functions) {
    const values = each.values.filter((value) => !(value.passed && value.kind === "weight"));
    parts.push(T.el("h3", {}, each.function, T.el("small", {}, ` ${T.plural(each.steps.length, "step")}, ${T.plural(each.own_storages, "storage")} of its own${each.calls > 1 ? `, called ${each.calls} times` : ""}`)));
    parts.push(T.table([
      { name: "value", of: (v) => v.name, sort: (v) => v.name, act: true, below: (v) => v.type }, { name: "storage", about: `Below it the layout. ${PANELS}`, of: (v) => v.storage || "registers", sort: (v) => v.storage || "", below: (v) => v.form },
      { name: "bytes", of: (v) => v.bytes || "", code: true }, { name: "steps", of: (v) => `${v.first ?? "given"} to ${v.last}`, sort: (v) => v.first ?? -1 }, { name: "why", of: (v) => v.why, wide: true },
    ], values, { caption: `Storage of ${each.function}`, most: 60, onrow: (v) => (v.node === undefined ? null : () => app.go({ stage: Tabs.last(app), number: v.node, tab: "storage" })) }));
  }
  parts.push(T.el("h3", {}, "Layouts of weights"), T.el("p", {}, `${T.human(data.layouts.bytes.as_they_came, "B")} are read as provided, ${T.human(data.layouts.bytes.made, "B")} are derived when weights are bound.`));
  const rows = data.layouts.blocks.flatMap((block) => block.weights.map((w) => ({ ...w, function: block.function })));
  parts.push(T.table([
    { name: "weight", of: (w) => w.name, sort: (w) => w.name, below: (w) => w.type }, ...(data.layouts.blocks.length > 1 ? [{ name: "function", of: (w) => w.function, sort: (w) => w.function }] : []), { name: "layout", about: PANELS, of: (w) => w.layout, sort: (w) => w.layout },
    { name: "bytes", of: (w) => (w.bytes === null ? "" : T.human(w.bytes, "B")), sort: (w) => w.bytes || 0, number: true }, { name: "derived from", of: (w) => w.made || "as provided", wide: true }, { name: "readers", of: (w) => w.readers.join("; "), wide: true },
  ], rows, { caption: "Layouts of weights", most: 60 }));
  return parts;
};

Tabs.sharding = (app, data) => [
  T.el("h2", {}, "Sharding"), T.el("p", { class: "big" }, `${data.ranks} ranks of ${data.device_name} over ${data.mesh}: ${data.recipe}`),
  T.pairs([
    ["Splits", Object.entries(data.axes).map(([axis, over]) => `${axis} over ${over}`).join(", ")], ["Weights stored over", data.stored], ["A run", T.seconds(data.device.seconds)], ["Work", T.seconds(data.device.work_seconds)], ["Collectives", T.seconds(data.device.collective_seconds)],
    ["Limited by", data.device.limit], ["A device holds", `${T.human(data.device.weights + data.device.values + data.device.ports, "B")} of ${T.human(data.device.memory, "B")}${data.device.fits ? "" : ": it does not fit"}`], ["Best change", data.best], ["Notes", data.notes.join("; ")],
  ]),
  T.el("h3", {}, "Mesh"), data.axes_of_mesh.length ? Charts.mesh(data.axes_of_mesh, data.node) : null,
  T.el("h3", {}, "Timetable of a rank"), ...Charts.timetable(data.timetable), data.timetable.left_out ? T.el("p", { class: "note" }, `${T.count(data.timetable.left_out)} later entries are left out.`) : null,
  T.el("h3", {}, "Collectives"),
  data.collectives.length ? T.table([
    { name: "collective", of: (c) => `${c.times} × ${c.op}` }, { name: "over", of: (c) => c.over }, { name: "sent", of: (c) => T.human(c.sent, "B"), sort: (c) => c.sent, number: true }, { name: "time", of: (c) => T.seconds(c.seconds), sort: (c) => c.seconds, number: true },
    { name: "because", of: (c) => c.because, wide: true }, { name: "line", of: (c) => `${c.line}  ${c.scope}`, code: true },
  ], data.collectives, { caption: "Collectives and their reasons" }) : T.el("p", {}, "Ranks do not communicate."),
  T.el("h3", {}, "Changes"),
  T.table([{ name: "change", of: (c) => c.description }, { name: "time", of: (c) => T.seconds(c.seconds), sort: (c) => c.seconds, number: true }, { name: "memory", of: (c) => T.human(c.held, "B"), sort: (c) => c.held, number: true }, { name: "fits", of: (c) => (c.fits ? "yes" : "no") }], data.changes, { caption: "Plans that differ in one choice" }),
];

Tabs.step = (app, data) => [
  T.el("h2", {}, "Decoding step"), T.el("p", { class: "big" }, `${T.human(data.bytes_per_token, "B")} of caches a token and row, along ${data.axis}`),
  T.pairs([["Context", data.context === null ? "no limit" : T.count(data.context)], ["Read at every step", data.inputs.step.join(", ")], ["Read once a row", data.inputs.prologue.join(", ")], ["Entries", data.entries.map((e) => `${e.name}: ${T.plural(e.ops, "op")}`).join("; ")]]),
  app.head.programs.includes("step") && app.head.programs.length > 1 ? T.el("button", { type: "button", onclick: () => app.setProgram(app.head.programs.indexOf("step")) }, "Show its graph") : null,
  T.el("h3", {}, "States"),
  T.table([{ name: "state", of: (s) => s.name, code: true }, { name: "type", of: (s) => s.type, code: true }, { name: "number", of: (s) => T.count(s.count), number: true }, { name: "role", of: (s) => s.role }, { name: "bytes", of: (s) => `${T.human(s.bytes, "B")} a ${s.unit}`, sort: (s) => s.bytes, number: true }], data.states, { caption: "States" }),
  T.el("h3", {}, "Ops that do more than map the axis"),
  data.changed.length ? T.table([{ name: "op", of: (c) => c.op }, { name: "why", of: (c) => c.why, wide: true }, { name: "at a step", of: (c) => c.became, wide: true }], data.changed, { caption: "What each op became" }) : T.el("p", { class: "note" }, "The report of the model itself lists them."),
];

Tabs.roofline = (app, data) => [
  T.el("h2", {}, "Roofline"), T.el("p", { class: "big" }, `${T.seconds(data.kernels.reduce((sum, k) => sum + k.calls * k.seconds, 0))} in kernels, ${T.share(data.kernels.reduce((sum, k) => sum + k.calls * k.least, 0), data.kernels.reduce((sum, k) => sum + k.calls * k.seconds, 0))} of it is the limit of this machine`),
  T.el("p", {}, `${Object.entries(data.rates).map(([dtype, rate]) => `${T.human(rate, "FLOP/s")} in ${dtype}`).join(", ")}; reads ${T.human(data.read, "B/s")}; ${T.plural(data.threads, "thread")} on ${data.target}.`),
  ...Charts.roofline(data),
  T.table([
    { name: "kernel", of: (k) => k.kernel, sort: (k) => k.kernel, code: true }, { name: "ops", of: (k) => k.what, wide: true }, { name: "calls", of: (k) => T.count(k.calls), sort: (k) => k.calls, number: true }, { name: "time", of: (k) => T.seconds(k.calls * k.seconds), sort: (k) => k.calls * k.seconds, number: true },
    { name: "FLOP/s", of: (k) => T.human(k.flops / k.seconds), sort: (k) => k.flops / k.seconds, number: true }, { name: "B/s", of: (k) => T.human(k.bytes / k.seconds), sort: (k) => k.bytes / k.seconds, number: true }, { name: "of limit", of: (k) => T.share(k.least, k.seconds), sort: (k) => k.least / k.seconds, number: true }, { name: "line", of: (k) => k.source, code: true },
  ], data.kernels, { caption: "Kernels, the longest first" }),
];

Tabs.profile = (app, data) => [
  T.el("h2", {}, "Profile"), T.el("p", { class: "big" }, `${T.seconds(data.seconds)} in ${T.plural(data.calls.length, "kernel call")}, medians of ${data.rounds} runs`),
  T.el("button", { type: "button", onclick: () => app.setHeat("seconds") }, "Show times in the graph"),
  T.table([
    { name: "kernel", of: (c) => c[0], sort: (c) => c[0], act: true }, { name: "time", of: (c) => T.seconds(c[1]), sort: (c) => c[1], number: true }, { name: "share", of: (c) => T.share(c[1], data.seconds), sort: (c) => c[1], number: true }, { name: "scope", of: (c) => c[2], code: true }, { name: "line", of: (c) => c[3], code: true },
  ], data.calls, { caption: "Kernel calls in the order of a run", onrow: (c) => (c[4] === null ? null : () => app.go({ stage: Tabs.last(app), number: c[4], tab: "profile" })) }),
];

Tabs.attention = (app, data) => [
  T.el("h2", {}, "Attention"),
  data.length ? null : T.el("p", {}, "The optimized graph has no attention op."),
  T.el("ul", { class: "sites" }, data.slice(0, 200).map((each) => {
    const stage = each.node === null ? null : app.model.stageOf(each.node, Tabs.last(app));
    return T.el("li", { class: "site with-mask" },
      T.el("div", {}, T.el("h3", {}, Tabs.link(app, each.node, each.op, stage), each.calls > 1 ? T.el("small", {}, ` ×${each.calls} in a run`) : null), T.el("p", { class: "place" }, T.el("code", {}, `${each.line}  ${each.scope}`)),
        T.pairs([
          ["Masks and biases", each.terms.join(", ") || "none: every query sees every key"], ["Heads", each.heads ? `${each.heads} of width ${each.width}${each.key_heads !== each.heads ? `, ${each.key_heads} of keys and values` : ""}` : ""],
          ["Pairs", each.queries ? `${T.human(each.live)} of ${T.human(each.queries * each.keys)} by position (${T.share(each.live, each.queries * each.keys)})` : ""], ["By values", (each.by_values || []).join(", ")], ["FLOPs", each.flops ? T.human(each.flops) : ""],
          ["Operands", T.el("code", {}, Object.entries(each.operands).map(([name, type]) => `${name}: ${type}`).join(", "))],
        ])),
      each.queries ? T.el("figure", {}, Charts.mask(each), T.el("figcaption", {}, `${each.queries} queries down, ${each.keys} keys across`)) : null);
  })),
].filter(Boolean);

Tabs.log = (app, data) => {
  const parts = [T.el("h2", {}, "Pass log"), T.table([
    { name: "pass", of: (p) => p.pass, act: true }, { name: "ops", of: (p) => (p.ops.before === p.ops.after ? p.ops.after : `${p.ops.before} → ${p.ops.after}`) }, { name: "change", of: (p) => Object.entries(p.ops.changes).map(([op, n]) => `${n > 0 ? "+" : "−"}${Math.abs(n)} ${op}`).join(", ") || (p.changes ? "operands or attributes" : T.el("span", { class: "dim" }, "no change")), wide: true },
    { name: "refused", about: "Places that a rule of the pass recognized and refused, for a reason", of: (p) => p.refusals.length || "", sort: (p) => p.refusals.length, number: true }, { name: "nearly", about: "Places where at least half of a pattern matched", of: (p) => p.near_misses.length || "", sort: (p) => p.near_misses.length, number: true }, { name: "time", of: (p) => T.seconds(p.seconds), sort: (p) => p.seconds, number: true },
  ], data.passes.map((pass, at) => ({ ...pass, at })), { caption: "Passes in order", onrow: (p) => () => { const stage = app.stageOfPass(p.pass, p.at + 1); if (stage !== null) app.go({ stage, tab: "selected" }); } })];
  for (const pass of data.passes) {
    const events = [...pass.matches.map((e) => ["matched", e]), ...pass.refusals.map((e) => ["refused", e]), ...pass.near_misses.map((e) => ["nearly", e])];
    if (!events.length && !pass.notes.length) continue;
    const box = T.el("details", {}, T.el("summary", {}, `${pass.pass}: ${T.plural(events.length, "event")}${pass.notes.length ? `, ${T.plural(pass.notes.length, "note")}` : ""}`));
    let filled = false;
    box.addEventListener("toggle", () => {
      if (filled) return;
      filled = true;
      box.append(...(events.length ? [T.table([
        { name: "", of: ([kind]) => kind }, { name: "rule", of: ([, e]) => e.rule }, { name: "op", of: ([, e]) => e.op }, { name: "reason", of: ([, e]) => [e.edge, e.reason].filter(Boolean).join(": "), wide: true }, { name: "try", of: ([, e]) => e.hint || "", wide: true }, { name: "place", of: ([, e]) => `${e.source}  ${e.scope}`, code: true },
      ], events, { caption: `Events of ${pass.pass}` })] : []), ...(pass.notes.length ? [T.el("pre", { class: "code", tabindex: "0" }, pass.notes.join("\n"))] : []));
    });
    parts.push(box);
  }
  return parts;
};

// -- tabs of a program -----------------------------------------------------------------------------------------------

/** Return the lines of a stage's text, as numbers in the table of lines; null if it has no text. */
Tabs.stageLines = (text, stage) => {
  let held = text.stages[stage];
  if (typeof held === "number") held = text.stages[held];
  if (!held) return null;
  const found = [];
  for (let at = 0; at < held.length; at += 2) for (let each = 0; each < held[at + 1]; each++) found.push(held[at] + each);
  return found;
};

Tabs.text = async (app) => {
  const text = await app.section("text");
  const { stage } = app.state;
  const now = Tabs.stageLines(text, stage);
  const pass = app.model.passes[stage].name;
  if (!now) return [T.el("h2", {}, "IR text"), T.el("p", {}, `The text after ${pass} is left out, since the graph is large. This command prints it:`), T.el("pre", { class: "code" }, `treadle inspect MODEL --after ${pass}`)];
  let before = null;
  for (let at = stage - 1; at >= 0 && !before; at--) before = Tabs.stageLines(text, at);
  const known = before && new Set(before);
  const fresh = known ? now.filter((line) => !known.has(line)).length : 0;
  const chars = Math.max(...now.map((line) => text.lines[line].length), 1);
  const lines = T.lines(now.length, (at) => T.el("div", { class: `line${known && !known.has(now[at]) ? " plus" : ""}` }, T.el("span", { class: "no", "aria-hidden": "true" }, at + 1), text.lines[now[at]] || " "), { label: `IR text after ${pass}`, chars });
  return [T.el("h2", {}, "IR text", T.el("small", {}, stage ? ` after ${pass}` : " as declared")), stage ? T.el("p", { class: "note" }, fresh ? `${T.plural(fresh, "line")} not in the text before this pass.` : "The same text as before this pass.") : null, lines].filter(Boolean);
};

Tabs.source = async (app, { line } = {}) => {
  const source = await app.section("source");
  if (!source) return [T.el("h2", {}, "Source"), T.el("p", {}, "This program was not compiled to code; the report of a compiled model has it.")];
  const chars = source.lines.reduce((most, each) => Math.max(most, each.length), 1);
  const byLine = new Map();
  for (const [number, pairs] of Object.entries(source.code)) for (let at = pairs[0]; at <= pairs[1]; at++) byLine.set(at, Number(number));
  const lines = T.lines(source.lines.length, (at) => {
    const number = byLine.get(at);
    const row = T.el("div", { class: `line${at === line ? " marked" : ""}${number === undefined ? "" : " linked"}` }, T.el("span", { class: "no", "aria-hidden": "true" }, at + 1), source.lines[at] || " ");
    if (number !== undefined) row.addEventListener("click", () => app.go({ stage: Tabs.last(app), number, tab: "source" }));
    return row;
  }, { label: "Source of the backend", chars });
  if (line !== undefined) requestAnimationFrame(() => lines.to(line));
  return [T.el("h2", {}, "Source", T.el("small", {}, ` of the ${app.head.backend} backend`)), T.el("p", { class: "note" }, "A click on a line of an op selects it in the graph."), lines];
};
