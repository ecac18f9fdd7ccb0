import { afterEach, beforeEach, describe, expect, it, vi } from "vitest";
import { ACK_DELTAS, ChatClient, UNCONFIRMED_MS, type ClientOptions } from "../src/client.ts";
import type { ChatEvent, Command } from "../src/protocol.ts";
import type { Listener, Opener } from "../src/transport.ts";
import { snapshotOf, turnEvent, turnForm } from "./forms.ts";

/** The server's end of a connection, played by the test. */
class Line {
  readonly commands: Command[] = [];
  closed = false;
  constructor(readonly kind: "socket" | "events", readonly url: string, private readonly listener: Listener) {}
  say(...events: ChatEvent[]): void {
    for (const event of events) this.listener.event(event);
  }
  drop(code = 1006): void {
    this.listener.over(code);
  }
  sent<T extends Command["type"]>(type: T): Extract<Command, { type: T }>[] {
    return this.commands.filter((command): command is Extract<Command, { type: T }> => command.type === type);
  }
}

let lines: Line[];
let storage: Map<string, string>;
let answer: (path: string, body: unknown) => [number, unknown];
const requests: [string, unknown][] = [];
const line = () => lines.at(-1)!;

const open = (kind: "socket" | "events"): Opener => (url, listener) => {
  const made = new Line(kind, url, listener);
  lines.push(made);
  return {
    kind,
    send: (command) => void made.commands.push(command),
    close: () => void (made.closed = true),
  };
};

function client(options: Partial<ClientOptions> = {}): ChatClient {
  const made = new ChatClient({
    endpoint: "https://site.example/chat/",
    conversation: "c",
    csrfToken: () => "token",
    random: () => 0.5,
    storage: {
      getItem: (key) => storage.get(key) ?? null,
      setItem: (key, value) => void storage.set(key, value),
      removeItem: (key) => void storage.delete(key),
    },
    openSocket: open("socket"),
    openEvents: open("events"),
    ...options,
  });
  made.connect();
  return made;
}

beforeEach(() => {
  vi.useFakeTimers({ now: 1_000_000 });
  lines = [];
  storage = new Map();
  requests.length = 0;
  answer = () => [200, { id: "c" }];
  vi.stubGlobal("fetch", async (url: string, init: { body: string | null }) => {
    const path = url.replace("https://site.example/chat/api/", "");
    requests.push([path, init.body && JSON.parse(init.body)]);
    const [status, body] = answer(path, init.body);
    if (status === 0) throw new TypeError("unreachable");
    return new Response(JSON.stringify(body), { status });
  });
});

afterEach(() => {
  vi.useRealTimers();
  vi.unstubAllGlobals();
});

