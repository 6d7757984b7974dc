"""Plays a case of `channels.json` to a channel: what an application and a tunnel do to one side of it."""

from __future__ import annotations

from collections import deque
from typing import Any

import records
from channel import ABORTED, Channel, Stream
from records import FIN, NONE, RESET, Data, Greeting, Plain, Record
from tunnel import VIOLATION, TunnelLost, Violation
from wire import Refused

ENDS = {NONE: "none", FIN: "fin", RESET: "reset"}
NOT_KNOWN, UNKNOWN_PURPOSE, LAST_PURPOSE = 5, 6, 3


class Ended(Exception):
    """The channel ends with this code."""


class Script:
    """In the place of a tunnel: what is read is given, what is sent is noted."""

    def __init__(self, player: "Player") -> None:
        self.player, self.reads, self.greeted = player, deque[Record](), False

    async def send(self, record: Record) -> None:
        self.player.note(record)

    async def receive(self, _seconds: float | None = None) -> Record:
        if not self.reads:
            raise TunnelLost("nothing more is said")
        return self.reads.popleft()


class Player:
    def __init__(self, side: str) -> None:
        self.channel = Channel(side == "reacher", self._serve)
        self.tunnel: Script | None = None
        self.greeting: dict[str, Any] | None = None
        self.sends: dict[int, dict[str, Any]] = {}
        self.got: dict[int, dict[str, Any]] = {}
        self.streams: dict[int, Stream] = {}

    async def _serve(self, _: Stream) -> None:
        """The application is played by `_take`."""

    async def play(self, steps: list[dict[str, Any]]) -> None:
        at = 0
        while at < len(steps):
            step, at = steps[at], at + 1
            if "tunnel" in step:
                self.channel.detach()
                self.tunnel, self.sends = Script(self), {}
                while at < len(steps) and "read" in steps[at]:
                    self.tunnel.reads.append(self._decoded(steps[at]["read"]))
                    at += 1
                await self._greet(self.tunnel)
                for record in self.tunnel.reads:
                    await self._act(record)
            elif "read" in step:
                await self._act(self._decoded(step["read"]))
            else:
                await self._work(step)
            await self._take()

    def _decoded(self, plain: str) -> Record:
        return records.decode(bytes.fromhex(plain))

    async def _greet(self, tunnel: Script) -> None:
        try:
            if self.channel.reacher:
                await self.channel.greet_as_reacher(tunnel)  # type: ignore[arg-type]
                return
            first = await tunnel.receive()
            if isinstance(first, Greeting) and not (first.welcome or first.new or self.channel.welcomed):
                raise Ended(NOT_KNOWN)
            await self.channel.greet_as_exposer(tunnel, first)  # type: ignore[arg-type]
        except TunnelLost:
            pass
        except Refused as refused:
            raise Ended(VIOLATION) from refused

    async def _act(self, record: Record) -> None:
        try:
            self.channel._act(record)
        except Violation as violation:
            raise Ended(VIOLATION) from violation
        await self._take()

    async def _work(self, step: dict[str, Any]) -> None:
        if "open" in step:
            stream = self.channel.open()
            assert stream.id == step["open"]
            self._offer(stream)
        elif "write" in step:
            await self.streams[step["write"]].write(bytes.fromhex(step["bytes"]))
        elif "finish" in step:
            self.streams[step["finish"]].finish()
        else:
            self.streams[step["reset"]].reset(ABORTED)
            del self.got[step["reset"]]

    def _offer(self, stream: Stream) -> None:
        self.streams[stream.id] = stream
        self.got[stream.id] = {"stream": stream.id, "bytes": "", "end": "none"}

    async def _take(self) -> None:
        for stream in list(self.channel.streams.values()):
            if stream.id in self.streams:
                continue
            if stream.purpose > LAST_PURPOSE:
                self.streams[stream.id] = stream
                stream.reset(UNKNOWN_PURPOSE)
            else:
                self._offer(stream)
        for number, got in self.got.items():
            stream = self.streams[number]
            while stream.inbox:
                got["bytes"] += (await stream.read()).hex()
            if stream.reset_by_peer is not None:
                got["end"] = "reset"
            elif stream.total is not None:
                got["end"] = "fin"
        if self.tunnel and self.tunnel.greeted:
            while record := self.channel._next_record():
                self.note(record)

    def note(self, record: Record) -> None:
        if isinstance(record, Greeting):
            streams = [
                {"stream": one.stream, "received": one.received, "end": ENDS[one.end], "total": one.total}
                for one in record.streams
            ]
            self.greeting = {"next_stream": record.next_stream, "received": record.received, "streams": streams}
        elif isinstance(record, Data):
            said = self._said(record.stream)
            said["bytes"] += record.data.hex()
            if said["from"] is None:
                said["from"] = record.offset
        elif isinstance(record, Plain) and record.name == "OPEN":
            self._said(record.values[0])["open"] = True
        elif isinstance(record, Plain) and record.name in ("FIN", "RESET"):
            self._said(record.values[0])[record.name.lower()] = record.values[-1]

    def _said(self, number: int) -> dict[str, Any]:
        nothing = {"stream": number, "open": False, "from": None, "bytes": "", "fin": None, "reset": None}
        return self.sends.setdefault(number, nothing)
