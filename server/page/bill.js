// What the key's tenant owes for a month; without keys, the default tenant.

import { ask, session, words } from "./calls.js";
import { at, cell, count, dollars, draw, make, say } from "./dom.js";
import { every } from "./poll.js";

const PERIOD = 15_000; // milliseconds
const SHOWN = 20; // adapters, the dearest first
const TOKENS = ["prompt", "cached", "completion"];
const HELD = ["storage", "merged"];
const BYTE_SECONDS = 3600e9; // of a gigabyte-hour
const [WIDTH, HEIGHT] = [310, 60];

/** Connects the month's field. Returns what reads the bill at once. */
export function begin() {
  at("month").value = new Date().toISOString().slice(0, 7); // bills are of months in UTC
  const now = every(PERIOD, show);
  at("month").addEventListener("change", now);
  return now;
}

/** Forgets what a key has shown. */
export function clear() {
  at("bill").hidden = true;
  at("lines").replaceChildren();
  at("days").replaceChildren();
  for (const said of ["total", "bill-of", "bill-fault"]) say(at(said), "");
}

async function show() {
  if (session.locked) return;
  const [month, key] = [at("month").value, session.key];
  try {
    const invoice = await ask(`v1/invoices/${encodeURIComponent(month)}`);
    const days = await ask(`v1/usage?${new URLSearchParams({ group_by: "day", limit: 31, ...bounds(month) })}`);
    if (key !== session.key || month !== at("month").value) return;
    fill(invoice);
    at("days").replaceChildren(bars(days.data, month));
    at("bill").hidden = false;
    say(at("bill-fault"), "");
  } catch (fault) {
    if (fault.status === 401) return;
    clear();
    say(at("bill-fault"), `No bill: ${words(fault)}`);
  }
}

/** The month's first moment and the next one's. */
function bounds(month) {
  const [year, number] = month.split("-").map(Number);
  const first = (one) => new Date(Date.UTC(year, one - 1)).toISOString().slice(0, 10);
  return { from: first(number), to: first(number + 1) };
}

function fill({ tenant, requests, running, lines, total_microusd: total }) {
  say(at("total"), dollars(total));
  const open = running ? `; ${count(running)} still running are not on it yet` : "";
  say(at("bill-of"), `for ${tenant}, ${count(requests)} requests${open}`);
  const sums = [...byAdapter(lines)].sort((a, b) => b[1].amount - a[1].amount);
  const rest = sums.splice(SHOWN).map(([, sum]) => sum);
  const shown = sums.map(([name, sum]) => row(name ?? "the base", sum));
  if (rest.length) shown.push(row(`${count(rest.length)} more`, rest.reduce(added, {})));
  at("lines").replaceChildren(...shown);
}

function byAdapter(lines) {
  const sums = new Map();
  for (const { adapter, kind, quantity, amount_microusd: amount } of lines) {
    sums.set(adapter, added(sums.get(adapter) ?? {}, { [kind]: quantity, amount }));
  }
  return sums;
}

function added(sum, more) {
  const both = { ...sum };
  for (const [kind, value] of Object.entries(more)) both[kind] = (both[kind] ?? 0) + value;
  return both;
}

function row(name, sum) {
  const labels = { prompt: "Prompt", cached: "Cached", completion: "Completion", storage: "Stored, GB h", merged: "Merged, GB h" };
  const tokens = TOKENS.map((kind) => cell(labels[kind], "figure", count(sum[kind] ?? 0)));
  const held = HELD.map((kind) => cell(labels[kind], "figure", ((sum[kind] ?? 0) / BYTE_SECONDS).toFixed(3)));
  const heading = make("th", { role: "rowheader", scope: "row" }, name);
  return make("tr", { role: "row" }, heading, ...tokens, ...held, cell("Amount", "figure", dollars(sum.amount)));
}

/** A bar a day. */
function bars(days, month) {
  const [year, number] = month.split("-").map(Number);
  const many = new Date(Date.UTC(year, number, 0)).getUTCDate();
  const costs = new Map(days.map((day) => [new Date(day.created * 1000).getUTCDate(), day.cost_microusd]));
  const top = Math.max(...costs.values(), 1);
  const step = WIDTH / many;
  const label = [...costs].map(([day, cost]) => `day ${day} ${dollars(cost)}`).join(", ") || "nothing yet";
  const chart = { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "days", role: "img", "aria-label": `Cost by day: ${label}` };
  const drawn = Array.from({ length: many }, (_, index) => {
    const cost = costs.get(index + 1) ?? 0;
    const height = Math.max((cost / top) * (HEIGHT - 2), 1);
    const place = { x: index * step + 1, y: HEIGHT - height, width: step - 2, height, rx: 1 };
    return draw("rect", { ...place, class: cost ? "bar" : "bar none" }, draw("title", {}, `${month}-${String(index + 1).padStart(2, "0")}: ${dollars(cost)}`));
  });
  return draw("svg", chart, ...drawn);
}
