// The report: table filters and learning curves.
(function filters() {
  const numbers = one("#numbers"), pairs = one("#pairs");
  if (numbers) {
    const [variant, metric, marked, controls] =
      ["#find-variant", "#find-metric", "#only-marked", "#controls"].map((id) => one(id));
    const heads = all("thead th[data-metric]", numbers).map((head) => [head.dataset.metric, "neutral" in head.dataset]);
    const update = () => {
      filterRows(numbers, (row) => matches(row.dataset.variant, variant.value));
      for (const [name, isNeutral] of heads) {
        const column = all("[data-metric]", numbers).filter((cell) => cell.dataset.metric === name);
        const isMarked = column.some((cell) => cell.classList.contains("better") || cell.classList.contains("worse"));
        const shown = matches(name, metric.value) && (isMarked || !marked.checked) && (!isNeutral || controls.checked);
        column.forEach((cell) => cell.classList.toggle("hidden", !shown));
      }
    };
    [variant, metric, marked, controls].forEach((control) => control.addEventListener("input", update));
    update();
  }
  if (pairs) {
    const [text, variant, clear, controls] =
      ["#find-difference", "#which-variant", "#only-clear", "#pair-controls"].map((id) => one(id));
    const update = () => filterRows(pairs, (row) =>
      matches(row.textContent, text.value) && (!variant.value || row.dataset.variant === variant.value) &&
      (!clear.checked || row.dataset.verdict !== "") && (!("neutral" in row.dataset) || controls.checked));
    [text, variant, clear, controls].forEach((control) => control.addEventListener("input", update));
    update();
  }
})();

