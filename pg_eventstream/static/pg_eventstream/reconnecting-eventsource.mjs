/**
 * An EventSource that always reconnects and resumes exactly where it stopped.
 *
 * It reads the stream with fetch() instead of the native EventSource. That one shows a page only
 * the event types that it listens to, so the page misses the ids of all others and would resume too
 * early. It also does not distinguish HTTP errors or notice a connection that has become silent.
 */

const STATES = { CONNECTING: 0, OPEN: 1, CLOSED: 2 };
const FIRST_RETRY_TIME = 1000; // until the server sends another one
const LONGEST_TIMER = 2 ** 31 - 1; // browsers fire longer timers immediately
// Every further request would get a stream-error with the same condition.
const FINAL_CONDITIONS = ["forbidden", "bad-request"];
const FINAL_STATUSES = [204, 401, 410];
// These are temporary. Other statuses from 400 to 499 can be temporary as well, while something in
// front of the server is being changed, so a client gives up only after several of them in a row.
const PASSING_STATUSES = [408, 425, 429];
const MOST_REFUSALS = 10; // in a row: about half a minute with the default delays
const LONGEST_URL = 2000; // with an id; servers accept a line of 4,000 bytes, and a longer header
const NEEDED = ["fetch", "EventTarget", "Event", "MessageEvent", "AbortController", "Headers"];

export class EventSourceNotAvailableError extends Error {
  constructor(missing = ["fetch"]) {
    super(
      `ReconnectingEventSource needs ${missing.join(", ")}, which this environment does not have. ` +
        "Load a polyfill. (Node.js 18 and later have everything.)",
    );
  }
}

// Without an EventTarget, the constructor throws.
export class ReconnectingEventSource extends (globalThis.EventTarget ?? Object) {
  #url;
  #withCredentials;
  #headers;
  #maxRetryTime;
  #maxSilenceTime;
  #lastEventId; // while undefined, the URL can contain one
  #readyState = STATES.CONNECTING;
  #retryTime; // the last retry: of the server, undefined until there is one
  #notBefore = 0; // the end of the server's Retry-After, by the wall clock
  #failures = 0;
  #refusals = 0; // consecutive responses that would be final if the server itself sent them
  #attempt = null; // the AbortController of the current connection, if there is one
  #timer; // for the next attempt, or for the silence of the current one
  #heardAt; // by the wall clock: other clocks stop while the computer sleeps
  #lifetime; // an AbortController

