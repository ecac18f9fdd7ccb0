/** Stays connected to one conversation: opens a transport, notices when it is over, waits, and opens another. */

import { ApiError, type Api } from "./api.ts";
import type { ChatEvent, Command } from "./protocol.ts";
import { openEvents, openSocket, type Opener, type Transport } from "./transport.ts";

/** `waiting`: lost, and to be tried again. `signed_out` and `gone` are final until {@link Connector.wake}. */
export type Connection = "idle" | "connecting" | "open" | "waiting" | "signed_out" | "gone";

export interface ConnectionState {
  readonly connection: Connection;
  /** When the connection was lost or first asked for; null while it is there. */
  readonly downSinceMs: number | null;
  /** The last try was refused because the user has too many connections; the next one comes after a long wait. */
  readonly crowded: boolean;
}

export const DISCONNECTED: ConnectionState = { connection: "idle", downSinceMs: null, crowded: false };

export interface ConnectionOptions {
  /** URL of the include of `streaming_chat.urls`, absolute, with a slash at its end. */
  readonly endpoint: string;
  readonly conversation: string;
  /** Keeps unconfirmed prompts over a reload, and which transport works. */
  readonly storage?: Pick<Storage, "getItem" | "setItem" | "removeItem">;
  readonly openSocket?: Opener;
  readonly openEvents?: Opener;
  readonly random?: () => number;
}

/** Whose connection it is. */
export interface Owner {
  /** What to continue after; empty: everything is wanted. */
  after(): string;
  /** A turn runs, so that silence is soon suspicious. */
  running(): boolean;
  /** The connection is another than it was. */
  changed(state: ConnectionState): void;
  /** A new transport got through; its first event follows. */
  opened(): void;
  event(event: ChatEvent): void;
  /** A second has passed. */
  tick(nowMs: number): void;
}

const OPEN_MS = 4_000;
const FIRST_RETRY_MS = 300;
const RETRY_BASE_MS = 500;
const RETRY_CAP_MS = 15_000;
/** A connection that lasted so long was a good one: the next loss begins with a short wait again. */
const STEADY_MS = 5_000;
const CROWDED_MS = 30_000;
const SOCKET_FAILURES = 2;
const EVENTS_REMEMBERED_MS = 3_600_000;
const TICK_MS = 1_000;
const CLOCK_JUMP_MS = 10_000;
const SILENCE_MS = 25_000;
const SILENCE_RUNNING_MS = 5_000;
const EVENTS_SILENCE_MS = 60_000;
const PONG_MS = 3_000;
/** Codes from here on are the application's own, so the socket did get through. */
const CLOSE_OURS = 4000;
const CLOSE_SIGNED_OUT = 4401;
const CLOSE_NOT_FOUND = 4404;
const CLOSE_TOO_MANY = 4429;
const EVENTS_KEY = "streaming-chat:events-until";

export class Connector {
  readonly #options: ConnectionOptions;
  readonly #api: Api;
  readonly #owner: Owner;
  #state = DISCONNECTED;
  #transport: Transport | null = null;
  /** Grows with every connection, so that late news of an old one is ignored. */
  #generation = 0;
  /** When the first event came that shows the server to serve us; null before. */
  #openedAtMs: number | null = null;
  #attempt = 0;
  #socketFailures = 0;
  #retryAfterMs = 0;
  #retry: ReturnType<typeof setTimeout> | undefined;
  #opening: ReturnType<typeof setTimeout> | undefined;
  #ticking: ReturnType<typeof setInterval> | undefined;
  #lastTickMs = 0;
  #lastHeardMs = 0;
  #pongDueMs = Infinity;

  constructor(options: ConnectionOptions, api: Api, owner: Owner) {
    this.#options = options;
    this.#api = api;
    this.#owner = owner;
  }

  /** The transport in use, open or not. */
  get kind(): Transport["kind"] | null {
    return this.#transport?.kind ?? null;
  }

