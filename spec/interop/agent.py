"""An agent: how it joins, talks to the hub, exposes and reaches (PROTOCOL.md sections 9 to 13 and 25)."""

from __future__ import annotations

import asyncio
import itertools
import json
import secrets
import time
from dataclasses import dataclass, field
from typing import Any, AsyncIterator, Awaitable, Callable

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

import objects
from channel import Channel, Stream
from handshake import ENCODINGS, MEMBERS, SHARE, Claims, Initiator, Prologue, Responder
from objects import GUEST, MEMBER, NO_ID, REACHER, HubAddress, Invite, Names, Share, Signed, WrapKey, envelope
from records import Greeting, Plain
from trust import Head, Log, Peer, judge, judge_again
from tunnel import NEWER, NOT_EXPOSED, NOT_TRUSTED, UNKNOWN_CHANNEL, ChannelClosed, Party, Tunnel, TunnelLost, take_all
from wire import Refused, blob, ed25519_public, need, seal, sign, u16, unblob, unhex, x25519_public

ServeStream = Callable[[Stream], Awaitable[None]]


class HubError(Exception):
    """An error of the hub, or of the other agent through it: a hint, and no more."""

    def __init__(self, said: dict[str, Any]) -> None:
        super().__init__(f"{said.get('code')}: {said.get('message')}")
        self.code = said.get("code")


@dataclass
class Service:
    """What this agent exposes."""

    id: bytes
    name: str
    serve: ServeStream
    protocol: str = "http"


@dataclass
class Found:
    """A service that was looked up."""

    id: bytes
    record: Signed
    peer: Peer


