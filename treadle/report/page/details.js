"use strict";
// The facts of what is selected: an op, a value, a box, or the pass.

const Details = {};

/** A button that selects an op; `app` is the page. */
Details.op = (app, number, text, stage = app.state.stage) => {
  const at = app.model.stageOf(number, stage);
  const node = at === null ? null : app.model.light(number, at);
  if (!node) return T.el("span", {}, text || "an op");
  const gone = at !== app.state.stage;
  return T.el("button", { type: "button", class: "link", title: `${node.scope} ${node.line}${gone ? `, after ${app.model.passes[at].name}` : ""}`.trim(), onclick: () => app.go({ number, stage: at }) },
    text || `${node.op} ${T.fit(node.scope || (node.name === node.op ? "" : node.name), 60)}`.trim());
};

Details.value = (app, key, text) => T.el("button", { type: "button", class: "link", onclick: () => app.pickValue(key) }, text);

/** The ops of the declared graph that an op computes, with the passes that replaced them. */
Details.origins = (model, number, stage) => {
  const found = new Map();
  const walk = (each, at) => {
    for (let place = at; place > 0; place--) {
      const pass = model.passes[place];
      if (!pass.added || !pass.added.includes(each)) continue;
      const link = (pass.replaced || []).find(([made]) => made === each);
      if (!link) return found.set(each, place);
      for (const old of link[1]) walk(old, place - 1);
      return;
    }
    found.set(each, 0);
  };
  walk(number, stage);
  return [...found];
};

/** The numbers of an op and of all ops that it came from, back to the declared graph. */
Details.ancestors = (model, number) => {
  const found = new Set([number]);
  for (let at = model.passes.length - 1; at > 0; at--) {
    for (const [made, old] of model.passes[at].replaced || []) if (found.has(made)) for (const each of old) found.add(each);
  }
  return found;
};

/** The differences of an op between two stages, in words. */
Details.changes = (app, number, at, details) => {
  const [old, now] = [at - 1, at].map((stage) => app.model.light(number, stage));
  if (!old || !now) return "its operands";
  const operands = [old, now].map((node) => JSON.stringify((details.nodes[node.record] || {}).operands));
  const parts = [operands[0] !== operands[1] && "its operands", old.type !== now.type && "its type", old.flops !== now.flops && "its FLOPs", old.bytes !== now.bytes && "its bytes"];
  return parts.filter(Boolean).join(", ") || "its attributes";
};

/** The history of an op and of the ops that it came from: the passes that added, changed, replaced or removed them. */
Details.history = (app, number, details) => {
  const { model } = app;
  const items = [];
  const family = Details.ancestors(model, number);
  model.passes.forEach((pass, at) => {
    const goTo = (each) => T.el("button", { type: "button", class: "link", onclick: () => app.go({ stage: at, number: model.at(at).where.has(each) ? each : undefined }) }, pass.name);
    const said = new Set(); // several ancestors may have been replaced together
    for (const each of family) {
      const link = (pass.replaced || []).find(([made]) => made === each);
      const name = each === number ? "it" : Details.op(app, each, null, at);
      if ((pass.added || []).includes(each)) {
        items.push(T.el("li", { class: "plus" }, goTo(each), ...(link ? [" made ", name, " from ", Details.list(app, link[1], at - 1)] : [" added ", name])));
        for (const old of link ? link[1] : []) said.add(old);
      } else if (link) items.push(T.el("li", {}, goTo(each), " gave ", name, " the work of ", Details.list(app, link[1], at - 1)));
      else if ((pass.altered || []).includes(each)) items.push(T.el("li", {}, goTo(each), " changed ", ...(each === number ? [] : [name, ": "]), Details.changes(app, each, at, details)));
    }
    for (const each of family) {
      if (said.has(each) || !(pass.removed || []).includes(each)) continue;
      const heirs = (pass.replaced || []).filter(([, old]) => old.includes(each)).map(([made]) => made);
      items.push(T.el("li", { class: "minus" }, goTo(each), heirs.length ? " replaced " : " removed ", each === number ? "it" : Details.op(app, each, null, at - 1), ...(heirs.length ? [" by ", Details.list(app, heirs, at)] : [])));
    }
  });
  return items.length ? T.el("ol", { class: "history" }, items.slice(0, 200)) : T.el("p", { class: "note" }, "No pass changed this op: it is as declared.");
};

