/** How one message looks. */

import { html, nothing, type TemplateResult } from "lit";
import { repeat } from "lit/directives/repeat.js";
import { GrowingMarkdown, type Markdown } from "./markdown.ts";
import type { Block, MessageForm, TurnForm } from "./protocol.ts";
import { isActive, textOf, type Activity } from "./state.ts";
import type { Strings } from "./strings.ts";

/** Shows markdown as it grows. */
export class MarkdownText extends HTMLElement {
  /** Set once, before the source. */
  markdown: Markdown | null = null;
  #growing: GrowingMarkdown | null = null;
  #shown: { source: string; finished: boolean } | null = null;

  set content(content: { source: string; finished: boolean }) {
    if (this.markdown === null) throw new Error("markdown comes first");
    const { source, finished } = content;
    if (this.#shown?.source === source && this.#shown.finished === finished) return;
    this.#shown = { source, finished };
    this.#growing ??= new GrowingMarkdown(this.markdown, this);
    this.#growing.update(source, finished);
  }
}

/** What a message needs from the chat around it. */
export interface MessageContext {
  readonly strings: Strings;
  readonly markdown: Markdown;
  readonly headingLevel: number;
  readonly activity: Activity | null;
  readonly elapsedSeconds: number;
  /** Nothing runs and the user may write. */
  readonly canRetry: boolean;
  readonly copied: string;
  readonly language: string;
  retry(message: MessageForm): void;
  copy(message: MessageForm): void;
}

export function userMessage(strings: Strings, level: number, text: string, foot: unknown = nothing): TemplateResult {
  return html`<article class="user">
    <div class="sr" role="heading" aria-level=${level}>${strings.you}</div>
    <div class="bubble" part="message user-message" dir="auto">${text}</div>
    ${foot}
  </article>`;
}

export function assistantMessage(message: MessageForm, last: boolean, context: MessageContext): TemplateResult {
  const { strings } = context;
  const running = isActive(message.turn) && last;
  const parts = partsOf(message.blocks);
  return html`<article class="assistant" part="message assistant-message">
    <div class="sr" role="heading" aria-level=${context.headingLevel}>${strings.assistant}</div>
    ${repeat(parts, (part) => part.index, (part, position) => partView(part, running && position === parts.length - 1, running, context))}
    <div class="foot">${running ? progress(context) : [ending(message, last, context), footer(message, last, context)]}</div>
  </article>`;
}

// ---------------------------------------------------------------------------------------------------- content

type Part =
  | { kind: "text"; index: number; text: string }
  | { kind: "thinking"; index: number; text: string }
  | { kind: "tool"; index: number; name: string; done: boolean };

/** What there is to show: neighbouring text blocks are one text, because citations split sentences. */
function partsOf(blocks: readonly Block[]): Part[] {
  const parts: Part[] = [];
  const answered = new Set(blocks.map((block) => block["tool_use_id"]));
  let afterText = false;
  blocks.forEach((block, index) => {
    const last = parts.at(-1);
    if (block.type === "text" && typeof block["text"] === "string") {
      if (afterText && last?.kind === "text") last.text += block["text"];
      else parts.push({ kind: "text", index, text: block["text"] });
    } else if (block.type === "thinking" && typeof block["thinking"] === "string") {
      parts.push({ kind: "thinking", index, text: block["thinking"] });
    } else if (typeof block.type === "string" && block.type.endsWith("tool_use")) {
      parts.push({ kind: "tool", index, name: String(block["name"] ?? ""), done: answered.has(block["id"]) });
    }
    afterText = block.type === "text";
  });
  return parts;
}

function partView(
  part: Part,
  growing: boolean,
  running: boolean,
  { strings, markdown }: MessageContext,
): TemplateResult | typeof nothing {
  switch (part.kind) {
    case "text":
      return html`<streaming-chat-markdown
        class="prose" .markdown=${markdown} .content=${{ source: part.text, finished: !growing }}
      ></streaming-chat-markdown>`;
    case "thinking":
      return part.text === ""
        ? nothing
        : html`<details class="fold">
            <summary>${chevron}<span class=${growing ? "live" : ""}>${strings.thinking}</span></summary>
            <div class="thoughts" dir="auto">${part.text}</div>
          </details>`;
    case "tool":
      return html`<p class="tool">
        <span class=${running && !part.done ? "spinner" : "dot"} aria-hidden="true"></span>
        ${(running && !part.done ? strings.tool_running : strings.tool_done).replace("{name}", part.name || strings.tool)}
      </p>`;
  }
}

// ---------------------------------------------------------------------------------------------------- foot

const STILL_WAITING_SECONDS = 8;

function progress({ strings, activity, elapsedSeconds }: MessageContext): unknown {
  if (activity === null) return nothing;
  const seconds = Math.floor(elapsedSeconds);
  const sentence = {
    queued: seconds < STILL_WAITING_SECONDS ? strings.waiting : strings.in_queue,
    waiting: seconds < STILL_WAITING_SECONDS ? strings.waiting : strings.still_waiting,
    thinking: strings.thinking,
    tool: strings.using_tool,
    writing: strings.writing,
  }[activity];
  return html`<p class="progress">
    <span class="dots" aria-hidden="true"><i></i><i></i><i></i></span>
    <span>${sentence}</span>
    ${seconds > 0 ? html`<span class="elapsed">${strings.seconds.replace("{count}", String(seconds))}</span>` : nothing}
  </p>`;
}

/** How a reply ended, where that needs words. */
export function endingOf(turn: TurnForm | null, blocks: readonly Block[], strings: Strings): { sentence: string; bad: boolean } | null {
  switch (turn?.status) {
    case "stopped":
      return { sentence: strings.stopped, bad: false };
    case "interrupted":
    case "timed_out":
    case "failed":
      return { sentence: turn.error?.detail || strings[turn.status], bad: true };
    case "completed":
      if (turn.stop_reason === "max_tokens") return { sentence: strings.max_tokens, bad: false };
      if (turn.stop_reason === "model_context_window_exceeded") return { sentence: strings.context_full, bad: false };
      if (turn.stop_reason === "pause_turn") return { sentence: strings.pause_turn, bad: false };
      if (turn.stop_reason === "refusal") return { sentence: strings.refusal, bad: false };
      return textOf(blocks).trim() === "" ? { sentence: strings.empty, bad: false } : null;
    default:
      return null;
  }
}

function ending(message: MessageForm, last: boolean, { strings, canRetry, retry }: MessageContext): unknown {
  const end = endingOf(message.turn, message.blocks, strings);
  if (end === null) return nothing;
  return html`<div class=${end.bad ? "ending bad" : "ending"}>
    ${end.bad ? alertIcon : nothing}<span>${end.sentence}</span>
    ${end.bad && last && canRetry ? html`<button class="small" @click=${() => retry(message)}>${strings.retry}</button>` : nothing}
  </div>`;
}

function footer(message: MessageForm, last: boolean, context: MessageContext): unknown {
  const { strings, canRetry, copy, copied, retry, language } = context;
  const { turn } = message;
  const hasText = textOf(message.blocks) !== "";
  const bad = endingOf(turn, message.blocks, strings)?.bad;
  const numbers = new Intl.NumberFormat(language || undefined, { maximumFractionDigits: 1 });
  const facts = turn === null || !hasText ? [] : [
    turn.model,
    turn.usage && (turn.usage.exact ? strings.tokens : strings.about_tokens).replace("{count}", numbers.format(turn.usage.output_tokens)),
    strings.seconds.replace("{count}", numbers.format(turn.elapsed_seconds)),
  ].filter(Boolean);
  return html`<div class=${last ? "actions" : "actions quiet"}>
    ${hasText ? html`<button class="ghost" aria-label=${strings.copy} title=${strings.copy} @click=${() => copy(message)}>
      ${copied === message.id ? checkIcon : copyIcon}</button>` : nothing}
    ${last && canRetry && !bad ? html`<button class="ghost" aria-label=${strings.retry} title=${strings.retry} @click=${() => retry(message)}>
      ${retryIcon}</button>` : nothing}
    <span class="facts">${facts.join(" · ")}</span>
  </div>`;
}

const chevron = html`<svg class="chevron" viewBox="0 0 20 20" aria-hidden="true"><path d="m8 5 5 5-5 5" /></svg>`;
const copyIcon = html`<svg viewBox="0 0 20 20" aria-hidden="true"><rect x="7" y="7" width="9" height="9" rx="2" /><path d="M13 4.5A1.5 1.5 0 0 0 11.500 4h-6A1.500 1.500 0 0 0 4 5.500v6a1.500 1.500 0 0 0 .5 1.500" /></svg>`;
const checkIcon = html`<svg viewBox="0 0 20 20" aria-hidden="true"><path d="m4.500 10.500 3.500 3.500 7.500-8" /></svg>`;
const retryIcon = html`<svg viewBox="0 0 20 20" aria-hidden="true"><path d="M15.500 8A6 6 0 1 0 16 11.500M15.800 4v4h-4" /></svg>`;
const alertIcon = html`<svg viewBox="0 0 20 20" aria-hidden="true"><circle cx="10" cy="10" r="7" /><path d="M10 6.500v4M10 13.400v.1" /></svg>`;
