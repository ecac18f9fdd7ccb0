/**
 * `<streaming-chat endpoint conversation mode theme provider max-chars heading-level page-url>`
 *
 * Light DOM inside it: what the server rendered for browsers without scripts, the CSRF token's field, and JSON of the
 * translated strings and of the conversation's snapshot.
 *
 * Events, bubbling and composed: `chat-ready`, `chat-conversation` {id, title, url}, `chat-turn-start` {turn},
 * `chat-turn-end` {turn}, `chat-connection` {connection}, `chat-error` {code, detail}.
 */

import { html, LitElement, nothing, unsafeCSS } from "lit";
import { ref, createRef } from "lit/directives/ref.js";
import { repeat } from "lit/directives/repeat.js";
import { announce, prepareAnnouncer } from "./announcer.ts";
import { Api, ApiError } from "./api.ts";
import styles from "./chat.css?inline";
import { ChatClient, type ChatState, type Outgoing } from "./client.ts";
import type { Composer } from "./composer.ts";
import type { Connection } from "./connection.ts";
import { Follow } from "./follow.ts";
import { Markdown } from "./markdown.ts";
import { assistantMessage, endingOf, userMessage, type MessageContext } from "./message.ts";
import { watchPage } from "./page.ts";
import type { ChatEvent, ErrorForm, MessageForm, Snapshot } from "./protocol.ts";
import { isActive, textOf } from "./state.ts";
import { STRINGS, type Strings } from "./strings.ts";

const STRIP_AFTER_MS = 2_000;
const BACK_AFTER_MS = 5_000;
const BACK_MS = 2_000;
const SENDING_AFTER_MS = 2_000;
const COPIED_MS = 2_000;
const SAY_REPLYING_MS = 1_000;
const SAY_STILL_MS = 20_000;
const SAY_WHOLE_CHARS = 280;
/** Holds the first message while its conversation is being made, in case the page is left. */
const START_KEY = "streaming-chat:starting";
const DEMO_KEY = "streaming-chat:demo";

export class StreamingChat extends LitElement {
  static override styles = unsafeCSS(styles);
  static override properties = {
    endpoint: {},
    conversation: {},
    provider: {},
    pageUrl: { attribute: "page-url" },
    signInUrl: { attribute: "sign-in-url" },
    maxChars: { attribute: "max-chars", type: Number },
    headingLevel: { attribute: "heading-level", type: Number },
  };

  declare endpoint: string;
  /** Id of the conversation; empty until the first message makes one. */
  declare conversation: string;
  declare provider: string;
  /** Address of a conversation's own page, with `ID` in its place; set on a full page. */
  declare pageUrl: string;
  declare signInUrl: string;
  declare maxChars: number;
  declare headingLevel: number;

  #frame: Promise<void> | null = null;
  #nextFrame: () => void = () => undefined;
  #client: ChatClient | null = null;
  #csrfToken = "";
  #leave: (() => void)[] = [];
  #strings: Strings = STRINGS;
  #markdown: Markdown | null = null;
  #follow: Follow | null = null;
  /** The text of the first message, while its conversation is being made. */
  #starting: { text: string; error: ErrorForm | null } | null = null;
  #copied = "";
  #backUntilMs = 0;
  #dismissedDemo = sessionStorage.getItem(DEMO_KEY) !== null;
  #say = { sentence: "", atMs: Infinity };
  #before: ChatState | null = null;
  readonly #scroller = createRef<HTMLElement>();
  readonly #column = createRef<HTMLElement>();
  readonly #composer = createRef<Composer>();

  constructor() {
    super();
    this.endpoint = "/chat/";
    this.conversation = this.provider = this.pageUrl = this.signInUrl = "";
    this.maxChars = 32_000;
    this.headingLevel = 3;
  }

  override connectedCallback(): void {
    super.connectedCallback();
    prepareAnnouncer();
    this.#csrfToken ||= this.querySelector<HTMLInputElement>("input[name=csrfmiddlewaretoken]")?.value ?? "";
    this.#strings = { ...STRINGS, ...this.#json<Partial<Strings>>("strings") };
    this.#markdown = new Markdown(this.#strings, this.headingLevel);
    if (this.conversation) this.#join(this.conversation, this.#json<Snapshot>("snapshot"));
    const page = watchPage({
      hide: () => this.#client?.hide(),
      rest: () => this.#client?.close(),
      rejoin: () => this.#client?.connect(),
      wake: () => this.#client?.wake(),
    });
    this.#leave.push(page);
    this.#emit("chat-ready", {});
  }

