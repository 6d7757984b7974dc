"""One tunnel: frames, keys, catching up and rekeying (PROTOCOL.md sections 11, 14, 20 and 22)."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass
from typing import Any, Awaitable, Callable

from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from handshake import Claims, Initiator, Keys, Prologue, Responder
from records import Data, Greeting, Message, Plain, Record, Trust, TrustGet, decode
from trust import Entry, Head, Log, Peer
from wire import Refused, blob, need, unblob

HS1, HS2 = 0x31, 0x32
SETTLED, BEGUN, SENT, ANSWERING, CONFIRMING = "SETTLED", "BEGUN", "SENT", "ANSWERING", "CONFIRMING"
REKEY_AFTER, LONGEST_AGE, SILENCE = 120.0, 180.0, 40.0
NORMAL, VIOLATION, NOT_EXPOSED, NOT_TRUSTED, NEWER, UNKNOWN_CHANNEL = 0, 1, 2, 3, 4, 5


class TunnelLost(Exception):
    """The tunnel is over; the channel may go on with another one."""


class Violation(Refused):
    """The peer broke the protocol: the channel ends."""


class ChannelClosed(Exception):
    """The peer said CHANNEL_CLOSE, with this code."""


@dataclass
class Party:
    """What a tunnel needs of the agent that it belongs to."""

    log: Log
    static: Callable[[], bytes]
    claims: Callable[[], Claims]
    realm_secret: bytes
    # Steps 1 to 7 of section 13, and what of step 8 concerns a rekey.
    judge: Callable[[Claims, bytes], Peer]
    judge_again: Callable[[Peer], None]
    learned: Callable[[], Awaitable[None]]


class Tunnel:
    """After the handshake. `reacher` says which end this is."""

    def __init__(
        self,
        socket: ClientConnection,
        reacher: bool,
        prologue: Prologue,
        keys: Keys,
        peer: Peer,
        claimed: tuple[Head, Head],
        party: Party,
    ) -> None:
        self.socket, self.reacher, self.prologue, self.peer, self.party = socket, reacher, prologue, peer, party
        self.own_head, self.peer_head = claimed
        self._text = prologue.encoding == 1
        self._out = self._in = keys
        self._lock = asyncio.Lock()
        # Section 22.
        self.rekeys, self.greeted, self.state = 0, False, SETTLED
        self._wanted, self._tries, self._ignored = False, {}, 0  # type: ignore[var-annotated]
        self._agreed: tuple[int, Keys] | None = None
        self._born, self._sealed, self._due = time.monotonic(), 0, 0.0
        self.rekey_after_records: int | None = None
        self.closed = False
        self._timer = asyncio.create_task(self._watch())

    # --- Sections 11 and 14: one record in one message ---

    async def send(self, record: Record) -> None:
        async with self._lock:
            await self._send(record)
        if self.rekey_after_records and self._sealed >= self.rekey_after_records and self.greeted:
            await self.rekey()

    async def _send(self, record: Record) -> None:
        if self.closed or time.monotonic() - self._born > LONGEST_AGE:
            raise TunnelLost("closed, or the key is too old")
        sealed = self._out.seal(record.encode())
        self._sealed += 1
        try:
            await self.socket.send(blob(sealed) if self._text else sealed)
        except ConnectionClosed as error:
            raise TunnelLost(f"the data socket ended: {error}") from error

    async def receive(self, within: float = SILENCE) -> Record:
        """The next record that is not of a rekey. CHANNEL_CLOSE and TUNNEL_CLOSE are exceptions."""
        while True:
            try:
                message = await asyncio.wait_for(self.socket.recv(), within)
            except (ConnectionClosed, TimeoutError) as error:
                raise TunnelLost(f"the data socket ended: {error!r}") from error
            need(isinstance(message, str) == self._text, "a frame of the other encoding")
            try:
                raw = self._in.open(unblob(message) if isinstance(message, str) else message)
            except Refused as refused:
                raise TunnelLost(str(refused)) from refused
            if self.state == CONFIRMING:
                await self._confirm()
            try:
                record = decode(raw)
            except Refused as refused:
                raise Violation(str(refused)) from refused
            if isinstance(record, Plain) and record.name == "TUNNEL_CLOSE":
                raise TunnelLost(f"TUNNEL_CLOSE({record.values[0]})")
            if isinstance(record, Plain) and record.name == "CHANNEL_CLOSE":
                raise ChannelClosed(record.values[0])
            if not await self._of_rekey(record):
                return record

    async def close(self, record: Record | None = None) -> None:
        """Says a last record, and ends the socket."""
        self._timer.cancel()
        if record and not self.closed:
            try:
                await self.send(record)
            except TunnelLost:
                pass
        self.closed = True
        await self.socket.close()

    # --- Section 22: rekeying ---

    async def _watch(self) -> None:
        """Begins rekeys that are due by age, and repeats HS1."""
        early = random.uniform(0.9, 1.0) if self.reacher else 1.0
        try:
            while True:
                await asyncio.sleep(1)
                if self.greeted and time.monotonic() - self._born > REKEY_AFTER * early:
                    await self.rekey()
                if self.state == BEGUN and time.monotonic() - self._due > 10 and len(self._tries) < 6:
                    await self._hs1()
        except TunnelLost:
            pass

    async def rekey(self) -> None:
        """Begins one, if none is under way."""
        if self.state != SETTLED:
            return
        if self.reacher:
            self.state = BEGUN
            await self._hs1()
        elif not self._wanted:
            self._wanted = True
            await self.send(Plain("HS_WANT", (self.rekeys + 1,)))

    def _next_prologue(self) -> Prologue:
        return self.prologue.of_rekey(self.rekeys + 1, self._out.hash)

    async def _hs1(self) -> None:
        attempt, self._due = len(self._tries), time.monotonic()
        made = Initiator(self.party.static(), self.peer.noise_key.static_key, self._next_prologue())
        self._tries[attempt] = made
        await self.send(Message(HS1, self.rekeys + 1, attempt, made.message1(self.party.claims())))

    async def _of_rekey(self, record: Record) -> bool:
        """Whether it was a record of a rekey; acts on it."""
        if isinstance(record, Message):
            number, rekey, attempt = record.number, record.rekey, record.attempt
        elif isinstance(record, Plain) and record.name in ("HS_WANT", "SWITCH"):
            number, rekey, attempt = 0, record.values[0], record.values[-1]
        else:
            return False
        if not self.greeted or rekey != self.rekeys + 1:
            raise Violation("a record of another rekey, or before the greeting")
        if isinstance(record, Plain) and record.name == "HS_WANT":
            if not self.reacher or self._wanted or self.state == SENT:
                raise Violation("HS_WANT out of order")
            self._wanted = True
            await self.rekey()
        elif isinstance(record, Message) and number == HS1 and not self.reacher:
            await self._answer(attempt, record.message)
        elif isinstance(record, Message) and number == HS2 and self.reacher:
            await self._agree(attempt, record.message)
        elif isinstance(record, Plain):
            self._switch(attempt)
        else:
            raise Violation("HS1 or HS2 to the wrong end")
        return True

    async def _answer(self, attempt: int, message1: bytes) -> None:
        """Exposer: HS1."""
        if self.state not in (SETTLED, ANSWERING) or attempt != len(self._tries):
            raise Violation("HS1 out of order")
        responder = Responder(self.party.static(), self._next_prologue())
        try:
            said = responder.message1(message1)
        except Refused as refused:
            await self._give_up(VIOLATION, refused)
        try:
            self.peer = self.party.judge(said, responder.remote_static())
        except Refused as refused:
            await self._give_up(NOT_TRUSTED, refused)
        message2, keys = responder.message2(self.party.claims(), self.party.realm_secret)
        self._tries[attempt] = keys
        self.state = ANSWERING
        await self.send(Message(HS2, self.rekeys + 1, attempt, message2))

    async def _agree(self, attempt: int, message2: bytes) -> None:
        """Reacher: HS2."""
        if self.state == SENT and self._agreed and max(self._agreed[0], self._ignored) < attempt < len(self._tries):
            # An answer to a later try, after the first good one counted.
            self._ignored = attempt
            return
        if self.state != BEGUN or attempt not in self._tries:
            raise Violation("HS2 out of order")
        made: Initiator = self._tries[attempt]
        try:
            said, keys = made.message2(message2, self.party.realm_secret)
        except Refused as refused:
            await self._give_up(VIOLATION, refused)
        try:
            self.peer = self.party.judge(said, self.peer.noise_key.static_key)
        except Refused as refused:
            await self._give_up(NOT_TRUSTED, refused)
        self._agreed, self.state = (attempt, keys), SENT
        async with self._lock:
            await self._send(Plain("SWITCH", (self.rekeys + 1, attempt)))
            self._take_out(keys)
        await self.send(Plain("PING", (0,)))

    def _switch(self, attempt: int) -> None:
        if self.reacher and self.state == SENT and self._agreed and self._agreed[0] == attempt:
            self._in = self._agreed[1]
            self._settle()
        elif not self.reacher and self.state == ANSWERING and attempt in self._tries:
            self._agreed = (attempt, self._tries[attempt])
            self._in = self._agreed[1]
            self.state = CONFIRMING
        else:
            raise Violation("SWITCH out of order")

    async def _confirm(self) -> None:
        """Exposer: the first record under the new key was opened."""
        assert self._agreed
        async with self._lock:
            await self._send(Plain("SWITCH", (self.rekeys + 1, self._agreed[0])))
            self._take_out(self._agreed[1])
        self._settle()

    def _take_out(self, keys: Keys) -> None:
        self._out, self._sealed, self._born = keys, 0, time.monotonic()

    def _settle(self) -> None:
        self.rekeys += 1
        self.state, self._wanted, self._tries, self._agreed, self._ignored = SETTLED, False, {}, None, 0

    async def _give_up(self, code: int, why: Exception) -> Any:
        await self.close(Plain("TUNNEL_CLOSE", (code,)))
        raise TunnelLost(str(why)) from why

    # --- Section 20: catching up ---

    async def catch_up(self) -> None:
        """Nothing when the heads are equal."""
        if self.own_head == self.peer_head:
            return
        until = time.monotonic() + 10
        got: list[bytes] = []
        sent_ready = got_ready = asked = False
        log = self.party.log

        async def ready() -> None:
            try:
                self.party.judge_again(self.peer)
            except Refused as refused:
                await self._give_up(NOT_TRUSTED, refused)
            await self.send(Plain("READY"))

        if log.has(self.peer_head):
            await ready()
            sent_ready = True
        else:
            await self.send(TrustGet(tuple(log.locator())))
            asked = True
        while not (sent_ready and got_ready):
            record = await self.receive(max(0.01, until - time.monotonic()))
            if isinstance(record, TrustGet) and not got_ready:
                await self.send(_entries_after(log, record.places))
            elif isinstance(record, Trust) and asked:
                got += record.entries
                asked = record.more
                if asked:
                    last = Entry(got[-1])
                    await self.send(TrustGet(((last.seq, last.hash),)))
                    continue
                try:
                    take_all(log, got)
                    need(log.has(self.peer_head), "the claimed head was not shown")
                except Refused as refused:
                    await self._give_up(VIOLATION, refused)
                await self.party.learned()
                await ready()
                sent_ready = True
            elif isinstance(record, Plain) and record.name == "READY" and not got_ready:
                got_ready = True
            else:
                raise Violation("a record that does not belong into catching up")


def _entries_after(log: Log, places: tuple[Head, ...]) -> Trust:
    _, entries = log.after(places)
    fit, size = [], 0
    for entry in entries:
        size += 4 + len(entry.wire)
        if size > 60_000:
            break
        fit.append(entry.wire)
    return Trust(len(fit) < len(entries), tuple(fit))


def take_all(log: Log, wires: list[bytes]) -> None:
    """Entries in their order, from some place of the own log on: they follow its head, or are a branch."""
    rest = list(wires)
    while rest and (first := Entry(rest[0])).seq < len(log.states) and log.states[first.seq].head[1] == first.hash:
        rest.pop(0)
    if not rest:
        return
    first = Entry(rest[0])
    if first.seq == log.head[0] + 1:
        for wire in rest:
            log.take(wire)
    else:
        log.show(first.seq - 1, rest)


__all__ = ["ChannelClosed", "Data", "Greeting", "Party", "Tunnel", "TunnelLost", "Violation", "take_all"]
