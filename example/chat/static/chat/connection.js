// A websocket that comes back: reconnects with back-off, and notices when the server falls silent.

const FIRST_DELAY = 500; // ms; doubles with each failed attempt
const LONGEST_DELAY = 8000;
const PATIENCE = 8000; // ms without a word; the server has something to say every two seconds

export class Connection {
  #url;
  #events;
  #socket = null;
  #attempts = 0;
  #retryTimer = 0;
  #lastHeard = 0;

  // events: onMessage(object), onLost()
  constructor(url, events) {
    this.#url = url;
    this.#events = events;
    setInterval(() => this.#checkSilence(), 1000);
    // Signs that an attempt is worth it now.
    addEventListener("online", () => this.#retryNow());
    document.addEventListener("visibilitychange", () => this.#retryNow());
    this.#connect();
  }

  // Sends nothing while there is no connection.
  send(message) {
    if (this.#socket?.readyState === WebSocket.OPEN) this.#socket.send(JSON.stringify(message));
  }

  #connect() {
    const socket = new WebSocket(this.#url);
    this.#socket = socket;
    this.#lastHeard = Date.now();
    socket.onmessage = (event) => {
      this.#attempts = 0;
      this.#lastHeard = Date.now();
      this.#events.onMessage(JSON.parse(event.data));
    };
    socket.onclose = () => this.#lost();
  }

  #lost() {
    const socket = this.#socket;
    this.#socket = null;
    // Closing takes its time with a server that doesn't answer: don't listen to it any more.
    socket.onmessage = socket.onclose = null;
    socket.close();
    const backOff = Math.min(LONGEST_DELAY, FIRST_DELAY * 2 ** this.#attempts++);
    const delay = backOff * (0.5 + Math.random() / 2); // so that not all pages come at once
    this.#retryTimer = setTimeout(() => this.#connect(), delay);
    this.#events.onLost();
  }

  #checkSilence() {
    if (this.#socket && Date.now() - this.#lastHeard > PATIENCE) this.#lost();
  }

  #retryNow() {
    if (this.#socket || document.hidden) return;
    clearTimeout(this.#retryTimer);
    this.#connect();
  }
}
