// The page: which charts there are, of which runs.

const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs, MANY = RUNS.length > 1, PAGE = document.getElementById("page");
const colourOf = (i) => `var(--run-${i % 8})`;
const shown = RUNS.map(() => true);
let axis = "step";
const redraws = [];

function section(title, text) {
  const node = make("section", {}, make("h2", {}, title), ...(text ? [make("p", {}, text)] : []));
  PAGE.append(node);
  return node;
}

function cardOf(title, unit, chart, within) {
  const head = make("div", { class: "head" }, make("h3", {}, title), make("span", { class: "unit" }, unit || ""));
  const host = make("div", { "data-chart": chart, "data-points": 0 });
  const card = make("div", { class: "card" }, head, host);
  within.append(card);
  return { card, head, host };
}

function nothing(host, text) { host.replaceChildren(make("div", { class: "none" }, text)); }

const AXES = { step: "step", tokens: "tokens", hours: "hours in steps" };

function xsOf(run) { return run.x[axis]; }

// Where a step lies on the axis that is chosen.
function atStep(run, step) { return run.x.step.length ? xsOf(run)[nearest(run.x.step, step)] : null; }

function linesOf(key, extra) {
  return () => RUNS.flatMap((run, i) => {
    if (!shown[i]) return [];
    const found = [];
    for (const [name, dashed] of [[key, false], ...(extra ? [[extra[0], true]] : [])]) {
      const line = run.lines[name];
      if (line) found.push({ ...line, xs: xsOf(run), colour: colourOf(i), dashed, name: (MANY ? run.name : "") + (dashed ? ` ${extra[1]}` : MANY ? "" : key) });
    }
    return found;
  });
}

function marks() {
  return RUNS.flatMap((run, i) => (shown[i] ? [
    ...run.restarts.map((step) => ({ x: atStep(run, step), text: `${run.name}: started again after step ${step}` })),
    ...run.alerts.map(([step, text]) => ({ x: atStep(run, step), alert: true, text: `${run.name}: step ${step}: ${text}` })),
    ...(run.verdict && run.verdict.step !== null ? [{ x: atStep(run, run.verdict.step), verdict: true, text: `${run.name}: ${run.verdict.line}` }] : []),
    ...run.skipped.map((step) => ({ x: atStep(run, step), skip: true, text: `${run.name}: step ${step} skipped` })),
  ] : []));
}

function overSteps(within, key, title, unit, options = {}) {
  const { card, head, host } = cardOf(title, unit, key, within);
  if (!RUNS.some((run) => run.lines[key] || (options.extra && run.lines[options.extra[0]]))) {
    nothing(host, options.none || "metrics.jsonl has no such numbers");
    return;
  }
  const chart = lineChart(card, host, {
    title, lines: linesOf(key, options.extra), marks, axis: () => AXES[axis], percent: options.percent, zero: options.zero,
    points: options.held && (() => RUNS.flatMap((run, i) => (shown[i] && run.held_out.length ? [{
      xs: run.held_out.map(([step]) => atStep(run, step)), ys: run.held_out.map(([, loss]) => loss), colour: colourOf(i),
      name: `${MANY ? `${run.name}, ` : ""}held-out loss`,
    }] : []))),
  });
  redraws.push(chart.redraw);
  if (options.log) {
    const button = make("button", { class: "push", type: "button", "aria-pressed": "false" }, "log");
    button.addEventListener("click", () => button.setAttribute("aria-pressed", String(chart.toggle())));
    head.append(button);
  }
  const keys = [];
  if (options.held && RUNS.some((run) => run.held_out.length)) keys.push(make("span", {}, "○ held-out loss"));
  if (options.extra && RUNS.some((run) => run.lines[options.extra[0]])) {
    keys.push(make("span", {}, make("i", { class: "dash" }), options.extra[1]));
  }
  if (keys.length) card.append(make("div", { class: "key" }, ...keys));
}