Details.list = (app, numbers, stage, most = 12) => {
  const parts = [];
  numbers.slice(0, most).forEach((number, at) => parts.push(at ? ", " : "", Details.op(app, number, null, stage)));
  if (numbers.length > most) parts.push(` and ${numbers.length - most} more`);
  return T.el("span", {}, parts);
};

Details.node = async (app, number) => {
  const { model, state } = app;
  const at = model.stageOf(number, state.stage);
  const node = model.light(number, at);
  if (!node) return [T.el("p", {}, "This op is not in the graph.")];
  let details;
  try {
    details = await app.section("details");
  } catch (error) {
    details = { nodes: [], final: { storage: {} }, error: error.message };
  }
  const facts = details.nodes[node.record] || { operands: [], results: [] };
  const parts = [
    T.el("h2", {}, node.op, node.name === node.op ? null : T.el("small", {}, ` ${node.name}`)),
    facts.equation ? T.el("p", { class: "equation" }, facts.equation) : null,
    at !== state.stage ? T.el("p", { class: "note" }, `As after ${model.passes[at].name}: it is not in the graph after ${model.passes[state.stage].name}.`) : null,
    T.pairs([
      ["Line", node.line ? T.el("code", {}, node.line) : ""],
      ["Scope", node.scope ? T.el("code", {}, node.scope) : ""],
      ["Axis rule", facts.rule ? T.el("code", {}, facts.rule) : ""],
      ["FLOPs", node.flops ? `${T.human(node.flops)} (${T.count(node.flops)})` : ""],
      ["Bytes", node.bytes ? `${T.human(node.bytes, "B")} read and written` : ""],
      ["FLOPs per byte", node.flops && node.bytes ? Number((node.flops / node.bytes).toPrecision(3)) : ""],
      ["Time", details.final.seconds && details.final.seconds[number] ? `${T.seconds(details.final.seconds[number])}, all calls` : ""],
      ["Attributes", facts.attributes && Object.keys(facts.attributes).length ? T.el("code", {}, Object.entries(facts.attributes).map(([k, v]) => `${k}=${v}`).join(", ")) : ""],
      ["Link", T.el("a", { href: app.link({ number, stage: at }) }, model.addresses(at).get(number))],
    ]),
  ];
  if (details.error) parts.push(T.el("p", { class: "error" }, details.error));
  const home = node.path.split(SEP)[0];
  parts.push(T.el("h3", {}, "Operands"));
  parts.push(facts.operands.length ? T.el("ul", { class: "values" }, facts.operands.slice(0, 200).map(([slot, kind, key, type]) =>
    T.el("li", {}, slot ? `${slot}: ` : "", kind === "value" ? Details.value(app, GraphModel.qualified(home, key), model.value(GraphModel.qualified(home, key), at).name) : T.el("code", {}, key), " ", T.el("span", { class: "type" }, type),
      kind === "value" ? "" : T.el("span", { class: "kind" }, ` ${kind === "parameter" ? "weight" : kind}`)))) : T.el("p", { class: "note" }, "none"));
  parts.push(T.el("h3", {}, "Results"));
  parts.push(T.el("ul", { class: "values" }, facts.results.map(([key, label, type]) => {
    const { readers } = model.value(GraphModel.qualified(home, key), at);
    return T.el("li", {}, Details.value(app, GraphModel.qualified(home, key), label), " ", T.el("span", { class: "type" }, type), T.el("div", { class: "readers" }, readers.length ? ["read by ", Details.list(app, readers, at)] : "returned, or unused"));
  })));
  const origins = Details.origins(model, number, at);
  if (at && !(origins.length === 1 && origins[0][0] === number)) {
    parts.push(T.el("h3", {}, "Original ops"), T.el("ul", { class: "values" }, origins.map(([each, place]) =>
      T.el("li", {}, Details.op(app, each, null, place), " ", T.el("code", { class: "dim" }, (model.light(each, model.stageOf(each, place)) || {}).line || "")))));
    parts.push(T.el("button", { type: "button", onclick: () => app.go({ stage: 0, numbers: origins.map(([each]) => each) }) }, "Show them in the declared graph"));
  }
  parts.push(T.el("h3", {}, "Passes"), Details.history(app, number, details));
  const stored = details.final.storage[number];
  if (stored) {
    parts.push(T.el("h3", {}, "Storage"), T.table([
      { name: "value", of: (row) => row.name }, { name: "storage", of: (row) => row.storage || "registers" }, { name: "layout", of: (row) => row.form || "" },
      { name: "bytes", of: (row) => row.bytes || "", code: true }, { name: "steps", of: (row) => `${row.first ?? "given"} to ${row.last}` }, { name: "why", of: (row) => row.why, wide: true },
    ], stored, { caption: "Storage of its results" }));
  }
  const source = await app.section("source").catch(() => null);
  const code = source && source.code[number];
  if (code && at === model.passes.length - 1) {
    const lines = [];
    for (let pair = 0; pair < code.length; pair += 2) {
      const end = Math.min(code[pair + 1], code[pair] + 60);
      for (let line = code[pair]; line <= end; line++) lines.push(source.lines[line]);
      if (end < code[pair + 1]) lines.push(`    … ${code[pair + 1] - end} more lines`);
    }
    parts.push(T.el("h3", {}, "Code"), T.el("pre", { class: "code", tabindex: "0" }, lines.join("\n")),
      T.el("button", { type: "button", onclick: () => app.showTab("source", { line: code[0] }) }, "Show it in the source"));
  } else if (at !== model.passes.length - 1) {
    const last = model.passes.length - 1;
    if (model.at(last).where.has(number)) parts.push(T.el("h3", {}, "Storage and code"), T.el("button", { type: "button", onclick: () => app.go({ number, stage: last }) }, "Show them after the last pass"));
  }
  return parts.filter(Boolean);
};

