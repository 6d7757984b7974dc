"""What stands behind exposed services, and what an exposer does with a stream (PROTOCOL.md section 16)."""

from __future__ import annotations

import asyncio
import hashlib
import time
from typing import Awaitable, Callable

from channel import ABORTED, TARGET, Stream, StreamReset
from wire import cbor, u64

CHECK, SINK, SOURCE = 1, 2, 3
REFUSED, UNKNOWN_PURPOSE = 1, 6
MOST_BYTES = 64 << 20
PAGE = b"a page from behind a second implementation\n"


def big(size: int) -> bytes:
    """Bytes that follow from their number."""
    return hashlib.shake_128(b"interop").digest(size)


async def http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """`GET /page`, `GET /big/N` for N bytes, `POST` for the SHA-256 of what comes; one request a connection."""
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        method, path = head.split()[:2]
        if method == "POST":
            lengths = [line.split(":")[1] for line in head.split("\r\n") if line.lower().startswith("content-length:")]
            if "expect: 100" in head.lower():
                writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            answer = hashlib.sha256(await reader.readexactly(int(lengths[0]))).hexdigest().encode()
        else:
            answer = big(int(path.split("/")[2])) if path.startswith("/big/") else PAGE
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(answer) + answer)
        await writer.drain()
    except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
        pass
    finally:
        writer.close()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers only after the other direction has ended: with a half-close, or never."""
    try:
        whole = await reader.read()
        writer.write(b"%d bytes: " % len(whole) + whole)
        await writer.drain()
    except (ConnectionError, asyncio.CancelledError):
        pass
    finally:
        writer.close()


async def listen(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> tuple[asyncio.Server, int]:
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    return server, server.sockets[0].getsockname()[1]


def to_target(port: int, protocol: str) -> Callable[[Stream], Awaitable[None]]:
    """An exposer's service: dials the target for each stream, and answers checks itself."""

    async def serve(stream: Stream) -> None:
        try:
            await _serve(stream, port, protocol)
        except (StreamReset, ConnectionError):
            stream.reset(ABORTED)

    return serve


async def _serve(stream: Stream, port: int, protocol: str) -> None:
    if stream.purpose == SINK:
        count = 0
        while data := await stream.read():
            count += len(data)
        await stream.write(u64(count))
        stream.finish()
    elif stream.purpose == SOURCE:
        count = int.from_bytes(await stream.read_all(), "big")
        if count > MOST_BYTES:
            stream.reset(4)
            return
        for left in range(count, 0, -65_536):
            await stream.write(bytes(min(65_536, left)))
        stream.finish()
    elif stream.purpose in (TARGET, CHECK):
        began = time.monotonic()
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            if stream.purpose == CHECK:
                await stream.write(cbor({0: 1, 1: 2, 5: protocol}))
                stream.finish()
            else:
                stream.reset(REFUSED)
            return
        if stream.purpose == CHECK:
            writer.close()
            micros = int((time.monotonic() - began) * 1_000_000)
            await stream.write(cbor({0: 1, 1: 0, 4: micros, 5: protocol}))
            stream.finish()
            return
        stream.channel.say_opened(stream)
        await _both_ways(stream, reader, writer)
    else:
        stream.reset(UNKNOWN_PURPOSE)


async def _both_ways(stream: Stream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    async def out() -> None:
        while data := await stream.read():
            writer.write(data)
            await writer.drain()
        writer.write_eof()

    async def back() -> None:
        while data := await reader.read(65_536):
            await stream.write(data)
        stream.finish()

    try:
        await asyncio.gather(out(), back())
    finally:
        writer.close()


async def fetch(stream: Stream, method: str, path: str, body: bytes = b"") -> bytes:
    """One HTTP request over a stream; the body of its answer."""
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    await stream.write(head.encode())
    for at in range(0, len(body), 65_536):
        await stream.write(body[at : at + 65_536])
    stream.finish()
    status, _, answer = (await stream.read_all()).partition(b"\r\n\r\n")
    if not status.startswith(b"HTTP/1.1 200") and not status.startswith(b"HTTP/1.0 200"):
        raise ConnectionError(status.decode("latin-1"))
    return answer
