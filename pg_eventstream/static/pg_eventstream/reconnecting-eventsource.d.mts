export interface ReconnectingEventSourceInit extends EventSourceInit {
  /**
   * The limit of the random delay before another attempt, in milliseconds. Default: 10,000. It is
   * added to the delay that the server asks for by `retry:` or `Retry-After`.
   */
  max_retry_time?: number;
  /**
   * A connection on which nothing arrives for this many milliseconds is replaced. Default: 45,000;
   * the server sends a keep-alive event every 20 seconds. `Infinity` for servers that send none.
   */
  max_silence_time?: number;
  /** Where to start: an id that was received before, or `earliest`. Default: now. */
  lastEventId?: string;
  /** Sent with each request, for instance `{ Authorization: "Bearer …" }`. */
  headers?: HeadersInit;
  /** Ignored: the stream is read with `fetch()`. */
  eventSourceClass?: unknown;
}

/** Thrown by the constructor if the environment lacks `fetch()` or another API that it needs. */
export declare class EventSourceNotAvailableError extends Error {
  constructor(missing?: string[]);
}

type Handler<E extends Event> = ((this: EventSource, event: E) => any) | null;

/**
 * An `EventSource` that always reconnects and resumes exactly where it stopped. It ends only:
 * - by `close()`;
 * - by a `stream-error` of the server, which has the id `error`, if its condition is `forbidden` or
 *   `bad-request`, or if it comes with a status from 400 to 499 other than 408, 425 and 429;
 * - by the statuses 204, 401 and 410, and by 400 in response to the id of a `stream-error`;
 * - after ten refusals in a row: other statuses from 400 to 499, or a page instead of a stream.
 */
export declare class ReconnectingEventSource extends EventTarget implements EventSource {
  static readonly CONNECTING: 0;
  static readonly OPEN: 1;
  static readonly CLOSED: 2;
  readonly CONNECTING: 0;
  readonly OPEN: 1;
  readonly CLOSED: 2;
  /** Throws a `TypeError` for an invalid URL, and for a relative one if there is no page. */
  constructor(url: string | URL, options?: ReconnectingEventSourceInit);
  readonly url: string;
  readonly readyState: 0 | 1 | 2;
  readonly withCredentials: boolean;
  onopen: Handler<Event>;
  onmessage: Handler<MessageEvent>;
  /** `readyState` tells whether it reconnects (`CONNECTING`) or has given up (`CLOSED`). */
  onerror: Handler<Event>;
  close(): void;
  addEventListener<K extends keyof EventSourceEventMap>(
    type: K,
    listener: (this: EventSource, event: EventSourceEventMap[K]) => any,
    options?: boolean | AddEventListenerOptions,
  ): void;
  addEventListener(
    type: string,
    listener: (this: EventSource, event: MessageEvent) => any,
    options?: boolean | AddEventListenerOptions,
  ): void;
  addEventListener(
    type: string,
    listener: EventListenerOrEventListenerObject | null,
    options?: boolean | AddEventListenerOptions,
  ): void;
  removeEventListener<K extends keyof EventSourceEventMap>(
    type: K,
    listener: (this: EventSource, event: EventSourceEventMap[K]) => any,
    options?: boolean | EventListenerOptions,
  ): void;
  removeEventListener(
    type: string,
    listener: (this: EventSource, event: MessageEvent) => any,
    options?: boolean | EventListenerOptions,
  ): void;
  removeEventListener(
    type: string,
    listener: EventListenerOrEventListenerObject | null,
    options?: boolean | EventListenerOptions,
  ): void;
}

export default ReconnectingEventSource;
