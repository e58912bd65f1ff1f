// How long one's own messages take through the room and back.

const REMEMBERED = 100;

const format = (milliseconds) => `${milliseconds.toFixed(milliseconds < 10 ? 1 : 0)} ms`;

export class RoundTrips {
  #last;
  #median;
  #values = [];

  constructor(last, median) {
    this.#last = last;
    this.#median = median;
  }

  add(milliseconds) {
    this.#values.push(milliseconds);
    if (this.#values.length > REMEMBERED) this.#values.shift();
    const sorted = [...this.#values].sort((one, other) => one - other);
    this.#last.textContent = format(milliseconds);
    this.#median.textContent = format(sorted[Math.floor((sorted.length - 1) / 2)]);
  }
}
