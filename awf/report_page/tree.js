// The forest as SVG. Only what is in view is drawn; positions are in units of the unscaled drawing.

const STEP_X = 46; // between depths
const STEP_Y = 24; // between rows
const CELL_X = 30; // between leaves of one block
const SMALL = 300; // nodes; up to here leaves stand below each other, with their labels
const READABLE = 0.55; // scale from which labels are drawn

/** Places nodes as an outline: a node, below it its leaves, then its other children, best first. */
class Layout {
  constructor(nodes, path) {
    const count = nodes.id.length;
    const onPath = new Set(path);
    this.nodes = nodes;
    this.index = new Map(nodes.id.map((id, at) => [id, at]));
    this.x = new Float64Array(count);
    this.y = new Float64Array(count);
    this.parent = nodes.parent.map((id) => this.index.get(id) ?? -1);
    this.children = nodes.id.map(() => []);
    this.inBlock = new Uint8Array(count);
    this.blocks = []; // {parent, x0, y0, x1, y1}
    this.order = []; // as read, from top to bottom
    this.roots = [];
    // The best score of each subtree; parents stand before their children in the lists.
    this.worth = nodes.id.map((id, at) => (nodes.score[at] ?? -1) + (onPath.has(id) ? 2 : 0));
    for (let at = count - 1; at >= 0; at -= 1) {
      const up = this.parent[at];
      if (up >= 0) this.worth[up] = Math.max(this.worth[up], this.worth[at]);
    }
    this.parent.forEach((at, child) => (at < 0 ? this.roots : this.children[at]).push(child));
    const bestFirst = (a, b) => this.worth[b] - this.worth[a] || a - b;
    for (const list of [this.roots, ...this.children]) list.sort(bestFirst);
    this.width = 0;
    this.row = 0;
    this.place();
    this.height = this.row * STEP_Y;
    this.seat = new Map(this.order.map((at, seat) => [at, seat]));
  }

  place() {
    // Without recursion: a chain may be long.
    const stack = this.roots.map((at) => [at, 0]).reverse();
    while (stack.length) {
      const [at, depth] = stack.pop();
      this.put(at, depth * STEP_X, this.row);
      this.row += 1;
      const isLeaf = (child) => !this.children[child].length;
      const leaves = this.children[at].filter(isLeaf);
      if (leaves.length) this.placeLeaves(at, leaves, (depth + 1) * STEP_X);
      const inner = this.children[at].filter((child) => !isLeaf(child));
      this.children[at] = [...leaves, ...inner];
      for (const child of inner.reverse()) stack.push([child, depth + 1]);
    }
  }

  put(at, x, row) {
    this.x[at] = x;
    this.y[at] = row * STEP_Y;
    this.width = Math.max(this.width, x);
    this.order.push(at);
  }

  placeLeaves(parent, leaves, x0) {
    const isList = this.nodes.id.length <= SMALL && leaves.length <= 8;
    const columns = isList ? 1 : Math.ceil(Math.sqrt(leaves.length * 6));
    const pad = isList ? 0 : 0.35; // rows above and below a block
    const first = this.row + pad;
    leaves.forEach((at, place) => {
      this.put(at, x0 + (place % columns) * CELL_X, first + Math.floor(place / columns));
      this.inBlock[at] = isList ? 0 : 1;
    });
    const rows = Math.ceil(leaves.length / columns);
    if (!isList) {
      const x1 = x0 + (Math.min(columns, leaves.length) - 1) * CELL_X;
      const y1 = (first + rows - 1) * STEP_Y;
      this.blocks.push({ parent, x0, y0: first * STEP_Y, x1, y1 });
    }
    this.row += rows + 2 * pad;
  }
}

/** Draws a layout into an SVG element that can be moved, zoomed and walked through by keys. */
class TreeView {
  constructor(canvas, search, open, say) {
    this.canvas = canvas;
    this.search = search;
    this.layout = new Layout(search.nodes, search.path);
    this.open = open; // opens the details of a node, by its place in the lists
    this.say = say; // announces a node
    this.most = search.nodes.count.reduce((a, b) => Math.max(a, b ?? 0), 0); // problems of a node
    this.chosen = -1;
    this.found = new Set();
    const best = new Set(search.path);
    this.onPath = search.nodes.id.map((id) => best.has(id));
    this.best = this.layout.index.get(search.best) ?? -1;
    this.scale = 1; // of y, and of x unless that would leave the canvas empty
    this.left = 0;
    this.top = 0;
    this.fit();
    if (this.scale < READABLE) this.toTop();
  }

