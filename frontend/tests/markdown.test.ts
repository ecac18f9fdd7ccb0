import { beforeEach, describe, expect, it } from "vitest";
import { GrowingMarkdown, Markdown } from "../src/markdown.ts";

const markdown = new Markdown({ image: "Image: {name}", code: "Code", table: "Table" });

function html(source: string): string {
  const box = document.createElement("div");
  box.append(markdown.render(markdown.lex(source)));
  markdown.nestHeadings(box);
  return box.innerHTML;
}

const SAMPLES = [
  "# Title\n\nA paragraph with **bold**, *em*, `code` and a [link](https://example.org/a).\n\nAnother one.",
  "1. one\n2. two\n   - nested\n   - more\n\n3. three\n\nafter",
  "8. eight\n9. nine\n\n```python\nprint(1)\n```\n\n10. ten\n11. eleven\n",
  "- [x] done\n- [ ] open\n\n> quote\n> more\n\n---\n\ntext",
  "| a | b |\n|---|--:|\n| 1 | 2 |\n| 3 | `x|y` |\n\nafter the table",
  "````md\n```js\nlet x = 1\n```\n````\n\nafter",
  "Setext\n======\n\nline one  \nline two\n\n    indented code\n\nend",
  "Text with <b>raw</b> html & H<sub>2</sub>O <script>alert(1)</script>.\n\n<div onclick=x>\nblock\n</div>\n\nlast",
  "Emoji 👩‍👩‍👧 and é combining, עברית, العربية, U+2028\u2028end.\n\n**标题：**内容\n",
  "~~gone~~ https://example.org/auto www.example.org\n\n\n\n\ntwo  \n\n* a\n\n  b\n\n  * c\n* d",
];

describe("rendering", () => {
  it("shifts headings below those of the page and keeps a list's start", () => {
    expect(html("# a")).toBe('<h4 dir="auto" aria-level="4">a</h4>\n');
    expect(html("### a\n# b\n### c\n### d").match(/h\d dir="auto" aria-level="\d/g)).toEqual([
      'h6 dir="auto" aria-level="4', 'h4 dir="auto" aria-level="4', 'h6 dir="auto" aria-level="5', 'h6 dir="auto" aria-level="6',
    ]);
    expect(html("| | a |\n|-|-|\n| b | c |")).toContain("<td></td>\n<th>a</th>");
    expect(html("8. a")).toContain('<ol start="8" dir="auto">');
  });

  it("escapes raw HTML instead of dropping it, but for a few harmless elements", () => {
    expect(html("a <b>x</b> <form action=x>")).toBe('<p dir="auto">a &lt;b&gt;x&lt;/b&gt; &lt;form action=x&gt;</p>\n');
    expect(html("H<sub>2</sub>O<br>")).toBe('<p dir="auto">H<sub>2</sub>O<br></p>\n');
    expect(html("<script>alert(1)</script>")).not.toContain("<script");
  });

  it("turns images into links", () => {
    const shown = html("![a cat](https://evil.example/?q=secret)");
    expect(shown).not.toContain("<img");
    expect(shown).toContain(">Image: a cat</a>");
  });

  it("makes links open elsewhere without a trace and tells their true host", () => {
    const shown = html("[bank.example](https://evil.example/x) [fine](https://example.org)");
    expect(shown).toContain(">bank.example (evil.example)</a>");
    expect(shown).toContain('target="_blank" rel="noopener noreferrer nofollow ugc">fine</a>');
  });

  it.each([
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt:alert(1))",
    "[x](data:text/html,<script>alert(1)</script>)",
    "[x](vbscript:x)",
    "[x](//evil.example/x)",
    "<javascript:alert(1)>",
    "[x]: javascript:alert(1)\n\n[x]",
  ])("never links to %s", (source) => {
    expect(html(source)).not.toContain("href");
  });

  it.each([
    "<img src=x onerror=alert(1)>",
    "<svg><a xlink:href='javascript:alert(1)'>x</a></svg>",
    "<math><mtext><table><mglyph><style><img src=x onerror=alert(1)>",
    "<details open ontoggle=alert(1)>",
    "<a href=x style=background:url(https://evil.example)>x</a>",
    "<input type=image src=https://evil.example>",
    "![x](https://evil.example/a.png \"title\")",
    "![x][y]\n\n[y]: https://evil.example/a.png",
  ])("leaves nothing active of %s", (source) => {
    const box = document.createElement("div");
    box.innerHTML = html(source);
    expect([...box.querySelectorAll("img, svg, math, style, script, input, form, [style], [onerror], [ontoggle]")]).toEqual([]);
  });
});

describe("growing", () => {
  let box: HTMLElement;
  beforeEach(() => {
    box = document.createElement("div");
  });

  it.each(SAMPLES)("ends as a single rendering, however the text was cut: %#", (sample) => {
    for (const step of [1, 3, 7]) {
      box.textContent = "";
      const growing = new GrowingMarkdown(markdown, box);
      for (let end = step; end < sample.length; end += step) growing.update(sample.slice(0, end), false);
      growing.update(sample, true);
      expect(box.innerHTML).toBe(html(sample));
    }
  });

  it.each(SAMPLES)("shows at each prefix what a rendering of that prefix shows: %#", (sample) => {
    const growing = new GrowingMarkdown(markdown, box);
    for (let end = 1; end <= sample.length; end += 1) {
      growing.update(sample.slice(0, end), false);
      expect(box.innerHTML, sample.slice(0, end)).toBe(html(sample.slice(0, end)));
    }
  });

  it("never replaces a finished block or the paragraph that grows", () => {
    const growing = new GrowingMarkdown(markdown, box);
    growing.update("one\n\ntwo\n\nthree\n\nfo", false);
    const nodes = [...box.children];
    const text = nodes[3]?.firstChild;
    growing.update("one\n\ntwo\n\nthree\n\nfour and", false);
    growing.update("one\n\ntwo\n\nthree\n\nfour and more", true);
    expect([...box.children]).toEqual(nodes);
    expect(nodes[3]?.firstChild).toBe(text);
  });

  it("starts over with a text that is no continuation", () => {
    const growing = new GrowingMarkdown(markdown, box);
    growing.update("one\n\ntwo\n\nthree\n\nfour", false);
    growing.update("other", false);
    expect(box.innerHTML).toBe(html("other"));
  });

  it("keeps a fold open that the reader has opened", () => {
    const growing = new GrowingMarkdown(markdown, box);
    growing.update("<details>\n<summary>\nmore\n</summary>\n\nhidden\n\n</details>", false);
    const fold = box.querySelector("details");
    fold?.setAttribute("open", "");
    growing.update("<details>\n<summary>\nmore\n</summary>\n\nhidden text\n\n</details>", true);
    expect(box.querySelector("details")).toBe(fold);
  });
});
