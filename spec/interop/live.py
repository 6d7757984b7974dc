"""This implementation against the real hub and the real agents: one PASS or FAIL line for each case.

`scripts/interop` starts them and says where they are, in the environment:
INTEROP_CONNECT (the program), INTEROP_STATE (a directory), INTEROP_HANDSHAKES (how many in each role).
The homes `laptop` (a signer, base64) and `server` (binary) are below the state directory.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import socket
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, Awaitable, Callable

import targets
from agent import Agent, Found
from channel import Channel, StreamReset
from objects import check_report, envelope
from records import Plain
from targets import PAGE, big, echo, fetch, http, listen, to_target
from tunnel import NORMAL, Tunnel
from wire import blob, need

CONNECT, STATE = os.environ["INTEROP_CONNECT"], Path(os.environ["INTEROP_STATE"])
HANDSHAKES = int(os.environ.get("INTEROP_HANDSHAKES", "1000"))
TUNNELS = max(1, HANDSHAKES // 10)
MIB = 1 << 20
LABEL = "second-implementation"


async def run(*command: str, stdin: bytes | None = None, env: dict[str, str] | None = None) -> bytes:
    """The output of a program, which ends well."""
    # Into files: an agent that a command leaves running would keep pipes open.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as error:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL if stdin is None else asyncio.subprocess.PIPE,
            stdout=out,
            stderr=error,
            env={**os.environ, **(env or {})},
        )
        try:
            await asyncio.wait_for(process.communicate(stdin), 60)
        except TimeoutError:
            process.kill()
            raise
        out.seek(0), error.seek(0)
        need(process.returncode == 0, f"{' '.join(command)[:120]}: {error.read().decode()[-300:]}")
        return out.read()


async def cli(home: str, *arguments: str) -> str:
    """What `connect` in that home prints."""
    return (await run(CONNECT, *arguments, env={"CONNECT_HOME": str(STATE / home)})).decode()


async def reached(home: str, name: str) -> int:
    """The local port of `connect reach`."""
    return int((await cli(home, "reach", name)).split()[-1].rpartition(":")[2])


async def curl(port: int, path: str, *arguments: str, stdin: bytes | None = None) -> bytes:
    return await run("curl", "-fsS", "--max-time", "50", *arguments, f"http://127.0.0.1:{port}{path}", stdin=stdin)


async def until(what: str, holds: Callable[[], Any], seconds: float = 20) -> None:
    """Waits for something of ours to come true."""
    end = time.monotonic() + seconds
    while not holds():
        need(time.monotonic() < end, f"not in time: {what}")
        await asyncio.sleep(0.02)


def half_closed(port: int, data: bytes) -> bytes:
    """What comes back after this end has ended its direction."""
    with socket.create_connection(("127.0.0.1", port), 30) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65_536), b""))


class Live:
    """The cases, in their order; each method below is one, its docstring is what it says."""

    def __init__(self) -> None:
        self.agent: Agent
        self.real_echo = self.real_http = 0

    def only_tunnel(self, peer_reaches: bool) -> Tunnel:
        found = [one for one in self.agent.tunnels if one.reacher != peer_reaches and one.greeted]
        need(len(found) == 1, f"{len(found)} tunnels in place of one")
        return found[0]

    async def joins(self) -> None:
        """joins by an invite, and the real agents list it by its label"""
        self.agent = await Agent.join(await cli("laptop", "invite", "--tag", "second"), LABEL)
        listed = json.loads(await cli("laptop", "agents", "--json"))
        text = json.dumps(listed)
        need(LABEL in text and self.agent.id.hex() in text, text)

    async def lists(self) -> None:
        """lists the real agents, whose certificates and sealed labels it verifies"""
        labels = {label for label, _ in await self.agent.agents()}
        need({"server", LABEL} < labels, str(labels))

    async def exposes(self) -> None:
        """exposes a web server and an echo server, which the real agents list"""
        _, http_port = await listen(http)
        _, echo_port = await listen(echo)
        await self.agent.expose("second-http", to_target(http_port, "http"))
        await self.agent.expose("second-echo", to_target(echo_port, "echo"), "tcp")
        text = await cli("laptop", "services", "--json")
        need("second-http" in text and "second-echo" in text, text)
        self.real_http, self.real_echo = http_port, echo_port
        await cli("server", "expose", str(http_port), "--name", "real-http")
        await cli("server", "expose", str(echo_port), "--name", "real-echo")

    async def _reached_by(self, home: str, encoding: int) -> None:
        port = await reached(home, "second-http")
        need(await curl(port, "/page") == PAGE, "another page")
        need(await curl(port, f"/big/{6 * MIB}") == big(6 * MIB), "other bytes")
        sent = os.urandom(5 * MIB + 7)
        digest = await curl(port, "/", "--data-binary", "@-", stdin=sent)
        need(digest.decode() == hashlib.sha256(sent).hexdigest(), "other bytes arrived")
        pages = await asyncio.gather(*(curl(port, f"/big/{MIB + n}") for n in range(8)))
        need(all(page == big(MIB + n) for n, page in enumerate(pages)), "other bytes, eight at once")
        tunnel = [one for one in self.agent.tunnels if not one.reacher and one.prologue.encoding == encoding]
        need(tunnel and tunnel[0].rekeys > 0, "no rekey in that encoding")
        channel = next(one for one in self.agent.channels.values() if one.tunnel is tunnel[0])
        need(channel.pongs >= 16, f"{channel.pongs} PONGs")
        await until("streams forgotten", lambda: not channel.streams)
        await asyncio.sleep(1)
        need(channel.tunnel is tunnel[0], "another tunnel by now")

    async def reached_base64(self) -> None:
        """is reached with curl, base64: a page, 6 MiB down, 5 MiB up, eight at once, rekeys and PINGs meanwhile"""
        await self._reached_by("laptop", 1)

    async def reached_binary(self) -> None:
        """is reached with curl, binary: the same"""
        await self._reached_by("server", 2)

    async def half_close_exposed(self) -> None:
        """keeps a half-closed connection of a real client open until its answer is through"""
        for home in ("laptop", "server"):
            port = await reached(home, "second-echo")
            for size in (0, 1, 300_001):
                wanted = b"%d bytes: " % size + big(size)
                need(await asyncio.to_thread(half_closed, port, big(size)) == wanted, f"another answer to {size} bytes")

    async def checked(self) -> None:
        """answers `connect reach --check --speed` with a check report, a sink and a source"""
        said = json.loads(await cli("laptop", "reach", "second-http", "--check", "--speed", "--json"))
        need(said["ok"] and said["protocol"] == "http" and min(said["speed"].values()) > 0, str(said))

    async def _reaches(self, encoding: str) -> None:
        agent = self.agent
        channel = await agent.reach("real-http", encoding)
        need(await fetch(channel.open(), "GET", "/page") == PAGE, "another page")
        need(await fetch(channel.open(), "GET", f"/big/{6 * MIB}") == big(6 * MIB), "other bytes")
        sent = os.urandom(5 * MIB + 7)
        digest = await fetch(channel.open(), "POST", "/", sent)
        need(digest.decode() == hashlib.sha256(sent).hexdigest(), "other bytes arrived")
        pages = await asyncio.gather(*(fetch(channel.open(), "GET", f"/big/{MIB + n}") for n in range(8)))
        need(all(page == big(MIB + n) for n, page in enumerate(pages)), "other bytes, eight at once")
        tunnel = self.only_tunnel(False)
        need(tunnel.rekeys > 0 and channel.pongs >= 16, f"{tunnel.rekeys} rekeys, {channel.pongs} PONGs")
        await until("streams forgotten", lambda: not channel.streams)
        await channel.close()
        await until("tunnel gone", lambda: not [one for one in agent.tunnels if one.reacher])

    async def reaches_base64(self) -> None:
        """reaches a real agent's web server, base64: a page, 6 MiB down, 5 MiB up, eight at once, rekeys meanwhile"""
        await self._reaches("base64")

    async def reaches_binary(self) -> None:
        """reaches a real agent's web server, binary: the same"""
        await self._reaches("binary")

    async def half_close_reached(self) -> None:
        """half-closes streams to a real exposer and reads the answer"""
        channel = await self.agent.reach("real-echo")
        for size in (0, 1, 300_001):
            stream = channel.open()
            await stream.write(big(size))
            stream.finish()
            need(await stream.read_all() == b"%d bytes: " % size + big(size), f"another answer to {size} bytes")
        await channel.close()

    async def asks_for_checks(self) -> None:
        """reads a check report of a real exposer, sends to its sink and reads its source; purpose 4 is reset with 6"""
        channel = await self.agent.reach("real-http")
        stream = channel.open(targets.CHECK)
        stream.finish()
        report = check_report(await stream.read_all())
        need(report["outcome"] == 0 and report["protocol"] == "http", str(report))
        stream = channel.open(targets.SINK)
        await stream.write(big(3 * MIB))
        stream.finish()
        need(int.from_bytes(await stream.read_all(), "big") == 3 * MIB, "another count")
        stream = channel.open(targets.SOURCE)
        await stream.write((2 * MIB).to_bytes(8, "big"))
        stream.finish()
        need(len(await stream.read_all()) == 2 * MIB, "another count")
        stream = channel.open(4)
        try:
            await stream.read()
        except StreamReset as reset:
            need(reset.args[0] == targets.UNKNOWN_PURPOSE, f"RESET({reset.args[0]})")
        else:
            need(False, "not reset")
        await channel.close()

    async def target_refuses(self) -> None:
        """gets RESET(1) where the target refuses, and hands it out where its own does: curl sees a reset"""
        with socket.create_server(("127.0.0.1", 0)) as nobody:
            dead = nobody.getsockname()[1]
        await cli("server", "expose", str(dead), "--name", "dead")
        channel = await self.agent.reach("dead")
        try:
            await channel.open().read()
        except StreamReset as reset:
            need(reset.args[0] == targets.REFUSED, f"RESET({reset.args[0]})")
        else:
            need(False, "not reset")
        await cli("server", "unexpose", "dead")
        await until("CHANNEL_CLOSE", channel.closed.is_set)
        need(channel.close_code == 2, f"CHANNEL_CLOSE({channel.close_code}) in place of 2")
        await self.agent.expose("second-dead", to_target(dead, "tcp"), "tcp")
        port = await reached("laptop", "second-dead")
        try:
            await asyncio.to_thread(half_closed, port, b"x")
        except ConnectionResetError:
            return
        need(False, "no TCP reset")

    async def let_go(self) -> str | None:
        """is let go of by a real reacher"""
        await reached("laptop", "second-echo")
        own = [one for one in self.agent.channels.values() if not one.reacher and one.tunnel]
        await cli("laptop", "unreach", "second-echo")
        await until("an end", lambda: not all(one.tunnel for one in own))
        ended = next(one for one in own if not one.tunnel)
        need(ended.close_code in (None, NORMAL), f"CHANNEL_CLOSE({ended.close_code})")
        return "without CHANNEL_CLOSE(0): the tunnel went away" if ended.close_code is None else None

    async def catches_up(self) -> None:
        """gets the entries that it lacks in the tunnel (TRUST_GET, TRUST, READY), in both roles"""
        for role in ("reacher", "exposer"):
            old = self.agent.log.head
            read_log, self.agent.read_log = self.agent.read_log, _nothing  # type: ignore[method-assign]
            try:
                await self._move_the_log()
                await asyncio.sleep(0.3)
                need(self.agent.log.head == old, "it heard of it")
                if role == "reacher":
                    channel = await self.agent.reach("real-http")
                    need(await fetch(channel.open(), "GET", "/page") == PAGE, "another page")
                    await channel.close()
                else:
                    # A tunnel of a channel that the real agent begins: heads differ at its message 1.
                    port = await reached("laptop", "second-echo")
                    await asyncio.to_thread(half_closed, port, b"hello")
                    await cli("laptop", "unreach", "second-echo")
                need(self.agent.log.head[0] > old[0], "it took nothing in the tunnel")
            finally:
                self.agent.read_log = read_log  # type: ignore[method-assign]

    async def _move_the_log(self) -> None:
        await cli("laptop", "invite")
        invites = json.loads(await cli("laptop", "invites", "--json"))
        ids = [one for one in _walk(invites) if isinstance(one, str) and len(one) == 32]
        await cli("laptop", "invites", "--revoke", ids[-1])

    async def brings_news(self) -> None:
        """as an admin signs an entry that nobody has, and a real exposer takes it in the tunnel and tells the hub"""
        agent = self.agent
        await cli("laptop", "trust", "add-signer", LABEL)
        await until("being a signer", lambda: self._signs())
        seq, head = agent.log.head
        closure = {0: 4, 1: os.urandom(16), 2: []}
        entry = {0: 1, 1: agent.workspace, 2: seq + 1, 3: head, 4: int(time.time()), 5: [closure]}
        wire = b"\x01" + envelope("entry", entry, agent.identity)
        agent.log.take(wire)
        channel = await agent.reach("real-http")
        need(await fetch(channel.open(), "GET", "/page") == PAGE, "another page")
        await channel.close()
        # It tells the hub when it next reads the log there, which a command in its home makes it do.
        await cli("server", "services")
        reply = await agent.request("log", have=[{"seq": seq, "hash": head.hex()}])
        need(blob(wire) in reply["entries"], "the real agent did not tell the hub")

    def _signs(self) -> bool:
        return self.agent.certificate.identity_key in self.agent.log.view().signers

    async def new_epoch(self) -> None:
        """gets the secrets of a new epoch after a revocation, publishes anew, and reaches and is reached by name"""
        other = await Agent.join(await cli("laptop", "invite"), "soon-revoked")
        channel = await other.reach("real-http")
        need(await fetch(channel.open(), "GET", "/page") == PAGE, "another page")
        before = max(self.agent.sources)
        await cli("laptop", "revoke", "--yes", "soon-revoked")
        await until("the end of the revoked agent's channel", channel.closed.is_set)
        need(channel.close_code == 3, f"CHANNEL_CLOSE({channel.close_code}) in place of 3")
        await until("the secrets of the epoch", lambda: max(self.agent.sources) > before, 40)
        await self._with_patience(self._by_name)
        await other.stop()

    async def _by_name(self) -> None:
        channel = await self.agent.reach("real-http")
        need(await fetch(channel.open(), "GET", "/page") == PAGE, "another page")
        await channel.close()
        need("second-http" in await cli("server", "services"), "not listed")

    async def _with_patience(self, work: Callable[[], Awaitable[None]], seconds: float = 30) -> None:
        """Until others have published anew."""
        end = time.monotonic() + seconds
        while True:
            try:
                return await work()
            except Exception:
                if time.monotonic() > end:
                    raise
            await asyncio.sleep(0.5)

    async def guest(self) -> None:
        """joins a share as a guest, and reaches what it names and nothing else"""
        code = await cli("laptop", "share", "real-http", "--name", "for-a-guest")
        guest = await Agent.join(code, "a-guest")

        async def visit() -> None:
            channel = await guest.reach("real-http")
            need(await fetch(channel.open(), "GET", f"/big/{MIB}") == big(MIB), "other bytes")
            await channel.close()

        await self._with_patience(visit)
        try:
            await guest.lookup("real-echo")
        except Exception:
            pass
        else:
            need(False, "it found what the share does not name")
        await guest.stop()

    async def real_guest(self) -> None:
        """exposes to a share, and a real guest reaches it with curl"""
        code = (await cli("laptop", "share", "second-http", "--name", "for-a-real-guest")).strip()
        await cli("guest", "join", code, "--label", "real-guest")
        await cli("guest", "up", "--detach")
        ports: list[int] = []

        async def visit() -> None:
            ports[:] = [await reached("guest", "second-http")]
            need(await curl(ports[0], f"/big/{MIB}") == big(MIB), "other bytes")

        try:
            await self._with_patience(visit)
            need(self.agent.guests, "no guest was seen")
        finally:
            await cli("guest", "down")

    async def tunnels_reacher(self) -> None:
        """{tunnels} whole handshakes as initiator: a tunnel each, from the lookup to CHANNEL_CLOSE"""
        found: Found = await self.agent.lookup("real-http")
        for _ in range(TUNNELS):
            channel = Channel(True)
            tunnel = await self.agent.open_tunnel(found, channel, "binary")
            await channel.greet_as_reacher(tunnel)
            await channel.close()

    async def tunnels_exposer(self) -> None:
        """{tunnels} whole handshakes as responder: the data socket of a real reacher's channel is ended each time"""
        port = await reached("server", "second-http")
        await curl(port, "/page")
        began = self.agent.accepted
        while self.agent.accepted < began + TUNNELS:
            mine = [one for one in self.agent.tunnels if not one.reacher and one.greeted and one.prologue.encoding == 2]
            if mine:
                accepted = self.agent.accepted
                for tunnel in mine:
                    await tunnel.close(Plain("TUNNEL_CLOSE", (NORMAL,)))
                await until("the next tunnel", lambda: self.agent.accepted > accepted, 30)
            else:
                await asyncio.sleep(0.01)
        need(await curl(port, "/page") == PAGE, "another page")

    async def rekeys_reacher(self) -> None:
        """{handshakes} handshakes as initiator with fresh ephemeral and ML-KEM keys, as rekeys of one tunnel"""
        channel = await self.agent.reach("real-http")
        tunnel = self.only_tunnel(False)
        await self._rekeys(tunnel)
        need(await fetch(channel.open(), "GET", "/page") == PAGE, "another page")
        need(channel.tunnel is tunnel, "another tunnel by now")
        await channel.close()

    async def rekeys_exposer(self) -> None:
        """{handshakes} handshakes as responder, asked for by HS_WANT"""
        port = await reached("server", "second-http")
        await curl(port, "/page")
        mine = [one for one in self.agent.tunnels if not one.reacher and one.greeted and one.prologue.encoding == 2]
        await self._rekeys(mine[-1])
        need(await curl(port, "/page") == PAGE, "another page")

    async def _rekeys(self, tunnel: Tunnel) -> None:
        began = tunnel.rekeys
        while tunnel.rekeys < began + HANDSHAKES:
            number = tunnel.rekeys
            await tunnel.rekey()
            await until("the rekey", lambda: tunnel.rekeys > number, 30)

    async def outlives_the_hub(self) -> None:
        """carries two transfers on when the hub is killed in their middle: it reaches, and is reached"""
        size = 24 * MIB
        channel = await self.agent.reach("real-http", "base64")
        port = await reached("laptop", "second-http")
        down = asyncio.create_task(fetch(channel.open(), "GET", f"/big/{size}"))
        up = asyncio.create_task(curl(port, f"/big/{size}", "--limit-rate", "8M"))
        await until("bytes", lambda: channel.got > 2 * MIB)
        need(not down.done() and not up.done(), "over before the hub was killed")
        (STATE / "kill-hub").touch()
        need(await down == big(size), "other bytes came")
        need(await up == big(size), "other bytes were served")
        resumed = [one for one in self.agent.channels.values() if one.resumed]
        need({one.reacher for one in resumed} == {True, False}, "no channel was resumed in one of the roles")
        await channel.close()

    async def revoked(self) -> None:
        """is revoked, and all that it reached ends with CHANNEL_CLOSE(3)"""
        channel = await self.agent.reach("real-http")
        await cli("laptop", "trust", "remove-signer", LABEL)
        await cli("laptop", "revoke", "--yes", LABEL)
        await until("the end of the channel", channel.closed.is_set)
        need(channel.close_code == 3, f"CHANNEL_CLOSE({channel.close_code}) in place of 3")
        need("second-http" not in await cli("server", "services"), "it is still listed")


    async def exposer_stops(self) -> None:
        """gets CHANNEL_CLOSE(0) when a real exposer stops"""
        other = await Agent.join(await cli("laptop", "invite"), "another")
        channel = await other.reach("real-http")
        await cli("server", "down")
        await until("CHANNEL_CLOSE", channel.closed.is_set)
        need(channel.close_code == NORMAL, f"CHANNEL_CLOSE({channel.close_code}) in place of 0")
        await other.stop()


