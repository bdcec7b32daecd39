// Small pieces of HTML and SVG, built node by node: text from the server never becomes markup.

const SVG = "http://www.w3.org/2000/svg";

export function element(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

export function svg(name, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, name), attributes, children);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const TIERS = ["gpu", "cpu", "disk"];

export function tierClass(where) {
  if (where === "") return "hole";
  if (where === "speculative") return "placed";
  return TIERS.includes(where) ? where : "other";
}

// gpu, cpu, disk first, then what engines call otherwise.
export function inTierOrder(names) {
  const place = (name) => (TIERS.indexOf(name) + TIERS.length + 1) % (TIERS.length + 1);
  return [...names].sort((a, b) => place(a) - place(b) || a.localeCompare(b));
}

export function swatch(where, words) {
  const mark = svg("svg", { viewBox: "0 0 16 12", "aria-hidden": "true" });
  mark.append(svg("rect", { x: 1, y: 1, width: 14, height: 10, rx: 2, class: tierClass(where) }));
  return element("span", {}, mark, words);
}

const whole = new Intl.NumberFormat("en");
export const count = (value) => whole.format(value);

export function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0 s";
  if (value < 0.001) return `${(value * 1e6).toFixed(0)} µs`;
  if (value < 1) return `${(value * 1e3).toFixed(value < 0.01 ? 1 : 0)} ms`;
  if (value < 120) return `${value.toFixed(value < 10 ? 1 : 0)} s`;
  if (value < 7200) return `${(value / 60).toFixed(0)} min`;
  return `${(value / 3600).toFixed(0)} h`;
}

export const percent = (value) => (value === null ? "–" : `${(value * 100).toFixed(value > 0 && value < 0.1 ? 1 : 0)} %`);

export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  for (; value >= 1024 && at < units.length - 1; at++) value /= 1024;
  return `${value.toFixed(at && value < 10 ? 1 : 0)} ${units[at]}`;
}