describe("connecting", () => {
  it("asks for everything, or for what came since the page was rendered", () => {
    client();
    expect(line().url).toBe("https://site.example/chat/conversations/c/socket/");
    client({ snapshot: snapshotOf({ revision: 7 }) });
    expect(line().url).toBe("https://site.example/chat/conversations/c/socket/?after=7.-.0");
  });

  it("comes back after random, growing delays, for ever, with its cursor", async () => {
    answer = () => [0, null];
    const chat = client();
    line().say(snapshotOf({ revision: 2 }));
    expect(chat.state.connection).toBe("open");
    line().drop();
    expect(chat.state.connection).toBe("waiting");
    const delays: number[] = [];
    for (let attempt = 0; attempt < 9; attempt += 1) {
      const count = lines.length;
      const before = Date.now();
      while (lines.length === count) await vi.advanceTimersByTimeAsync(50);
      delays.push(Date.now() - before);
      expect(line().url).toContain("?after=2.-.0");
      line().drop();
    }
    expect(delays).toEqual([150, 500, 1000, 2000, 4000, 7500, 7500, 7500, 7500]);
  });

  it("ignores what an old connection still says", async () => {
    const chat = client();
    const old = line();
    old.say(snapshotOf());
    old.drop();
    await vi.advanceTimersByTimeAsync(300);
    old.say(turnEvent(1, "a", null));
    old.drop();
    expect(chat.state.turn).toBeNull();
    expect(lines).toHaveLength(2);
  });

  it("changes to events when sockets do not get through although the site answers", async () => {
    client();
    await vi.advanceTimersByTimeAsync(4_000);
    expect(line().closed).toBe(true);
    await vi.advanceTimersByTimeAsync(500);
    expect(lines.map(({ kind }) => kind)).toEqual(["socket", "socket"]);
    line().drop();
    await vi.advanceTimersByTimeAsync(1_000);
    expect(line().kind).toBe("events");
    expect(line().url).toBe("https://site.example/chat/api/conversations/c/events");
    client();
    expect(line().kind).toBe("events");
    vi.setSystemTime(Date.now() + 3_600_000);
    client();
    expect(line().kind).toBe("socket");
  });

  it("keeps to sockets while the whole site is away", async () => {
    answer = () => [0, null];
    client();
    for (let attempt = 0; attempt < 5; attempt += 1) {
      line().drop();
      await vi.advanceTimersByTimeAsync(15_000);
    }
    expect(new Set(lines.map(({ kind }) => kind))).toEqual(new Set(["socket"]));
  });

  it.each([
    [4401, "signed_out"],
    [4404, "gone"],
  ])("stays away after close code %d", async (code, connection) => {
    const chat = client();
    line().drop(code);
    expect(chat.state.connection).toBe(connection);
    await vi.advanceTimersByTimeAsync(60_000);
    expect(lines).toHaveLength(1);
  });

  it("asks over HTTP when a socket is refused without a word", async () => {
    answer = () => [401, { error: { code: "signed_out", detail: "Please sign in again." } }];
    const chat = client();
    line().drop();
    await vi.advanceTimersByTimeAsync(0);
    expect(chat.state.connection).toBe("signed_out");
    chat.wake();
    expect(lines).toHaveLength(2);
  });

  it("replaces a socket that has gone silent and does not answer", async () => {
    client();
    line().say(snapshotOf());
    await vi.advanceTimersByTimeAsync(26_000);
    expect(line().sent("ping")).toHaveLength(1);
    line().say({ type: "pong", ref: null });
    await vi.advanceTimersByTimeAsync(26_000);
    expect(line().sent("ping")).toHaveLength(2);
    await vi.advanceTimersByTimeAsync(5_000);
    expect(lines).toHaveLength(2);
  });

  it("finds out at once when the tab comes back", async () => {
    const chat = client();
    line().say(snapshotOf());
    chat.wake();
    expect(line().sent("ping")).toHaveLength(1);
    await vi.advanceTimersByTimeAsync(4_500);
    expect(lines).toHaveLength(2);
  });

  it("comes back when the server is about to restart", async () => {
    client();
    line().say(snapshotOf(), { type: "reconnect", within_seconds: 4 });
    await vi.advanceTimersByTimeAsync(1_900);
    expect(lines).toHaveLength(1);
    await vi.advanceTimersByTimeAsync(200);
    expect(lines).toHaveLength(2);
  });
});

