// The codebook explorer: code tiles, words, occurrences in images, similarity maps, usage.
const FIRST = 400; // tiles of a gallery before "more"
const color = (panel) => `var(--s${data.panels.indexOf(panel) + 1})`;
const swatch = (panel) => make("span", { class: "swatch", style: `background:${color(panel)}` });
const heading = (panel) => make("h3", {}, swatch(panel), panel.name);

/** One patch of a sheet, `size` pixels wide. */
function tile(panel, kind, index, size, attributes = {}) {
  const count = kind === "examples" ? panel.size * panel.examples : panel.size;
  const rows = Math.ceil(count / panel.columns), height = size * panel.patch[0] / panel.patch[1];
  const [x, y] = [index % panel.columns, Math.floor(index / panel.columns)];
  return make("span", {
    class: "tile", role: "img", ...attributes,
    style: `width:${size}px;height:${height}px;background-image:var(--${kind}-${data.panels.indexOf(panel)});` +
      `background-size:${panel.columns * size}px ${rows * height}px;background-position:${-x * size}px ${-y * height}px`,
  });
}
for (const [i, panel] of data.panels.entries())
  for (const [kind, uri] of Object.entries(panel.sheets))
    document.documentElement.style.setProperty(`--${kind}-${i}`, `url(${uri})`);

/** An image, darkened at all positions without one of the codes. */
function shot(panel, image, codes) {
  const [h, w] = panel.grid, fires = panel.fires[image];
  const dark = fires.map((code, at) => codes.has(code) ? "" : `M${at % w} ${Math.floor(at / w)}h1v1h-1z`).join("");
  const svg = make("svg", { viewBox: `0 0 ${w} ${h}`, preserveAspectRatio: "none", "aria-hidden": true },
    make("path", { d: dark }));
  const { uri, caption } = data.images[image];
  return make("figure", { class: "shot", title: caption }, make("img", { src: uri, alt: caption }), svg);
}

/** The images with most occurrences of the codes, at most `count`. */
function shots(panel, codes, count, allowed = () => true) {
  const wanted = new Set(codes);
  const ranked = data.images.map((image, i) => [i, panel.fires[i].filter((code) => wanted.has(code)).length])
    .filter(([i, fires]) => fires && allowed(data.images[i])).sort((a, b) => b[1] - a[1]).slice(0, count);
  if (!ranked.length) return make("p", { class: "note" }, "Not in the images on this page.");
  return make("div", { class: "shots" }, ...ranked.map(([i]) => shot(panel, i, wanted)));
}

const wordChip = (index, detail) => make("button", { type: "button", class: "chip", "data-word": data.words[index],
  onclick: () => searchWord(data.words[index], true) }, data.words[index], ...(detail ? [make("small", {}, ` ${detail}`)] : []));
const codeButton = (panel, code, size) => make("button", { type: "button", class: "code", "data-code": code,
  title: `code ${code}: ${panel.counts[code].toLocaleString()} times`, onclick: () => showCode(panel, code) }, tile(panel, "mean", code, size));

// -- one code ------------------------------------------------------------------------------------
function showCode(panel, code, scroll = true) {
  const pictures = [["mean", code, "mean"], ["decoded", code, "decoded"]].filter(([kind]) => panel.sheets[kind])
    .map(([kind, index, name]) => make("figure", {}, tile(panel, kind, index, 88), make("figcaption", {}, name)));
  const found = Math.min(panel.examples, panel.counts[code]);
  const examples = Array.from({ length: found }, (_, i) => tile(panel, "examples", code * panel.examples + i, 56));
  const words = panel.codes[code].map(([word, pmi, joint]) => wordChip(word, `${format(+(2 ** pmi).toPrecision(2))} × · ${joint}`));
  const card = make("div", { class: "card", "data-code": code }, make("h3", {}, swatch(panel), `${panel.name}, code ${code}`),
    make("p", { class: "note" }, panel.counts[code] ? `Used ${panel.counts[code].toLocaleString()} times.` : "Dead: not used in any image."),
    make("div", { class: "pictures" }, ...pictures, make("figure", {}, make("div", { class: "pictures tight" }, ...examples),
      make("figcaption", {}, examples.length ? "from different images" : ""))),
    make("h4", {}, "Words"), words.length ? make("div", { class: "chips" }, ...words) : make("p", { class: "note" }, "No significant association."),
    ...(words.length ? [make("p", { class: "note" }, "×: images with both, relative to chance; then their number.")] : []),
    make("h4", {}, "Occurrences"), shots(panel, [code], 12));
  one("#detail").replaceChildren(card);
  all("#galleries .code").forEach((button) => button.classList.remove("chosen"));
  const button = one(`#galleries [data-panel="${data.panels.indexOf(panel)}"] [data-code="${code}"]`);
  if (button) button.classList.add("chosen");
  if (scroll) one("#detail").scrollIntoView({ block: "nearest" });
}

