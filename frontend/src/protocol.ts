// Written by generate.py from the Python definitions. Do not edit.

export const PROTOCOL_VERSION = 1;

/** A content block as the API has it; unknown types are kept as they came. */
export interface Block {
  type?: string;
  [field: string]: unknown;
}

export type TurnStatus = "queued" | "running" | "completed" | "stopped" | "timed_out" | "failed" | "interrupted";

/** Begin block ``index``, which must be the next one, with the content ``block``. */
export interface Start {
  op: "start";
  index: number;
  block: Block;
}

/** Append ``text`` to the string ``field`` of block ``index``; a missing field counts as empty. */
export interface Append {
  op: "append";
  index: number;
  field: string;
  text: string;
}

/** Append ``value`` to the list ``field`` of block ``index``; a missing or null field counts as empty. */
export interface Push {
  op: "push";
  index: number;
  field: string;
  value: unknown;
}

/** Set ``fields`` of block ``index``; a null removes the field (RFC 7396, one level). */
export interface Merge {
  op: "merge";
  index: number;
  fields: Block;
}

/** Why something did not work: a stable code and a translated sentence. */
export interface ErrorForm {
  code: string;
  detail: string;
}

/** Tokens of a turn, summed over its provider requests. ``exact`` is false when the stream was cut. */
export interface UsageForm {
  exact: boolean;
  input_tokens: number;
  output_tokens: number;
  cache_creation_input_tokens: number;
  cache_read_input_tokens: number;
}

/** A turn as every transport shows it. Times are seconds since it was queued; None: not yet. */
export interface TurnForm {
  id: string;
  prompt_id: string;
  reply_id: string;
  status: "queued" | "running" | "completed" | "stopped" | "timed_out" | "failed" | "interrupted";
  stop_reason: string;
  error: ErrorForm | null;
  provider: string;
  model: string;
  seq: number;
  elapsed_seconds: number;
  first_text_seconds: number | null;
  usage: UsageForm | null;
}

/** A message as every transport shows it. ``turn`` is the one that made it; None for a user's message. */
export interface MessageForm {
  id: string;
  parent_id: string | null;
  role: "user" | "assistant";
  author: string | null;
  client_id: string | null;
  blocks: Block[];
  turn: TurnForm | null;
  created_at: string;
}

/** A conversation without its messages. ``role`` is what the asking user may do. */
export interface ConversationForm {
  id: string;
  title: string;
  model: string;
  role: "owner" | "editor" | "viewer";
  archived: boolean;
  running: boolean;
  created_at: string;
  updated_at: string;
}

/** The whole state: what a viewer shows instead of all it had. */
export interface Snapshot {
  type: "snapshot";
  protocol: number;
  revision: number;
  conversation: ConversationForm;
  messages: MessageForm[];
  has_earlier: boolean;
  turn: TurnForm | null;
}

/** A turn was accepted. ``messages`` are new; they follow their parent and replace what followed it before. */
export interface TurnEvent {
  type: "turn";
  revision: number;
  title: string;
  turn: TurnForm;
  messages: MessageForm[];
}

/** Journal entries ``first`` to ``seq`` of the turn: fold ``ops`` into the reply's blocks. */
export interface Delta {
  type: "delta";
  turn: string;
  first: number;
  seq: number;
  ops: Op[];
}

/** The turn is over; ``turn.status`` says how and ``turn.seq`` is its last entry. */
export interface Finished {
  type: "finished";
  revision: number;
  turn: TurnForm;
}

/** The conversation was renamed, archived or brought back. */
export interface ConversationEvent {
  type: "conversation";
  revision: number;
  title: string;
  archived: boolean;
}

/** Nothing streams, but the turn is alive. ``activity`` says what it waits for. */
export interface Progress {
  type: "progress";
  turn: string;
  elapsed_seconds: number;
  activity: "queued" | "waiting" | "thinking" | "tool" | "writing";
}

/** The command ``ref`` was carried out and committed. ``duplicate``: it had been before. */
export interface Accepted {
  type: "accepted";
  ref: string | null;
  turn: string | null;
  message: string | null;
  duplicate: boolean;
}

/** The command ``ref`` was refused; nothing changed. */
export interface Problem {
  type: "error";
  ref: string | null;
  code: string;
  detail: string;
  field?: string;
  retry_after_seconds?: number;
}

/** The answer to ``ping``. */
export interface Pong {
  type: "pong";
  ref: string | null;
}

/** The conversation is gone, or no longer for this user. The last event. */
export interface Deleted {
  type: "deleted";
}

/** The process is about to stop: come back after a random delay up to ``within_seconds``. */
export interface Reconnect {
  type: "reconnect";
  within_seconds: number;
}

/** Store a prompt and start a turn that answers it. */
export interface Send {
  ref?: string | null;
  type: "send";
  client_id: string;
  text: string;
  parent_id?: string | "root" | null;
}

/** Answer the prompt of ``message_id`` (an assistant message) once more, in a branch of its own. */
export interface Regenerate {
  ref?: string | null;
  type: "regenerate";
  message_id: string;
  client_id: string;
}

/** Stop ``turn_id``, keeping its text; None stops whatever runs. Stopping a finished turn changes nothing. */
export interface Stop {
  ref?: string | null;
  type: "stop";
  turn_id?: string | null;
}

/** Continue after ``cursor``; what it lacks is sent, or a snapshot where that can't be told. */
export interface Resume {
  ref?: string | null;
  type: "resume";
  cursor?: string | null;
}

/** Everything up to ``seq`` of the turn has been shown; the server may send more. */
export interface Ack {
  ref?: string | null;
  type: "ack";
  turn_id: string;
  seq: number;
}

/** Ask for a ``pong``. */
export interface Ping {
  ref?: string | null;
  type: "ping";
}

export type Op = Start | Append | Push | Merge;

export type ChatEvent = Snapshot | TurnEvent | Delta | Finished | ConversationEvent | Progress | Accepted | Problem | Pong | Deleted | Reconnect;

export type Command = Send | Regenerate | Stop | Resume | Ack | Ping;
