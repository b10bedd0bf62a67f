"use strict";
// Asks for figures and draws them. Text goes in as text, never as markup; widths and strokes through the object model,
// so that the page runs under a content security policy without exceptions.

const KINDS = {
  csa: "CSA entries", index: "CSA index keys", hca: "HCA entries", snapshot: "SWA snapshots",
  window: "SWA windows of running requests", loading: "being fetched", object: "pages and snapshots",
  padding: "unused in frames", free: "free",
};
const SOURCES = {
  device: "found on the device", host: "found on the host", disk: "found on disk", remote: "found remotely",
  recomputed: "recomputed (windows only)", computed: "computed",
};
const PLANS = {
  snapshot: ["snapshot", "device", "restored a stored window and went on"],
  trapezoid: ["rebuild", "recomputed", "cached entries were read, windows run again, exactly"],
  bounded: ["bounded", "bounded", "windows rebuilt approximately, as the policy allows"],
  cold: ["cold", "computed", "nothing was cached"],
};
const TOTALS = {
  preemptions: "preemptions", rerun_tokens: "tokens run again after a preemption", pages_evicted: "pages evicted",
  snapshots_evicted: "snapshots evicted", snapshots_refused: "snapshots refused", pins_refused: "pins refused",
  requests_held: "waits for another's pages", held_tokens_saved: "tokens saved by that",
  saves_failed: "saves failed", fetches_failed: "fetches failed", canary_checked: "canary checks", canary_failed: "canary failures",
};
const BUCKETS = 30;
const state = { rows: [], last: 0, rates: new Map(), pointed: {}, secret: sessionStorage.getItem("key") || "", heard: 0, born: 0, timer: 0 };
const byId = (id) => document.getElementById(id);

// ---- words for numbers

