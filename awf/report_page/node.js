// The details of one node.

/** Makes the elements that show node `at` of a search. */
class NodePanel {
  constructor(data, search, layout, go) {
    this.data = data;
    this.search = search;
    this.layout = layout;
    this.go = go; // opens another node
  }

  text(field, at) {
    return at < 0 ? "" : this.data.texts[this.search.nodes[field][at]];
  }

  show(at, close) {
    const { nodes } = this.search;
    const parent = this.layout.parent[at];
    const title = el("h3", { tabindex: -1 }, `Node ${nodes.id[at]}`);
    if (nodes.id[at] === this.search.best) title.append(" — the best");
    const parts = [
      title,
      button("close", close, { class: "close" }),
      el("p", {}, nodes.edit[at] || (parent < 0 ? "start" : "(no modification given)")),
      this.stages(at),
      this.score(at),
      this.facts(at, parent),
      this.failure(at),
      ...this.changes(at, parent),
      this.whole("Workflow", this.text("graph", at)),
      this.whole("Prompts", this.text("prompt", at)),
      ...this.problems(at),
    ];
    return parts.filter((part) => part !== null);
  }

  stages(at) {
    const { nodes } = this.search;
    const last = nodes.stage[at];
    const failed = nodes.failure[at] !== null;
    return el("ol", { class: "stages", "aria-label": "stages" }, this.data.stages.map((name, place) => {
      const state = place > last ? "never" : place === last && failed ? "no" : "yes";
      const sign = { yes: "✓", no: "✗", never: "·" }[state];
      const said = { yes: "passed", no: "failed", never: "not reached" }[state];
      return el("li", { class: state, title: said }, `${sign} ${name}`, el("span", { class: "sr" }, said));
    }));
  }

  score(at) {
    const { nodes } = this.search;
    if (nodes.score[at] === null) return null;
    const [low, high] = [nodes.low[at], nodes.high[at]];
    const x = (share) => 5 + 290 * share;
    const text = `${number(nodes.score[at])}, 95 % interval ${number(low, 2)} to ${number(high, 2)}, ` +
      `${nodes.count[at]} problems`;
    const bar = svg("svg", { viewBox: "0 0 300 26", class: "meter", "aria-hidden": "true" },
      svg("line", { class: "grid", x1: x(0), x2: x(1), y1: 13, y2: 13 }),
      svg("rect", { class: "range", x: x(low), y: 6, width: Math.max(1, x(high) - x(low)), height: 14 }),
      svg("line", { class: "at", x1: x(nodes.score[at]), x2: x(nodes.score[at]), y1: 2, y2: 24 }));
    return el("div", {}, el("p", {}, el("b", {}, "score "), text), bar);
  }

  facts(at, parent) {
    const { nodes } = this.search;
    const cost = nodes.cost[at];
    const link = (to) => button(String(nodes.id[to]), () => this.go(to));
    const rows = [
      ["parent", parent < 0 ? "none: a start" : link(parent)],
      ["copy of", nodes.copy[at] ? link(this.layout.index.get(nodes.copy[at])) : null],
      ["children", this.layout.children[at].length],
      ["round", nodes.born[at]],
      ["visits, value", `${number(nodes.visits[at])}, ${number(nodes.value[at])}`],
    ];
    if (cost) {
      rows.push(["reward", number(cost.reward)], ["proposals", number(cost.proposals)],
        ["tokens of proposals", number(cost.tokens)]);
      if (cost.calls !== undefined) {
        rows.push(["model calls to judge it", number(cost.calls)],
          ["tokens to judge it", number(cost.run_tokens)]);
      }
    }
    const kept = rows.filter(([, value]) => value !== null);
    return el("dl", { class: "facts" }, kept.flatMap(([name, value]) => [
      el("dt", {}, name), el("dd", {}, value),
    ]));
  }

  failure(at) {
    const failure = this.search.nodes.failure[at];
    if (!failure) return null;
    return el("div", { class: "card" }, el("b", {}, `failed: ${failure[0]}`),
      el("div", { class: "problem" }, failure[1]));
  }

  changes(at, parent) {
    if (parent < 0 || !this.text("graph", at)) return [];
    const root = this.layout.index.get(this.search.nodes.id[0]);
    const made = (other) => ["graph", "prompt"].map((field) =>
      el("div", {}, el("h4", {}, { graph: "workflow", prompt: "prompts" }[field]),
        diffView(this.text(field, other), this.text(field, at))));
    const where = el("div", {}, made(parent));
    const out = [el("h4", {}, "Changes to its parent"), where];
    let top = at;
    while (this.layout.parent[top] >= 0) top = this.layout.parent[top];
    if (top !== parent && top !== undefined && root !== undefined) {
      const first = this.search.nodes.id[top];
      const fold = el("details", {}, el("summary", {}, `Changes to its start, node ${first}`));
      fold.addEventListener("toggle", () => {
        if (fold.open && fold.childNodes.length === 1) fold.append(...made(top));
      });
      out.push(fold);
    }
    return out;
  }

  whole(name, text) {
    if (!text) return null;
    const shown = code(text);
    const copy = button("copy", (event) => copyText(text, shown, event.currentTarget));
    return el("details", {}, el("summary", {}, name), copy, shown);
  }

  problems(at) {
    const { nodes } = this.search;
    const log = nodes.log[at];
    const missed = nodes.failure[at] ? log.length : nodes.wrong[at];
    if (!missed) return [];
    const shown = log.length < missed ? ` (${log.length} kept)` : "";
    const out = [el("h4", {}, `Problems not solved: ${missed}${shown}`)];
    for (const [id, output, extracted] of log) {
      const problem = this.data.problems[id];
      out.push(el("details", {}, el("summary", {}, id),
        el("p", { class: "problem" }, problem ?? "(text of the problem not kept)"),
        el("p", { class: "soft" }, extracted ? `read as: ${extracted}` : "no answer could be read"),
        code(output)));
    }
    return out;
  }
}
