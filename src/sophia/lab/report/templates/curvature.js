"use strict";
// Of each contender that tells: which bound decides its steps, and how large h is. Means over the seeds of its
// largest budget; those of h are geometric.
(() => {
  const {data, at, node, budgets, group} = lab;
  const home = at("curvature");
  if (!home) return;
  const SHARES = {unclipped: "unclipped", eps_limited: "limited by eps"};
  const QUANTILES = {h_q05: "5%", h_q50: "median", h_q95: "95%"};
  const keys = [...Object.keys(SHARES), ...Object.keys(QUANTILES)];
  const tells = run => run.status !== "diverged" && keys.some(key => (run.train.y[key] || []).some(v => v !== null));

  // The mean line of a quantity; a step counts where every seed has it.
  function line(runs, key, logs) {
    const table = new Map();
    runs.forEach(run => (run.train.y[key] || []).forEach((y, i) => {
      const step = run.train.x.step[i];
      if (y === null || (logs && y <= 0)) return;
      const [sum, n] = table.get(step) || [0, 0];
      table.set(step, [sum + (logs ? Math.log(y) : y), n + 1]);
    }));
    const shared = [...table.entries()].filter(([, v]) => v[1] === runs.length);
    return shared.map(([step, [sum, n]]) => [step, logs ? Math.exp(sum / n) : sum / n]).sort((a, b) => a[0] - b[0]);
  }

  function chart(name, budget, title, about, describe) {
    const figure = node("figure"), caption = node("figcaption"), box = node("div", undefined, "chart small"), readout = node("p", undefined, "aside numbers-line");
    caption.append(lab.swatch(name), node("strong", `${name}: ${title}`), ` ${about}`);
    box.tabIndex = 0;
    box.setAttribute("role", "group");
    box.setAttribute("aria-label", `${name}: ${title}. Left and right arrow keys move along the curves.`);
    figure.append(caption, box, readout);
    home.append(figure);
    const tell = (lines, words) => x => {
      const parts = lines.map(([label, l]) => [label, lab.height(l, x)]).filter(p => p[1] !== null).map(([label, y]) => `${label} ${words(y)}`);
      readout.textContent = `At ${x === Infinity ? "the end" : group(x) + " steps"}: ${parts.join(", ")}`;
    };
    lab.place(box, () => describe(tell));
  }

  const options = (series, y, more) => ({
    height: 220,
    scales: {x: {time: false}, y},
    axes: [lab.axis({label: "steps", space: 60, values: (u, ticks) => ticks.map(lab.large)}), lab.axis({size: 58, ...more.axis})],
    series: [{}, ...series], bands: more.bands || [],
  });

  // Powers of ten inside the axis, five of them at most; where it holds fewer than two, its own ends.
  function decades(u, axis, low, high) {
    const first = Math.ceil(Math.log10(low) - 1e-9), last = Math.floor(Math.log10(high) + 1e-9), stride = Math.max(1, Math.ceil((last - first + 1) / 5)), found = [];
    for (let power = first; power <= last; power += stride) found.push(10 ** power);
    return found.length > 1 ? found : [low, high];
  }

  let drawn = 0;
  data.contenders.forEach(({name}) => {
    const telling = data.runs.filter(r => r.contender === name && tells(r));
    const budget = budgets.findLast(b => telling.some(r => r.steps === b));
    const runs = telling.filter(r => r.steps === budget);
    if (!runs.length) return;
    const seeds = runs.length === 1 ? "1 seed" : `mean of ${runs.length} seeds`;
    const about = `(${group(budget)} steps, ${seeds})`;

    const shares = Object.entries(SHARES).map(([key, words]) => [words, line(runs, key)]).filter(l => l[1].length);
    if (shares.length) {
      chart(name, budget, "which bound decides", about, tell => ({
        options: options(
          shares.map(([words]) => ({stroke: lab.colour(name), width: 2, dash: words === "unclipped" ? undefined : [3, 4], spanGaps: true, points: {show: false}})),
          {range: [0, 1]}, {axis: {values: (u, ticks) => ticks.map(v => `${Math.round(100 * v)}%`)}},
        ),
        table: lab.joined(shares.map(s => s[1])),
        tell: tell(shares, v => `${(100 * v).toFixed(1)}%`),
      }));
      drawn++;
    }
    // Hutchinson's h has negative entries; then the lower quantile has no place on a logarithmic axis.
    const all = Object.entries(QUANTILES).map(([key, words]) => [words, line(runs, key, true)]);
    const median = all[1][1].length, quantiles = all.filter(([words, l]) => l.length && (words !== "5%" || l.length >= median));
    if (quantiles.length) {
      const places = Object.fromEntries(quantiles.map(([words], i) => [words, i + 1])), low = places["5%"] || places.median;
      const range = places["5%"] ? "h, 5% to 95%" : "h, median to 95%; 5% of it is zero or less";
      chart(name, budget, range, about, tell => {
        const bands = low && places["95%"] ? [{series: [places["95%"], low], fill: lab.colour(name) + "38"}] : [];
        return {
          options: options(
            quantiles.map(([words]) => ({stroke: lab.colour(name), width: words === "median" ? 2 : 0, spanGaps: true, points: {show: false}})),
            {distr: 3}, {bands, axis: {splits: decades, filter: (u, ticks) => ticks, values: (u, ticks) => ticks.map(v => v.toExponential(0))}},
          ),
          table: lab.joined(quantiles.map(q => q[1])),
          tell: tell(quantiles, v => v.toExponential(1)),
        };
      });
      drawn++;
    }
  });
  document.documentElement.dataset.curvature = String(drawn);
})();
