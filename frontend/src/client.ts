/**
 * The client of one conversation: it connects, sends, resumes, and always knows what is true.
 *
 * Usable without the element: `state` is immutable and replaced at every change, `subscribe` tells of each.
 */

import { Api, ApiError } from "./api.ts";
import { Connector, DISCONNECTED, type ConnectionOptions, type ConnectionState } from "./connection.ts";
import type { ChatEvent, ErrorForm, Snapshot } from "./protocol.ts";
import { EMPTY, isActive, prepend, reduce, token, type ConversationState } from "./state.ts";

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

export interface ChatState extends ConversationState, ConnectionState {
  /** In the order of sending. */
  readonly outbox: readonly Outgoing[];
  /** Stop was asked for, and the turn still runs. */
  readonly stopping: boolean;
  /** An error that belongs to no message. */
  readonly problem: ErrorForm | null;
}

export interface ClientOptions extends ConnectionOptions {
  readonly csrfToken: () => string;
  /** What the page was rendered with; the server then sends only what came since. */
  readonly snapshot?: Snapshot | null;
}

export const ACK_DELTAS = 32;
export const ACK_MS = 2_000;
export const UNCONFIRMED_MS = 15_000;
export const MAX_OUTBOX = 5;

export class ChatClient {
  readonly api: Api;
  #state: ChatState;
  readonly #options: ClientOptions;
  readonly #listeners = new Set<(state: ChatState, event: ChatEvent | null) => void>();
  readonly #connector: Connector;
  #unacked = 0;
  #ackedAtMs = 0;
  #stoppingTurn = "";

  constructor(options: ClientOptions) {
    this.#options = options;
    this.api = new Api(options.endpoint, options.csrfToken);
    this.#connector = new Connector(options, this.api, {
      after: () => (this.#state.conversation === null ? "" : token(this.#state.cursor)),
      running: () => isActive(this.#state.turn),
      changed: (state) => this.#set(state),
      opened: () => this.#resendAll(),
      event: (event) => this.#receive(event),
      tick: (nowMs) => this.#tick(nowMs),
    });
    this.#state = {
      ...EMPTY,
      ...DISCONNECTED,
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
    this.#connector.connect();
  }

  /** Disconnect. What was sent goes on; {@link connect} continues where this left off. */
  close(): void {
    this.#connector.close();
  }

  /** Out of sight: give back an event stream, of which a browser allows a site only six. */
  hide(): void {
    if (this.#connector.kind === "events") this.close();
  }

  /** Something may have changed (tab shown, network back): find out at once whether the connection still lives. */
  wake(): void {
    this.#connector.wake();
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

  /** Forget an item that was not accepted; what waits behind it goes out. One that did arrive is answered anyway. */
  discard(clientId: string): void {
    this.#setOutbox(this.#state.outbox.filter((item) => item.clientId !== clientId));
    this.#flush();
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

  // ------------------------------------------------------------------------------------------------ events

  #receive(event: ChatEvent): void {
    switch (event.type) {
      case "accepted":
        this.#accepted(event.ref, event.duplicate);
        break;
      case "error":
        this.#refused(event.ref, event);
        break;
      case "deleted":
        this.#apply(event);
        this.#connector.end("gone");
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
      if (this.#connector.kind === "socket") {
        this.#connector.send({ type: "resume", cursor: token(this.#state.cursor) });
      } else if (this.#connector.kind !== null) {
        this.#connector.reopen();
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
    if (turn && isActive(this.#state.turn)) this.#connector.send({ type: "ack", turn_id: turn, seq });
  }

  #tick(nowMs: number): void {
    const { connection, outbox, turn } = this.#state;
    if (connection === "open" && this.#unacked > 0 && nowMs - this.#ackedAtMs >= ACK_MS) this.#ack();
    const late = outbox.find((item) => item.status === "sending" && nowMs - item.sinceMs >= UNCONFIRMED_MS);
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
    if (this.#connector.kind === "socket") {
      this.#connector.send(
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
    if (this.#connector.kind === "socket") {
      this.#connector.send({ type: "stop", ref: "stop", turn_id: turnId });
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
      this.#connector.end("signed_out");
    } else if (code === "draining" && item !== undefined) {
      this.#update(item.clientId, { status: "waiting" });
      this.#connector.lose();
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