  constructor(url, options) {
    super();
    const missing = NEEDED.filter((name) => typeof globalThis[name] !== "function");
    if (missing.length > 0) throw new EventSourceNotAvailableError(missing);
    this.#lifetime = new AbortController();
    this.#url = absolute(url);
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
    // Environments without a window do not have these events.
    const on = (target, type, listener) => target?.addEventListener?.(type, listener, { signal });
    on(globalThis, "online", () => this.#reconnect());
    on(globalThis, "pagehide", () => this.#disconnect()); // browsers do not cache a page with a connection
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

  /** The URL and the headers of a request that resumes from the last id. */
  get #request() {
    const id = this.#lastEventId;
    const headers = new Headers(this.#headers);
    if (id === undefined) return [this.#url, headers];
    const url = new URL(this.#url);
    const pairs = url.search.slice(1).split("&");
    const others = pairs.filter((pair) => pair && !/^lastEventId(=|$)/.test(pair));
    url.search = [...others, `lastEventId=${encodeURIComponent(id)}`].join("&");
    if (url.href.length <= LONGEST_URL) return [url.href, headers];
    // A header costs a preflight request to another origin, so it is only used for long ids.
    url.search = others.join("&");
    headers.set("Last-Event-ID", id);
    return [url.href, headers];
  }

  async #connect() {
    this.#disconnect();
    const attempt = (this.#attempt = new AbortController());
    this.#watch();
    let wait = 0;
    try {
      const [url, headers] = this.#request;
      const response = await fetch(url, {
        headers,
        credentials: this.#withCredentials ? "include" : "same-origin",
        cache: "no-store",
        signal: attempt.signal,
      });
      if (attempt === this.#attempt) {
        wait = retryAfter(response);
        await this.#read(response, attempt);
      }
    } catch {
      // The connection failed or was lost. Browsers do not tell which.
    }
    if (attempt === this.#attempt) this.#retry(wait);
  }

  /** Dispatch the events of a response until it ends or another attempt replaces it. */
  async #read(response, attempt) {
    const { status, body } = response;
    const contentType = response.headers.get("Content-Type") ?? "";
    const isStream = /^text\/event-stream\s*(;|$)/i.test(contentType) && body !== null;
    const refused = status >= 400 && status < 500 && !PASSING_STATUSES.includes(status);
    // A page instead of a stream is usually a login page.
    this.#refusals = refused || (status === 200 && !isStream) ? this.#refusals + 1 : 0;
    const isLast =
      FINAL_STATUSES.includes(status) ||
      (status === 400 && this.#lastEventId === "error") ||
      this.#refusals >= MOST_REFUSALS;
    if (!isStream) return isLast ? this.#fail() : undefined;
    const { origin } = new URL(response.url || this.#url);
    const parser = new Parser(this.#lastEventId);
    const reader = body.getReader();
    this.#watch();
    if (status === 200) {
      this.#readyState = STATES.OPEN;
      this.dispatchEvent(new Event("open"));
    }
    for (;;) {
      const { done, value } = await reader.read();
      if (attempt !== this.#attempt) return;
      if (done) return isLast ? this.#fail() : undefined;
      this.#watch();
      for (const { type, data, id } of parser.parse(value)) {
        this.#retryTime = parser.retryTime ?? this.#retryTime;
        // The server sends its own stream-error with this id, from which nothing can resume.
        const isError = type === "stream-error" && id === "error";
        if (!isError) this.#lastEventId = id;
        if (data === null) continue;
        // A server that opens streams but sends nothing else could still be failing.
        if (!isError && type !== "stream-open") this.#failures = 0;
        this.dispatchEvent(new MessageEvent(type, { data, lastEventId: id ?? "", origin }));
        if (attempt !== this.#attempt) return; // a listener closed it
        if (isError) return isLast || refused || isFinal(data) ? this.#fail() : undefined;
      }
      this.#retryTime = parser.retryTime ?? this.#retryTime; // retry: counts without an event
    }
  }

  /** Abort the connection if nothing arrives in time. */
  #watch() {
    const attempt = this.#attempt;
    this.#heardAt = Date.now();
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => attempt.abort(), this.#maxSilenceTime);
  }

  /**
   * Wait as long as the server asks for, by retry: or Retry-After, plus a random time up to a limit
   * that doubles with each failure, so that clients do not reconnect all at once.
   */
  #retry(retryAfter) {
    this.#notBefore = Date.now() + retryAfter;
    const first = this.#retryTime ?? FIRST_RETRY_TIME;
    const limit = Math.min(first * 2 ** this.#failures++, this.#maxRetryTime);
    this.#reconnect(Math.max(this.#retryTime ?? 0, retryAfter) + Math.random() * limit);
  }

  #reconnect(delay = 0) {
    const lost = this.#attempt !== null;
    this.#disconnect();
    this.#readyState = STATES.CONNECTING;
    if (lost) this.dispatchEvent(new Event("error"));
    if (this.#readyState === STATES.CLOSED) return;
    const wait = Math.min(Math.max(delay, this.#notBefore - Date.now()), LONGEST_TIMER);
    this.#timer = setTimeout(() => this.#connect(), wait);
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
  #line = ""; // the incomplete last line
  #afterCR = false;
  #decoder = new TextDecoder(); // drops a BOM

  /** The id is kept across connections, as in browsers, until the server sets another one. */
  constructor(id) {
    this.#id = id;
  }

  /** Yield the events that these bytes complete. With null data it is only an id, not an event. */
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

function absolute(url) {
  const base = globalThis.document?.baseURI ?? globalThis.location?.href;
  try {
    return new URL(url, base).href;
  } catch (error) {
    throw new TypeError(
      base === undefined
        ? `${url} is not an absolute URL, and there is no page that it could be relative to.`
        : `${url} is not a valid URL (relative to ${base}).`,
      { cause: error },
    );
  }
}

/** The Retry-After of a response, in seconds or a date, as milliseconds; 0 if it has none. */
function retryAfter(response) {
  const value = response.headers.get("Retry-After") ?? "";
  const wait = /^[0-9]+$/.test(value) ? Number(value) * 1000 : Date.parse(value) - Date.now();
  return response.status >= 400 && wait > 0 ? wait : 0;
}

function isFinal(data) {
  try {
    return FINAL_CONDITIONS.includes(JSON.parse(data)?.condition);
  } catch {
    return false;
  }
}

export default ReconnectingEventSource;