function facts() {
  PAGE.append(make("h1", {}, RUNS.map((run) => run.name).join(" · ")));
  const steps = Math.max(...RUNS.map((run) => run.steps)), most = Math.max(...RUNS.map((run) => run.points));
  const thinned = steps > most ? ` ${short(steps)} steps are drawn as ${most} points: the mean, with the lowest and highest of the steps between as a band.` : "";
  verdicts();
  PAGE.append(make("p", {}, `Medians without the first fifth of the steps.${thinned}`));
  if (!MANY) {
    const list = make("dl", { class: "facts" });
    for (const [name, text] of Object.entries(RUNS[0].facts)) list.append(make("div", {}, make("dt", {}, name), make("dd", {}, text)));
    PAGE.append(make("div", { class: "card" }, list));
    return;
  }
  const names = [...new Set(RUNS.flatMap((run) => Object.keys(run.facts)))];
  const rows = names.map((name) => [name, ...RUNS.map((run) => run.facts[name] || "–")]);
  PAGE.append(make("div", { class: "card" }, tableOf(["", ...RUNS.map((run) => run.name)], rows, true)));
}

// What ended a run that ended by a fault, before everything else.
function verdicts() {
  RUNS.filter((run) => run.verdict).forEach((run) => {
    const told = run.verdict, ranks = told.ranks.join(", ");
    const where = [`rank${told.ranks.length > 1 ? "s" : ""} ${ranks || "?"}`, ...(told.hosts.length ? [`on ${told.hosts.join(", ")}`] : []),
      ...(told.step === null ? [] : [`after step ${short(told.step)}`]), ...(told.time === null ? [] : [new Date(1000 * told.time).toLocaleString()])];
    const node = make("div", { class: "verdict", role: "alert", "data-chart": "verdict", "data-points": 1 + told.details.length },
      make("h2", {}, `${MANY ? `${run.name}: ` : ""}${told.kind}`), make("p", { class: "line" }, told.line), make("p", {}, where.join(" · ")));
    if (told.details.length) node.append(make("pre", {}, told.details.join("\n")));
    PAGE.append(node);
  });
}

function tableOf(titles, rows, heads) {
  const head = make("tr", {}, ...titles.map((title, i) => {
    const cell = make("th", {});
    if (heads && i) cell.append(swatch(colourOf(i - 1)));
    cell.append(title);
    return cell;
  }));
  const body = make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((text, i) => make(heads && !i ? "th" : "td", {}, text)))));
  return make("div", { class: "scroll" }, make("table", {}, make("thead", {}, head), body));
}

function controls() {
  const bar = make("div", { class: "bar-of-runs" });
  if (MANY) RUNS.forEach((run, i) => {
    const button = make("button", { class: "run", type: "button", "aria-pressed": "true" }, swatch(colourOf(i)), run.name);
    button.addEventListener("click", () => {
      shown[i] = !shown[i];
      button.setAttribute("aria-pressed", String(shown[i]));
      redraws.forEach((redraw) => redraw());
    });
    bar.append(button);
  });
  const choice = make("div", { class: "axis-choice" }, "over");
  const buttons = Object.entries(AXES).map(([key, text]) => {
    const button = make("button", { type: "button", "aria-pressed": String(key === axis) }, text);
    button.addEventListener("click", () => {
      axis = key;
      buttons.forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
      redraws.forEach((redraw) => redraw());
    });
    return button;
  });
  choice.append(...buttons);
  bar.append(choice);
  PAGE.append(bar);
}

function training() {
  const cards = make("div", { class: "cards" });
  section("Over the steps").append(cards);
  overSteps(cards, "loss", "Loss", "nats per token", { held: true, log: true });
  overSteps(cards, "grad_norm", "Gradient norm", "before clipping", { log: true });
  overSteps(cards, "tokens_per_s", "Throughput", "tokens/s", { zero: true });
  overSteps(cards, "mfu", "MFU", "model FLOPs over the peak", { percent: true, zero: true, none: "the peak of the devices is not known: set hardware.peak_tflops" });
  overSteps(cards, "step_time_s", "Step time", "seconds", { zero: true, log: true });
  overSteps(cards, "lr", "Learning rate", "", { zero: true });
}

