// The picture behind the boxes: wires between them, and messages as dots that travel.

export const LEG = 420; // ms from one box to the next; the message itself has long arrived
const TRAIL = 7; // dots behind a dot
const CROWD = 60; // dots from which on they have no trails
const QUEUE = 12; // at most that many waiting dots are drawn

const ease = (t) => (t < 0.5 ? 2 * t * t : 1 - (2 - 2 * t) ** 2 / 2);

class Wire {
  constructor(from, to) {
    this.from = from;
    this.to = to;
    this.isBroken = false;
  }

  // Between the sides of both boxes that face each other.
  fit(origin) {
    const [one, other] = [this.from, this.to].map((element) => {
      const box = element.getBoundingClientRect();
      return { x: box.x - origin.x, y: box.y - origin.y, width: box.width, height: box.height };
    });
    const apart = (start, size) =>
      Math.max(other[start] - one[start] - one[size], one[start] - other[start] - other[size]);
    const isAcross = apart("x", "width") > apart("y", "height");
    const [start, size, cross, extent] = isAcross ? ["x", "width", "y", "height"] : ["y", "height", "x", "width"];
    const isForward = one[start] < other[start];
    const middle = (box) => box[cross] + box[extent] / 2;
    const clamp = (value, box) => Math.min(box[cross] + box[extent] - 14, Math.max(box[cross] + 14, value));
    // Ends of several wires at one box lie apart, towards where they come from.
    const pull = (box, towards) => clamp(middle(box) + (middle(towards) - middle(box)) * 0.22, box);
    const a = { [start]: isForward ? one[start] + one[size] : one[start], [cross]: pull(one, other) };
    const d = { [start]: isForward ? other[start] : other[start] + other[size], [cross]: pull(other, one) };
    const half = (d[start] - a[start]) / 2;
    this.points = [a, { ...a, [start]: a[start] + half }, { ...d, [start]: d[start] - half }, d];
    this.cross = cross;
    this.length = Math.hypot(d.x - a.x, d.y - a.y);
  }

  at(t) {
    const [a, b, c, d] = this.points;
    const s = 1 - t;
    const [wa, wb, wc, wd] = [s * s * s, 3 * s * s * t, 3 * s * t * t, t * t * t];
    return { x: wa * a.x + wb * b.x + wc * c.x + wd * d.x, y: wa * a.y + wb * b.y + wc * c.y + wd * d.y };
  }
}

export class Drawing {
  #stage;
  #canvas;
  #context;
  #wires = new Map(); // "from to" -> Wire
  #dots = [];
  #sparks = [];
  #queues = new Map(); // key -> {wire, isBackwards, colour, count}
  #colours = {};
  #isRunning = false;
  #calm = matchMedia("(prefers-reduced-motion: reduce)");

  // pairs: [element, element], each with an id
  constructor(stage, canvas, pairs) {
    this.#stage = stage;
    this.#canvas = canvas;
    this.#context = canvas.getContext("2d");
    for (const [from, to] of pairs) this.#wires.set(`${from.id} ${to.id}`, new Wire(from, to));
    new ResizeObserver(() => this.#fit()).observe(stage);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#readColours());
    this.#readColours();
  }

  colour(name) {
    return this.#colours[name];
  }

  // A dot goes from one box to the next, from the time `start` on. Then: then(time of its end).
  fly(from, to, { colour, start = performance.now(), lane = 0 }, then) {
    if (this.#calm.matches || document.hidden) {
      then(start);
      return;
    }
    const forth = this.#wires.get(`${from.id} ${to.id}`);
    const wire = forth ?? this.#wires.get(`${to.id} ${from.id}`);
    this.#dots.push({ wire, isBackwards: !forth, colour, then, start, lane });
    this.#run();
  }

  setBroken(from, to, isBroken) {
    this.#wires.get(`${from.id} ${to.id}`).isBroken = isBroken;
    this.#run();
  }

  // Dots that wait at the box `at`, on its wire to the box `towards`.
  setQueue(at, towards, colour, count) {
    const key = `${at.id} ${towards.id}`;
    const before = this.#queues.get(key);
    if (before?.count === count && before.colour === colour) return;
    const forth = this.#wires.get(key);
    this.#queues.set(key, { wire: forth ?? this.#wires.get(`${towards.id} ${at.id}`), isBackwards: !forth, colour, count });
    this.#run();
  }

  explode(element, colours, amount = 70) {
    if (this.#calm.matches) return;
    const origin = this.#stage.getBoundingClientRect();
    const box = element.getBoundingClientRect();
    for (let i = 0; i < amount; i++) {
      const angle = Math.random() * 2 * Math.PI;
      const speed = 40 + Math.random() * 230;
      this.#sparks.push({
        x: box.x - origin.x + box.width * (0.2 + 0.6 * Math.random()),
        y: box.y - origin.y + box.height * (0.2 + 0.6 * Math.random()),
        vx: Math.cos(angle) * speed,
        vy: Math.sin(angle) * speed - 60,
        colour: colours[i % colours.length],
        start: performance.now(),
        life: 500 + Math.random() * 900,
      });
    }
    this.#run();
  }

