"""The handshake and the keys that come out of it (PROTOCOL.md sections 12, 14 and 22)."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, replace
from typing import Any

from cryptography.exceptions import InvalidTag
from noise.connection import Keypair, NoiseConnection
from noise.exceptions import NoiseInvalidMessage

from objects import ATTRS, KEY, Fields, MlKemSecret, Optional, bstr, fields, mapping, ml_kem_encapsulate, uint
from wire import H, Refused, cbor, need, u16, u32, uncbor, unpad

# An ephemeral key is fixed for the vectors alone; the library warns of it each time.
warnings.filterwarnings("ignore", module="noise")

SUITE = 1
MEMBERS, SHARE = 1, 2
ENCODINGS = {"base64": 1, "binary": 2}
LONGEST = 4096


@dataclass(frozen=True)
class Prologue:
    """What both sides agree on before a word is said."""

    workspace: bytes
    tunnel_id: bytes
    service_id: bytes
    initiator: bytes
    responder: bytes
    share_id: bytes
    channel_id: bytes
    tunnel_no: int
    realm: int
    encoding: int
    rekey: int = 0
    previous_hash: bytes = bytes(32)

    def encode(self) -> bytes:
        ids = self.tunnel_id + self.service_id + self.initiator + self.responder + self.share_id + self.channel_id
        head = b"connect/v1 tunnel\0" + u16(SUITE) + self.workspace + ids
        tail = u32(self.tunnel_no) + u32(self.rekey) + self.previous_hash
        return head + tail + bytes([self.realm, self.encoding, 1])

    def of_rekey(self, number: int, previous_hash: bytes) -> "Prologue":
        return replace(self, rekey=number, previous_hash=previous_hash)


def psk(realm: int, realm_secret: bytes, kem_secret: bytes, ek: bytes, ct: bytes) -> bytes:
    return H("psk", u16(SUITE) + bytes([realm]) + realm_secret + kem_secret + H("ek", ek) + H("ct", ct))


# --- What a side says of itself -------------------------------------------------------------------

_CLAIMS: Fields = {
    1: ("certificate", bstr()),
    2: ("credential", Optional(bstr())),
    3: ("noise_key", bstr()),
    4: ("attrs", mapping(ATTRS)),
    5: ("seq", uint()),
    6: ("head", bstr(32)),
}
_CLAIMS1: Fields = _CLAIMS | {7: ("ek", bstr(1184))}


@dataclass(frozen=True)
class Claims:
    """The payload of a handshake message, less `ek`."""

    certificate: bytes
    credential: bytes | None
    noise_key: bytes
    salt: bytes
    tags: list[str]
    seq: int
    head: bytes

    def encode(self, ek: bytes | None) -> bytes:
        said = {
            1: self.certificate,
            2: self.credential,
            3: self.noise_key,
            4: {0: self.salt, 1: self.tags},
            5: self.seq,
            6: self.head,
            7: ek,
        }
        body = cbor({key: value for key, value in said.items() if value is not None})
        need(len(body) + 2 <= 3584, "too much to say")
        return (u16(len(body)) + body).ljust(_padded(len(body) + 2), b"\0")


def _padded(n: int) -> int:
    return -(-n // 512) * 512


def _read_claims(payload: bytes, table: Fields) -> tuple[Claims, bytes | None]:
    body = unpad(payload, _padded)
    need(len(body) + 2 <= 3584, "too much was said")
    said = fields(uncbor(body), table)
    attrs: dict[str, Any] = said.pop("attrs")
    ek = said.pop("ek", None)
    return Claims(**said, **attrs), ek


# --- The two messages -----------------------------------------------------------------------------


def _noise(
    initiator: bool, static: bytes, remote: bytes | None, prologue: Prologue, e: bytes | None
) -> NoiseConnection:
    noise = NoiseConnection.from_name(b"Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s")
    noise.set_as_initiator() if initiator else noise.set_as_responder()
    noise.set_prologue(prologue.encode())
    noise.set_keypair_from_private_bytes(Keypair.STATIC, static)
    if remote is not None:
        noise.set_keypair_from_public_bytes(Keypair.REMOTE_STATIC, remote)
    if e is not None:
        noise.set_keypair_from_private_bytes(Keypair.EPHEMERAL, e)
    # The library wants one before it starts; the psk token takes what is there by then.
    noise.set_psks(bytes(31) + b"?")
    noise.start_handshake()
    return noise


def _read(noise: NoiseConnection, message: bytes, shortest: int) -> bytes:
    need(shortest <= len(message) <= LONGEST, "a handshake message of a wrong length")
    try:
        return bytes(noise.read_message(message))
    except (InvalidTag, NoiseInvalidMessage, ValueError) as error:
        raise Refused("the handshake message does not open") from error


@dataclass
class Keys:
    """What a handshake gives: how each direction is sealed, and its name."""

    noise: NoiseConnection

    @property
    def hash(self) -> bytes:
        return bytes(self.noise.get_handshake_hash())

    def seal(self, record: bytes) -> bytes:
        need(len(record) <= 65519, "a record that is too long")
        return self.noise.encrypt(record)

    def open(self, sealed: bytes) -> bytes:
        need(16 <= len(sealed) <= 65535, "a sealed record of a wrong length")
        try:
            return self.noise.decrypt(sealed)
        except (NoiseInvalidMessage, InvalidTag) as error:
            raise Refused("the record does not open") from error


class Initiator:
    """The reacher."""

    def __init__(
        self, static: bytes, remote: bytes, prologue: Prologue, e: bytes | None = None, kem_seed: bytes | None = None
    ) -> None:
        self._prologue, self._kem = prologue, MlKemSecret(kem_seed or os.urandom(64))
        self._noise = _noise(True, static, remote, prologue, e)
        self.psk, self.kem_secret = b"", b""

    def message1(self, claims: Claims) -> bytes:
        return bytes(self._noise.write_message(claims.encode(self._kem.public)))

    def message2(self, message: bytes, realm_secret: bytes) -> tuple[Claims, Keys]:
        need(len(message) >= 1088, "message 2 is too short")
        ct = message[:1088]
        self.kem_secret = self._kem.decapsulate(ct)
        self.psk = psk(self._prologue.realm, realm_secret, self.kem_secret, self._kem.public, ct)
        self._noise.noise_protocol.psks = [self.psk]
        payload = _read(self._noise, message[1088:], 48)
        return _read_claims(payload, _CLAIMS)[0], Keys(self._noise)


class Responder:
    """The exposer."""

    def __init__(self, static: bytes, prologue: Prologue, e: bytes | None = None, kem_m: bytes | None = None) -> None:
        self._prologue, self._kem_m = prologue, kem_m
        self._noise = _noise(False, static, None, prologue, e)
        self.psk, self.kem_secret, self._ek = b"", b"", b""

    def message1(self, message: bytes) -> Claims:
        claims, ek = _read_claims(_read(self._noise, message, 96), _CLAIMS1)
        assert ek is not None
        self._ek = ek
        # Before anything is done with it: a key that is not canonical ends the handshake.
        self.kem_secret, self._ct = ml_kem_encapsulate(ek, self._kem_m)
        return claims

    def remote_static(self) -> bytes:
        return KEY(self._noise.noise_protocol.handshake_state.rs.public_bytes)

    def message2(self, claims: Claims, realm_secret: bytes) -> tuple[bytes, Keys]:
        self.psk = psk(self._prologue.realm, realm_secret, self.kem_secret, self._ek, self._ct)
        self._noise.noise_protocol.psks = [self.psk]
        return self._ct + bytes(self._noise.write_message(claims.encode(None))), Keys(self._noise)
