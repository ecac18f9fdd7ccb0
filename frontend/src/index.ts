/** Defines `<streaming-chat>`, and exports the client for whoever brings an interface of their own. */

import { Composer } from "./composer.ts";
import { StreamingChat } from "./element.ts";
import { MarkdownText } from "./message.ts";
import { keepTitles } from "./page.ts";
import "./page.css";

export { Api, ApiError } from "./api.ts";
export { ChatClient, type ChatState, type ClientOptions, type Outgoing } from "./client.ts";
export type { Connection } from "./connection.ts";
export type * from "./protocol.ts";
export { reduce, type ConversationState } from "./state.ts";
export { StreamingChat };

// The module may be on the page twice, under two addresses.
if (!customElements.get("streaming-chat")) {
  customElements.define("streaming-chat-markdown", MarkdownText);
  customElements.define("streaming-chat-composer", Composer);
  customElements.define("streaming-chat", StreamingChat);
  keepTitles();
}
