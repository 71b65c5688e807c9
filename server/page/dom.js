// Elements by id, made and filled. Text only ever becomes text: most of it was written by strangers.

export const at = (id) => document.getElementById(id);

/** An element with attributes and children; a child that is a string becomes text. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** The same for SVG. */
export function draw(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Sets text only where it differs, so that a reader who has selected it keeps the selection. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** A cell of a table that turns into cards on a phone, where `label` stands before it. */
export function cell(label, kind = "", ...children) {
  return make("td", { role: "cell", "data-label": label, class: kind }, ...children);
}

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

/** A count with its thousands apart. */
export const count = (value) => whole.format(value);

/** Micro-dollars as dollars, to the last of them. */
export const dollars = (microusd) => `$${(microusd / 1e6).toFixed(6)}`;

/** Seconds in the unit in which they read best. */
export function duration(seconds) {
  if (seconds < 0.0995) return `${(seconds * 1000).toFixed(1)} ms`;
  return seconds < 0.9995 ? `${(seconds * 1000).toFixed(0)} ms` : `${seconds.toFixed(2)} s`;
}

/** The first digits of `sha256:…`. */
export const short = (digest) => digest.replace(/^sha256:/, "").slice(0, 12);
