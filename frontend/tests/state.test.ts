import { describe, expect, it } from "vitest";
import fixtures from "../../tests/fixtures/cursor.json";
import type { ChatEvent, MessageForm, Op } from "../src/protocol.ts";
import { accept, EMPTY, fold, jump, prepend, reduce, textOf, token, type Cursor, type Numbered } from "../src/state.ts";
import { messageForm, snapshotOf, turnEvent, turnForm } from "./forms.ts";

interface Step {
  event: Numbered | { type: "snapshot"; revision: number; turn: string; seq: number };
  verdict: string;
}
const cursorOf = (form: { revision: number; turn: string; seq: number; past_turn?: string }): Cursor => ({
  revision: form.revision, turn: form.turn, seq: form.seq, pastTurn: form.past_turn ?? "",
});

describe("the gap rule, by the cases that Python's Cursor is tested with, too", () => {
  it.each(fixtures.cases)("$name", ({ start, steps, end }) => {
    let cursor = cursorOf(start);
    for (const { event, verdict } of steps as unknown as Step[]) {
      if (event.type === "snapshot") {
        cursor = jump(cursor, event.revision, event.turn, event.seq);
        continue;
      }
      const [given, next] = accept(cursor, event);
      expect(given).toBe(verdict);
      cursor = next;
    }
    expect(cursor).toEqual(cursorOf(end));
  });

  it.each(fixtures.tokens)("$token", ({ cursor, token: expected }) => {
    expect(token(cursorOf(cursor))).toBe(expected);
  });
});

// ------------------------------------------------------------------------------------------------ reducer

function run(events: ChatEvent[], state = EMPTY) {
  for (const event of events) {
    const [verdict, next] = reduce(state, event, 1000);
    expect(verdict).toBe("apply");
    state = next;
  }
  return state;
}

const START: Op = { op: "start", index: 0, block: { type: "text", text: "" } };
const append = (text: string): Op => ({ op: "append", index: 0, field: "text", text });
const ids = (state: { messages: readonly MessageForm[] }) => state.messages.map((message) => message.id);

