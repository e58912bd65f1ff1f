// A histogram of times, on a scale where each bar doubles the time, and their median.
//
// Messages during a burst wait for each other. They have bars of their own, pale ones, and don't
// count for the median.

const FIRST = 0.125; // ms: the end of the first bar
const BARS = 18;
const REMEMBERED = 1000; // for the median

export function format(ms) {
  if (ms >= 1000) return `${(ms / 1000).toFixed(1)} s`;
  return `${ms.toFixed(ms < 10 ? 1 : 0)} ms`;
}

class Bars {
  #counts = new Array(BARS).fill(0);
  #elements;

  constructor(slots, className) {
    this.#elements = slots.map((slot) => {
      const bar = document.createElement("i");
      bar.className = className;
      slot.append(bar);
      return bar;
    });
  }

  get total() {
    return this.#counts.reduce((sum, count) => sum + count);
  }

  add(ms) {
    const index = Math.ceil(Math.log2(ms / FIRST));
    this.#counts[Math.min(BARS - 1, Math.max(0, index))]++;
  }

  draw() {
    const highest = Math.max(...this.#counts);
    this.#elements.forEach((bar, index) => {
      const count = this.#counts[index];
      // A single slow one among thousands must be seen, too.
      bar.style.height = count ? `max(3px, ${(100 * count) / highest}%)` : "0";
    });
  }
}

export class Times {
  #box;
  #median;
  #singles;
  #bursts;
  #values = [];

  constructor(box, median) {
    this.#box = box;
    this.#median = median;
    const slots = Array.from({ length: BARS }, (_, index) => {
      const slot = document.createElement("span");
      slot.title = `up to ${format(FIRST * 2 ** index)}`;
      return slot;
    });
    box.append(...slots);
    this.#bursts = new Bars(slots, "burst-bar");
    this.#singles = new Bars(slots, "bar");
  }

  add(ms, isOfBurst) {
    if (isOfBurst) {
      this.#bursts.add(ms);
      return;
    }
    this.#singles.add(ms);
    this.#values.push(ms);
    if (this.#values.length > REMEMBERED) this.#values.shift();
  }

  draw() {
    this.#bursts.draw();
    if (!this.#values.length) return;
    this.#singles.draw();
    const sorted = [...this.#values].sort((one, other) => one - other);
    const median = format(sorted[Math.floor((sorted.length - 1) / 2)]);
    this.#median.textContent = median;
    const label = `${this.#singles.total.toLocaleString("en")} messages, median ${median}`;
    this.#box.setAttribute("aria-label", label);
  }
}

// The marks below the bars.
export function drawAxis(box) {
  for (let index = 0; index < BARS; index++) {
    const mark = document.createElement("span");
    const ms = FIRST * 2 ** index;
    if (index % 3 === 0) mark.textContent = ms < 1 ? "⅛ ms" : ms < 1000 ? `${ms} ms` : `${Math.floor(ms / 1000)} s`;
    box.append(mark);
  }
}
