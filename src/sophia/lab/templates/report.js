"use strict";
// Draws the curves from the page's own data. Text from the records enters the page as text nodes only.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = id => document.getElementById(id);
  const chart = at("chart"), readout = at("readout"), dark = matchMedia("(prefers-color-scheme: dark)");
  const slots = Object.fromEntries(data.contenders.map((c, i) => [c.name, i ? "c" + ((i - 1) % 6 + 1) : "base"]));
  const unique = values => [...new Set(values)];
  const budgets = unique(data.runs.map(r => r.steps)).sort((a, b) => a - b);
  const seeds = unique(data.runs.map(r => r.seed)).sort((a, b) => a - b);
  const style = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  let plot = null, curves = [];

  const node = (tag, text, cls) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (cls) element.className = cls;
    return element;
  };
  const options = (select, table) => Object.entries(table).forEach(([value, words]) => {
    const option = node("option", words);
    option.value = value;
    select.append(option);
  });
  const chips = (fieldset, values, words, mark) => {
    values.forEach(value => {
      const label = node("label", undefined, "chip"), box = node("input");
      box.type = "checkbox"; box.checked = true; box.value = value;
      label.append(box);
      if (mark) label.append(node("i", undefined, "swatch " + mark(value)));
      label.append(words(value));
      fieldset.append(label);
    });
    fieldset.hidden = values.length < 2;
  };
  const chosen = id => new Set([...at(id).querySelectorAll("input:checked")].map(box => box.value));
  const group = number => number.toLocaleString("en", {maximumFractionDigits: 0});
  const large = v => v >= 1e15 ? v / 1e15 + "P" : v >= 1e12 ? v / 1e12 + "T" : v >= 1e9 ? v / 1e9 + "G" : v >= 1e6 ? v / 1e6 + "M" : v >= 1e4 ? v / 1e3 + "k" : String(+v.toPrecision(6));
  const precise = v => v === 0 ? "0" : Math.abs(v) < 0.01 || Math.abs(v) >= 1e5 ? v.toExponential(2) : v.toFixed(Math.abs(v) < 10 ? 4 : 1);

  // One run's points for the chosen axes, without gaps, left to right.
  function points(run, metric, axis) {
    const source = metric === "validation" ? run.validation : {x: run.train.x, y: run.train.y[metric] || []};
    const xs = source.x[axis], steps = source.x.step, kept = [];
    source.y.forEach((y, i) => { if (y !== null && xs[i] !== null) kept.push([xs[i], y, steps[i]]); });
    return kept.sort((a, b) => a[0] - b[0]);
  }

  // The mean over seeds where all of them have a value; equal steps are averaged, also along the axis.
  function mean(lines) {
    const table = new Map();
    lines.forEach(line => line.forEach(([x, y, step]) => {
      const sum = table.get(step) || [0, 0, 0];
      table.set(step, [sum[0] + x, sum[1] + y, sum[2] + 1]);
    }));
    return [...table.entries()].filter(([, s]) => s[2] === lines.length).map(([step, s]) => [s[0] / s[2], s[1] / s[2], step]).sort((a, b) => a[0] - b[0]);
  }

  function gather() {
    const metric = at("metric").value, axis = at("axis").value, each = at("each").checked;
    const names = chosen("contenders"), steps = chosen("budgets"), kept = chosen("seeds");
    curves = [];
    data.contenders.filter(c => names.has(c.name)).forEach(({name}) => budgets.filter(b => steps.has(String(b))).forEach(budget => {
      const runs = data.runs.filter(r => r.contender === name && r.steps === budget && kept.has(String(r.seed)));
      const lines = runs.map(r => ({run: r, line: points(r, metric, axis)})).filter(l => l.line.length);
      const sound = lines.filter(l => l.run.status !== "diverged");
      const base = {name, budget, color: style("--" + slots[name]), full: budget === budgets.at(-1)};
      if (each || !sound.length) lines.forEach(l => curves.push({...base, line: l.line, thin: true, seed: l.run.seed, status: l.run.status}));
      if (sound.length) curves.push({...base, line: mean(sound.map(l => l.line)), thin: false, n: sound.length});
    }));
    curves = curves.filter(c => c.line.length);
    curves.sort((a, b) => b.thin - a.thin);
  }

  // By default losses are shown from where the steep start is over, so that the ends can be told apart.
  function heights(low, high) {
    const losses = ["validation", "loss"].includes(at("metric").value) && !at("whole").checked;
    const values = [];
    curves.forEach(curve => {
      if (losses && curve.status === "diverged") return;
      const end = curve.line.at(-1)[0];
      curve.line.forEach(([x, y]) => { if (x >= low && x <= high && (!losses || x >= 0.15 * end)) values.push(y); });
    });
    if (!values.length) return [0, 1];
    const bottom = Math.min(...values), top = Math.max(...values), pad = 0.06 * (top - bottom) || 0.05 * Math.abs(top) || 1;
    return [bottom - pad, top + pad];
  }

  function draw() {
    gather();
    if (plot) plot.destroy();
    plot = null;
    chart.replaceChildren();
    if (!curves.length) {
      chart.append(node("p", "Nothing to draw for this choice: no run that is ticked has recorded it.", "aside"));
      return;
    }
    const soft = style("--soft"), grid = {stroke: style("--line"), width: 1}, axis = at("axis").value;
    const table = curves.length > 1 ? uPlot.join(curves.map(c => [c.line.map(p => p[0]), c.line.map(p => p[1])])) : [curves[0].line.map(p => p[0]), curves[0].line.map(p => p[1])];
    const font = "13px system-ui, sans-serif", narrow = chart.clientWidth < 560;
    plot = new uPlot({
      width: chart.clientWidth, height: narrow ? 300 : 400, legend: {show: false},
      scales: {x: {time: false}, y: {range: u => heights(...u.series[0].idxs.map(i => u.data[0][i]))}},
      axes: [
        {stroke: soft, grid, ticks: grid, font, labelFont: font, label: data.axes[axis], space: 70, values: (u, ticks) => ticks.map(v => axis === "seconds" ? group(v) : large(v))},
        {stroke: soft, grid, ticks: grid, font, size: 62, values: (u, ticks) => ticks.map(v => v !== 0 && Math.abs(v) < 0.0001 ? v.toExponential(1) : String(+v.toPrecision(5)))},
      ],
      series: [{}, ...curves.map(c => ({
        stroke: c.color, width: c.thin ? 1 : c.full ? 2.5 : 1.75, alpha: c.thin ? 0.45 : 1, spanGaps: true,
        dash: c.full || c.thin ? undefined : [7, 4], points: {show: c.line.length < 2},
      }))],
      cursor: {points: {show: false}, y: false, drag: {x: true, y: false, uni: 20}},
      hooks: {setCursor: [u => u.cursor.left >= 0 && tell(u.posToVal(u.cursor.left, "x"))]},
    }, table, chart);
    tell(Infinity);
  }

  // Values under the cursor: of each mean curve, with the range of its seeds.
  function tell(x) {
    const value = line => {
      const after = line.findIndex(p => p[0] >= x);
      if (x === Infinity) return line.at(-1)[1];
      if (after < 0) return null;
      if (after === 0) return line[0][0] === x ? line[0][1] : null;
      const [a, b] = [line[after - 1], line[after]];
      return a[1] + (b[1] - a[1]) * (x - a[0]) / (b[0] - a[0] || 1);
    };
    const list = node("dl");
    curves.filter(c => !c.thin).forEach(curve => {
      const y = value(curve.line);
      if (y === null) return;
      const entry = node("div"), name = node("dt"), number = node("dd", precise(y));
      name.append(node("i", undefined, "swatch " + slots[curve.name]), `${curve.name}, ${group(curve.budget)} steps`);
      const others = curves.filter(c => c.thin && c.status !== "diverged" && c.name === curve.name && c.budget === curve.budget).map(c => value(c.line)).filter(v => v !== null);
      if (others.length > 1) number.append(" ", node("small", `seeds ${precise(Math.min(...others))} to ${precise(Math.max(...others))}`));
      entry.append(name, number);
      list.append(entry);
    });
    const axis = at("axis").value, words = data.axes[axis];
    const place = axis === "flops" ? x.toExponential(2) : x >= 100 ? group(x) : String(+x.toPrecision(3));
    const where = x === Infinity ? "the end" : `${place} ${words}`;
    readout.replaceChildren(node("p", `${data.metrics[at("metric").value]} at ${where}`, "aside"), list);
  }

  chart.addEventListener("keydown", event => {
    const moves = {ArrowLeft: -1, ArrowRight: 1, Home: -1e9, End: 1e9};
    if (!plot || !(event.key in moves)) return;
    event.preventDefault();
    const width = plot.over.clientWidth, step = width / 60, now = plot.cursor.left < 0 ? 0 : plot.cursor.left;
    const left = Math.min(width - 1, Math.max(0, now + moves[event.key] * step));
    plot.setCursor({left, top: plot.over.clientHeight / 2});
  });

  options(at("metric"), data.metrics);
  options(at("axis"), data.axes);
  chips(at("contenders"), data.contenders.map(c => c.name), v => v, v => slots[v]);
  chips(at("budgets"), budgets, group);
  chips(at("seeds"), seeds, String);
  at("controls").addEventListener("change", draw);
  at("controls").addEventListener("submit", event => event.preventDefault());
  at("reset").addEventListener("click", draw);
  dark.addEventListener("change", draw);
  let width = 0;
  new ResizeObserver(() => {
    if (plot && chart.clientWidth && chart.clientWidth !== width) { width = chart.clientWidth; plot.setSize({width, height: plot.height}); }
  }).observe(chart);
  draw();
  width = chart.clientWidth;
  document.documentElement.dataset.curves = String(curves.length);
})();
