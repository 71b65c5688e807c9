// The adapters: where each is, what it is used for, and what can be done with it.

import { ask, call, json, session, words } from "./calls.js";
import { at, cell, count, make, say, short } from "./dom.js";
import { every } from "./poll.js";

const PERIOD = 2000; // milliseconds
const PAGE = 20;
const SUGGESTED = 50;
const LONGEST = 64; // characters of a name

const rows = new Map();
let pages = [""]; // the `after` of this page and of those before it
let following = null;
let onChoose = () => {};
let refresh = () => {};
let settle = () => {}; // answers the open question

/** Connects table and upload; `chosen` is called with the name that is to be tried. Returns what reads the list at once. */
export function begin(chosen) {
  onChoose = chosen;
  at("back").addEventListener("click", () => turn(pages.slice(0, -1)));
  at("next").addEventListener("click", () => following && turn([...pages, following]));
  at("filter").addEventListener("input", () => turn([""]));
  at("upload").addEventListener("submit", upload);
  at("confirm").addEventListener("close", answered);
  for (const name of ["adapter", "other"]) {
    at("ask").elements[name].addEventListener("focus", suggest);
    at("ask").elements[name].addEventListener("input", suggest);
  }
  refresh = every(PERIOD, show);
  return refresh;
}

/** Forgets everything that a key has shown. */
export function clear() {
  pages = [""];
  rows.clear();
  at("adapters").replaceChildren();
  at("names").replaceChildren();
  at("pages").hidden = true;
  for (const said of ["adapters-said", "uploaded"]) say(at(said), "");
}

/** Adapters whose name begins with `prefix`, after the name `after`. */
async function page(prefix, after, limit) {
  const from = after || (prefix && justBefore(prefix));
  const { data, next } = await ask(`adapters?${new URLSearchParams({ limit, ...(from && { after: from }) })}`);
  const found = data.filter((one) => one.name.startsWith(prefix));
  return { data: found, next: found.length === data.length ? next : null };
}

/** A text between the prefix and every name that sorts before it: no name is longer, and all its letters sort below `~`. */
function justBefore(prefix) {
  const last = prefix.length - 1;
  return `${prefix.slice(0, last)}${String.fromCharCode(prefix.charCodeAt(last) - 1)}~`.slice(0, LONGEST);
}

function turn(to) {
  pages = to.length ? to : [""];
  refresh();
}

async function show() {
  if (session.locked) return;
  const [prefix, after, key] = [at("filter").value.trim().toLowerCase(), pages.at(-1), session.key];
  try {
    const found = await page(prefix, after, PAGE);
    if (key !== session.key) return; // another's list by now
    list(found.data);
    following = found.next;
    at("back").disabled = pages.length === 1;
    at("next").disabled = following === null;
    at("pages").hidden = pages.length === 1 && following === null;
    if (!found.data.length && pages.length > 1) turn(pages.slice(0, -1)); // the last of its page is gone
    if (at("adapters-said").dataset.of === "list") report("");
  } catch (fault) {
    if (fault.status !== 401) report(`No list: ${words(fault)}`, "list");
  }
}

function list(entries) {
  const before = [...rows.keys()].join("/");
  const names = new Set(entries.map((one) => one.name));
  for (const name of [...rows.keys()].filter((one) => !names.has(one))) rows.delete(name);
  for (const entry of entries) {
    if (!rows.has(entry.name)) rows.set(entry.name, new Row(entry.name));
    rows.get(entry.name).show(entry);
  }
  const sorted = entries.map((one) => one.name);
  if (sorted.join("/") !== before) {
    const focused = document.activeElement; // putting elements in again takes the focus away
    at("adapters").replaceChildren(...sorted.map((name) => rows.get(name).element));
    if (at("adapters").contains(focused)) focused.focus({ preventScroll: true });
  }
  at("none").hidden = entries.length > 0;
}

function report(text, of = "") {
  at("adapters-said").dataset.of = of;
  say(at("adapters-said"), text);
}

