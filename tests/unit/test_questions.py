"""Questions and their answers: numbers, parts, repeated and late answers."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from channels_rabbitmq._codec import LONGEST_INFO, MalformedBody, MessageCodec, pack_info
from channels_rabbitmq._identity import Place
from channels_rabbitmq._peers.questions import Questions
from channels_rabbitmq._peers.requests import (
    ABSENT,
    ADD,
    BYE,
    COUNT,
    HELLO,
    HERE,
    MEMBERS,
    PART_SIZE,
    Action,
    Answer,
    Greeting,
    Heard,
    Request,
    read,
    split,
)

A, B = (f"crq.{letter * 16}" for letter in "ab")

# One byte more than ``pack_info`` allows: 0xda is a string with a length of two bytes.
LONG_INFO = b"\x81\xa1x\xda" + (LONGEST_INFO - 5).to_bytes(2, "big") + b"y" * (LONGEST_INFO - 5)


# What msgpack may unpack
_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64)
    | st.floats()
    | st.binary()
    | st.sampled_from(["", A, f"{A}!x", "g", "!all", "\ud800"]),
    lambda values: (
        st.lists(values, max_size=3)
        | st.dictionaries(st.text(max_size=2) | st.integers(), values, max_size=3)
    ),
    max_leaves=6,
)


ACTION = Action("count", "g")


class TestQuestions:
    def test_a_part_that_has_come_puts_off_the_repeat(self) -> None:
        questions = Questions()
        question = questions.open(ACTION)
        questions.on_answer(Answer(A, question.number, part=0, parts=2))
        assert question.to_repeat([A, B]) == [B]
        assert question.to_repeat([A, B]) == [A, B]
        questions.on_answer(Answer(A, question.number, part=1, parts=2))
        assert question.unanswered([A, B]) == [B]

    def test_each_has_its_number(self) -> None:
        questions = Questions()
        first, second = questions.open(ACTION), questions.open(ACTION)
        assert first.number != second.number
        questions.on_answer(Answer(A, second.number, count=2))
        assert first.answers == {}
        assert [answer.count for answer in second.answers[A]] == [2]

    def test_a_late_answer_changes_nothing(self) -> None:
        questions = Questions()
        question = questions.open(ACTION)
        questions.close(question)
        questions.on_answer(Answer(A, question.number))
        questions.on_echo(question.number)
        assert question.answers == {}
        assert not question.has_echo
        questions.close(question)

    def test_an_answer_to_a_question_that_was_never_asked(self) -> None:
        Questions().on_answer(Answer(A, 7))

    def test_a_repeated_answer_counts_once(self) -> None:
        questions = Questions()
        question = questions.open(ACTION)
        for series in (1, 2):
            answer = Answer(A, question.number, series, members=((f"{A}!x", None),))
            questions.on_answer(answer)
        assert [answer.series for answer in question.answers[A]] == [1]

    def test_all_parts_are_one_answer(self) -> None:
        questions = Questions()
        question = questions.open(ACTION)
        parts = [Answer(A, question.number, 5, part, 3) for part in range(3)]
        for part in (parts[2], parts[0], parts[2]):
            questions.on_answer(part)
            assert question.unanswered([A]) == [A]
        questions.on_answer(parts[1])
        assert question.answers[A] == parts
        assert question.unanswered([A, B]) == [B]

    def test_parts_of_two_series_do_not_mix(self) -> None:
        """The members may have changed between two answers."""
        questions = Questions()
        question = questions.open(ACTION)
        questions.on_answer(Answer(A, question.number, 1, 0, 2))
        questions.on_answer(Answer(A, question.number, 2, 1, 2))
        assert question.answers == {}

    def test_an_answer_ends_an_absence(self) -> None:
        questions = Questions()
        question = questions.open(ACTION)
        question.returned.add(A)
        assert question.unanswered([A, B]) == [B]
        questions.on_answer(Answer(A, question.number))
        assert question.returned == set()

    def test_on_a_new_connection_the_echo_is_due_again(self) -> None:
        questions = Questions()
        question = questions.open(ACTION)
        questions.on_echo(question.number)
        question.required = [A]
        questions.on_own_connection_lost()
        assert not question.has_echo
        assert question.required is None


class TestForm:
    @pytest.mark.parametrize(
        "request_",
        [
            Greeting(HELLO, A, 3),
            Greeting(HERE, A, answered=((B, 1),)),
            Greeting(HERE, A, known=(B,), absent={B: 2.5}),
            Greeting(ABSENT, A, absent={B: 0}),
            Greeting(BYE, A),
            Request(MEMBERS, A, 1, 0.5, "g"),
            Request(COUNT, A, 2, 3, "g"),
            Request(ADD, A, 3, 0.5, "g", f"{B}!x", pack_info({"a": [1]})),
            Answer(A, 1, 2, 0, 2, members=((f"{A}!x", None), (f"{A}!y", pack_info({})))),
            Answer(A, 1, count=7),
            Answer(A, 1, error="no", is_mistake=True),
            Greeting("hello", A, 3, place=Place(17, "web")),
            Request("status", A, 1, 0.5),
            Request("heard", A, 1, 0.5, ids=(A, B)),
            Answer(A, 1, status={"oldest": 1.0}),
            Answer(A, 1, heard={B: Heard(1.5, Place(17, "web")), A: Heard(None, None)}),
        ],
    )
    def test_what_is_written_is_read(self, request_: Greeting | Request | Answer) -> None:
        codec = MessageCodec(max_message_size=10_000)
        body = codec.encode_for_channel("!all", request_.message())
        assert read(codec.decode(body).message()) == request_

    @pytest.mark.parametrize(
        ("change", "problem"),
        [
            ({"kind": "question"}, "unknown kind"),
            ({"kind": 1}, "wrong value of 'kind'"),
            ({"from": "crq.x"}, "without a sender"),
            ({"number": True}, "wrong value of 'number'"),
            ({"series": None}, "wrong value of 'series'"),
            ({"part": 1}, "wrong numbers"),
            ({"part": -1}, "wrong numbers"),
            ({"count": -1}, "wrong numbers"),
            ({"members": {}}, "wrong value of 'members'"),
            ({"members": ["x"]}, "wrong member"),
            ({"members": [[f"{B}!x", None]]}, "wrong member"),
            ({"members": [[A, None]]}, "wrong member"),
            ({"members": [[f"{A}!x", {}]]}, "wrong info"),
            ({"members": [[f"{A}!x", LONG_INFO]]}, "wrong info"),
            ({"members": [[f"{A}!x", b"\xc0"]]}, "not a map"),
            ({"error": 1}, "wrong value of 'error'"),
            ({"status": 1}, "wrong value of 'status'"),
            ({"heard": []}, "wrong processes"),
            ({"heard": {"x": [1, 2, "web"]}}, "wrong processes"),
            ({"heard": {1: [1, 2, "web"]}}, "wrong processes"),
            ({"heard": {A.encode(): [1, 2, "web"]}}, "wrong processes"),
            ({"heard": {A: [1, 2]}}, "wrong processes"),
            ({"heard": {A: [-1, 2, "web"]}}, "wrong processes"),
            ({"heard": {A: [1, -2, "web"]}}, "wrong place"),
            ({"heard": {A: [1, 2, b"web"]}}, "wrong place"),
        ],
    )
    def test_answers_that_nobody_should_give(self, change: dict[str, Any], problem: str) -> None:
        message = Answer(A, 1).message()
        message |= change
        with pytest.raises(MalformedBody, match=problem):
            read(message)

    @pytest.mark.parametrize(
        ("change", "problem"),
        [
            ({"group": None}, "wrong name"),
            ({"group": "!all"}, "wrong name"),
            ({"group": "g" * 100}, "wrong name"),
            ({"channel": 1}, "wrong name"),
            ({"channel": f"{B}!{'x' * 99}"}, "wrong name"),
            ({"number": None}, "wrong value of 'number'"),
            ({"info": {}}, "wrong info"),
            ({"info": LONG_INFO}, "wrong info"),
            ({"info": b""}, "not msgpack"),
            ({"timeout": "1"}, "wrong timeout"),
            ({"timeout": -1}, "wrong timeout"),
            ({"timeout": float("nan")}, "wrong timeout"),
            ({"timeout": float("inf")}, "wrong timeout"),
        ],
    )
    def test_requests_that_nobody_should_make(self, change: dict[str, Any], problem: str) -> None:
        message = Request(ADD, A, 1, 1.0, "g", f"{B}!x").message()
        message |= change
        with pytest.raises(MalformedBody, match=problem):
            read(message)

    @pytest.mark.parametrize("known", ["x", [1], ["x"], {A: 1}])
    def test_greetings_that_nobody_should_say(self, known: object) -> None:
        message = Greeting(HERE, A).message() | {"known": known}
        with pytest.raises(MalformedBody, match="wrong list of processes"):
            read(message)

    @pytest.mark.parametrize(
        "absent", [None, [A], {"x": 1.0}, {1: 1.0}, {A: "1"}, {A: -1.0}, {A: float("inf")}]
    )
    def test_absences_that_cannot_be(self, absent: object) -> None:
        message = Greeting(ABSENT, A).message() | {"absent": absent}
        with pytest.raises(MalformedBody, match=r"wrong (list of processes|age|value of 'absent')"):
            read(message)

    @pytest.mark.parametrize("answered", [None, [A], [[A]], [[1, 1]], [[A, "1"]]])
    def test_answers_to_no_hello(self, answered: object) -> None:
        message = Greeting(HERE, A).message() | {"answered": answered}
        with pytest.raises(MalformedBody, match=r"wrong (list of hellos|value of 'answered')"):
            read(message)

    def test_an_empty_message(self) -> None:
        with pytest.raises(MalformedBody):
            read({})

    @given(
        st.dictionaries(
            st.sampled_from([*Answer(A, 1, error="x").message(), "timeout", "group", "channel"])
            | st.sampled_from(["info", "known", "answered"])
            | st.integers(),
            _VALUES,
        ),
        st.sampled_from(["hello", "here", "bye", "members", "count", "add", "discard", "answer"]),
    )
    def test_whatever_it_is_only_one_error_is_raised(
        self, message: dict[Any, Any], kind: str
    ) -> None:
        with contextlib.suppress(MalformedBody):
            read({"kind": kind, "from": A, **message})

    def test_later_versions_may_say_more(self) -> None:
        assert read(Greeting(HERE, A).message() | {"more": 1}) == Greeting(HERE, A)

    def test_parts(self) -> None:
        assert split([], PART_SIZE) == [()]
        members = [(f"{A}!{n}", b"x" * 4096) for n in range(100)]
        parts = split(members, PART_SIZE)
        assert len(parts) > 1
        assert [member for part in parts for member in part] == members
        largest = max(sum(len(c) + len(i or b"") for c, i in part) for part in parts)
        assert largest < PART_SIZE + 5000
