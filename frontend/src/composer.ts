/** The box to write in. It has no shadow root of its own: the chat's styles apply. */

import { html, LitElement, svg } from "lit";
import type { Strings } from "./strings.ts";

/** How many characters from the limit the counter appears. */
const COUNTER_SHARE = 0.9;
const DRAFT_MS = 300;

export class Composer extends LitElement {
  static override properties = {
    strings: { attribute: false },
    draftKey: { attribute: false },
    maxChars: { attribute: false },
    running: { attribute: false },
    stopping: { attribute: false },
    full: { attribute: false },
    text: { state: true },
  };

  declare strings: Strings;
  /** Where the draft is kept in this tab. */
  declare draftKey: string;
  declare maxChars: number;
  /** A turn runs: the button stops it. */
  declare running: boolean;
  declare stopping: boolean;
  /** Nothing more can be sent now. */
  declare full: boolean;
  /** Called with the text; false if it was not taken. */
  declare onsend: (text: string) => boolean;
  declare onstop: () => void;
  declare text: string;

  #saving: ReturnType<typeof setTimeout> | undefined;
  readonly #save = () => {
    clearTimeout(this.#saving);
    if (this.text) sessionStorage.setItem(this.draftKey, this.text);
    else sessionStorage.removeItem(this.draftKey);
  };

  constructor() {
    super();
    this.text = "";
    this.maxChars = Infinity;
    this.running = this.stopping = this.full = false;
  }

  override createRenderRoot(): this {
    return this;
  }

  override connectedCallback(): void {
    super.connectedCallback();
    addEventListener("pagehide", this.#save);
  }

  override disconnectedCallback(): void {
    removeEventListener("pagehide", this.#save);
    this.#save();
    super.disconnectedCallback();
  }

  override willUpdate(changed: Map<PropertyKey, unknown>): void {
    if (!changed.has("draftKey")) return;
    const before = changed.get("draftKey");
    if (typeof before === "string") sessionStorage.removeItem(before);
    this.text ||= sessionStorage.getItem(this.draftKey) ?? "";
  }

  override updated(): void {
    const box = this.#box;
    if (box && box.value !== this.text) box.value = this.text;
    if (box && !CSS.supports("field-sizing", "content")) {
      box.style.blockSize = "auto";
      box.style.blockSize = `${box.scrollHeight}px`;
    }
  }

  get #box(): HTMLTextAreaElement | null {
    return this.querySelector("textarea");
  }

  override focus(): void {
    this.#box?.focus();
  }

  /** Put `text` in front of what is there. */
  insert(text: string): void {
    this.text = this.text ? `${text}\n\n${this.text}` : text;
    this.#save();
    this.focus();
  }

  override render(): unknown {
    const count = charsOf(this.text);
    const left = this.maxChars - count;
    const { strings } = this;
    const counter = left < 0 ? strings.too_long : strings.remaining;
    const name = !this.running ? strings.send : this.stopping ? strings.stopping : strings.stop;
    const showCounter = count >= this.maxChars * COUNTER_SHARE;
    return html`
      <form class="composer" @submit=${this.#submit}>
        <textarea
          part="textarea"
          rows="1"
          aria-label=${strings.placeholder}
          aria-describedby="hint"
          placeholder=${strings.placeholder}
          enterkeyhint="send"
          @input=${this.#input}
          @keydown=${this.#keydown}
        ></textarea>
        <button type="button" class="round" part=${this.running ? "stop" : "send"} aria-label=${name} title=${name}
          aria-disabled=${this.running ? this.stopping : !this.#sendable} @click=${this.#press}>
          <svg viewBox="0 0 20 20" aria-hidden="true">${this.running ? square : arrow}</svg>
        </button>
      </form>
      <p class="hint" id="hint">
        <span class="keys">${strings.hint}</span>
        ${showCounter
          ? html`<span class=${left < 0 ? "counter over" : "counter"}>${counter.replace("{count}", String(Math.abs(left)))}</span>`
          : ""}
      </p>
    `;
  }

  get #sendable(): boolean {
    return this.text.trim() !== "" && charsOf(this.text) <= this.maxChars && !this.running && !this.full;
  }

  #input(): void {
    this.text = this.#box?.value ?? "";
    clearTimeout(this.#saving);
    this.#saving = setTimeout(this.#save, DRAFT_MS);
  }

  // Send and Stop are one node, so that the focus stays when one becomes the other.
  #press(): void {
    if (!this.running) this.#box?.form?.requestSubmit();
    else if (!this.stopping) this.onstop();
  }

  #submit(event: SubmitEvent): void {
    event.preventDefault();
    if (!this.#sendable || !this.onsend(this.text)) return;
    this.text = "";
    this.#save();
    this.focus();
  }

  #keydown(event: KeyboardEvent): void {
    // Enter and Escape belong to the input method while it composes; Safari says so only by the key code.
    const composing = event.isComposing || event.keyCode === 229;
    if (event.key === "Enter" && !composing && !event.shiftKey && !event.altKey && !coarsePointer.matches) {
      event.preventDefault();
      this.#box?.form?.requestSubmit();
    }
    if (event.key === "Escape" && !composing && this.running) {
      event.preventDefault();
      event.stopPropagation();
      this.onstop();
      return;
    }
    // The host page sees our element, not a text box, so its one-key shortcuts would fire while one types.
    if (!event.ctrlKey && !event.metaKey && !event.altKey) event.stopPropagation();
  }
}

/** Characters as the server counts them: an emoji is one, although its length here is two. */
function charsOf(text: string): number {
  let count = 0;
  for (const _ of text) count += 1;
  return count;
}

const square = svg`<rect x="6" y="6" width="8" height="8" rx="1.5" />`;
const arrow = svg`<path d="M10 16V4.5M5 9.5l5-5 5 5" />`;
const coarsePointer = matchMedia("(pointer: coarse)");
