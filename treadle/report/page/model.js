"use strict";
// The graph of one program, read from its data: the boxes of each stage, where each op is, and what each pass changed.

const SEP = "\u001f"; // between the scopes of a box's path

class GraphModel {
  constructor(data) {
    this.metrics = data.metrics;
    this.nodes = data.nodes;
    this.passes = data.passes;
    this.bodies = data.bodies.map((body) => GraphModel.body(body));
    this.changes = data.stages;
    this.slots = data.slots;
    this.known = [];
  }

  /** A model without ops, in place of one whose data is damaged. */
  static empty() {
    const metrics = { width: 172, height: 44, across: 24, down: 30 };
    return new GraphModel({ metrics, nodes: [], passes: [{ name: "", ops: 0 }], bodies: [{}, { items: [["box", "main"]], at: [0, 86], held: [0, 86] }], slots: {}, stages: [{ "": 1, main: 0 }] });
  }

  static body(data) {
    const items = (data.items || []).map((facts, at) => {
      const [kind, ...rest] = facts;
      const item = { kind, row: data.at[2 * at], x: data.at[2 * at + 1], heldRow: data.held[2 * at], heldX: data.held[2 * at + 1] };
      if (kind === "op") [item.number, item.record] = rest;
      else if (kind === "call") [item.number, item.record, item.path, item.numbers] = rest;
      else if (kind === "box") [item.path] = rest;
      else [item.value, item.label, item.type, item.values] = rest;
      item.key = kind === "box" ? `b:${item.path}` : item.number !== undefined ? `n:${item.number}` : `${kind}:${item.value}:${item.label}`;
      return item;
    });
    const edges = [];
    const triples = data.edges || [];
    for (let at = 0; at < triples.length; at += 3) {
      edges.push({ from: items[triples[at]], to: items[triples[at + 1]], value: triples[at + 2], bends: null, heldBends: null });
    }
    const several = new Map(items.filter((item) => item.values).map((item) => [item.value, item.values.map(([value]) => value)]));
    for (const edge of edges) edge.several = several.get(edge.value) || null;
    const bundles = data.bundles || [];
    for (let at = 0; at < bundles.length; at += 2) edges[bundles[at]].several = bundles[at + 1];
    for (const [name, list] of [["bends", data.bends || []], ["heldBends", data.held_bends || []]]) {
      for (let at = 0; at < list.length; at += 2) edges[list[at]][name] = list[at + 1];
    }
    return { items, edges, byKey: new Map(items.map((item) => [item.key, item])) };
  }

  /** Return the data for drawing a stage: boxes, the box of each op, callers, and the changes of its pass. */
  at(stage) {
    if (this.known[stage]) return this.known[stage];
    const before = stage ? this.at(stage - 1) : null;
    const change = this.changes[stage];
    if (before && !Object.keys(change).length && !this.passes[stage].added && !this.passes[stage].removed) {
      return (this.known[stage] = { ...before, ...this.runs(stage, before), stage, added: new Set(), removed: new Set(), altered: new Set(this.passes[stage].altered || []), marks: new Map() });
    }
    const boxes = new Map(before ? before.boxes : []);
    for (const [path, at] of Object.entries(change)) {
      if (at === null) boxes.delete(path);
      else boxes.set(path, this.bodies[at]);
    }
    const where = new Map();
    const callers = new Map();
    const counts = new Map();
    const records = new Map();
    for (const [path, body] of boxes) {
      for (const item of body.items) {
        if (item.number === undefined) continue;
        for (const number of item.numbers || [item.number]) where.set(number, path);
        records.set(item.number, item.record);
        if (item.kind === "call" && !callers.has(item.path)) callers.set(item.path, { item, path });
      }
    }
    for (const path of where.values()) for (const each of GraphModel.prefixes(path)) counts.set(each, (counts.get(each) || 0) + 1);
    const pass = this.passes[stage];
    const info = {
      stage, boxes, where, callers, counts, records, ...this.runs(stage, before),
      added: new Set(pass.added || []), removed: new Set(pass.removed || []), altered: new Set(pass.altered || []), marks: new Map(),
    };
    const mark = (path, kind) => {
      for (const each of GraphModel.prefixes(path)) {
        const found = info.marks.get(each) || { added: 0, removed: 0 };
        found[kind] += 1;
        info.marks.set(each, found);
      }
    };
    for (const number of info.added) if (where.has(number)) mark(where.get(number), "added");
    for (const number of info.removed) if (before && before.where.has(number)) mark(before.where.get(number), "removed");
    return (this.known[stage] = info);
  }

  /** Return how often a run calls each function that it does not call once, and the ops that depend on weights alone. */
  runs(stage, before) {
    const { calls, once } = this.passes[stage];
    return { calls: calls ? new Map(Object.entries(calls)) : before ? before.calls : new Map(), once: once ? new Set(once) : before ? before.once : new Set() };
  }