Details.ofValue = (app, qualified) => {
  const { model, state } = app;
  const value = model.value(qualified, state.stage);
  return [
    T.el("h2", {}, "Value ", T.el("small", {}, value.name)),
    T.pairs([
      ["Type", T.el("code", {}, value.type)],
      ["Made by", value.producer === null ? "an input" : Details.op(app, value.producer)],
      ["Function", model.split(qualified, state.stage)[0]],
    ]),
    T.el("h3", {}, T.plural(value.readers.length, "reader")),
    T.el("ul", { class: "values" }, value.readers.map((each) => T.el("li", {}, Details.op(app, each), " ", T.el("code", { class: "dim" }, (model.light(each, state.stage) || {}).line || "")))),
  ];
};

/** The values of a port or an edge that is drawn for several. */
Details.port = (app, item) => {
  const entry = app.view.byKey.get(app.view.selected.key);
  const box = entry && entry.parent ? entry.parent.item.path : app.view.single;
  const home = (box || "").split(SEP)[0];
  const qualified = (value) => (value.includes(SEP) ? value : GraphModel.qualified(home, value));
  return [
    T.el("h2", {}, item.label),
    T.el("ul", { class: "values" }, item.values.map(([value, name, type]) => T.el("li", {}, Details.value(app, qualified(value), name), " ", T.el("span", { class: "type" }, type)))),
  ];
};

