"""AckBatch against a model of the broker, which closes the AMQP channel over a wrong ack."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from channels_rabbitmq._amqp.acks import AckBatch


class Broker:
    """Delivers tags, and takes acks as RabbitMQ does."""

    def __init__(self) -> None:
        self.delivered = 0
        self.outstanding: set[int] = set()
        self.acked: list[int] = []

    def deliver(self) -> int:
        self.delivered += 1
        self.outstanding.add(self.delivered)
        return self.delivered

    def accept(self, tag: int, multiple: bool) -> None:
        # Otherwise: 406 PRECONDITION_FAILED, unknown delivery tag; the AMQP channel is closed.
        assert tag in self.outstanding
        acked = {one for one in self.outstanding if one <= tag} if multiple else {tag}
        self.outstanding -= acked
        self.acked += acked


def batch_of(count: int) -> AckBatch:
    """A batch after ``count`` deliveries."""
    batch = AckBatch()
    for tag in range(1, count + 1):
        batch.expect(tag)
    return batch


def test_contiguous_tags_are_one_ack() -> None:
    batch = batch_of(5)
    for tag in (1, 2, 3):
        batch.add(tag)
    assert batch.drain() == [(3, True)]
    batch.add(4)
    assert batch.drain() == [(4, True)]


def test_tags_beyond_a_gap_are_acked_alone() -> None:
    batch = batch_of(6)
    for tag in (1, 2, 4, 6):
        batch.add(tag)
    assert batch.drain() == [(2, True), (4, False), (6, False)]


def test_multiple_does_not_name_a_tag_that_was_acked_alone() -> None:
    """The broker would ack all up to it, and then close the AMQP channel."""
    batch = batch_of(4)
    batch.add(2)
    assert batch.drain() == [(2, False)]
    batch.add(1)
    assert batch.drain() == [(1, True)]
    batch.add(3)
    assert batch.drain() == [(3, True)]


def test_add_tells_the_first_of_a_batch() -> None:
    batch = batch_of(4)
    assert [batch.add(1), batch.add(2)] == [True, False]
    batch.drain()
    assert [batch.add(3), batch.add(4)] == [True, False]


def test_nothing_collected_is_nothing_to_write() -> None:
    assert AckBatch().drain() == []


def test_nothing_is_remembered_of_what_is_done() -> None:
    batch = batch_of(1001)
    for tag in range(1001, 1, -1):  # the oldest stays outstanding all the time
        batch.add(tag)
        batch.drain()
    assert list(batch._outstanding) == [1]
    assert not batch._collected


# What happens next: "deliver", "write" the acks, or ack one of those that are held (by position).
steps = st.lists(
    st.one_of(st.just("deliver"), st.just("write"), st.integers(0, 1_000_000)), max_size=300
)


@given(steps)
def test_each_tag_is_told_once_and_multiple_names_only_what_is_outstanding(
    steps: list[str | int],
) -> None:
    """Deliveries go on while acks come in any order, in batches of any size."""
    broker, batch = Broker(), AckBatch()
    held: list[int] = []
    given_back: list[int] = []

    def write() -> None:
        for tag, multiple in batch.drain():
            broker.accept(tag, multiple)
        assert sorted(broker.acked) == sorted(given_back)

    for step in steps:
        if step == "deliver":
            held.append(broker.deliver())
            batch.expect(held[-1])
        elif step == "write":
            write()
        elif held:
            assert isinstance(step, int)
            tag = held.pop(step % len(held))
            given_back.append(tag)
            batch.add(tag)
    write()
    assert broker.outstanding == set(held)


@given(st.permutations(range(1, 41)), st.sets(st.integers(0, 39)))
def test_any_order_in_any_batches(order: list[int], ends_of_batches: set[int]) -> None:
    broker, batch = Broker(), AckBatch()
    for _ in order:
        batch.expect(broker.deliver())
    for position, tag in enumerate(order):
        batch.add(tag)
        if position in ends_of_batches:
            for ack in batch.drain():
                broker.accept(*ack)
    for ack in batch.drain():
        broker.accept(*ack)
    assert sorted(broker.acked) == sorted(order)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=20))
def test_contiguous_batches_need_one_ack_each(sizes: list[int]) -> None:
    batch = AckBatch()
    tag = 0
    for size in sizes:
        for _ in range(size):
            tag += 1
            batch.expect(tag)
            batch.add(tag)
        assert batch.drain() == [(tag, True)]
