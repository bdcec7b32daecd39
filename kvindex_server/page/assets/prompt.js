// The prompt box: asks the server, and draws per pod which blocks it holds.

import { count, element, inTierOrder, svg, swatch, tierClass } from "./draw.js";
import { trustBadge } from "./fleet.js";

const WIDTH = 1000, HEIGHT = 22, SEPARATED = 160;

export class PromptBox {
  constructor() {
    this.form = document.getElementById("prompt");
    this.told = document.getElementById("told");
    this.form.addEventListener("submit", (event) => { event.preventDefault(); this.ask(); });
    document.getElementById("text").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); this.form.requestSubmit(); }
    });
  }

  // `how` is off, open or token.
  offer(how, models) {
    document.getElementById("prompt-off").hidden = how !== "off";
    this.form.hidden = how === "off";
    document.getElementById("token-field").hidden = how !== "token";
    const list = document.getElementById("model");
    if (list.dataset.models === JSON.stringify(models)) return;
    list.dataset.models = JSON.stringify(models);
    const chosen = list.value;
    list.replaceChildren(...models.map((model) => element("option", { value: model }, model)));
    if (models.includes(chosen)) list.value = chosen;
  }

  async ask() {
    const value = (id) => document.getElementById(id).value;
    const button = document.getElementById("ask");
    const body = { model: value("model"), kind: value("kind"), text: value("text") };
    body.lora_name = value("lora") || null;
    body.cache_salt = value("salt") || null;
    const headers = { "Content-Type": "application/json" };
    if (value("token")) headers.Authorization = `Bearer ${value("token")}`;
    button.disabled = true;
    try {
      const answer = await fetch("/api/score", { method: "POST", headers, body: JSON.stringify(body) });
      const found = await answer.json();
      if (!answer.ok) throw new Error(found.error?.message ?? `HTTP ${answer.status}`);
      this.show(found);
    } catch (error) {
      this.say(error instanceof TypeError ? "The server does not answer." : error.message, true);
      document.getElementById("matches").hidden = true;
    } finally {
      button.disabled = false;
    }
  }

  say(words, bad) {
    this.told.textContent = words;
    this.told.className = bad ? "bad" : "";
  }

  show(found) {
    document.getElementById("matches").hidden = !found.total_blocks || !found.pods.length;
    this.say(summary(found), false);
    const more = (all, total) => (total > all.length ? " …" : "");
    document.getElementById("shown-tokens").textContent = found.tokens.join(" ") + more(found.tokens, found.total_tokens);
    document.getElementById("shown-keys").textContent = found.keys.join(" ") + more(found.keys, found.total_blocks);
    const kinds = new Set(found.pods.flatMap((pod) => pod.runs.map(([where]) => where)));
    kinds.delete("");
    const placed = kinds.delete("speculative");
    const marks = inTierOrder(kinds).map((tier) => swatch(tier, `on ${tier}`));
    if (placed) marks.push(swatch("speculative", "placed by a router, not confirmed"));
    marks.push(swatch("", "not held"));
    const past = svg("svg", { viewBox: "0 0 16 12", "aria-hidden": "true" });
    past.append(svg("rect", { x: 1, y: 1, width: 14, height: 10, rx: 2, class: "gpu past" }));
    marks.push(element("span", {}, past, "pale: held, but after a hole, so it does not count"));
    const gone = svg("svg", { viewBox: "0 0 16 12", "aria-hidden": "true" });
    gone.append(svg("rect", { x: 2, y: 2, width: 12, height: 8, class: "hole gone" }));
    if (found.pods.some((pod) => pod.left.length)) marks.push(element("span", {}, gone, "was held and has left, where the match ends"));
    document.getElementById("match-legend").replaceChildren(...marks);
    document.getElementById("pods").replaceChildren(...found.pods.map((pod) => row(pod, found)));
  }
}

function summary(found) {
  if (!found.block_size) return `${count(found.total_tokens)} tokens. The model's block size is not known yet: no engine has stored a block.`;
  if (!found.total_blocks) return `${count(found.total_tokens)} tokens: less than one block of ${found.block_size}.`;
  const pods = found.pods_total > found.pods.length ? `the best ${found.pods.length} of ${count(found.pods_total)} pods` : `${found.pods.length} pods`;
  const best = Math.max(0, ...found.pods.map((pod) => pod.matched_blocks));
  return `${count(found.total_tokens)} tokens, ${count(found.total_blocks)} blocks of ${found.block_size}; ${pods}, the best holds ${count(best)} blocks.`;
}

function row(pod, found) {
  const parts = inTierOrder(Object.keys(pod.tier_blocks)).map((tier) => `${tier} ${count(pod.tier_blocks[tier])}`);
  if (pod.speculative_blocks) parts.push(`placed ${count(pod.speculative_blocks)}`);
  const words = `${count(pod.matched_blocks)} of ${count(found.total_blocks)} blocks`;
  const line = element(
    "div", { class: "line" },
    element("strong", {}, pod.pod),
    element("span", { class: "quiet" }, `rank ${pod.rank}`),
    trustBadge(pod.trust),
    element("span", {}, words),
    element("span", { class: "quiet" }, [`score ${+pod.score.toFixed(2)}`, ...parts].join(" · ")),
  );
  const why = element("p", { class: "quiet why" }, pod.why);
  return element("li", {}, line, strip(pod, found.total_blocks, `${pod.pod}: ${words}`), why);
}

function strip(pod, total, words) {
  const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": words });
  const unit = WIDTH / total;
  const gap = total <= SEPARATED ? Math.min(2, unit * 0.2) : 0;
  const counted = pod.matched_blocks + pod.speculative_blocks;
  let at = 0;
  for (const [where, blocks] of pod.runs) {
    // Cut where the match ends, so that a run can be full up to there and pale behind.
    for (const [from, to] of [[at, Math.min(at + blocks, counted)], [Math.max(at, counted), at + blocks]]) {
      if (from >= to) continue;
      const kind = tierClass(where) + (where && from >= counted ? " past" : "");
      if (!gap) picture.append(cell(from * unit, (to - from) * unit, kind));
      else for (let each = from; each < to; each++) picture.append(cell(each * unit, unit - gap, kind));
    }
    at += blocks;
  }
  if (pod.left.length) {
    const gone = cell(pod.matched_blocks * unit, unit - gap, "gone");
    const title = svg("title", {});
    title.textContent = pod.left.map(departure).join("; ");
    gone.append(title);
    picture.append(gone);
  }
  return picture;
}

function departure(left) {
  const message = left.sequence === null ? "" : `, message ${left.sequence}`;
  const time = left.time ? `, ${new Date(left.time * 1000).toLocaleString()}` : "";
  return `${left.how.toLowerCase()} from ${left.tier}${time}${message}${left.earlier ? " of an earlier life of the engine" : ""}`;
}

function cell(x, width, kind) {
  const inset = kind === "placed" || kind === "gone" ? 1 : 0;
  return svg("rect", { x: (x + inset).toFixed(2), y: inset, width: Math.max(0.5, width - 2 * inset).toFixed(2), height: HEIGHT - 2 * inset, class: kind });
}