(function curves() {
  const [key, which, seeds, log] = ["#curve-key", "#curve-data", "#curve-seeds", "#curve-log"].map((id) => one(id));
  const hiddenVariants = new Set();
  const keys = [...new Set(data.runs.flatMap((run) => Object.keys(run.curves)))].sort(
    (a, b) => b.startsWith("val") - a.startsWith("val") || a.localeCompare(b));
  if (!keys.length) { one("#curves").append(make("p", {}, "No logged metrics.")); return; }
  key.append(...keys.map((name) => make("option", {}, name)));
  const wanted = ["val/rec_loss", "val/lgvq/total", "train/rec_loss", "train/aeloss"].find((name) => keys.includes(name));
  if (wanted) key.value = wanted;
  const sets = [...new Set(data.runs.map((run) => run.data))];
  which.append(...sets.map((name) => make("option", {}, name)));
  one("#curve-data-label").classList.toggle("hidden", sets.length < 2);
  const color = (variant) => `var(--s${data.variants.indexOf(variant) % 10})`;
  one("#curve-legend").append(...data.variants.map((variant) => {
    const button = make("button", { type: "button", "aria-pressed": "true" },
      make("span", { class: "swatch", style: `background:${color(variant)}` }), variant);
    button.addEventListener("click", () => {
      const shown = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(shown));
      hiddenVariants[shown ? "delete" : "add"](variant); draw();
    });
    return button;
  }));

  /** Mean over the seeds, at the steps that all of them have logged. */
  function mean(lines) {
    const count = new Map();
    for (const [step, value] of lines.flat()) {
      const [sum, n] = count.get(step) || [0, 0];
      count.set(step, [sum + value, n + 1]);
    }
    return [...count].filter(([, [, n]]) => n === lines.length).map(([step, [sum, n]]) => [step, sum / n])
      .sort((a, b) => a[0] - b[0]);
  }

  function ticks(low, high, count = 5) {
    const raw = (high - low || Math.abs(high) || 1) / count;
    const power = 10 ** Math.floor(Math.log10(raw));
    const size = [1, 2, 5, 10].map((m) => m * power).find((step) => step >= raw);
    const found = [];
    for (let tick = Math.ceil(low / size) * size; tick <= high + size * 1e-9; tick += size) found.push(+tick.toPrecision(12));
    return found;
  }

  let scene = null;
  function draw() {
    const runs = data.runs.filter((run) => run.data === which.value && run.curves[key.value] && !hiddenVariants.has(run.variant));
    const groups = data.variants.map((variant) => {
      const own = runs.filter((run) => run.variant === variant);
      const lines = own.map((run) => run.curves[key.value]);
      return { variant, lines, seeds: own.length, mean: lines.length ? mean(lines) : [] };
    }).filter((group) => group.lines.length);
    const width = Math.max(300, one("#curve").clientWidth), height = Math.min(380, Math.max(240, width * 0.45));
    const [left, right, top, bottom] = [58, 12, 12, 30];
    const points = groups.flatMap((group) => group.lines.flat());
    const positive = points.every(([, value]) => value > 0);
    log.disabled = !positive;
    const scale = log.checked && positive ? Math.log10 : (value) => value;
    const back = log.checked && positive ? (value) => 10 ** value : (value) => value;
    const [xs, ys] = [points.map((p) => p[0]), points.map((p) => scale(p[1]))];
    const extent = (values) => values.length ? [Math.min(...values), Math.max(...values)] : [0, 1];
    const [x0, x1] = extent(xs), [low, high] = extent(ys);
    const margin = (high - low) * 0.05 || Math.abs(high) * 0.05 || 0.5, [y0, y1] = [low - margin, high + margin];
    const x = (step) => left + (width - left - right) * (x1 > x0 ? (step - x0) / (x1 - x0) : 0.5);
    const y = (value) => top + (height - top - bottom) * (1 - (scale(value) - y0) / (y1 - y0));
    const path = (line) => line.map(([step, value], i) => `${i ? "L" : "M"}${x(step).toFixed(1)} ${y(value).toFixed(1)}`).join("");
    const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${key.value} by step` });
    for (const tick of ticks(y0, y1)) {
      const at = top + (height - top - bottom) * (1 - (tick - y0) / (y1 - y0));
      svg.append(make("line", { class: "axis", x1: left, x2: width - right, y1: at, y2: at }),
        make("text", { x: left - 8, y: at + 4, "text-anchor": "end" }, format(back(tick))));
    }
    for (const tick of ticks(x0, x1, width < 500 ? 4 : 8))
      svg.append(make("text", { x: x(tick), y: height - 8, "text-anchor": "middle" }, format(tick)));
    for (const group of groups) {
      const stroke = `stroke:${color(group.variant)};fill:none`;
      if (seeds.checked && group.lines.length > 1)
        for (const line of group.lines) svg.append(make("path", { d: path(line), style: `${stroke};stroke-width:1;opacity:.35` }));
      svg.append(make("path", { d: path(group.mean), "data-variant": group.variant, style: `${stroke};stroke-width:2.2` }));
      if (group.mean.length === 1)
        svg.append(make("circle", { cx: x(group.mean[0][0]), cy: y(group.mean[0][1]), r: 4, style: `fill:${color(group.variant)}` }));
    }
    const cursor = make("line", { class: "zero", y1: top, y2: height - bottom, x1: -9, x2: -9 });
    svg.append(cursor);
    one("#curve").replaceChildren(svg);
    const counts = [...new Set(groups.map((group) => group.seeds))].sort();
    one("#curve-note").textContent = groups.length
      ? `${key.value}: mean of ${counts.join(" or ")} seed${counts.join() === "1" ? "" : "s"} (thick)` +
        `${counts.some((count) => count > 1) ? ", each seed (thin)" : ""}, by step.`
      : `No visible variant has logged ${key.value}.`;
    scene = { groups, x, cursor, width, svg };
  }

  one("#curve").addEventListener("pointermove", (event) => {
    const { groups, x, cursor, width, svg } = scene;
    const box = svg.getBoundingClientRect(), at = (event.clientX - box.left) / box.width * width;
    const steps = [...new Set(groups.flatMap((group) => group.mean.map(([step]) => step)))];
    if (!steps.length) return;
    const step = steps.reduce((best, other) => Math.abs(x(other) - at) < Math.abs(x(best) - at) ? other : best);
    cursor.setAttribute("x1", x(step)); cursor.setAttribute("x2", x(step));
    const values = groups.map((group) => [group.variant, group.mean.find(([other]) => other === step)])
      .filter(([, found]) => found).map(([variant, found]) => `${variant} ${format(found[1])}`);
    one("#curve-tip").textContent = `step ${step}: ${values.join(" · ")}`;
  });
  [key, which, seeds, log].forEach((control) => control.addEventListener("input", draw));
  addEventListener("resize", draw);
  draw();
})();