/** Strength of a code's best word; -1 for none. */
const sure = (panel, code) => panel.codes[code].length ? panel.codes[code][0][1] * panel.codes[code][0][2] : -1;

/** Whether a caption word matches; "check*" matches every word with that prefix. */
const isWord = (word, wanted) => wanted.endsWith("*") ? word.startsWith(wanted.slice(0, -1)) : word === wanted;

// -- galleries -------------------------------------------------------------------------------------
function drawGalleries() {
  const order = one("#order").value, wanted = one("#code-word").value.toLowerCase().split(/\s+/).filter(Boolean), dead = one("#show-dead").checked;
  const keys = {
    count: (panel) => (code) => -panel.counts[code], rare: (panel) => (code) => panel.counts[code],
    word: (panel) => (code) => -sure(panel, code), index: () => (code) => code,
  };
  one("#galleries").replaceChildren(...data.panels.map((panel, i) => {
    const key = keys[order](panel);
    const codes = [...panel.counts.keys()]
      .filter((code) => (dead || panel.counts[code]) && wanted.every((word) => panel.codes[code].some(([index]) => isWord(data.words[index], word))))
      .sort((a, b) => key(a) - key(b) || a - b);
    const gallery = make("div", { class: "gallery", "data-panel": i }, ...codes.slice(0, FIRST).map((code) => codeButton(panel, code, 38)));
    const rest = codes.slice(FIRST);
    const more = make("button", { type: "button", onclick: () => { gallery.append(...rest.map((code) => codeButton(panel, code, 38))); more.remove(); } },
      `${rest.length} more`);
    return make("div", {}, heading(panel), make("p", { class: "note count" }, `${codes.length} code${codes.length === 1 ? "" : "s"}`), gallery, ...(rest.length ? [more] : []));
  }));
}
["#order", "#code-word", "#show-dead"].forEach((id) => one(id).addEventListener("input", drawGalleries));

/** Words, ordered by their strongest association with a code. */
const strength = data.words.map((_, i) => Math.max(0, ...data.panels.flatMap((panel) => panel.words[i].map(([, pmi, joint]) => pmi * joint))));
const ranked = [...data.words.keys()].sort((a, b) => strength[b] - strength[a] || a - b);

// -- words -----------------------------------------------------------------------------------------
function searchWord(text, jump = false) {
  const word = text.trim().toLowerCase(), index = data.words.indexOf(word);
  one("#word").value = text;
  one("#no-word").classList.toggle("hidden", !word || index >= 0 || data.words.some((other) => other.startsWith(word)));
  const near = word && index < 0 ? ranked.filter((i) => data.words[i].startsWith(word)) : ranked;
  one("#chips").replaceChildren(...near.slice(0, 24).map((i) => wordChip(i, data.documents[i])));
  one("#word-result").replaceChildren(...(index < 0 ? [] : [
    make("p", {}, make("b", {}, word), ` is in the captions of ${data.documents[index]} of ${data.samples} images.`),
    make("div", { class: "panels" }, ...data.panels.map((panel) => {
      const codes = panel.words[index].map(([code]) => code);
      const tiles = panel.words[index].map(([code, pmi, joint]) => make("figure", {}, codeButton(panel, code, 48),
        make("figcaption", {}, `${format(+(2 ** pmi).toPrecision(2))} ×`)));
      return make("div", { "data-panel": data.panels.indexOf(panel) }, heading(panel),
        codes.length ? make("div", { class: "pictures" }, ...tiles) : make("p", { class: "note" }, "No code is significantly associated with this word."),
        ...(codes.length ? [make("h4", {}, "Occurrences in images with the word"), shots(panel, codes, 12, (image) => image.words.includes(word))] : []));
    }))]));
  if (jump) one("#words").scrollIntoView();
}
one("#word").addEventListener("input", (event) => searchWord(event.target.value));
one("#word-list").append(...data.words.map((word) => make("option", { value: word })));

