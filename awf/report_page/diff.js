// Line differences, made where they are read: only whole texts are stored.

const DIFF_CELLS = 4e6; // of the table; larger pairs of texts are shown as removed and added

/** Lines of a difference as [sign, text], sign being " ", "-" or "+". */
function diffLines(before, after) {
  const a = before === "" ? [] : before.split("\n");
  const b = after === "" ? [] : after.split("\n");
  let start = 0;
  while (start < a.length && start < b.length && a[start] === b[start]) start += 1;
  let end = 0;
  while (
    end < a.length - start && end < b.length - start &&
    a[a.length - 1 - end] === b[b.length - 1 - end]
  ) end += 1;
  const same = (lines) => lines.map((line) => [" ", line]);
  const middle = changed(a.slice(start, a.length - end), b.slice(start, b.length - end));
  return [...same(a.slice(0, start)), ...middle, ...same(end ? a.slice(-end) : [])];
}

/** The difference of two lists by their longest common subsequence. */
function changed(a, b) {
  const removed = a.map((line) => ["-", line]);
  const added = b.map((line) => ["+", line]);
  if (!a.length || !b.length || a.length * b.length > DIFF_CELLS) return [...removed, ...added];
  const width = b.length + 1;
  const longest = new Uint16Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i -= 1) {
    for (let j = b.length - 1; j >= 0; j -= 1) {
      const at = i * width + j;
      longest[at] = a[i] === b[j]
        ? longest[at + width + 1] + 1
        : Math.max(longest[at + width], longest[at + 1]);
    }
  }
  const out = [];
  let i = 0;
  let j = 0;
  while (i < a.length && j < b.length) {
    if (a[i] === b[j]) {
      out.push([" ", a[i]]);
      i += 1;
      j += 1;
    } else if (longest[(i + 1) * width + j] >= longest[i * width + j + 1]) {
      out.push(removed[i++]);
    } else {
      out.push(added[j++]);
    }
  }
  return [...out, ...removed.slice(i), ...added.slice(j)];
}

/** A difference as an element, with three lines around each change. */
function diffView(before, after) {
  const lines = diffLines(before, after);
  const near = lines.map(() => false);
  lines.forEach(([sign], at) => {
    if (sign === " ") return;
    for (let i = Math.max(0, at - 3); i <= Math.min(lines.length - 1, at + 3); i += 1) near[i] = true;
  });
  const pre = el("pre");
  let gap = false;
  lines.forEach(([sign, text], at) => {
    if (!near[at]) {
      gap = true;
      return;
    }
    if (gap) pre.append(el("span", { class: "at" }, "⋯"));
    gap = false;
    const kind = { "+": "add", "-": "del" }[sign] ?? "same";
    pre.append(el("span", { class: kind }, `${sign} ${text}`));
  });
  if (!pre.childNodes.length) return el("p", { class: "soft" }, "no difference");
  return el("div", { class: "card" }, pre);
}
