"use strict";
// The page: the state of the program, the pass, the selection and the tab; the link in the address; keys and search.

// Tabs about the ops of the first program. Opening one selects that program.
const OF_MODEL = new Set(["costs", "fusion", "memory", "storage", "profile", "attention", "log"]);
const TITLES = { selected: "Selected", text: "IR text", source: "Source" };

class App {
  async start() {
    this.state = { program: 0, stage: 0, number: null, path: null, value: null, tab: "overview" };
    this.models = [];
    try {
      this.head = await Data.section("head");
      if (!this.head) throw new Error("This file has no report.");
    } catch (error) {
      T.id("body").replaceChildren(T.el("p", { class: "error" }, error.message));
      return;
    }
    const { head } = this;
    T.id("title").textContent = T.shown(head.model, 120);
    T.id("subtitle").textContent = T.shown([head.backend && `${head.backend} on ${head.target}`, this.sizesText().replace(" at ", ""), `Treadle ${head.version}`].filter(Boolean).join("  ·  "), 200);
    const select = T.id("program");
    select.replaceChildren(...head.programs.map((name, at) => T.el("option", { value: at }, name)));
    T.id("program-field").hidden = head.programs.length < 2;
    select.addEventListener("change", () => this.setProgram(Number(select.value)));
    this.tabs = [["selected", TITLES.selected], ...head.tabs, ["text", TITLES.text], ["source", TITLES.source]];
    if (!this.hasTab("overview")) this.state.tab = "selected";
    this.makeTabs();
    this.view = new GraphView(T.id("graph"), {
      onnode: (number, key, ghost) => this.picked({ number, key, ghost }),
      onbox: (item, key) => this.picked({ item, key }),
      onvalue: (value, key) => this.pickValue(value, key),
      onvalues: (values) => this.pickValues(values),
      onopen: () => this.crumbs(),
      onfacts: () => T.id("panel").focus(),
    });
    this.pairs = await this.beside();
    this.listen();
    try {
      await this.load(0);
    } catch (error) {
      this.models[0] = GraphModel.empty();
      await this.load(0);
      T.id("graph").replaceChildren(T.el("p", { class: "error" }, error.message));
    }
    T.id("hold").checked = false;
    await this.fromLink(true);
    window.addEventListener("hashchange", () => this.fromLink(false));
    document.documentElement.dataset.ready = "yes";
  }

  // -- two builds side by side -----------------------------------------------------------------------------------

  /** Show a second graph if the report compares two builds. Return the corresponding ops of each. */
  async beside() {
    if (!this.hasTab("diff")) return null;
    const found = await Data.section("diff").catch(() => null);
    if (!found || !found.data || this.head.programs.length !== 2) return null;
    this.state.tab = "diff";
    const host = T.el("div", { id: "other", class: "graph" });
    T.id("graph").after(host);
    const pick = (number) => {
      const numbers = this.partners(number, 1 - this.state.program);
      if (numbers.length) this.go({ number: numbers[0], stage: Tabs.last(this) });
      else this.pickOther(number);
    };
    this.other = new GraphView(host, { onnode: (number) => pick(number), onbox: () => {}, onvalue: () => {}, onvalues: () => {}, onopen: () => {}, onfacts: () => T.id("panel").focus() });
    this.other.scroll.setAttribute("aria-label", "Graph of the other build");
    const pairs = [new Map(), new Map()];
    for (const sides of found.data.pairs) {
      for (const side of [0, 1]) for (const number of sides[side]) pairs[side].set(number, [...new Set([...(pairs[side].get(number) || []), ...sides[1 - side]])]);
    }
    return pairs;
  }

  /** Return the ops of the other build that correspond to an op of this one. */
  partners(number, program) {
    return this.pairs[program].get(number) || [];
  }

  /** Load the other build into the second graph. */
  async loadOther() {
    const program = 1 - this.state.program;
    if (!this.models[program]) this.models[program] = new GraphModel(await Data.section(`graph:${program}`));
    const model = this.models[program];
    this.other.load(model);
    this.other.show(model.passes.length - 1, false);
    this.other.fit();
    for (const [host, at] of [["graph", this.state.program], ["other", program]]) {
      const old = T.id(host).querySelector("h2");
      if (old) old.remove();
      T.id(host).prepend(T.el("h2", {}, T.shown(this.head.programs[at], 60)));
    }
  }

