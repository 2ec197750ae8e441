"""A dedicated teacher rank: it answers the requests of its block's student ranks until all of them have said goodbye."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Mapping
from threading import Event, Thread
from typing import Any

import torch

from ..config.cards import TeacherCard
from ..config.recipe import Recipe
from ..errors import TeacherError
from ..fingerprint import fingerprint
from ..log.meter import Timers
from ..plan.cost import teacher_costs
from ..train import preempt
from ..train.bridge import Bridge, Sent
from ..train.placement import share_teachers
from ..train.ranks import GOODBYE, rest, watch
from .bank import TeacherBank
from .build import build_teachers, compiled_bank
from .remote import pack_reply, unpack_request

__all__ = ["check_teachers", "serve"]

LAST_WORDS_S = 5.0
"""How long a goodbye that has arrived may take to be read."""


def serve(recipe: Recipe, bridge: Bridge) -> int:
    """Encode batches in the order in which they come in, whichever student they are from; returns the students' exit code.

    Raises TrainingError when a student goes away without a word.
    """
    names = share_teachers(teacher_costs(recipe), len(bridge.teachers))[bridge.place.position - bridge.place.students]
    bank = compiled_bank(TeacherBank(recipe, build_teachers(recipe, bridge.device, names)))
    clients, codes = {peer: _Client(bridge.device) for peer in bridge.students}, [0]
    inbox: queue.Queue[tuple[int, dict[str, Any] | Exception]] = queue.Queue()
    for peer, client in clients.items():  # a thread each: gloo tells of a lost peer only to those who wait for it by name
        Thread(target=_listen, args=(bridge, peer, client, inbox), daemon=True).start()
    while clients:
        rest()  # how long students take is for their own watchdogs
        peer, header = inbox.get()
        if isinstance(header, Exception):
            raise header
        if GOODBYE in header["about"]:
            codes.append(header["about"][GOODBYE])
            del clients[peer]
            continue
        watch(recipe.engine.watchdog_minutes)
        try:
            if not clients[peer].left.is_set():
                clients[peer].answer(bank, bridge, peer, header)
        except RuntimeError:  # that of a closed connection can come before the thread has read the goodbye
            if not clients[peer].left.wait(LAST_WORDS_S):
                raise
    return max(codes)


def check_teachers(cards: Mapping[str, TeacherCard], told: Mapping[str, Mapping[str, str | None]]) -> None:
    """Raise TeacherError when a teacher of this rank is another one than the students say they have (`Fingerprint.brief`)."""
    for name, brief in told.items():
        if unlike := fingerprint(cards[name]).unlike(brief):
            raise TeacherError(
                f"the {' and '.join(unlike)} of teacher {name} on this teacher rank differ from those on the student ranks; give all "
                "machines the same card, weights and loader"
            )


class _Client:
    """What a teacher rank keeps of one student: its timers, and answers until they have been read."""

    def __init__(self, device: torch.device) -> None:
        self.left = Event()
        """It has said goodbye and reads no more answers, not even to what it asked before."""
        self._timers = Timers(device)
        self._answers: deque[Sent] = deque()
        self._forgotten = 0

    def answer(self, bank: TeacherBank, bridge: Bridge, peer: int, header: dict[str, Any]) -> None:
        message = bridge.body(peer, header)
        check_teachers(bank.cards, message.about.get("teachers", {}))
        while self._forgotten < message.about["received"]:
            self._answers.popleft().done()
            self._forgotten += 1
        bank.timers = self._timers
        outputs = bank.encode(unpack_request(message))
        reply = pack_reply(outputs, self._timers.collect(wait=False), preempt.requested())
        self._answers.append(bridge.send(peer, reply))


def _listen(bridge: Bridge, peer: int, client: _Client, inbox: queue.Queue[tuple[int, dict[str, Any] | Exception]]) -> None:
    """Put what a student says into the inbox; a goodbye is known at once, ahead of what lies there."""
    try:
        while not client.left.is_set():
            header = bridge.header(peer)
            if GOODBYE in header["about"]:
                client.left.set()
            inbox.put((peer, header))
    except Exception as error:  # raised in the main thread, where it ends the process
        inbox.put((peer, error))