function waterfall() {
  const node = section("Where the time went", "Each step divided into parts, the mean over all ranks. “MFU without it” is what the MFU would be if the part took no time: the most that can be gained there.");
  const { host } = cardOf("Of the whole run", "without its first fifth", "waterfall-whole", node);
  const known = RUNS.filter((run) => run.waterfall);
  if (!known.length) { nothing(host, "metrics.jsonl has no waterfall: the ranks' records do not tell"); return; }
  const keys = Object.keys(DATA.colours).filter((key) => known.some((run) => run.waterfall.whole[key] >= 0.0005));
  for (const run of known) {
    const bar = make("div", { class: "whole", role: "img", "aria-label": `parts of the step of ${run.name}` });
    for (const key of keys) {
      const part = make("i", { title: `${key} ${(100 * (run.waterfall.whole[key] || 0)).toFixed(1)}%` });
      part.style.background = DATA.colours[key];
      part.style.flex = `${run.waterfall.whole[key] || 0} 0 0`;
      bar.append(part);
    }
    host.append(make("div", { class: "whole-row" }, ...(MANY ? [make("h3", {}, swatch(colourOf(RUNS.indexOf(run))), run.name)] : []), bar));
  }
  host.append(partsTable(known, keys));
  host.dataset.points = keys.length * known.length;
  const cards = make("div", { class: "cards" });
  cards.style.marginTop = "16px";
  node.append(cards);
  for (const run of known) {
    const one = cardOf(MANY ? run.name : "Over the steps", "% of each step", "waterfall", cards);
    stackedArea(one.card, one.host, run.waterfall, DATA.colours, `parts of the steps of ${run.name}`);
  }
}

function partsTable(known, keys) {
  const body = make("tbody");
  const largest = Math.max(...known.flatMap((run) => Object.values(run.waterfall.whole)));
  const sum = (key) => known.reduce((total, run) => total + (run.waterfall.whole[key] || 0), 0);
  for (const key of [...keys].sort((a, b) => sum(b) - sum(a))) {
    const row = make("tr", {}, make("td", {}, swatch(DATA.colours[key]), key));
    for (const run of known) {
      const share = run.waterfall.whole[key] || 0, free = run.waterfall.mfu_if_free[key];
      row.append(make("td", { class: "number" }, `${(100 * share).toFixed(1)}%`));
      if (!MANY) {
        const fill = make("i");
        fill.style.width = `${(100 * share) / largest}%`;
        fill.style.background = DATA.colours[key];
        row.append(make("td", {}, make("div", { class: "track" }, fill)));
      }
      row.append(make("td", { class: "number" }, free === undefined ? "" : `${short(100 * free)}%`));
    }
    body.append(row);
  }
  const titles = known.flatMap((run) => (MANY ? [run.name, "MFU without it"] : ["of the step", "", "MFU without it"]));
  const head = make("tr", {}, make("th", {}, "part"), ...titles.map((title) => make("th", { class: "number" }, title)));
  return make("div", { class: "scroll" }, make("table", { class: "parts" }, make("thead", {}, head), body));
}

function timelines() {
  const node = section("A step, planned and real", "What each rank of the pipeline did, and what the program foresaw with the same durations: boxes of computation, gaps of waiting. Hover a box for its operation and times.");
  RUNS.forEach((run, i) => {
    const title = run.drawn_step === null ? "" : `step ${short(run.drawn_step)}`;
    const { card, head, host } = cardOf(MANY ? run.name : title, MANY ? title : "", "timeline", node);
    if (i) card.classList.add("below");
    const drawing = document.querySelector(`template[data-run="${i}"]`);
    if (!drawing) { nothing(host, run.no_drawing || "there is no record of a step"); return; }
    const box = make("div", { class: "scroll step-drawing" }, drawing.content.cloneNode(true));
    host.append(box);
    host.dataset.points = box.querySelectorAll("path").length;
    const fit = make("button", { class: "push", type: "button", "aria-pressed": "false" }, "fit to width");
    fit.addEventListener("click", () => fit.setAttribute("aria-pressed", String(box.classList.toggle("fit"))));
    head.append(fit);
  });
}

function heatMaps(title, text, key, chart, options, none) {
  const node = section(title, text);
  const known = RUNS.filter((run) => run[key]);
  const cards = make("div", { class: known.length > 1 ? "cards" : "" });
  node.append(cards);
  if (!known.length) { nothing(cardOf("", "", chart, cards).host, none); return node; }
  for (const run of known) {
    const { card, host } = cardOf(MANY ? run.name : options.title, options.unit, chart, cards);
    heatMap(card, host, run[key], options);
    card.append(options.scale());
    for (const told of run[key].verdicts || []) card.append(make("p", {}, verdictText(told)));
  }
  return node;
}

