"""A channel: the greeting, streams, credit, and what survives a tunnel (PROTOCOL.md section 16)."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from typing import Awaitable, Callable

from records import FIN, NONE, RESET, Data, Greeting, Listed, Plain, Record
from tunnel import NORMAL, VIOLATION, ChannelClosed, Tunnel, TunnelLost, Violation
from wire import need

STREAM_WINDOW, CHANNEL_CREDIT, MOST_STREAMS = 262_144, 16 << 20, 4096
TARGET = 0
LOST, TOO_MANY, ABORTED = 5, 4, 0


class StreamReset(Exception):
    """The stream was reset, with this code."""


class Stream:
    """One TCP connection. `sent…` concerns what this side sends, `got…` what comes."""

    def __init__(self, channel: "Channel", number: int, purpose: int, opened_by_us: bool) -> None:
        self.channel, self.id, self.purpose = channel, number, purpose
        self.needs_open, self.opened = opened_by_us, asyncio.Event()
        self.buffer = bytearray()  # from byte `acked` on
        self.acked = self.next = self.charged = 0
        self.peer_max = STREAM_WINDOW
        self.finished = self.fin_due = self.fin_ever = self.fin_acked = False
        self.got, self.got_max, self.total = 0, STREAM_WINDOW, None  # type: int, int, int | None
        self.inbox = bytearray()
        self.taken, self.said_ack = 0, 0
        self.ack_due = self.window_due = self.reset_due = False
        self.reset_by_us: int | None = None
        self.reset_by_peer: int | None = None
        self.changed = asyncio.Event()

    # --- For the application ---

    async def read(self, most: int = 65_536) -> bytes:
        """Some bytes, or none at the end. Raises StreamReset."""
        while not self.inbox:
            if self.reset_by_peer is not None or self.reset_by_us is not None:
                raise StreamReset(self.reset_by_us if self.reset_by_peer is None else self.reset_by_peer)
            if self.total is not None:
                return b""
            await self._wait()
        data = bytes(self.inbox[:most])
        del self.inbox[:most]
        self.taken += len(data)
        if self.got_max - self.taken <= STREAM_WINDOW * 3 // 4 and self.total is None:
            self.got_max, self.window_due = self.taken + STREAM_WINDOW, True
        self.channel.dropped(len(data))
        self.channel.forget_if_done(self)
        return data

    async def read_all(self) -> bytes:
        whole = bytearray()
        while data := await self.read():
            whole += data
        return bytes(whole)

    async def write(self, data: bytes) -> None:
        while len(self.buffer) > 1 << 20 and self.reset_by_peer is None:
            await self._wait()
        if self.reset_by_peer is not None or self.reset_by_us is not None:
            raise StreamReset(self.reset_by_peer if self.reset_by_peer is not None else self.reset_by_us)
        self.buffer += data
        self.channel.wake.set()

    def finish(self) -> None:
        """Ends this side's direction."""
        if not self.finished:
            self.finished = self.fin_due = True
            self.channel.wake.set()

    def reset(self, code: int = ABORTED) -> None:
        if self.reset_by_us is None:
            self.reset_by_us, self.reset_due = code, True
            self.channel.dropped(len(self.inbox))
            self.inbox.clear()
            self.buffer.clear()
            self.changed.set()
            self.channel.wake.set()

    async def _wait(self) -> None:
        self.changed.clear()
        await self.changed.wait()

    # --- For the channel ---

    def end_offset(self) -> int:
        return self.acked + len(self.buffer)

    def ack_value(self) -> int:
        return self.got + (self.total is not None)

    def listed(self) -> Listed:
        if self.reset_by_us is not None:
            return Listed(self.id, self.ack_value(), self.got_max, RESET, self.charged)
        if self.finished:
            return Listed(self.id, self.ack_value(), self.got_max, FIN, self.end_offset())
        return Listed(self.id, self.ack_value(), self.got_max, NONE, 0)

    def acknowledge(self, offset: int) -> None:
        if self.reset_by_us is not None or offset < self.acked:
            return
        if offset > self.charged + self.fin_ever:
            raise Violation("an ACK of more than was sent")
        end = self.end_offset()
        if self.fin_ever and offset == end + 1:
            self.fin_acked, self.fin_due, offset = True, False, end
        del self.buffer[: offset - self.acked]
        self.acked, self.next = offset, max(self.next, offset)
        self.changed.set()

    def done(self) -> bool:
        """Both sides are, and both know."""
        if self.reset_by_us is not None and not self.reset_due and self.reset_by_peer is not None:
            return True
        return self.fin_acked and self.total is not None and self.said_ack == self.total + 1 and not self.inbox