describe("reduce", () => {
  it("follows a turn from its prompt to its end", () => {
    const state = run([
      snapshotOf(),
      turnEvent(1, "a", null),
      { type: "progress", turn: "a", elapsed_seconds: 2, activity: "waiting" },
      { type: "delta", turn: "a", first: 1, seq: 1, ops: [START, append("Hel")] },
      { type: "delta", turn: "a", first: 2, seq: 4, ops: [append("lo")] },
      { type: "finished", revision: 2, turn: turnForm("a", { status: "completed", seq: 4, elapsed_seconds: 3 }) },
    ]);
    expect(ids(state)).toEqual(["a-prompt", "a-reply"]);
    expect(textOf(state.messages[1]!.blocks)).toBe("Hello");
    expect(state.messages[1]!.turn?.status).toBe("completed");
    expect(state.conversation).toMatchObject({ title: "Title", running: false });
    expect(state.activity).toBeNull();
  });

  it("says what a silent turn waits for, and since when, until text comes", () => {
    const waiting = run([snapshotOf(), turnEvent(1, "a", null), { type: "progress", turn: "a", elapsed_seconds: 0.4, activity: "tool" }]);
    expect(waiting.activity).toBe("tool");
    expect(waiting.queuedAtMs).toBe(600);
    expect(run([{ type: "delta", turn: "a", first: 1, seq: 1, ops: [START] }], waiting).activity).toBeNull();
  });

  it("ignores the progress of another turn, and of one that is over", () => {
    const over = run([
      snapshotOf(), turnEvent(1, "a", null),
      { type: "finished", revision: 2, turn: turnForm("a", { status: "stopped" }) },
    ]);
    for (const turn of ["a", "b"]) {
      expect(reduce(over, { type: "progress", turn, elapsed_seconds: 1, activity: "waiting" }, 0)).toEqual(["drop", over]);
    }
  });

  it("replaces what followed the parent: a branch", () => {
    const before = run([
      snapshotOf(), turnEvent(1, "a", null), { type: "finished", revision: 2, turn: turnForm("a", { status: "completed" }) },
      turnEvent(3, "b", "a-reply"), { type: "finished", revision: 4, turn: turnForm("b", { status: "completed" }) },
    ]);
    expect(ids(before)).toEqual(["a-prompt", "a-reply", "b-prompt", "b-reply"]);
    expect(ids(run([turnEvent(5, "c", "a-reply")], before))).toEqual(["a-prompt", "a-reply", "c-prompt", "c-reply"]);
    expect(ids(run([turnEvent(5, "d", null)], before))).toEqual(["d-prompt", "d-reply"]);
    expect(reduce(before, turnEvent(5, "e", "unknown"), 0)).toEqual(["gap", before]);
  });

  it("leaves the state alone at a gap, and where operations do not fit", () => {
    const state = run([snapshotOf(), turnEvent(1, "a", null)]);
    expect(reduce(state, { type: "delta", turn: "a", first: 2, seq: 2, ops: [START] }, 0)).toEqual(["gap", state]);
    expect(reduce(state, { type: "delta", turn: "a", first: 1, seq: 1, ops: [append("x")] }, 0)).toEqual(["gap", state]);
    expect(reduce(EMPTY, turnEvent(1, "a", null), 0)).toEqual(["gap", EMPTY]);
  });

  it("keeps message objects that did not change, so that nothing is drawn again", () => {
    const before = run([snapshotOf({ revision: 3, messages: [messageForm("1", null), messageForm("2", "1")] })]);
    const after = run([snapshotOf({ revision: 5, messages: [messageForm("1", null), messageForm("2", "1", { author: "bob" })] })], before);
    expect(after.messages[0]).toBe(before.messages[0]);
    expect(after.messages[1]).not.toBe(before.messages[1]);
  });

  it("keeps earlier messages over a snapshot while the branch goes through them", () => {
    const page = run([snapshotOf({ revision: 3, has_earlier: true, messages: [messageForm("3", "2"), messageForm("4", "3")] })]);
    const all = prepend(page, { items: [messageForm("1", null), messageForm("2", "1")], has_earlier: false });
    expect(ids(all)).toEqual(["1", "2", "3", "4"]);
    const later = snapshotOf({ revision: 9, has_earlier: true, messages: [messageForm("4", "3"), messageForm("5", "4")] });
    const joined = run([later], all);
    expect(ids(joined)).toEqual(["1", "2", "3", "4", "5"]);
    expect(joined.hasEarlier).toBe(false);
    const elsewhere = run([snapshotOf({ revision: 9, has_earlier: true, messages: [messageForm("8", "7")] })], all);
    expect(ids(elsewhere)).toEqual(["8"]);
    expect(elsewhere.hasEarlier).toBe(true);
  });

  it("leaves out a page that does not fit", () => {
    const page = run([snapshotOf({ messages: [messageForm("3", "2")] })]);
    expect(prepend(page, { items: [messageForm("9", null)], has_earlier: false })).toBe(page);
  });

  it("joins in the middle of a turn at any entry and ends with the same blocks", () => {
    const words = ["Ein ", "Fluß, ", "ein 👩‍👩‍👧 ", "und\u2028", "e\u0301 ", "עברית."];
    const ops: Op[][] = [[START], ...words.map((word) => [append(word)])];
    const whole = fold([], ops.flat());
    for (let joined = 0; joined <= ops.length; joined += 1) {
      const reply = messageForm("a-reply", "a-prompt", { role: "assistant", blocks: fold([], ops.slice(0, joined).flat())! });
      const turn = turnForm("a", { status: "running", seq: joined });
      const deltas = ops.slice(joined).map((each, index): ChatEvent => ({
        type: "delta", turn: "a", first: joined + index + 1, seq: joined + index + 1, ops: each,
      }));
      const state = run([snapshotOf({ revision: 1, messages: [messageForm("a-prompt", null), reply], turn }), ...deltas]);
      expect(state.messages[1]!.blocks).toEqual(whole);
    }
  });
});

describe("fold", () => {
  it("knows all four operations, and changes nothing it was given", () => {
    const before = [{ type: "tool_use", id: "t", input: {}, partial_json: "{" }];
    const frozen = JSON.stringify(before);
    const after = fold(before, [
      { op: "append", index: 0, field: "partial_json", text: "}" },
      { op: "push", index: 0, field: "seen", value: 1 },
      { op: "push", index: 0, field: "seen", value: 2 },
      { op: "merge", index: 0, fields: { input: { a: 1 }, partial_json: null } },
      { op: "start", index: 1, block: { type: "text", text: "x" } },
      { op: "append", index: 1, field: "extra", text: "y" },
    ]);
    expect(after).toEqual([{ type: "tool_use", id: "t", input: { a: 1 }, seen: [1, 2] }, { type: "text", text: "x", extra: "y" }]);
    expect(JSON.stringify(before)).toBe(frozen);
  });

  it.each<Op>([
    { op: "start", index: 1, block: {} },
    { op: "append", index: 0, field: "text", text: "x" },
    { op: "push", index: 3, field: "text", value: "x" },
  ])("refuses what does not fit: %o", (op) => {
    expect(fold([], [op])).toBeNull();
  });

  it("joins neighbouring texts and separates others", () => {
    const text = (words: string) => ({ type: "text", text: words });
    expect(textOf([text("a"), text("b"), { type: "tool_use" }, text("c"), text("")])).toBe("ab\n\nc");
  });
});
