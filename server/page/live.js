// What the server does now: a few figures from /metrics, each with its last two minutes.

import { call, words } from "./calls.js";
import { at, count, draw, duration, make, say } from "./dom.js";
import { quantile, rate, Reading } from "./metrics.js";
import { every } from "./poll.js";

const PERIOD = 2000; // milliseconds
const [FEWEST, POINTS] = [15, 60]; // the width is for so many readings at least, and at most
const WINDOW = 15; // readings that a latency is taken over
const [WIDTH, HEIGHT] = [120, 32];

const gauge = (name) => ({ to }) => to.sum(name);
const ofHistogram = (name) => ({ past, to }) => quantile(name, 0.5, past, to);
const also = (name, word) => ({ to }) => (to.sum(name) === null ? "" : `${count(to.sum(name))} ${word}`);
const p95 = (name) => ({ past, to }) => {
  const found = quantile(name, 0.95, past, to);
  return found === null ? "none in the last half minute" : `95 % within ${duration(found)}`;
};
const joined = (...parts) => (readings) => parts.map((part) => part(readings)).filter(Boolean).join(", ");

// `needs`: the tile is there only where the server tells this.
const TILES = [
  {
    label: "Throughput",
    needs: "onebase_generation_tokens_total",
    value: ({ from, to }) => rate("onebase_generation_tokens_total", from, to),
    show: (value) => `${value < 9.95 ? value.toFixed(1) : count(value)} tok/s`,
  },
  {
    label: "Running",
    needs: "onebase_num_requests_running",
    value: gauge("onebase_num_requests_running"),
    show: count,
    note: joined(also("onebase_num_requests_waiting", "waiting"), also("onebase_num_requests_loading", "loading")),
  },
  {
    label: "First token",
    needs: "onebase_time_to_first_token_seconds_bucket",
    value: ofHistogram("onebase_time_to_first_token_seconds"),
    show: duration,
    note: p95("onebase_time_to_first_token_seconds"),
  },
  {
    label: "Between tokens",
    needs: "onebase_inter_token_latency_seconds_bucket",
    value: ofHistogram("onebase_inter_token_latency_seconds"),
    show: duration,
    note: p95("onebase_inter_token_latency_seconds"),
  },
  {
    label: "Device slots",
    needs: "onebase_adapter_slots_used",
    value: gauge("onebase_adapter_slots_used"),
    show: count,
    note: ({ to }) => (to.sum("onebase_adapter_slots") === null ? "" : `of ${count(to.sum("onebase_adapter_slots"))}`),
    most: gauge("onebase_adapter_slots"),
  },
  {
    label: "KV cache",
    needs: "onebase_kv_cache_usage_perc",
    value: gauge("onebase_kv_cache_usage_perc"),
    show: (value) => `${(value * 100).toFixed(0)} %`,
    note: () => "of its blocks in use",
    most: () => 1,
  },
];

/** Shows the tiles and keeps them up to date. */
export function begin() {
  const tiles = TILES.map((tile) => new Tile(tile));
  at("tiles").append(...tiles.map((tile) => tile.element));
  let readings = [];

  every(PERIOD, async () => {
    try {
      const response = await call("metrics", { open: true });
      const to = new Reading(await response.text(), performance.now() / 1000);
      const begunAgain = (readings.at(-1)?.sum("onebase_engine_steps_total") ?? 0) > to.sum("onebase_engine_steps_total");
      if (begunAgain) readings = [];
      for (const tile of tiles) tile.take({ from: readings.at(-1), past: readings[0], to });
      readings = [...readings, to].slice(-WINDOW);
      say(at("live-fault"), "");
    } catch (fault) {
      say(at("live-fault"), `No figures: ${words(fault)}`);
    }
  });
}

class Tile {
  constructor(tile) {
    Object.assign(this, tile);
    this._points = [];
    this._value = make("dd", { class: "value" }, "–");
    this._note = make("dd", { class: "hint" });
    const size = { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", class: "spark", "aria-hidden": "true" };
    this._area = draw("path", { class: "area" });
    this._line = draw("path", { class: "stroke" });
    const words = make("dl", {}, make("dt", {}, this.label), this._value, this._note);
    this.element = make("div", { class: "card tile" }, words, draw("svg", size, this._area, this._line));
    this.element.hidden = true;
  }

  take(readings) {
    this.element.hidden = readings.to.sum(this.needs) === null;
    const value = this.value(readings);
    this._points = [...this._points, value].slice(-POINTS);
    say(this._value, value === null ? "–" : this.show(value));
    say(this._note, this.note?.(readings) ?? "");
    const runs = runsOf(this._points, this.most?.(readings) ?? 0);
    this._line.setAttribute("d", runs.map((run) => `M${run.join("L")}`).join(""));
    this._area.setAttribute("d", runs.map(filled).join(""));
  }
}

/** The points as `x y`, newest at the right, in runs without a gap. */
function runsOf(points, most) {
  const top = Math.max(most, ...points.map((one) => one ?? 0)) || 1;
  const step = WIDTH / (Math.max(points.length, FEWEST) - 1);
  const runs = [[]];
  points.forEach((value, index) => {
    if (value === null) runs.push([]);
    else {
      const x = WIDTH - (points.length - 1 - index) * step;
      runs.at(-1).push(`${x.toFixed(1)} ${(HEIGHT - 1 - (value / top) * (HEIGHT - 2)).toFixed(1)}`);
    }
  });
  return runs.filter((run) => run.length).map((run) => (run.length > 1 ? run : [...run, ...run])); // one alone is a dot
}

function filled(run) {
  const [first, last] = [run[0].split(" ")[0], run.at(-1).split(" ")[0]];
  return `M${first} ${HEIGHT}L${run.join("L")}L${last} ${HEIGHT}Z`;
}
