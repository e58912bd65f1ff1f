// The book of all messages: who should get each, and what became of it.
//
// A message is due at all windows that are members when it is sent. It is *received* when all of
// them have it. The layer keeps the order of one sender's messages, so a window that gets a later
// one has lost what it hasn't got before. It is *lost* then, unless something explains it: those are
// counted apart, by what happened while the message was on its way.
//
//     rabbitmq   RabbitMQ was killed: its queues, with what was in them, are gone
//     process    the sender's or receiver's process was killed
//     frozen     the receiver's consumer was frozen, and the layer keeps its newest messages only

const PATIENCE = 20000; // ms without a word of a sender, after which its messages count as lost
const PATIENCE_AFTER_TROUBLE = 4000;

const WORST_FIRST = ["lost", "process", "rabbitmq", "frozen"];

export class Ledger {
  sent = 0;
  received = 0;
  lost = 0;
  process = 0;
  rabbitmq = 0;
  frozen = 0;

  #queues = new Map(); // sender -> receiver -> deliveries that are due, in the order of sending

  get pending() {
    return this.sent - this.received - this.lost - this.process - this.rabbitmq - this.frozen;
  }

  // Notes a message and returns it. receivers: sessions, the sender's own is one of them.
  send(sender, number, text, receivers) {
    const message = { sender, number, text, sentAt: performance.now(), due: receivers.length, fate: "received" };
    this.sent++;
    let queues = this.#queues.get(sender);
    if (!queues) this.#queues.set(sender, (queues = new Map()));
    for (const receiver of receivers) {
      if (!queues.has(receiver)) queues.set(receiver, { deliveries: [], heardAt: 0 });
      queues.get(receiver).deliveries.push({ message, receiver, trouble: receiver.isFrozen ? "frozen" : null });
    }
    return message;
  }

  // Returns the message, or null if it wasn't due here.
  receive(receiver, sender, number) {
    const queue = this.#queues.get(sender)?.get(receiver);
    if (!queue) return null;
    queue.heardAt = performance.now();
    const { deliveries } = queue;
    let passed = 0;
    while (passed < deliveries.length && deliveries[passed].message.number < number) passed++;
    for (const missed of deliveries.splice(0, passed)) this.#end(missed, missed.trouble ?? "lost");
    if (deliveries[0]?.message.number !== number) return null;
    const { message } = deliveries.shift();
    this.#settle(message);
    return message;
  }

  // It wasn't sent after all: the layer has said so.
  withdraw(sender, number) {
    let withdrawn = null;
    for (const { deliveries } of this.#queues.get(sender)?.values() ?? []) {
      const index = deliveries.findIndex(({ message }) => message.number === number);
      if (index >= 0) withdrawn = deliveries.splice(index, 1)[0].message;
    }
    if (!withdrawn) return null;
    withdrawn.due = 0;
    this.sent--;
    return withdrawn;
  }

  // RabbitMQ was lost: that explains what is under way now and won't arrive.
  noteOutage() {
    for (const delivery of this.#all()) delivery.trouble ??= "rabbitmq";
  }

  noteFrozen(receiver) {
    for (const delivery of this.#all()) {
      if (delivery.receiver === receiver) delivery.trouble ??= "frozen";
    }
  }

  waitingFor(receiver) {
    let count = 0;
    for (const queues of this.#queues.values()) count += queues.get(receiver)?.deliveries.length ?? 0;
    return count;
  }

  // A session's process is gone: it gets nothing any more; what it sent may have got away.
  end(session) {
    for (const delivery of this.#all()) if (delivery.message.sender === session) delivery.trouble = "process";
    for (const queues of this.#queues.values()) {
      for (const delivery of queues.get(session)?.deliveries ?? []) this.#end(delivery, "process");
      queues.delete(session);
    }
  }

  // Ends what can't arrive any more. isHeldUp(receiver): frozen, or without RabbitMQ.
  sweep(isHeldUp, troubleEndedAt) {
    const now = performance.now();
    for (const [sender, queues] of this.#queues) {
      for (const [receiver, queue] of queues) {
        if (isHeldUp(receiver)) continue;
        const since = now - Math.max(queue.heardAt, troubleEndedAt);
        queue.deliveries = queue.deliveries.filter((delivery) => {
          const patience = delivery.trouble ? PATIENCE_AFTER_TROUBLE : PATIENCE;
          if (Math.min(since, now - delivery.message.sentAt) < patience) return true;
          this.#end(delivery, delivery.trouble ?? "lost");
          return false;
        });
      }
      if (sender.isOver && [...queues.values()].every((queue) => !queue.deliveries.length)) this.#queues.delete(sender);
    }
  }

  *#all() {
    for (const queues of this.#queues.values()) for (const { deliveries } of queues.values()) yield* deliveries;
  }

  #end({ message }, fate) {
    if (message.fate === "received" || WORST_FIRST.indexOf(fate) < WORST_FIRST.indexOf(message.fate)) message.fate = fate;
    this.#settle(message);
  }

  #settle(message) {
    if (--message.due === 0) this[message.fate]++;
  }
}
