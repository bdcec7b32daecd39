// A live line chart over a ring of samples; a sample that is null, or a pause, breaks the line.

import { svg } from "./draw.js";

// Seconds that a chart may reach back; it begins with the shortest.
const SPANS = [60, 120, 300, 600];
const LEFT = 54, RIGHT = 8, TOP = 8, BOTTOM = 20;

export class Ring {
  constructor(size) { this.size = size; this.items = []; }
  push(item) { this.items.push(item); if (this.items.length > this.size) this.items.shift(); }
}

export class Chart {
  // `lines`: one function per line, from a sample to a number or null; `label`: from a number to words.
  constructor(place, { title, lines, label, ceiling, span, step }) {
    Object.assign(this, { place, title, lines, label, ceiling, span, step });
    this.ring = new Ring(Math.round(span / step));
    new ResizeObserver(() => this.draw()).observe(place);
  }

  push(sample) { this.ring.push({ ...sample, at: performance.now() / 1000 }); this.draw(); }

  draw() {
    const { clientWidth: width, clientHeight: height } = this.place;
    if (!width) return;
    const now = performance.now() / 1000;
    const oldest = this.ring.items.length ? now - this.ring.items[0].at : 0;
    const span = SPANS.find((each) => each >= Math.min(oldest, this.span)) ?? this.span;
    const shown = this.ring.items.filter((each) => now - each.at <= span);
    const values = this.lines.map((line) => shown.map(line));
    const top = this.ceiling ?? round(Math.max(0, ...values.flat().filter((value) => value !== null)));
    const inner = { width: width - LEFT - RIGHT, height: height - TOP - BOTTOM };
    const x = (at) => LEFT + inner.width * (1 - (now - at) / span);
    const y = (value) => TOP + inner.height * (1 - Math.min(1, value / top));
    const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": this.words(values[0]) });
    for (const part of [0, 0.5, 1]) {
      const level = Math.round(y(top * part)) + 0.5;
      picture.append(
        svg("line", { x1: LEFT, x2: width - RIGHT, y1: level, y2: level, class: "rule" }),
        svg("text", { x: LEFT - 8, y: level + 4, "text-anchor": "end" }, this.label(top * part)),
      );
    }
    picture.append(
      svg("text", { x: LEFT, y: height - 4 }, `${span / 60} min ago`),
      svg("text", { x: width - RIGHT, y: height - 4, "text-anchor": "end" }, "now"),
    );
    values.forEach((line, number) => {
      for (const run of runs(shown, line, 3 * this.step)) {
        const points = run.map(([at, value]) => `${x(at).toFixed(1)},${y(value).toFixed(1)}`);
        if (number === 0) {
          const floor = `${x(run.at(-1)[0]).toFixed(1)},${y(0)} ${x(run[0][0]).toFixed(1)},${y(0)}`;
          picture.append(svg("polygon", { points: `${points.join(" ")} ${floor}`, class: "under" }));
        }
        // A sample alone has no length: a dot of it.
        if (points.length === 1) points.push(`${x(run[0][0]) - 0.5},${y(run[0][1]).toFixed(1)}`);
        picture.append(svg("polyline", { points: points.join(" "), class: number ? "line second" : "line" }));
      }
    });
    this.place.replaceChildren(picture);
  }

  words(values) {
    const known = values.filter((value) => value !== null);
    if (!known.length) return `${this.title}: nothing to show yet`;
    const [least, most] = [Math.min(...known), Math.max(...known)];
    return `${this.title}: now ${this.label(known.at(-1))}, between ${this.label(least)} and ${this.label(most)}`;
  }
}

// [time, value] of samples that follow each other within `patience` seconds.
function runs(samples, values, patience) {
  const found = [];
  let open = null;
  values.forEach((value, number) => {
    const { at } = samples[number];
    if (value === null) { open = null; return; }
    if (!open || at - open.at(-1)[0] > patience) found.push((open = []));
    open.push([at, value]);
  });
  return found;
}

// The next of 1, 2, 5 times a power of ten.
function round(value) {
  if (value <= 0) return 0.001;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].find((step) => step * power >= value) * power;
}
