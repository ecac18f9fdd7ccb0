/**
 * From the model's markdown to nodes. The only door: nothing a model wrote is inserted any other way.
 *
 * Raw HTML is escaped, not stripped, so that an answer about `<form>` stays readable. What is left passes an allow-list.
 * Images become links: an image that loads by itself can carry the conversation out in its address.
 */

import DOMPurify, { type Config } from "dompurify";
import { Marked, type Token, type TokensList } from "marked";

const ALLOWED: Config & { RETURN_DOM_FRAGMENT: true } = {
  ALLOWED_TAGS: [
    "p", "br", "strong", "em", "del", "code", "pre", "ul", "ol", "li", "a", "table", "thead", "tbody", "tr", "th", "td",
    "blockquote", "h4", "h5", "h6", "hr", "sub", "sup", "kbd", "details", "summary", "input", "#text",
  ],
  ALLOWED_ATTR: ["href", "align", "start", "class", "open", "type", "checked", "disabled"],
  // Others' values must look like an address that is allowed.
  ADD_URI_SAFE_ATTR: ["start", "align", "type"],
  ALLOW_ARIA_ATTR: false,
  ALLOW_DATA_ATTR: false,
  ALLOWED_URI_REGEXP: /^(?:https?:|mailto:|tel:|\/(?!\/)|#|\.)/i,
  RETURN_DOM_FRAGMENT: true,
};
const ALLOWED_HTML = /^<\/?(?:br|sub|sup|kbd|details|summary)\s*\/?>$/i;
const CLASS = /^language-[\w+#.-]+$/;
/** Characters that make a text read in another order than it is written. */
const BIDI_CONTROLS = /[\u061C\u200E\u200F\u202A-\u202E\u2066-\u2069]/g;

// An instance of its own, so that hooks that the host page adds to the shared one change nothing here.
const purifier = DOMPurify(window);
purifier.addHook("uponSanitizeAttribute", (node, data) => {
  if (data.attrName === "class") data.keepAttr = node.nodeName === "CODE" && CLASS.test(data.attrValue);
  if (data.attrName === "type") data.keepAttr = data.attrValue === "checkbox";
});
purifier.addHook("uponSanitizeElement", (node, data) => {
  if (data.tagName === "input" && (node as Element).getAttribute("type") !== "checkbox") node.parentNode?.removeChild(node);
});

/** The words that the page puts around the model's. */
export interface Labels {
  /** With a place for `{name}`. */
  image: string;
  code: string;
  table: string;
}

export class Markdown {
  readonly #marked: Marked;

  /** @param headingLevel level of the heading above the text; those inside it follow */
  constructor(
    private readonly labels: Labels,
    private readonly headingLevel = 3,
  ) {
    this.#marked = new Marked({
      gfm: true,
      renderer: {
        html: ({ text, raw }) => (ALLOWED_HTML.test(raw.trim()) ? raw : escape(text)),
        // Three sizes are enough; which level they are is settled by `nestHeadings`.
        heading({ tokens, depth }) {
          const level = Math.min(depth + 3, 6);
          return `<h${level}>${this.parser.parseInline(tokens)}</h${level}>\n`;
        },
        image: ({ href, text }) => `<a href="${escape(href)}">${escape(labels.image.replace("{name}", text || href))}</a>`,
      },
    });
  }

  /** The blocks of `source`. Line ends must be `\n`: then the tokens' `raw` add up to `source`. */
  lex(source: string): TokensList {
    return this.#marked.lexer(source);
  }

  /** The nodes of some blocks. */
  render(tokens: Token[]): DocumentFragment {
    const fragment = purifier.sanitize(this.#marked.parser(tokens), ALLOWED);
    for (const link of fragment.querySelectorAll("a")) this.#secure(link);
    for (const block of fragment.querySelectorAll("pre")) this.#makeScrollable(block, this.labels.code);
    for (const table of fragment.querySelectorAll("table")) {
      const frame = document.createElement("div");
      frame.className = "table";
      table.replaceWith(frame);
      frame.append(table);
      this.#makeScrollable(frame, this.labels.table);
    }
    for (const cell of fragment.querySelectorAll("th:empty")) cell.replaceWith(document.createElement("td"));
    for (const box of fragment.querySelectorAll("input")) {
      box.disabled = true;
      box.setAttribute("aria-label", box.closest("li")?.textContent?.trim().slice(0, 80) || "–");
    }
    for (const block of fragment.children) if (block.tagName !== "PRE") block.setAttribute("dir", "auto");
    return fragment;
  }

  /** Tell screen readers the level of each heading, below the page's own and without skipping one. */
  nestHeadings(container: Element): void {
    let previous = this.headingLevel;
    for (const heading of container.querySelectorAll("h4, h5, h6")) {
      previous = Math.min(previous + 1, this.headingLevel + Number(heading.tagName[1]) - 3);
      if (heading.getAttribute("aria-level") !== String(previous)) heading.setAttribute("aria-level", String(previous));
    }
  }

  /** A link opens elsewhere, tells nobody where it came from, and shows where it leads if its text claims another host. */
  #secure(link: HTMLAnchorElement): void {
    if (!link.hasAttribute("href")) return;
    link.target = "_blank";
    link.rel = "noopener noreferrer nofollow ugc";
    const text = (link.textContent ?? "").replace(BIDI_CONTROLS, "");
    if (text !== link.textContent) link.textContent = text;
    const claimed = /^(?:https?:\/\/)?((?:[\w-]+\.)+[a-z]{2,})(?:[/:?#]|$)/i.exec(text.trim())?.[1];
    if (claimed !== undefined && link.host && claimed.toLowerCase() !== link.host.toLowerCase()) {
      link.append(` (${link.host})`);
    }
  }

  /** Whoever has no mouse scrolls it by the arrow keys. */
  #makeScrollable(box: HTMLElement, label: string): void {
    box.tabIndex = 0;
    box.setAttribute("role", "region");
    box.setAttribute("aria-label", label);
  }
}

/** A block of text while it grows: blocks that can't change any more are never touched again. */
export class GrowingMarkdown {
  #source = "";
  /** Length of the part of the source whose nodes are final, and how many nodes that are. */
  #committed = 0;
  #committedNodes = 0;

  constructor(
    private readonly markdown: Markdown,
    private readonly container: Element,
  ) {}

  /**
   * Show `source`, normally a longer one than before.
   *
   * @param finished the text is complete: show what a single rendering of all of it would show
   */
  update(source: string, finished: boolean): void {
    source = source.replace(/\r\n?/g, "\n");
    if (finished || !source.startsWith(this.#source)) {
      this.#committed = this.#committedNodes = 0;
    }
    this.#source = source;
    const tokens = this.markdown.lex(source.slice(this.#committed));
    const fresh = document.createDocumentFragment();
    let done = 0;
    if (!finished) {
      // Two blocks stay open: text that is still to come can join the last two, never an earlier one.
      const solid = [...tokens.keys()].filter((index) => tokens[index]?.type !== "space");
      const open = solid.at(-2) ?? 0;
      const closed = tokens.slice(0, open);
      if (closed.length > 0) {
        fresh.append(this.markdown.render(closed));
        this.#committed += closed.reduce((length, token) => length + token.raw.length, 0);
        done = fresh.childNodes.length;
      }
      tokens.splice(0, open);
    }
    fresh.append(this.markdown.render(tokens));
    patch(this.container, this.#committedNodes, fresh);
    this.#committedNodes += done;
    this.markdown.nestHeadings(this.container);
  }
}

/** Make the children of `live` from index `start` on equal to those of `fresh`, keeping every node that can stay. */
export function patch(live: Node, start: number, fresh: Node): void {
  let current = live.childNodes[start] ?? null;
  for (const wanted of [...fresh.childNodes]) {
    if (current === null) {
      live.appendChild(wanted);
      continue;
    }
    const next: ChildNode | null = current.nextSibling;
    if (current instanceof Text && wanted instanceof Text) {
      if (wanted.data.startsWith(current.data)) current.appendData(wanted.data.slice(current.data.length));
      else current.data = wanted.data;
    } else if (sameShell(current, wanted)) patch(current, 0, wanted);
    else current.replaceWith(wanted);
    current = next;
  }
  while (current !== null) {
    const next: ChildNode | null = current.nextSibling;
    current.remove();
    current = next;
  }
}

function sameShell(one: Node, other: Node): boolean {
  if (!(one instanceof Element && other instanceof Element) || one.tagName !== other.tagName) return false;
  return attributesOf(one) === attributesOf(other);
}

/** A fold that the reader has opened stays open, and levels are set on the live headings only. */
const NOT_COMPARED = new Set(["open", "aria-level"]);

function attributesOf(element: Element): string {
  const attributes = [...element.attributes].filter(({ name }) => !NOT_COMPARED.has(name));
  return attributes.map(({ name, value }) => `${name}=${value}`).sort().join("\n");
}

function escape(text: string): string {
  return text.replace(/[&<>"']/g, (character) => `&#${character.charCodeAt(0)};`);
}

