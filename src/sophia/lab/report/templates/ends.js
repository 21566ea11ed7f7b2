"use strict";
// End losses against the budget, with the baseline's curve L(D), from which the speed-up is read.
(() => {
  const {data, at, node, budgets, group} = lab;
  const box = at("ends"), readout = at("ends-readout");
  if (!box) return;

  function describe() {
    const lines = [], series = [{}];
    const add = (line, style) => { if (line.length) { lines.push(line); series.push({spanGaps: true, ...style}); } };
    const means = [];
    if (data.fit) add(data.fit.x.map((x, i) => [x, data.fit.y[i]]), {stroke: lab.colour(data.baseline), width: 1.75, points: {show: false}});
    data.contenders.forEach(({name}) => {
      const stroke = lab.colour(name);
      const cells = budgets.map(b => [b, data.runs.filter(r => r.contender === name && r.steps === b && r.end !== null).map(r => r.end)]).filter(c => c[1].length);
      const most = Math.max(0, ...cells.map(c => c[1].length));
      for (let i = 0; i < most; i++) {
        add(cells.filter(c => i < c[1].length).map(c => [c[0], c[1][i]]), {stroke, width: 0, points: {show: true, size: 5, fill: stroke, width: 0}});
      }
      const mean = cells.map(([b, ys]) => [b, ys.reduce((a, y) => a + y, 0) / ys.length, ys.length]);
      const fitted = name === data.baseline && data.fit;
      add(mean, {stroke, width: fitted ? 0 : 1.5, dash: fitted ? undefined : [7, 4], points: {show: false}});
      means.push([name, mean]);
    });
    if (!lines.length) return {empty: "No run has finished yet."};
    const [low, high] = [budgets[0] / 1.15, budgets.at(-1) * 1.15];
    const ys = lines.flatMap(line => line.map(p => p[1]));
    if (data.target !== null) ys.push(data.target);
    const [bottom, top] = [Math.min(...ys), Math.max(...ys)], pad = 0.07 * (top - bottom) || 0.05 * Math.abs(top) || 1;
    return {
      options: {
        height: box.clientWidth < 560 ? 300 : 400,
        scales: {x: {time: false, distr: 3, range: [low, high]}, y: {range: [bottom - pad, top + pad]}},
        axes: [
          lab.axis({label: "budget in steps", splits: () => budgets, filter: (u, ticks) => ticks, values: (u, ticks) => ticks.map(group)}),
          lab.axis({size: 62, values: (u, ticks) => ticks.map(lab.plain)}),
        ],
        series,
        cursor: {points: {show: false}, y: false, drag: {x: false, y: false}},
        hooks: {draw: [u => means.forEach(([name, mean]) => mean.forEach(([b, y]) => lab.mark(u, name, b, y, 4.5, lab.style("--paper")))), u => { if (data.target !== null) lab.across(u, data.target, `target ${data.target}`); }]},
      },
      table: lab.joined(lines),
      tell: x => {
        const budget = x === Infinity ? budgets.at(-1) : budgets.reduce((a, b) => Math.abs(Math.log(b / x)) < Math.abs(Math.log(a / x)) ? b : a);
        const list = node("dl");
        means.forEach(([name, mean]) => {
          const found = mean.find(p => p[0] === budget);
          if (!found) return;
          const entry = node("div"), label = node("dt"), number = node("dd", lab.precise(found[1]));
          label.append(lab.swatch(name), name);
          number.append(" ", node("small", found[2] === 1 ? "1 seed" : `mean of ${found[2]} seeds`));
          entry.append(label, number);
          list.append(entry);
        });
        readout.replaceChildren(node("p", `End loss at ${group(budget)} steps`, "aside"), list);
      },
    };
  }

  lab.place(box, describe);
})();
