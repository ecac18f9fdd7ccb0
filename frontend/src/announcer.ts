/**
 * What screen readers hear. The stream itself is not a live region: every word would be spoken as it comes.
 *
 * One pair of regions per page, in the document itself: several of them, or some inside shadow roots, are often missed.
 */

const CLEAR_MS = 1_000;
let regions: { status: HTMLElement; alert: HTMLElement } | null = null;

/** Make the regions before they are needed: text that arrives together with its region is not spoken. */
export function prepareAnnouncer(): void {
  regions ??= { status: region("status"), alert: region("alert") };
}

/** Say a sentence; an `alert` interrupts. */
export function announce(sentence: string, urgency: "status" | "alert" = "status"): void {
  prepareAnnouncer();
  const target = regions?.[urgency];
  if (target === undefined) return;
  const line = document.createElement("div");
  line.textContent = sentence;
  target.append(line);
  setTimeout(() => line.remove(), CLEAR_MS);
}

function region(role: "status" | "alert"): HTMLElement {
  const element = document.createElement("div");
  element.setAttribute("role", role);
  Object.assign(element.style, {
    position: "absolute", inlineSize: "1px", blockSize: "1px", overflow: "hidden", clipPath: "inset(50%)", whiteSpace: "nowrap",
  });
  document.body.append(element);
  return element;
}