class Channel:
    """One end of a channel; `serve` is what the exposer does with a stream."""

    def __init__(self, reacher: bool, serve: Callable[[Stream], Awaitable[None]] | None = None) -> None:
        self.reacher, self.serve = reacher, serve
        self.id, self.tunnel_no = secrets.token_bytes(16), -1
        self.streams: dict[int, Stream] = {}
        self.next_stream = 2
        self.peer_max, self.charged = CHANNEL_CREDIT, 0
        self.got, self.taken, self.got_max = 0, 0, CHANNEL_CREDIT
        self.credit_due = False
        self.control: deque[Record] = deque()
        self.wake, self.established, self.closed = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.tunnel: Tunnel | None = None
        self.welcomed = False
        self.close_code: int | None = None
        self.heard = time.monotonic()
        self.pings = self.pongs = self.resumed = 0
        self._served: set[asyncio.Task[None]] = set()
        self._tasks: list[asyncio.Task[None]] = []

    # --- For the application ---

    def open(self, purpose: int = TARGET) -> Stream:
        stream = Stream(self, self.next_stream, purpose, True)
        self.streams[stream.id] = stream
        self.next_stream += 2
        self.wake.set()
        return stream

    def say_opened(self, stream: Stream) -> None:
        """Exposer: the target took the connection."""
        self.control.append(Plain("OPENED", (stream.id,)))
        self.wake.set()

    async def close(self, code: int = NORMAL) -> None:
        tunnel = self.tunnel
        self.end(code)
        if tunnel:
            await tunnel.close(Plain("CHANNEL_CLOSE", (code,)))

    def end(self, code: int) -> None:
        """CLOSED, for ever."""
        if self.closed.is_set():
            return
        self.close_code = code
        for stream in self.streams.values():
            if stream.reset_by_peer is None:
                stream.reset_by_peer = LOST
            stream.changed.set()
        self.streams.clear()
        self.detach()
        self.closed.set()

    def dropped(self, count: int) -> None:
        """So many bytes were read, or will never be."""
        self.taken += count
        if self.taken + CHANNEL_CREDIT - self.got_max >= CHANNEL_CREDIT // 4:
            self.got_max, self.credit_due = self.taken + CHANNEL_CREDIT, True
        self.wake.set()

    # --- The greeting, and what it puts right ---

    def _greetings(self, welcome: bool, new: bool) -> list[Greeting]:
        listed = [self.streams[number].listed() for number in sorted(self.streams)] if not new else []
        parts = [listed[at : at + 1024] for at in range(0, len(listed), 1024)] or [[]]
        last = len(parts) - 1
        return [
            Greeting(welcome, new, at < last, 2 if new else self.next_stream, self.got_max, self.got, tuple(part))
            for at, part in enumerate(parts)
        ]

    async def _whole_greeting(self, tunnel: Tunnel, first: Record, welcome: bool) -> Greeting:
        streams: list[Listed] = []
        record = first
        while True:
            if not isinstance(record, Greeting) or record.welcome != welcome:
                raise Violation("no greeting")
            if streams and record.streams and record.streams[0].stream <= streams[-1].stream:
                raise Violation("parts of a greeting out of order")
            streams += record.streams
            need(len(streams) <= MOST_STREAMS, "a greeting of too many streams")
            if not record.more:
                break
            record = await tunnel.receive(10)
        last = (record.next_stream, record.max_data, record.received)
        return Greeting(welcome, record.new, False, *last, tuple(streams))

    async def greet_as_reacher(self, tunnel: Tunnel) -> None:
        new = not self.welcomed
        for hello in self._greetings(False, new):
            await tunnel.send(hello)
        record = await tunnel.receive(10)
        if record != Plain("READY"):
            raise Violation("no READY")
        welcome = await self._whole_greeting(tunnel, await tunnel.receive(10), True)
        if new:
            self.peer_max = max(self.peer_max, welcome.max_data)
        else:
            self._resume(welcome)
        self.welcomed = True
        self._attach(tunnel)

    async def greet_as_exposer(self, tunnel: Tunnel, first: Record) -> None:
        hello = await self._whole_greeting(tunnel, first, False)
        if self.welcomed:
            self._resume(hello)
        else:
            self.peer_max = max(self.peer_max, hello.max_data)
        self.welcomed = True
        await tunnel.send(Plain("READY"))
        for welcome in self._greetings(True, False):
            await tunnel.send(welcome)
        self._attach(tunnel)

    def _attach(self, tunnel: Tunnel) -> None:
        self.tunnel, tunnel.greeted = tunnel, True
        self.control.clear()
        self.pings = 0
        self._ping()
        self.heard = time.monotonic()
        self.established.set()
        self.wake.set()

    def detach(self) -> None:
        self.tunnel = None
        self.established.clear()
        for task in self._tasks:
            task.cancel()
        self._tasks = []

    def _resume(self, said: Greeting) -> None:
        """*Resume*: what the peer's list says of this side's streams."""
        self.resumed += 1
        self.peer_max = max(self.peer_max, said.max_data)
        if not self.reacher and self.next_stream > said.next_stream:
            raise Violation("a reacher that opened less than it did")
        if self.reacher and said.next_stream > self.next_stream:
            raise Violation("an exposer that heard of more than there is")
        listed = {one.stream: one for one in said.streams}
        charged = said.received
        for number, stream in list(self.streams.items()):
            one = listed.get(number)
            if one:
                charged += stream.charged - min(one.received, stream.charged)
                self._resume_stream(stream, one)
            elif self.reacher and number >= said.next_stream:
                if stream.reset_by_us is not None:
                    del self.streams[number]
                    continue
                charged += stream.charged
                stream.needs_open, stream.next, stream.fin_due = True, 0, stream.finished
            elif stream.finished and stream.fin_ever and stream.total is not None:
                stream.fin_acked, stream.said_ack = True, stream.total + 1
                stream.buffer.clear()
                self.forget_if_done(stream)
            else:
                stream.reset_by_peer = LOST
                stream.changed.set()
                self.dropped(len(stream.inbox))
                stream.inbox.clear()
                del self.streams[number]
        if charged > self.charged:
            raise Violation("more was received than was sent")
        self.charged = charged

    def _resume_stream(self, stream: Stream, one: Listed) -> None:
        stream.needs_open = False
        if one.end == RESET:
            stream.reset_due = stream.reset_by_us is not None
            self._reset_by_peer(stream, ABORTED, one.total)
            return
        if stream.reset_by_us is not None:
            stream.reset_due = True
            return
        if one.received < stream.acked:
            raise Violation("less was received than was acknowledged")
        stream.acknowledge(one.received)
        stream.peer_max = max(stream.peer_max, one.max_data)
        stream.next = stream.acked
        stream.fin_due = stream.finished and not stream.fin_acked

    # --- While a tunnel is up ---

    async def run(self, tunnel: Tunnel) -> None:
        """Until the tunnel or the channel ends; raises what ended it."""
        pump = asyncio.create_task(self._pump(tunnel))
        keepalive = asyncio.create_task(self._keepalive())
        self._tasks = [pump, keepalive]
        try:
            while True:
                self._act(await tunnel.receive())
                self.heard = time.monotonic()
        except Violation:
            await tunnel.close(Plain("CHANNEL_CLOSE", (VIOLATION,)))
            self.end(VIOLATION)
            raise
        except ChannelClosed as closed:
            self.end(closed.args[0])
            raise
        finally:
            for task in (pump, keepalive):
                task.cancel()
            if self.tunnel is tunnel:
                self.detach()
            await tunnel.close()

    async def _keepalive(self) -> None:
        while True:
            await asyncio.sleep(15 + secrets.randbelow(3000) / 1000)
            self._ping()
            self.wake.set()

    def _ping(self) -> None:
        self.pings += 1
        self.control.append(Plain("PING", (self.pings,)))

    async def _pump(self, tunnel: Tunnel) -> None:
        try:
            while True:
                while record := self._next_record():
                    await tunnel.send(record)
                self.wake.clear()
                await self.wake.wait()
        except TunnelLost:
            await tunnel.socket.close()

    def _next_record(self) -> Record | None:
        """What is to be said next; takes it for said."""
        for stream in list(self.streams.values()):
            if stream.needs_open:
                stream.needs_open = False
                return Plain("OPEN", (stream.id, stream.purpose))
        if self.control:
            return self.control.popleft()
        if self.credit_due:
            self.credit_due = False
            return Plain("WINDOW", (0, self.got_max))
        for stream in list(self.streams.values()):
            if stream.reset_due:
                stream.reset_due = False
                self.forget_if_done(stream)
                assert stream.reset_by_us is not None
                return Plain("RESET", (stream.id, stream.reset_by_us, stream.charged))
            if stream.ack_due:
                stream.ack_due, stream.said_ack = False, stream.ack_value()
                self.forget_if_done(stream)
                return Plain("ACK", (stream.id, stream.said_ack))
            if stream.window_due:
                stream.window_due = False
                return Plain("WINDOW", (stream.id, stream.got_max))
        for number in list(self.streams):
            if data := self._next_data(self.streams[number]):
                # The next stream has its turn first.
                self.streams[number] = self.streams.pop(number)
                return data
        return None

    def _next_data(self, stream: Stream) -> Record | None:
        if stream.reset_by_us is not None or stream.reset_by_peer is not None:
            return None
        # What was charged once is not charged again.
        allowed = stream.charged + self.peer_max - self.charged
        until = min(stream.end_offset(), stream.peer_max, stream.next + 32_768, allowed)
        if until > stream.next:
            start = stream.next - stream.acked
            data = Data(stream.id, stream.next, bytes(stream.buffer[start : start + until - stream.next]))
            self.charged += max(0, until - stream.charged)
            stream.next, stream.charged = until, max(stream.charged, until)
            return data
        if stream.fin_due and stream.next == stream.end_offset():
            stream.fin_due, stream.fin_ever = False, True
            return Plain("FIN", (stream.id, stream.next))
        return None

    def forget_if_done(self, stream: Stream) -> None:
        if stream.done():
            self.streams.pop(stream.id, None)

    def _act(self, record: Record) -> None:
        if isinstance(record, Data):
            self._data(record)
        elif not isinstance(record, Plain):
            raise Violation("a record that does not belong here")
        elif record.name == "PING":
            self.control.append(Plain("PONG", record.values))
        elif record.name == "PONG":
            self.pongs += 1
            if self.pings < 16:
                self._ping()
        elif record.name == "OPEN":
            self._opened_by_peer(*record.values)
        elif record.name == "WINDOW" and record.values[0] == 0:
            self.peer_max = max(self.peer_max, record.values[1])
        elif record.name in ("ACK", "WINDOW", "FIN", "RESET") or (record.name == "OPENED" and self.reacher):
            number = record.values[0]
            if number >= self.next_stream:
                raise Violation("a stream that was never opened")
            if stream := self.streams.get(number):
                self._of_stream(stream, record.name, record.values[1:])
        else:
            raise Violation(f"{record.name} does not belong here")
        self.wake.set()

    def _opened_by_peer(self, number: int, purpose: int) -> None:
        if self.reacher or number < self.next_stream:
            raise Violation("OPEN out of order")
        self.next_stream = number + 2
        stream = Stream(self, number, purpose, False)
        self.streams[number] = stream
        if len(self.streams) > MOST_STREAMS:
            stream.reset(TOO_MANY)
            return
        assert self.serve
        task = asyncio.ensure_future(self.serve(stream))
        self._served.add(task)
        task.add_done_callback(self._served.discard)

    def _of_stream(self, stream: Stream, name: str, values: tuple[int, ...]) -> None:
        if name == "OPENED":
            stream.opened.set()
        elif name == "ACK":
            stream.acknowledge(values[0])
            self.forget_if_done(stream)
        elif name == "WINDOW":
            stream.peer_max = max(stream.peer_max, values[0])
        elif name == "FIN":
            if values[0] != stream.got or (stream.total is not None and stream.total != values[0]):
                raise Violation("FIN that leaves bytes missing")
            stream.total, stream.ack_due = values[0], True
            stream.changed.set()
        else:
            self._reset_by_peer(stream, *values)

    def _reset_by_peer(self, stream: Stream, code: int, total: int) -> None:
        if not stream.got <= total <= stream.got_max or (stream.total is not None and total != stream.total):
            raise Violation("RESET with another total")
        missing, stream.got = total - stream.got, total
        self.got += missing
        if self.got > self.got_max:
            raise Violation("the credit of the channel is passed")
        self.dropped(missing + len(stream.inbox))
        stream.inbox.clear()
        if stream.reset_by_peer is None:
            stream.reset_by_peer = code
        if stream.reset_by_us is None:
            stream.reset_by_us, stream.reset_due = code, True
        stream.changed.set()
        self.forget_if_done(stream)

    def _data(self, record: Data) -> None:
        if record.stream >= self.next_stream:
            raise Violation("a stream that was never opened")
        stream = self.streams.get(record.stream)
        if stream is None:
            return
        end = record.offset + len(record.data)
        if record.offset > stream.got or end > stream.got_max or (stream.total is not None and end > stream.total):
            raise Violation("a gap, or more than the window or the final size allows")
        fresh = record.data[stream.got - record.offset :] if end > stream.got else b""
        self.got += len(fresh)
        if self.got > self.got_max:
            raise Violation("the credit of the channel is passed")
        stream.got += len(fresh)
        if stream.reset_by_us is not None:
            self.dropped(len(fresh))
            return
        stream.inbox += fresh
        stream.changed.set()
        if stream.got - stream.said_ack >= 131_072:
            stream.ack_due = True
        elif not stream.ack_due:
            asyncio.get_running_loop().call_later(0.02, self._ack, stream)

    def _ack(self, stream: Stream) -> None:
        if stream.id in self.streams and stream.ack_value() > stream.said_ack:
            stream.ack_due = True
            self.wake.set()
