// Calls to the server this page came from, with the key if there is one.

const STORED = "onebase.key";

/** What a call was refused with; `status` 0: there was no answer. */
export class Fault extends Error {
  constructor(status, code, message) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** The key of this tab. Tells of a 401 by the event `locked`. */
class Session extends EventTarget {
  locked = false; // from a 401 until there is another key: asking again would not help

  get key() {
    return sessionStorage.getItem(STORED) ?? "";
  }

  set key(value) {
    if (value) sessionStorage.setItem(STORED, value);
    else sessionStorage.removeItem(STORED);
    this.locked = false;
  }
}

export const session = new Session();

/** The answer of a call that went well. Throws a Fault, or the AbortError of its signal. */
export async function call(path, { open = false, headers = {}, ...options } = {}) {
  const key = open ? "" : session.key;
  const sent = key ? { ...headers, Authorization: `Bearer ${key}` } : headers;
  let response;
  try {
    response = await fetch(path, { ...options, headers: sent, credentials: "omit", cache: "no-store", redirect: "error" });
  } catch (fault) {
    if (fault.name === "AbortError") throw fault;
    throw new Fault(0, "unreachable", "the server does not answer");
  }
  if (response.ok) return response;
  if (response.status === 401 && key === session.key) {
    session.locked = true;
    session.dispatchEvent(new Event("locked"));
  }
  throw await faultOf(response);
}

/** The JSON of a call. */
export const ask = async (path, options) => (await call(path, options)).json();

/** JSON in a body. */
export const json = (method, value) => ({
  method,
  headers: { "Content-Type": "application/json" },
  body: JSON.stringify(value),
});

/** What went wrong, in words for the user. */
export function words(fault) {
  if (!(fault instanceof Fault)) return `This page has a fault: ${fault.message}`;
  if (fault.status === 401) return "The server wants a key that is valid.";
  if (fault.status === 403) return `This key may not do that: ${fault.message}`;
  return fault.message;
}

async function faultOf(response) {
  try {
    return told(response.status, await response.json());
  } catch {
    return new Fault(response.status, "http_error", `the server answered ${response.status}`);
  }
}

function told(status, { error }) {
  return new Fault(status, error.code, error.message);
}

/** The chunks of a streamed answer. Throws the Fault of an `event: error`, and one for a stream that just stops. */
export async function* chunks(response) {
  for await (const { event, data } of events(response.body)) {
    if (event === "error") throw told(500, JSON.parse(data));
    if (data === "[DONE]") return;
    yield JSON.parse(data);
  }
  throw new Fault(0, "cut_short", "the stream ended early");
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (let read = await reader.read(); !read.done; read = await reader.read()) {
    const parts = (rest + read.value).split(/\r?\n\r?\n/);
    rest = parts.pop();
    yield* parts.map(eventOf);
  }
}

function eventOf(text) {
  const found = { event: "message", data: [] };
  for (const line of text.split(/\r?\n/)) {
    const [, field, value] = line.match(/^(event|data): ?(.*)$/s) ?? [];
    if (field === "data") found.data.push(value);
    else if (field) found.event = value;
  }
  return { event: found.event, data: found.data.join("\n") };
}
