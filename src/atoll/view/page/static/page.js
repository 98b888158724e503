"use strict";
// The page keeps rows (closed rounds) and a state; whatever comes in, what is shown follows from them.

const $ = (id) => document.getElementById(id);
const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#888"];
// In which direction a metric is good; of others nobody knows.
const higher = (name) => /(^|_)(accuracy|acc|macro_f1|f1|auc|r2)$/.test(name ?? "");
const lower = (name) => /(^|_)(loss|error|perplexity)$/.test(name ?? "");
const FINAL = ["finished", "failed"];
const OUTCOMES = ["accepted", "late", "no longer needed", "malformed", "lost"];
const SHOWN_CLIENTS = 50;

let runs = [];                 // what there is to see
let run = null;                // the one that is shown
let about = {};                // what does not change of it
let rows = [];                 // its closed rounds, in order
let state = {};                // what changes
let clients = [];              // who took part
let others = new Map();        // runs to compare with: id -> {about, rows, state}
let stream = null;
let sorting = { by: "name", down: false };
let all = false;               // whether every client is listed
let pinned = false;            // whether a round was chosen, or the last is followed
let due = false;

// ---- words and numbers

function bytes(count) {
  if (count == null) return "–";
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (Math.abs(count) < 1000) return unit === "B" ? `${Math.round(count)} B` : `${count.toFixed(1)} ${unit}`;
    count /= 1000;
  }
  return `${count.toFixed(1)} TB`;
}

function duration(seconds) {
  if (seconds == null || !isFinite(seconds)) return "–";
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 60) return `${seconds.toFixed(1)} s`;
  seconds = Math.round(seconds);
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return `${minutes} min ${String(seconds % 60).padStart(2, "0")} s`;
  return `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, "0")} min`;
}

function figure(value) {
  if (value == null) return "–";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  return size >= 1e5 || size < 1e-4 ? value.toExponential(2) : value.toPrecision(4).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "");
}

const words = (name) => name.replaceAll("_", " ");
const value = (row, name) => row.metrics?.[name] ?? row.measurements?.[name] ?? null;
const since = (time) => (time ? `${duration(Math.max(0, Date.now() / 1000 - time))} ago` : "never");

// ---- elements: text is always text, never markup

function element(kind, properties, ...children) {
  const made = Object.assign(document.createElement(kind), properties);
  made.append(...children);
  return made;
}

function fill(parent, children) {
  parent.replaceChildren(...children);
}

function options(select, names, chosen) {
  const known = [...select.options].map((option) => option.value);
  if (known.join("\n") !== names.join("\n")) {
    fill(select, names.map((name) => element("option", { value: name, textContent: words(name) })));
  }
  if (names.includes(chosen)) select.value = chosen;
}

// ---- talking to the server

class Refused extends Error {
  constructor(status, text) { super(text); this.status = status; }
}

async function get(path) {
  const answer = await fetch(path, { credentials: "same-origin" })
    .catch(() => { throw new Refused(0, "the server cannot be reached"); });
  if (answer.status === 401) { showLogin(); throw new Refused(401, "log in"); }
  if (!answer.ok) {
    const said = await answer.json().catch(() => ({}));
    throw new Refused(answer.status, said.error ?? `the server says ${answer.status}`);
  }
  return answer.json();
}

let shutOut = false;            // whether whoever looks is not logged in

function showLogin() {
  stream?.close();
  if (shutOut) return;
  shutOut = true;
  $("login").hidden = false;
  $("main").hidden = true;
  pill("not logged in", "bad");
  $("ticket").focus();
}

async function enter(ticket) {
  const answer = await fetch("login", {
    method: "POST", credentials: "same-origin", headers: { "content-type": "application/json" },
    body: JSON.stringify({ ticket }),
  });
  history.replaceState(null, "", location.pathname + location.search);
  const said = answer.ok ? {} : await answer.json().catch(() => ({}));
  // A used link does no harm to a browser that is logged in already.
  shutOut = false;
  $("login").hidden = true;
  $("leave").hidden = false;
  await begin();
  if (shutOut) say(said.error ?? "that did not work");
}

