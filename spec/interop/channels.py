"""Plays the steps of `spec/vectors/channels.json` with one side of a channel (PROTOCOL.md section 16)."""

from __future__ import annotations

import asyncio
from typing import Any

from channel import Channel, Stream, StreamReset
from records import Data, Greeting, Plain, Record, decode
from tunnel import UNKNOWN_CHANNEL, Violation
from wire import Refused

MOST_DATA = 32_768


class Wire:
    """A tunnel whose other end is the vectors."""

    def __init__(self) -> None:
        self.inbox: asyncio.Queue[bytes] = asyncio.Queue()
        self.said: list[Record] = []
        self.greeted = False

    async def receive(self, _within: float = 0) -> Record:
        raw = await self.inbox.get()
        try:
            return decode(raw)
        except Refused as refused:
            raise Violation(str(refused)) from refused

    async def send(self, record: Record) -> None:
        self.said.append(record)

    async def close(self, record: Record | None = None) -> None:
        if record:
            self.said.append(record)


class Player:
    """The side that a case is about."""

    def __init__(self, side: str) -> None:
        self.channel = Channel(side == "reacher", self._serve)
        self.streams: dict[int, Stream] = {}
        self.fed: dict[int, int] = {}
        self.wire = Wire()
        self.running: asyncio.Task[None] | None = None

    async def _serve(self, stream: Stream) -> None:
        self.streams[stream.id] = stream

    async def _run(self, wire: Wire) -> None:
        if self.channel.reacher:
            await self.channel.greet_as_reacher(wire)  # type: ignore[arg-type]
        else:
            first = await wire.receive()
            if self.channel.is_unknown_to(first):
                await wire.close(Plain("CHANNEL_CLOSE", (UNKNOWN_CHANNEL,)))
                return
            await self.channel.greet_as_exposer(wire, first)  # type: ignore[arg-type]
        await self.channel.run(wire)  # type: ignore[arg-type]

    async def lose(self) -> None:
        if self.running:
            self.running.cancel()
            await asyncio.gather(self.running, return_exceptions=True)
            self.running = None

    async def settle(self) -> None:
        """Lets everything happen that can; raises the violation, if that is what happens."""
        for _ in range(30):
            await asyncio.sleep(0)
        if self.running and self.running.done() and (error := self.running.exception()):
            raise error

    async def step(self, kind: str, value: Any) -> None:
        """Does a step; gives what disagrees as an AssertionError."""
        if kind == "tunnel" and value == "new":
            await self.lose()
            self.wire = Wire()
            self.running = asyncio.create_task(self._run(self.wire))
        elif kind == "tunnel" and value == "lost":
            await self.lose()
        elif kind == "tunnel":
            await self.settle()
            self.wire.said.clear()
        elif kind == "gets":
            raw = bytes.fromhex(value)
            record = decode(raw)
            if isinstance(record, Data):
                self.fed[record.stream] = record.offset + len(record.data)
            self.wire.inbox.put_nowait(raw)
        elif kind == "gets_zeros":
            number, left = value["stream"], value["count"]
            while left:
                data = Data(number, self.fed.get(number, 0), bytes(min(left, MOST_DATA)))
                self.fed[number] = data.offset + len(data.data)
                left -= len(data.data)
                self.wire.inbox.put_nowait(data.encode())
                await self.settle()
        elif kind == "opens":
            self.streams[value] = self.channel.open()
            assert self.streams[value].id == value, f"stream {self.streams[value].id}"
        elif kind == "writes":
            await self.streams[value["stream"]].write(bytes.fromhex(value["bytes"]))
        elif kind == "finishes":
            self.streams[value].finish()
        elif kind == "resets":
            self.streams[value].reset()
        elif kind == "reads":
            found = await self._read(self.streams[value["stream"]])
            assert found == (value["bytes"], value["end"]), f"read {found}"
        elif kind == "says":
            await self.settle()
            said = self._said()
            if "close" in value:
                assert said["close"] == value["close"], f"said {said}"
            else:
                del said["close"]
                assert said == value, f"said {said}"
        else:
            raise AssertionError(f"a step of no known kind: {kind}")
        await self.settle()

    async def _read(self, stream: Stream) -> tuple[str, Any]:
        whole = bytearray()
        while True:
            try:
                data = await asyncio.wait_for(stream.read(), 0.01)
            except TimeoutError:
                return whole.hex(), None
            except StreamReset as reset:
                return whole.hex(), {"reset": reset.args[0]}
            if not data:
                return whole.hex(), "fin"
            whole += data

    def _said(self) -> dict[str, Any]:
        greeting, close, streams = None, None, {}  # type: ignore[var-annotated]
        for record in self.wire.said:
            if isinstance(record, Greeting):
                listed = [
                    {"stream": one.stream, "received": one.received, "end": one.end, "total": one.total}
                    for one in record.streams
                ]
                greeting = {
                    "new": record.new and not record.welcome,
                    "next_stream": record.next_stream,
                    "received": record.received,
                    "streams": listed,
                }
            elif isinstance(record, Data):
                one = streams.setdefault(record.stream, {"stream": record.stream})
                one.setdefault("from", record.offset)
                one["bytes"] = one.get("bytes", "") + record.data.hex()
                one["fin"] = None
            elif isinstance(record, Plain) and record.name == "CHANNEL_CLOSE":
                close = record.values[0]
            elif isinstance(record, Plain) and record.name in ("OPEN", "FIN", "RESET"):
                number = record.values[0]
                one = streams.setdefault(number, {"stream": number})
                if record.name == "OPEN":
                    one["purpose"] = record.values[1]
                elif record.name == "RESET":
                    one["reset"] = record.values[2]
                else:
                    one.setdefault("from", record.values[1])
                    one.setdefault("bytes", "")
                    one["fin"] = record.values[1]
        self.wire.said.clear()
        return {"greeting": greeting, "streams": [streams[number] for number in sorted(streams)], "close": close}


async def play(case: dict[str, Any]) -> None:
    """Raises Refused for a violation in the last step, and AssertionError for whatever should not be."""
    player = Player(case["side"])
    try:
        for at, step in enumerate(case["steps"]):
            ((kind, value),) = step.items()
            try:
                await player.step(kind, value)
            except Refused as refused:
                assert at == len(case["steps"]) - 1, f"step {at + 1} is refused: {refused}"
                raise
    finally:
        await player.lose()
