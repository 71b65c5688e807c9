// Prometheus text 0.0.4, and what two readings of it say about the time between them.

const SAMPLE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+-?\d+)?$/;
const LABEL = /(\w+)="((?:\\.|[^"\\])*)"/g;

/** One reading: samples by name, each with its labels. */
export class Reading {
  constructor(text, seconds) {
    this.seconds = seconds;
    this._samples = new Map();
    for (const line of text.split("\n")) this._add(line);
  }

  _add(line) {
    const [, name, labels = "", value] = line.match(SAMPLE) ?? [];
    if (!name) return;
    const sample = { labels: Object.fromEntries([...labels.matchAll(LABEL)].map((one) => [one[1], one[2]])), value: numberOf(value) };
    if (this._samples.has(name)) this._samples.get(name).push(sample);
    else this._samples.set(name, [sample]);
  }

  /** The sum over all labels; null where the server does not tell. */
  sum(name) {
    const found = this._samples.get(name);
    return found ? found.reduce((total, one) => total + one.value, 0) : null;
  }

  /** A histogram's cumulative counts by upper bound, ascending, summed over all other labels; null where there is none. */
  buckets(name) {
    const counts = new Map();
    for (const { labels, value } of this._samples.get(`${name}_bucket`) ?? []) {
      const bound = numberOf(labels.le);
      counts.set(bound, (counts.get(bound) ?? 0) + value);
    }
    return counts.size ? [...counts].sort((a, b) => a[0] - b[0]) : null;
  }
}

/** A counter's growth in a second; null without both readings, or where the server has begun again. */
export function rate(name, from, to) {
  const [before, after] = [from?.sum(name) ?? null, to.sum(name)];
  const seconds = to.seconds - (from?.seconds ?? to.seconds);
  return before === null || after === null || after < before || seconds <= 0 ? null : (after - before) / seconds;
}

/** The value that a share `q` of what was observed between two readings does not exceed; null if nothing was. */
export function quantile(name, q, from, to) {
  const before = new Map(from?.buckets(name) ?? []);
  const grown = (to.buckets(name) ?? []).map(([bound, total]) => [bound, total - (before.get(bound) ?? 0)]);
  const all = grown.at(-1)?.[1] ?? 0;
  if (all <= 0) return null;
  const at = grown.findIndex(([, total]) => total >= q * all);
  const [low, below] = at > 0 ? grown[at - 1] : [0, 0];
  const [high, total] = grown[at];
  if (high === Infinity) return low; // beyond the last bound nothing more is known
  return low + ((high - low) * (q * all - below)) / (total - below);
}

function numberOf(text) {
  return text === "+Inf" ? Infinity : Number(text);
}