describe("a server that sends us away", () => {
  const restart: ChatEvent = { type: "reconnect", within_seconds: 4 };
  const crowd: ChatEvent = { type: "error", ref: null, code: "rate_limited", detail: "Too many requests." };
  /** How long it takes until the next connection is tried. */
  const delay = async (): Promise<number> => {
    const [count, before] = [lines.length, Date.now()];
    while (lines.length === count) await vi.advanceTimersByTimeAsync(50);
    return Date.now() - before;
  };

  it.each([0.05, 0.25, 0.5, 0.95])("is left for a share of the time it asked for, also when it closes at once: %d", async (random) => {
    client({ random: () => random });
    line().say(snapshotOf(), restart);
    line().drop(4503);
    expect(await delay()).toBe(random * 4_000);
  });

  it("is left for that time although the connection breaks before it is closed", async () => {
    const chat = client();
    line().say(snapshotOf(), restart);
    line().drop(1006);
    expect(chat.state.connection).toBe("waiting");
    expect(await delay()).toBe(2_000);
  });

  it("is no reason to give up sockets, with or without a word before it closes", async () => {
    const chat = client();
    const seen: string[] = [];
    chat.subscribe(({ connection }) => void seen.push(connection));
    for (let attempt = 0; attempt < 4; attempt += 1) {
      line().say(restart);
      line().drop(4503);
      expect(await delay()).toBe(2_000);
      line().drop(4503);
      await delay();
    }
    expect(new Set(lines.map(({ kind }) => kind))).toEqual(new Set(["socket"]));
    expect(storage.size).toBe(0);
    expect(requests).toEqual([]);
    expect(new Set(seen)).toEqual(new Set(["waiting", "connecting"]));
  });

  it("is tried at once when somebody asks for that, and not a second time", async () => {
    const chat = client();
    line().say(snapshotOf(), restart);
    line().drop(4503);
    chat.wake();
    expect(lines).toHaveLength(2);
    line().say({ type: "pong", ref: null });
    await vi.advanceTimersByTimeAsync(10_000);
    expect(lines).toHaveLength(2);
    chat.close();
    await vi.advanceTimersByTimeAsync(60_000);
    expect(lines).toHaveLength(2);
  });

  it("is spared by one window too many, which says so and is never open in between", async () => {
    const chat = client({ random: () => 0 });
    const seen: string[] = [];
    chat.subscribe(({ connection }) => void seen.push(connection));
    for (let attempt = 0; attempt < 3; attempt += 1) {
      line().say(crowd);
      line().drop(4429);
      expect(chat.state).toMatchObject({ connection: "waiting", crowded: true, problem: null });
      expect(await delay()).toBe(30_000);
      expect(chat.state).toMatchObject({ connection: "connecting", crowded: true });
    }
    expect(new Set(seen)).toEqual(new Set(["waiting", "connecting"]));
    expect(requests).toEqual([]);
    line().say(snapshotOf());
    expect(chat.state).toMatchObject({ connection: "open", crowded: false });
  });

  it("is given longer when it says so", async () => {
    client();
    line().say({ ...crowd, retry_after_seconds: 40 });
    line().drop(4429);
    expect(await delay()).toBe(50_000);
    line().drop(4429);
    expect(await delay()).toBe(37_500);
  });

  it("is spared also when it took offence at our commands, which are not too many windows", async () => {
    const chat = client({ random: () => 0 });
    line().say(snapshotOf(), crowd);
    line().drop(4429);
    expect(chat.state).toMatchObject({ crowded: false, problem: { code: "rate_limited" } });
    expect(await delay()).toBe(30_000);
  });

  it("is asked less and less often until a connection has lasted", async () => {
    client();
    for (const expected of [150, 500, 1_000, 2_000]) {
      line().say(snapshotOf());
      line().drop();
      expect(await delay()).toBe(expected);
    }
    line().say(snapshotOf());
    await vi.advanceTimersByTimeAsync(4_999);
    line().drop();
    expect(await delay()).toBe(4_000);
    line().say(snapshotOf());
    await vi.advanceTimersByTimeAsync(5_000);
    line().drop();
    expect(await delay()).toBe(150);
  });
});

describe("following", () => {
  it("asks for what is missing after a gap", () => {
    const chat = client();
    line().say(snapshotOf(), turnEvent(1, "a", null));
    line().say({ type: "delta", turn: "a", first: 2, seq: 2, ops: [] });
    expect(line().sent("resume")).toEqual([{ type: "resume", cursor: "1.a.0" }]);
    expect(chat.state.cursor.seq).toBe(0);
  });

  it("acknowledges every so many deltas, and after a while", async () => {
    client();
    line().say(snapshotOf(), turnEvent(1, "a", null));
    const delta = (seq: number): ChatEvent => ({ type: "delta", turn: "a", first: seq, seq, ops: [] });
    for (let seq = 1; seq < ACK_DELTAS; seq += 1) line().say(delta(seq));
    expect(line().sent("ack")).toEqual([]);
    line().say(delta(ACK_DELTAS));
    expect(line().sent("ack")).toEqual([{ type: "ack", turn_id: "a", seq: ACK_DELTAS }]);
    line().say(delta(ACK_DELTAS + 1));
    await vi.advanceTimersByTimeAsync(3_000);
    expect(line().sent("ack").at(-1)).toEqual({ type: "ack", turn_id: "a", seq: ACK_DELTAS + 1 });
  });

  it("stops a turn, and again after the connection was lost on the way", async () => {
    const chat = client();
    line().say(snapshotOf(), turnEvent(1, "a", null));
    chat.stop();
    expect(line().sent("stop")).toEqual([{ type: "stop", ref: "stop", turn_id: "a" }]);
    expect(chat.state.stopping).toBe(true);
    line().drop();
    await vi.advanceTimersByTimeAsync(300);
    line().say({ type: "pong", ref: null });
    expect(line().sent("stop")).toHaveLength(1);
    line().say({ type: "finished", revision: 2, turn: turnForm("a", { status: "stopped" }) });
    expect(chat.state.stopping).toBe(false);
  });
});