Details.box = (app, item) => {
  const { model, state } = app;
  const info = model.at(state.stage);
  const totals = new Map();
  let [flops, bytes] = [0, 0];
  for (const [number, path] of info.where) {
    if (path !== item.path && !path.startsWith(item.path + SEP)) continue;
    const node = model.light(number, state.stage);
    totals.set(node.op, (totals.get(node.op) || 0) + 1);
    if (!info.callers.has(node.op)) { flops += node.flops || 0; bytes += node.bytes || 0; }
  }
  const ops = [...totals].sort((a, b) => b[1] - a[1]);
  const calls = item.numbers || [];
  const lights = calls.map((number) => model.light(number, state.stage));
  return [
    T.el("h2", {}, GraphView.last(item.path), item.kind === "call" ? T.el("small", {}, calls.length > 1 ? ` called ${calls.length} times` : " a call") : T.el("small", {}, " box")),
    T.pairs([
      ["Path", T.el("code", {}, item.path.split(SEP).join("."))],
      ["Ops", ops.reduce((sum, [, count]) => sum + count, 0)],
      ["FLOPs", flops ? `${T.human(flops)} each time` : ""],
      ["Bytes", bytes ? `${T.human(bytes, "B")} each time` : ""],
      ["Link", T.el("a", { href: app.link({ path: item.path, stage: state.stage }) }, item.path.split(SEP).join("."))],
    ]),
    T.el("h3", {}, "Ops by kind"),
    T.table([{ name: "op", of: ([op]) => op, sort: ([op]) => op }, { name: "number", of: ([, count]) => T.count(count), sort: ([, count]) => count, number: true }], ops, { caption: "Ops by kind" }),
    calls.length ? T.el("h3", {}, "Calls") : null,
    calls.length ? T.el("ul", { class: "values" }, calls.slice(0, 200).map((number, at) => T.el("li", {}, Details.op(app, number, (lights[at] || {}).scope || `call ${at}`), " ", T.el("code", { class: "dim" }, (lights[at] || {}).line || "")))) : null,
  ].filter(Boolean);
};

/** The changes of the pass that the slider selects. */
Details.pass = (app) => {
  const { model, state } = app;
  const pass = model.passes[state.stage];
  const parts = [T.el("h2", {}, state.stage ? "Pass " : "", pass.name, T.el("small", {}, state.stage ? ` ${state.stage} of ${model.passes.length - 1}` : ""))];
  if (!state.stage) parts.push(T.el("p", {}, "The graph before any pass. Click an op for its facts, a box to open it, an edge for all readers of its value."));
  const replaced = pass.replaced || [];
  const made = new Set(replaced.map(([each]) => each));
  const old = new Set(replaced.flatMap(([, each]) => each));
  if (replaced.length) {
    const groups = new Map();
    for (const [each, before] of replaced) {
      const key = before.join();
      if (!groups.has(key)) groups.set(key, { before, after: [] });
      groups.get(key).after.push(each);
    }
    parts.push(T.el("h3", {}, "Replacements"), T.el("ul", { class: "values" }, [...groups.values()].slice(0, 200).map(({ before, after }) =>
      T.el("li", {}, Details.list(app, before, state.stage - 1), " → ", Details.list(app, after, state.stage)))));
    if (groups.size > 200) parts.push(T.el("p", { class: "note" }, `and ${T.count(groups.size - 200)} more`));
  }
  const plain = (pass.added || []).filter((each) => !made.has(each));
  const gone = (pass.removed || []).filter((each) => !old.has(each));
  if (plain.length) parts.push(T.el("h3", {}, "Added"), T.el("p", {}, Details.list(app, plain, state.stage, 60)));
  if (gone.length) parts.push(T.el("h3", {}, "Removed"), T.el("p", {}, Details.list(app, gone, state.stage - 1, 60)));
  if (state.stage && !replaced.length && !plain.length && !gone.length) {
    parts.push(T.el("p", {}, (pass.altered || []).length ? `It changed operands of ${T.plural(pass.altered.length, "op")}.` : "It changed nothing."));
  }
  parts.push(T.el("p", { class: "note" }, `${T.plural(pass.ops, "op")} in the distinct functions after it.`));
  return parts;
};
