// The demo's page: four windows on two processes, and buttons that break things.

import { connectButtons, isBusy, setBusy } from "./buttons.js";
import { Drawing, LEG } from "./drawing.js";
import { Ledger } from "./ledger.js";
import { Session } from "./session.js";
import { Times, drawAxis, format } from "./times.js";
import { Window } from "./window.js";
import { many, tell } from "./words.js";

const BURST = 5000;
const BURST_DOTS = 200; // as many as the eye can take
const BURST_LENGTH = 1100; // ms
const CHATTER_INTERVAL = 700; // ms
const WORDS = ["Hello", "Hi!", "Salut", "Hallo", "Ciao", "Olá", "Hej", "Ahoj", "Merhaba", "Namaste", "Konnichiwa", "Salam", "Sawubona", "Aloha"];

const byId = (id) => document.getElementById(id);
const addresses = JSON.parse(document.body.dataset.processes);
const page = Array.from(crypto.getRandomValues(new Uint8Array(6)), (byte) => byte.toString(16)).join("");

const ledger = new Ledger();
const layerTimes = new Times(byId("layer-bars"), byId("layer-median"));
const browserTimes = new Times(byId("browser-bars"), byId("browser-median"));
drawAxis(byId("axis"));

const broker = byId("rabbitmq");
const nodes = addresses.map((_, index) => byId(`process-${index}`));
const windows = [...document.querySelectorAll(".window")].map(
  (box) => new Window(box, nodes[box.dataset.side === "a" ? 0 : 1], { onSay: say, onFreeze: freeze }),
);
const drawing = new Drawing(byId("stage"), byId("canvas"), [
  ...windows.map((window) => [window.box, window.process]),
  ...nodes.map((node) => [node, broker]),
]);

// ---- Sending. While a process is without RabbitMQ all wait: it would miss what others say.

const held = []; // [window, text]
let outageAt = 0; // 0: there is none
let troubleEndedAt = 0;
let mostHeld = 0;
let heldTimer = 0;

const members = () => windows.map(({ session }) => session).filter((session) => session.isMember && !session.isOver);

function say(window, text) {
  if (outageAt || !members().includes(window.session)) {
    held.push([window, text]);
    mostHeld = Math.max(mostHeld, held.length);
    showQueues();
    showCounts();
    return;
  }
  const { session } = window;
  const message = ledger.send(session, session.nextNumber++, text, members());
  message.isOfBurst = burst !== null; // it waits behind the 5,000
  session.send({ type: "say", sender: session.id, number: message.number, text });
  showCounts();
  flyMessage(window, message);
}

// One after the other, so that one sees them.
function sayHeld() {
  clearTimeout(heldTimer);
  const index = held.findIndex(([window]) => members().includes(window.session));
  if (outageAt || index < 0) return;
  const [[window, text]] = held.splice(index, 1);
  say(window, text);
  showQueues();
  heldTimer = setTimeout(sayHeld, 60);
}

setInterval(() => {
  if (!byId("chatter").checked || document.hidden || held.length > 40) return;
  const speakers = windows.filter(({ session }) => !session.isFrozen && !session.isOver);
  const speaker = speakers[Math.floor(Math.random() * speakers.length)];
  if (speaker) say(speaker, WORDS[Math.floor(Math.random() * WORDS.length)]);
}, CHATTER_INTERVAL);

// ---- The way of a message, slowly

function flyMessage(window, message, start = performance.now(), lane = 0) {
  const look = { colour: window.number, lane };
  drawing.fly(window.box, window.process, { ...look, start }, (then) => {
    window.process.flash();
    drawing.fly(window.process, broker, { ...look, start: then }, (then) => {
      broker.flash();
      for (const node of nodes) flyOn(node, message, { ...look, start: then });
    });
  });
}

// From RabbitMQ to a process, and to its windows that are there and not frozen.
function flyOn(node, message, look) {
  const receivers = windows.filter(({ process, session }) => process === node && session.isMember && !session.isOver);
  if (!receivers.length) return;
  drawing.fly(broker, node, look, (then) => {
    node.flash();
    for (const receiver of receivers.filter(({ session }) => !session.isFrozen)) {
      drawing.fly(node, receiver.box, { ...look, start: then }, () => {
        if (message?.arrived?.has(receiver)) receiver.land(message, look.colour);
      });
    }
  });
}

for (const node of [...nodes, broker]) {
  node.flash = () => {
    node.classList.remove("flash");
    requestAnimationFrame(() => node.classList.add("flash"));
  };
}

// ---- 5,000 at once

let burst = null; // {startedAt, session, receivers, delivered, last: the last message}

