/**
 * An EventSource that always comes back, and goes on exactly where it stopped.
 *
 * It reads the stream by itself, with fetch(). A native EventSource shows a page only the types
 * that it listens to, so the page misses the ids of all others, and would resume too early; and
 * it neither tells HTTP errors apart nor notices a connection that has gone silent.
 */

const STATES = { CONNECTING: 0, OPEN: 1, CLOSED: 2 };
const LONGEST_TIMER = 2 ** 31 - 1; // browsers fire later ones at once
// A stream-error of these conditions would be the answer to each further request, too.
const FINAL_CONDITIONS = ["forbidden", "bad-request"];

export class EventSourceNotAvailableError extends Error {
  constructor() {
    super("ReconnectingEventSource needs fetch(), which this environment lacks. Load a polyfill.");
  }
}

export class ReconnectingEventSource extends EventTarget {
  #url;
  #withCredentials;
  #headers;
  #maxRetryTime;
  #maxSilenceTime;
  #lastEventId; // undefined until there is one: then the URL may name its own
  #readyState = STATES.CONNECTING;
  #firstRetryTime = 1000;
  #failures = 0;
  #attempt = null; // the AbortController of the connection that counts, if there is one
  #timer; // of the next attempt, or for the silence of this one
  #heardAt; // by the wall clock: others stand still while the computer sleeps
  #lifetime = new AbortController();

