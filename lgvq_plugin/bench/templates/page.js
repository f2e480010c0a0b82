"use strict";
// Shared by all pages: data, theme, sortable and filterable tables, image zoom.
const data = JSON.parse(document.getElementById("data").textContent);
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const one = (selector, within = document) => within.querySelector(selector);

/** Make an element; children are nodes or text, never HTML. */
function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "g", "line", "path", "text", "circle", "rect", "polyline", "title"];
  const space = svg.includes(tag) ? "http://www.w3.org/2000/svg" : "http://www.w3.org/1999/xhtml";
  const element = document.createElementNS(space, tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

/** Format a number with four significant digits, as in the tables. */
function format(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  const text = size && (size < 1e-4 || size >= 1e6) ? value.toExponential(2) : String(+value.toPrecision(4));
  return text.replace("-", "−");
}

// -- theme: the system's, unless changed by the button ------------------------------------
(function theme() {
  const root = document.documentElement;
  const remember = (value) => { try { localStorage.setItem("theme", value); } catch { /* file:// */ } };
  let chosen = null;
  try { chosen = localStorage.getItem("theme"); } catch { /* file:// */ }
  if (chosen) root.dataset.theme = chosen;
  one("#theme").addEventListener("click", () => {
    const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
    root.dataset.theme = (root.dataset.theme || system) === "dark" ? "light" : "dark";
    remember(root.dataset.theme);
    document.dispatchEvent(new Event("themechange"));
  });
})();

// -- tables --------------------------------------------------------------------------------------
function cellValue(row, column) {
  const cell = row.cells[column];
  const value = cell.dataset.value ?? cell.textContent.trim();
  return value === "" ? null : isNaN(value) ? value.toLowerCase() : Number(value);
}

function sortTable(table, column) {
  const heads = [...table.tHead.rows[0].cells];
  const ascending = heads[column].getAttribute("aria-sort") !== "ascending";
  heads.forEach((head) => head.removeAttribute("aria-sort"));
  heads[column].setAttribute("aria-sort", ascending ? "ascending" : "descending");
  const rows = [...table.tBodies[0].rows];
  rows.sort((first, second) => {
    const [a, b] = [cellValue(first, column), cellValue(second, column)];
    if (a === null || b === null) return (a === null) - (b === null); // missing values last
    const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(b);
    return ascending ? order : -order;
  });
  table.tBodies[0].append(...rows);
}

for (const table of all("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    head.tabIndex = 0;
    head.addEventListener("click", () => sortTable(table, column));
    head.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); sortTable(table, column); }
    });
  });
}

/** Show only the rows that `keep` accepts, and a note if there are none. */
function filterRows(table, keep) {
  let left = 0;
  for (const row of table.tBodies[0].rows) {
    const kept = keep(row);
    row.classList.toggle("hidden", !kept);
    left += kept;
  }
  table.closest(".scroll").classList.toggle("hidden", !left);
  const empty = one(`[data-empty="${table.id}"]`);
  if (empty) empty.classList.toggle("hidden", left > 0);
}

const matches = (text, words) => words.toLowerCase().split(/\s+/).every((word) => text.toLowerCase().includes(word));

// -- zoom: a grid of images, and the same image in all rows, large and side by side ----------------
(function zoom() {
  const dialog = one("#zoom");
  let column = 0, grid = null;
  const columns = () => Number(grid.dataset.columns);
  function show() {
    const figures = all(`button[data-column="${column}"]`, grid).map((button) =>
      make("figure", {}, make("img", { src: one("img", button).src, alt: button.dataset.row }),
        make("figcaption", {}, button.dataset.row)));
    const caption = one(`button[data-column="${column}"]`, grid).dataset.caption;
    one(".inside", dialog).replaceChildren(make("div", { class: "side" }, ...figures),
      make("p", { class: "note" }, `${column + 1} of ${columns()}${caption ? ` · “${caption}”` : ""} · ← →`));
  }
  for (const button of all(".grid button")) {
    button.addEventListener("click", () => {
      grid = button.closest(".grid"); column = Number(button.dataset.column); show(); dialog.showModal();
    });
  }
  dialog.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step && grid) { column = (column + step + columns()) % columns(); show(); }
  });
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
})();
