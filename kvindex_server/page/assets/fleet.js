// The table of streams: sorted, filtered, and patched row by row so that focus and selection stay.

import { count, element, inTierOrder, seconds, svg, swatch, tierClass } from "./draw.js";

const TRUST = { EXACT: "good", PARTIAL: "fair", STALE: "bad", COLD: "none" };
const STATE = { LIVE: "good", SYNCING: "fair", CONNECTING: "none", GAP: "bad", DOWN: "bad" };
const DOUBT = ["STALE", "COLD", "PARTIAL", "EXACT"];

export function badge(words, kind) {
  return element("span", { class: `badge ${kind}` }, words);
}

export const trustBadge = (trust) => badge(trust, TRUST[trust] ?? "none");

const total = (stream) => Object.values(stream.blocks).reduce((sum, blocks) => sum + blocks, 0);
const lost = (stream) => stream.dropped + stream.decode_errors;

export class FleetTable {
  constructor() {
    this.streams = [];
    this.sort = { by: "trust", down: false };
    this.rows = new Map();
    this.filter = document.getElementById("filter");
    this.filter.addEventListener("input", () => this.draw());
    for (const button of document.querySelectorAll("[data-sort]"))
      button.addEventListener("click", () => this.sortBy(button.dataset.sort));
    this.mark();
  }

  show(streams, streamsTotal) {
    this.streams = streams;
    this.streamsTotal = streamsTotal;
    this.draw();
  }

  sortBy(by) {
    this.sort = { by, down: this.sort.by === by ? !this.sort.down : false };
    this.mark();
    this.draw();
  }

  mark() {
    for (const button of document.querySelectorAll("[data-sort]")) {
      const head = button.closest("th");
      if (button.dataset.sort === this.sort.by) head.setAttribute("aria-sort", this.sort.down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    }
  }

  value(stream) {
    switch (this.sort.by) {
      case "trust": return DOUBT.indexOf(stream.trust);
      case "total": return total(stream);
      case "lost": return lost(stream);
      default: return stream[this.sort.by];
    }
  }

  ordered() {
    const words = this.filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const text = (each) => `${each.pod} ${each.rank} ${each.model} ${each.trust} ${each.cause} ${each.state}`.toLowerCase();
    const found = this.streams.filter((each) => words.every((word) => text(each).includes(word)));
    const sign = this.sort.down ? -1 : 1;
    // What is not known comes last, whichever way.
    return found.sort((a, b) => {
      const [one, other] = [this.value(a), this.value(b)];
      if (one === null || other === null) return (one === null) - (other === null);
      const order = typeof one === "string" ? one.localeCompare(other, "en", { numeric: true }) : one - other;
      return sign * order || a.pod.localeCompare(b.pod, "en", { numeric: true }) || a.rank - b.rank;
    });
  }

  draw() {
    const streams = this.ordered();
    const most = Math.max(1, ...this.streams.map(total));
    const body = document.getElementById("rows");
    const rows = new Map();
    streams.forEach((stream, at) => {
      const name = JSON.stringify([stream.model, stream.pod, stream.rank]);
      const row = this.rows.get(name) ?? element("tr");
      row.replaceChildren(...cells(stream, most));
      if (body.children[at] !== row) body.insertBefore(row, body.children[at] ?? null);
      rows.set(name, row);
    });
    for (const [name, row] of this.rows) if (!rows.has(name)) row.remove();
    this.rows = rows;
    this.say(streams.length);
  }

  say(shown) {
    const empty = document.getElementById("empty");
    empty.hidden = shown > 0;
    empty.textContent = this.streams.length
      ? "No stream matches the filter."
      : "No pod is registered: set pods, turn discovery on, or call RegisterPod.";
    const cut = this.streamsTotal > this.streams.length ? `, of ${count(this.streamsTotal)} in all; those in doubt first` : "";
    const words = `${count(shown)} of ${count(this.streams.length)} streams${cut}`;
    const place = document.getElementById("shown");
    if (place.textContent !== words) place.textContent = words; // or a screen reader repeats it every time
    const tiers = inTierOrder(new Set(this.streams.flatMap((each) => Object.keys(each.blocks))));
    const legend = document.getElementById("fleet-legend");
    if (legend.dataset.tiers !== tiers.join()) {
      legend.dataset.tiers = tiers.join();
      legend.replaceChildren(...tiers.map((tier) => swatch(tier, tier)));
    }
  }
}

function cells(stream, most) {
  return [
    element("td", { class: "pod" }, stream.pod),
    element("td", { class: "number" }, String(stream.rank)),
    element("td", {}, stream.model),
    element("td", {}, trustBadge(stream.trust)),
    element("td", {}, stream.cause.replaceAll("_", " ")),
    element("td", {}, badge(stream.state, STATE[stream.state] ?? "none")),
    element("td", { class: "number" }, seconds(stream.lag_seconds)),
    element("td", { class: "number" }, stream.age_seconds === null ? "never" : `${seconds(stream.age_seconds)} ago`),
    element("td", {}, tiers(stream, most)),
    element("td", { class: "number" }, count(lost(stream))),
  ];
}

function tiers(stream, most) {
  const bar = svg("svg", { viewBox: "0 0 120 12", preserveAspectRatio: "none", "aria-hidden": "true" });
  bar.append(svg("rect", { width: 120, height: 12, rx: 2, class: "hole" }));
  let x = 0;
  const names = inTierOrder(Object.keys(stream.blocks));
  for (const tier of names) {
    const width = (120 * stream.blocks[tier]) / most;
    bar.append(svg("rect", { x, width, height: 12, rx: 2, class: tierClass(tier) }));
    x += width;
  }
  const words = names.map((tier) => `${tier} ${count(stream.blocks[tier])}`).join(" · ") || "none";
  return element("div", { class: "tiers" }, bar, words);
}
