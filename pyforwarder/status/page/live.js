// Events from the server, for as long as somebody looks: a hidden or paused page asks for nothing.

// At first soon, as after a reload, and then less and less often.
const AGAIN_MS = 500;
const MOST_AGAIN_MS = 8000;
// The server says something every second.
const SILENCE_MS = 10000;

export class Live {
  /** `handlers`: event name to what takes its data; `state(word)` is told how it goes. */
  constructor(url, handlers, state) {
    this.url = url;
    this.handlers = handlers;
    this.state = state;
    this.source = null;
    this.timer = 0;
    this.silence = 0;
    this.delay = AGAIN_MS;
    this.paused = false;
    document.addEventListener("visibilitychange", () => this.follow());
    // A page that the browser keeps for `back` must not hold its connection.
    window.addEventListener("pagehide", () => this.close());
    window.addEventListener("pageshow", () => this.follow());
    this.follow();
  }

  setPaused(paused) {
    this.paused = paused;
    this.follow();
  }

  follow() {
    const wanted = !document.hidden && !this.paused;
    if (!wanted) {
      this.close();
      this.state(this.paused ? "paused" : "hidden");
    } else if (this.source === null) {
      this.open();
    }
  }

  open() {
    window.clearTimeout(this.timer);
    this.state("connecting");
    const source = new EventSource(this.url);
    this.source = source;
    this.expect();
    for (const [name, handler] of Object.entries(this.handlers)) {
      source.addEventListener(name, (event) => {
        if (source !== this.source) return;
        this.expect();
        this.delay = AGAIN_MS;
        handler(JSON.parse(event.data));
        this.state("live");
      });
    }
    source.onerror = () => {
      if (source === this.source) this.again();
    };
  }

  expect() {
    window.clearTimeout(this.silence);
    this.silence = window.setTimeout(() => this.again(), SILENCE_MS);
  }

  again() {
    this.close();
    this.state("lost");
    this.timer = window.setTimeout(() => this.follow(), this.delay * (0.75 + Math.random() / 2));
    this.delay = Math.min(MOST_AGAIN_MS, 2 * this.delay);
  }

  close() {
    window.clearTimeout(this.timer);
    window.clearTimeout(this.silence);
    if (this.source !== null) this.source.close();
    this.source = null;
  }
}
