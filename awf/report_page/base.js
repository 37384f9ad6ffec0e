// Data and small helpers. Texts of a model enter the page as text nodes alone, never as markup.
"use strict";

const SVG = "http://www.w3.org/2000/svg";

/** The data that Python packed: base64 of gzip of JSON. */
async function unpack() {
  const raw = atob(document.getElementById("data").textContent);
  const bytes = Uint8Array.from(raw, (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

/** An element with attributes and children; a child that is no element becomes text. */
function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) element.setAttribute(name, String(value));
  }
  for (const child of children.flat()) {
    if (child !== null && child !== undefined) {
      element.append(child instanceof Node ? child : String(child));
    }
  }
  return element;
}

function button(text, act, attributes = {}) {
  const made = el("button", { type: "button", ...attributes }, text);
  made.addEventListener("click", act);
  return made;
}

function number(value, digits = 4) {
  if (typeof value !== "number" || !Number.isFinite(value)) return "–";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  return String(Number(value.toPrecision(digits)));
}

/** Puts text on the clipboard; where a page may not, selects it for the reader. */
async function copyText(text, where, pressed) {
  try {
    await navigator.clipboard.writeText(text);
    pressed.textContent = "copied";
  } catch {
    const range = document.createRange();
    range.selectNodeContents(where);
    getSelection().removeAllRanges();
    getSelection().addRange(range);
    pressed.textContent = document.execCommand("copy") ? "copied" : "selected";
  }
  setTimeout(() => (pressed.textContent = "copy"), 1500);
}

function code(text) {
  return el("div", { class: "card" }, el("pre", {}, text));
}
