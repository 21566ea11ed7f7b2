"use strict";
// What the charts of the page share. Text from the records enters the page as text nodes only.
const lab = (() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = id => document.getElementById(id);
  const slots = Object.fromEntries(data.contenders.map(c => [c.name, c.slot]));
  const style = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const colour = name => style("--" + slots[name]);
  const unique = values => [...new Set(values)];
  const budgets = unique(data.runs.map(r => r.steps)).sort((a, b) => a - b);
  const seeds = unique(data.runs.map(r => r.seed)).sort((a, b) => a - b);
  const font = "13px system-ui, sans-serif";

  const node = (tag, text, cls) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (cls) element.className = cls;
    return element;
  };
  const swatch = name => node("i", undefined, "swatch " + slots[name]);
  const group = number => number.toLocaleString("en", {maximumFractionDigits: 0});
  const large = v => v >= 1e15 ? v / 1e15 + "P" : v >= 1e12 ? v / 1e12 + "T" : v >= 1e9 ? v / 1e9 + "G" : v >= 1e6 ? v / 1e6 + "M" : v >= 1e4 ? v / 1e3 + "k" : String(+v.toPrecision(6));
  const precise = v => v === 0 ? "0" : Math.abs(v) < 0.01 || Math.abs(v) >= 1e5 ? v.toExponential(2) : v.toFixed(Math.abs(v) < 10 ? 4 : 1);
  const plain = v => v !== 0 && Math.abs(v) < 0.0001 ? v.toExponential(1) : String(+v.toPrecision(5));

  // An axis in the page's colours; `more` is uPlot's.
  const axis = more => {
    const grid = {stroke: style("--line"), width: 1};
    return {stroke: style("--soft"), grid, ticks: grid, font, labelFont: font, ...more};
  };

  // Where a line has the height that x asks for, linear between points; null outside of it.
  const height = (line, x) => {
    if (x === Infinity) return line.at(-1)[1];
    const after = line.findIndex(p => p[0] >= x);
    if (after < 0) return null;
    if (after === 0) return line[0][0] === x ? line[0][1] : null;
    const [a, b] = [line[after - 1], line[after]];
    return a[1] + (b[1] - a[1]) * (x - a[0]) / (b[0] - a[0] || 1);
  };

  // A dashed line across the plot with a word on it.
  const across = (u, y, words) => {
    const place = u.valToPos(y, "y", true), {left, top, width, height: tall} = u.bbox, c = u.ctx, scale = devicePixelRatio;
    if (place < top || place > top + tall) return;
    c.save();
    c.strokeStyle = c.fillStyle = style("--soft");
    c.lineWidth = scale;
    c.setLineDash([6 * scale, 4 * scale]);
    c.beginPath(); c.moveTo(left, place); c.lineTo(left + width, place); c.stroke();
    c.font = `${12 * scale}px system-ui, sans-serif`;
    c.textAlign = "left"; c.textBaseline = "bottom";
    c.fillText(words, left + 6 * scale, place - 2 * scale);
    c.restore();
  };

  // A contender's mark around a place of the canvas, filled with the paper's colour or its own.
  const shapes = Object.fromEntries(data.contenders.map(c => [c.name, c.shape]));
  const mark = (u, name, x, y, radius, fill) => {
    const c = u.ctx, size = radius * devicePixelRatio, left = u.valToPos(x, "x", true), top = u.valToPos(y, "y", true);
    c.save();
    c.beginPath();
    shapes[name].forEach(([a, b]) => c.lineTo(left + a * size, top - b * size));
    c.closePath();
    c.fillStyle = fill; c.strokeStyle = colour(name); c.lineWidth = 1.75 * devicePixelRatio; c.setLineDash([]);
    c.fill(); c.stroke();
    c.restore();
  };

  // A chart in its box: drawn again when the colours change, resized with the page, walked along by the arrow keys.
  // `describe` gives {options, table, tell} or {empty: words}; tell(x) puts words of the place x, tell(Infinity) of the end.
  function place(box, describe) {
    let plot = null, width = 0, tell = () => {};
    const draw = () => {
      if (plot) plot.destroy();
      plot = null;
      box.replaceChildren();
      const what = describe();
      if (what.empty) { box.append(node("p", what.empty, "aside")); return; }
      tell = what.tell;
      const hooks = {...what.options.hooks, setCursor: [u => u.cursor.left >= 0 && tell(u.posToVal(u.cursor.left, "x"))]};
      plot = new uPlot({
        width: box.clientWidth, legend: {show: false},
        cursor: {points: {show: false}, y: false, drag: {x: true, y: false, uni: 20}},
        ...what.options, hooks,
      }, what.table, box);
      tell(Infinity);
    };
    box.addEventListener("keydown", event => {
      const moves = {ArrowLeft: -1, ArrowRight: 1, Home: -1e9, End: 1e9};
      if (!plot || !(event.key in moves)) return;
      event.preventDefault();
      const wide = plot.over.clientWidth, now = plot.cursor.left < 0 ? 0 : plot.cursor.left;
      const left = Math.min(wide - 1, Math.max(0, now + moves[event.key] * wide / 60));
      plot.setCursor({left, top: plot.over.clientHeight / 2});
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
    new ResizeObserver(() => {
      if (plot && box.clientWidth && box.clientWidth !== width) { width = box.clientWidth; plot.setSize({width, height: plot.height}); }
    }).observe(box);
    draw();
    width = box.clientWidth;
    return draw;
  }

  // Columns of several lines over one common axis; lines of one point and one line alone included.
  const joined = lines => {
    const tables = lines.map(line => [line.map(p => p[0]), line.map(p => p[1])]);
    return tables.length > 1 ? uPlot.join(tables) : tables[0];
  };

  return {data, at, slots, style, colour, budgets, seeds, font, node, swatch, group, large, precise, plain, axis, height, across, mark, place, joined};
})();