  /**
   * The cost of all calls of each op and each box in a run: `flops`, `bytes` or `seconds`, and the total of the entries.
   * `seconds` has the times of ops; a call takes the time of the function that it calls.
   */
  costs(stage, name, seconds = null) {
    const info = this.at(stage);
    info.costs ??= new Map();
    if (info.costs.has(name)) return info.costs.get(name);
    const [items, boxes] = [new Map(), new Map()];
    const times = (home) => info.calls.get(home) ?? 1;
    const whole = (home) => {
      let sum = 0;
      for (const [path, body] of info.boxes) if (path.split(SEP)[0] === home) for (const item of body.items) if (item.number !== undefined) sum += cost(item, home);
      return sum;
    };
    const functions = new Map();
    const cost = (item, home) => {
      if (name !== "seconds") return info.once.has(item.number) ? 0 : this.nodes[item.record][name === "flops" ? 5 : 6] * times(home) * (item.numbers || [0]).length;
      if (item.kind !== "call") return seconds[item.number] || 0;
      if (!functions.has(item.path)) functions.set(item.path, whole(item.path));
      return (functions.get(item.path) * item.numbers.length * times(home)) / Math.max(times(item.path), 1);
    };
    for (const [path, body] of info.boxes) {
      for (const item of body.items) {
        if (item.number === undefined) continue;
        const each = cost(item, path.split(SEP)[0]);
        items.set(item.number, each);
        for (const prefix of GraphModel.prefixes(path)) boxes.set(prefix, (boxes.get(prefix) || 0) + each);
      }
    }
    const found = { items, boxes, total: this.entries(stage).reduce((sum, entry) => sum + (boxes.get(entry) || 0), 0) };
    info.costs.set(name, found);
    return found;
  }

  /** Return a key of a value that is unique in the program: for an input of a function, it includes the function. */
  static qualified(home, value) {
    return value.startsWith("i:") ? `${home}${SEP}${value}` : value;
  }

  /** Return the function of a value, and the value's key in that function. */
  split(qualified, stage) {
    const at = qualified.indexOf(SEP);
    if (at >= 0) return [qualified.slice(0, at), qualified.slice(at + 1)];
    const path = this.at(stage).where.get(Number(qualified.split(".")[0]));
    return [path === undefined ? "" : path.split(SEP)[0], qualified];
  }

  /** The readers and the type of each value of a stage. */
  values(stage) {
    const info = this.at(stage);
    if (info.values) return info.values;
    const found = new Map();
    for (const [path, body] of info.boxes) {
      const home = path.split(SEP)[0];
      const of = (value) => {
        const key = GraphModel.qualified(home, value);
        if (!found.has(key)) found.set(key, { readers: [], type: "", name: "" });
        return found.get(key);
      };
      for (const item of body.items) {
        if (item.value === undefined) continue;
        for (const [value, name, type] of item.values || [[item.value, item.label, item.type]]) {
          Object.assign(of(value), { type, name });
        }
      }
      for (const edge of body.edges) {
        if (edge.to.number !== undefined) for (const value of edge.several || [edge.value]) of(value).readers.push(edge.to.number);
      }
    }
    return (info.values = found);
  }

  value(qualified, stage) {
    const known = this.values(stage).get(qualified) || { readers: [], type: "", name: "" };
    const [, key] = this.split(qualified, stage);
    if (key.startsWith("i:")) return { ...known, name: key.slice(2), producer: null };
    const number = Number(key.split(".")[0]);
    const node = this.light(number, stage);
    const first = key.endsWith(".0");
    return { ...known, producer: number, name: node ? (first ? node.name : known.name || `${node.name} ${key.split(".")[1]}`) : known.name, type: node && first ? node.type : known.type };
  }

  static prefixes(path) {
    const found = [];
    for (let at = path.indexOf(SEP); at >= 0; at = path.indexOf(SEP, at + 1)) found.push(path.slice(0, at));
    found.push(path);
    return found;
  }

  /** Return the last stage up to `near` at which an op exists, or else the first stage after it; null if there is none. */
  stageOf(number, near) {
    for (let at = near; at >= 0; at--) if (this.at(at).where.has(number)) return at;
    for (let at = near + 1; at < this.passes.length; at++) if (this.at(at).where.has(number)) return at;
    return null;
  }

  light(number, stage) {
    const info = this.at(stage);
    let record = info.records.get(number);
    if (record === undefined && info.where.has(number)) {
      const item = info.boxes.get(info.where.get(number)).items.find((each) => each.numbers && each.numbers.includes(number));
      record = item && item.record;
    }
    if (record === undefined) return null;
    const [op, name, type, scope, line, flops, bytes] = this.nodes[record];
    return { op, name, type, scope, line, flops, bytes, record, number, path: info.where.get(number) };
  }

  entries(stage) {
    return this.at(stage).boxes.get("").items.map((item) => item.path);
  }

  /** The address of an op in a link: its function and scope, and its name if several ops share them. */
  addresses(stage) {
    const info = this.at(stage);
    if (info.addresses) return info.addresses;
    const groups = new Map();
    for (const [number, path] of info.where) {
      const node = this.light(number, stage);
      const home = path.split(SEP)[0];
      const base = [home === "main" ? "" : home, node.scope].filter(Boolean).join(".") || home;
      if (!groups.has(base)) groups.set(base, []);
      groups.get(base).push(node);
    }
    const found = new Map();
    for (const [base, nodes] of groups) {
      const seen = new Map();
      for (const node of nodes) {
        let address = nodes.length === 1 ? base : `${base}:${node.name || node.op}`;
        const count = (seen.get(address) || 0) + 1;
        seen.set(address, count);
        if (count > 1) address += `~${count}`;
        found.set(node.number, address);
      }
    }
    info.byAddress = new Map([...found].map(([number, address]) => [address, number]));
    return (info.addresses = found);
  }

  /** Return the op or the box of an address: {number} or {path}; null if there is none. */
  find(address, stage) {
    this.addresses(stage);
    const info = this.at(stage);
    const number = info.byAddress.get(address) ?? (/^n?\d+$/.test(address) && info.where.has(Number(address.replace("n", ""))) ? Number(address.replace("n", "")) : undefined);
    if (number !== undefined) return { number };
    for (const path of info.boxes.keys()) {
      if (!path) continue;
      const dotted = path.split(SEP).join(".");
      if (dotted === address || dotted === `main.${address}`) return { path };
    }
    for (const [known, each] of info.byAddress) if (known.startsWith(`${address}:`) || known.startsWith(`${address}.`)) return { number: each };
    return null;
  }
}