const whole = (n) => Math.round(n).toLocaleString("en-US");
const short = (n) => n >= 1e6 ? (n / 1e6).toFixed(n < 1e7 ? 2 : 1) + "M" : n >= 1e4 ? (n / 1e3).toFixed(n < 1e5 ? 1 : 0) + "K" : whole(n);
const rate = (n) => n >= 100 || n === 0 ? short(n) : n.toFixed(1);
const percent = (part, all) => all ? (100 * part / all).toFixed(part && part < all && (part < all * 0.1 || part > all * 0.9) ? 1 : 0) + "\u00a0%" : "–";
function bytes(n) {
  for (const [unit, size] of [["TiB", 2 ** 40], ["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 1024]]) {
    if (n >= size) return (n / size).toFixed(n / size < 10 ? 2 : 1) + " " + unit;
  }
  return whole(n) + " B";
}
function span(seconds) {
  if (seconds && seconds < 1) return Math.max(1, Math.round(seconds * 1000)) + "\u00a0ms";
  if (seconds < 10) return seconds.toFixed(1) + "\u00a0s";
  if (seconds < 120) return Math.round(seconds) + "\u00a0s";
  if (seconds < 7200) return Math.round(seconds / 60) + "\u00a0min";
  if (seconds < 172800) return (seconds / 3600).toFixed(1) + "\u00a0h";
  return Math.round(seconds / 86400) + "\u00a0days";
}

// ---- small builders

function make(tag, classes, ...content) {
  const node = document.createElement(tag);
  if (classes) node.className = classes;
  node.append(...content.filter((one) => one !== null && one !== undefined));
  return node;
}
function draw(tag, attributes, parent) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (parent) parent.append(node);
  return node;
}
function bar(parts, all, label, slim) {
  const box = make("div", slim ? "bar slim" : "bar");
  box.setAttribute("role", "img");
  box.setAttribute("aria-label", label);
  box.title = label;
  for (const [name, size] of parts) {
    if (size <= 0) continue;
    const piece = make("i", "f-" + name);
    piece.style.width = 100 * size / all + "%";
    box.append(piece);
  }
  return box;
}
const swatch = (name, text) => make("span", "item", make("i", `swatch f-${name} ${name}`), text);
function table(target, columns, rows, empty) {
  if (!rows.length) return target.replaceChildren(make("div", "empty", empty));
  const head = make("tr", "");
  for (const [title, kind] of columns) {
    const cell = make("th", kind, title);
    cell.scope = "col";
    head.append(cell);
  }
  const body = make("tbody", "");
  for (const cells of rows) body.append(make("tr", "", ...cells.map((cell, i) => make("td", columns[i][1], cell))));
  target.replaceChildren(make("table", "", make("thead", "", head), body));
}

// ---- charts

const minutes = (seconds) => seconds < 90 ? Math.round(seconds) + " s" : Math.round(seconds / 60) + " min";
function frame(target, length, top) {
  target.replaceChildren();
  const svg = draw("svg", { viewBox: "0 0 600 150", preserveAspectRatio: "none", role: "img" }, target);
  for (const y of [1, 75.5, 149.5]) draw("line", { class: "grid", x1: 0, x2: 600, y1: y, y2: y }, svg);
  if (top) target.append(make("span", "top", top));
  target.append(make("div", "axis", make("span", "", minutes(length) + " ago"), make("span", "", "now")));
  return svg;
}
function niceTop(most) {
  const power = 10 ** Math.floor(Math.log10(most));
  return [1, 2, 2.5, 5, 10].map((step) => step * power).find((step) => step >= most);
}
function lineChart(id, name, colour, unit, length) {
  const target = byId(id), now = state.now, rows = state.rows;
  const points = rows.map((row) => [600 * (1 - (now - row.time) / length), row[name] / row.seconds, row]);
  const most = Math.max(0, ...points.map((point) => point[1]));
  const top = most ? niceTop(most) : 1;
  const svg = frame(target, length, most ? rate(top) + " " + unit : "");
  const mean = rows.reduce((sum, row) => sum + row[name], 0) / Math.max(1e-9, rows.reduce((sum, row) => sum + row.seconds, 0));
  svg.setAttribute("aria-label", `${rate(mean)} ${unit} on average, ${rate(most)} at most`);
  if (!most) return target.append(make("div", "empty", `No tokens in the last ${minutes(length)}.`));
  const at = ([x, value]) => `${x.toFixed(1)},${(149.5 - 146 * value / top).toFixed(1)}`;
  const path = "M" + points.map(at).join("L");
  draw("path", { class: `area f-${colour}`, d: `${path}L${points.at(-1)[0].toFixed(1)},149.5L${points[0][0].toFixed(1)},149.5Z` }, svg);
  draw("path", { class: `line s-${colour}`, d: path }, svg);
  const note = make("div", "legend", make("span", "item", `mean ${rate(mean)}, most ${rate(most)} ${unit}`));
  target.append(note);
  hover(target, svg, points.map((point) => point[0]), (i) => {
    note.replaceChildren(make("span", "item", i === null ? `mean ${rate(mean)}, most ${rate(most)} ${unit}`
      : `${span(Math.max(0, now - points[i][2].time))} ago: ${rate(points[i][1])} ${unit}; ${points[i][2].running} running, ${points[i][2].waiting} waiting`));
  });
}
function hover(target, svg, xs, tell) {
  // the place pointed at outlives the drawing, which is made anew with every answer
  const cursor = draw("line", { class: "cursor", y1: 0, y2: 150, visibility: "hidden" }, svg);
  const point = (x) => {
    state.pointed[target.id] = x;
    let best = 0;
    xs.forEach((one, i) => { if (Math.abs(one - x) < Math.abs(xs[best] - x)) best = i; });
    cursor.setAttribute("x1", xs[best]);
    cursor.setAttribute("x2", xs[best]);
    cursor.setAttribute("visibility", "visible");
    tell(best);
  };
  target.onpointermove = (event) => {
    const box = svg.getBoundingClientRect();
    if (event.clientY <= box.bottom) point(600 * (event.clientX - box.left) / box.width);
  };
  target.onpointerleave = () => { delete state.pointed[target.id]; cursor.setAttribute("visibility", "hidden"); tell(null); };
  if (target.id in state.pointed) point(state.pointed[target.id]);
}
function sourceChart(length) {
  const target = byId("sources"), names = Object.keys(SOURCES), now = state.now;
  const buckets = Array.from({ length: BUCKETS }, () => ({}));
  const all = {};
  for (const row of state.rows) {
    const at = Math.floor(BUCKETS * (1 - (now - row.time) / length));
    if (at < 0 || at >= BUCKETS) continue;
    for (const name of names) {
      const count = row["from_" + name] || 0;
      buckets[at][name] = (buckets[at][name] || 0) + count;
      all[name] = (all[name] || 0) + count;
    }
  }
  const sum = (counts) => Object.values(counts).reduce((a, b) => a + b, 0);
  const total = sum(all);
  const svg = frame(target, length, total ? "100 %" : "");
  const shown = names.filter((name) => all[name] || name === "computed" || name === "device" || name === "recomputed");
  const words = (counts) => shown.map((name) => `${percent(counts[name] || 0, sum(counts))} ${SOURCES[name]}`);
  svg.setAttribute("aria-label", total ? words(all).join(", ") : "no prompts");
  if (!total) return target.append(make("div", "empty", `No prompt was admitted in the last ${minutes(length)}.`));
  const width = 600 / BUCKETS;
  buckets.forEach((counts, i) => {
    let y = 149.5;
    const most = sum(counts);
    for (const name of names) {
      const height = most ? 148.5 * (counts[name] || 0) / most : 0;
      if (height) draw("rect", { class: "f-" + name, x: i * width + 1, width: width - 2, y: y - height, height }, svg);
      y -= height;
    }
  });
  const legend = make("div", "legend");
  const tell = (i) => {
    const counts = i === null ? all : buckets[i], most = sum(counts);
    legend.replaceChildren(...shown.map((name) => swatch(name, `${SOURCES[name]} ${percent(counts[name] || 0, most)}`)),
      make("span", "muted", i === null ? `of ${short(most)} tokens in ${minutes(length)}`
        : `of ${short(most)} tokens, ${minutes(length * (1 - (i + 0.5) / BUCKETS))} ago`));
  };
  tell(null);
  target.append(legend);
  hover(target, svg, buckets.map((_, i) => (i + 0.5) * width), tell);
}

// ---- parts of the page

function tiles(data) {
  const recent = state.rows.slice(-3);
  const per = (name) => recent.reduce((sum, row) => sum + row[name], 0) / Math.max(1e-9, recent.reduce((sum, row) => sum + row.seconds, 0));
  const sources = data.sources, all = Object.values(sources).reduce((a, b) => a + b, 0);
  const found = all - sources.computed - sources.recomputed;
  const device = data.memory.device || {}, room = data.room.device || 0;
  const used = room - (device.free || 0);
  const tile = (name, value, unit, more) => make("div", "tile", make("div", "name", name),
    make("div", "value", value, unit ? make("span", "unit", unit) : null), make("div", "more", more));
  const wait = data.first_token;
  byId("tiles").replaceChildren(
    tile("Running", whole(data.running), "", `of ${whole(data.limits.running)} at most`),
    tile("Waiting", whole(data.waiting), "", `of ${whole(data.limits.waiting)} at most`),
    tile("Prefill", rate(per("prefill")), "tokens/s", `${short(data.prefilled)} since start`),
    tile("Decode", rate(per("decode")), "tokens/s", `${short(data.generated)} since start`),
    tile("First token", wait.count ? span(wait.p50) : "–", "", wait.count ? `median; 95 % in ${span(wait.p95)}` : "no answer lately"),
    tile("Found in the cache", percent(found, all), "", all ? `of ${short(all)} prompt tokens` : "no prompt yet"),
    tile("Device cache", percent(used, room), "used", `${bytes(data.evictable)} of it may be evicted`),
  );
}
function plans(data, length) {
  const total = Object.values(data.plans).reduce((a, b) => a + b, 0);
  if (!total) return byId("plans").replaceChildren(make("div", "empty", "No request was admitted yet."));
  const rows = [];
  for (const [plan, [title, colour, text]] of Object.entries(PLANS)) {
    const count = data.plans[plan] || 0;
    if (!count && plan === "bounded") continue;
    const lately = state.rows.reduce((sum, row) => sum + (row["plan_" + plan] || 0), 0);
    rows.push(make("div", "planrow", make("span", "", title), bar([[colour, count]], total, `${title}: ${count} of ${total}`),
      make("span", "count", `${whole(count)} · ${percent(count, total)}`),
      make("p", "", `${text}; ${whole(lately)} in the last ${minutes(length)}`)));
  }
  byId("plans").replaceChildren(...rows);
}
function memory(data) {
  const tiers = Object.entries(data.memory).map(([tier, kinds]) => {
    const held = Object.entries(kinds).reduce((sum, [kind, size]) => sum + (kind === "free" ? 0 : size), 0);
    const room = data.room[tier] || held;
    const moved = data.moved[tier];
    const note = (data.room[tier] ? `${bytes(held)} of ${bytes(room)}, ${percent(held, room)}` : `${bytes(held)} written`)
      + (moved ? `; ${bytes(moved.in)} came down, ${bytes(moved.out)} went up again` : "");
    const legend = make("div", "legend", ...Object.entries(kinds).filter(([kind, size]) => size || (kind === "free" && data.room[tier]))
      .map(([kind, size]) => swatch(kind, `${KINDS[kind] || kind} ${bytes(size)}`)));
    return make("div", "tier", make("h3", "", tier + " ", make("small", "", note)), bar(Object.entries(kinds), room || 1, `${tier}: ${note}`), legend);
  });
  byId("memory").replaceChildren(...tiers);
}
function requests(data) {
  const listed = data.facts.requests, now = data.now - data.facts_age, before = state.rates;
  state.rates = new Map();
  const rows = listed.map((one) => {
    const known = before.get(one.request_id);
    const moved = known && now > known.time ? { pace: (one.processed - known.processed) / (now - known.time), time: now, processed: one.processed } : null;
    const next = moved || known || { pace: 0, time: now, processed: one.processed };
    state.rates.set(one.request_id, next);
    const waits = ["waiting", "fetching", "held"].includes(one.state);
    const done = Math.min(one.processed, one.prompt_tokens), found = Math.min(one.cached_tokens, done);
    let text = `${whole(done)} of ${whole(one.prompt_tokens)} rows`;
    if (one.state === "prefill" && next.pace > 0) text += ` · ${rate(next.pace)}/s · ${span((one.prompt_tokens - done) / next.pace)} left`;
    if (waits) text = `${whole(one.prompt_tokens)} tokens`;
    const plan = one.resume ? PLANS[one.resume][0] : "–";
    const progress = make("div", "", bar([["device", found], ["csa", done - found]], one.prompt_tokens, `${one.state}: ${text}`, true), make("div", "sub", text));
    return [make("code", "", one.request_id.slice(-10)), make("span", "tag " + one.state, one.state + (one.preempted ? ` (preempted ${one.preempted}×)` : "")), progress,
      waits ? "–" : `${whole(one.generated)} of ${whole(one.limit - one.prompt_tokens)}`, plan,
      one.resume ? `${whole(one.cached_tokens)}` + (one.recomputed_tokens ? ` + ${whole(one.recomputed_tokens)} again` : "") : "–",
      one.seconds === null ? "–" : span(one.seconds), one.tenant ? make("code", "", one.tenant) : "–"];
  });
  const hidden = data.facts.running + data.facts.waiting - listed.length;
  byId("requests-note").textContent = `${data.facts.running} running, ${data.facts.waiting} waiting`
    + (hidden > 0 ? `; the first ${listed.length} are listed` : "") + (data.facts_age > 3 ? `; as of ${span(data.facts_age)} ago, a step is still running` : "");
  table(byId("requests"), [["Request", ""], ["State", ""], ["Prompt", "wide"], ["Generated", "n"], ["Plan", ""], ["Found", "n"], ["Age", "n"], ["Tenant", ""]], rows,
    "No request is running or waiting.");
}
function sessions(data) {
  const rows = data.facts.sessions.map((one) => {
    const parts = Object.entries(one.by_tier), left = parts.reduce((sum, [, tokens]) => sum + tokens, 0);
    const words = parts.map(([tier, tokens]) => `${whole(tokens)} ${tier}`);
    if (left < one.tokens) words.push(`${whole(one.tokens - left)} gone`);
    const where = make("div", "", bar([...parts, ["gone", one.tokens - left]], one.tokens, words.join(", "), true), make("div", "sub", words.join(" · ")));
    const resumes = one.resumes_at ? make("span", "", `at ${whole(one.resumes_at)} `, make("span", "sub", "from " + one.resumes_from + (one.rebuild ? `, ${whole(one.rebuild)} run again` : "")))
      : make("span", "", left ? make("span", "sub", `no window stored; ${whole(one.rebuild)} run again`) : "from the start");
    const kept = [one.pin === null ? "" : `pinned ${span(one.pin)} more`, one.expired ? "expired, goes first" : one.ttl === null ? "" : `for ${span(one.ttl)} more`].filter(Boolean);
    return [make("code", "", one.session), one.tenant ? make("code", "", one.tenant) : "–", whole(one.turns), whole(one.tokens), where, resumes, span(one.idle), kept.join(", ") || "by value"];
  });
  const hidden = data.facts.remembered - rows.length;
  byId("sessions-note").textContent = "those that ended last; names are labels of this process" + (hidden > 0 ? `; ${hidden} more are remembered` : "");
  table(byId("sessions"), [["Session", ""], ["Tenant", ""], ["Turns", "n"], ["Tokens", "n"], ["Where they lie", "wide"], ["Resumes", ""], ["Idle", "n"], ["Kept", ""]], rows,
    "No conversation has ended since the server started.");
}
function show(data) {
  if (data.born !== state.born) state.rows = [];
  state.born = data.born;
  state.now = data.now;
  state.rows = state.rows.concat(data.history).slice(-data.kept);
  state.last = state.rows.length ? state.rows.at(-1).number : 0;
  const length = Math.max(120, Math.min(data.kept * data.every, data.now - data.born));
  byId("model").textContent = data.model;
  byId("uptime").textContent = `up ${span(Math.max(0, data.now - data.born))}, contexts up to ${whole(data.max_context)} tokens`
    + (data.weights ? `, weights replaced ${whole(data.weights)}×` : "");
  document.title = `${data.model}: ${data.running} running, ${data.waiting} waiting`;
  tiles(data);
  lineChart("prefill", "prefill", "csa", "tokens/s", length);
  lineChart("decode", "decode", "device", "tokens/s", length);
  sourceChart(length);
  plans(data, length);
  memory(data);
  requests(data);
  sessions(data);
  const counts = Object.entries(data.totals).filter(([, n]) => n).map(([name, n]) => `${whole(n)} ${TOTALS[name]}`);
  byId("footer").textContent = `Since start: ${counts.join(", ") || "nothing evicted, preempted or failed"}. These facts took the engine ${(data.facts.seconds * 1e3).toFixed(2)} ms between two steps.`;
}

// ---- asking

const STATES = { running: "live", paused: "paused: no step begins", updating: "updating: new weights wait for requests to end" };

function say(kind, text) {
  const status = byId("status");
  status.className = kind;
  if (status.textContent !== text) status.textContent = text;
}
async function ask() {
  clearTimeout(state.timer);
  if (document.hidden) return;
  let pause = 3000;
  try {
    const headers = state.secret ? { Authorization: "Bearer " + state.secret } : {};
    const answer = await fetch("dashboard/data?since=" + state.last, { headers, cache: "no-store" });
    if (answer.status === 401 || answer.status === 403) {
      byId("key").hidden = false;
      say("gone", state.secret ? "this key may not look" : "needs a key");
      return;
    }
    if (!answer.ok) throw new Error("status " + answer.status);
    const data = await answer.json();
    if (state.born && data.born !== state.born && state.last) { state.last = 0; state.rows = []; return setTimeout(ask, 0); }
    byId("key").hidden = true;
    byId("figures").hidden = false;
    show(data);
    state.heard = Date.now();
    say(data.draining || data.state !== "running" ? "late" : "live", data.draining ? "draining: no new requests" : STATES[data.state]);
    if (data.running || data.waiting) pause = 1000;
  } catch (error) {
    say("gone", state.heard ? `no answer for ${span((Date.now() - state.heard) / 1000)}` : "the server does not answer");
  }
  state.timer = setTimeout(ask, pause);
}
byId("key").addEventListener("submit", (event) => {
  event.preventDefault();
  state.secret = byId("secret").value.trim();
  sessionStorage.setItem("key", state.secret);
  byId("secret").value = "";
  ask();
});
document.addEventListener("visibilitychange", () => { if (!document.hidden) ask(); });

const THEMES = ["system", "light", "dark"];
function theme(name) {
  if (name === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  byId("theme").textContent = "Colours: " + name;
  state.theme = name;
}
byId("theme").addEventListener("click", () => {
  theme(THEMES[(THEMES.indexOf(state.theme) + 1) % THEMES.length]);
  localStorage.setItem("theme", state.theme);
});
const wanted = location.hash.slice(1);
theme(THEMES.includes(wanted) ? wanted : localStorage.getItem("theme") || "system");
ask();
