// Buttons, and what scripts/demo does for them.

import { tell } from "./words.js";

const { token, actions } = document.body.dataset;

// A button that is disabled would lose the focus of the keyboard.
export const isBusy = (button) => button.getAttribute("aria-disabled") === "true";
export const setBusy = (button, busy) => button.setAttribute("aria-disabled", String(busy));

async function act(button) {
  if (isBusy(button)) return;
  setBusy(button, true);
  try {
    const answer = await fetch(`/${button.dataset.action}`, { method: "POST", headers: { "X-Demo-Token": token } });
    if (!answer.ok) tell(`That didn't work: the demo answered ${answer.status}.`, "bad");
  } catch {
    tell("The demo has ended. Start scripts/demo again, and reload.", "bad");
  }
  setBusy(button, false);
}

export function connectButtons() {
  const possible = JSON.parse(actions);
  for (const button of document.querySelectorAll("[data-action]")) {
    button.addEventListener("click", () => act(button));
    if (possible.includes(button.dataset.action)) continue;
    setBusy(button, true);
    button.title = "RabbitMQ isn't the demo's own: RABBITMQ_URL names it.";
  }
}
