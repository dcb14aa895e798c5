"use strict";
// The kinds of chart of the page. Texts come from files: they are only ever set as text.

const SVG = "http://www.w3.org/2000/svg";

function make(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function shape(name, attributes = {}, text = "") {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text) node.textContent = text;
  return node;
}

function swatch(colour) {
  const node = make("i", { class: "swatch" });
  node.style.background = colour;
  return node;
}

function short(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1e15 || size < 1e-4) return value.toExponential(2);
  for (const [factor, suffix] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e4, "K"]]) {
    if (size >= factor) return `${+(value / (factor === 1e4 ? 1e3 : factor)).toPrecision(4)}${suffix}`;
  }
  return String(+value.toPrecision(4));
}

// Round values from low to high, about `count` of them.
function ticks(low, high, count) {
  const raw = (high - low) / Math.max(count, 1), power = 10 ** Math.floor(Math.log10(raw));
  const step = power * ([1, 2, 5, 10].find((nice) => power * nice >= raw * (1 - 1e-9)) || 10);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return found;
}

function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
    for (const nice of high / low > 100 ? [1] : [1, 2, 5]) {
      const value = nice * 10 ** power;
      if (value >= low * (1 - 1e-9) && value <= high * (1 + 1e-9)) found.push(value);
    }
  }
  return found.length > 1 ? found : [low, high];
}

// The last place of ascending `values` that is not after `value`.
function placeOf(values, value) {
  let low = 0, high = values.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (values[middle] <= value) low = middle; else high = middle - 1;
  }
  return low;
}

function nearest(values, value) {
  const at = placeOf(values, value);
  return at + 1 < values.length && values[at + 1] - value < value - values[at] ? at + 1 : at;
}

// Draws now, and again whenever the width changes.
function drawn(host, draw) {
  let width = 0;
  const again = () => {
    const now = Math.floor(host.clientWidth);
    if (now > 0 && now !== width) { width = now; draw(now); }
  };
  new ResizeObserver(again).observe(host);
  again();
  return () => { width = 0; again(); };
}

function tipAt(card, event, lines) {
  let tip = card.querySelector(".tip");
  if (!tip) card.append(tip = make("div", { class: "tip" }));
  tip.replaceChildren(...lines);
  const box = card.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
  tip.style.left = `${Math.max(4, Math.min(x + 14, box.width - tip.offsetWidth - 4))}px`;
  tip.style.top = `${Math.max(4, y - tip.offsetHeight - 12)}px`;
}

function tipLine(name, value, colour) {
  const left = make("span", {}, ...(colour ? [swatch(colour)] : []), name);
  return make("div", {}, left, make("b", {}, value));
}

function noTip(card) {
  const tip = card.querySelector(".tip");
  if (tip) tip.remove();
}

const EDGE = { left: 52, right: 10, top: 8, bottom: 24 };

function frame(host, width, height, xs, ys, options) {
  const svg = shape("svg", { class: "chart", height, viewBox: `0 0 ${width} ${height}`, role: "img" });
  svg.append(shape("title", {}, options.title));
  const plot = { width: width - EDGE.left - EDGE.right, height: height - EDGE.top - EDGE.bottom };
  const level = options.log ? Math.log10 : (v) => v;
  const span = Math.max(xs[1] - xs[0], 1e-12), rise = Math.max(level(ys[1]) - level(ys[0]), 1e-300);
  const x = (v) => EDGE.left + ((v - xs[0]) / span) * plot.width;
  const y = (v) => EDGE.top + (1 - (level(v) - level(ys[0])) / rise) * plot.height;
  const marks = options.log ? logTicks(ys[0], ys[1]) : ticks(ys[0], ys[1], Math.max(plot.height / 45, 2));
  for (const mark of marks) {
    svg.append(shape("line", { class: "grid", x1: EDGE.left, x2: width - EDGE.right, y1: y(mark), y2: y(mark) }));
    const text = options.percent ? `${short(100 * mark)}%` : short(mark);
    svg.append(shape("text", { x: EDGE.left - 7, y: y(mark) + 4, "text-anchor": "end" }, text));
  }
  const bottom = EDGE.top + plot.height;
  svg.append(shape("line", { class: "axis", x1: EDGE.left, x2: width - EDGE.right, y1: bottom, y2: bottom }));
  for (const mark of ticks(xs[0], xs[1], Math.max(plot.width / 85, 2))) {
    svg.append(shape("text", { x: x(mark), y: bottom + 17, "text-anchor": "middle" }, short(mark)));
  }
  host.replaceChildren(svg);
  return { svg, x, y, plot, bottom, back: (px) => xs[0] + ((px - EDGE.left) / plot.width) * span };
}

function pathOf(xs, values, x, y) {
  let text = "", pen = false;
  values.forEach((value, i) => {
    const shown = value !== null && xs[i] !== null && (y.positive !== true || value > 0);
    if (shown) text += `${pen ? "L" : "M"}${x(xs[i]).toFixed(1)} ${y(value).toFixed(1)}`;
    pen = shown;
  });
  return text;
}