  constructor(url, options) {
    super();
    if (typeof fetch !== "function") throw new EventSourceNotAvailableError();
    this.#url = new URL(url, globalThis.document?.baseURI ?? globalThis.location?.href).href;
    this.#withCredentials = Boolean(options?.withCredentials);
    this.#headers = new Headers(options?.headers);
    this.#headers.set("Accept", "text/event-stream");
    this.#maxRetryTime = options?.max_retry_time || 10_000;
    this.#maxSilenceTime = Math.min(options?.max_silence_time || 45_000, LONGEST_TIMER);
    this.#lastEventId = options?.lastEventId || undefined;
    for (const type of ["open", "message", "error"]) {
      this.addEventListener(type, (event) => this[`on${type}`]?.(event));
    }
    const { signal } = this.#lifetime;
    const on = (target, type, listener) => target?.addEventListener(type, listener, { signal });
    on(globalThis, "online", () => this.#reconnect());
    on(globalThis, "pagehide", () => this.#disconnect()); // a page with a connection is not kept
    on(globalThis, "pageshow", (event) => event.persisted && this.#reconnect());
    on(globalThis.document, "visibilitychange", () => {
      if (document.visibilityState === "visible" && !this.#isAlive) this.#reconnect();
    });
    this.#connect();
  }

  get url() {
    return this.#url;
  }

  get withCredentials() {
    return this.#withCredentials;
  }

  get readyState() {
    return this.#readyState;
  }

  close() {
    this.#readyState = STATES.CLOSED;
    this.#lifetime.abort();
    this.#disconnect();
  }

  get #isAlive() {
    return this.#attempt !== null && Date.now() - this.#heardAt <= this.#maxSilenceTime;
  }

  get #address() {
    if (this.#lastEventId === undefined) return this.#url;
    const url = new URL(this.#url);
    const pairs = url.search.slice(1).split("&");
    const others = pairs.filter((pair) => pair && !/^lastEventId(=|$)/.test(pair));
    url.search = [...others, `lastEventId=${encodeURIComponent(this.#lastEventId)}`].join("&");
    return url.href;
  }

  async #connect() {
    this.#disconnect();
    const attempt = (this.#attempt = new AbortController());
    this.#watch();
    try {
      const response = await fetch(this.#address, {
        headers: this.#headers,
        credentials: this.#withCredentials ? "include" : "same-origin",
        cache: "no-store",
        signal: attempt.signal,
      });
      if (attempt === this.#attempt) await this.#read(response, attempt);
    } catch {
      // No connection, or not any more. Which of them it was, browsers do not tell.
    }
    if (attempt === this.#attempt) this.#retry();
  }

  /** Dispatch the events of a response until it ends, or does not count any more. */
  async #read(response, attempt) {
    const refused = response.status === 400 && this.#lastEventId === "error";
    if (refused || response.status === 204) return this.#fail();
    const contentType = response.headers.get("Content-Type") ?? "";
    if (response.status !== 200 || !/^text\/event-stream\s*(;|$)/i.test(contentType)) return;
    const { origin } = new URL(response.url);
    const parser = new Parser(this.#lastEventId);
    const reader = response.body.getReader();
    this.#watch();
    this.#readyState = STATES.OPEN;
    this.dispatchEvent(new Event("open"));
    for (;;) {
      const { done, value } = await reader.read();
      if (done || attempt !== this.#attempt) return;
      this.#watch();
      for (const { type, data, id } of parser.parse(value)) {
        if (type !== "stream-error") this.#lastEventId = id; // its id is no place to resume from
        if (data === null) continue;
        // A server that only just opens streams may still be failing.
        if (!["stream-open", "stream-error"].includes(type)) this.#failures = 0;
        this.dispatchEvent(new MessageEvent(type, { data, lastEventId: id ?? "", origin }));
        if (attempt !== this.#attempt) return; // a listener has closed it
        if (type === "stream-error") return isFinal(data) ? this.#fail() : undefined;
      }
      this.#firstRetryTime = parser.retryTime ?? this.#firstRetryTime;
    }
  }

  /** Give the connection up unless something is heard of it in time. */
  #watch() {
    const attempt = this.#attempt;
    this.#heardAt = Date.now();
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => attempt.abort(), this.#maxSilenceTime);
  }

  /** Full jitter: anywhere between now and the limit, so that clients do not come back as one. */
  #retry() {
    const limit = Math.min(this.#firstRetryTime * 2 ** this.#failures++, this.#maxRetryTime);
    this.#reconnect(Math.random() * limit);
  }

  #reconnect(delay = 0) {
    const lost = this.#attempt !== null;
    this.#disconnect();
    this.#readyState = STATES.CONNECTING;
    if (lost) this.dispatchEvent(new Event("error"));
    if (this.#readyState !== STATES.CLOSED) this.#timer = setTimeout(() => this.#connect(), delay);
  }

  #disconnect() {
    clearTimeout(this.#timer);
    this.#attempt?.abort();
    this.#attempt = null;
  }

  #fail() {
    this.close();
    this.dispatchEvent(new Event("error"));
  }
}

Object.assign(ReconnectingEventSource, STATES);
Object.assign(ReconnectingEventSource.prototype, STATES, {
  onopen: null,
  onmessage: null,
  onerror: null,
});

/** One event stream: https://html.spec.whatwg.org/multipage/server-sent-events.html, 9.2.6. */
class Parser {
  retryTime; // in milliseconds, undefined until the server names one
  #id;
  #type = "";
  #data = [];
  #line = ""; // which is not complete yet
  #afterCR = false;
  #decoder = new TextDecoder(); // drops a BOM

  /** The id goes on from connection to connection, as in browsers, until the server sets it. */
  constructor(id) {
    this.#id = id;
  }

  /** What ends in these bytes. Data of null is no event, but its id counts. */
  *parse(bytes) {
    const text = this.#decoder.decode(bytes, { stream: true });
    const lines = (this.#afterCR ? text.replace(/^\n/, "") : text).split(/\r\n|\r|\n/);
    this.#afterCR = text.endsWith("\r");
    lines[0] = this.#line + lines[0];
    this.#line = lines.pop();
    for (const line of lines) {
      if (line !== "") {
        this.#take(line);
        continue;
      }
      const data = this.#data.length > 0 ? this.#data.join("\n") : null;
      yield { type: this.#type || "message", data, id: this.#id };
      this.#type = "";
      this.#data = [];
    }
  }

  #take(line) {
    const [, field, value] = /^([^:]*)(?:: ?)?(.*)$/s.exec(line);
    if (field === "event") this.#type = value;
    if (field === "data") this.#data.push(value);
    if (field === "id" && !value.includes("\0")) this.#id = value;
    if (field === "retry" && /^[0-9]+$/.test(value)) this.retryTime = Math.max(1, Number(value));
  }
}

function isFinal(data) {
  try {
    return FINAL_CONDITIONS.includes(JSON.parse(data)?.condition);
  } catch {
    return false;
  }
}

export default ReconnectingEventSource;