function startBurst() {
  if (isBusy(byId("burst"))) return;
  const window = windows.find(({ session }) => members().includes(session) && !session.isFrozen);
  if (!window || outageAt) {
    tell("No process is ready for 5,000 messages now. Try again in a moment.");
    return;
  }
  const { session } = window;
  const first = session.nextNumber;
  session.nextNumber += BURST;
  burst = { startedAt: performance.now(), session, receivers: members(), delivered: 0, last: null };
  for (let i = 0; i < BURST; i++) {
    burst.last = ledger.send(session, first + i, "", burst.receivers);
    burst.last.isOfBurst = true;
  }
  session.send({ type: "burst", sender: session.id, first, count: BURST });
  setBusy(byId("burst"), true);
  byId("burst-result").textContent = "";
  showCounts();
  for (let i = 0; i < BURST_DOTS; i++) {
    flyMessage(window, null, performance.now() + BURST_LENGTH * Math.random(), 54 * (Math.random() - 0.5));
  }
}

function checkBurst() {
  if (!burst) return;
  const frozen = burst.receivers.filter(({ isFrozen, isOver }) => isFrozen && !isOver).length;
  if (burst.last.due > frozen) return;
  const seconds = (performance.now() - burst.startedAt) / 1000;
  const text = `${burst.delivered.toLocaleString("en")} deliveries in ${seconds.toFixed(1)} s`;
  byId("burst-result").textContent = text;
  tell(`5,000 messages to ${many(burst.receivers.length, "browser")}: ${text}.`, "good");
  endBurst();
}

function endBurst() {
  burst = null;
  setBusy(byId("burst"), false);
}

byId("burst").addEventListener("click", startBurst);

// ---- What the processes say

// Mostly its dot is still on its way, and will find that it has arrived.
function arrived(session, message, layerTime) {
  const { window } = session;
  (message.arrived ??= new Map()).set(window, layerTime);
  if (performance.now() - message.sentAt < 3 * LEG) return;
  const colour = message.sender.window.number;
  drawing.fly(window.process, window.box, { colour }, () => window.land(message, colour));
}

const onMessage = {
  received(session, { messages }) {
    for (const [sender, number, microseconds, text] of messages) {
      const origin = senders.get(sender);
      const message = origin && ledger.receive(session, origin, number);
      if (!message) continue;
      session.window.count();
      if (burst && message.isOfBurst && !text) burst.delivered++;
      if (text) arrived(session, message, microseconds / 1000);
      if (origin === session) browserTimes.add(performance.now() - message.sentAt, message.isOfBurst);
      if (origin.window.process !== session.window.process && !session.wasFrozen) {
        layerTimes.add(microseconds / 1000, message.isOfBurst);
      }
    }
    checkBurst();
  },

  outage(session, { up }) {
    session.isUp = up;
    const isOut = members().some(({ isUp }) => !isUp);
    if (isOut && !outageAt) beginOutage();
    if (!isOut && outageAt) endOutage();
    showNodes();
  },

  not_sent(session, { number }) {
    const message = ledger.withdraw(session, number);
    if (message) say(session.window, message.text);
  },
};

const senders = new Map(); // id -> session
let hasBegun = false;

function onJoined(session) {
  senders.set(session.id, session);
  if (session.window.wasAway) {
    session.window.wasAway = false;
    const node = session.window.process;
    if (node.downAt) {
      tell(`${node.title} is back after ${format(performance.now() - node.downAt)}, with a new pid: ${session.pid}.`, "good");
      node.downAt = 0;
      troubleEndedAt = performance.now();
    }
  }
  if (!hasBegun && members().length === windows.length) {
    hasBegun = true;
    tell("Four browsers, served by two processes. They talk.");
  }
  showNodes();
  sayHeld();
}

function onOver(session) {
  session.window.wasAway = true;
  const node = session.window.process;
  if (session.isMember && !node.downAt) {
    node.downAt = performance.now();
    drawing.explode(node, ["bad", String(session.window.number)]);
    tell(`${node.title} is gone.${members().length ? " The other one goes on." : ""}`, "bad");
  }
  ledger.end(session);
  if (burst?.session === session) endBurst();
  checkBurst();
  if (outageAt && !members().some(({ isUp }) => !isUp)) endOutage();
  showNodes();
}

// ---- Breaking things

function beginOutage() {
  outageAt = performance.now();
  mostHeld = 0;
  ledger.noteOutage();
  drawing.explode(broker, ["bad", "wire"]);
  tell("RabbitMQ is gone. What is said now waits.", "bad");
}

