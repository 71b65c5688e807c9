// One prompt to one adapter, or to two beside each other, streamed.

import { call, chunks, json, words } from "./calls.js";
import { at, count, dollars, duration, make, say, short } from "./dom.js";

/** Connects the form. `onAnswer` is called when something has come that other parts may show: a first token, an end. */
export function begin(onAnswer) {
  const form = at("ask");
  let running = null;

  function free() {
    running = null;
    if (document.activeElement === at("stop")) at("generate").focus();
    at("stop").disabled = true;
  }

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    running?.abort();
    const mine = (running = new AbortController());
    at("stop").disabled = false;
    say(at("asked"), "Generating.");
    const panels = adaptersOf(form).map((name) => new Answer(name));
    at("answers").replaceChildren(...panels.map((panel) => panel.element));
    const body = bodyOf(form);
    await Promise.all(panels.map((panel) => panel.fill(body, mine.signal, onAnswer)));
    if (running !== mine) return; // asked again meanwhile
    say(at("asked"), mine.signal.aborted ? "Stopped." : panels.some((one) => one.failed) ? "It did not work." : "Done.");
    free();
  });
  form.addEventListener("reset", () => running?.abort());
  at("stop").addEventListener("click", () => running?.abort());
  form.elements.compare.addEventListener("change", () => (at("other").hidden = !form.elements.compare.checked));
  form.elements.prompt.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    form.requestSubmit();
  });
}

/** Puts an adapter into the form, beside the other one if two are compared and there is one already. */
export function choose(name) {
  const { adapter, other, compare, prompt } = at("ask").elements;
  (compare.checked && adapter.value && !other.value ? other : adapter).value = name;
  prompt.focus();
}

/** Ends what runs and takes the answers away. */
export function clear() {
  at("ask").dispatchEvent(new Event("reset"));
  at("answers").replaceChildren();
  say(at("asked"), "");
}

function adaptersOf({ elements }) {
  const fields = elements.compare.checked ? [elements.adapter, elements.other] : [elements.adapter];
  return fields.map((field) => field.value.trim() || null);
}

function bodyOf({ elements }) {
  const prompt = elements.prompt.value;
  const body = {
    max_tokens: Number(elements.max_tokens.value),
    temperature: Number(elements.temperature.value),
    stream: true,
    ...(elements.chat.checked ? { messages: [{ role: "user", content: prompt }] } : { prompt }),
  };
  return elements.seed.value ? { ...body, seed: Number(elements.seed.value) } : body;
}

class Answer {
  constructor(name) {
    this._name = name;
    this.element = at("answer").content.firstElementChild.cloneNode(true);
    this._fault = this.element.querySelector(".fault");
    this._text = this.element.querySelector(".text");
    this._facts = this.element.querySelector("dl");
    this._known = new Map();
    this._written = this._text.appendChild(document.createTextNode(""));
    this.failed = false;
    this._tokens = this._firstTokens = this._first = this._last = 0;
    say(this.element.querySelector("h3"), name ?? "the base");
    this._text.setAttribute("aria-label", `Answer of ${name ?? "the base"}`);
  }

  /** Streams the answer; a fault is shown, not thrown. */
  async fill(body, signal, onAnswer) {
    const began = performance.now();
    this._text.setAttribute("aria-busy", "true"); // it is read out as a whole, not token by token
    try {
      const response = await call("v1/generate", { ...json("POST", { ...body, adapter: this._name }), signal });
      for await (const chunk of chunks(response)) this._take(chunk, began, onAnswer);
    } catch (fault) {
      if (fault.name === "AbortError") this._fact("ended", "stopped here");
      else this._fail(fault);
    }
    this._text.setAttribute("aria-busy", "false");
    onAnswer();
  }

  _fail(fault) {
    this.failed = true;
    say(this._fault, words(fault));
  }

  _take({ adapter, choices, usage }, began, onAnswer) {
    const now = performance.now();
    const [choice] = choices;
    const more = choice.token_ids.length;
    this._written.appendData(choice.text);
    this._tokens += more;
    if (more && !this._first) {
      this._first = now;
      this._firstTokens = more;
      this._used(adapter);
      this._fact("first token", duration((now - began) / 1000));
      onAnswer();
    }
    if (more) this._last = now;
    this._speed();
    if (choice.finish_reason) this._fact("ended", choice.finish_reason);
    if (usage) this._bill(usage);
  }

  /** Which weights give the answer, and what it took to have them. */
  _used({ version, digest, lane, cold, load_ms: milliseconds }) {
    this._fact("lane", lane);
    if (lane !== "base") this._fact("cold", cold ? `yes, loaded in ${duration(milliseconds / 1000)}` : "no");
    if (version !== null) this._fact("version", String(version));
    this._fact("digest", short(digest), digest);
  }

  _speed() {
    this._fact("tokens", count(this._tokens));
    const seconds = (this._last - this._first) / 1000;
    if (seconds > 0) this._fact("speed", `${((this._tokens - this._firstTokens) / seconds).toFixed(1)} tok/s`);
  }

  _bill({ prompt_tokens: prompt, cached_tokens: cached, completion_tokens: made, cost_microusd: cost }) {
    this._fact("tokens", `${count(prompt)} in${cached ? ` (${count(cached)} cached)` : ""}, ${count(made)} out`);
    this._fact("cost", dollars(cost));
  }

  _fact(label, value, title) {
    if (!this._known.has(label)) {
      const told = make("dd", title ? { title } : {});
      this._known.set(label, told);
      this._facts.append(make("div", {}, make("dt", {}, label), told));
    }
    say(this._known.get(label), value);
  }
}