  size() {
    const box = this.canvas.getBoundingClientRect();
    return [box.width || 800, box.height || 500];
  }

  get scaleX() {
    return Math.max(this.scale, Math.min(1, this.size()[0] / (this.layout.width + 130)));
  }

  /** All of it, whatever the size of a node. */
  fit() {
    const [width, height] = this.size();
    const spanY = this.layout.height + 2 * STEP_Y;
    this.scale = Math.min(1.3, width / (this.layout.width + 130), height / spanY);
    this.scale = Math.max(this.scale, Math.min(1.3, height / spanY, 0.02));
    this.left = -30 / this.scaleX;
    this.top = -(height / this.scale - this.layout.height + STEP_Y) / 2;
    this.draw();
  }

  /** The top, where the best ones are, large enough to be read. */
  toTop() {
    this.scale = 0.9;
    this.left = -30 / this.scaleX;
    this.top = -STEP_Y / this.scale;
    this.draw();
  }

  zoom(factor, x, y) {
    const [width, height] = this.size();
    const [px, py] = [x ?? width / 2, y ?? height / 2];
    const before = [this.scaleX, this.scale];
    this.scale = Math.min(4, Math.max(0.01, this.scale * factor));
    this.left += px / before[0] - px / this.scaleX;
    this.top += py / before[1] - py / this.scale;
    this.draw();
  }

  move(dx, dy) {
    this.left -= dx / this.scaleX;
    this.top -= dy / this.scale;
    this.draw();
  }

  /** Brings a node into view, large enough to be read. */
  show(at) {
    const [width, height] = this.size();
    this.scale = Math.max(this.scale, 0.8);
    const [x, y] = this.toScreen(at);
    if (x < 40 || x > width - 90 || y < 30 || y > height - 30) {
      this.left = this.layout.x[at] - width / 3 / this.scaleX;
      this.top = this.layout.y[at] - height / 2 / this.scale;
    }
    this.draw();
  }

  choose(at) {
    this.chosen = at;
    this.show(at);
    this.say(at);
  }

  toScreen(at) {
    return [
      (this.layout.x[at] - this.left) * this.scaleX,
      (this.layout.y[at] - this.top) * this.scale,
    ];
  }

  /** The node under a point of the canvas, or -1. */
  at(px, py) {
    let nearest = -1;
    let least = 15 * 15;
    for (let at = 0; at < this.layout.x.length; at += 1) {
      const [x, y] = this.toScreen(at);
      const distance = (x - px) ** 2 + (y - py) ** 2;
      if (distance < least) [nearest, least] = [at, distance];
    }
    return nearest;
  }

  /** The node that a key leads to: parent, first child, or the next as read. */
  neighbour(key) {
    const { parent, children, order, seat } = this.layout;
    if (this.chosen < 0) return this.best >= 0 ? this.best : order[0];
    const to = {
      ArrowLeft: parent[this.chosen],
      ArrowRight: children[this.chosen].find((at) => this.onPath[at]) ?? children[this.chosen][0],
      ArrowUp: order[seat.get(this.chosen) - 1],
      ArrowDown: order[seat.get(this.chosen) + 1],
      Home: order[0],
    }[key];
    return to === undefined || to < 0 ? this.chosen : to;
  }

