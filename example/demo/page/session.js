// A window's websocket to its process. It comes back until the page is closed; each connection is a
// session of its own, as for the channel layer: what was sent before it isn't due here.

// ms. Chromium slows down a page whose websockets fail more often.
const RETRY = 500;

let count = 0;

export class Session {
  // events: onJoined(session), onMessage(session, message), onOver(session)
  constructor(url, window, events) {
    this.id = `${window.number}.${++count}`;
    this.window = window;
    this.isMember = false; // gets what is said from now on
    this.isUp = true; // its process has RabbitMQ
    this.isFrozen = false;
    this.isOver = false;
    this.nextNumber = 0;
    this.socket = new WebSocket(url);
    this.socket.onmessage = ({ data }) => {
      const message = JSON.parse(data);
      if (message.type === "welcome") {
        this.isMember = true;
        this.isUp = message.up;
        this.pid = message.pid;
        events.onJoined(this);
      } else {
        events.onMessage(this, message);
      }
    };
    this.socket.onclose = () => {
      this.isOver = true;
      events.onOver(this);
      setTimeout(() => (window.session = new Session(url, window, events)), RETRY);
    };
  }

  send(message) {
    this.socket.send(JSON.stringify(message));
  }
}
