/** The JSON API, as far as the client needs it. */

import type { ConversationForm, MessageForm, Problem } from "./protocol.ts";

/** An answer that is not a success. `status` is 0 if there was no answer at all. */
export class ApiError extends Error {
  constructor(
    readonly status: number,
    readonly problem: Omit<Problem, "type" | "ref">,
  ) {
    super(problem.code);
  }
}

export class Api {
  /**
   * @param base URL of the include of `streaming_chat.urls`, with a slash at its end
   * @param csrfToken asked for at each request
   */
  constructor(
    private readonly base: string,
    private readonly csrfToken: () => string,
  ) {}

  createConversation(): Promise<ConversationForm> {
    return this.request("POST", "conversations", {});
  }

  conversation(id: string): Promise<ConversationForm> {
    return this.request("GET", `conversations/${id}`);
  }

  messages(id: string, before: string): Promise<{ items: MessageForm[]; has_earlier: boolean }> {
    return this.request("GET", `conversations/${id}/messages?before=${before}`);
  }

  send(id: string, body: { client_id: string; text: string; parent_id?: string | null }): Promise<Started> {
    return this.request("POST", `conversations/${id}/messages`, body);
  }

  regenerate(id: string, body: { client_id: string; message_id: string }): Promise<Started> {
    return this.request("POST", `conversations/${id}/regenerate`, body);
  }

  stop(id: string, turnId: string): Promise<unknown> {
    return this.request("POST", `conversations/${id}/stop`, { turn_id: turnId });
  }

  private async request<T>(method: string, path: string, body?: object): Promise<T> {
    let response: Response;
    try {
      response = await fetch(`${this.base}api/${path}`, {
        method,
        credentials: "same-origin",
        headers: {
          Accept: "application/json",
          ...(body ? { "Content-Type": "application/json", "X-CSRFToken": this.csrfToken() } : {}),
        },
        body: body ? JSON.stringify(body) : null,
        signal: AbortSignal.timeout(15_000),
      });
    } catch {
      throw new ApiError(0, { code: "unreachable", detail: "" });
    }
    const answer: unknown = await response.json().catch(() => null);
    if (response.ok) return answer as T;
    const problem = (answer as { error?: Problem } | null)?.error ?? { code: `http_${response.status}`, detail: "" };
    throw new ApiError(response.status, problem);
  }
}

interface Started {
  turn_id: string;
  prompt_id: string;
  reply_id: string;
  duplicate: boolean;
}