describe("sending", () => {
  it("shows a prompt at once and until it has become a message", () => {
    const chat = client();
    line().say(snapshotOf());
    const id = chat.send("Hello")!;
    expect(line().sent("send")).toEqual([{ type: "send", ref: id, client_id: id, text: "Hello" }]);
    expect(chat.state.outbox).toMatchObject([{ text: "Hello", status: "sending" }]);
    line().say({ type: "accepted", ref: id, turn: "a", message: "a-prompt", duplicate: false });
    expect(chat.state.outbox).toMatchObject([{ status: "accepted" }]);
    line().say(turnEvent(1, "a", null, id));
    expect(chat.state.outbox).toEqual([]);
    expect(chat.state.messages).toHaveLength(2);
  });

  it("sends again under the same id after the connection was lost", async () => {
    const chat = client();
    line().say(snapshotOf());
    const id = chat.send("Hello");
    line().drop();
    await vi.advanceTimersByTimeAsync(300);
    line().say({ type: "pong", ref: null });
    expect(line().sent("send").map((command) => command.client_id)).toEqual([id]);
    line().say({ type: "accepted", ref: id, turn: "a", message: "a-prompt", duplicate: true });
    expect(chat.state.outbox).toEqual([]);
  });

  it("keeps what was not confirmed over a reload", () => {
    const id = client().send("Hello");
    const reloaded = client();
    expect(reloaded.state.outbox).toMatchObject([{ clientId: id, text: "Hello", status: "waiting" }]);
    line().say(snapshotOf());
    expect(line().sent("send")).toMatchObject([{ client_id: id, text: "Hello" }]);
    line().say(turnEvent(1, "a", null, id));
    expect(client().state.outbox).toEqual([]);
  });

  it("queues while it is offline, keeps the order, and waits for each reply", () => {
    const chat = client();
    const first = chat.send("one")!;
    const second = chat.send("two")!;
    line().say({ type: "pong", ref: null });
    expect(line().sent("send")).toEqual([]);
    line().say(snapshotOf());
    expect(line().sent("send").map((command) => command.text)).toEqual(["one"]);
    line().say(turnEvent(1, "a", null, first));
    expect(line().sent("send")).toHaveLength(1);
    line().say({ type: "finished", revision: 2, turn: turnForm("a", { status: "completed" }) });
    expect(line().sent("send").map((command) => command.text)).toEqual(["one", "two"]);
    line().say(turnEvent(3, "b", "a-reply", second));
    expect(chat.state.outbox).toEqual([]);
  });

  it("takes no more than a few while nothing goes out", () => {
    const chat = client();
    expect([1, 2, 3, 4, 5, 6].map((text) => chat.send(String(text)) !== null)).toEqual([true, true, true, true, true, false]);
  });

  it("keeps a refused prompt and says why; another try has the same id", () => {
    const chat = client();
    line().say(snapshotOf());
    const id = chat.send("Hello")!;
    line().say({ type: "error", ref: id, code: "busy", detail: "The assistant is still replying." });
    expect(chat.state.outbox).toMatchObject([{ status: "refused", error: { code: "busy", detail: "The assistant is still replying." } }]);
    chat.resend(id);
    expect(line().sent("send").map((command) => command.client_id)).toEqual([id, id]);
    line().say({ type: "error", ref: id, code: "conflict", detail: "Used." });
    chat.resend(id);
    expect(line().sent("send").at(-1)?.client_id).not.toBe(id);
    chat.discard(chat.state.outbox[0]!.clientId);
    expect(chat.state.outbox).toEqual([]);
  });

  it("says that a prompt is not confirmed when no answer comes", async () => {
    const chat = client();
    line().say(snapshotOf());
    const id = chat.send("Hello")!;
    const pongs = setInterval(() => line().say({ type: "pong", ref: null }), 1_000);
    await vi.advanceTimersByTimeAsync(UNCONFIRMED_MS + 1_000);
    clearInterval(pongs);
    expect(chat.state.outbox).toMatchObject([{ clientId: id, status: "unconfirmed" }]);
  });

  it("forgets a prompt that is not confirmed, and sends what waited behind it", async () => {
    const chat = client();
    line().say(snapshotOf());
    const id = chat.send("Hello")!;
    const next = chat.send("World")!;
    const pongs = setInterval(() => line().say({ type: "pong", ref: null }), 1_000);
    await vi.advanceTimersByTimeAsync(UNCONFIRMED_MS + 1_000);
    clearInterval(pongs);
    expect(line().sent("send").map((command) => command.text)).toEqual(["Hello"]);
    chat.discard(id);
    expect(line().sent("send").map((command) => command.text)).toEqual(["Hello", "World"]);
    expect(chat.state.outbox).toMatchObject([{ clientId: next, status: "sending" }]);
    expect(client().state.outbox).toMatchObject([{ clientId: next }]);
    line().say(snapshotOf(), turnEvent(1, "a", null, id));
    expect(chat.state.problem).toBeNull();
  });

  it("keeps the prompt when the session has ended, and sends it after signing in", async () => {
    const chat = client();
    line().say(snapshotOf());
    const id = chat.send("Hello")!;
    line().say({ type: "error", ref: id, code: "signed_out", detail: "Please sign in again." });
    expect(chat.state.connection).toBe("signed_out");
    chat.wake();
    line().say(snapshotOf());
    expect(line().sent("send")).toMatchObject([{ client_id: id }]);
  });

  it("posts where only events get through", async () => {
    storage.set("streaming-chat:events-until", String(Date.now() + 1000));
    const chat = client();
    expect(line().kind).toBe("events");
    line().say(snapshotOf());
    answer = () => [202, { turn_id: "a", prompt_id: "p", reply_id: "r", duplicate: false }];
    const id = chat.send("Hello");
    await vi.advanceTimersByTimeAsync(0);
    expect(requests).toEqual([["conversations/c/messages", { client_id: id, text: "Hello" }]]);
    expect(chat.state.outbox).toMatchObject([{ status: "accepted" }]);
    line().say(turnEvent(1, "a", null, id));
    chat.stop();
    await vi.advanceTimersByTimeAsync(0);
    expect(requests.at(-1)).toEqual(["conversations/c/stop", { turn_id: "a" }]);
    line().say({ type: "finished", revision: 2, turn: turnForm("a", { status: "stopped" }) });
    answer = () => [429, { error: { code: "rate_limited", detail: "Too many requests." } }];
    chat.send("More");
    await vi.advanceTimersByTimeAsync(0);
    expect(chat.state.outbox).toMatchObject([{ status: "refused", error: { code: "rate_limited", detail: "Too many requests." } }]);
  });

  it("gives back an event stream while it is out of sight, but not a socket", () => {
    const chat = client();
    line().say(snapshotOf());
    chat.hide();
    expect(chat.state.connection).toBe("open");
    storage.set("streaming-chat:events-until", String(Date.now() + 1000));
    const other = client();
    line().say(snapshotOf());
    other.hide();
    expect(other.state.connection).toBe("idle");
    other.connect();
    expect(line().url).toContain("/events?after=0.-.0");
  });

  it("asks for another answer, and says where it belongs why there is none", () => {
    const chat = client();
    line().say(snapshotOf());
    chat.regenerate("a-reply");
    const [command] = line().sent("regenerate");
    expect(command).toMatchObject({ message_id: "a-reply" });
    line().say({ type: "error", ref: command!.client_id, code: "forbidden", detail: "No." });
    expect(chat.state).toMatchObject({ outbox: [], problem: { code: "forbidden", detail: "No." } });
  });
});
