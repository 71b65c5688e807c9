// Puts the parts together: the server's state, the key, and what each part tells the others.

import * as adapters from "./adapters.js";
import * as bill from "./bill.js";
import { ask, session, words } from "./calls.js";
import { at, say } from "./dom.js";
import * as live from "./live.js";
import * as playground from "./playground.js";
import { every } from "./poll.js";

const PERIOD = 5000; // milliseconds

function showKey() {
  const key = session.key;
  at("key-used").hidden = !key;
  say(at("key-name"), key ? `${key.slice(0, 8)}…` : "");
}

/** A 401: the server has keys (AUTH=on), and none of this tab's is good. */
function lock() {
  say(at("key-fault"), session.key ? "The server does not take this key: it is wrong, revoked or expired." : "");
  session.key = "";
  session.locked = true;
  forget();
}

function forget() {
  for (const part of [playground, adapters, bill]) part.clear();
  showKey();
  at("key-form").hidden = false;
}

function keys(refresh) {
  session.addEventListener("locked", lock);
  at("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const key = at("key-field").value.trim();
    if (!/^[\x21-\x7e]+$/.test(key)) return say(at("key-fault"), "A key is letters, digits and underscores, without spaces.");
    session.key = key;
    at("key-field").value = "";
    say(at("key-fault"), "");
    at("key-form").hidden = true;
    showKey();
    at("playground").focus({ preventScroll: true });
    refresh();
  });
  at("key-forget").addEventListener("click", () => {
    session.key = "";
    session.locked = true;
    forget();
    at("key-field").focus();
  });
  showKey();
}

async function state() {
  try {
    const { base } = await ask("readyz", { open: true });
    say(at("state-text"), `ready, ${base}`);
    at("state").dataset.is = "ready";
  } catch (fault) {
    say(at("state-text"), words(fault));
    at("state").dataset.is = "not-ready";
  }
}

const list = adapters.begin(playground.choose);
const owed = bill.begin();
const refresh = () => {
  list();
  owed();
};
playground.begin(refresh);
keys(refresh);
live.begin();
every(PERIOD, state);