async def _nothing() -> None:
    """In place of reading the log."""


def _walk(value: Any) -> list[Any]:
    """All leaves of a JSON value."""
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in _walk(item)]
    if isinstance(value, list):
        return [leaf for item in value for leaf in _walk(item)]
    return [value]


CASES = [name for name, item in vars(Live).items() if item.__doc__ and not name.startswith("_")]


async def main() -> int:
    live, failed = Live(), 0
    only = os.environ.get("INTEROP_ONLY", "").split()
    for name in CASES:
        case = getattr(live, name)
        if only and name not in (*only, "joins", "exposes"):
            continue
        says = case.__doc__.format(tunnels=TUNNELS, handshakes=HANDSHAKES)
        began = time.monotonic()
        try:
            note = await asyncio.wait_for(case(), 120)
            print(f"PASS {says}{f' - NOTE: {note}' if note else ''} ({time.monotonic() - began:.1f} s)", flush=True)
        except Exception:
            failed += 1
            print(f"FAIL {says}", flush=True)
            traceback.print_exc()
            if name in ("joins", "exposes"):
                break
    for refused in live.agent.refused:
        print(f"  refused on the way: {refused}", flush=True)
    await live.agent.stop()
    return failed


if __name__ == "__main__":
    raise SystemExit(1 if asyncio.run(main()) else 0)
