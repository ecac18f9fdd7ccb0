/** The two ways to hear of a conversation's events. Each reports what comes, and once that it is over. */

import type { ChatEvent, Command } from "./protocol.ts";

export interface Listener {
  event(event: ChatEvent): void;
  /** @param code the WebSocket's close code; 0 where there is none */
  over(code: number): void;
}

export interface Transport {
  readonly kind: "socket" | "events";
  /** Send a command. Only a socket can. */
  send(command: Command): void;
  /** End it; the listener hears no more. */
  close(): void;
}

/** Opens a transport at a URL. */
export type Opener = (url: string, listener: Listener) => Transport;

export const openSocket: Opener = (url, listener) => {
  const socket = new WebSocket(url.replace(/^http/, "ws"));
  let closed = false;
  socket.onmessage = ({ data }) => {
    if (!closed && typeof data === "string") listener.event(JSON.parse(data) as ChatEvent);
  };
  socket.onopen = () => {
    // Its answer is the first frame even when there is nothing to catch up with.
    if (!closed) socket.send('{"type":"ping"}');
  };
  socket.onclose = ({ code }) => {
    if (!closed) listener.over(code);
    closed = true;
  };
  return {
    kind: "socket",
    send: (command) => {
      if (socket.readyState === WebSocket.OPEN) socket.send(JSON.stringify(command));
    },
    close: () => {
      closed = true;
      socket.close();
    },
  };
};

const EVENT_TYPES = [
  "snapshot", "turn", "delta", "finished", "conversation", "progress", "error", "deleted", "reconnect",
] as const satisfies readonly ChatEvent["type"][];

export const openEvents: Opener = (url, listener) => {
  const source = new EventSource(url);
  for (const type of EVENT_TYPES) {
    source.addEventListener(type, (message) => {
      // "error" is also the name under which the browser reports a broken connection.
      if (message instanceof MessageEvent) listener.event(JSON.parse(message.data as string) as ChatEvent);
    });
  }
  source.onopen = () => listener.event({ type: "pong", ref: null });
  source.onerror = (message) => {
    if (message instanceof MessageEvent) return;
    // Not left to reconnect by itself: we do that, with backoff and the cursor of what was applied.
    source.close();
    listener.over(0);
  };
  return { kind: "events", send: () => undefined, close: () => source.close() };
};
