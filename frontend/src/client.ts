/**
 * The client of one conversation: it connects, sends, resumes, and always knows what is true.
 *
 * Usable without the element: `state` is immutable and replaced at every change, `subscribe` tells of each.
 */

import { Api, ApiError } from "./api.ts";
import type { ChatEvent, ErrorForm, Snapshot } from "./protocol.ts";
import { EMPTY, isActive, prepend, reduce, token, type ConversationState } from "./state.ts";
import { openEvents, openSocket, type Opener, type Transport } from "./transport.ts";

/** `waiting`: lost, and to be tried again. `signed_out` and `gone` are final until {@link ChatClient.wake}. */
export type Connection = "idle" | "connecting" | "open" | "waiting" | "signed_out" | "gone";

/** A prompt, or the wish for another answer, that the server has not shown to have yet. */
export interface Outgoing {
  readonly clientId: string;
  readonly kind: "send" | "regenerate";
  readonly text: string;
  /** The reply to make once more. */
  readonly messageId: string;
  readonly status: "waiting" | "sending" | "unconfirmed" | "accepted" | "refused";
  readonly sinceMs: number;
  /** Why it was refused. */
  readonly error: ErrorForm | null;
}

export interface ChatState extends ConversationState {
  readonly connection: Connection;
  /** When the connection was lost or first asked for; null while it is there. */
  readonly downSinceMs: number | null;
  /** In the order of sending. */
  readonly outbox: readonly Outgoing[];
  /** Stop was asked for, and the turn still runs. */
  readonly stopping: boolean;
  /** An error that belongs to no message. */
  readonly problem: ErrorForm | null;
}

export interface ClientOptions {
  /** URL of the include of `streaming_chat.urls`, absolute, with a slash at its end. */
  readonly endpoint: string;
  readonly conversation: string;
  readonly csrfToken: () => string;
  /** What the page was rendered with; the server then sends only what came since. */
  readonly snapshot?: Snapshot | null;
  /** Keeps unconfirmed prompts over a reload, and which transport works. */
  readonly storage?: Pick<Storage, "getItem" | "setItem" | "removeItem">;
  readonly openSocket?: Opener;
  readonly openEvents?: Opener;
  readonly random?: () => number;
}

export const ACK_DELTAS = 32;
export const ACK_MS = 2_000;
export const UNCONFIRMED_MS = 15_000;
export const MAX_OUTBOX = 5;
const OPEN_MS = 4_000;
const FIRST_RETRY_MS = 300;
const RETRY_BASE_MS = 500;
const RETRY_CAP_MS = 15_000;
const SOCKET_FAILURES = 2;
const EVENTS_REMEMBERED_MS = 3_600_000;
const TICK_MS = 1_000;
const CLOCK_JUMP_MS = 10_000;
const SILENCE_MS = 25_000;
const SILENCE_RUNNING_MS = 5_000;
const EVENTS_SILENCE_MS = 60_000;
const PONG_MS = 3_000;
const CLOSE_SIGNED_OUT = 4401;
const CLOSE_NOT_FOUND = 4404;

export class ChatClient {
  readonly api: Api;
  #state: ChatState;
  readonly #options: ClientOptions;
  readonly #listeners = new Set<(state: ChatState, event: ChatEvent | null) => void>();
  #transport: Transport | null = null;
  /** Grows with every connection, so that late news of an old one is ignored. */
  #generation = 0;
  #heard = false;
  #attempt = 0;
  #socketFailures = 0;
  #retry: ReturnType<typeof setTimeout> | undefined;
  #opening: ReturnType<typeof setTimeout> | undefined;
  #ticking: ReturnType<typeof setInterval> | undefined;
  #lastTickMs = 0;
  #lastHeardMs = 0;
  #pongDueMs = Infinity;
  #unacked = 0;
  #ackedAtMs = 0;
  #stoppingTurn = "";