  override disconnectedCallback(): void {
    for (const leave of this.#leave.splice(0)) leave();
    this.#client?.close();
    this.#client = null;
    this.#follow?.disconnect();
    this.#follow = null;
    super.disconnectedCallback();
  }

  /** At most one rendering per frame, and none while the tab is hidden; a reply's first words do not wait. */
  protected override async scheduleUpdate(): Promise<void> {
    if (this.hasUpdated && document.hidden) await new Promise(requestAnimationFrame);
    await this.#frame;
    await super.scheduleUpdate();
    this.#frame = new Promise((next) => {
      this.#nextFrame = next;
      requestAnimationFrame(() => next());
    });
  }

  /** Put the cursor into the box to write in. */
  override focus(): void {
    this.#composer.value?.focus();
  }

  /** Send a prompt as if it had been typed. */
  send(text: string): boolean {
    if (this.#client === null) {
      if (this.#starting?.text) return false;
      void this.#start(text);
      return true;
    }
    const sent = this.#client.send(text) !== null;
    if (sent) this.#follow?.toEnd();
    return sent;
  }

  /** Stop the running reply. */
  stop(): void {
    this.#client?.stop();
  }

  // ------------------------------------------------------------------------------------------------ conversation

  #join(id: string, snapshot: Snapshot | null): ChatClient {
    const client = new ChatClient({
      endpoint: new URL(this.endpoint, document.baseURI).href,
      conversation: id,
      csrfToken: () => this.#csrfToken,
      snapshot,
      storage: sessionStorage,
    });
    this.#client = client;
    this.#before = client.state;
    this.#leave.push(client.subscribe((state, event) => this.#changed(state, event)));
    client.connect();
    return client;
  }

  /** Make a conversation for the first message. Nothing is lost if that fails: the text goes back into the box. */
  async #start(text: string): Promise<void> {
    this.#starting = { text, error: null };
    sessionStorage.setItem(START_KEY, text);
    this.requestUpdate();
    try {
      const api = new Api(new URL(this.endpoint, document.baseURI).href, () => this.#csrfToken);
      const { id } = await api.createConversation();
      this.#starting = null;
      this.conversation = id;
      const client = this.#join(id, null);
      client.send(text);
      const url = this.pageUrl.replace("ID", id);
      if (url) history.replaceState(history.state, "", url);
      this.#emit("chat-conversation", { id, title: "", url });
    } catch (error) {
      const detail = (error instanceof ApiError && error.problem.detail) || this.#strings.not_created;
      this.#starting = { text: "", error: { code: "not_created", detail } };
      this.#composer.value?.insert(text);
    }
    sessionStorage.removeItem(START_KEY);
    this.requestUpdate();
  }

  #changed(state: ChatState, event: ChatEvent | null): void {
    const before = this.#before;
    this.#before = state;
    if (before?.connection !== state.connection) {
      const downMs = before?.downSinceMs ? Date.now() - before.downSinceMs : 0;
      if (state.connection === "open" && downMs > BACK_AFTER_MS) {
        this.#backUntilMs = Date.now() + BACK_MS;
        setTimeout(() => this.requestUpdate(), BACK_MS);
        announce(this.#strings.back);
      }
      this.#emit("chat-connection", { connection: state.connection });
    }
    if (state.crowded && !before?.crowded) announce(this.#strings.too_many, "alert");
    if (state.problem && state.problem !== before?.problem) this.#complain(state.problem);
    const refused = state.outbox.find((item) => item.error && !before?.outbox.includes(item));
    if (refused?.error) this.#complain(refused.error);
    if (event?.type === "delta" && event.first === 1) this.#nextFrame();
    if (event?.type === "turn") {
      this.#emit("chat-turn-start", { turn: event.turn });
      this.#say = { sentence: this.#strings.say_replying, atMs: Date.now() + SAY_REPLYING_MS };
    }
    if (event?.type === "finished") {
      this.#emit("chat-turn-end", { turn: event.turn });
      this.#sayEnd(state);
    }
    if (before?.conversation?.title !== state.conversation?.title && state.conversation?.title) {
      const { id, title } = state.conversation;
      this.#emit("chat-conversation", { id, title, url: this.pageUrl.replace("ID", id) });
    }
    if (isActive(state.turn) && Date.now() >= this.#say.atMs) {
      announce(this.#say.sentence);
      this.#say = { sentence: this.#strings.say_still, atMs: Date.now() + SAY_STILL_MS };
    }
    this.requestUpdate();
  }

  #sayEnd({ turn, messages }: ChatState): void {
    const blocks = messages.at(-1)?.blocks ?? [];
    const end = endingOf(turn, blocks, this.#strings);
    const text = textOf(blocks);
    if (end !== null) announce(end.sentence, end.bad ? "alert" : "status");
    else announce(text.length <= SAY_WHOLE_CHARS ? text : this.#strings.say_done);
  }

  #complain({ code, detail }: ErrorForm): void {
    announce(detail, "alert");
    this.#emit("chat-error", { code, detail });
  }

  // ------------------------------------------------------------------------------------------------ rendering

  override render(): unknown {
    const state = this.#client?.state ?? null;
    const strings = this.#strings;
    const empty = !this.#starting?.text && (state === null || (state.conversation !== null && state.messages.length === 0 && state.outbox.length === 0));
    const readOnly = state?.conversation?.role === "viewer";
    return html`<div class="chat" part="chat" @keydown=${this.#keydown}>
      ${this.#banners(state)}
      <section class="scroller" part="list" role="log" aria-live="off" aria-label=${strings.conversation} tabindex="0" ${ref(this.#scroller)}>
        <div class="column" ${ref(this.#column)}>
          ${state?.hasEarlier
            ? html`<button class="small earlier" @click=${this.#loadEarlier}>${strings.earlier}</button>`
            : nothing}
          ${empty ? html`<p class="greeting">${strings.greeting}</p>` : nothing}
          ${state === null ? nothing : this.#messages(state)}
          ${this.#starting?.text ? userMessage(strings, this.headingLevel, this.#starting.text) : nothing}
        </div>
      </section>
      <div class="bottom" part="composer">
        ${this.#follow?.far
          ? html`<button class="round latest" aria-label=${strings.latest} title=${strings.latest} @click=${() => this.#follow?.toEnd()}>
              <svg viewBox="0 0 20 20" aria-hidden="true"><path d="M10 4v11.500M5 10.500l5 5 5-5" /></svg>
            </button>`
          : nothing}
        <div class="gutter"><div class="writing">
        ${readOnly
          ? html`<p class="hint always">${strings.read_only}</p>`
          : html`<streaming-chat-composer
              ${ref(this.#composer)}
              .strings=${strings}
              .draftKey=${`streaming-chat:draft:${this.conversation}`}
              .maxChars=${this.maxChars}
              .running=${isActive(state?.turn ?? null)}
              .stopping=${state?.stopping ?? false}
              .full=${Boolean(this.#starting?.text) || state?.connection === "gone"}
              .onsend=${this.#send}
              .onstop=${this.#stop}
            ></streaming-chat-composer>`}
        </div></div>
      </div>
    </div>`;
  }

  #messages(state: ChatState): unknown {
    const strings = this.#strings;
    const context: MessageContext = {
      strings,
      markdown: this.#markdown!,
      headingLevel: this.headingLevel,
      activity: state.activity,
      elapsedSeconds: (Date.now() - state.queuedAtMs) / 1000,
      canRetry: !isActive(state.turn) && state.outbox.length === 0 && state.conversation?.role !== "viewer",
      copied: this.#copied,
      language: this.closest<HTMLElement>("[lang]")?.lang ?? "",
      retry: ({ id }) => this.#client?.regenerate(id),
      copy: (message) => void this.#copy(message),
    };
    const last = state.messages.at(-1);
    return [
      repeat(
        state.messages,
        (message) => message.id,
        (message) =>
          message.role === "user"
            ? userMessage(strings, this.headingLevel, textOf(message.blocks))
            : assistantMessage(message, message === last, context),
      ),
      repeat(
        state.outbox.filter((item) => item.kind === "send"),
        (item) => item.clientId,
        (item) => userMessage(strings, this.headingLevel, item.text, this.#outgoing(item, state.connection)),
      ),
    ];
  }

  #outgoing(item: Outgoing, connection: Connection): unknown {
    const strings = this.#strings;
    const { clientId, text } = item;
    if (item.status === "refused" || item.status === "unconfirmed") {
      const why = item.status === "refused" ? item.error?.detail || strings.not_sent : strings.unconfirmed;
      return html`<div class="ending bad">
        <span>${why}</span>
        <button class="small" @click=${() => this.#client?.resend(clientId)}>${strings.resend}</button>
        ${item.status === "refused"
          ? html`<button class="small" @click=${() => this.#edit(clientId, text)}>${strings.edit}</button>`
          : html`<button class="small" @click=${() => this.#discard(clientId)}>${strings.discard}</button>`}
      </div>`;
    }
    if (Date.now() - item.sinceMs < SENDING_AFTER_MS) return nothing;
    return html`<p class="sending">${item.status === "waiting" && connection !== "open" ? strings.queued : strings.sending}</p>`;
  }

  #banners(state: ChatState | null): unknown {
    const strings = this.#strings;
    const problem = state?.problem ?? this.#starting?.error ?? null;
    return html`
      ${this.provider === "demo" && !this.#dismissedDemo
        ? html`<div class="strip note" part="banner"><span>${strings.demo}</span>${this.#dismissButton(() => {
            this.#dismissedDemo = true;
            sessionStorage.setItem(DEMO_KEY, "dismissed");
            this.requestUpdate();
          })}</div>`
        : nothing}
      ${this.#connectionStrip(state)}
      ${problem
        ? html`<div class="strip bad" part="banner"><span>${problem.detail || strings.failed}</span>${this.#dismissButton(() => {
            this.#starting = null;
            this.#client?.dismissProblem();
            this.requestUpdate();
          })}</div>`
        : nothing}
    `;
  }

  #dismissButton(dismiss: () => void): unknown {
    return html`<button class="ghost" aria-label=${this.#strings.dismiss} title=${this.#strings.dismiss} @click=${dismiss}>
      <svg viewBox="0 0 20 20" aria-hidden="true"><path d="m5.500 5.500 9 9m0-9-9 9" /></svg>
    </button>`;
  }

  #connectionStrip(state: ChatState | null): unknown {
    if (state === null) return nothing;
    const strings = this.#strings;
    if (state.connection === "signed_out") {
      return html`<div class="strip warn" part="banner"><span>${strings.signed_out}</span>
        ${this.signInUrl ? html`<a href=${this.signInUrl}>${strings.sign_in}</a>` : nothing}</div>`;
    }
    if (state.connection === "gone") return html`<div class="strip warn" part="banner"><span>${strings.deleted}</span></div>`;
    if (state.connection === "open" && Date.now() < this.#backUntilMs) {
      return html`<div class="strip ok" part="banner"><span>${strings.back}</span></div>`;
    }
    const downMs = state.downSinceMs === null ? 0 : Date.now() - state.downSinceMs;
    if (downMs < STRIP_AFTER_MS && !state.crowded) return nothing;
    return html`<div class="strip warn" part="banner">
      <span>${!navigator.onLine ? strings.offline : state.crowded ? strings.too_many : strings.reconnecting}</span>
      <button class="small" @click=${() => this.#client?.wake()}>${strings.reconnect}</button>
    </div>`;
  }

  override firstUpdated(): void {
    this.querySelector(".streaming-chat-plain")?.remove();
    const unsent = sessionStorage.getItem(START_KEY);
    if (unsent && !this.conversation) this.#composer.value?.insert(unsent);
    sessionStorage.removeItem(START_KEY);
  }

  override updated(): void {
    if (this.#follow === null) this.#observe();
  }

  #observe(): void {
    const scroller = this.#scroller.value;
    const column = this.#column.value;
    if (scroller && column) this.#follow = new Follow(scroller, column, () => this.requestUpdate());
  }

  // ------------------------------------------------------------------------------------------------ actions

  readonly #send = (text: string): boolean => this.send(text);
  readonly #stop = (): void => this.stop();
  readonly #keydown = (event: KeyboardEvent): void => {
    if (event.key === "Escape" && isActive(this.#client?.state.turn ?? null)) this.stop();
  };

  /** The line that was read stays where it is when earlier messages appear above it. */
  readonly #loadEarlier = async (): Promise<void> => {
    const scroller = this.#scroller.value;
    if (!scroller || !this.#client) return;
    const fromEnd = scroller.scrollHeight - scroller.scrollTop;
    await this.#client.loadEarlier();
    await this.updateComplete;
    scroller.scrollTop = scroller.scrollHeight - fromEnd;
  };

  #edit(clientId: string, text: string): void {
    this.#client?.discard(clientId);
    this.#composer.value?.insert(text);
  }

  #discard(clientId: string): void {
    this.#client?.discard(clientId);
    this.focus();
  }

  async #copy(message: MessageForm): Promise<void> {
    await navigator.clipboard.writeText(textOf(message.blocks));
    this.#copied = message.id;
    announce(this.#strings.say_copied);
    this.requestUpdate();
    setTimeout(() => {
      this.#copied = "";
      this.requestUpdate();
    }, COPIED_MS);
  }

  #json<T>(name: string): T | null {
    const text = this.querySelector(`[data-name="${name}"] > script`)?.textContent;
    return text ? (JSON.parse(text) as T) : null;
  }

  #emit(type: string, detail: object): void {
    this.dispatchEvent(new CustomEvent(type, { detail, bubbles: true, composed: true }));
  }
}

