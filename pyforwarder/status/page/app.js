// Puts the page together: events in, drawings and tables out.

import { Chart, Series } from "./chart.js";
import { at, element, say } from "./dom.js";
import { Explain } from "./explain.js";
import { Flow } from "./flow.js";
import { age, events, grouped, moment, rate, size } from "./format.js";
import { Live } from "./live.js";
import { Pairs } from "./pairs.js";
import { Table } from "./tables.js";

const STATES = {
  connecting: "connecting",
  live: "live",
  paused: "paused",
  hidden: "paused: nobody looks",
  lost: "no answer; trying again",
};
const MOST_VERDICTS = 50;

let hello = null; // what does not change
let flow = null;
let lastTick = null;
let now = 0; // the server's clock, seconds since 1970
const series = new Map(); // "t", "l0", "r3", "u1", "s2" -> Series
const verdicts = [];
const narrow = window.matchMedia("(max-width: 700px)");

const total = new Chart(600, 120, "Rates up and down, the last 15 minutes");
at("total-chart").append(total.node);
const lanes = new Table(at("lanes"), "Pairs and rates by datapath", [
  ["Datapath", "text"], ["Pairs", "number"], ["Up", "number"], ["Down", "number"], ["This host", "text"],
]);
const listeners = new Table(at("listeners").querySelector("table"), "Listeners and what comes to them", [
  ["Listener", "text"], ["Bind", "text"], ["15 minutes", "chart"], ["Open", "number"], ["New", "number"],
  ["Up", "number"], ["Down", "number"], ["Accepted", "number"], ["Refused", "number"],
]);
const rules = new Table(at("rules").querySelector("table"), "Rules, in the order in which they are tried", [
  ["Rule", "text"], ["Listener", "text"], ["To", "text"], ["15 minutes", "chart"], ["Pairs", "number"], ["New", "number"],
  ["Up", "number"], ["Down", "number"], ["Taken", "number"], ["Refused", "number"],
]);
const upstreams = new Table(at("sums"), "Upstreams, all of their servers together", [
  ["Upstream", "text"], ["15 minutes", "chart"], ["Pairs", "number"], ["New", "number"], ["Up", "number"], ["Down", "number"],
]);
const servers = new Table(at("servers"), "Servers of the upstreams", [
  ["Server", "text"], ["Upstream", "text"], ["15 minutes", "chart"], ["State", "text"], ["Pairs", "number"],
  ["Up", "number"], ["Down", "number"], ["Connects", "number"], ["Failures", "number"], ["Weight", "number"], ["", "action"],
]);
const ends = new Table(at("ends").querySelector("table"), "Ends of connections by reason", [
  ["Reason", "text"], ["Now", "number"], ["Since the start", "number"],
]);
let endNames = "";

// ---------------------------------------------------------------- asking

async function ask(path, question) {
  const answer = await fetch(path, {
    method: "POST",
    headers: { "Content-Type": "application/json", "X-Pyforwarder-Token": hello === null ? "" : hello.token },
    body: JSON.stringify(question),
  });
  const said = await answer.json().catch(() => ({}));
  if (!answer.ok || said.error) throw new Error(said.error ?? `the forwarder says ${answer.status}`);
  return said;
}

// Whom to tell what is answered to the open question; null while none is open.
let answered = null;

function tellAnswer(yes) {
  const tell = answered;
  answered = null;
  if (tell !== null) tell(yes);
}

/** Whether the person says yes. A question that is asked before the last was answered is a no to that one. */
function sure(words) {
  tellAnswer(false);
  say(at("ask-words"), words);
  at("ask").close();
  at("ask").showModal();
  return new Promise((resolve) => {
    answered = resolve;
  });
}

at("ask").addEventListener("submit", (event) => tellAnswer(event.submitter?.value === "yes"));
// By Escape. The event comes some time after the dialog is closed: the next question may be open by then.
at("ask").addEventListener("close", () => {
  if (!at("ask").open) tellAnswer(false);
});

async function flush(row) {
  if (!(await sure(`Reset pair ${row.id}, ${row.client} to ${row.server}?`))) return;
  try {
    const answer = await ask("flush", { ids: [row.id] });
    say(at("said"), answer.flushed ? `pair ${row.id} reset` : `pair ${row.id} had ended`);
  } catch (error) {
    say(at("said"), `pair ${row.id}: ${error.message}`);
  }
}

/** Where viewers may: a button that drains a server, or has it ready again. */
function makeButton(row, one) {
  if (!hello.control) return;
  row.button = element("button", { type: "button", "aria-describedby": `server-${servers.rows.indexOf(row)}` }, "Drain");
  row.cells[0].id = `server-${servers.rows.indexOf(row)}`;
  row.cells.at(-1).append(row.button);
  row.button.addEventListener("click", async () => {
    const state = row.button.textContent === "Ready" ? "ready" : "drain";
    try {
      await ask("server", { upstream: one.upstream, server: one.server, state });
      say(at("said"), state === "drain" ? `${one.server} gets no new pairs` : `${one.server} is ready`);
    } catch (error) {
      say(at("said"), `${one.server}: ${error.message}`);
    }
  });
}

const pairs = new Pairs(flush);
const explain = new Explain(ask);

// ---------------------------------------------------------------- what does not change

