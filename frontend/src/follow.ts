/** Keeps a scroller at its end while the reader is there, and never moves it otherwise. */

const LEAVE_PX = 3;
const RETURN_PX = 2;
const FAR_PX = 200;

export class Follow {
  /** Whether the reader is at the end, and the view follows. */
  pinned = true;
  /** Whether the end is far away. */
  far = false;
  #written = -1;
  #frame = 0;
  #lastTop = 0;
  readonly #sizes: ResizeObserver;

  /** @param changed told when `far` changes */
  constructor(
    private readonly scroller: HTMLElement,
    content: HTMLElement,
    private readonly changed: () => void,
  ) {
    this.#sizes = new ResizeObserver(() => this.#arm());
    this.#sizes.observe(content);
    this.#sizes.observe(scroller);
    scroller.addEventListener("scroll", this.#scrolled, { passive: true });
  }

  disconnect(): void {
    this.#sizes.disconnect();
    cancelAnimationFrame(this.#frame);
    this.scroller.removeEventListener("scroll", this.#scrolled);
  }

  /** Go to the end, and stay there. */
  toEnd(): void {
    this.pinned = true;
    this.#arm();
  }

  #arm(): void {
    if (this.#frame) return;
    this.#frame = requestAnimationFrame(() => {
      this.#frame = 0;
      if (this.pinned && !this.#selecting()) {
        this.scroller.scrollTop = this.scroller.scrollHeight;
        this.#written = this.#lastTop = this.scroller.scrollTop;
      }
      this.#measure();
    });
  }

  // A scroll to where we put it is ours, whenever it is reported; every other one is the reader's.
  readonly #scrolled = () => {
    const top = this.scroller.scrollTop;
    if (top !== this.#written) {
      if (this.#distance() <= RETURN_PX) this.pinned = true;
      else if (top < this.#lastTop - LEAVE_PX) this.pinned = false;
    }
    this.#lastTop = top;
    this.#measure();
  };

  #distance(): number {
    return this.scroller.scrollHeight - this.scroller.clientHeight - this.scroller.scrollTop;
  }

  #measure(): void {
    const far = !this.pinned && this.#distance() > FAR_PX;
    if (far === this.far) return;
    this.far = far;
    this.changed();
  }

  #selecting(): boolean {
    const root = this.scroller.getRootNode() as ShadowRoot & { getSelection?(): Selection | null };
    const selection = root.getSelection?.() ?? document.getSelection();
    return selection?.type === "Range" && this.scroller.contains(selection.anchorNode);
  }
}