class Row {
  constructor(name) {
    this._name = name;
    this._tier = make("span", {});
    this._cells = Object.fromEntries(
      ["Tier", "Lane", "Version", "Digest", "In flight", "Requests"].map((label) => [label, cell(label, figure(label))]),
    );
    this._cells.Tier.append(this._tier);
    this._mark = make("span", { class: "hint" });
    this._lane = this._button("", () => this._change());
    this._delete = this._button("Delete", () => this._remove());
    const actions = cell("Actions", "actions", this._button("Try", () => onChoose(name)), this._lane, this._delete);
    const heading = make("th", { role: "rowheader", scope: "row" }, name, " ", this._mark);
    this.element = make("tr", { role: "row" }, heading, ...Object.values(this._cells), actions);
    this._busy = false;
  }

  show(entry) {
    this._merged = entry.lane === "merged";
    say(this._mark, entry.own ? (entry.public ? "published" : "") : "another's");
    say(this._tier, entry.residency);
    this._tier.className = `tier ${entry.residency}`;
    const told = [entry.lane, String(entry.version), short(entry.digest), count(entry.in_flight), count(entry.requests)];
    ["Lane", "Version", "Digest", "In flight", "Requests"].forEach((label, index) => say(this._cells[label], told[index]));
    this._cells.Digest.title = entry.digest;
    this._lane.hidden = this._delete.hidden = !entry.own;
    if (!this._busy) this._rename(this._merged ? "Unmerge" : "Merge");
  }

  _button(text, work) {
    const button = make("button", { type: "button", "aria-label": `${text} ${this._name}` }, text);
    button.addEventListener("click", work);
    return button;
  }

  _rename(text) {
    say(this._lane, text);
    this._lane.setAttribute("aria-label", `${text} ${this._name}`);
  }

  async _change() {
    if (this._busy) return;
    const [doing, done] = this._merged ? ["Unmerging", "runs in the shared lane"] : ["Merging", "has a lane of its own"];
    this._busy = true;
    this._rename(doing);
    try {
      this.show(await ask(path(this._name), json("PATCH", { lane: this._merged ? "shared" : "merged" })));
      report(`${this._name} ${done}.`);
    } catch (fault) {
      report(`${this._name}: ${words(fault)}`);
    }
    this._busy = false;
    refresh();
  }

  async _remove() {
    if (!(await confirmed(`Delete ${this._name}?`))) return;
    try {
      await call(path(this._name), { method: "DELETE" });
      report(`${this._name} is deleted.`);
      at("adapters-title").focus(); // its row goes
    } catch (fault) {
      report(`${this._name}: ${words(fault)}`);
    }
    refresh();
  }
}

const path = (name) => `adapters/${encodeURIComponent(name)}`;
const figure = (label) => (["Version", "In flight", "Requests"].includes(label) ? "figure" : "");

/** Whether the user says yes. Whoever asks again has the answer; the question before it ends with a no. */
function confirmed(question) {
  settle(false); // a dialog that has just been left has its `close` event still to come
  say(at("confirm-title"), question);
  at("confirm").returnValue = "no"; // Escape leaves it as it was
  at("confirm").showModal();
  return new Promise((resolve) => (settle = resolve));
}

function answered() {
  if (!at("confirm").open) settle(at("confirm").returnValue === "yes");
}

async function suggest(event) {
  if (session.locked) return;
  const prefix = event.target.value.trim().toLowerCase();
  try {
    const { data } = await page(prefix, "", SUGGESTED);
    at("names").replaceChildren(...data.map((one) => make("option", { value: one.name })));
  } catch {
    at("names").replaceChildren(); // the field works without
  }
}

async function upload(event) {
  event.preventDefault();
  const form = event.target;
  const { name, config, weights, replace } = form.elements;
  const body = new FormData();
  body.append("config", config.files[0]);
  body.append("weights", weights.files[0]);
  say(at("uploaded"), "Uploading.");
  try {
    const headers = replace.checked ? {} : { "If-None-Match": "*" };
    const response = await call(path(name.value), { method: "PUT", body, headers });
    const { version, digest } = await response.json();
    const how = response.status === 201 ? "is new" : "is in place";
    say(at("uploaded"), `${name.value} ${how}: version ${version}, ${short(digest)}.`);
    form.reset();
  } catch (fault) {
    const taken = fault.status === 412;
    say(at("uploaded"), taken ? "There is one of that name; tick “Replace” to put this in its place." : words(fault));
  }
  refresh();
}