  #readColours() {
    const style = getComputedStyle(document.documentElement);
    for (const name of ["1", "2", "3", "4", "wire", "bad", "ice"]) this.#colours[name] = style.getPropertyValue(`--c-${name}`).trim();
    this.#run();
  }

  #fit() {
    const box = this.#stage.getBoundingClientRect();
    const scale = devicePixelRatio;
    this.#canvas.width = box.width * scale;
    this.#canvas.height = box.height * scale;
    this.#context.setTransform(scale, 0, 0, scale, 0, 0);
    for (const wire of this.#wires.values()) wire.fit(box);
    this.#canvas.dataset.fits = "yes";
    this.#run();
  }

  #run() {
    if (this.#isRunning || !this.#canvas.dataset.fits) return;
    this.#isRunning = true;
    requestAnimationFrame((now) => this.#draw(now));
  }

  #draw(now) {
    const { width, height } = this.#canvas;
    this.#context.clearRect(0, 0, width, height);
    for (const wire of this.#wires.values()) this.#drawWire(wire);
    for (const queue of this.#queues.values()) this.#drawQueue(queue);
    const arrived = this.#dots.filter((dot) => now - dot.start >= LEG);
    this.#dots = this.#dots.filter((dot) => now - dot.start < LEG);
    for (const dot of this.#dots) if (dot.start <= now) this.#drawDot(dot, now);
    this.#sparks = this.#sparks.filter((spark) => now - spark.start < spark.life);
    for (const spark of this.#sparks) this.#drawSpark(spark, now);
    this.#context.globalAlpha = 1;
    this.#isRunning = false;
    for (const dot of arrived) dot.then(dot.start + LEG);
    if (this.#dots.length || this.#sparks.length) this.#run();
  }

  #drawWire(wire) {
    const context = this.#context;
    const [a, b, c, d] = wire.points;
    context.globalAlpha = wire.isBroken ? 0.55 : 1;
    context.strokeStyle = wire.isBroken ? this.#colours.bad : this.#colours.wire;
    context.lineWidth = wire.isBroken ? 1.5 : 2.5;
    context.lineCap = "round";
    context.setLineDash(wire.isBroken ? [2, 7] : []);
    context.beginPath();
    context.moveTo(a.x, a.y);
    context.bezierCurveTo(b.x, b.y, c.x, c.y, d.x, d.y);
    context.stroke();
    context.setLineDash([]);
  }

  #drawQueue({ wire, isBackwards, colour, count }) {
    const shown = Math.min(count, QUEUE, Math.floor(wire.length / 9));
    for (let i = 0; i < shown; i++) {
      const t = (7 + 8.5 * i) / wire.length;
      this.#disc(wire.at(isBackwards ? 1 - t : t), 3.6, this.#colours[colour], 1);
    }
  }

  #drawDot({ wire, isBackwards, colour, start, lane }, now) {
    const isCrowd = this.#dots.length > CROWD;
    const colourValue = this.#colours[colour];
    const place = (t) => {
      const point = wire.at(isBackwards ? 1 - t : t);
      point[wire.cross] += lane * Math.sin(Math.PI * t);
      return point;
    };
    const head = place(ease((now - start) / LEG));
    if (isCrowd) {
      this.#disc(head, 3, colourValue, 0.9);
      return;
    }
    for (let i = TRAIL; i > 0; i--) {
      this.#disc(place(ease(Math.max(0, (now - start - i * 12) / LEG))), 4.6 - i * 0.45, colourValue, 0.36 - i * 0.04);
    }
    this.#disc(head, 11, colourValue, 0.2);
    this.#disc(head, 5.5, colourValue, 1);
  }

  #drawSpark({ x, y, vx, vy, colour, start, life }, now) {
    const seconds = (now - start) / 1000;
    const point = { x: x + vx * seconds, y: y + vy * seconds + 220 * seconds * seconds };
    this.#disc(point, 2.6, this.#colours[colour], 1 - (now - start) / life);
  }

  #disc({ x, y }, radius, colour, alpha) {
    const context = this.#context;
    context.globalAlpha = alpha;
    context.fillStyle = colour;
    context.beginPath();
    context.arc(x, y, radius, 0, 2 * Math.PI);
    context.fill();
  }
}
