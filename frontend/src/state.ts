/**
 * What a viewer knows of one conversation, and how each event changes it. Pure: no clock, no network, no DOM.
 *
 * The rule of the numbers is the one of Python's `Cursor`; both are tested with tests/fixtures/cursor.json.
 */

import type { Block, ChatEvent, ConversationForm, MessageForm, Op, Snapshot, TurnForm } from "./protocol.ts";

export type Verdict = "apply" | "drop" | "gap";

/** How far a viewer has come. `turn` is empty as long as the branch has none. */
export interface Cursor {
  readonly revision: number;
  readonly turn: string;
  readonly seq: number;
  readonly pastTurn: string;
}

export const START: Cursor = { revision: 0, turn: "", seq: 0, pastTurn: "" };

/** The parts of an event that the rule looks at. */
export type Numbered =
  | { type: "delta"; turn: string; first: number; seq: number }
  | { type: "turn"; revision: number; turn: { id: string } }
  | { type: "finished"; revision: number; turn: { id: string; seq: number } }
  | { type: "conversation"; revision: number };

/** Whether `event` is the next one; and where the cursor stands afterwards. */
export function accept(cursor: Cursor, event: Numbered): [Verdict, Cursor] {
  if (event.type === "delta") {
    if (event.turn !== cursor.turn) return [event.turn === cursor.pastTurn ? "drop" : "gap", cursor];
    if (event.seq <= cursor.seq) return ["drop", cursor];
    if (event.first !== cursor.seq + 1) return ["gap", cursor];
    return ["apply", { ...cursor, seq: event.seq }];
  }
  if (event.revision <= cursor.revision) return ["drop", cursor];
  if (event.revision !== cursor.revision + 1) return ["gap", cursor];
  if (event.type === "finished" && (event.turn.id !== cursor.turn || event.turn.seq !== cursor.seq)) {
    return ["gap", cursor];
  }
  const next = { ...cursor, revision: event.revision };
  if (event.type !== "turn") return ["apply", next];
  return ["apply", { ...next, pastTurn: cursor.turn, turn: event.turn.id, seq: 0 }];
}

/** Where a snapshot brings the viewer. */
export function jump(cursor: Cursor, revision: number, turn: string, seq: number): Cursor {
  return { revision, turn, seq, pastTurn: turn === cursor.turn ? cursor.pastTurn : cursor.turn };
}

/** The cursor as `resume` and `?after=` take it. */
export function token(cursor: Cursor): string {
  return `${cursor.revision}.${cursor.turn || "-"}.${cursor.seq}`;
}

/** What a turn waits for while nothing streams. */
export type Activity = "queued" | "waiting" | "thinking" | "tool" | "writing";

export interface ConversationState {
  readonly cursor: Cursor;
  /** Null until the first snapshot. */
  readonly conversation: ConversationForm | null;
  /** The last messages of the current branch, oldest first. A message that did not change stays the same object. */
  readonly messages: readonly MessageForm[];
  readonly hasEarlier: boolean;
  /** The branch's latest turn. */
  readonly turn: TurnForm | null;
  /** Null while text arrives and when no turn runs. */
  readonly activity: Activity | null;
  /** When the latest turn was queued, by the clock that `reduce` is given. */
  readonly queuedAtMs: number;
  readonly deleted: boolean;
}

export const EMPTY: ConversationState = {
  cursor: START,
  conversation: null,
  messages: [],
  hasEarlier: false,
  turn: null,
  activity: null,
  queuedAtMs: 0,
  deleted: false,
};

/** Whether a turn is queued or running. */
export function isActive(turn: TurnForm | null): boolean {
  return turn !== null && (turn.status === "queued" || turn.status === "running");
}

/**
 * Apply one event.
 *
 * @param nowMs any clock that only goes forward
 * @returns `gap` if something is missing: the state is unchanged and must be read again
 */
export function reduce(state: ConversationState, event: ChatEvent, nowMs: number): [Verdict, ConversationState] {
  switch (event.type) {
    case "snapshot":
      return ["apply", fromSnapshot(state, event, nowMs)];
    case "progress":
      if (event.turn !== state.cursor.turn || !isActive(state.turn)) return ["drop", state];
      return ["apply", { ...state, activity: event.activity, queuedAtMs: nowMs - event.elapsed_seconds * 1000 }];
    case "deleted":
      return ["apply", { ...state, deleted: true, activity: null }];
    case "delta":
    case "turn":
    case "finished":
    case "conversation":
      return applyNumbered(state, event, nowMs);
    default:
      return ["drop", state];
  }
}

