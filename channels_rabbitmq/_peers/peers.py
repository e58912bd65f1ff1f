"""``Peers``: the other processes, for one ``LoopLayer``."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable

from .._codec import MalformedBody, MessageCodec, unpack_info
from .._identity import TO_ALL, Place, id_of, to_process
from .._reporter import Reporter
from .._settings.settings import Settings
from ..exceptions import BrokerUnavailable
from ..presence import GroupMembers, Member
from ..statistics import Counters
from ..status import MissingProcess, Status
from . import statuses
from .answerer import Answerer, Local
from .asker import Asker
from .greeter import Greeter
from .late_acks import Acker, LateAcks
from .link import Link
from .processes import Processes
from .questions import Question
from .requests import (
    ABSENT,
    ADD,
    BYE,
    COUNT,
    DISCARD,
    FLUSH,
    HEARD,
    HELLO,
    HERE,
    MEMBERS,
    MOST_IDS,
    PART_SIZE,
    STATUS,
    Action,
    Answer,
    Greeting,
    Heard,
    PackedMember,
    Request,
    UnknownKind,
    read,
)
from .standstill import Standstill

# Bytes of a request, whatever max_message_size is. The largest is a part of a list of members.
_LARGEST_REQUEST = 1024 * 1024
# Seconds for which others are asked about those that are missing in a status.
_HEARD_TIMEOUT = 0.5


class Peers:
    """Says who is in a group anywhere, and changes groups in other processes.

    ``local`` is what this event loop has, and ``link`` its way to the others. A request waits for
    at most ``request_expiry`` seconds in a queue. So an event loop that stood still for longer may
    have missed a hello or a bye; then it greets the others anew, as on a new connection.
    """

    def __init__(
        self,
        id_: str,
        settings: Settings,
        local: Local,
        link: Link,
        counters: Counters,
        reporter: Reporter,
        request_expiry: float,
        place: Place,
    ) -> None:
        self._id = id_
        self._local = local
        self._counters = counters
        self._reporter = reporter
        self._loop = asyncio.get_running_loop()
        self._codec = MessageCodec(
            max_message_size=_LARGEST_REQUEST,
            symmetric_encryption_keys=settings.symmetric_encryption_keys,
        )
        self._recipients = (TO_ALL, to_process(id_))
        self.processes = Processes(id_, self._loop.time)
        self.greeter = Greeter(id_, self.processes, link, self._codec, self._on_settled, place)
        self._asker = Asker(id_, self.processes, self.greeter, link, self._codec)
        longest = settings.operation_timeout
        # The broker may have a limit that max_message_size keeps to.
        part_size = min(PART_SIZE, settings.max_message_size // 2)
        self._answerer = Answerer(
            id_, local, self.processes, link, self._codec, counters, longest, part_size
        )
        self._link = link
        self._late_acks = LateAcks()
        self._standstill = Standstill(request_expiry, self._on_stood_still)

    # From the connection that receives

    def on_ready(self) -> None:
        """Requests to this process arrive from now on."""
        bye = Greeting(BYE, self._id)  # Before hello no process knows this one.
        self._link.set_bye(self._codec.encode_for_channel(TO_ALL, bye.message()))
        self._standstill.start()
        self.greeter.on_ready()

    def on_lost(self) -> None:
        """Nothing arrives any more, until ``on_ready``."""
        self._standstill.stop()
        self._late_acks.clear()
        self._forget_all_heard(self._loop.time())

    def _forget_all_heard(self, since: float) -> None:
        self.processes.on_nothing_heard(since)
        self.greeter.on_lost()
        self._asker.questions.on_own_connection_lost()

    def _on_stood_still(self, since: float) -> None:
        self._forget_all_heard(since)
        self.greeter.on_ready()

    def on_request(self, body: bytes, tag: int, published: int, acker: Acker) -> None:
        """Handle a body that another process has published, or any other program."""
        self._late_acks.add(acker, tag)
        self._standstill.check()
        if not body:  # The sender only wants to know whether this queue is there.
            return
        try:
            envelope = self._codec.decode(body)
            if envelope.channel not in self._recipients:
                raise MalformedBody("a request for another process")
            request = read(envelope.message())
        except UnknownKind:
            self._counters.unanswered += 1
            return
        except MalformedBody as err:
            self._counters.malformed_requests += 1
            self._reporter.report("malformed_request", str(err))
            return
        if request.sender == self._id:
            if isinstance(request, Request):
                self._asker.questions.on_echo(request.number)
        elif isinstance(request, Greeting):
            self._on_greeting(request)
        else:
            self.processes.on_heard(request.sender)
            if isinstance(request, Answer):
                self._asker.questions.on_answer(request)
            else:
                self._answerer.on_request(request)

    def _on_greeting(self, greeting: Greeting) -> None:
        if greeting.kind == BYE:
            self.processes.on_bye(greeting.sender)
            self._asker.questions.wake_all()
            return
        self.processes.on_heard(greeting.sender)
        if greeting.place is not None:
            self.processes.on_place(greeting.sender, greeting.place)
        if greeting.kind == HELLO:
            self.greeter.on_hello(greeting.sender, greeting.number)
        elif greeting.kind == ABSENT:
            self.greeter.on_absent(greeting.absent)
        else:
            assert greeting.kind == HERE, "there is no other kind"
            self.greeter.on_here(greeting)

    def _on_settled(self) -> None:
        self._asker.questions.wake_all()

    # Questions

    async def group_members(self, group: str, deadline: float) -> GroupMembers:
        """Ask all processes for the members of a group: see ``RabbitmqChannelLayer``."""
        self._standstill.check()
        question = await self._asker.sharing.ask(Action(MEMBERS, group), deadline)
        silent, is_complete = self._note(question)
        answers = self._answers(question)
        packed = [*self._local.confirmed(group), *(m for a in answers for m in a.members)]
        known = self.processes.known()
        return GroupMembers(
            members=tuple(_unpack(packed)),
            is_complete=is_complete,
            silent=tuple(sorted(silent)),
            absent=tuple(sorted(question.returned.intersection(known))),
        )

    async def group_count(self, group: str, deadline: float) -> int:
        """Ask all processes for the number of a group's members.

        Raises BrokerUnavailable if it would be the number of this process's own members only,
        because nobody has answered in time.
        """
        self._standstill.check()
        question = await self._asker.sharing.ask(Action(COUNT, group), deadline)
        silent, _ = self._note(question)
        if not question.answers and not self._asker.has_all(question):
            raise BrokerUnavailable(_no_answers(silent))
        return self._local.count(group) + sum(a.count for a in self._answers(question))

    def _note(self, question: Question) -> tuple[list[str], bool]:
        """Count a question; return the silent processes, and whether it is complete."""
        is_complete, silent = self._is_complete(question), self._asker.silent(question)
        self._counters.questions += 1
        self._counters.incomplete += not is_complete
        for id_ in silent:
            self._counters.silent += 1
            self._reporter.report("silent", self.processes.describe(id_))
        return silent, is_complete

    def _is_complete(self, question: Question) -> bool:
        self._standstill.check()
        return self._asker.has_all(question) and not question.returned.intersection(
            self.processes.known()
        )

    def _answers(self, question: Question) -> list[Answer]:
        """Return the answers of processes that haven't ended meanwhile."""
        return [
            answer
            for id_, answers in question.answers.items()
            if not self.processes.is_gone(id_)
            for answer in answers
        ]

    async def flush(self, deadline: float) -> None:
        """Have all other processes empty their channels and groups.

        Raises BrokerUnavailable, which names those that haven't done it by ``deadline``, and
        NotImplementedError if one doesn't allow it.
        """
        question = await self._asker.ask_all(Action(FLUSH), deadline)
        silent, is_complete = self._note(question)
        for answer in self._answers(question):
            if answer.error:
                text = f"The process {answer.sender} answers: {answer.error}"
                raise NotImplementedError(text) if answer.is_mistake else BrokerUnavailable(text)
        if not is_complete:
            missing = sorted({*silent, *question.returned})
            raise BrokerUnavailable(
                "flush() didn't reach all processes in time: no answer of "
                f"{', '.join(missing) or 'this one to itself'}"
            )

    async def status(self, deadline: float) -> Status:
        """Ask all processes how they are: see ``RabbitmqChannelLayer``."""
        self._standstill.check()
        question = await self._asker.sharing.ask(Action(STATUS), deadline)
        silent, is_complete = self._asker.silent(question), self._is_complete(question)
        found = [self._local.own_status()]
        for answer in self._answers(question):
            try:
                found.append(statuses.read(answer.status, answer.sender))
            except MalformedBody:
                silent.append(answer.sender)
        is_blocked = self._link.is_blocked
        if is_blocked:  # Neither the question nor an answer need have been taken.
            silent = []
        answered = [one.statistics.id for one in found if one.statistics.id != self._id]
        absent = sorted(question.returned.intersection(self.processes.known()))
        heard = await self._heard_by_all([*silent, *absent], answered)
        await self.greeter.wait_absent_told()
        lost = self._lost(question, {*answered, *silent, *absent, self._id})
        return Status(
            processes=tuple(sorted(found, key=lambda one: one.statistics.since)),
            silent=tuple(_missing(id_, heard[id_]) for id_ in sorted(silent)),
            absent=tuple(_missing(id_, heard[id_]) for id_ in absent),
            is_complete=is_complete and not silent and not is_blocked,
            is_blocked=is_blocked,
            lost=tuple(_missing(id_, lost[id_]) for id_ in sorted(lost)),
        )

    def _lost(self, question: Question, others: set[str]) -> dict[str, Heard]:
        """Return what this process and those that have answered know of lost ones."""
        lost = self.processes.lost()
        for answer in self._answers(question):
            for id_, heard in answer.heard.items():
                lost[id_] = _newest(lost.get(id_, heard), heard)
        return {
            id_: lost[id_] for id_ in lost.keys() - others if not self.processes.has_said_bye(id_)
        }

    async def _heard_by_all(self, ids: list[str], answered: list[str]) -> dict[str, Heard]:
        """Return what this process and those that have answered know of others."""
        heard = {id_: self.processes.heard(id_) for id_ in ids}
        if not ids or not answered:
            return heard
        deadline = self._loop.time() + _HEARD_TIMEOUT
        with contextlib.suppress(BrokerUnavailable):
            action = Action(HEARD, ids=tuple(ids[:MOST_IDS]))
            question = await self._asker.ask_all(action, deadline, answered)
            for answer in self._answers(question):
                for id_ in heard.keys() & answer.heard:
                    heard[id_] = _newest(heard[id_], answer.heard[id_])
        return heard

    # Changes in other processes

    async def add(self, group: str, channel: str, info: bytes | None, deadline: float) -> None:
        """Have the process of a channel add it to a group, and wait until that is confirmed."""
        await self._change(Action(ADD, group, channel, info), deadline)

    async def discard(self, group: str, channel: str, deadline: float) -> None:
        """Have the process of a channel take it out of a group."""
        await self._change(Action(DISCARD, group, channel), deadline)

    async def _change(self, action: Action, deadline: float) -> None:
        self._standstill.check()
        id_ = id_of(action.channel)
        answer = await self._asker.ask_one(id_, action, deadline)
        if answer.error:
            text = f"The process {id_} answers: {answer.error}"
            raise ValueError(text) if answer.is_mistake else BrokerUnavailable(text)

    # The end

    def close(self) -> None:
        """Ask and answer nothing more."""
        self._standstill.stop()
        self._late_acks.clear()
        self.greeter.close()
        self._answerer.close()
        self._asker.sharing.close()
        self._asker.questions.wake_all()

    async def wait_closed(self) -> None:
        """Wait for the tasks that ``close`` has cancelled."""
        tasks = [*self.greeter.tasks, *self._answerer.tasks, *self._asker.sharing.tasks]
        if tasks:
            await asyncio.wait(tasks)


def _no_answers(silent: list[str]) -> str:
    if silent:
        return f"No process has answered in time, of {len(silent)} that are there"
    return "It isn't known yet which other processes are there"


def _newest(one: Heard, other: Heard) -> Heard:
    agos = [heard.ago for heard in (one, other) if heard.ago is not None]
    return Heard(min(agos, default=None), one.place or other.place)


def _missing(id_: str, heard: Heard) -> MissingProcess:
    pid, host = heard.place or (0, "")
    return MissingProcess(id_, heard.ago, pid, host)


def _unpack(members: Iterable[PackedMember]) -> Iterable[Member]:
    for channel, info in members:
        yield Member(channel, None if info is None else unpack_info(info))