  /** Select ops in the second graph, and show the first of them. */
  markOther(numbers) {
    const { other } = this;
    const key = numbers.length ? other.reveal(numbers[0]) : null;
    other.selected.key = key;
    other.refresh();
    other.select({ numbers, key });
    if (key) other.center(key, { readable: true });
  }

  /** Select an op of the other build that has no counterpart in this one. */
  pickOther(number) {
    const node = this.other.model.light(number, this.other.stage);
    Object.assign(this.state, { number: null, path: null, item: null, value: null, numbers: null });
    this.view.selected.key = null;
    this.view.select({});
    this.markOther([number]);
    this.say(`${node.op} ${node.name} is only in ${this.head.programs[1 - this.state.program]}`);
    this.showTab("diff", node);
  }

  // -- programs and passes ---------------------------------------------------------------------------------------

  section(name) {
    return Data.section(`${name}:${this.state.program}`);
  }

  programName() {
    return this.head.programs[this.state.program];
  }

  async load(program) {
    if (!this.models[program]) {
      const data = await Data.section(`graph:${program}`);
      if (!data) throw new Error("The report has no graph.");
      this.models[program] = new GraphModel(data);
    }
    this.state.program = program;
    this.model = this.models[program];
    this.state.stage = this.model.passes.length - 1;
    Object.assign(this.state, { number: null, path: null, value: null });
    this.back = null;
    T.id("program").value = program;
    this.view.load(this.model);
    this.view.times = null;
    this.makeTrack();
    this.view.show(this.state.stage, T.id("hold").checked);
    this.openAround();
    this.view.fit();
    if (this.pairs) await this.loadOther();
    this.saidPass();
    this.section("details").then((details) => {
      if (!details) return;
      const of = (details.final && details.final.seconds) || null;
      this.view.times = of;
      T.id("heat").querySelector('[value="seconds"]').disabled = !of;
    }, () => {});
  }

  async setProgram(program) {
    await this.load(program);
    this.showTab(program && OF_MODEL.has(this.state.tab) ? "selected" : this.state.tab);
    this.link();
  }

  /** Open the boxes that contain most of the model, if the graph stays small. */
  openAround() {
    const { view } = this;
    for (let depth = 0; depth < 2; depth++) {
      const inside = (entry) => view.single || entry.key.startsWith(view.main + STEP);
      const boxes = view.flat.filter((entry) => (entry.kind === "box" || entry.kind === "call") && !entry.op && !entry.child && inside(entry));
      const most = boxes.sort((a, b) => (view.info.counts.get(b.item.path) || 0) - (view.info.counts.get(a.item.path) || 0))[0];
      if (!most || view.flat.length > 60) break;
      const body = view.info.boxes.get(most.item.path);
      if (!body || body.items.length > 60) break;
      view.open.add(most.key);
      view.arrange();
    }
    view.refresh();
  }

  makeTrack() {
    const { passes } = this.model;
    const range = T.id("pass");
    range.max = passes.length - 1;
    range.value = this.state.stage;
    const changed = (at) => !at || passes[at].added || passes[at].removed || passes[at].altered;
    this.changing = passes.map((_, at) => at).filter((at) => changed(at));
    T.id("ticks").replaceChildren(...passes.map((_, at) => {
      const tick = T.el("span", { class: changed(at) ? "tick changed" : "tick" });
      tick.style.left = `${passes.length > 1 ? (100 * at) / (passes.length - 1) : 0}%`;
      return tick;
    }));
    T.id("pass-name").replaceChildren(...passes.map((pass, at) => T.el("option", { value: at }, `${at ? `${at}. ` : ""}${pass.name}${changed(at) ? "" : " (no change)"}`)));
  }

