// Asks the server every two seconds and hands the answer to the parts of the page.

import { Chart } from "./chart.js";
import { bytes, count, element, percent, seconds } from "./draw.js";
import { FleetTable } from "./fleet.js";
import { PromptBox } from "./prompt.js";

const STEP = 2, SPAN = 600;
const TRUSTS = ["EXACT", "PARTIAL", "STALE", "COLD"];
const at = (id) => document.getElementById(id);

const theme = at("theme");
function colours(choice) {
  if (choice === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = choice;
}
theme.value = ["light", "dark"].find((each) => each === localStorage.getItem("theme")) ?? "auto";
colours(theme.value);
theme.addEventListener("change", () => { localStorage.setItem("theme", theme.value); colours(theme.value); });

const table = new FleetTable();
const box = new PromptBox();
const hits = new Chart(at("hit-chart"), {
  title: "Hit ratio", lines: [(each) => each.ratio], label: percent, ceiling: 1, span: SPAN, step: STEP,
});
const lags = new Chart(at("lag-chart"), {
  title: "Mean ingestion lag", lines: [(each) => each.mean, (each) => each.worst], label: seconds, span: SPAN, step: STEP,
});

let before = null;

// Between two answers; null when there is nothing to speak of, or the server has started anew in between.
function change(now, then, top, bottom) {
  if (!then) return null;
  const under = bottom(now) - bottom(then);
  const over = top(now) - top(then);
  return under > 0 && over >= 0 ? over / under : null;
}

function sums(fleet) {
  const add = (name) => fleet.models.reduce((sum, model) => sum + model[name], 0);
  return { lookedUp: add("looked_up"), matched: add("matched"), lag: fleet.lag.sum, batches: fleet.lag.count };
}

function show(fleet) {
  const now = sums(fleet);
  const ratio = change(now, before, (each) => each.matched, (each) => each.lookedUp);
  const mean = change(now, before, (each) => each.lag, (each) => each.batches);
  const known = fleet.streams.map((each) => each.lag_seconds).filter((lag) => lag !== null);
  hits.push({ ratio });
  lags.push({ mean, worst: known.length ? Math.max(...known) : null });
  before = now;
  const ever = now.lookedUp ? [`${percent(now.matched / now.lookedUp)} `, element("small", {}, "since the start")] : ["–"];
  at("hit-now").replaceChildren(...(ratio !== null ? [percent(ratio)] : ever));
  at("lag-now").replaceChildren(mean !== null ? seconds(mean) : element("small", {}, known.length ? "nothing has arrived" : "–"));
  at("version").textContent = fleet.version;
  badge("ready", fleet.ready ? "ready" : "not ready", fleet.ready ? "good" : "bad");
  at("streams-total").textContent = count(fleet.streams_total);
  at("streams-trust").textContent = TRUSTS.filter((name) => fleet.trust[name]).map((name) => `${count(fleet.trust[name])} ${name}`).join(" · ") || "no pod is registered";
  const add = (name) => fleet.models.reduce((sum, model) => sum + model[name], 0);
  at("blocks-total").textContent = count(add("blocks"));
  at("blocks-bytes").textContent = `${count(add("claims"))} claims in ${bytes(add("bytes"))}`;
  const least = fleet.models.length ? Math.min(...fleet.models.map((model) => model.coverage)) : null;
  at("coverage").textContent = percent(least);
  at("coverage-models").textContent = fleet.models.length === 1 ? fleet.models[0].model : `of the model that has least, of ${fleet.models.length}`;
  table.show(fleet.streams, fleet.streams_total);
  box.offer(fleet.prompt, fleet.models.map((model) => model.model));
}

function badge(id, words, kind) {
  at(id).textContent = words;
  at(id).className = `badge ${kind}`;
}

function say(words) {
  if (at("connection").textContent !== words) at("connection").textContent = words;
}

const pause = at("pause");
pause.addEventListener("click", () => {
  const paused = pause.getAttribute("aria-pressed") !== "true";
  pause.setAttribute("aria-pressed", String(paused));
  pause.textContent = paused ? "Go on" : "Pause";
  say(paused ? "Paused." : "Live, every 2 seconds.");
});

async function tick() {
  if (pause.getAttribute("aria-pressed") !== "true") {
    try {
      const answer = await fetch("/api/fleet", { signal: AbortSignal.timeout(5000) });
      if (!answer.ok) throw new Error(`HTTP ${answer.status}`);
      show(await answer.json());
      say("Live, every 2 seconds.");
    } catch {
      say("The server does not answer; what is shown is old.");
      badge("ready", "no answer", "bad");
      hits.push({ ratio: null });
      lags.push({ mean: null, worst: null });
      before = null;
    }
  }
  setTimeout(tick, STEP * 1000);
}

tick();
