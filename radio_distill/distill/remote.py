"""Teachers on ranks of their own, as a student rank sees them: batches out, maps in.

A student reads its images itself and sends each teacher rank the views of its teachers (bytes: a quarter of what comes back),
so teachers have no state: no stream, no statistics, no step. A refit, a picture or a second look at a bad batch is just one more
request. Batches that are announced ahead are encoded while the student trains on the ones before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from ..config.load import cards_of
from ..config.recipe import Recipe
from ..fingerprint import fingerprint
from ..plan.cost import teacher_costs
from ..train import preempt
from ..train.bridge import Bridge, Message, Sent
from ..train.placement import share_teachers
from ..types import Batch, View, VisionOutput
from .bank import spaces_of

__all__ = ["RemoteTeachers", "pack_reply", "unpack_request"]

Outputs = dict[str, VisionOutput]


@dataclass
class _Request:
    """One batch at one or more teacher ranks."""

    batch: Batch
    """Kept so that no other batch has its id."""
    sent: dict[int, Sent]
    """By teacher rank that has not answered."""
    outputs: Outputs = field(default_factory=dict)


class RemoteTeachers:
    """An `Encoder` whose teachers are on the teacher ranks of this rank's block."""

    reads_ahead = True

    def __init__(self, recipe: Recipe, bridge: Bridge) -> None:
        self.recipe, self.cards, self._bridge = recipe, cards_of(recipe), bridge
        self.spaces = spaces_of(recipe, bridge.device)
        shares = share_teachers(teacher_costs(recipe), len(bridge.teachers))
        self._teachers = dict(zip(bridge.teachers, shares))
        self._requests: dict[int, _Request] = {}
        """By id of the batch."""
        self._queues: dict[int, deque[_Request]] = {peer: deque() for peer in bridge.teachers}
        """What each teacher rank has not answered, in order."""
        self._received = dict.fromkeys(bridge.teachers, 0)
        self._seconds: dict[str, float] = {}
        self._untold = {peer: {n: fingerprint(self.cards[n]).brief() for n in names} for peer, names in self._teachers.items()}
        """What each teacher rank compares its teachers with, at the first request."""

    def announce(self, batches: list[Batch]) -> None:
        """Send batches that `encode` will be asked for; those already sent stay as they are."""
        for batch in batches:
            if id(batch) not in self._requests:
                self._requests[id(batch)] = self._send(batch)

    def encode(self, batch: Batch) -> Outputs:
        """The batch's outputs, in the recipe's order; waits for them. Raises TrainingError when a teacher rank is gone."""
        self.announce([batch])
        request = self._requests.pop(id(batch))
        for peer in list(request.sent):
            while peer in request.sent:
                self._receive(peer)
        return {name: request.outputs[name] for name in self.recipe.partitions[batch.partition].teachers}

    def seconds(self) -> dict[str, float]:
        """Time that teachers spent on this rank's images, as far as they have told."""
        seconds, self._seconds = self._seconds, {}
        return seconds

    def _send(self, batch: Batch) -> _Request:
        active, request = self.recipe.partitions[batch.partition].teachers, _Request(batch, {})
        for peer, teachers in self._teachers.items():
            names = [name for name in teachers if name in active]
            if names:
                message = pack_request(batch, names, received=self._received[peer], teachers=self._untold.pop(peer, {}))
                request.sent[peer] = self._bridge.send(peer, message)
                self._queues[peer].append(request)
        return request

    def _receive(self, peer: int) -> None:
        """Take the next answer of a teacher rank, whichever batch it is for."""
        message = self._bridge.body(peer, self._bridge.header(peer))
        self._received[peer] += 1
        request = self._queues[peer].popleft()
        request.sent.pop(peer).done()
        for name, (summary, features) in message.about["outputs"].items():
            request.outputs[name] = VisionOutput(
                None if summary is None else message.tensors[summary], message.tensors[features]
            )
        for name, seconds in message.about["seconds"].items():
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds
        if message.about["stop"] is not None:
            preempt.ask(message.about["stop"])


def pack_request(
    batch: Batch, names: list[str], *, received: int, teachers: Mapping[str, Mapping[str, str | None]] = MappingProxyType({})
) -> Message:
    """What teachers need of a batch. received: how many answers of that teacher rank have come in. teachers: which they should be
    (`Fingerprint.brief`)."""
    unique = list({id(batch.views[name].images_B3HW): batch.views[name].images_B3HW for name in names}.items())
    index = {key: i for i, (key, _) in enumerate(unique)}
    views = {name: index[id(batch.views[name].images_B3HW)] for name in names}
    about = {"partition": batch.partition, "size": len(batch), "views": views, "received": received}
    about |= {"teachers": dict(teachers)} if teachers else {}
    return Message(about, [*(images for _, images in unique), batch.seeds_B])


def unpack_request(message: Message) -> Batch:
    """The batch as a teacher rank sees it: without names, and without boxes, which only the loss needs."""
    about, seeds_B = message.about, message.tensors[-1]
    nowhere = torch.empty(0, 4, device=seeds_B.device)
    views = {name: View(message.tensors[i], nowhere) for name, i in about["views"].items()}
    return Batch(about["partition"], ("",) * about["size"], seeds_B, views)


def pack_reply(outputs: Outputs, seconds: dict[str, float], stop: str | None) -> Message:
    """Outputs of one batch. stop: the signal that this teacher rank was asked to stop with."""
    tensors: list[Tensor] = []
    where: dict[str, tuple[int | None, int]] = {}
    for name, out in outputs.items():
        summary = None if out.summary_BC is None else len(tensors)
        tensors += [] if out.summary_BC is None else [out.summary_BC]
        where[name] = summary, len(tensors)
        tensors.append(out.features_BCHW)
    return Message({"outputs": where, "seconds": seconds, "stop": stop}, tensors)