// -- similarity maps ---------------------------------------------------------------------------------
function heatMap(name, matrix, words, panel) {
  const n = words.length, size = 12, left = 92, total = left + n * size + 4;
  const values = matrix.flatMap((row, i) => row.filter((value, j) => i !== j && value !== null));
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const middle = low < 0 ? 0 : (low + high) / 2, reach = Math.max(high - middle, middle - low) || 1;
  const svg = make("svg", { viewBox: `0 0 ${total} ${total}`, role: "img", "aria-label": name });
  matrix.forEach((row, i) => {
    svg.append(make("text", { x: left - 6, y: left + i * size + 9.5, "text-anchor": "end", style: "font-size:10px" }, words[i]),
      make("text", { x: 0, y: 0, transform: `translate(${left + i * size + 9.5} ${left - 6}) rotate(-90)`, style: "font-size:10px" }, words[i]));
    row.forEach((value, j) => {
      const part = value === null ? 0 : Math.max(-1, Math.min(1, (value - middle) / reach));
      const fill = i === j ? "var(--line)" : `rgb(var(--heat-${part < 0 ? "low" : "high"}) / ${Math.abs(part).toFixed(3)})`;
      svg.append(make("rect", { x: left + j * size, y: left + i * size, width: size - .6, height: size - .6, style: `fill:${fill}`, "data-i": i, "data-j": j }));
    });
  });
  svg.addEventListener("pointermove", (event) => {
    const { i, j } = event.target.dataset;
    if (i === undefined) return;
    const { maps } = data, parts = [`words ${format(maps.word[i][j])}`, ...data.panels.map((other, k) => `${other.name} ${format(maps.codes[k][i][j])}`)];
    one("#heat-tip").textContent = `${words[i]} – ${words[j]}: ${parts.join(" · ")}`;
  });
  return make("div", {}, panel ? heading(panel) : make("h3", {}, name), make("div", { class: "chart" }, svg),
    make("p", { class: "note" }, `${format(low)} (blue) to ${format(high)} (orange)`));
}
if (data.maps) one("#heat").append(heatMap("Words (text guide)", data.maps.word, data.maps.words),
  ...data.panels.map((panel, k) => heatMap(`Codes of ${panel.name}`, data.maps.codes[k], data.maps.words, panel)));

// -- usage -------------------------------------------------------------------------------------------
const longest = Math.max(...data.panels.map((panel) => panel.size)), most = Math.max(...data.panels.flatMap((panel) => panel.counts));
one("#histograms").append(...data.panels.map((panel) => {
  const [width, height, left, bottom] = [520, 220, 52, 24], sorted = panel.counts.filter((count) => count).sort((a, b) => b - a);
  const y = (count) => (height - bottom) * (1 - Math.log10(count) / Math.max(1, Math.log10(most))) + 6;
  const svg = make("svg", { viewBox: `0 0 ${width} ${height + 8}`, role: "img", "aria-label": `usage of ${panel.name}` });
  for (let tick = 1; tick <= most; tick *= 10) svg.append(make("line", { class: "axis", x1: left, x2: width, y1: y(tick), y2: y(tick) }),
    make("text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, tick.toLocaleString()));
  const bar = (width - left) / longest;
  const d = sorted.map((count, i) => `M${(left + i * bar).toFixed(2)} ${y(1) + 4}V${y(count).toFixed(2)}h${Math.max(bar * .9, .4).toFixed(2)}V${y(1) + 4}z`).join("");
  svg.append(make("path", { d, style: `fill:${color(panel)}` }), make("text", { x: left, y: height + 4 }, "rank 1"),
    make("text", { x: width, y: height + 4, "text-anchor": "end" }, String(longest)));
  const dead = [...panel.counts.keys()].filter((code) => !panel.counts[code]);
  return make("div", {}, heading(panel), make("div", { class: "chart" }, svg),
    make("details", {}, make("summary", {}, `${dead.length} dead code${dead.length === 1 ? "" : "s"}`), make("p", { class: "note dead" }, dead.join(", ") || "none")));
}));

drawGalleries();
searchWord("");
(function showOne() {
  const panel = data.panels.at(-1), codes = [...panel.counts.keys()];
  const most = codes.reduce((best, code) => panel.counts[code] > panel.counts[best] ? code : best, 0);
  showCode(panel, codes.reduce((best, code) => sure(panel, code) > sure(panel, best) ? code : best, most), false);
})();