@dataclass
class Agent:
    """A member, or a guest when `share` is there. Everything is in memory: it is gone when the process is."""

    hub: HubAddress
    workspace: bytes
    log: Log
    credential: Signed
    identity: bytes
    static: bytes
    wrap_key: WrapKey
    certificate: Signed
    noise_key: Signed
    salt: bytes
    tags: list[str]
    label: str
    realm_secret: bytes = b""
    sources: dict[int, bytes] = field(default_factory=dict)
    share: Share | None = None
    encoding: str = "binary"
    # For tests: begin a rekey as soon as so many records were sealed under a key.
    rekey_after_records: int | None = None

    def __post_init__(self) -> None:
        self.id = self.certificate.agent_id
        self.services: dict[bytes, Service] = {}
        self.channels: dict[tuple[bytes, bytes, bytes, bytes], Channel] = {}
        self.tunnels: set[Tunnel] = set()
        self.shares: dict[bytes, Signed] = {}
        self.guests: dict[bytes, set[bytes]] = {}
        self.counter, self.accepted, self.answered = 0, 0, set[bytes]()
        self.refused: list[str] = []
        # The highest NoiseKey counter of each agent, and its key (section 13, step 3).
        self.seen: dict[bytes, tuple[int, bytes]] = {}
        self.online = asyncio.Event()
        self._socket: ClientConnection | None = None
        self._requests = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    # --- Section 9: joining ---

    @staticmethod
    async def join(line: str, label: str, **settings: Any) -> "Agent":
        """Redeems a code, checks everything that section 9 lists in its order, draws keys and logs in."""
        invite = Invite(line)
        invite_key = ed25519_public(invite.signing_seed)
        credential_id = objects.credential_id(invite_key)
        socket, challenge = await _dial(invite.hub)
        nonce = secrets.token_bytes(32)
        proof = _proof(invite.hub, challenge, nonce, credential_id, invite.workspace_id)
        await _say(
            socket,
            type="redeem",
            authority=invite.hub.authority,
            agent_nonce=nonce.hex(),
            workspace_id=invite.workspace_id.hex(),
            invite_key=invite_key.hex(),
            signature=sign(invite.signing_seed, "redeem", proof).hex(),
        )
        invitation = await _hear(socket, "invitation")
        log = Log(unblob(invitation["genesis"]), invite.workspace_id)
        number = itertools.count(1)
        while True:
            request = {"do": "log", "have": [_place(log.head)] if log.entries else []}
            await _say(socket, type="request", id=next(number), request=request)
            reply = (await _hear(socket, "reply"))["reply"]
            if reply["is"] == "error":
                raise HubError(reply)
            for entry in reply["entries"]:
                log.take(unblob(entry))
            if not reply["more"]:
                break
        need(log.has((invite.log_seq, invite.log_head)), "the log does not contain what the invite names")
        view = log.view()
        credential = Signed("credential", unblob(invitation["credential"]))
        need(credential.workspace_id == invite.workspace_id, "a credential of another workspace")
        need(view.vouches(credential.issuer, credential.hash), "a credential of nobody")
        credential.verify_by(credential.issuer)
        wrap_key = WrapKey(invite.wrap_seed)
        need(credential.invite_key == invite_key and credential.wrap_key_hash == wrap_key.hash, "another credential")
        need(credential.share == (invite.share_secret is not None), "a share without its secret")
        need(credential.credential_id not in view.ended.closed, "the credential is closed")
        need(time.time() <= credential.join_until, "too late to join")
        need(objects.attrs_hash(invite.salt, invite.tags) == credential.attrs, "other tags than the credential's")
        identity, static, own = (secrets.token_bytes(n) for n in (32, 32, 96))
        own_wrap, public = WrapKey(own), ed25519_public(identity)
        certificate = {
            0: 1,
            1: invite.workspace_id,
            2: public,
            3: credential.role,
            4: credential.attrs,
            5: 1,
            7: 1,
            8: credential.hash,
            9: credential.services,
        }
        agent_id = objects.agent_id(invite.workspace_id, public)
        noise_key = {0: 1, 1: invite.workspace_id, 2: agent_id, 3: 1, 4: 1, 5: x25519_public(static), 6: own_wrap.hash}
        agent = Agent(
            hub=invite.hub,
            workspace=invite.workspace_id,
            log=log,
            credential=credential,
            identity=identity,
            static=static,
            wrap_key=own_wrap,
            certificate=Signed("certificate", envelope("certificate", certificate, invite.signing_seed)),
            noise_key=Signed("noise-key", envelope("noise-key", noise_key, identity)),
            salt=invite.salt,
            tags=invite.tags,
            label=label,
            **settings,
        )
        if invite.share_secret is not None:
            agent.share = Share(invite.share_secret)
        else:
            sealed = invitation["wrap"]
            agent._unwrap(sealed, wrap_key, view.commits[sealed["epoch"]])
        await agent._login(socket, challenge)
        agent._requests = number
        agent._go(agent._run(socket))
        await agent.online.wait()
        await agent.publish()
        return agent

    def _unwrap(self, sealed: dict[str, Any], key: WrapKey, commit: bytes) -> None:
        epoch = sealed["epoch"]
        realm_secret, source = objects.unwrap(unblob(sealed["sealed"]), self.workspace, epoch, key, commit)
        need(self.realm_secret in (b"", realm_secret), "another realm secret than the one held")
        self.realm_secret, self.sources[epoch] = realm_secret, source

    # --- Section 10: the control channel ---

    async def _login(self, socket: ClientConnection, challenge: bytes) -> None:
        nonce = secrets.token_bytes(32)
        proof = _proof(self.hub, challenge, nonce, self.id, self.workspace)
        await _say(
            socket,
            type="login",
            authority=self.hub.authority,
            agent_nonce=nonce.hex(),
            session="agent",
            workspace_id=self.workspace.hex(),
            certificate=blob(self.certificate.wire),
            credential=blob(self.credential.wire),
            noise_key=blob(self.noise_key.wire),
            wrap_key=blob(self.wrap_key.public),
            signature=sign(self.identity, "login", proof).hex(),
        )
        await _hear(socket, "welcome")
        self._socket = socket

    async def _run(self, socket: ClientConnection) -> None:
        """Reads what the hub says; comes back when it went away."""
        pause = 0.1
        while True:
            self.online.set()
            try:
                async for message in socket:
                    self._heard(json.loads(message))
            except ConnectionClosed:
                pass
            self.online.clear()
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(HubError({"code": "gone", "message": "the hub went away"}))
            self._waiting.clear()
            while True:
                await asyncio.sleep(secrets.randbelow(1000) / 1000 * pause)
                pause = min(16.0, pause * 2)
                try:
                    socket, challenge = await _dial(self.hub)
                    await self._login(socket, challenge)
                    break
                except (OSError, HubError, ConnectionClosed, InvalidStatus, TimeoutError, EOFError):
                    continue
            pause = 0.1
            self._go(self._back())

    async def _back(self) -> None:
        await self.read_log()
        await self.publish()

    def _heard(self, said: dict[str, Any]) -> None:
        kind = said.get("type")
        if kind == "reply" and said["id"] in self._waiting:
            self._waiting.pop(said["id"]).set_result(said["reply"])
        elif kind == "incoming_tunnel":
            self._go(self._incoming(said))
        elif kind in ("log_grew", "wrap_stored"):
            self._go(self.read_log())
        elif kind == "share_made":
            self._go(self.publish_to_shares())

    async def request(self, do: str, **asked: Any) -> dict[str, Any]:
        """The reply; raises HubError."""
        await self.online.wait()
        number = next(self._requests)
        future = self._waiting[number] = asyncio.get_running_loop().create_future()
        assert self._socket
        try:
            await _say(self._socket, type="request", id=number, request={"do": do, **asked})
            reply = await asyncio.wait_for(future, 20)
        except (ConnectionClosed, TimeoutError) as error:
            raise HubError({"code": "gone", "message": repr(error)}) from error
        finally:
            self._waiting.pop(number, None)
        if reply["is"] == "error":
            raise HubError(reply)
        return reply

    async def pages(
        self, do: str, list_name: str, id_of: Callable[[dict[str, Any]], str]
    ) -> AsyncIterator[dict[str, Any]]:
        """The items of a list that comes in pages."""
        after: dict[str, str] = {}
        while True:
            reply = await self.request(do, **after)
            for item in reply[list_name]:
                yield item
            if not reply["more"] or not reply[list_name]:
                return
            last = id_of(reply[list_name][-1])
            if last <= after.get("after", ""):
                return
            after = {"after": last}

    def _go(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception():
            self.refused.append(repr(task.exception()))

    async def stop(self) -> None:
        for channel in list(self.channels.values()):
            await channel.close()
        for task in list(self._tasks):
            task.cancel()
        if self._socket:
            await self._socket.close()

    # --- Sections 7, 19 and 13 (*Again*): the log, and what follows when it changes ---

    async def read_log(self) -> None:
        while True:
            reply = await self.request("log", have=[_place(head) for head in self.log.locator()])
            take_all(self.log, [unblob(entry) for entry in reply["entries"]])
            if not reply["more"]:
                break
        await self._log_changed()

    async def _log_changed(self) -> None:
        view = self.log.view()
        for tunnel in list(self.tunnels):
            try:
                judge_again(view, tunnel.peer, int(time.time()))
            except Refused:
                await tunnel.close(Plain("CHANNEL_CLOSE", (NOT_TRUSTED,)))
        if self.share is None and view.epoch not in self.sources:
            wrap = (await self.request("own_wrap", epoch=view.epoch)).get("wrap")
            if wrap:
                self._unwrap(wrap, self.wrap_key, view.commits[view.epoch])
                await self.publish()

    async def _learned(self) -> None:
        """Tells the hub what was learned in a tunnel."""
        await self._log_changed()
        reply = await self.request("log", have=[_place(head) for head in self.log.locator()])
        after = (reply["after"]["seq"], unhex(reply["after"]["hash"], 32))
        if after != self.log.head and not reply["entries"]:
            await self.request("append", entries=[blob(entry.wire) for entry in self.log.after([after])[1]])

    # --- Sections 6, 8 and 25: what is published ---

    def names(self) -> tuple[Names, int]:
        """The newest names, and their epoch."""
        if self.share:
            return self.share.names, 0
        epoch = max(self.sources)
        return Names(self.sources[epoch]), epoch

    def _sealed(self, names: Names, epoch: int, object_id: bytes, counter: int, wire: bytes) -> dict[str, Any]:
        place = (self.workspace, object_id, self.id, epoch, counter)
        return {
            "epoch": epoch,
            "counter": counter,
            "sealed": blob(seal(names.name_key, place, wire, secrets.token_bytes(24))),
        }

    def _next_counter(self) -> int:
        self.counter = max(int(time.time()), self.counter + 1)
        return self.counter

    async def publish(self) -> None:
        names, epoch = self.names()
        counter = self._next_counter()
        attrs = {0: self.salt, 1: self.tags}
        body = {0: 1, 1: self.workspace, 2: self.id, 3: counter, 4: epoch, 5: self.label, 6: attrs}
        wire = envelope("agent-record", body, self.identity)
        await self.request("publish_agent", record=self._sealed(names, epoch, self.id, counter, wire))
        for service in self.services.values():
            sealed = self._service_record(service, names, epoch)
            tag = names.tag(service.name).hex()
            await self.request("expose", service_id=service.id.hex(), tag=tag, record=sealed)
        if self.services:
            await self.publish_to_shares()

    def _service_record(self, service: Service, names: Names, epoch: int) -> dict[str, Any]:
        counter = self._next_counter()
        body = {
            0: 1,
            1: self.workspace,
            2: service.id,
            3: self.id,
            4: counter,
            5: epoch,
            6: service.name,
            7: service.protocol,
            8: self.certificate.wire,
            9: self.credential.wire,
            10: self.noise_key.wire,
        }
        wire = envelope("service-record", body, self.identity)
        return self._sealed(names, epoch, service.id, counter, wire)

    async def expose(self, name: str, serve: ServeStream, protocol: str = "http") -> Service:
        service = Service(secrets.token_bytes(16), name, serve, protocol)
        self.services[service.id] = service
        await self.publish()
        return service

    async def unexpose(self, service: Service) -> None:
        del self.services[service.id]
        await self.request("unexpose", service_id=service.id.hex())
        for key, channel in list(self.channels.items()):
            if key[1] == service.id and not channel.reacher:
                await channel.close(NOT_EXPOSED)

    async def publish_to_shares(self) -> None:
        """Section 25, *The exposer*."""
        async for item in self.pages("shares", "credentials", _credential_id):
            credential = Signed("credential", unblob(item["credential"]))
            view = self.log.view()
            need(credential.share and credential.workspace_id == self.workspace, "no share")
            need(view.vouches(credential.issuer, credential.hash), "a share of nobody")
            credential.verify_by(credential.issuer)
            share_id = credential.credential_id
            if share_id in view.ended.closed or time.time() > credential.certs_end:
                continue
            self.shares[share_id] = credential
            share = Share.of(self.realm_secret, share_id)
            for service in self.services.values():
                if service.id in credential.services:
                    await self.request(
                        "expose_to_share",
                        share_id=share_id.hex(),
                        service_id=service.id.hex(),
                        tag=share.names.tag(service.name).hex(),
                        record=self._service_record(service, share.names, 0),
                    )

    async def agents(self) -> list[tuple[str, Peer]]:
        """Labels of the workspace's agents, judged."""
        found = []
        async for item in self.pages("agents", "agents", lambda item: item["agent_id"]):
            peer = self._judge_listed(item, unhex(item["agent_id"], 16))
            if record := item.get("record"):
                names = Names(self.sources[record["epoch"]])
                place = (self.workspace, peer.agent_id, peer.certificate.identity_key)
                sealed = (record["epoch"], record["counter"], unblob(record["sealed"]))
                found.append((objects.open_agent_record(names, *place, *sealed).label, peer))
        return found

    def _judge_listed(self, item: dict[str, Any], expected: bytes) -> Peer:
        credential = unblob(item["credential"]) if item.get("credential") else None
        wires = (unblob(item["certificate"]), credential, unblob(item["noise_key"]))
        return judge(self.log.view(), *wires, expected, int(time.time()))

    # --- Sections 12 and 13: both sides of a handshake ---

    def claims(self) -> Claims:
        wires = (self.certificate.wire, self.credential.wire, self.noise_key.wire)
        return Claims(*wires, self.salt, self.tags, *self.log.head)

    def _judge(self, said: Claims, remote_static: bytes, prologue: Prologue, peer_reaches: bool) -> Peer:
        """Steps 1 to 8, but for the heads."""
        view = self.log.view()
        expected = prologue.initiator if peer_reaches else prologue.responder
        peer = judge(view, said.certificate, said.credential, said.noise_key, expected, int(time.time()))
        need(peer.noise_key.static_key == remote_static, "another static key than the NoiseKey's")
        counter, key = self.seen.get(expected, (0, b""))
        new = peer.noise_key.counter > counter
        need(new or (peer.noise_key.counter, remote_static) == (counter, key), "an old NoiseKey, or a clone")
        need(objects.attrs_hash(said.salt, said.tags) == peer.certificate.attrs, "other tags than the certificate's")
        need(not view.frozen, "the log is frozen")
        need(not (view.strict and view.forked), "the policy forbids tunnels while the log is forked")
        role = peer.certificate.role
        if not peer_reaches:
            need(role in (MEMBER, objects.EXPOSER), "the role may not expose")
            return peer
        need(role in (MEMBER, REACHER, GUEST), "the role may not reach")
        need(prologue.service_id in self.services, "not exposed here")
        if role == GUEST:
            assert peer.credential
            need(peer.credential.credential_id == prologue.share_id and prologue.realm == SHARE, "another share")
            need(prologue.service_id in peer.certificate.services, "not in the share")
            guests = self.guests.setdefault(prologue.share_id, set())
            need(expected in guests or len(guests) < peer.credential.uses, "the share is used up")
        else:
            need(prologue.share_id == NO_ID and prologue.realm == MEMBERS, "a share for a member")
        return peer

    def _party(self, prologue: Prologue, realm_secret: bytes, peer_reaches: bool) -> Party:
        return Party(
            log=self.log,
            static=lambda: self.static,
            claims=self.claims,
            realm_secret=realm_secret,
            judge=lambda said, static: self._judge(said, static, prologue, peer_reaches),
            judge_again=lambda peer: judge_again(self.log.view(), peer, int(time.time())),
            learned=self._learned,
        )

    def _remember(self, peer: Peer, share_id: bytes) -> None:
        """After the peer's first record."""
        self.seen[peer.agent_id] = (peer.noise_key.counter, peer.noise_key.static_key)
        if share_id != NO_ID:
            self.guests.setdefault(share_id, set()).add(peer.agent_id)

    async def _data_socket(self, ticket: str, encoding: str) -> ClientConnection:
        return await connect(
            self.hub.at("/v1/tunnel"),
            additional_headers={"Authorization": f"Ticket {ticket}"},
            subprotocols=[f"connect.v1.{encoding}"],  # type: ignore[list-item]
            compression=None,
            max_size=131_072,
            ping_interval=None,
        )

    # --- The exposer ---

    async def _incoming(self, said: dict[str, Any]) -> None:
        request = said["request"]
        tunnel_id = unhex(request["tunnel_id"], 16)
        try:
            need(tunnel_id not in self.answered and request["responder"] == self.id.hex(), "answered before")
            self.answered.add(tunnel_id)
            share_id = unhex(request["share_id"], 16)
            guest = share_id != NO_ID
            prologue = Prologue(
                workspace=self.workspace,
                tunnel_id=tunnel_id,
                service_id=unhex(request["service_id"], 16),
                initiator=unhex(said["initiator"], 16),
                responder=self.id,
                share_id=share_id,
                channel_id=unhex(request["channel_id"], 16),
                tunnel_no=request["tunnel_no"],
                realm=SHARE if guest else MEMBERS,
                encoding=ENCODINGS[request["encoding"]],
            )
            realm_secret = Share.of(self.realm_secret, share_id).realm_secret if guest else self.realm_secret
            responder = Responder(self.static, prologue)
            claims = responder.message1(unblob(request["message"]))
            party = self._party(prologue, realm_secret, True)
            try:
                peer = party.judge(claims, responder.remote_static())
            except Refused:
                # Perhaps the hub knows entries that this agent does not.
                await self.read_log()
                peer = party.judge(claims, responder.remote_static())
            head = self.log.head
            message2, keys = responder.message2(self.claims(), realm_secret)
        except (Refused, KeyError) as refused:
            self.refused.append(str(refused))
            await self._tell(type="refuse_tunnel", tunnel_id=request["tunnel_id"], code="forbidden")
            return
        await self._tell(type="accept_tunnel", tunnel_id=tunnel_id.hex(), message=blob(message2))
        self.accepted += 1
        socket = await self._data_socket(said["ticket"], request["encoding"])
        heads = (head, (claims.seq, claims.head))
        tunnel = Tunnel(socket, False, prologue, keys, peer, heads, party)
        tunnel.rekey_after_records = self.rekey_after_records
        self.tunnels.add(tunnel)
        try:
            await self._serve(tunnel)
        except (TunnelLost, ChannelClosed):
            pass
        finally:
            self.tunnels.discard(tunnel)
            await tunnel.close()

    async def _serve(self, tunnel: Tunnel) -> None:
        await tunnel.catch_up()
        first = await tunnel.receive(10)
        prologue = tunnel.prologue
        self._remember(tunnel.peer, prologue.share_id)
        key = (prologue.initiator, prologue.service_id, prologue.share_id, prologue.channel_id)
        channel = self.channels.get(key)
        if channel and channel.closed.is_set():
            channel = None
        if channel is None:
            channel = Channel(False, self.services[prologue.service_id].serve)
            if channel.is_unknown_to(first):
                await tunnel.close(Plain("CHANNEL_CLOSE", (UNKNOWN_CHANNEL,)))
                return
            self.channels[key] = channel
            self._go(self._give_up(key, channel, 180))
        if prologue.tunnel_no <= channel.tunnel_no:
            await tunnel.close(Plain("TUNNEL_CLOSE", (NEWER,)))
            return
        channel.tunnel_no = prologue.tunnel_no
        if old := channel.tunnel:
            channel.detach()
            await old.close()
        await channel.greet_as_exposer(tunnel, first)
        await channel.run(tunnel)

    async def _give_up(self, key: tuple[bytes, bytes, bytes, bytes], channel: Channel, after: float) -> None:
        """*Giving up*."""
        while not channel.closed.is_set():
            if channel.tunnel is None and time.monotonic() - channel.heard > after:
                channel.end(UNKNOWN_CHANNEL)
            await asyncio.sleep(1)
        self.channels.pop(key, None)

    async def _tell(self, **said: Any) -> None:
        assert self._socket
        await _say(self._socket, **said)

    # --- The reacher ---

    async def lookup(self, name: str) -> Found:
        names, epoch = self.names()
        reply = await self.request("lookup", tag=names.tag(name).hex())
        need(reply["services"], f"there is no service `{name}`")
        item = reply["services"][0]
        sealed = item["record"]
        need(sealed["epoch"] == epoch, "a record of another epoch")
        service, agent = unhex(item["service_id"], 16), unhex(item["agent_id"], 16)
        record, _ = objects.open_service_record(
            names, self.workspace, service, agent, epoch, sealed["counter"], unblob(sealed["sealed"])
        )
        need(record.name == name, "another name than was asked for")
        wires = (record.certificate, record.credential, record.noise_key)
        peer = judge(self.log.view(), *wires, agent, int(time.time()))
        need(peer.certificate.role in (MEMBER, objects.EXPOSER), "its role may not expose")
        return Found(service, record, peer)

    async def open_tunnel(self, found: Found, channel: Channel, encoding: str) -> Tunnel:
        """The handshake, the data socket, and catching up."""
        channel.tunnel_no += 1
        share_id = self.credential.credential_id if self.share else NO_ID
        realm_secret = self.share.realm_secret if self.share else self.realm_secret
        prologue = Prologue(
            workspace=self.workspace,
            tunnel_id=secrets.token_bytes(16),
            service_id=found.id,
            initiator=self.id,
            responder=found.peer.agent_id,
            share_id=share_id,
            channel_id=channel.id,
            tunnel_no=channel.tunnel_no,
            realm=SHARE if self.share else MEMBERS,
            encoding=ENCODINGS[encoding],
        )
        static = found.peer.noise_key.static_key
        initiator, head = Initiator(self.static, static, prologue), self.log.head
        reply = await self.request(
            "open_tunnel",
            tunnel_id=prologue.tunnel_id.hex(),
            service_id=found.id.hex(),
            responder=prologue.responder.hex(),
            share_id=share_id.hex(),
            channel_id=channel.id.hex(),
            tunnel_no=channel.tunnel_no,
            encoding=encoding,
            message=blob(initiator.message1(self.claims())),
        )
        claims, keys = initiator.message2(unblob(reply["message"]), realm_secret)
        party = self._party(prologue, realm_secret, False)
        peer = party.judge(claims, static)
        socket = await self._data_socket(reply["ticket"], encoding)
        tunnel = Tunnel(socket, True, prologue, keys, peer, (head, (claims.seq, claims.head)), party)
        tunnel.rekey_after_records = self.rekey_after_records
        await tunnel.catch_up()
        return tunnel

    async def reach(self, name: str, encoding: str | None = None) -> Channel:
        """A channel to the service, kept up until it is closed."""
        found = await self.lookup(name)
        channel = Channel(True)
        self.channels[(self.id, found.id, NO_ID, channel.id)] = channel
        up: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._go(self._keep_up(found, channel, encoding or self.encoding, up))
        await up
        return channel

    async def _keep_up(self, found: Found, channel: Channel, encoding: str, up: asyncio.Future[None]) -> None:
        pause = 0.1
        while not channel.closed.is_set():
            tunnel: Tunnel | None = None
            try:
                tunnel = await self.open_tunnel(found, channel, encoding)
                self.tunnels.add(tunnel)
                await channel.greet_as_reacher(tunnel)
                self._remember(tunnel.peer, NO_ID)
                pause = 0.1
                if not up.done():
                    up.set_result(None)
                await channel.run(tunnel)
            except ChannelClosed as closed:
                channel.end(closed.args[0])
            except (TunnelLost, HubError, Refused, OSError, InvalidStatus, ConnectionClosed) as error:
                if not up.done():
                    up.set_exception(error)
                    channel.end(UNKNOWN_CHANNEL)
                if time.monotonic() - channel.heard > 120:
                    channel.end(UNKNOWN_CHANNEL)
                await asyncio.sleep(secrets.randbelow(1000) / 1000 * pause)
                pause = min(5.0, pause * 2)
            finally:
                if tunnel:
                    self.tunnels.discard(tunnel)
                    await tunnel.close()


# --- The control socket ---------------------------------------------------------------------------


def _credential_id(item: dict[str, Any]) -> str:
    return Signed("credential", unblob(item["credential"])).credential_id.hex()


def _place(head: Head) -> dict[str, Any]:
    return {"seq": head[0], "hash": head[1].hex()}


def _proof(hub: HubAddress, challenge: bytes, nonce: bytes, subject: bytes, workspace: bytes) -> bytes:
    authority = hub.authority.encode()
    return u16(len(authority)) + authority + challenge + nonce + subject + workspace


async def _dial(hub: HubAddress) -> tuple[ClientConnection, bytes]:
    need(not hub.tls, "this program speaks to hubs on loopback without TLS alone")
    socket = await connect(hub.at("/v1/agent"), compression=None, max_size=65_536)
    challenge = await _hear(socket, "challenge")
    need(challenge["version"] == 1, "a control channel of another version")
    return socket, unhex(challenge["nonce"], 32)


async def _say(socket: ClientConnection, **said: Any) -> None:
    await socket.send(json.dumps({name: value for name, value in said.items() if value is not None}))


async def _hear(socket: ClientConnection, wanted: str) -> dict[str, Any]:
    said = json.loads(await asyncio.wait_for(socket.recv(), 10))
    if said.get("type") == "error":
        raise HubError(said)
    need(said.get("type") == wanted, f"{said.get('type')} in place of {wanted}")
    return said
