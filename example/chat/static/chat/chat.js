// The page of one room. What others wrote only ever becomes textContent, never HTML.

import { Connection } from "./connection.js";
import { Log } from "./log.js";
import { RoundTrips } from "./round_trips.js";

const UNKNOWN_AFTER = 15000; // ms without an answer, after which a message may have got lost

const room = document.body.dataset.room;
const byId = (id) => document.getElementById(id);
const log = new Log(byId("log"), byId("newer"), byId("empty"));
const trips = new RoundTrips(byId("trip-last"), byId("trip-median"));

// ---- What I said: waiting -> sending -> delivered | failed | unknown

const idPrefix = Array.from(crypto.getRandomValues(new Uint8Array(6)), (byte) => byte.toString(16)).join("");
let idCounter = 0;
const mine = new Map(); // id -> {id, text, entry, state, sentAt}; without what is delivered

function say(text) {
  const id = `${idPrefix}-${++idCounter}`;
  const message = { id, text, state: "waiting", sentAt: 0 };
  message.entry = log.addMine(text, me);
  mine.set(id, message);
  sendWaiting();
}

function sendWaiting() {
  for (const message of mine.values()) {
    if (message.state !== "waiting") continue;
    if (!isRoomUp) {
      message.entry.showState("waiting", "waiting for the room…");
      continue;
    }
    message.state = "sending";
    message.sentAt = performance.now();
    message.entry.showState("sending", "sending…");
    connection.send({ type: "say", id: message.id, text: message.text });
  }
}

function delivered(message, person) {
  const milliseconds = performance.now() - message.sentAt;
  mine.delete(message.id);
  if (message.state === "sending") trips.add(milliseconds);
  message.entry.showDelivered(person, `${milliseconds.toFixed(1)} ms`);
}

function notDelivered(message, state, reason) {
  message.state = state;
  message.entry.showState(state, reason, () => {
    message.entry.remove();
    mine.delete(message.id);
    say(message.text);
  });
}

function giveUpOn(isHopeless) {
  for (const message of mine.values()) {
    if (message.state === "sending" && isHopeless(message)) {
      notDelivered(message, "unknown", "No answer: it may not have arrived.");
    }
  }
}

setInterval(() => {
  const now = performance.now();
  giveUpOn((message) => now - message.sentAt > UNKNOWN_AFTER);
}, 1000);

// ---- The connection

let me = null; // as the server sees this page
let isRoomUp = false;
let wasRoomUp = false;

const socketUrl = new URL(`/ws/${room}/`, location.href);
socketUrl.protocol = location.protocol === "https:" ? "wss:" : "ws:";
const connection = new Connection(socketUrl, { onMessage, onLost });

function showState(state, text) {
  const element = byId("state");
  if (element.textContent === text) return; // else screen readers would read it again
  element.dataset.state = state;
  element.textContent = text;
}

function onLost() {
  isRoomUp = false;
  showState("lost", "Reconnecting…");
  document.body.classList.add("away");
  giveUpOn(() => true);
}

const handlers = {
  welcome({ you }) {
    me = you;
    introduceMyself();
    showState("connecting", `Joining #${room}…`);
  },

  room({ up }) {
    // What was on its way when the room went out of reach has arrived by now, if ever.
    if (up && !isRoomUp) giveUpOn(() => true);
    isRoomUp = up;
    wasRoomUp ||= up;
    document.body.classList.toggle("away", !up);
    if (up) {
      showState("up", `Connected to process ${me.port} · pid ${me.pid}`);
      sendWaiting();
    } else {
      showState("lost", wasRoomUp ? "Reconnecting to the room…" : `Joining #${room}…`);
    }
  },

  people({ people }) {
    peopleCount = people.length;
    showOpener();
    byId("people").replaceChildren(...people.map((person) => log.personItem(person, person.id === me.id)));
  },

  joined({ person }) {
    if (person.id !== me.id) log.addNote(`${person.name} joined`, person);
  },

  left({ person }) {
    log.addNote(`${person.name} left`, person);
  },

  message({ id, text, person }) {
    if (mine.has(id)) delivered(mine.get(id), person);
    else log.add(text, person);
  },

  not_delivered({ id, reason }) {
    if (mine.has(id)) notDelivered(mine.get(id), "failed", `Not delivered. ${reason}`);
  },
};

function onMessage(message) {
  handlers[message.type](message);
}

// ---- My name

function guestName() {
  const pick = (words) => words[Math.floor(Math.random() * words.length)];
  const first = ["Amber", "Brave", "Calm", "Clever", "Gentle", "Lucky", "Merry", "Quiet", "Swift", "Sunny"];
  const second = ["Badger", "Falcon", "Hare", "Heron", "Lynx", "Marten", "Otter", "Robin", "Squirrel", "Wren"];
  return `${pick(first)} ${pick(second)}`;
}

const nameField = byId("name");
nameField.value = sessionStorage.getItem("name") ?? localStorage.getItem("name") ?? guestName();

function introduceMyself() {
  me.name = nameField.value.trim();
  connection.send({ type: "introduce", name: me.name });
}

function rename() {
  nameField.value = nameField.value.trim() || me?.name || guestName();
  sessionStorage.setItem("name", nameField.value); // this tab
  localStorage.setItem("name", nameField.value); // the next new tab
  if (me && nameField.value !== me.name) introduceMyself();
}

nameField.addEventListener("change", rename);
nameField.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.isComposing) return;
  event.preventDefault(); // else the message field, focused now, would get this Enter
  byId("text").focus();
});

// ---- Writing

const textField = byId("text");

function submit(event) {
  event.preventDefault();
  const text = textField.value.trim();
  if (text) say(text);
  textField.value = "";
  fitHeight();
  textField.focus();
}

function fitHeight() {
  textField.style.height = "auto";
  textField.style.height = `${textField.scrollHeight + 2}px`;
}

byId("compose").addEventListener("submit", submit);
textField.addEventListener("input", fitHeight);
textField.addEventListener("keydown", (event) => {
  // isComposing: Enter also ends the choice of a character in many input methods.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event);
});

// ---- The side panel, which narrow screens hide

let peopleCount = 0;
const opener = byId("open-side");

function showOpener() {
  const isOpen = document.body.classList.contains("side-open");
  opener.textContent = isOpen ? "Back" : `${peopleCount} here`;
  opener.setAttribute("aria-expanded", String(isOpen));
}

opener.addEventListener("click", () => {
  document.body.classList.toggle("side-open");
  showOpener();
});