function applyNumbered(
  state: ConversationState,
  event: Extract<ChatEvent, Numbered>,
  nowMs: number,
): [Verdict, ConversationState] {
  const [verdict, cursor] = accept(state.cursor, event);
  if (verdict !== "apply" || state.conversation === null) return [verdict === "apply" ? "gap" : verdict, state];
  const conversation = state.conversation;
  switch (event.type) {
    case "delta": {
      const turn = state.turn;
      const reply = state.messages.at(-1);
      if (turn === null || reply?.id !== turn.reply_id) return ["gap", state];
      const blocks = fold(reply.blocks, event.ops);
      if (blocks === null) return ["gap", state];
      const messages = [...state.messages.slice(0, -1), { ...reply, blocks }];
      const running: TurnForm = { ...turn, status: "running", seq: event.seq };
      return ["apply", { ...state, cursor, messages, turn: running, activity: null }];
    }
    case "turn": {
      const parent = event.messages[0]?.parent_id ?? null;
      const kept = parent === null ? 0 : state.messages.findIndex((message) => message.id === parent) + 1;
      if (parent !== null && kept === 0) return ["gap", state];
      return [
        "apply",
        {
          ...state,
          cursor,
          messages: [...state.messages.slice(0, kept), ...event.messages],
          hasEarlier: parent !== null && state.hasEarlier,
          turn: event.turn,
          activity: "queued",
          queuedAtMs: nowMs - event.turn.elapsed_seconds * 1000,
          conversation: { ...conversation, title: event.title, running: true },
        },
      ];
    }
    case "finished": {
      const messages = state.messages.map((message) =>
        message.id === event.turn.reply_id ? { ...message, turn: event.turn } : message,
      );
      const done = { ...conversation, running: false };
      return ["apply", { ...state, cursor, messages, turn: event.turn, activity: null, conversation: done }];
    }
    case "conversation": {
      const renamed = { ...conversation, title: event.title, archived: event.archived };
      return ["apply", { ...state, cursor, conversation: renamed }];
    }
  }
}

function fromSnapshot(state: ConversationState, event: Snapshot, nowMs: number): ConversationState {
  const { turn } = event;
  const known = new Map(state.messages.map((message) => [message.id, message]));
  const messages = event.messages.map((message) => {
    const old = known.get(message.id);
    return old !== undefined && JSON.stringify(old) === JSON.stringify(message) ? old : message;
  });
  // Earlier messages that were loaded before stay, as long as the branch still goes through them.
  const join = state.messages.findIndex((message) => message.id === event.messages[0]?.parent_id) + 1;
  return {
    cursor: jump(state.cursor, event.revision, turn?.id ?? "", turn?.seq ?? 0),
    conversation: event.conversation,
    messages: [...state.messages.slice(0, join), ...messages],
    hasEarlier: join > 0 ? state.hasEarlier : event.has_earlier,
    turn,
    activity: isActive(turn) ? (turn?.status === "queued" ? "queued" : "waiting") : null,
    queuedAtMs: turn === null ? 0 : nowMs - turn.elapsed_seconds * 1000,
    deleted: false,
  };
}

/** The state with a page of earlier messages in front. A page that does not fit is left out. */
export function prepend(
  state: ConversationState,
  page: { items: readonly MessageForm[]; has_earlier: boolean },
): ConversationState {
  const first = state.messages[0];
  if (first === undefined || page.items.at(-1)?.id !== first.parent_id) return state;
  return { ...state, messages: [...page.items, ...state.messages], hasEarlier: page.has_earlier };
}

/** The blocks that `ops` make of `blocks`, which stay as they are; null if an operation does not fit. */
export function fold(blocks: readonly Block[], ops: readonly Op[]): Block[] | null {
  const result = [...blocks];
  for (const op of ops) {
    if (op.op === "start") {
      if (op.index !== result.length) return null;
      result.push(op.block);
      continue;
    }
    const block = result[op.index];
    if (block === undefined) return null;
    if (op.op === "append") {
      const before = block[op.field] || "";
      if (typeof before !== "string") return null;
      result[op.index] = { ...block, [op.field]: before + op.text };
    } else if (op.op === "push") {
      const before = block[op.field] || [];
      if (!Array.isArray(before)) return null;
      result[op.index] = { ...block, [op.field]: [...(before as unknown[]), op.value] };
    } else {
      const merged: Block = { ...block };
      for (const [field, value] of Object.entries(op.fields)) {
        if (value === null) delete merged[field];
        else merged[field] = value;
      }
      result[op.index] = merged;
    }
  }
  return result;
}

/** The words of a message: neighbouring text blocks as they are, a paragraph where other blocks lie between. */
export function textOf(blocks: readonly Block[]): string {
  let text = "";
  let afterText = false;
  for (const block of blocks) {
    const isText = block.type === "text" && typeof block["text"] === "string";
    if (isText && block["text"]) text += (text && !afterText ? "\n\n" : "") + (block["text"] as string);
    afterText = isText;
  }
  return text;
}
