// Puts the page together: trees, keys, details, copying, colours.

const HELP = "Search tree. Left and right go to parent and child, up and down to the next, Enter opens, " +
  "plus and minus zoom, 0 shows all, b goes to the best.";

function startForest(data) {
  const host = document.getElementById("forest");
  if (!host) return;
  const canvas = svg("svg", { class: "canvas", tabindex: 0, role: "application", "aria-label": HELP });
  const live = el("p", { class: "sr", "aria-live": "polite" });
  const panel = el("aside", { class: "panel", hidden: "", "aria-label": "node" });
  const hits = el("ul", { class: "hits", hidden: "" });
  const find = el("input", { type: "search", placeholder: "find a number, a change, code …",
    "aria-label": "find nodes" });
  const pick = el("select", { "aria-label": "search" },
    data.searches.map((search, at) => el("option", { value: at }, search.name)));
  let view = null;
  let details = null;

  function describe(at) {
    const { nodes } = view.search;
    const result = nodes.failure[at] ? `failed: ${nodes.failure[at][0]}` :
      `score ${number(nodes.score[at])}`;
    live.textContent = `Node ${nodes.id[at]}, ${result}. ${nodes.edit[at]}`;
  }

  function close() {
    panel.hidden = true;
    host.classList.remove("open");
    canvas.focus();
    view.draw();
  }

  function open(at, focus = true) {
    panel.replaceChildren(...details.show(at, close));
    panel.hidden = false;
    panel.scrollTop = 0;
    host.classList.add("open");
    view.choose(at);
    const number = Number(pick.value) ? `${pick.value}.` : "";
    // A notebook's frame (about:srcdoc) has no address of its own, and refuses one.
    const hash = `#node=${number}${view.search.nodes.id[at]}`;
    if (location.protocol !== "about:") history.replaceState(null, "", hash);
    if (focus) panel.querySelector("h3").focus();
  }

  function use(place) {
    const search = data.searches[place];
    pick.value = String(place);
    view = new TreeView(canvas, search, open, describe);
    details = new NodePanel(data, search, view.layout, open);
    canvas.dataset.nodes = search.nodes.id.length;
    panel.hidden = true;
    host.classList.remove("open");
    seek();
  }

  function seek() {
    const text = find.value.trim().toLowerCase();
    const { nodes } = view.search;
    const has = (part) => part.toLowerCase().includes(text);
    const matches = !text ? [] : nodes.id.map((_, at) => at).filter((at) =>
      String(nodes.id[at]) === text || has(nodes.edit[at]) || has(details.text("graph", at)) ||
      has(details.text("prompt", at)) || has((nodes.failure[at] ?? []).join(" ")));
    matches.sort((a, b) => (nodes.score[b] ?? -1) - (nodes.score[a] ?? -1));
    view.found = new Set(matches);
    hits.hidden = !text;
    const shown = matches.slice(0, 100).map((at) => el("li", {}, button(
      `${nodes.id[at]}: ${number(nodes.score[at], 3)} ${nodes.edit[at]}`, () => open(at))));
    const head = el("li", { class: "soft" }, `${matches.length} nodes, best first`);
    hits.replaceChildren(head, ...shown);
    view.draw();
  }

  const tools = el("div", { class: "tools" },
    data.searches.length > 1 ? pick : null,
    button("all", () => view.fit(), { title: "the whole tree" }),
    button("top", () => view.toTop(), { title: "the best branches" }),
    button("+", () => view.zoom(1.4), { "aria-label": "zoom in" }),
    button("−", () => view.zoom(1 / 1.4), { "aria-label": "zoom out" }),
    button("best", () => view.best >= 0 && open(view.best), { title: "opens the best node" }),
    find);
  host.replaceChildren(el("div", {}, tools, canvas, legend(), hits, live), panel);
  host.classList.add("on");
  pick.addEventListener("change", () => use(Number(pick.value)));
  find.addEventListener("input", seek);
  use(0);
  watch(canvas, () => view, open, close);
  addEventListener("resize", () => view.draw());

  const asked = location.hash.match(/^#node=(?:(\d+)\.)?(\d+)$/);
  if (asked && data.searches[Number(asked[1] ?? 0)]) {
    use(Number(asked[1] ?? 0));
    const at = view.layout.index.get(Number(asked[2]));
    if (at !== undefined) open(at, false);
  }
}

function legend() {
  const sign = (shape, text) => el("span", {}, svg("svg", { viewBox: "0 0 18 18" }, shape), text);
  const ramp = [0, 1, 2, 3, 4].map((step) => svg("rect", { class: "node", x: step * 12, y: 3,
    width: 12, height: 12, "fill-opacity": 0.06 + 0.94 * step / 4 }));
  return el("div", { class: "legend" },
    el("span", {}, "score 0", svg("svg", { viewBox: "0 0 60 18", class: "ramp" }, ramp), "1"),
    el("span", {}, "0.5 on 2: of two problems, not yet of all"),
    sign(svg("path", { class: "cross", d: "M4,4L14,14M4,14L14,4" }), "failed"),
    sign(svg("circle", { class: "ring", cx: 9, cy: 9, r: 7 }), "best, and its line"),
    sign(svg("circle", { class: "disc copyof", cx: 9, cy: 9, r: 6 }), "equals an earlier one"),
    sign(svg("rect", { class: "block", x: 2, y: 2, width: 14, height: 14, rx: 3 }),
      "children without children, best first"));
}

/** Pointer, wheel and keys of the canvas. */
function watch(canvas, view, open, close) {
  const held = new Map(); // pointer -> last place
  let moved = 0;
  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    held.set(event.pointerId, place(event));
    if (held.size === 1) moved = 0;
  });
  canvas.addEventListener("pointermove", (event) => {
    const last = held.get(event.pointerId);
    if (!last) return;
    const now = place(event);
    const [dx, dy] = [now[0] - last[0], now[1] - last[1]];
    moved += Math.abs(dx) + Math.abs(dy);
    const other = [...held].find(([id]) => id !== event.pointerId)?.[1];
    if (other) {
      const apart = (point) => Math.hypot(point[0] - other[0], point[1] - other[1]) || 1;
      view().zoom(apart(now) / apart(last), other[0], other[1]);
    } else {
      view().move(dx, dy);
    }
    held.set(event.pointerId, now);
  });
  canvas.addEventListener("pointerup", (event) => {
    if (held.size === 1 && moved < 6) {
      const at = view().at(...place(event));
      if (at >= 0) open(at, false);
    }
    held.delete(event.pointerId);
  });
  canvas.addEventListener("pointercancel", (event) => held.delete(event.pointerId));
  canvas.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey && document.activeElement !== canvas) return;
    event.preventDefault();
    view().zoom(Math.exp(-event.deltaY / 400), ...place(event));
  }, { passive: false });
  canvas.addEventListener("keydown", (event) => {
    const { key } = event;
    const acts = {
      "+": () => view().zoom(1.4), "=": () => view().zoom(1.4), "-": () => view().zoom(1 / 1.4),
      0: () => view().fit(), b: () => view().best >= 0 && view().choose(view().best),
      Escape: close, Enter: () => view().chosen >= 0 && open(view().chosen),
      " ": () => view().chosen >= 0 && open(view().chosen),
    };
    const isMove = key.startsWith("Arrow") || key === "Home";
    if (event.ctrlKey || event.metaKey || event.altKey || !(isMove || acts[key])) return;
    event.preventDefault();
    if (isMove) view().choose(view().neighbour(key));
    else acts[key]();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && document.querySelector(".panel:focus-within")) close();
  });
}

function startCopying() {
  for (const pressed of document.querySelectorAll("button.copy")) {
    const pre = pressed.closest(".copied").querySelector("pre");
    pressed.hidden = false;
    pressed.addEventListener("click", () => copyText(pre.textContent, pre, pressed));
  }
}

function startTheme() {
  const root = document.documentElement;
  const pressed = document.getElementById("theme");
  const isDark = () => root.dataset.theme === "dark" ||
    (!root.dataset.theme && matchMedia("(prefers-color-scheme:dark)").matches);
  const say = () => (pressed.textContent = isDark() ? "light" : "dark");
  pressed.hidden = false;
  pressed.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    say();
  });
  matchMedia("(prefers-color-scheme:dark)").addEventListener("change", say);
  say();
}

startTheme();
startCopying();
unpack().then(startForest).then(() => {
  document.documentElement.dataset.ready = String(Math.round(performance.now()));
});