  saidPass() {
    const { stage } = this.state;
    const pass = this.model.passes[stage];
    T.id("pass").value = stage;
    T.id("pass").setAttribute("aria-valuetext", T.shown(stage ? `${pass.name}, ${stage} of ${this.model.passes.length - 1}` : pass.name));
    T.id("pass-name").value = stage;
    const [added, removed] = [(pass.added || []).length, (pass.removed || []).length];
    T.id("changes").replaceChildren(
      added ? T.el("span", { class: "plus" }, `+${added}`) : "", added && removed ? " " : "", removed ? T.el("span", { class: "minus" }, `−${removed}`) : "",
      !added && !removed ? T.el("span", { class: "dim" }, stage ? ((pass.altered || []).length ? "operands changed" : "no change") : "as declared") : "", T.el("span", { class: "dim" }, `  ${T.plural(pass.ops, "op")}`));
    const back = T.id("back");
    back.hidden = this.back === null || this.back === undefined || this.back === stage;
    if (!back.hidden) back.textContent = `Back to ${this.back}. ${this.model.passes[this.back].name}`;
    T.id("before").disabled = !stage;
    T.id("after").disabled = stage === this.model.passes.length - 1;
  }

  setStage(stage, held = true) {
    if (held && !this.chose) T.id("hold").checked = true;
    this.state.stage = stage;
    this.back = null;
    const began = performance.now();
    this.view.show(stage, T.id("hold").checked);
    document.documentElement.dataset.took = (performance.now() - began).toFixed(1);
    this.saidPass();
    this.marks();
    this.crumbs();
    if (["selected", "text"].includes(this.state.tab)) this.showTab(this.state.tab);
    this.link();
  }

  nextChange(forth) {
    const { stage } = this.state;
    const found = forth ? this.changing.find((at) => at > stage) : this.changing.findLast((at) => at < stage);
    this.setStage(found ?? (forth ? this.model.passes.length - 1 : 0));
  }

  stageOfPass(name, at) {
    const { passes } = this.model;
    if (passes[at] && passes[at].name === name) return at;
    const found = passes.findIndex((pass) => pass.name === name);
    return found < 0 ? null : found;
  }

  stageText(stage) {
    return stage ? `after pass ${stage}, ${this.model.passes[stage].name}` : "as declared";
  }

  // -- selection -------------------------------------------------------------------------------------------------

  marks() {
    const { state, view } = this;
    if (this.pairs && this.other.model) {
      const numbers = state.numbers || (state.number === null ? [] : [state.number]);
      this.markOther([...new Set(numbers.flatMap((number) => this.partners(number, state.program)))]);
    }
    view.select({ numbers: state.numbers || (state.number === null ? [] : [state.number]), value: state.value, key: view.selected.key, stop: state.stop });
  }

  /** Select the item that was clicked in the graph. */
  picked({ number, item, key, ghost }) {
    Object.assign(this.state, { number: number ?? null, path: item && item.path ? item.path : null, item: item || null, value: null, numbers: null, stop: null });
    if (ghost && number !== undefined) this.state.number = number;
    this.view.selected.key = key;
    this.marks();
    const node = number === undefined ? null : this.model.light(number, this.model.stageOf(number, this.state.stage));
    this.say(node ? `${node.op} ${node.name} ${node.type}` : item.values ? item.label : `${GraphView.last(item.path)}, ${T.plural(this.view.info.counts.get(item.path) || 0, "op")}, ${this.view.open.has(key) ? "open" : "folded"}`);
    this.showTab("selected");
    this.link();
  }

  pickValue(value, key) {
    const known = this.model.value(value, this.state.stage);
    Object.assign(this.state, { number: null, path: null, item: null, value, numbers: [...known.readers, ...(known.producer === null ? [] : [known.producer])] });
    if (key) this.view.selected.key = key;
    this.marks();
    this.say(`value ${known.name} ${known.type}, ${T.plural(known.readers.length, "reader")}`);
    this.showTab("selected");
  }

  /** Select several values of one edge. */
  pickValues(values) {
    const known = values.map((value) => [value, this.model.value(value, this.state.stage)]);
    const item = { label: T.plural(values.length, "value"), values: known.map(([value, each]) => [value, each.name, each.type]) };
    Object.assign(this.state, { number: null, path: null, item, value: null, numbers: null });
    this.say(item.label);
    this.showTab("selected");
  }

