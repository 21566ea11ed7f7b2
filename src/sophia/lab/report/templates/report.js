"use strict";
// The training curves, with the controls above them.
(() => {
  const {data, at, node, budgets, seeds, group} = lab;
  const chart = at("chart"), readout = at("readout"), losses = ["validation", "loss"];
  let curves = [];

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
      if (mark) label.append(mark(value));
      label.append(words(value));
      fieldset.append(label);
    });
    fieldset.hidden = values.length < 2;
  };
  const chosen = id => new Set([...at(id).querySelectorAll("input:checked")].map(box => box.value));

  // One run's points for the chosen axes, without gaps, left to right.
  function points(run, metric, axis) {
    const source = metric === "validation" ? run.validation : {x: run.train.x, y: run.train.y[metric] || []};
    const xs = source.x[axis], steps = source.x.step, kept = [];
    source.y.forEach((y, i) => { if (y !== null && xs[i] !== null) kept.push([xs[i], y, steps[i]]); });
    return kept.sort((a, b) => a[0] - b[0]);
  }

  // Mean, lowest and highest over seeds where all of them have a value; equal steps are averaged along the axis too.
  function summary(lines) {
    const table = new Map();
    lines.forEach(line => line.forEach(([x, y, step]) => {
      const sum = table.get(step) || {x: 0, y: 0, n: 0, low: Infinity, high: -Infinity};
      table.set(step, {x: sum.x + x, y: sum.y + y, n: sum.n + 1, low: Math.min(sum.low, y), high: Math.max(sum.high, y)});
    }));
    const shared = [...table.values()].filter(s => s.n === lines.length).map(s => ({...s, x: s.x / s.n, y: s.y / s.n}));
    shared.sort((a, b) => a.x - b.x);
    return {mean: shared.map(s => [s.x, s.y]), low: shared.map(s => [s.x, s.low]), high: shared.map(s => [s.x, s.high])};
  }

  // Curves in the order in which they are drawn: bands, single seeds, means.
  function gather() {
    const metric = at("metric").value, axis = at("axis").value, each = at("each").checked, band = at("band").checked;
    const names = chosen("contenders"), steps = chosen("budgets"), kept = chosen("seeds");
    const bands = [], thin = [], means = [];
    data.contenders.filter(c => names.has(c.name)).forEach(({name}) => budgets.filter(b => steps.has(String(b))).forEach(budget => {
      const runs = data.runs.filter(r => r.contender === name && r.steps === budget && kept.has(String(r.seed)));
      const lines = runs.map(r => ({run: r, line: points(r, metric, axis)})).filter(l => l.line.length);
      const sound = lines.filter(l => l.run.status !== "diverged");
      const base = {name, budget, color: lab.colour(name), full: budget === budgets.at(-1)};
      lines.filter(l => each || l.run.status === "diverged").forEach(l => thin.push({...base, kind: "seed", line: l.line, status: l.run.status}));
      if (!sound.length) return;
      const {mean, low, high} = summary(sound.map(l => l.line));
      if (!mean.length) return;
      if (band && sound.length > 1) bands.push({...base, kind: "high", line: high}, {...base, kind: "low", line: low});
      means.push({...base, kind: "mean", line: mean, low, high, n: sound.length});
    }));
    curves = [...bands, ...thin, ...means];
  }

  // By default losses are shown from where the steep start is over, so that the ends can be told apart.
  function heights(low, high) {
    const late = losses.includes(at("metric").value) && !at("whole").checked, values = [];
    curves.forEach(curve => {
      if (late && curve.status === "diverged") return;
      const end = curve.line.at(-1)[0];
      curve.line.forEach(([x, y]) => { if (x >= low && x <= high && (!late || x >= 0.15 * end)) values.push(y); });
    });
    if (!values.length) return [0, 1];
    if (losses.includes(at("metric").value) && data.target !== null) values.push(data.target);
    const bottom = Math.min(...values), top = Math.max(...values), pad = 0.06 * (top - bottom) || 0.05 * Math.abs(top) || 1;
    return [bottom - pad, top + pad];
  }

  function describe() {
    gather();
    if (!curves.length) return {empty: "Nothing to draw for this choice: no run that is ticked has recorded it."};
    const axis = at("axis").value, narrow = chart.clientWidth < 560, metric = at("metric").value;
    const bands = curves.flatMap((c, i) => c.kind === "high" ? [{series: [i + 1, i + 2], fill: c.color + "30"}] : []);
    return {
      options: {
        height: narrow ? 300 : 400,
        scales: {x: {time: false}, y: {range: u => heights(...u.series[0].idxs.map(i => u.data[0][i]))}},
        axes: [
          lab.axis({label: data.axes[axis], space: 70, values: (u, ticks) => ticks.map(v => axis === "seconds" ? group(v) : lab.large(v))}),
          lab.axis({size: 62, values: (u, ticks) => ticks.map(lab.plain)}),
        ],
        bands,
        series: [{}, ...curves.map(c => ({
          stroke: c.color, spanGaps: true, points: {show: c.line.length < 2},
          width: c.kind === "mean" ? (c.full ? 2.5 : 1.75) : c.kind === "seed" ? 1 : 0, alpha: c.kind === "seed" ? 0.55 : 1,
          dash: c.full || c.kind !== "mean" ? undefined : [7, 4],
        }))],
        hooks: {draw: [u => { if (data.target !== null && losses.includes(metric)) lab.across(u, data.target, `target ${data.target}`); }]},
      },
      table: lab.joined(curves.map(c => c.line)),
      tell,
    };
  }

  // Values under the cursor: of each mean curve, with the range of its seeds.
  function tell(x) {
    const list = node("dl");
    curves.filter(c => c.kind === "mean").forEach(curve => {
      const y = lab.height(curve.line, x);
      if (y === null) return;
      const entry = node("div"), name = node("dt"), number = node("dd", lab.precise(y));
      name.append(lab.swatch(curve.name), `${curve.name}, ${group(curve.budget)} steps`);
      if (curve.n > 1) number.append(" ", node("small", `seeds ${lab.precise(lab.height(curve.low, x))} to ${lab.precise(lab.height(curve.high, x))}`));
      entry.append(name, number);
      list.append(entry);
    });
    const axis = at("axis").value, words = data.axes[axis];
    const place = axis === "flops" ? x.toExponential(2) : x >= 100 ? group(x) : String(+x.toPrecision(3));
    const where = x === Infinity ? "the end" : `${place} ${words}`;
    readout.replaceChildren(node("p", `${data.metrics[at("metric").value]} at ${where}`, "aside"), list);
  }

  options(at("metric"), data.metrics);
  options(at("axis"), data.axes);
  chips(at("contenders"), data.contenders.map(c => c.name), v => v, lab.swatch);
  chips(at("budgets"), budgets, group);
  chips(at("seeds"), seeds, String);
  const draw = lab.place(chart, describe);
  at("controls").addEventListener("change", draw);
  at("controls").addEventListener("submit", event => event.preventDefault());
  at("reset").addEventListener("click", draw);
  document.documentElement.dataset.curves = String(curves.filter(c => c.kind === "mean").length);

  // The sentence to quote goes to the clipboard where the browser lets a page do that.
  document.querySelectorAll("button.copy").forEach(button => {
    if (!navigator.clipboard) return;
    button.hidden = false;
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(button.parentElement.querySelector("p").textContent.trim());
        button.textContent = "Copied";
      } catch { button.textContent = "Not allowed: select the text"; }
    });
  });
})();
