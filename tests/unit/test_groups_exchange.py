"""What is made of a broker's answers about the groups exchange, without one."""

from __future__ import annotations

from typing import Any

import carehare
import pamqp.commands
import pytest

from channels_rabbitmq._broker.groups_exchange import GroupsExchange

_REFUSED = carehare.ChannelClosedByServer(403, "ACCESS_REFUSED - no")


_MISSING = carehare.ChannelClosedByServer(404, "NOT_FOUND - no exchange")


def differs(argument: str) -> carehare.ChannelClosedByServer:
    text = f"PRECONDITION_FAILED - inequivalent arg '{argument}' for exchange 'e'"
    return carehare.ChannelClosedByServer(406, text)


def is_passive(exchange: GroupsExchange) -> bool:
    method: Any = exchange.declare()
    return bool(method.passive)


def test_what_is_deleted_between_two_tries_is_declared() -> None:
    exchange = GroupsExchange("e")
    assert not is_passive(exchange)
    assert exchange.on_refusal(exchange.declare(), differs("durable"))
    assert is_passive(exchange)
    assert exchange.on_refusal(exchange.declare(), _MISSING)
    assert not is_passive(exchange)


def test_what_may_not_be_declared_and_is_not_there_is_the_first_refusal() -> None:
    exchange = GroupsExchange("e")
    assert exchange.on_refusal(exchange.declare(), _REFUSED)
    with pytest.raises(carehare.ChannelClosedByServer, match="403"):
        exchange.on_refusal(exchange.declare(), _MISSING)
    assert not is_passive(exchange)  # The permission may be there by now.


@pytest.mark.parametrize(
    "exc",
    [
        differs("type"),
        differs("internal"),
        carehare.ChannelClosedByServer(406, "PRECONDITION_FAILED - exchange limit of 5 reached"),
        carehare.ChannelClosedByServer(541, "INTERNAL_ERROR"),
    ],
)
def test_what_no_other_try_helps_against(exc: carehare.ChannelClosedByServer) -> None:
    exchange = GroupsExchange("e")
    assert not exchange.on_refusal(exchange.declare(), exc)
    assert not is_passive(exchange)


def test_other_methods_are_not_its_matter() -> None:
    exchange = GroupsExchange("e")
    for method in (
        pamqp.commands.Exchange.Declare(exchange="other"),
        pamqp.commands.Exchange.Bind(source="e", destination="other"),
    ):
        assert not exchange.on_refusal(method, _REFUSED)


def test_an_answer_to_an_earlier_question_of_another_connection() -> None:
    """Both connections share it, and both have asked before either was answered."""
    exchange = GroupsExchange("e")
    first, second = exchange.declare(), exchange.declare()
    assert exchange.on_refusal(first, differs("durable"))
    assert exchange.on_refusal(second, differs("durable"))
    assert is_passive(exchange)