function verdictText(told) {
  const cost = typeof told.cost === "number" ? `; steps would be ${(100 * told.cost).toFixed(0)}% shorter without it` : "";
  const slower = typeof told.score === "number" && told.score > 0 ? ` is ${(100 * (1 / told.score - 1)).toFixed(0)}% slower than its peers` : " is slower than its peers";
  return `Until step ${short(told.step)}: rank ${told.rank}${slower}${told.reason ? ` (${told.reason})` : ""}${cost}.`;
}

function stragglers() {
  heatMaps("Stragglers", "How much slower than its peers each rank was, by windows of steps; red ranks are waited for.",
    "stragglers", "stragglers", {
      title: "Ranks over the steps", unit: "% slower than its peers", row: "rank", shareOf: (v) => v / 20,
      say: (v) => (v === null ? "–" : `${v > 0 ? "+" : ""}${v}%`), scale: () => heatScale("20% faster", "", "20% slower, or more"),
    }, "no window of a job of several ranks is in metrics.jsonl");
}

function memory() {
  const cards = make("div", { class: "cards" });
  section("Memory", "The peak of the device that needs most, and what the memory model says of that device's tensors. On CPUs the measured number is all that the process has.").append(cards);
  overSteps(cards, "memory_gib", "Memory", "GiB", { zero: true, extra: ["memory_model_gib", "predicted"] });
}

function experts() {
  if (!RUNS.some((run) => run.experts)) return;
  const node = heatMaps("Experts", "The load of each layer's busiest expert over the mean load of its experts: 1 is even.", "experts", "experts", {
    title: "Layers over the steps", unit: "load of the busiest expert, over the mean", row: "layer", shareOf: (v) => Math.min((v - 1) / 2, 1),
    say: short, scale: () => heatScale("1 or less (even is white)", "", "3 or more"),
  }, "");
  const cards = make("div", { class: "cards" });
  cards.style.marginTop = "16px";
  node.append(cards);
  const { card, host } = cardOf("The worst layer", "load over the mean", "expert-load", cards);
  const chart = lineChart(card, host, {
    title: "load of experts", axis: () => "step", zero: true,
    lines: () => RUNS.flatMap((run, i) => (run.experts && shown[i] ? [["load_max", false, "busiest"], ["load_min", true, "idlest"]].map(([key, dashed, word]) => ({
      ...run.experts.worst[key], xs: run.experts.x, colour: colourOf(i), dashed, name: `${MANY ? `${run.name} ` : ""}${word}`,
    })) : [])),
  });
  redraws.push(chart.redraw);
  card.append(make("div", { class: "key" }, make("span", {}, "— busiest expert"), make("span", {}, make("i", { class: "dash" }), "idlest expert")));
}

function events() {
  const node = section("Events");
  RUNS.forEach((run, i) => {
    const count = run.events.total, rows = run.events.rows;
    const kinds = Object.entries(run.events.kinds).map(([kind, n]) => `${kind} ${n}`).join(", ");
    const unit = count > rows.length ? `the newest ${rows.length} of ${count}: ${kinds}` : kinds;
    const { card, host } = cardOf(MANY ? run.name : "", unit, "events", node);
    if (i) card.classList.add("below");
    if (!rows.length) { nothing(host, "events.jsonl has none"); return; }
    const cells = rows.map((e) => [e.time === null ? "–" : new Date(1000 * e.time).toLocaleString(), e.step === null ? "–" : String(e.step), e.event, e.text]);
    const table = tableOf(["time", "step", "event", ""], cells, false);
    table.classList.add("tall");
    host.append(table);
    host.dataset.points = rows.length;
  });
}

function differing() {
  if (!MANY) return;
  const node = section("What differs", "Keys of the resolved configurations.");
  if (!DATA.differing.length) { node.append(make("div", { class: "none" }, "nothing, as far as their files tell")); return; }
  node.append(make("div", { class: "card" }, tableOf(["key", ...RUNS.map((run) => run.name)], DATA.differing, true)));
}

PAGE.replaceChildren();
for (const part of [facts, controls, training, waterfall, timelines, stragglers, memory, experts, differing, events]) part();
document.documentElement.dataset.ready = "yes";