function bandOf(xs, low, high, x, y) {
  const there = xs.map((_, i) => i).filter((i) => low[i] !== null && high[i] !== null && xs[i] !== null);
  const kept = y.positive === true ? there.filter((i) => low[i] > 0) : there;
  if (kept.length < 2) return "";
  const over = kept.map((i) => `${x(xs[i]).toFixed(1)} ${y(high[i]).toFixed(1)}`);
  const under = kept.reverse().map((i) => `${x(xs[i]).toFixed(1)} ${y(low[i]).toFixed(1)}`);
  return `M${[...over, ...under].join("L")}Z`;
}

function range(lists) {
  let low = Infinity, high = -Infinity;
  for (const list of lists) for (const value of list) {
    if (value === null) continue;
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return [low, high];
}

// Lines of {name, colour, xs, mean, low?, high?, dashed?}, points of {xs, ys, colour, name}, marks of {x, text, skip?, alert?, verdict?}.
function lineChart(card, host, options) {
  const state = { log: false };
  const redraw = drawn(host, (width) => {
    const lines = options.lines(), points = options.points ? options.points() : [];
    const all = lines.flatMap((l) => [l.mean, l.low || [], l.high || []]).concat(points.map((p) => p.ys));
    const positive = state.log ? all.map((list) => list.filter((v) => v > 0)) : all;
    let [low, high] = range(positive);
    if (!Number.isFinite(low)) { host.replaceChildren(make("div", { class: "none" }, "nothing to draw")); return; }
    if (options.zero && !state.log) low = Math.min(low, 0);
    if (high === low) { const room = Math.abs(high) * 0.05 || 1; high += room; if (!state.log && !options.zero) low -= room; }
    const xs = range(lines.map((l) => l.xs));
    const f = frame(host, width, width < 420 ? 190 : 230, xs[0] === xs[1] ? [xs[0] - 1, xs[1] + 1] : xs, [low, high],
      { log: state.log, percent: options.percent, title: options.title });
    f.y.positive = state.log;
    for (const mark of options.marks ? options.marks() : []) {
      if (mark.x === null || mark.x < xs[0] || mark.x > xs[1]) continue;
      const line = shape("line", { class: ["mark", ...["skip", "alert", "verdict"].filter((kind) => mark[kind])].join(" "), x1: f.x(mark.x), x2: f.x(mark.x), y1: EDGE.top, y2: f.bottom });
      line.append(shape("title", {}, mark.text));
      f.svg.append(line);
    }
    for (const l of lines) {
      if (l.low) f.svg.append(shape("path", { d: bandOf(l.xs, l.low, l.high, f.x, f.y), style: `fill:${l.colour};opacity:.2` }));
    }
    for (const l of lines) {
      const style = `fill:none;stroke:${l.colour};stroke-width:${l.dashed ? 1.5 : 1.7};stroke-linejoin:round${l.dashed ? ";stroke-dasharray:5 4" : ""}`;
      const found = l.mean.filter((v) => v !== null).length;
      if (found === 1) {
        const i = l.mean.findIndex((v) => v !== null);
        f.svg.append(shape("circle", { class: "line", cx: f.x(l.xs[i]), cy: f.y(l.mean[i]), r: 3, style: `fill:${l.colour}` }));
      } else f.svg.append(shape("path", { class: "line", d: pathOf(l.xs, l.mean, f.x, f.y), style }));
    }
    for (const p of points) p.xs.forEach((px, i) => {
      if (px === null || (state.log && p.ys[i] <= 0)) return;
      const dot = shape("circle", { cx: f.x(px), cy: f.y(p.ys[i]), r: 3.5, style: `fill:var(--card);stroke:${p.colour};stroke-width:2` });
      dot.append(shape("title", {}, `${p.name}: ${short(p.ys[i])}`));
      f.svg.append(dot);
    });
    host.dataset.points = lines.reduce((sum, l) => sum + l.mean.filter((v) => v !== null).length, 0);
    hover(card, f, lines, options);
  });
  return { redraw, toggle: () => { state.log = !state.log; redraw(); return state.log; } };
}

function hover(card, f, lines, options) {
  const cross = shape("line", { class: "cross", y1: EDGE.top, y2: f.bottom, visibility: "hidden" });
  f.svg.append(cross);
  f.svg.addEventListener("pointermove", (event) => {
    const at = f.back(event.clientX - f.svg.getBoundingClientRect().left);
    const known = lines.filter((l) => l.xs.length);
    if (!known.length) return;
    const first = known[0].xs[nearest(known[0].xs, at)];
    cross.setAttribute("x1", f.x(first)); cross.setAttribute("x2", f.x(first));
    cross.setAttribute("visibility", "visible");
    const say = (v) => (options.percent && v !== null ? `${short(100 * v)}%` : short(v));
    const rows = known.map((l) => {
      const i = nearest(l.xs, at), band = l.low && l.low[i] !== null && l.low[i] !== l.high[i];
      return tipLine(l.name, band ? `${say(l.mean[i])} (${say(l.low[i])} … ${say(l.high[i])})` : say(l.mean[i]), l.colour);
    });
    tipAt(card, event, [tipLine(options.axis(), short(first)), ...rows]);
  });
  f.svg.addEventListener("pointerleave", () => { cross.setAttribute("visibility", "hidden"); noTip(card); });
}

// Shares of 1 over steps, stacked: {step, shares: {key: […]}} with colours by key.
function stackedArea(card, host, data, colours, title) {
  const keys = Object.keys(data.shares);
  drawn(host, (width) => {
    const xs = range([data.step]), flat = xs[0] === xs[1];
    const f = frame(host, width, width < 420 ? 220 : 280, flat ? [xs[0], xs[0] + 1] : xs, [0, 1], { percent: true, title });
    const at = flat ? [xs[0], xs[0] + 1] : data.step, of = (key) => (flat ? [data.shares[key][0], data.shares[key][0]] : data.shares[key]);
    let below = at.map(() => 0);
    for (const key of keys) {
      const above = of(key).map((share, i) => Math.min(below[i] + (share || 0), 1));
      f.svg.append(shape("path", { class: "line", d: bandOf(at, below, above, f.x, f.y), style: `fill:${colours[key] || "#999"}` }));
      below = above;
    }
    host.dataset.points = data.step.length * keys.length;
    f.svg.addEventListener("pointermove", (event) => {
      const i = nearest(data.step, f.back(event.clientX - f.svg.getBoundingClientRect().left));
      const rows = keys.filter((k) => data.shares[k][i] >= 0.005).sort((a, b) => data.shares[b][i] - data.shares[a][i]);
      tipAt(card, event, [tipLine("step", short(data.step[i])),
        ...rows.slice(0, 9).map((k) => tipLine(k, `${(100 * data.shares[k][i]).toFixed(1)}%`, colours[k]))]);
    });
    f.svg.addEventListener("pointerleave", () => noTip(card));
  });
}

const COLD = [33, 102, 172], HOT = [178, 24, 43], EVEN = [247, 247, 247];

// -1 … 1 from blue over white to red.
function diverging(share) {
  const v = Math.max(-1, Math.min(1, share)), end = v < 0 ? COLD : HOT;
  return EVEN.map((c, i) => Math.round(c + (end[i] - c) * Math.abs(v)));
}

// A heat map of {step, rows, values[row][column]}; shareOf(value) in -1 … 1.
function heatMap(card, host, data, { shareOf, say, row, title }) {
  const count = data.rows.length, columns = data.step.length;
  const canvas = make("canvas", { role: "img", "aria-label": title });
  const names = make("div", { class: "rows" }), steps = make("div", { class: "columns" });
  const height = Math.max(Math.min(count * (count <= 8 ? 26 : count <= 32 ? 14 : 7), 440), 60);
  canvas.width = columns; canvas.height = count;
  canvas.style.height = `${height}px`; canvas.style.imageRendering = "pixelated";
  const context = canvas.getContext("2d"), image = context.createImageData(columns, count);
  data.values.forEach((values, r) => values.forEach((value, c) => {
    const rgb = value === null ? [128, 128, 128] : diverging(shareOf(value));
    image.data.set([...rgb, value === null ? 60 : 255], 4 * (r * columns + c));
  }));
  context.putImageData(image, 0, 0);
  const every = Math.ceil((count * 13) / height);
  data.rows.forEach((name, r) => {
    if (r % every) return;
    const label = make("span", {}, name);
    label.style.top = `${((r + 0.5) / count) * height}px`;
    names.append(label);
  });
  const widest = Math.max(...data.rows.map((name) => name.length), 1);
  names.style.width = `${widest + 0.6}ch`;
  host.replaceChildren(make("div", { class: "heat" }, names, canvas, make("span"), steps));
  drawn(steps, (width) => {
    const shown = Math.max(Math.min(Math.floor(width / 70), columns), 1);
    steps.replaceChildren(...Array.from({ length: shown }, (_, i) => {
      const c = Math.floor(((i + 0.5) / shown) * columns), label = make("span", {}, short(data.step[c]));
      label.style.left = `${((c + 0.5) / columns) * 100}%`;
      return label;
    }));
  });
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    const c = Math.min(Math.floor(((event.clientX - box.left) / box.width) * columns), columns - 1);
    const r = Math.min(Math.floor(((event.clientY - box.top) / box.height) * count), count - 1);
    if (c < 0 || r < 0) return;
    tipAt(card, event, [tipLine(`${row} ${data.rows[r]}, until step ${short(data.step[c])}`, say(data.values[r][c]))]);
  });
  canvas.addEventListener("pointerleave", () => noTip(card));
  host.dataset.points = data.values.reduce((sum, values) => sum + values.filter((v) => v !== null).length, 0);
}

function heatScale(low, middle, high) {
  const bar = make("i");
  bar.style.background = "linear-gradient(to right, rgb(33 102 172), rgb(247 247 247), rgb(178 24 43))";
  return make("div", { class: "scale" }, low, bar, high, ...(middle ? [`· ${middle}`] : []));
}