  constructor(options: ClientOptions) {
    this.#options = options;
    this.api = new Api(options.endpoint, options.csrfToken);
    this.#state = {
      ...EMPTY,
      connection: "idle",
      downSinceMs: null,
      outbox: this.#restoreOutbox(),
      stopping: false,
      problem: null,
    };
    if (options.snapshot) this.#apply(options.snapshot);
  }

  get state(): ChatState {
    return this.#state;
  }

  /** Be told of every change, with the event that caused it if one did. Returns how to end it. */
  subscribe(listener: (state: ChatState, event: ChatEvent | null) => void): () => void {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  /** Connect, and stay connected until {@link close}. */
  connect(): void {
    if (this.#state.connection !== "idle") return;
    this.#ticking ??= setInterval(() => this.#tick(), TICK_MS);
    this.#lastTickMs = Date.now();
    this.#open();
  }

  /** Disconnect. What was sent goes on; {@link connect} continues where this left off. */
  close(): void {
    clearInterval(this.#ticking);
    this.#ticking = undefined;
    this.#drop();
    this.#set({ connection: "idle", downSinceMs: null });
  }

  /** Out of sight: give back an event stream, of which a browser allows a site only six. */
  hide(): void {
    if (this.#transport?.kind === "events") this.close();
  }

  /** Something may have changed (tab shown, network back): find out at once whether the connection still lives. */
  wake(): void {
    const { connection } = this.#state;
    if (connection === "idle" || connection === "gone") return;
    this.#attempt = 0;
    if (connection !== "open") {
      if (connection !== "connecting") this.#open();
    } else if (this.#transport?.kind === "socket") {
      this.#ping();
    } else {
      this.#open();
    }
  }

  /**
   * Send a prompt. It is in `outbox` at once and until the server shows it as a message; a lost connection does not
   * lose or double it. Returns its client id; null if too many are waiting.
   */
  send(text: string): string | null {
    if (this.#state.outbox.length >= MAX_OUTBOX) return null;
    return this.#enqueue({ kind: "send", text, messageId: "" });
  }

  /** Ask for another answer instead of the reply `messageId`. */
  regenerate(messageId: string): void {
    this.#enqueue({ kind: "regenerate", text: "", messageId });
  }

  /** Try a refused or unconfirmed item again, under the same id: what was stored already is not stored twice. */
  resend(clientId: string): void {
    const item = this.#state.outbox.find((item) => item.clientId === clientId);
    if (item === undefined) return;
    const fresh = item.error?.code === "conflict" ? { clientId: newId() } : {};
    this.#update(clientId, { ...fresh, status: "waiting", error: null, sinceMs: Date.now() });
    this.#flush();
  }

  /** Forget an item that was not accepted. */
  discard(clientId: string): void {
    this.#setOutbox(this.#state.outbox.filter((item) => item.clientId !== clientId));
  }

  /** Stop the running turn, keeping its text. */
  stop(): void {
    const { turn } = this.#state;
    if (turn === null || !isActive(turn)) return;
    this.#stoppingTurn = turn.id;
    this.#set({ stopping: true });
    this.#sendStop();
  }

  /** Load the page of messages before the first one shown. */
  async loadEarlier(): Promise<void> {
    const first = this.#state.messages[0];
    if (first === undefined || !this.#state.hasEarlier) return;
    try {
      this.#set(prepend(this.#state, await this.api.messages(this.#options.conversation, first.id)));
    } catch (error) {
      this.#set({ problem: problemOf(error) });
    }
  }

  dismissProblem(): void {
    this.#set({ problem: null });
  }

  // ------------------------------------------------------------------------------------------------ connection

  #open(): void {
    this.#drop();
    const generation = this.#generation;
    const kind = this.#prefersEvents() ? "events" : "socket";
    const path = kind === "socket" ? "conversations/ID/socket/" : "api/conversations/ID/events";
    const after = this.#state.conversation === null ? "" : `?after=${token(this.#state.cursor)}`;
    const url = this.#options.endpoint + path.replace("ID", this.#options.conversation) + after;
    const opener = kind === "socket" ? (this.#options.openSocket ?? openSocket) : (this.#options.openEvents ?? openEvents);
    this.#heard = false;
    this.#set({ connection: "connecting", downSinceMs: this.#state.downSinceMs ?? Date.now() });
    this.#opening = setTimeout(() => this.#over(generation, 0), OPEN_MS);
    this.#transport = opener(url, {
      event: (event) => {
        if (generation === this.#generation) this.#receive(event);
      },
      over: (code) => this.#over(generation, code),
    });
  }

  #drop(): void {
    this.#generation += 1;
    clearTimeout(this.#retry);
    clearTimeout(this.#opening);
    this.#pongDueMs = Infinity;
    this.#transport?.close();
    this.#transport = null;
  }

  #over(generation: number, code: number): void {
    if (generation !== this.#generation) return;
    const { kind } = this.#transport ?? { kind: "socket" };
    const heard = this.#heard;
    this.#drop();
    if (code === CLOSE_SIGNED_OUT) return this.#end("signed_out");
    if (code === CLOSE_NOT_FOUND || this.#state.deleted) return this.#end("gone");
    this.#set({ connection: "waiting", downSinceMs: this.#state.downSinceMs ?? Date.now() });
    if (heard) this.#retryLater();
    else void this.#findOut(kind);
  }

  /** Nothing came through: ask over HTTP whether it is the transport, the session, or everything. */
  async #findOut(kind: Transport["kind"]): Promise<void> {
    const generation = this.#generation;
    let status = 200;
    try {
      await this.api.conversation(this.#options.conversation);
    } catch (error) {
      status = error instanceof ApiError ? error.status : 0;
    }
    if (generation !== this.#generation) return;
    if (status === 401) return this.#end("signed_out");
    if (status === 404) return this.#end("gone");
    if (status === 200 && kind === "socket") {
      this.#socketFailures += 1;
      if (this.#socketFailures >= SOCKET_FAILURES) {
        this.#options.storage?.setItem(EVENTS_KEY, String(Date.now() + EVENTS_REMEMBERED_MS));
      }
    }
    this.#retryLater();
  }

  #retryLater(withinMs?: number): void {
    const random = this.#options.random ?? Math.random;
    const cap = this.#attempt === 0 ? FIRST_RETRY_MS : Math.min(RETRY_CAP_MS, RETRY_BASE_MS * 2 ** this.#attempt);
    this.#attempt += 1;
    clearTimeout(this.#retry);
    this.#retry = setTimeout(() => this.#open(), random() * (withinMs ?? cap));
  }

  #end(connection: "signed_out" | "gone"): void {
    this.#drop();
    this.#set({ connection });
  }

  #prefersEvents(): boolean {
    if (this.#options.storage === undefined) return this.#socketFailures >= SOCKET_FAILURES;
    return Number(this.#options.storage.getItem(EVENTS_KEY) ?? 0) > Date.now();
  }

  // ------------------------------------------------------------------------------------------------ events

  #receive(event: ChatEvent): void {
    this.#lastHeardMs = Date.now();
    this.#pongDueMs = Infinity;
    if (!this.#heard) {
      this.#heard = true;
      clearTimeout(this.#opening);
      this.#attempt = 0;
      if (this.#transport?.kind === "socket") this.#socketFailures = 0;
      this.#set({ connection: "open", downSinceMs: null });
      this.#resendAll();
    }
    switch (event.type) {
      case "accepted":
        this.#accepted(event.ref, event.duplicate);
        break;
      case "error":
        this.#refused(event.ref, event);
        break;
      case "reconnect":
        this.#retryLater(event.within_seconds * 1000);
        break;
      case "deleted":
        this.#apply(event);
        this.#end("gone");
        break;
      case "pong":
        break;
      default:
        this.#apply(event);
    }
    this.#flush();
  }

  #apply(event: ChatEvent): void {
    const [verdict, next] = reduce(this.#state, event, Date.now());
    if (verdict === "gap") {
      if (this.#transport?.kind === "socket") {
        this.#transport.send({ type: "resume", cursor: token(this.#state.cursor) });
      } else if (this.#transport !== null) {
        this.#open();
      }
      return;
    }
    if (verdict === "drop") return;
    const stopping = isActive(next.turn) && next.turn?.id === this.#stoppingTurn;
    const shown = new Set(next.messages.map((message) => message.client_id));
    const outbox = this.#state.outbox.filter(
      (item) => !shown.has(item.clientId) && !(event.type === "snapshot" && item.status === "accepted"),
    );
    const settled = outbox.length < this.#state.outbox.length;
    this.#set({ ...next, stopping, ...(settled ? { outbox } : {}) }, event);
    if (settled) this.#keepOutbox();
    if (event.type === "delta") this.#unacked += 1;
    if (this.#unacked >= ACK_DELTAS || event.type === "snapshot") this.#ack();
  }

  #ack(): void {
    const { turn, seq } = this.#state.cursor;
    this.#unacked = 0;
    this.#ackedAtMs = Date.now();
    if (turn && isActive(this.#state.turn)) this.#transport?.send({ type: "ack", turn_id: turn, seq });
  }

  #ping(): void {
    if (this.#pongDueMs !== Infinity) return;
    this.#pongDueMs = Date.now() + PONG_MS;
    this.#transport?.send({ type: "ping" });
  }

  #tick(): void {
    const now = Date.now();
    const slept = now - this.#lastTickMs > CLOCK_JUMP_MS;
    this.#lastTickMs = now;
    if (slept) this.wake();
    const { connection, outbox, turn } = this.#state;
    if (connection === "open") {
      const silentMs = now - this.#lastHeardMs;
      if (this.#transport?.kind === "events") {
        if (silentMs > (isActive(turn) ? 2 * SILENCE_RUNNING_MS : EVENTS_SILENCE_MS)) this.#open();
      } else if (now >= this.#pongDueMs) {
        this.#over(this.#generation, 0);
      } else if (silentMs > (isActive(turn) ? SILENCE_RUNNING_MS : SILENCE_MS)) {
        this.#ping();
      }
      if (this.#unacked > 0 && now - this.#ackedAtMs >= ACK_MS) this.#ack();
    }
    const late = outbox.find((item) => item.status === "sending" && now - item.sinceMs >= UNCONFIRMED_MS);
    if (late !== undefined) this.#update(late.clientId, { status: "unconfirmed" });
    if (isActive(turn) || outbox.length > 0 || connection !== "open") this.#set({});
  }

  // ------------------------------------------------------------------------------------------------ commands

  #enqueue(item: Pick<Outgoing, "kind" | "text" | "messageId">): string {
    const clientId = newId();
    const waiting: Outgoing = { ...item, clientId, status: "waiting", sinceMs: Date.now(), error: null };
    this.#setOutbox([...this.#state.outbox, waiting]);
    this.#flush();
    return clientId;
  }

  /** Send the next item, one at a time and when no turn runs: the server would only say that it is busy. */
  #flush(): void {
    const { connection, conversation, outbox, turn } = this.#state;
    const next = outbox.find((item) => item.status !== "refused");
    if (connection !== "open" || conversation === null || next?.status !== "waiting" || isActive(turn)) return;
    this.#perform(next);
  }

  /** What was under way when the connection went is sent again, under the same id. */
  #resendAll(): void {
    for (const item of this.#state.outbox) {
      if (item.status === "sending" || item.status === "unconfirmed") this.#perform(item);
    }
    if (this.#stoppingTurn && this.#state.stopping) this.#sendStop();
  }

  #perform(item: Outgoing): void {
    const { clientId, kind, text, messageId } = item;
    this.#update(clientId, { status: "sending" });
    const ref = clientId;
    if (this.#transport?.kind === "socket") {
      this.#transport.send(
        kind === "send"
          ? { type: "send", ref, client_id: clientId, text }
          : { type: "regenerate", ref, client_id: clientId, message_id: messageId },
      );
      return;
    }
    const id = this.#options.conversation;
    const request =
      kind === "send"
        ? this.api.send(id, { client_id: clientId, text })
        : this.api.regenerate(id, { client_id: clientId, message_id: messageId });
    request.then(
      ({ duplicate }) => this.#accepted(clientId, duplicate),
      (error: unknown) => {
        // Without an answer nobody knows; it is sent again when the connection is back.
        if (error instanceof ApiError && error.status > 0) this.#refused(clientId, problemOf(error));
      },
    );
  }

  #sendStop(): void {
    const turnId = this.#stoppingTurn;
    if (this.#transport?.kind === "socket") {
      this.#transport.send({ type: "stop", ref: "stop", turn_id: turnId });
      return;
    }
    this.api.stop(this.#options.conversation, turnId).catch((error: unknown) => {
      if (error instanceof ApiError && error.status > 0) this.#refused("stop", problemOf(error));
    });
  }

  #accepted(ref: string | null, duplicate: boolean): void {
    const item = this.#state.outbox.find((item) => item.clientId === ref);
    if (item === undefined) return;
    if (duplicate) this.discard(item.clientId);
    else this.#update(item.clientId, { status: "accepted" });
  }

  #refused(ref: string | null, { code, detail }: ErrorForm): void {
    const item = this.#state.outbox.find((item) => item.clientId === ref);
    if (code === "signed_out") {
      if (item !== undefined) this.#update(item.clientId, { status: "waiting" });
      this.#end("signed_out");
    } else if (code === "draining" && item !== undefined) {
      this.#update(item.clientId, { status: "waiting" });
      this.#over(this.#generation, 0);
    } else if (item?.kind === "send") {
      this.#update(item.clientId, { status: "refused", error: { code, detail } });
    } else {
      if (item !== undefined) this.discard(item.clientId);
      if (ref === "stop") this.#stoppingTurn = "";
      this.#set({ problem: { code, detail }, stopping: ref !== "stop" && this.#state.stopping });
    }
  }

  // ------------------------------------------------------------------------------------------------ state

  #set(change: Partial<ChatState>, event: ChatEvent | null = null): void {
    this.#state = { ...this.#state, ...change };
    for (const listener of this.#listeners) listener(this.#state, event);
  }

  #update(clientId: string, change: Partial<Outgoing>): void {
    this.#setOutbox(this.#state.outbox.map((item) => (item.clientId === clientId ? { ...item, ...change } : item)));
  }

  #setOutbox(outbox: readonly Outgoing[]): void {
    this.#set({ outbox });
    this.#keepOutbox();
  }

  #keepOutbox(): void {
    const kept = this.#state.outbox
      .filter((item) => item.kind === "send" && item.status !== "accepted")
      .map(({ clientId, text }) => ({ clientId, text }));
    const key = OUTBOX_KEY + this.#options.conversation;
    if (kept.length > 0) this.#options.storage?.setItem(key, JSON.stringify(kept));
    else this.#options.storage?.removeItem(key);
  }

  #restoreOutbox(): Outgoing[] {
    const kept = this.#options.storage?.getItem(OUTBOX_KEY + this.#options.conversation);
    if (!kept) return [];
    const items = JSON.parse(kept) as Pick<Outgoing, "clientId" | "text">[];
    return items.map(({ clientId, text }) => ({
      clientId, text, kind: "send", messageId: "", status: "waiting", sinceMs: Date.now(), error: null,
    }));
  }
}

const EVENTS_KEY = "streaming-chat:events-until";
const OUTBOX_KEY = "streaming-chat:outbox:";

function problemOf(error: unknown): ErrorForm {
  if (error instanceof ApiError) return { code: error.problem.code, detail: error.problem.detail };
  throw error;
}

/** A random UUID, also on a page that is not served over HTTPS. */
export function newId(): string {
  if (typeof crypto.randomUUID === "function") return crypto.randomUUID();
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