  draw() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => {
      this.waiting = false;
      this.canvas.replaceChildren(...this.shapes());
    });
  }

  shapes() {
    const [width, height] = this.size();
    const margin = 60;
    const edges = [];
    const bestEdges = [];
    const dots = [];
    const { parent, inBlock, blocks } = this.layout;
    const isIn = (x, y) => x > -margin && x < width + margin && y > -margin && y < height + margin;
    for (const block of blocks) this.drawBlock(block, width, height, edges);
    for (let at = 0; at < parent.length; at += 1) {
      const [x, y] = this.toScreen(at);
      const isSeen = isIn(x, y);
      if (parent[at] >= 0 && (!inBlock[at] || this.onPath[at])) {
        const [x0, y0] = this.toScreen(parent[at]);
        const misses = Math.max(x, x0) < 0 || Math.min(x, x0) > width ||
          Math.max(y, y0) < 0 || Math.min(y, y0) > height;
        const drawn = this.onPath[at] ? bestEdges : edges;
        if (!misses) drawn.push(this.edge(x0, y0, x, y, this.onPath[at]));
      }
      if (isSeen) dots.push(...this.drawNode(at, x, y));
    }
    return [...edges, ...bestEdges, ...dots];
  }

  edge(x0, y0, x, y, isBest) {
    const bend = Math.min(8, Math.abs(x - x0), Math.abs(y - y0));
    const path = `M${x0},${y0}V${y - bend}Q${x0},${y} ${x0 + bend},${y}H${x}`;
    return svg("path", { class: isBest ? "edge best" : "edge", d: path });
  }

  drawBlock(block, width, height, edges) {
    const pad = 11 * Math.min(1, this.scale);
    const [left, top] = [this.left, this.top];
    const x = (block.x0 - left) * this.scaleX - pad;
    const y = (block.y0 - top) * this.scale - pad;
    const w = (block.x1 - block.x0) * this.scaleX + 2 * pad;
    const h = (block.y1 - block.y0) * this.scale + 2 * pad;
    const [x0, y0] = this.toScreen(block.parent);
    if (x0 > width || x + w < 0 || y + h < 0 || y0 > height) return;
    edges.push(this.edge(x0, y0, x, y + pad, false));
    edges.push(svg("rect", { class: "block", x, y, width: w, height: h, rx: 6 }));
  }

  drawNode(at, x, y) {
    const { nodes } = this.search;
    const radius = Math.max(1.6, Math.min(9, 7 * this.scale));
    const out = [];
    if (nodes.failure[at]) {
      const r = radius * 0.75;
      const cross = `M${x - r},${y - r}L${x + r},${y + r}M${x - r},${y + r}L${x + r},${y - r}`;
      out.push(svg("path", { class: "cross", d: cross }));
    } else {
      const shade = 0.06 + 0.94 * Math.min(1, Math.max(0, nodes.score[at] ?? 0));
      const disc = nodes.copy[at] ? "disc copyof" : "disc";
      out.push(svg("circle", { class: disc, cx: x, cy: y, r: radius }));
      const dot = { class: "node", cx: x, cy: y, r: radius, "fill-opacity": shade.toFixed(2) };
      out.push(svg("circle", dot));
    }
    if (this.found.has(at)) out.push(svg("circle", { class: "found", cx: x, cy: y, r: radius + 4 }));
    if (at === this.best) out.push(svg("circle", { class: "ring", cx: x, cy: y, r: radius + 3 }));
    if (at === this.chosen) {
      out.push(svg("rect", {
        class: "chosen", x: x - radius - 6, y: y - radius - 6,
        width: 2 * radius + 12, height: 2 * radius + 12, rx: 3,
      }));
    }
    if (this.layout.inBlock[at]) {
      const label = String(nodes.id[at]);
      if (this.scale > 1.2) {
        out.push(svg("text", { x: x - 3 * label.length, y: y + radius + 11 }, label));
      }
    } else if (this.scale > READABLE) {
      const few = nodes.count[at] && nodes.count[at] < this.most ? ` on ${nodes.count[at]}` : "";
      const label = `${nodes.id[at]}: ${number(nodes.score[at], 2)}${few}`;
      const marked = at === this.best || at === this.chosen ? 5 : 0;
      const start = x + radius + 6 + marked;
      out.push(svg("text", { x: start, y: y + 4 }, label));
      const room = Math.floor((this.size()[0] - start) / 6) - label.length - 3;
      if (room > 12) {
        const edit = nodes.edit[at].split("\n")[0];
        const short = edit.length > room ? `${edit.slice(0, room - 1)}…` : edit;
        out.push(svg("text", { class: "edit", x: start + 6.6 * label.length + 8, y: y + 4 }, short));
      }
    }
    return out;
  }
}
