// What happens, in words: the newest on top.

const LONGEST = 30; // lines

const list = document.getElementById("events");
const startedAt = performance.now();

// kind: "good", "bad", "ice" or nothing
export function tell(text, kind = "") {
  const item = document.createElement("li");
  item.className = kind;
  const time = document.createElement("time");
  time.textContent = `${((performance.now() - startedAt) / 1000).toFixed(1)} s`;
  item.append(time, text);
  list.prepend(item);
  while (list.children.length > LONGEST) list.lastChild.remove();
}

export const many = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
