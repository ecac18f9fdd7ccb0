/** The page around the chat: its life, and on a full page its list of conversations. */

const REST_AFTER_MS = 5 * 60_000;

/** Tell when the page goes out of sight, has been so for long, and comes back. Returns how to end it. */
export function watchPage(tell: { hide(): void; rest(): void; rejoin(): void; wake(): void }): () => void {
  let resting: ReturnType<typeof setTimeout> | undefined;
  const ended = new AbortController();
  const on = (target: EventTarget, type: string, act: () => void) => target.addEventListener(type, act, { signal: ended.signal });
  on(document, "visibilitychange", () => {
    clearTimeout(resting);
    if (document.hidden) {
      tell.hide();
      resting = setTimeout(tell.rest, REST_AFTER_MS);
    } else {
      tell.rejoin();
      tell.wake();
    }
  });
  on(window, "online", tell.wake);
  // Only a page without open connections is kept for the back button.
  on(window, "pagehide", tell.rest);
  on(window, "pageshow", tell.rejoin);
  return () => {
    clearTimeout(resting);
    ended.abort();
  };
}

/** Keep the titles that the server has rendered around the chat up to date, and list a conversation that is new. */
export function keepTitles(): void {
  document.addEventListener("chat-conversation", (event) => {
    const { id, title, url } = (event as CustomEvent<{ id: string; title: string; url: string }>).detail;
    const list = document.querySelector("[data-chat-list]");
    if (!url || list === null) return;
    let link = list.querySelector(`a[data-chat-id="${CSS.escape(id)}"]`);
    if (link === null) {
      const item = list.querySelector("template")?.content.cloneNode(true) as DocumentFragment | undefined;
      link = item?.querySelector("a") ?? null;
      if (!item || !link) return;
      document.querySelector(".streaming-chat-sidebar [aria-current]")?.removeAttribute("aria-current");
      link.setAttribute("href", url);
      link.setAttribute("data-chat-id", id);
      link.setAttribute("aria-current", "page");
      list.prepend(item);
    }
    if (!title) return;
    link.textContent = title;
    const heading = document.querySelector("[data-chat-title]");
    if (heading !== null) heading.textContent = title;
    document.title = title;
  });
}
