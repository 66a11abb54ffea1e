import { ReconnectingEventSource } from "./static/pg_eventstream/reconnecting-eventsource.mjs";

const SHOWN = 100; // rows kept in each list
const LOOK_EVERY = 100; // ms between two looks at the database
const GIVE_UP_AFTER = 10_000; // ms within which a committed event should be published
const QUIET_FOR = 2_000; // ms after which a rolled-back event is assumed never to arrive

const channel = document.querySelector("main").dataset.channel;
const find = (id) => document.getElementById(id);
const columns = Array.from(document.querySelectorAll("th"), (head) => head.dataset.cell);
const later = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const attempts = new Map(); // token -> the row of that transaction

function element(name, className, text) {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text;
  return made;
}

function prepend(listId, hintId, row) {
  const list = find(listId);
  list.prepend(row);
  while (list.children.length > SHOWN) list.lastElementChild.remove();
  find(hintId).hidden = true;
}

// Events that arrive

const source = new ReconnectingEventSource(`events/?channel=${encodeURIComponent(channel)}`);

function showState(className, text) {
  find("state").className = `state ${className}`;
  find("state").textContent = text;
}

// The id can name more channels or end in a space. The first channel is the event's own.
const ownId = (event) => event.lastEventId.trim().split(",")[0];

function showEvent(event, text) {
  const row = document.createElement("li");
  row.append(
    element("span", "id", ownId(event)),
    element("span", "data", text),
    element("time", "", new Date().toLocaleTimeString()),
  );
  prepend("events", "no-events", row);
}

source.addEventListener("stream-open", () => showState("open", "connected"));
source.addEventListener("error", () => {
  if (source.readyState !== source.CLOSED) showState("lost", "connection lost, reconnecting");
});
source.addEventListener("stream-error", (event) => {
  showState("lost", JSON.parse(event.data).text);
});
source.addEventListener("message", (event) => showEvent(event, event.data));
source.addEventListener("counted", (event) => {
  const now = performance.now();
  const { text, value, token } = JSON.parse(event.data);
  showEvent(event, `${text} (counter: ${value})`);
  find("told").textContent = value;
  const attempt = attempts.get(token);
  if (attempt) {
    attempt.received = true;
    attempt.mark("received", "good", `${Math.round(now - attempt.clicked)} ms after the click`);
  }
});

// Events that are sent

function newAttempt(text, rollsBack) {
  const row = document.createElement("tr");
  const cells = {};
  for (const name of columns) {
    cells[name] = element("td", "waiting", "…");
    row.append(cells[name]);
  }
  cells.text.className = "";
  cells.text.textContent = text;
  cells.text.append(element("small", "", rollsBack ? "rolled back" : "committed"));
  prepend("attempts", "no-attempts", row);
  return {
    clicked: performance.now(),
    received: false,
    mark(name, className, content) {
      if (!cells[name]) return; // "published", without a proxy
      cells[name].className = className;
      cells[name].textContent = content;
    },
  };
}

function showSeen(attempt, seen) {
  attempt.mark("row", seen.row ? "good" : "bad", seen.row ? "exists" : "none");
  if (seen.id) attempt.mark("id", "good", seen.id);
  if (seen.published) attempt.mark("published", "good", "yes");
}

async function follow(attempt, eventId, rollsBack) {
  const deadline = performance.now() + (rollsBack ? QUIET_FOR : GIVE_UP_AFTER);
  let seen;
  do {
    await later(LOOK_EVERY);
    seen = await (await fetch(`seen/${eventId}/`)).json();
    showSeen(attempt, seen);
  } while (performance.now() < deadline && !(seen.published && attempt.received));
  const never = rollsBack ? `never (waited ${QUIET_FOR / 1000} s)` : "not yet";
  if (!seen.id) attempt.mark("id", "bad", "none");
  if (!seen.published) attempt.mark("published", "bad", rollsBack ? "never" : "not yet");
  if (!attempt.received) attempt.mark("received", "bad", never);
}

find("send").addEventListener("submit", async (event) => {
  event.preventDefault();
  const body = new FormData(event.target, event.submitter);
  const rollsBack = body.get("how") === "rollback";
  const token = crypto.getRandomValues(new Uint32Array(4)).join("-");
  body.set("token", token);
  const attempt = newAttempt(body.get("text"), rollsBack);
  attempts.set(token, attempt);
  try {
    const response = await fetch("send/", { method: "POST", body });
    if (!response.ok) throw new Error(`the server answered ${response.status}`);
    const { event_id: eventId, before, inside, after } = await response.json();
    const steps = rollsBack ? [before, inside, after] : [before, inside];
    attempt.mark("counter", rollsBack ? "bad" : "good", steps.join(" → "));
    find("stored").textContent = after;
    await follow(attempt, eventId, rollsBack);
  } catch (error) {
    attempt.mark("counter", "bad", String(error));
  }
});
