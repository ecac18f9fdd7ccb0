import { afterEach, beforeAll, describe, expect, it, vi } from "vitest";
import type { Composer } from "../src/composer.ts";
import { STRINGS } from "../src/strings.ts";

// What a browser has and jsdom lacks.
vi.stubGlobal("matchMedia", () => ({ matches: false }));
vi.stubGlobal("CSS", { supports: () => true });

let sent: string[];

beforeAll(async () => {
  customElements.define("streaming-chat-composer", (await import("../src/composer.ts")).Composer);
});

afterEach(() => {
  document.body.replaceChildren();
  sessionStorage.clear();
});

async function written(text: string, maxChars: number): Promise<Composer> {
  sent = [];
  const composer = document.createElement("streaming-chat-composer") as Composer;
  Object.assign(composer, { strings: STRINGS, draftKey: "draft", maxChars, onsend: (text: string) => sent.push(text) > 0 });
  document.body.append(composer);
  composer.insert(text);
  await composer.updateComplete;
  return composer;
}

const counter = (composer: Composer) => composer.querySelector(".counter")?.textContent ?? null;

function enter(composer: Composer): string[] {
  composer.querySelector("textarea")!.dispatchEvent(new KeyboardEvent("keydown", { key: "Enter", cancelable: true }));
  return sent;
}

describe("the length of a prompt", () => {
  it.each([
    ["letters", "a"],
    ["Chinese", "好"],
    ["an emoji", "👋"],
    ["a letter of an old script", "𐎀"],
  ])("is counted in characters: %s", async (_name, character) => {
    const some = await written(character.repeat(8), 10);
    expect(counter(some)).toBeNull();
    expect(enter(some)).toEqual([character.repeat(8)]);
    const full = await written(character.repeat(10), 10);
    expect(counter(full)).toBe("0 characters left");
    expect(enter(full)).toEqual([character.repeat(10)]);
    const over = await written(character.repeat(11), 10);
    expect(counter(over)).toBe("1 characters too many");
    expect(enter(over)).toEqual([]);
  });
});
