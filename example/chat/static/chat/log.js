// What the page shows of messages and people.

const LONGEST_LOG = 500; // entries

function element(tag, className, text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

// A colour for each name or process: the same on every page.
function hueOf(text) {
  let hash = 7;
  for (const character of text) hash = (hash * 31 + character.codePointAt(0)) % 100003;
  return hash % 360;
}

function avatar(person) {
  const made = element("span", "avatar", [...person.name][0]?.toUpperCase() ?? "?");
  made.style.setProperty("--hue", hueOf(person.name));
  made.setAttribute("aria-hidden", "true");
  return made;
}

function badge(person) {
  const made = element("span", "badge", `${person.port} · pid ${person.pid}`);
  made.style.setProperty("--hue", (person.port * 163 + 150) % 360);
  made.title = `served by the process on port ${person.port}`;
  return made;
}

function clock() {
  const now = new Date();
  const made = element("time", "time", now.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" }));
  made.dateTime = now.toISOString();
  return made;
}

export class Log {
  #list;
  #newer;
  #empty;
  #lastSpeaker = null;

  constructor(list, newer, empty) {
    this.#list = list;
    this.#newer = newer;
    this.#empty = empty;
    newer.addEventListener("click", () => this.#scrollDown());
    list.addEventListener("scroll", () => this.#isAtEnd() && (newer.hidden = true), { passive: true });
  }

  add(text, person) {
    this.#append(this.#message("theirs", text, person), person.id);
  }

  // Returns the entry, which its sender keeps informed about what became of it.
  addMine(text, person) {
    const item = this.#message("mine", text, person);
    const meta = item.querySelector(".meta");
    const state = element("span", "message-state");
    meta.append(state);
    this.#append(item, "mine");
    this.#scrollDown();
    return {
      showState(name, words, onAgain = null) {
        item.dataset.state = name;
        state.textContent = words;
        if (onAgain) {
          const again = element("button", "again", "Send again");
          again.type = "button";
          again.addEventListener("click", onAgain, { once: true });
          state.append(" ", again);
        }
      },
      showDelivered(sender, words) {
        item.dataset.state = "delivered";
        state.textContent = words;
        meta.querySelector(".badge")?.remove();
        meta.prepend(badge(sender)); // the process which took it, be it another than at first
      },
      remove() {
        item.remove();
      },
    };
  }

  addNote(text, person) {
    const item = element("li", "note");
    item.append(element("span", "", text), badge(person));
    this.#append(item, null);
  }

  personItem(person, isMe) {
    const item = element("li", "person");
    const name = element("span", "name", person.name);
    if (isMe) name.append(element("span", "you", " you"));
    item.append(avatar(person), name, badge(person));
    return item;
  }

  #message(side, text, person) {
    const item = element("li", `message ${side}`);
    const body = element("div", "body");
    const head = element("div", "head");
    head.append(element("span", "name", person?.name ?? ""), clock());
    const meta = element("div", "meta");
    if (person) meta.append(badge(person));
    body.append(head, element("p", "text", text), meta);
    if (person && side === "theirs") item.append(avatar(person));
    item.append(body);
    return item;
  }

  #append(item, speaker) {
    const follow = this.#isAtEnd();
    this.#empty.hidden = true;
    if (speaker && speaker === this.#lastSpeaker) item.classList.add("goes-on");
    this.#lastSpeaker = speaker;
    this.#list.append(item);
    while (this.#list.children.length > LONGEST_LOG) this.#list.children[1].remove(); // [0]: #empty
    if (follow) this.#scrollDown();
    else this.#newer.hidden = false;
  }

  #isAtEnd() {
    return this.#list.scrollHeight - this.#list.scrollTop - this.#list.clientHeight < 40;
  }

  #scrollDown() {
    this.#list.scrollTop = this.#list.scrollHeight;
    this.#newer.hidden = true;
  }
}
