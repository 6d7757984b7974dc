"""The plaintext of records: one class for each shape, one spelling for each record (PROTOCOL.md section 15)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Union

from objects import uint
from trust import Head
from wire import Reader, Refused, need, u16, u32, u64

NONE, FIN, RESET = 0, 1, 2
# Records without a list: type, and the lengths of their fields.
PLAIN = {
    "READY": (0x03, ()),
    "OPEN": (0x10, (4, 1)),
    "OPENED": (0x11, (4,)),
    "ACK": (0x13, (4, 8)),
    "WINDOW": (0x14, (4, 8)),
    "FIN": (0x15, (4, 8)),
    "RESET": (0x16, (4, 2, 8)),
    "PING": (0x20, (8,)),
    "PONG": (0x21, (8,)),
    "HS_WANT": (0x30, (4,)),
    "SWITCH": (0x33, (4, 1)),
    "TUNNEL_CLOSE": (0x3E, (2,)),
    "CHANNEL_CLOSE": (0x3F, (2,)),
}
_BY_TYPE = {number: (name, lengths) for name, (number, lengths) in PLAIN.items()}
_OF_STREAMS = {"OPEN", "OPENED", "ACK", "WINDOW", "FIN", "RESET"}


@dataclass(frozen=True)
class Plain:
    name: str
    values: tuple[int, ...] = ()

    def encode(self) -> bytes:
        number, lengths = PLAIN[self.name]
        return bytes([number]) + b"".join(value.to_bytes(n, "big") for value, n in zip(self.values, lengths))


@dataclass(frozen=True)
class Data:
    stream: int
    offset: int
    data: bytes
    pad: int = -1

    def encode(self) -> bytes:
        pad = -(14 + len(self.data)) % 16 if self.pad < 0 else self.pad
        return bytes([0x12, pad]) + u32(self.stream) + u64(self.offset) + self.data + bytes(pad)


@dataclass(frozen=True)
class Listed:
    """A stream in a greeting."""

    stream: int
    received: int
    max_data: int
    end: int
    total: int


@dataclass(frozen=True)
class Greeting:
    """HELLO or WELCOME."""

    welcome: bool
    new: bool
    more: bool
    next_stream: int
    max_data: int
    received: int
    streams: tuple[Listed, ...] = ()

    def encode(self) -> bytes:
        head = bytes([2 if self.welcome else 1, self.new | self.more << 1])
        listed = (
            u32(one.stream) + u64(one.received) + u64(one.max_data) + bytes([one.end]) + u64(one.total)
            for one in self.streams
        )
        counts = u32(self.next_stream) + u64(self.max_data) + u64(self.received) + u16(len(self.streams))
        return head + counts + b"".join(listed)


@dataclass(frozen=True)
class TrustGet:
    places: tuple[Head, ...]

    def encode(self) -> bytes:
        return bytes([4, len(self.places)]) + b"".join(u64(seq) + place for seq, place in self.places)


@dataclass(frozen=True)
class Trust:
    more: bool
    entries: tuple[bytes, ...]

    def encode(self) -> bytes:
        return bytes([5, self.more << 1]) + b"".join(u32(len(entry)) + entry for entry in self.entries)


@dataclass(frozen=True)
class Message:
    """HS1 or HS2."""

    number: int
    rekey: int
    attempt: int
    message: bytes

    def encode(self) -> bytes:
        return bytes([self.number]) + u32(self.rekey) + bytes([self.attempt]) + self.message


Record = Union[Plain, Data, Greeting, TrustGet, Trust, Message]


def _stream(value: int) -> int:
    need(value >= 2 and value % 2 == 0, "a stream id that is not allowed")
    return value


def decode(raw: bytes) -> Record:
    """The record; refuses all that section 15 does."""
    read = Reader(raw)
    number = read.uint(1)
    if number in _BY_TYPE:
        name, lengths = _BY_TYPE[number]
        values = tuple(read.uint(length) for length in lengths)
        read.end()
        if name in _OF_STREAMS and not (name == "WINDOW" and values[0] == 0):
            _stream(values[0])
        need(name not in ("HS_WANT", "SWITCH") or values[0] != 0, "rekey 0")
        need(name != "SWITCH" or values[1] <= 5, "a try over 5")
        return Plain(name, values)
    if number in (1, 2):
        return _greeting(read, number == 2)
    if number == 4:
        count = read.uint(1)
        need(count <= 20, "too many places")
        places = tuple((read.uint(8), read.take(32)) for _ in range(count))
        read.end()
        seqs = [seq for seq, _ in places]
        need(all(seq >= 1 for seq in seqs) and all(a > b for a, b in zip(seqs, seqs[1:])), "places out of order")
        return TrustGet(places)
    if number == 5:
        flags = read.uint(1)
        need(flags in (0, 2) and read.left() <= 60_000, "flags or length of TRUST")
        entries = []
        while read.left():
            entries.append(read.take(read.uint(4)))
        need(entries or not flags, "more of nothing")
        return Trust(bool(flags), tuple(entries))
    if number == 0x12:
        pad, stream, offset = read.uint(1), _stream(read.uint(4)), read.uint(8)
        rest = read.rest()
        data, zeros = rest[: len(rest) - pad], rest[len(rest) - pad :]
        need(len(rest) > pad and len(data) <= 32_768 and not any(zeros), "length or padding of DATA")
        uint(0, 2**64 - 1)(offset + len(data))
        return Data(stream, offset, data, pad)
    if number in (0x31, 0x32):
        rekey, attempt, message = read.uint(4), read.uint(1), read.rest()
        longest = 4096 if number == 0x31 else 5184
        need(rekey != 0 and attempt <= 5 and 1 <= len(message) <= longest, "fields of HS1 or HS2")
        return Message(number, rekey, attempt, message)
    raise Refused("a record of an unknown type")


def _greeting(read: Reader, welcome: bool) -> Greeting:
    flags = read.uint(1)
    need(flags <= 3 and not (welcome and flags & 1), "flags of a greeting")
    next_stream, max_data, received, count = _stream(read.uint(4)), read.uint(8), read.uint(8), read.uint(2)
    need(count <= 1024, "too many streams")
    streams, last = [], 0
    for _ in range(count):
        one = Listed(_stream(read.uint(4)), read.uint(8), read.uint(8), read.uint(1), read.uint(8))
        need(last < one.stream < next_stream, "streams out of order")
        need(one.end in (NONE, FIN, RESET) and (one.end != NONE or one.total == 0), "the end of a stream")
        last = one.stream
        streams.append(one)
    read.end()
    return Greeting(welcome, bool(flags & 1), bool(flags & 2), next_stream, max_data, received, tuple(streams))
