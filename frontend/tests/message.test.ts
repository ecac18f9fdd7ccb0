import { describe, expect, it } from "vitest";
import { endingOf } from "../src/message.ts";
import type { TurnForm } from "../src/protocol.ts";
import { STRINGS } from "../src/strings.ts";
import { turnForm } from "./forms.ts";

const TEXT = [{ type: "text", text: "Words" }];
const end = (change: Partial<TurnForm>, blocks = TEXT) => endingOf(turnForm("a", change), blocks, STRINGS);

describe("the end of a reply", () => {
  it.each([
    ["max_tokens", "The reply reached its length limit."],
    ["model_context_window_exceeded", "The conversation has become too long for the assistant."],
    ["pause_turn", "The assistant paused here. Ask it to go on."],
    ["refusal", "The assistant declined to answer this."],
  ])("has words for %s, with text and without", (stop_reason, sentence) => {
    expect(end({ status: "completed", stop_reason })).toEqual({ sentence, bad: false });
    expect(end({ status: "completed", stop_reason }, [])).toEqual({ sentence, bad: false });
  });

  it.each(["end_turn", "stop_sequence", "reason_of_tomorrow"])("needs none for %s, unless there is no text", (stop_reason) => {
    expect(end({ status: "completed", stop_reason })).toBeNull();
    expect(end({ status: "completed", stop_reason }, [])).toEqual({ sentence: STRINGS.empty, bad: false });
  });

  it("has the server's words, or ours, for what went wrong", () => {
    expect(end({ status: "failed", error: { code: "x", detail: "Why." } })).toEqual({ sentence: "Why.", bad: true });
    for (const status of ["failed", "timed_out", "interrupted"] as const) {
      expect(end({ status })).toEqual({ sentence: STRINGS[status], bad: true });
    }
    expect(end({ status: "stopped" })).toEqual({ sentence: STRINGS.stopped, bad: false });
  });

  it("has not come while the turn runs", () => {
    expect(end({ status: "running" }, [])).toBeNull();
    expect(end({ status: "queued" }, [])).toBeNull();
    expect(endingOf(null, [], STRINGS)).toBeNull();
  });
});
