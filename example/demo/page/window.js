// A small browser window: what it has got, and a field to say something.

import { format } from "./times.js";

const LINES = 3;

export class Window {
  constructor(box, process, { onSay, onFreeze }) {
    this.box = box;
    this.process = process;
    this.number = Number(box.dataset.window);
    this.session = null;
    this.wasAway = false;
    this.received = 0;
    box.id = `window-${this.number}`;
    box.append(document.getElementById("window-template").content.cloneNode(true));
    box.style.setProperty("--own", `var(--c-${this.number})`);
    box.querySelector("h2").textContent = `Browser ${this.number}`;
    this.#makeForm(onSay);
    // One in each process: the other one stays free to thaw it.
    if (this.number % 2 === 0) this.#makeFreezer(onFreeze);
  }

  #makeForm(onSay) {
    const field = this.box.querySelector("input");
    const label = this.box.querySelector("label");
    field.id = `text-${this.number}`;
    label.htmlFor = field.id;
    label.textContent = `Message from browser ${this.number}`;
    this.box.querySelector("form").addEventListener("submit", (event) => {
      event.preventDefault();
      const text = field.value.trim();
      if (text) onSay(this, text);
      field.value = "";
    });
  }

  #makeFreezer(onFreeze) {
    this.freezer = document.createElement("button");
    this.freezer.type = "button";
    this.freezer.className = "freeze";
    this.freezer.addEventListener("click", () => onFreeze(this, !this.session.isFrozen));
    this.box.querySelector("header").append(this.freezer);
    this.showFrozen(false, 0);
  }

  // A message has come, by the websocket; its dot will land later.
  count() {
    this.received++;
    this.box.querySelector(".count").textContent = this.received.toLocaleString("en");
  }

  land(message, colour) {
    const lines = this.box.querySelector(".lines");
    const line = document.createElement("li");
    line.style.setProperty("--from", `var(--c-${colour})`);
    const text = document.createElement("span");
    text.textContent = message.text;
    const time = document.createElement("small");
    time.textContent = format(message.arrived.get(this));
    line.append(text, time);
    lines.append(line);
    while (lines.children.length > LINES) lines.firstChild.remove();
  }

  showFrozen(isFrozen, waiting) {
    this.box.classList.toggle("frozen", isFrozen);
    const word = isFrozen ? "Thaw" : "Freeze";
    if (this.freezer.dataset.word !== word) {
      this.freezer.dataset.word = word;
      this.freezer.setAttribute("aria-label", `${word} the consumer of browser ${this.number}`);
    }
    this.#veil(isFrozen ? `frozen · ${waiting.toLocaleString("en")} wait` : "");
  }

  showAway(isAway) {
    this.box.classList.toggle("away", isAway);
    if (isAway) {
      if (this.freezer && this.box.classList.contains("frozen")) this.showFrozen(false, 0);
      this.#veil("reconnecting…");
    } else if (!this.session.isFrozen) this.#veil("");
  }

  #veil(text) {
    const veil = this.box.querySelector(".veil");
    if (veil.textContent !== text) veil.textContent = text;
    veil.hidden = !text;
  }
}