  /** Go to an op, several ops or a box, at a stage; open the boxes that contain them. */
  go({ number, numbers, path, stage, tab, stop }) {
    const { state, view } = this;
    if (stage !== undefined && stage !== state.stage) {
      this.back ??= state.stage;
      state.stage = stage;
      view.show(stage, T.id("hold").checked);
      this.saidPass();
    }
    const first = number ?? (numbers && numbers[0]);
    Object.assign(state, { number: number ?? null, numbers: numbers || null, path: path ?? null, value: null, item: null, stop: stop ?? null });
    let key = null;
    const others = [];
    if (first !== undefined && first !== null) {
      for (const each of (numbers || []).slice(1, 40)) others.push(view.reveal(each));
      key = view.reveal(first) ?? others.find(Boolean) ?? null;
    } else if (path) {
      key = view.revealBox(path);
      const entry = key && view.byKey.get(key);
      state.item = entry ? entry.item : { path };
    }
    view.selected.key = numbers ? null : key;
    view.refresh();
    this.marks();
    if (key) view.center(key, { readable: true, others });
    this.crumbs();
    this.showTab(tab || "selected");
    this.link();
    this.uncover();
  }

  /** Scroll a page that has the graph above the facts to the graph, if the graph is out of sight. */
  uncover() {
    const box = T.id("graph").getBoundingClientRect();
    if (box.bottom < 120 || box.top > window.innerHeight - 120) T.id("graph").scrollIntoView({ block: "start" });
  }

  /** Show a tab from its start. */
  openTab(name) {
    const shown = this.showTab(name);
    this.link();
    if (T.id("panel").getBoundingClientRect().top < 0) T.id("panel").scrollIntoView({ block: "start" });
    return shown;
  }

  crumbs() {
    const { view, model } = this;
    T.id("unfold").textContent = this.isOpened() ? "Fold all" : "Open all";
    const entry = view.byKey.get(view.selected.key);
    const parts = [];
    for (let each = entry; each; each = each.parent) {
      const label = each.op ? (model.light(each.op.number, model.stageOf(each.op.number, this.state.stage)) || {}).op : each.item.path !== undefined ? GraphView.last(each.item.path) : each.item.label;
      const key = each.key;
      parts.unshift(T.el("button", { type: "button", class: "link", onclick: () => { view.choose(view.byKey.get(key)); view.center(key, { readable: true }); } }, T.fit(label || "", 24)));
    }
    T.id("crumbs").replaceChildren(T.el("span", {}, T.fit(this.head.model, 24)), ...parts.flatMap((part) => [" › ", part]));
  }

  say(text) {
    T.id("live").textContent = T.shown(text, 300);
    this.crumbs();
  }

  setHeat(name) {
    T.id("heat").value = name;
    this.view.heat = name;
    this.view.draw();
  }

  sizesText() {
    const sizes = Object.entries(this.head.sizes);
    return sizes.length ? ` at ${sizes.map(([name, size]) => `${name}=${size}`).join(", ")}` : "";
  }

  // -- tabs ------------------------------------------------------------------------------------------------------

  hasTab(name) {
    return this.tabs ? this.tabs.some(([each]) => each === name) : this.head.tabs.some(([each]) => each === name);
  }

