/** What a server sends, as short as a test wants it. */

import type { ChatEvent, MessageForm, Snapshot, TurnForm } from "../src/protocol.ts";

export const turnForm = (id: string, change: Partial<TurnForm> = {}): TurnForm => ({
  id, prompt_id: `${id}-prompt`, reply_id: `${id}-reply`, status: "queued", stop_reason: "", error: null, provider: "demo",
  model: "demo", seq: 0, elapsed_seconds: 0, first_text_seconds: null, usage: null, ...change,
});
export const messageForm = (id: string, parent: string | null, change: Partial<MessageForm> = {}): MessageForm => ({
  id, parent_id: parent, role: "user", author: "ada", client_id: null, blocks: [{ type: "text", text: id }], turn: null,
  created_at: "2026-01-01T00:00:00Z", ...change,
});
export const snapshotOf = (change: Partial<Snapshot> = {}): Snapshot => ({
  type: "snapshot", protocol: 1, revision: 0, messages: [], has_earlier: false, turn: null,
  conversation: {
    id: "c", title: "", model: "", role: "owner", archived: false, running: false, created_at: "", updated_at: "",
  },
  ...change,
});
export const turnEvent = (revision: number, id: string, parent: string | null, clientId: string | null = null): ChatEvent => ({
  type: "turn", revision, title: "Title", turn: turnForm(id),
  messages: [
    messageForm(`${id}-prompt`, parent, { client_id: clientId }),
    messageForm(`${id}-reply`, `${id}-prompt`, { role: "assistant", blocks: [], turn: turnForm(id) }),
  ],
});
