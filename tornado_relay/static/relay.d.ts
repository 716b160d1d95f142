/** What `new RelaySource()` takes beside the address. */
export interface RelaySourceInit {
  /** Send cookies to a relay of another origin; as EventSource's. */
  withCredentials?: boolean
  /**
   * Called when the relay does not, or no longer, accept the token (401). Returns a new one for the address' `token=`;
   * `undefined` where it has set a new cookie; `null` to give up, which closes the source. If it fails it is called again.
   */
  token?: () => Promise<string | null | undefined> | string | null | undefined
}

/** The data of the event `stream-reset`, as JSON: the page may have missed events of these channels. */
export interface StreamReset {
  reason: string
  channels: string[]
}

/**
 * An EventSource for sse-relay-server. All tabs of a browser that listen to the same relay share one connection, on
 * whatever channels they are; each source gets the events of its own.
 *
 * It comes back after any error but a refusal for good (400, 403, and 401 without `token`), goes on behind the last event
 * that it got, also after a reload of the page, and is closed by an event `STOP`. It reads the relay's events `stream-open`
 * and `stream-position` itself: no listener gets them.
 */
export class RelaySource extends EventTarget {
  static readonly CONNECTING: 0
  static readonly OPEN: 1
  static readonly CLOSED: 2

  /** @param url Any address of the relay's streams, such as `https://events.example.com/channel=orders`. */
  constructor(url: string | URL, init?: RelaySourceInit)

  readonly CONNECTING: 0
  readonly OPEN: 1
  readonly CLOSED: 2
  readonly url: string
  readonly withCredentials: boolean
  readonly readyState: 0 | 1 | 2

  onopen: ((event: Event) => void) | null
  onmessage: ((event: MessageEvent<string>) => void) | null
  /** `readyState` says whether it tries again (CONNECTING) or has given up (CLOSED). */
  onerror: ((event: Event) => void) | null

  close(): void

  addEventListener(type: "open" | "error", listener: (event: Event) => void, options?: boolean | AddEventListenerOptions): void
  addEventListener(type: string, listener: (event: MessageEvent<string>) => void, options?: boolean | AddEventListenerOptions): void
  addEventListener(type: string, listener: EventListenerOrEventListenerObject | null, options?: boolean | AddEventListenerOptions): void
  removeEventListener(type: string, listener: (event: MessageEvent<string>) => void, options?: boolean | EventListenerOptions): void
  removeEventListener(type: string, listener: EventListenerOrEventListenerObject | null, options?: boolean | EventListenerOptions): void
}

export default RelaySource

declare global {
  interface Window {
    RelaySource: typeof RelaySource
  }
}