function begin(data) {
  hello = data;
  now = data.at;
  document.title = `pyforwarder ${data.instance}`;
  say(at("instance"), data.instance);
  at("flush").hidden = !data.control;
  drawFlow();
  lanes.reset(data.lanes);
  const charted = (kind) => (index) => `${kind}${index}` in data.history.series;
  listeners.reset(data.listeners.map((one) => `listener ${one.name}`), charted("l"));
  rules.reset(data.rules.map((one) => `rule ${one.rule}`), charted("r"));
  upstreams.reset(data.upstreams.map((name) => `upstream ${name}`), charted("u"));
  servers.reset(data.servers.map((one) => `server ${one.server}`), charted("s"));
  servers.rows.forEach((row, index) => makeButton(row, data.servers[index]));
  at("upstreams").classList.toggle("none", !data.servers.length);
  explain.listeners(data.listeners.map((one) => one.name));
  endNames = "";
  series.clear();
  for (const [name, columns] of Object.entries(data.history.series)) {
    const one = new Series();
    data.history.at.forEach((at_s, index) => {
      one.add(at_s, data.history.span[index], columns.map((column) => column[index]));
    });
    series.set(name, one);
  }
  verdicts.length = 0;
  verdicts.push(...data.health);
  tellHealth();
  drawCharts();
}

// ---------------------------------------------------------------- what does

function tick(data) {
  lastTick = data;
  now = data.at;
  say(at("about"), `${hello.version}, up ${age(data.at - hello.started)}, ${hello.workers} ${hello.workers === 1 ? "worker" : "workers"}`);
  tellTotals(data.totals);
  flow.draw(data.lanes);
  data.lanes.forEach(([count, up, down], index) => {
    const name = hello.lanes[index];
    lanes.write(index, [name, grouped(count), rate(up), rate(down), hello.datapaths[name] ?? ""]);
  });
  data.listeners.forEach(([open, fresh, up, down, accepted, refused], index) => {
    const one = hello.listeners[index];
    listeners.write(index, [one.name, `${one.bind} ${one.protocol}`, null, grouped(open), events(fresh), rate(up), rate(down), grouped(accepted), grouped(refused)]);
  });
  data.rules.forEach(([count, fresh, up, down, taken, refused], index) => {
    const one = hello.rules[index];
    rules.write(index, [one.rule, one.listener, one.to, null, grouped(count), events(fresh), rate(up), rate(down), grouped(taken), grouped(refused)]);
  });
  data.upstreams.forEach(([count, fresh, up, down], index) => {
    upstreams.write(index, [hello.upstreams[index], null, grouped(count), events(fresh), rate(up), rate(down)]);
  });
  data.servers.forEach(([count, up, down, state, connects, failures], index) => {
    const one = hello.servers[index];
    servers.write(index, [one.server, one.upstream, null, state, grouped(count), rate(up), rate(down), grouped(connects), grouped(failures),
      one.backup ? `${one.weight}, backup` : `${one.weight}`]);
    const row = servers.rows[index];
    row.node.className = state === "down" ? "down" : "";
    if (row.button) say(row.button, state === "drained" ? "Ready" : "Drain");
  });
  tellEnds(data.ends);
  pairs.ask();
}

function drawFlow() {
  flow = new Flow(hello.lanes, hello.datapaths, narrow.matches);
  at("flow").replaceChildren(flow.node);
}

function tellTotals(totals) {
  const list = [
    ["Pairs", grouped(totals.pairs)],
    ["New", events(totals.new)],
    ["Up", rate(totals.up)],
    ["Down", rate(totals.down)],
    ["Refused", events(totals.refused)],
    ["Carried", size(totals.up_bytes + totals.down_bytes)],
  ];
  const node = at("totals");
  if (!node.childElementCount) {
    node.append(...list.map(([name]) => element("div", {}, element("dt", {}, name), element("dd"))));
  }
  list.forEach(([, value], index) => say(node.children[index].lastElementChild, value));
}

function tellEnds(list) {
  const names = list.map(([reason]) => reason).join(" ");
  if (names !== endNames) {
    endNames = names;
    ends.reset(list.map(([reason]) => reason));
  }
  list.forEach(([reason, count, perSecond], index) => ends.write(index, [reason, events(perSecond), grouped(count)]));
}

function point(data) {
  now = data.at;
  for (const [name, rates] of Object.entries(data.series)) {
    if (series.has(name)) series.get(name).add(data.at, data.span, rates);
  }
  drawCharts();
}

function drawCharts() {
  const whole = series.get("t");
  total.draw(whole, now);
  const peak = whole.peak();
  say(at("total-words"), peak ? `The last 15 minutes; the line at the top is ${rate(peak)}. Area: up. Line: down.` : "Nothing has been carried while somebody looked.");
  for (const [kind, table] of [["l", listeners], ["r", rules], ["u", upstreams], ["s", servers]]) {
    table.rows.forEach((row, index) => {
      if (row.chart !== null) row.chart.draw(series.get(`${kind}${index}`), now);
    });
  }
}

function health(data) {
  verdicts.push(data);
  tellHealth();
}

function tellHealth() {
  verdicts.splice(0, Math.max(0, verdicts.length - MOST_VERDICTS));
  const lines = verdicts.map((one) =>
    element("li", { class: one.up ? "up" : "down" }, `${moment(one.at)} ${one.upstream} ${one.server} ${one.up ? "up" : "down"}: ${one.why}`),
  );
  at("health").replaceChildren(...lines.reverse());
}

// ---------------------------------------------------------------- begin

narrow.addEventListener("change", () => {
  if (hello === null) return;
  drawFlow();
  if (lastTick !== null) flow.draw(lastTick.lanes);
});
const live = new Live("live", { hello: begin, tick, point, health }, (word) => {
  say(at("connection"), STATES[word]);
  document.body.dataset.state = word;
});
at("pause").addEventListener("click", () => {
  const paused = at("pause").getAttribute("aria-pressed") !== "true";
  at("pause").setAttribute("aria-pressed", String(paused));
  live.setPaused(paused);
});
