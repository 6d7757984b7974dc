"""Bytes: hashes, canonical CBOR, signatures, blobs, sealed records (PROTOCOL.md sections 1, 2, 5 and 8).

Everything that a peer or the hub may have made wrongly ends in `Refused`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import io
import re
from typing import Any

import cbor2
import nacl.bindings
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

DOMAIN = b"connect/v1 "


class Refused(Exception):
    """What was read is not of the protocol, or does not hold."""


def need(holds: Any, why: str) -> None:
    """Refuses with `why` unless it holds."""
    if not holds:
        raise Refused(why)


# --- Section 2: hashes and derivations ------------------------------------------------------------


def H(label: str, data: bytes) -> bytes:
    """H(l, x): 32 bytes."""
    return hashlib.blake2s(DOMAIN + label.encode() + b"\0" + data).digest()


def KDF(key: bytes, label: str | bytes) -> bytes:
    """KDF(k, l): 32 bytes. A label may end in raw bytes (section 25)."""
    text = label.encode() if isinstance(label, str) else label
    return hmac.new(key, DOMAIN + text, hashlib.blake2s).digest()


def u16(value: int) -> bytes:
    return value.to_bytes(2, "big")


def u32(value: int) -> bytes:
    return value.to_bytes(4, "big")


def u64(value: int) -> bytes:
    return value.to_bytes(8, "big")


# --- Section 1: JSON values -----------------------------------------------------------------------


def blob(data: bytes) -> str:
    """Base64 without padding."""
    return base64.b64encode(data).decode().rstrip("=")


def unblob(text: Any) -> bytes:
    """The bytes of a blob; one spelling only."""
    need(isinstance(text, str) and re.fullmatch(r"[A-Za-z0-9+/]*", text) and len(text) % 4 != 1, "not a blob")
    data = base64.b64decode(text + "=" * (-len(text) % 4))
    need(blob(data) == text, "bits left over in a blob")
    return data


def unhex(text: Any, length: int) -> bytes:
    """A value of fixed length in lower-case hexadecimal."""
    need(isinstance(text, str) and re.fullmatch(r"[0-9a-f]*", text) and len(text) == 2 * length, "not hexadecimal")
    return binascii.unhexlify(text)


# --- Section 5: canonical CBOR --------------------------------------------------------------------

MAX_DEPTH = 8


def cbor(value: Any) -> bytes:
    """The one encoding of ints, bytes, texts, bools, lists and dicts with unsigned keys."""
    return cbor2.dumps(value, canonical=True)


def uncbor(data: bytes) -> Any:
    """Exactly one canonical item; refuses everything that section 5 lists."""
    value, end = _item(data, 0, 0)
    need(end == len(data), "trailing bytes")
    return value


def _take(data: bytes, at: int, count: int) -> tuple[bytes, int]:
    need(at + count <= len(data), "truncated")
    return data[at : at + count], at + count


def _head(data: bytes, at: int) -> tuple[int, int, int]:
    """Major type, argument, position after them."""
    first, at = _take(data, at, 1)
    major, info = first[0] >> 5, first[0] & 31
    if major == 7:
        need(info in (20, 21), "a simple value that is no boolean")
        return major, info, at
    need(major in (0, 2, 3, 4, 5), "an item that bodies do not use")
    if info < 24:
        return major, info, at
    need(info < 28, "indefinite or reserved length")
    raw, at = _take(data, at, 1 << (info - 24))
    argument = int.from_bytes(raw, "big")
    least = {24: 24, 25: 1 << 8, 26: 1 << 16, 27: 1 << 32}[info]
    need(argument >= least, "not the shortest form")
    return major, argument, at


def _item(data: bytes, at: int, depth: int) -> tuple[Any, int]:
    major, argument, at = _head(data, at)
    if major == 0:
        return argument, at
    if major == 7:
        return argument == 21, at
    if major in (2, 3):
        raw, at = _take(data, at, argument)
        if major == 2:
            return raw, at
        try:
            return raw.decode("utf-8"), at
        except UnicodeDecodeError as error:
            raise Refused("not UTF-8") from error
    depth += 1
    need(depth <= MAX_DEPTH, "nested too deeply")
    if major == 4:
        items = []
        for _ in range(argument):
            item, at = _item(data, at, depth)
            items.append(item)
        return items, at
    fields: dict[int, Any] = {}
    last = -1
    for _ in range(argument):
        key_major, key, at = _head(data, at)
        need(key_major == 0 and key > last, "map keys are not unsigned and strictly ascending")
        last = key
        fields[key], at = _item(data, at, depth)
    return fields, at


# --- Sections 4 and 5: signatures -----------------------------------------------------------------

_P = 2**255 - 19
_ORDER = 2**252 + 27742317777372353535851937790883648493
# The y coordinates of the eight points of small order.
_SMALL_Y = {
    0,
    1,
    _P - 1,
    int.from_bytes(bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"), "little"),
    int.from_bytes(bytes.fromhex("c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a"), "little"),
}


def _small_order(point: bytes) -> bool:
    return (int.from_bytes(point, "little") & (2**255 - 1)) % _P in _SMALL_Y


def signed_text(kind: str, body: bytes) -> bytes:
    """What a signature covers."""
    return DOMAIN + kind.encode() + b"\0" + body


def verify(key: bytes, kind: str, body: bytes, signature: bytes) -> None:
    """Strict Ed25519: no points of small order, s below the group order, no cofactor.

    OpenSSL compares R as bytes with what it computes, so an R that is not canonical never matches.
    """
    need(len(key) == 32 and len(signature) == 64, "signature of a wrong length")
    need(not _small_order(key) and not _small_order(signature[:32]), "point of small order")
    need(int.from_bytes(signature[32:], "little") < _ORDER, "s is not below the group order")
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, signed_text(kind, body))
    except (InvalidSignature, ValueError) as error:
        raise Refused("signature does not verify") from error


def sign(seed: bytes, kind: str, body: bytes) -> bytes:
    return Ed25519PrivateKey.from_private_bytes(seed).sign(signed_text(kind, body))


def ed25519_public(seed: bytes) -> bytes:
    return Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()


def x25519_public(secret: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def x25519(secret: bytes, public: bytes) -> bytes:
    """Refuses a result of all zeros (section 4)."""
    try:
        return X25519PrivateKey.from_private_bytes(secret).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise Refused("X25519 key of small order") from error


# --- Section 8: sealed records --------------------------------------------------------------------


def _padded_length(n: int) -> int:
    return 256 if n <= 256 else 512 if n <= 512 else -(-n // 1024) * 1024


def _associated(workspace: bytes, object_id: bytes, agent: bytes, epoch: int, counter: int) -> bytes:
    return b"connect/v1 record\0" + workspace + object_id + agent + u32(epoch) + u32(counter)


def seal(name_key: bytes, place: tuple[bytes, bytes, bytes, int, int], envelope: bytes, nonce: bytes) -> bytes:
    """Seals an envelope for `place`: workspace, object, agent, epoch, counter."""
    plain = u16(len(envelope)) + envelope
    plain += bytes(_padded_length(len(plain)) - len(plain))
    need(len(plain) <= 8192, "too long to seal")
    return nonce + nacl.bindings.crypto_aead_xchacha20poly1305_ietf_encrypt(plain, _associated(*place), nonce, name_key)


def unseal(name_key: bytes, place: tuple[bytes, bytes, bytes, int, int], sealed: bytes) -> bytes:
    """The envelope in a sealed record."""
    need(24 + 16 <= len(sealed) <= 8232, "sealed record of a wrong length")
    try:
        plain = nacl.bindings.crypto_aead_xchacha20poly1305_ietf_decrypt(
            sealed[24:], _associated(*place), sealed[:24], name_key
        )
    except nacl.exceptions.CryptoError as error:
        raise Refused("does not open") from error
    return unpad(plain, _padded_length)


def unpad(plain: bytes, padded_length: Any) -> bytes:
    """`length u16 || bytes || zeros`, with the shortest padding."""
    need(len(plain) >= 2, "truncated")
    end = 2 + int.from_bytes(plain[:2], "big")
    need(end <= len(plain) and len(plain) == padded_length(end), "padding is not the shortest")
    need(not any(plain[end:]), "padding is not zero")
    return plain[2:end]


class Reader:
    """Takes fields of fixed length from a record (section 15)."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)
        self._left = len(data)

    def take(self, count: int) -> bytes:
        need(count <= self._left, "shorter than its fields")
        self._left -= count
        return self._data.read(count)

    def uint(self, count: int) -> int:
        return int.from_bytes(self.take(count), "big")

    def rest(self) -> bytes:
        return self.take(self._left)

    def left(self) -> int:
        return self._left

    def end(self) -> None:
        need(self._left == 0, "longer than its fields")