function say(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

function pill(text, kind) {
  $("status").textContent = text;
  $("status").className = `pill ${kind}`;
}

async function begin() {
  try {
    await look();
    const first = runs.find((each) => each.first) ?? runs.at(-1);
    const asked = new URLSearchParams(location.search).get("run");
    if (!runs.length) {
      say("There is no run here yet; this page looks again by itself.");
      setTimeout(begin, 1000);
      return;
    }
    say("");
    $("main").hidden = false;
    await open(runs.some((each) => each.id === asked) ? asked : first.id);
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    if (error.status === 401) return;
    pill("reconnecting", "bad");
    say(error.status ? error.message : "");
    setTimeout(begin, 1500);
  }
}

async function look() {
  const found = await get("api/runs");
  if (run && JSON.stringify(found) === JSON.stringify(runs)) return;
  runs = found;
  $("chooser").hidden = runs.length < 2;
  fill($("run"), [...runs].reverse().map((each) => element("option", { value: each.id, textContent: each.name })));
  if (run) { $("run").value = run; showOthers(); }
}

async function open(id) {
  stream?.close();
  run = id;
  $("run").value = id;
  rows = []; clients = []; state = {}; pinned = false; all = false;
  others.delete(id);
  const path = `api/runs/${encodeURIComponent(id)}`;
  about = { name: id };
  $("clients").replaceChildren();
  showStatus();
  const [told, first] = await Promise.all([get(path), get(`${path}/rows`)]);
  if (run !== id) return;
  about = told; rows = first.rows; state = first.state;
  show();
  showOnce();
  loadClients();
  follow(path);
}

function follow(path) {
  // The browser sends the last id again when it reconnects; a closed stream is begun anew by hand.
  // Runs that have ended say nothing more, and a browser has few connections for its tabs.
  if (FINAL.includes(state.status) || document.hidden) { stream = null; return; }
  stream = new EventSource(`${path}/events?after=${state.epoch}.${rows.length ? rows.at(-1).round : 0}`);
  const mine = stream, id = run;
  stream.addEventListener("round", (event) => {
    rows.push(JSON.parse(event.data));
    later();
  });
  // What was told so far is of another run by this name, or of a part that is run again.
  stream.addEventListener("reset", () => { rows = []; clients = []; reload(path); later(); });
  stream.addEventListener("state", (event) => {
    const before = state.engine;
    state = JSON.parse(event.data);
    if (state.engine !== before) showConfiguration();
    if (FINAL.includes(state.status)) mine.close();
    later();
  });
  stream.onopen = () => { say(""); showStatus(); };
  stream.onerror = () => {
    if (mine !== stream || FINAL.includes(state.status)) return;
    pill("reconnecting", "bad");
    if (stream.readyState === EventSource.CLOSED) {
      setTimeout(async () => {
        if (mine !== stream) return;
        try {
          await get(path);
          if (mine === stream && run === id) follow(path);
        } catch (error) {
          if (!(error instanceof Refused)) throw error;
          if (error.status === 401) return;
          if (error.status) say(error.message);
          mine.onerror();
        }
      }, 1500);
    }
  };
}

async function reload(path) {
  try { about = await get(path); showConfiguration(); } catch (error) { if (!(error instanceof Refused)) throw error; }
}

let loaded = 0, loading = null;
async function loadClients() {
  const id = run;
  loaded = Date.now();
  try {
    const found = await get(`api/runs/${encodeURIComponent(id)}/clients`);
    if (run === id) { clients = found; showClients(); showSpread(); }
  } catch (error) { if (!(error instanceof Refused)) throw error; }
}

function later() {
  if (due) return;
  due = true;
  // Not at once: many rounds may come together.
  setTimeout(() => { due = false; show(); }, 120);
  // The table of clients may be long, so not with every round; but after the last one, once more.
  loading ??= setTimeout(() => { loading = null; loadClients(); }, Math.max(0, loaded + 3000 - Date.now()));
}

// ---- what is shown

function show() {
  showStatus(); showTiles(); showLearning(); showParts(); showBytes(); showTime(); showRound(); showFailures();
}

function showOnce() { showOthers(); showConfiguration(); }

function showStatus() {
  $("name").textContent = about.name ?? "atoll";
  document.title = `${about.name ?? "atoll"} · atoll`;
  const kinds = { running: "live", finished: "good", interrupted: "bad", stopped: "bad", failed: "bad" };
  const named = state.phase ? `${state.status}: ${words(state.phase)}` : state.status ?? "";
  if (FINAL.includes(state.status) || stream?.readyState !== EventSource.CONNECTING) pill(named, kinds[state.status] ?? "");
  const done = rows.length ? rows.at(-1).round : 0, total = Math.max(state.total ?? 0, done);
  $("bar").max = total || 1;
  $("bar").value = done;
  const spent = rows.reduce((sum, row) => sum + (row.seconds ?? 0), 0);
  const left = state.status === "running" && done ? `, about ${duration((spent / done) * (total - done))} left` : "";
  $("where").textContent = `round ${done} of ${total}${left}${state.waiting ? ` · waiting for ${state.waiting}` : ""}`;
}

function metricNames() {
  const found = new Set();
  for (const row of rows) for (const name of Object.keys(row.metrics ?? {})) found.add(name);
  const plain = [...found].filter((name) => !/_client_|_worst_|_q\d/.test(name));
  const reported = new Set();
  for (const row of rows) for (const name of Object.keys(row.measurements ?? {})) reported.add(name);
  return [...plain, ...reported];
}

function mainMetric(names) {
  return ["accuracy", "loss", "train_loss"].find((name) => names.includes(name)) ?? names[0];
}

// The first round in which a metric was taken and was no number, as when training diverges.
function notFinite(name, of = rows) {
  return of.find((row) => row.metrics?.[name] === null || row.measurements?.[name] === null)?.round;
}

function latest(name) {
  for (let place = rows.length - 1; place >= 0; place--) {
    const found = value(rows[place], name);
    if (found != null) return [found, rows[place].round];
  }
  return [null, 0];
}

function showTiles() {
  const names = metricNames(), main = mainMetric(names), tiles = [];
  const tile = (name, text, small) => tiles.push(element("div", {}, element("dt", { textContent: name }),
    element("dd", {}, text, small ? element("small", { textContent: ` ${small}` }) : "")));
  if (main) {
    const [now, round] = latest(main);
    const lost = notFinite(main);
    tile(words(main), lost ? "not finite" : figure(now), lost ? `since round ${lost}` : `round ${round}`);
    const taken = rows.map((row) => [value(row, main), row.round]).filter(([found]) => found != null);
    if (taken.length && (higher(main) || lower(main))) {
      const best = taken.reduce((a, b) => ((higher(main) ? b[0] > a[0] : b[0] < a[0]) ? b : a));
      tile(`best ${words(main)}`, figure(best[0]), `round ${best[1]}`);
    }
  }
  for (const name of ["loss", "accuracy"]) if (name !== main && names.includes(name)) tile(name, notFinite(name) ? "not finite" : figure(latest(name)[0]));
  const total = (name) => rows.reduce((sum, row) => sum + (row[name] ?? 0), 0);
  tile("sent by clients", bytes(total("up")));
  tile("received by clients", rows.some((row) => row.down != null) ? bytes(total("down")) : "–");
  tile("real time", duration(total("seconds")));
  if (rows.length && rows.at(-1).clock) tile("simulated time", duration(rows.at(-1).clock));
  const missing = rows.reduce((sum, row) => sum + Math.max(0, (row.invited ?? 0) - (row.accepted ?? 0)), 0);
  tile("updates averaged", figure(total("accepted")), missing ? `${figure(missing)} were missed` : "");
  const epsilon = names.find((name) => /(^|_)epsilon$/.test(name));
  if (epsilon) tile("privacy spent, ε", figure(latest(epsilon)[0]));
  if (state.sites != null) tile("sites", figure(state.sites), state.at_work ? `${state.at_work} at work` : "");
  fill($("tiles"), tiles);
}

// ---- charts

const charts = new Map();

function colour(name) { return getComputedStyle(document.documentElement).getPropertyValue(name).trim(); }

function draw(id, data, series, settings = {}) {
  const place = $(id);
  if (!data[0].length) {
    charts.get(id)?.plot.destroy();
    charts.delete(id);
    fill(place, [element("p", { className: "empty", textContent: settings.empty ?? "Nothing yet." })]);
    return;
  }
  const shape = JSON.stringify([series.map((each) => [each.label, each.stroke]), settings.x, settings.bars, settings.bands]);
  const known = charts.get(id);
  if (known && known.shape === shape) { known.plot.setData(data); return; }
  known?.plot.destroy();
  place.replaceChildren();
  const axis = { stroke: colour("--soft"), grid: { stroke: colour("--grid") }, ticks: { stroke: colour("--grid") } };
  const plot = new uPlot({
    // The legend comes below, in as many lines as it needs.
    width: place.clientWidth || 300, height: place.classList.contains("tall") ? (innerWidth < 740 ? 210 : 290) : 160,
    scales: { x: { time: false, range: settings.range }, y: settings.zero ? { range: (_, low, high) => [Math.min(0, low), high > 0 ? high * 1.08 : 1] } : {} },
    axes: [{ ...axis, label: settings.x ?? "round", labelSize: 18, size: 34, labelFont: "12px system-ui" },
      { ...axis, size: 70, values: (_, ticks) => ticks.map(settings.y ?? figure) }],
    series: [{ label: settings.x ?? "round" }, ...series.map((each) => ({ width: 2, points: { show: data[0].length < 40 }, spanGaps: true, value: (_, v) => (v == null ? "–" : (settings.y ?? figure)(v)), ...each }))],
    bands: settings.bands ?? [],
    cursor: { y: false },
    legend: { live: true },
  }, data, place);
  charts.set(id, { plot, shape });
}

function places(of, against) {
  let spent = 0;
  return of.map((row) => {
    if (against === "round") return row.round;
    if (against === "clock") return row.clock ?? row.round;
    spent += against === "bytes" ? ((row.up ?? 0) + (row.down ?? 0)) / 1e6 : row.seconds ?? 0;
    return spent;
  });
}

function showLearning() {
  const names = metricNames();
  const metric = names.includes($("metric").value) ? $("metric").value : mainMetric(names);
  options($("metric"), names, metric);
  const timed = rows.some((row) => row.clock);
  $("against").querySelector("[value=clock]").hidden = !timed;
  const against = $("against").value === "clock" && !timed ? "round" : $("against").value;
  const labels = { round: "round", bytes: "communication, MB", seconds: "seconds", clock: "simulated seconds" };
  if (!metric) { draw("learning-chart", [[]], [], { empty: "No round has closed yet." }); return; }
  // With what is not finite, as a gap: the axis goes on to where the run is.
  const taken = rows.filter((row) => metric in (row.metrics ?? {}) || metric in (row.measurements ?? {}));
  // Places first: what is spent in rounds without an evaluation is spent all the same.
  const along = places(rows, against);
  const at = new Map(rows.map((row, number) => [row.round, along[number]]));
  const tables = [], series = [], bands = [];
  const x = taken.map((row) => at.get(row.round));
  const accent = colour("--accent");
  const low = taken.map((row) => spreadOf(row, metric, -1)), high = taken.map((row) => spreadOf(row, metric, 1));
  const banded = low.some((each) => each != null);
  tables.push(banded ? [x, taken.map((row) => value(row, metric)), high, low] : [x, taken.map((row) => value(row, metric))]);
  series.push({ label: words(metric), stroke: accent });
  if (banded) {
    const edge = { stroke: "transparent", points: { show: false } };
    series.push({ ...edge, label: "mean + σ" }, { ...edge, label: "mean − σ" });
    bands.push({ series: [2, 3], fill: colour("--band") });
  }
  let number = 1;
  for (const [id, other] of others) {
    const theirs = other.rows.filter((row) => value(row, metric) != null);
    const gone = places(other.rows, against);
    const there = new Map(other.rows.map((row, place) => [row.round, gone[place]]));
    if (theirs.length) {
      tables.push([theirs.map((row) => there.get(row.round)), theirs.map((row) => value(row, metric))]);
      series.push({ label: id, stroke: COLOURS[number % COLOURS.length] });
    }
    number += 1;
  }
  draw("learning-chart", tables.length > 1 ? uPlot.join(tables) : tables[0], series, { x: labels[against], bands });
  const [now, round] = latest(metric);
  const lost = notFinite(metric);
  const text = `${words(metric)}: ${figure(now)} in round ${round}${lost ? `, and no finite number since round ${lost}` : ""}`;
  $("learning-chart").setAttribute("aria-label", `Curve of ${text}`);
  $("learning-hint").textContent = banded ? `${text}. The band is one standard deviation (σ) around the mean over clients.` : `${text}.`;
}

function spreadOf(row, metric, sign) {
  const mean = row.metrics?.[`${metric}_client_mean`], deviation = row.metrics?.[`${metric}_client_std`];
  return mean == null || deviation == null ? null : mean + sign * deviation;
}

function showParts() {
  const x = rows.map((row) => row.round);
  draw("part-chart", [x, rows.map((row) => row.invited), rows.map((row) => row.accepted)],
    [{ label: "invited", stroke: colour("--soft"), dash: [4, 4], width: 1.5 }, { label: "averaged", stroke: colour("--good"), fill: colour("--band") }], { zero: true });
  const last = rows.at(-1);
  $("part-chart").setAttribute("aria-label", last ? `In round ${last.round}, ${last.accepted} of ${last.invited ?? "?"} updates were averaged` : "No round yet");
}

function showBytes() {
  draw("bytes-chart", [rows.map((row) => row.round), rows.map((row) => row.up ?? null), rows.map((row) => row.down ?? null)],
    [{ label: "sent by clients", stroke: colour("--accent") }, { label: "received", stroke: COLOURS[1], dash: [6, 3] }], { y: bytes, zero: true });
  const last = rows.at(-1);
  $("bytes-chart").setAttribute("aria-label", last ? `In round ${last.round}: ${bytes(last.up)} sent, ${bytes(last.down)} received` : "No round yet");
}

function showTime() {
  const phases = [...new Set(rows.flatMap((row) => Object.keys(row.phases ?? {})))];
  const timed = rows.filter((row) => row.seconds != null || Object.keys(row.phases ?? {}).length);
  const lines = phases.length
    ? phases.map((name, number) => [{ label: name, stroke: COLOURS[number % COLOURS.length] }, timed.map((row) => row.phases?.[name] ?? null)])
    : [[{ label: "whole round", stroke: colour("--accent") }, timed.map((row) => row.seconds)]];
  draw("time-chart", [timed.map((row) => row.round), ...lines.map(([, data]) => data)], lines.map(([series]) => series), { y: duration, zero: true });
  const sums = phases.map((name) => [name, timed.reduce((sum, row) => sum + (row.phases?.[name] ?? 0), 0)]);
  const text = sums.map(([name, sum]) => `${name} ${duration(sum)}`).join(", ");
  $("time-hint").textContent = text ? `In all: ${text}.` : "";
  $("time-chart").setAttribute("aria-label", text ? `Time in all: ${text}` : "Time per round");
}

function showSpread() {
  const names = [...new Set(clients.flatMap((client) => Object.keys(client.metrics ?? {})))];
  const metric = names.includes($("spread-metric").value) ? $("spread-metric").value : mainMetric(names);
  options($("spread-metric"), names, metric);
  const found = clients.map((client) => client.metrics?.[metric]).filter((each) => each != null);
  found.sort((a, b) => (higher(metric) ? a - b : b - a));
  draw("spread-chart", [found.map((_, place) => place + 1), found],
    [{ label: words(metric ?? ""), stroke: colour("--accent"), fill: colour("--band"), paths: uPlot.paths.bars({ size: [0.9, 60] }), points: { show: false } }],
    { x: "clients, worst first", empty: "Clients were not evaluated one by one.", range: (_, low, high) => [low - 0.7, high + 0.7], zero: true });
  if (!found.length) { $("spread-hint").textContent = ""; return; }
  const mean = found.reduce((a, b) => a + b, 0) / found.length, tail = found.slice(0, Math.ceil(found.length / 10));
  const text = `mean ${figure(mean)}, worst tenth ${figure(tail.reduce((a, b) => a + b, 0) / tail.length)}, of ${found.length} clients`;
  $("spread-hint").textContent = `${text}.`;
  $("spread-chart").setAttribute("aria-label", `${words(metric)} of each client: ${text}`);
}

// ---- one round

function showRound() {
  const last = rows.length ? rows.at(-1).round : 1;
  $("slider").max = $("round").max = last;
  if (!pinned) { $("slider").value = last; $("round").value = last; }
  const row = rows.find((each) => each.round === Number($("round").value));
  if (!row) { fill($("round-figures"), []); fill($("round-parts"), []); return; }
  const shown = { ...row.metrics, ...row.measurements, invited: row.invited, averaged: row.accepted };
  if ((row.attempts ?? 1) > 1) shown.attempts = row.attempts;
  const pairs = Object.entries(shown).map(([name, found]) => [words(name), figure(found)]);
  pairs.push(["sent", bytes(row.up)], ["received", bytes(row.down)], ["took", duration(row.seconds)]);
  fill($("round-figures"), pairs.map(([name, text]) => element("span", {}, `${name} `, element("b", { textContent: text }))));
  showParticipants(row.round);
}

let asked = 0;
async function showParticipants(round) {
  const question = ++asked;
  await new Promise((resolve) => setTimeout(resolve, pinned ? 60 : 400));
  if (question !== asked) return;
  try {
    const found = await get(`api/runs/${encodeURIComponent(run)}/rounds/${round}`);
    if (question !== asked) return;
    const kinds = [...new Set([...OUTCOMES, ...found.map((each) => each.outcome)])];
    const lines = kinds.map((kind) => [kind, found.filter((each) => each.outcome === kind)]).filter(([, each]) => each.length);
    fill($("round-parts"), [element("ul", { className: "parts" }, ...lines.map(([kind, each]) => element("li", {},
      element("b", { textContent: `${kind} (${each.length}): ` }),
      each.slice(0, 60).map((one) => one.client).join(", ") + (each.length > 60 ? ", …" : ""))))]);
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    fill($("round-parts"), []);
  }
}

function choose(round) {
  pinned = round !== rows.at(-1)?.round;
  $("slider").value = $("round").value = round;
  showRound();
}

// ---- tables

function showClients() {
  const metrics = [...new Set(clients.flatMap((client) => Object.keys(client.metrics ?? {})))];
  const columns = [["name", (each) => each.name, (each) => each.name]];
  if (clients.some((each) => each.status)) columns.push(["status", (each) => each.status ?? "", (each) => each.status ?? ""]);
  if (clients.some((each) => each.seen)) columns.push(["last seen", (each) => since(each.seen), (each) => each.seen ?? 0]);
  columns.push(["averaged", (each) => figure(each.accepted), (each) => each.accepted],
    ["missed", (each) => figure(each.missed), (each) => each.missed],
    ["last round", (each) => (each.last ? figure(each.last) : "–"), (each) => each.last],
    ["sent", (each) => bytes(each.up), (each) => each.up ?? 0],
    ["received", (each) => bytes(each.down), (each) => each.down ?? 0]);
  if (clients.some((each) => each.examples)) columns.push(["examples", (each) => figure(each.examples), (each) => each.examples ?? 0]);
  for (const metric of metrics) columns.push([words(metric), (each) => figure(each.metrics?.[metric]), (each) => each.metrics?.[metric] ?? NaN]);
  const wanted = $("find").value.toLowerCase();
  const chosen = columns.find(([name]) => name === sorting.by) ?? columns[0];
  const compared = new Intl.Collator("en", { numeric: true }).compare;
  const sorted = clients.filter((each) => each.name.toLowerCase().includes(wanted)).sort((a, b) => {
    const [x, y] = [chosen[2](a), chosen[2](b)];
    if (typeof x === "string") return compared(x, y);
    if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
    return x - y;
  });
  if (sorting.down) sorted.reverse();
  const listed = all ? sorted : sorted.slice(0, SHOWN_CLIENTS);
  const head = element("thead", {}, element("tr", {}, ...columns.map(([name], place) => {
    const cell = element("th", { scope: "col", className: place ? "number" : "" }, element("button", {
      textContent: name, onclick: () => { sorting = { by: name, down: sorting.by === name ? !sorting.down : place > 0 }; showClients(); },
    }));
    cell.setAttribute("aria-sort", name === chosen[0] ? (sorting.down ? "descending" : "ascending") : "none");
    return cell;
  })));
  const body = element("tbody", {}, ...listed.map((each) => element("tr", {}, ...columns.map(([name, text], place) =>
    element("td", { className: `${place ? "number" : "text"}${name === "missed" && each.missed ? " worst" : ""}`, textContent: text(each) })))));
  const focused = document.activeElement?.closest("#clients th")?.cellIndex;
  fill($("clients"), [head, body]);
  if (focused != null) head.rows[0].cells[focused]?.querySelector("button").focus();
  $("more").hidden = listed.length === sorted.length;
  $("more").textContent = `Show all ${sorted.length}`;
}

function showFailures() {
  const found = [...(state.failures ?? [])];
  const lost = ["loss", "train_loss"].map((name) => notFinite(name)).find((each) => each);
  if (lost) found.push({ round: lost, text: "the loss is not a finite number: training diverges" });
  const lines = found.slice().reverse().map((each) => element("li", { textContent: each.round ? `round ${each.round}: ${each.text}` : each.text }));
  if ((state.failed ?? 0) > (state.failures?.length ?? 0)) lines.push(element("li", { textContent: `and ${state.failed - state.failures.length} before these` }));
  fill($("failures"), lines.length ? lines : [element("li", { textContent: "Nothing so far." })]);
}

function flat(found, prefix = "", into = {}) {
  for (const [name, each] of Object.entries(found ?? {})) {
    if (each && typeof each === "object" && !Array.isArray(each)) flat(each, `${prefix}${name}.`, into);
    else into[prefix + name] = Array.isArray(each) ? JSON.stringify(each) : String(each);
  }
  return into;
}

function pairs(table, heads, lines) {
  const cells = (kind, line) => line.map((text) => element(kind, { className: "text", textContent: text }));
  fill(table, [element("thead", {}, element("tr", {}, ...cells("th", heads))),
    element("tbody", {}, ...lines.map((line) => element("tr", {}, ...cells("td", line))))]);
}

function showConfiguration() {
  const lines = Object.entries(flat({ ...about.configuration, environment: about.environment }));
  if (state.engine) lines.push(["engine", state.engine]);
  for (const note of state.notes ?? []) lines.push(["engine note", note]);
  pairs($("configuration"), ["setting", "value"], lines);
}

// ---- comparison

function showOthers() {
  const rest = runs.filter((each) => each.id !== run).reverse();
  $("compare-title").closest("section").hidden = !rest.length;
  fill($("others"), rest.map((each) => {
    const box = element("input", { type: "checkbox", checked: others.has(each.id), onchange: () => compare(each.id, box.checked) });
    return element("label", {}, box, ` ${each.name}`);
  }));
  showDifferences();
}

async function compare(id, wanted) {
  if (!wanted) others.delete(id);
  else {
    const path = `api/runs/${encodeURIComponent(id)}`;
    try {
      const [told, found] = await Promise.all([get(path), get(`${path}/rows`)]);
      others.set(id, { about: told, ...found });
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      say(`${id} cannot be compared: ${error.message}`);
      showOthers();
      return;
    }
  }
  showLearning();
  showDifferences();
}

function showDifferences() {
  if (!others.size) { fill($("differences"), []); return; }
  const columns = [["this run", about, rows], ...[...others].map(([id, other]) => [id, other.about, other.rows])];
  const settings = columns.map(([, told]) => flat(told.configuration));
  const names = [...new Set(settings.flatMap((each) => Object.keys(each)))];
  const metric = $("metric").value;
  const last = (of) => (notFinite(metric, of) ? null : of.map((row) => value(row, metric)).filter((each) => each != null).at(-1));
  const lines = [[words(metric), ...columns.map(([, , of]) => figure(last(of)))],
    ["rounds", ...columns.map(([, , of]) => figure(of.length))],
    ["sent by clients", ...columns.map(([, , of]) => bytes(of.reduce((sum, row) => sum + (row.up ?? 0), 0)))]];
  for (const name of names) {
    const found = settings.map((each) => each[name] ?? "–");
    if (new Set(found).size > 1 && !name.endsWith("layout.digest")) lines.push([name, ...found]);
  }
  pairs($("differences"), ["", ...columns.map(([name]) => name)], lines);
}

// ---- events of the page itself

$("metric").onchange = () => { showLearning(); showDifferences(); };
$("against").onchange = showLearning;
$("spread-metric").onchange = showSpread;
$("run").onchange = () => { history.replaceState(null, "", `?run=${encodeURIComponent($("run").value)}`); chooseRun(); };
async function chooseRun() {
  try { say(""); await open($("run").value); } catch (error) {
    if (!(error instanceof Refused)) throw error;
    if (error.status !== 401) { say(error.message || "the server cannot be reached"); pill("not shown", "bad"); }
  }
}
$("slider").oninput = () => choose(Number($("slider").value));
$("round").onchange = () => choose(Number($("round").value));
$("find").oninput = showClients;
$("more").onclick = () => { all = true; showClients(); };
$("leave").onclick = async () => { await fetch("logout", { method: "POST", credentials: "same-origin" }); location.reload(); };
$("login-form").onsubmit = (event) => { event.preventDefault(); enter($("ticket").value.trim().replace(/^.*#/, "")); };

function redraw() {
  for (const { plot } of charts.values()) plot.destroy();
  charts.clear();
  show();
  showSpread();
}

let resizing;
addEventListener("resize", () => { clearTimeout(resizing); resizing = setTimeout(redraw, 150); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
addEventListener("hashchange", () => { if (location.hash.length > 20) enter(location.hash.slice(1)); });
setInterval(async () => {
  if (shutOut || document.hidden || !run) return;
  if (clients.some((each) => each.seen) && !FINAL.includes(state.status)) loadClients();
  try {
    await look();
    // A run that had ended may have been resumed.
    if (!stream && runs.find((each) => each.id === run)?.status === "running") {
      state.status = "running";
      follow(`api/runs/${encodeURIComponent(run)}`);
    }
    // Runs to compare with may be going on too.
    for (const [id, other] of others) if (other.state.status === "running") compare(id, true);
  } catch (error) { if (!(error instanceof Refused)) throw error; }
}, 5000);
document.addEventListener("visibilitychange", () => {
  // A hidden tab needs no connection; what it missed comes when it is looked at again.
  if (document.hidden) { stream?.close(); stream = null; } else if (run && !shutOut) follow(`api/runs/${encodeURIComponent(run)}`);
});

if (location.hash.length > 20) enter(location.hash.slice(1));
else begin();