  makeTabs() {
    const list = T.id("tabs");
    list.replaceChildren(...this.tabs.map(([name, title]) =>
      T.el("button", { type: "button", role: "tab", id: `tab-${name}`, "aria-controls": "body", "aria-selected": "false", tabindex: "-1", onclick: () => this.openTab(name) }, title)));
    T.id("body").setAttribute("role", "tabpanel");
    T.id("body").setAttribute("tabindex", "0");
    list.addEventListener("keydown", (event) => {
      const names = this.tabs.map(([name]) => name);
      const at = names.indexOf(this.state.tab);
      const next = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: names.length - 1 }[event.key];
      if (next === undefined) return;
      event.preventDefault();
      const name = names[(next + names.length) % names.length];
      this.openTab(name);
      T.id(`tab-${name}`).focus();
    });
  }

  async showTab(name, more) {
    const changed = this.state.tab !== name;
    this.state.tab = name;
    if (OF_MODEL.has(name) && this.state.program) await this.load(0);
    for (const [each] of this.tabs) {
      const button = T.id(`tab-${each}`);
      button.setAttribute("aria-selected", String(each === name));
      button.setAttribute("tabindex", each === name ? "0" : "-1");
      if (each === name && changed) button.scrollIntoView({ block: "nearest", inline: "nearest" });
    }
    const body = T.id("body");
    body.setAttribute("aria-labelledby", `tab-${name}`);
    const turn = (this.turn = (this.turn || 0) + 1);
    let parts;
    try {
      if (name === "selected") parts = await this.selected();
      else if (name === "text" || name === "source") parts = await Tabs[name](this, more);
      else parts = await Tabs.of(this, name, more);
    } catch (error) {
      parts = [T.el("h2", {}, (this.tabs.find(([each]) => each === name) || [])[1] || name), T.el("p", { class: "error" }, error.message)];
    }
    if (turn !== this.turn) return;
    const top = changed ? 0 : body.scrollTop;
    body.replaceChildren(...parts);
    body.scrollTop = name === "selected" ? 0 : top;
  }

  async selected() {
    const { state } = this;
    if (state.value !== null) return Details.ofValue(this, state.value);
    if (state.number !== null) return Details.node(this, state.number);
    if (state.item) return state.item.values ? Details.port(this, state.item) : Details.box(this, state.item);
    return Details.pass(this);
  }

  // -- links -----------------------------------------------------------------------------------------------------

  /** The address of a selection: `#node=h.attn.q&pass=fuse-linear`. */
  link(given) {
    const { state, model } = this;
    const { number, path, stage } = given || state;
    const parts = [];
    if (number !== null && number !== undefined) {
      const at = model.stageOf(number, stage);
      const address = at === null ? null : model.addresses(at).get(number);
      if (address) parts.push(["node", address]);
    } else if (path) parts.push(["node", path.split(SEP).join(".")]);
    const pass = model.passes[stage];
    const first = model.passes.findIndex((each) => each.name === pass.name);
    if (stage !== model.passes.length - 1) parts.push(["pass", first === stage ? pass.name : `${pass.name}~${stage}`]);
    if (state.program) parts.push(["program", this.programName()]);
    if (!given && state.tab !== "selected" && state.tab !== "overview") parts.push(["tab", state.tab]);
    const hash = `#${parts.map(([name, value]) => `${name}=${encodeURIComponent(value).replace(/%3A/g, ":").replace(/%7E/g, "~")}`).join("&")}`;
    if (given) return hash;
    this.wrote = hash;
    try {
      history.replaceState(null, "", hash === "#" ? " " : hash);
    } catch {
      // A frame in a notebook has no address.
    }
    return hash;
  }

  async fromLink(first) {
    if (!first && location.hash === this.wrote) return;
    const given = new Map();
    for (const part of location.hash.replace(/^#/, "").split("&")) {
      const at = part.indexOf("=");
      if (at < 0) continue;
      try {
        given.set(part.slice(0, at), decodeURIComponent(part.slice(at + 1)));
      } catch {
        // A damaged link selects nothing.
      }
    }
    const program = this.head.programs.indexOf(given.get("program") ?? this.head.programs[0]);
    if (program >= 0 && program !== this.state.program) await this.load(program);
    let stage = this.model.passes.length - 1;
    if (given.has("pass")) {
      const [, name, at] = /^(.*?)(?:~(\d+))?$/s.exec(given.get("pass"));
      stage = this.stageOfPass(name, Number(at ?? -1)) ?? stage;
    }
    const tab = given.get("tab") && this.hasTab(given.get("tab")) ? given.get("tab") : null;
    const found = given.has("node") ? this.model.find(given.get("node"), stage) : null;
    if (found) this.go({ ...found, stage, tab: tab || "selected" });
    else {
      if (stage !== this.state.stage) this.setStage(stage, false);
      if (given.has("node")) this.say(`${given.get("node")} is not in the graph after ${this.model.passes[stage].name}`);
      await this.showTab(tab || (given.has("pass") ? "selected" : this.state.tab));
    }
    this.crumbs();
  }

  // -- search ----------------------------------------------------------------------------------------------------

  search(text) {
    const words = text.toLowerCase().split(/\s+/).filter(Boolean);
    if (!words.length) return [];
    const { model, state } = this;
    const found = [];
    const look = (stage) => {
      for (const number of model.at(stage).where.keys()) {
        if (found.some((each) => each.number === number)) continue;
        const node = model.light(number, stage);
        const all = `${node.op} ${node.name} ${node.scope} ${node.line} ${node.path.split(SEP)[0]}`.toLowerCase();
        if (words.every((word) => all.includes(word))) {
          const [op, name] = [node.op.toLowerCase(), node.name.toLowerCase()];
          const rank = words.reduce((sum, word) => sum + (op === word || name === word ? 0 : op.startsWith(word) || name.startsWith(word) ? 1 : 2), 0);
          found.push({ ...node, stage, rank });
          if (found.length > 2000) return;
        }
      }
    };
    look(state.stage);
    found.sort((a, b) => a.rank - b.rank || a.number - b.number);
    if (!found.length) {
      for (const stage of [0, model.passes.length - 1]) if (stage !== state.stage) look(stage);
    }
    return found;
  }

  showFound(rows) {
    const list = T.id("found");
    const most = 40;
    this.rows = rows.slice(0, most);
    this.row = -1;
    list.replaceChildren(...this.rows.map((row, at) =>
      T.el("li", { role: "option", id: `found-${at}`, "aria-selected": "false", onclick: () => this.takeFound(at) },
        T.el("b", {}, T.fit(row.op, 40)), row.name === row.op ? " " : ` ${T.fit(row.name, 60)} `, T.el("span", { class: "dim" }, T.fit(`${row.scope}  ${row.line}${row.stage === this.state.stage ? "" : `  (after ${this.model.passes[row.stage].name})`}`, 110)))),
    ...(rows.length > most ? [T.el("li", { role: "option", "aria-disabled": "true", class: "dim" }, `and ${T.count(rows.length - most)} more`)] : rows.length ? [] : [T.el("li", { role: "option", "aria-disabled": "true", class: "dim" }, "no op has these words")]));
    list.prepend(T.el("li", { role: "presentation", class: "dim" }, this.rows.length && this.rows[0].stage !== this.state.stage ? `not in the graph ${this.stageText(this.state.stage)}; elsewhere:` : `in the graph ${this.stageText(this.state.stage)}`));
    list.hidden = false;
    T.id("query").setAttribute("aria-expanded", "true");
  }

  hideFound() {
    T.id("found").hidden = true;
    T.id("query").setAttribute("aria-expanded", "false");
    T.id("query").removeAttribute("aria-activedescendant");
  }

  takeFound(at) {
    const row = this.rows[at];
    this.hideFound();
    if (row) {
      this.go({ number: row.number, stage: row.stage });
      this.view.scroll.focus();
    }
  }

  // -- listeners -------------------------------------------------------------------------------------------------

  listen() {
    const on = (name, event, act) => T.id(name).addEventListener(event, act);
    on("pass", "input", (event) => this.setStage(Number(event.target.value)));
    on("pass-name", "change", (event) => this.setStage(Number(event.target.value)));
    on("before", "click", () => this.nextChange(false));
    on("after", "click", () => this.nextChange(true));
    on("back", "click", () => this.setStage(this.back, false));
    on("hold", "change", () => { this.chose = true; this.view.show(this.state.stage, T.id("hold").checked); this.marks(); });
    on("heat", "change", (event) => this.setHeat(event.target.value));
    on("unfold", "click", () => this.unfold());
    on("smaller", "click", () => this.view.zoom(1 / 1.25));
    on("larger", "click", () => this.view.zoom(1.25));
    on("fit", "click", () => this.view.fit(true));
    const isDark = () => (document.documentElement.dataset.theme ? document.documentElement.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
    const sayTheme = () => { T.id("theme").textContent = `Theme: ${isDark() ? "dark" : "light"}`; };
    on("theme", "click", () => {
      const dark = isDark();
      document.documentElement.dataset.theme = dark ? "light" : "dark";
      sayTheme();
    });
    sayTheme();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", sayTheme);
    on("keys", "click", () => this.help());
    on("search", "submit", (event) => { event.preventDefault(); this.takeFound(Math.max(this.row, 0)); });
    on("query", "input", (event) => { const { value } = event.target; if (value.trim()) this.showFound(this.search(value)); else this.hideFound(); });
    on("query", "keydown", (event) => {
      if (event.key === "Escape") { this.hideFound(); event.target.blur(); this.view.scroll.focus(); }
      if (!["ArrowDown", "ArrowUp"].includes(event.key) || T.id("found").hidden) return;
      event.preventDefault();
      this.row = Math.max(0, Math.min(this.rows.length - 1, this.row + (event.key === "ArrowDown" ? 1 : -1)));
      [...T.id("found").children].slice(1).forEach((child, at) => { child.setAttribute("aria-selected", String(at === this.row)); if (at === this.row) child.scrollIntoView({ block: "nearest" }); });
      event.target.setAttribute("aria-activedescendant", `found-${this.row}`);
    });
    document.addEventListener("click", (event) => { if (!event.target.closest("#search")) this.hideFound(); });
    document.addEventListener("keydown", (event) => this.shortcut(event));
    this.divide();
    let scale = 1;
    window.addEventListener("beforeprint", () => {
      scale = this.view.scale;
      this.view.scale = 1;
      if (this.view.flat && this.view.flat.length < 4000) this.view.drawAll();
      this.view.svg.setAttribute("viewBox", `0 0 ${this.view.width} ${this.view.height}`);
      this.view.group.removeAttribute("transform");
      document.querySelectorAll(".lines").forEach((lines) => { if (lines.firstChild.style.height && lines.all) lines.all(); });
    });
    window.addEventListener("afterprint", () => {
      this.view.scale = scale;
      this.view.svg.removeAttribute("viewBox");
      this.view.draw();
    });
  }

  isOpened() {
    return [...this.view.open].some((key) => key !== this.view.main && this.view.byKey.has(key));
  }

  unfold() {
    const began = performance.now();
    this.view.all(!this.isOpened());
    document.documentElement.dataset.took = (performance.now() - began).toFixed(1);
    this.crumbs();
  }

  shortcut(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input[type=search], input[type=number], select, textarea, dialog")) return;
    const acts = {
      "/": () => T.id("query").focus(), "[": () => this.nextChange(false), "]": () => this.nextChange(true), "+": () => this.view.zoom(1.25), "=": () => this.view.zoom(1.25), "-": () => this.view.zoom(1 / 1.25),
      f: () => this.view.fit(true), o: () => this.unfold(), g: () => this.view.scroll.focus(), t: () => T.id(`tab-${this.state.tab}`).focus(), h: () => T.id("hold").click(), "?": () => this.help(),
    };
    const act = acts[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  }

  help() {
    const rows = [["/", "Search"], ["g", "To the graph"], ["Arrows", "To the next op, along edges"], ["Enter", "Open or fold a box; the facts of an op"], ["Escape", "To the box around"], ["[  ]", "Previous and next pass that changed the graph"], ["t", "To the tabs; arrows change the tab"], ["h", "Hold positions"], ["o", "Open or fold all boxes"], ["+  −", "Zoom; also Ctrl and the wheel"], ["f", "Fit the graph"], ["?", "This list"]];
    const dialog = T.id("help");
    dialog.replaceChildren(T.el("h2", { id: "help-title" }, "Keys"), T.el("dl", { class: "pairs" }, rows.flatMap(([key, text]) => [T.el("dt", {}, T.el("kbd", {}, key)), T.el("dd", {}, text)])), T.el("button", { type: "button", onclick: () => dialog.close() }, "Close"));
    dialog.showModal();
  }

  /** The line between the graph and the facts: drag it, or move it with the arrow keys. */
  divide() {
    const divider = T.id("divider");
    const main = document.querySelector("main");
    const set = (share) => {
      const percent = Math.max(20, Math.min(80, share));
      main.style.setProperty("--graph", `${percent}%`);
      divider.setAttribute("aria-valuenow", Math.round(percent));
    };
    divider.addEventListener("pointerdown", (event) => {
      divider.setPointerCapture(event.pointerId);
      const move = (each) => { const box = main.getBoundingClientRect(); set((100 * (each.clientX - box.left)) / box.width); };
      divider.addEventListener("pointermove", move);
      divider.addEventListener("pointerup", () => divider.removeEventListener("pointermove", move), { once: true });
    });
    divider.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -4, ArrowRight: 4 }[event.key];
      if (!by) return;
      event.preventDefault();
      set(Number(divider.getAttribute("aria-valuenow")) + by);
    });
  }
}

const app = new App();
app.start();