  /** Connect, and stay connected until {@link close}. */
  connect(): void {
    if (this.#state.connection !== "idle") return;
    this.#ticking ??= setInterval(() => this.#tick(), TICK_MS);
    this.#lastTickMs = Date.now();
    this.reopen();
  }

  close(): void {
    clearInterval(this.#ticking);
    this.#ticking = undefined;
    this.#drop();
    this.#forgetRetry();
    this.#set(DISCONNECTED);
  }

  /** Find out at once whether the connection still lives; if there is none, try now. */
  wake(): void {
    const { connection } = this.#state;
    if (connection === "idle" || connection === "gone") return;
    this.#attempt = 0;
    if (connection !== "open") {
      if (connection !== "connecting") this.reopen();
    } else if (this.kind === "socket") {
      this.#ping();
    } else {
      this.reopen();
    }
  }

  /** Give up until {@link wake}. */
  end(connection: "signed_out" | "gone"): void {
    this.#drop();
    this.#forgetRetry();
    this.#set({ connection, crowded: false });
  }

  /** This connection is of no use any more; get another after a wait. */
  lose(): void {
    this.#over(this.#generation, 0);
  }

  /** Replace the connection at once. */
  reopen(): void {
    this.#drop();
    this.#forgetRetry();
    const generation = this.#generation;
    const kind = this.#prefersEvents() ? "events" : "socket";
    const path = kind === "socket" ? "conversations/ID/socket/" : "api/conversations/ID/events";
    const after = this.#owner.after();
    const url = this.#options.endpoint + path.replace("ID", this.#options.conversation) + (after && `?after=${after}`);
    const opener = kind === "socket" ? (this.#options.openSocket ?? openSocket) : (this.#options.openEvents ?? openEvents);
    this.#retryAfterMs = 0;
    this.#set({ connection: "connecting", downSinceMs: this.#state.downSinceMs ?? Date.now() });
    this.#opening = setTimeout(() => this.#over(generation, 0), OPEN_MS);
    this.#transport = opener(url, {
      event: (event) => {
        if (generation === this.#generation) this.#receive(event);
      },
      over: (code) => this.#over(generation, code),
    });
  }

  /** Only a socket can. */
  send(command: Command): void {
    this.#transport?.send(command);
  }

  #drop(): void {
    this.#generation += 1;
    if (this.#openedAtMs !== null && Date.now() - this.#openedAtMs >= STEADY_MS) this.#attempt = 0;
    this.#openedAtMs = null;
    clearTimeout(this.#opening);
    this.#pongDueMs = Infinity;
    this.#transport?.close();
    this.#transport = null;
  }

  #over(generation: number, code: number): void {
    if (generation !== this.#generation) return;
    const { kind } = this;
    const heard = this.#openedAtMs !== null;
    this.#drop();
    if (code === CLOSE_SIGNED_OUT) return this.end("signed_out");
    if (code === CLOSE_NOT_FOUND) return this.end("gone");
    const tooMany = code === CLOSE_TOO_MANY;
    const downSinceMs = this.#state.downSinceMs ?? Date.now();
    this.#set({ connection: "waiting", downSinceMs, crowded: tooMany && !heard });
    if (code >= CLOSE_OURS) this.#socketFailures = 0;
    if (tooMany) this.#retryIn(Math.max(CROWDED_MS, this.#retryAfterMs) * (1 + this.#random() / 2));
    else if (this.#retry !== undefined) return; // `reconnect` has said when
    else if (heard || code >= CLOSE_OURS) this.#retryLater();
    else void this.#findOut(kind);
  }

  /** Nothing came through: ask over HTTP whether it is the transport, the session, or everything. */
  async #findOut(kind: Transport["kind"] | null): Promise<void> {
    const generation = this.#generation;
    let status = 200;
    try {
      await this.#api.conversation(this.#options.conversation);
    } catch (error) {
      status = error instanceof ApiError ? error.status : 0;
    }
    if (generation !== this.#generation) return;
    if (status === 401) return this.end("signed_out");
    if (status === 404) return this.end("gone");
    if (status === 200 && kind === "socket") {
      this.#socketFailures += 1;
      if (this.#socketFailures >= SOCKET_FAILURES) {
        this.#options.storage?.setItem(EVENTS_KEY, String(Date.now() + EVENTS_REMEMBERED_MS));
      }
    }
    this.#retryLater();
  }

  #retryLater(): void {
    const cap = this.#attempt === 0 ? FIRST_RETRY_MS : Math.min(RETRY_CAP_MS, RETRY_BASE_MS * 2 ** this.#attempt);
    this.#attempt += 1;
    this.#retryIn(this.#random() * cap);
  }

  #retryIn(delayMs: number): void {
    clearTimeout(this.#retry);
    this.#retry = setTimeout(() => this.reopen(), delayMs);
  }

  #forgetRetry(): void {
    clearTimeout(this.#retry);
    this.#retry = undefined;
  }

  #random(): number {
    return (this.#options.random ?? Math.random)();
  }

  #prefersEvents(): boolean {
    if (this.#options.storage === undefined) return this.#socketFailures >= SOCKET_FAILURES;
    return Number(this.#options.storage.getItem(EVENTS_KEY) ?? 0) > Date.now();
  }

  #receive(event: ChatEvent): void {
    this.#lastHeardMs = Date.now();
    this.#pongDueMs = Infinity;
    if (event.type === "reconnect") {
      this.#retryIn(this.#random() * event.within_seconds * 1000);
      return;
    }
    if (event.type === "error") {
      this.#retryAfterMs = (event.retry_after_seconds ?? 0) * 1000;
      // One connection too many: the close code, which follows, says it better.
      if (this.#openedAtMs === null && event.code === "rate_limited") return;
    } else if (this.#openedAtMs === null) {
      this.#openedAtMs = this.#lastHeardMs;
      clearTimeout(this.#opening);
      if (this.kind === "socket") this.#socketFailures = 0;
      this.#set({ connection: "open", downSinceMs: null, crowded: false });
      this.#owner.opened();
    }
    this.#owner.event(event);
  }

  #ping(): void {
    if (this.#pongDueMs !== Infinity) return;
    this.#pongDueMs = Date.now() + PONG_MS;
    this.send({ type: "ping" });
  }

  #tick(): void {
    const now = Date.now();
    const slept = now - this.#lastTickMs > CLOCK_JUMP_MS;
    this.#lastTickMs = now;
    if (slept) this.wake();
    if (this.#state.connection === "open") this.#check(now);
    this.#owner.tick(now);
  }

  #check(now: number): void {
    const silentMs = now - this.#lastHeardMs;
    const running = this.#owner.running();
    if (this.kind === "events") {
      if (silentMs > (running ? 2 * SILENCE_RUNNING_MS : EVENTS_SILENCE_MS)) this.reopen();
    } else if (now >= this.#pongDueMs) {
      this.lose();
    } else if (silentMs > (running ? SILENCE_RUNNING_MS : SILENCE_MS)) {
      this.#ping();
    }
  }

  #set(change: Partial<ConnectionState>): void {
    this.#state = { ...this.#state, ...change };
    this.#owner.changed(this.#state);
  }
}