function endOutage() {
  const waited = mostHeld ? ` ${many(mostHeld, "message")} waited, and ${mostHeld === 1 ? "goes" : "go"} out now.` : "";
  tell(`RabbitMQ is back after ${format(performance.now() - outageAt)}.${waited}`, "good");
  outageAt = 0;
  troubleEndedAt = performance.now();
  sayHeld();
}

function freeze(window, on) {
  const { session } = window;
  const sibling = windows.find(({ process, number }) => process === window.process && number !== window.number).session;
  if (!sibling.isMember || sibling.isOver || session.isOver) return;
  sibling.send({ type: "freeze", window: window.number, on });
  session.isFrozen = on;
  if (on) {
    session.wasFrozen = true;
    ledger.noteFrozen(session);
    tell(`The consumer of browser ${window.number} hangs. The others don't notice.`, "ice");
  } else {
    troubleEndedAt = performance.now();
    tell(`The consumer of browser ${window.number} works again.`, "good");
  }
  window.showFrozen(on, 0);
}

// ---- Showing

nodes.forEach((node, index) => {
  node.title = `Process ${"AB"[index]}`;
  node.downAt = 0;
});

function showNodes() {
  for (const node of nodes) {
    const own = windows.filter(({ process }) => process === node);
    const alive = own.filter(({ session }) => session.isMember && !session.isOver);
    const isCut = alive.some(({ session }) => !session.isUp);
    node.classList.toggle("down", !alive.length);
    node.querySelector("[data-fact]").textContent = alive.length ? `pid ${alive[0].session.pid}` : "starting…";
    drawing.setBroken(node, broker, isCut || !alive.length);
    for (const window of own) drawing.setBroken(window.box, node, !alive.includes(window));
  }
  for (const window of windows) window.showAway(!window.session.isMember || window.session.isOver);
  broker.classList.toggle("down", outageAt > 0);
  broker.querySelector("[data-fact]").textContent = outageAt ? "restarting…" : members().length ? "running" : "…";
}

const EXPLANATIONS = {
  process: "were on their way to or from a killed process",
  rabbitmq: "were on their way when RabbitMQ was killed",
  frozen: "were too many for the frozen consumer, which keeps its newest 100",
};

function showNumber(id, value) {
  const text = value.toLocaleString("en");
  if (byId(id).textContent !== text) byId(id).textContent = text;
}

function showCounts() {
  showNumber("sent", ledger.sent);
  showNumber("received", ledger.received);
  showNumber("lost", ledger.lost);
  byId("lost").parentElement.classList.toggle("some", ledger.lost > 0);
  const lines = Object.entries(EXPLANATIONS)
    .filter(([name]) => ledger[name])
    .map(([name, words]) => [name, ledger[name].toLocaleString("en"), words]);
  if (held.length) lines.push(["waiting", held.length.toLocaleString("en"), "wait for RabbitMQ"]);
  if (ledger.pending) lines.push(["pending", ledger.pending.toLocaleString("en"), "under way"]);
  byId("others").replaceChildren(
    ...lines.map(([name, count, words]) => {
      const item = document.createElement("li");
      const number = document.createElement("b");
      number.textContent = count;
      item.dataset.name = name;
      item.append(number, ` ${words}`);
      return item;
    }),
  );
}

// Waiting for a frozen consumer, or for RabbitMQ.
function showQueues() {
  for (const window of windows) {
    const { session } = window;
    const waiting = ledger.waitingFor(session);
    if (session.isFrozen) window.showFrozen(true, waiting);
    const count = session.isFrozen ? waiting : held.filter(([holder]) => holder === window).length;
    drawing.setQueue(window.box, window.process, session.isFrozen ? "ice" : window.number, count);
  }
}

function show() {
  checkBurst();
  showCounts();
  showQueues();
  layerTimes.draw();
  browserTimes.draw();
}

setInterval(show, 100);
setInterval(() => ledger.sweep(({ isFrozen }) => isFrozen || outageAt > 0, troubleEndedAt), 500);

// ---- Start

connectButtons();
for (const window of windows) {
  const address = addresses[nodes.indexOf(window.process)].replace("http", "ws");
  window.session = new Session(`${address}/demo/${page}/${window.number}/`, window, {
    onJoined,
    onOver,
    onMessage: (session, message) => onMessage[message.type](session, message),
  });
}
for (const [index, address] of addresses.entries()) {
  const link = document.createElement("a");
  link.href = `${address}/room/lobby/`;
  link.textContent = `at process ${"AB"[index]}`;
  byId("chats").append(index ? ", " : "", link);
}
