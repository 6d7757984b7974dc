"""Signed objects, invites, wraps, records and what may be in them (PROTOCOL.md sections 3 to 9, 16, 19, 21, 25)."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from dataclasses import dataclass
from typing import Any, Callable
from urllib.parse import urlsplit

import bech32
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from kyber_py.ml_kem import ML_KEM_768

from wire import KDF, H, Refused, cbor, ed25519_public, need, sign, u32, uncbor, unseal, verify, x25519, x25519_public

DAY = 86400
NO_ID = bytes(16)

# --- Checks of a field: each takes what was decoded and gives what is used, or refuses ------------

Check = Callable[[Any], Any]


def uint(low: int = 0, high: int = 2**64 - 1) -> Check:
    def check(value: Any) -> int:
        need(type(value) is int and low <= value <= high, "a number of another type or size")
        return value

    return check


def bstr(length: int | None = None) -> Check:
    def check(value: Any) -> bytes:
        need(type(value) is bytes and (length is None or len(value) == length), "bytes of another type or length")
        return value

    return check


def boolean(value: Any) -> bool:
    need(type(value) is bool, "not a boolean")
    return value


def text(pattern: str) -> Check:
    def check(value: Any) -> str:
        need(type(value) is str and re.fullmatch(pattern, value), "a text that is not allowed")
        return value

    return check


service_name = text(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
tag_name = text(r"[a-z0-9-]{1,32}")


def label(value: Any) -> str:
    need(type(value) is str and 1 <= len(value.encode()) <= 64, "a label of a wrong length")
    need(not any(unicodedata.category(c) == "Cc" for c in value), "a control character in a label")
    return value


def plain_text(value: Any) -> str:
    """A text of a check report (section 16)."""
    need(type(value) is str and 1 <= len(value.encode()) <= 253, "a text of a wrong length")
    hidden = "[\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]"
    need(not any(unicodedata.category(c) == "Cc" for c in value) and not re.search(hidden, value), "a hidden character")
    return value


def array(of: Check, low: int, high: int, ascending: Callable[[Any], Any] | None = None) -> Check:
    """At least `low`, at most `high`; strictly ascending by `ascending` if that is given."""

    def check(value: Any) -> list[Any]:
        need(type(value) is list and low <= len(value) <= high, "an array of another type or length")
        items = [of(item) for item in value]
        if ascending:
            keys = [ascending(item) for item in items]
            need(all(a < b for a, b in zip(keys, keys[1:])), "not strictly ascending")
        return items

    return check


def same(item: Any) -> Any:
    return item


@dataclass(frozen=True)
class Optional:
    """A field that may be left out."""

    check: Check


Fields = dict[int, tuple[str, "Check | Optional"]]


def fields(value: Any, table: Fields) -> dict[str, Any]:
    """A map of section 5: names to values, None for what was left out."""
    need(type(value) is dict, "not a map")
    need(all(key in table or key >= 64 for key in value), "a critical field that is unknown")
    out: dict[str, Any] = {}
    for key, (name, check) in table.items():
        if isinstance(check, Optional):
            out[name] = check.check(value[key]) if key in value else None
        else:
            need(key in value, f"field {key} is missing")
            out[name] = check(value[key])
    return out


def mapping(table: Fields) -> Check:
    return lambda value: fields(value, table)


VERSION = uint(1, 1)
KEY, HASH, ID = bstr(32), bstr(32), bstr(16)
SIGNER: Fields = {0: ("key", KEY), 1: ("role", uint(1, 2))}
OWNER, ADMIN = 1, 2
MEMBER, REACHER, EXPOSER, GUEST = 1, 2, 3, 4
ATTRS: Fields = {0: ("salt", ID), 1: ("tags", array(tag_name, 0, 16, str.encode))}
HASHES = array(HASH, 0, 1000, same)


def signers(most: int) -> Check:
    def check(value: Any) -> list[dict[str, Any]]:
        found = array(mapping(SIGNER), 1, most, lambda signer: signer["key"])(value)
        need(any(signer["role"] == OWNER for signer in found), "no owner")
        return found

    return check


CHANGES: dict[int, tuple[str, Fields]] = {
    1: ("add_signer", {1: ("key", KEY), 2: ("role", uint(1, 2))}),
    2: ("remove_signer", {1: ("key", KEY), 2: ("keep", HASHES)}),
    3: ("revoke_agent", {1: ("agent_id", ID), 2: ("below_serial", Optional(uint()))}),
    4: ("close_credential", {1: ("credential_id", ID), 2: ("keep", HASHES)}),
    5: ("epoch_key", {1: ("epoch", uint(0, 2**32 - 1)), 2: ("commit", HASH)}),
    6: ("policy", {1: ("strict", boolean)}),
}


def change(value: Any) -> dict[str, Any]:
    """One change: `do` names it; `unknown` when it is critical and not known, `ignored` from kind 128 on."""
    need(type(value) is dict and 0 in value, "not a change")
    kind = uint()(value[0])
    if kind >= 128:
        return {"do": "ignored"}
    if kind not in CHANGES:
        return {"do": "unknown"}
    do, table = CHANGES[kind]
    known = {key: item for key, item in value.items() if key in table or key >= 64}
    found = {"do": do, **fields(known, table)}
    return found if all(key == 0 or key in table or key >= 64 for key in value) else {"do": "unknown"}


BODIES: dict[str, tuple[int, Fields]] = {
    "genesis": (
        16384,
        {
            0: ("version", VERSION),
            1: ("suite", uint(1, 1)),
            2: ("salt", ID),
            3: ("founders", signers(16)),
            4: ("recovery_key", KEY),
            5: ("epoch_commit", HASH),
        },
    ),
    "certificate": (
        2048,
        {
            0: ("version", VERSION),
            1: ("workspace_id", HASH),
            2: ("identity_key", KEY),
            3: ("role", uint(1, 4)),
            4: ("attrs", HASH),
            5: ("serial", uint()),
            6: ("not_after", Optional(uint())),
            7: ("issuer_kind", uint(0, 1)),
            8: ("issuer", HASH),
            9: ("services", Optional(array(ID, 0, 16))),
        },
    ),
    "credential": (
        2048,
        {
            0: ("version", VERSION),
            1: ("workspace_id", HASH),
            2: ("kind", uint(1, 2)),
            3: ("invite_key", KEY),
            4: ("role", uint(1, 4)),
            5: ("attrs", HASH),
            6: ("services", Optional(array(ID, 0, 16))),
            7: ("uses", uint(1, 2**32 - 1)),
            8: ("join_until", uint()),
            9: ("certs_end", uint()),
            10: ("issuer", KEY),
            11: ("wrap_key_hash", HASH),
        },
    ),
    "noise-key": (
        2048,
        {
            0: ("version", VERSION),
            1: ("workspace_id", HASH),
            2: ("agent_id", ID),
            3: ("suite", uint(1, 1)),
            4: ("counter", uint()),
            5: ("static_key", KEY),
            6: ("wrap_key_hash", HASH),
        },
    ),
    "service-record": (
        7936,
        {
            0: ("version", VERSION),
            1: ("workspace_id", HASH),
            2: ("service_id", ID),
            3: ("agent_id", ID),
            4: ("counter", uint(0, 2**32 - 1)),
            5: ("epoch", uint(0, 2**32 - 1)),
            6: ("name", service_name),
            7: ("protocol", text(r"[a-z0-9]{1,16}")),
            8: ("certificate", bstr()),
            9: ("credential", Optional(bstr())),
            10: ("noise_key", bstr()),
            11: ("port_hint", Optional(uint(0, 2**16 - 1))),
            12: ("target_ok", Optional(boolean)),
        },
    ),
    "agent-record": (
        2048,
        {
            0: ("version", VERSION),
            1: ("workspace_id", HASH),
            2: ("agent_id", ID),
            3: ("counter", uint(0, 2**32 - 1)),
            4: ("epoch", uint(0, 2**32 - 1)),
            5: ("label", label),
            6: ("attrs", mapping(ATTRS)),
        },
    ),
    "share-record": (
        2048,
        {
            0: ("version", VERSION),
            1: ("workspace_id", HASH),
            2: ("share_id", ID),
            3: ("label", label),
            4: ("names", array(service_name, 0, 16)),
        },
    ),
    "beat": (
        256,
        {
            0: ("version", VERSION),
            1: ("workspace_id", HASH),
            2: ("agent_id", ID),
            3: ("seq", uint()),
            4: ("head", HASH),
            5: ("time", uint()),
        },
    ),
    "entry": (
        40960,
        {
            0: ("version", VERSION),
            1: ("workspace_id", HASH),
            2: ("seq", uint(1)),
            3: ("prev", HASH),
            4: ("time", uint()),
            5: ("changes", array(change, 1, 16)),
            6: ("abandons", Optional(array(HASH, 1, 16, same))),
        },
    ),
    "recovery": (
        40960,
        {
            0: ("version", VERSION),
            1: ("workspace_id", HASH),
            2: ("counter", uint(1)),
            3: ("base_seq", uint()),
            4: ("base_hash", HASH),
            5: ("signers", signers(64)),
            6: ("recovery_key", KEY),
            7: ("keep", HASHES),
            8: ("time", uint()),
        },
    ),
}

# --- Section 5: envelopes -------------------------------------------------------------------------


def _pair(item: Any) -> tuple[bytes, bytes]:
    key, signature = array(bstr(), 2, 2)(item)
    return KEY(key), bstr(64)(signature)


class Signed:
    """An object of some kind: parsed, its signatures not yet checked. Fields are attributes."""

    def __init__(self, kind: str, wire: bytes) -> None:
        limit, table = BODIES[kind]
        need(len(wire) <= limit + 2064, "envelope too long")
        envelope = uncbor(wire)
        need(type(envelope) is list and len(envelope) == 2, "envelope is malformed")
        self.object_kind, self.wire = kind, wire
        self.body: bytes = bstr()(envelope[0])
        need(len(self.body) <= limit, "body too long")
        self.signatures: list[tuple[bytes, bytes]] = array(_pair, 1, 16, lambda one: one[0])(envelope[1])
        self.hash = H(kind, self.body)
        self.__dict__.update(fields(uncbor(self.body), table))
        if kind == "credential":
            self.share = self.kind == 2
            need((self.role == GUEST) == self.share == (self.services is not None), "an invite, or a share")
            need(self.certs_end - self.join_until <= 90 * DAY, "certificates that last too long")
            self.credential_id = credential_id(self.invite_key)
        if kind == "certificate":
            self.agent_id = agent_id(self.workspace_id, self.identity_key)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def verify_all(self) -> None:
        for key, signature in self.signatures:
            verify(key, self.object_kind, self.body, signature)

    def verify_by(self, key: bytes) -> "Signed":
        """That this very key, and no other, signed."""
        need([one[0] for one in self.signatures] == [key], "signed by another")
        self.verify_all()
        return self


def envelope(kind: str, body: dict[int, Any], seed: bytes) -> bytes:
    """Signs a body; fields that are None are left out."""
    raw = cbor({key: value for key, value in body.items() if value is not None})
    return cbor([raw, [[ed25519_public(seed), sign(seed, kind, raw)]]])


def genesis(wire: bytes, workspace: bytes | None = None) -> Signed:
    found = Signed("genesis", wire)
    need([one["key"] for one in found.founders] == [key for key, _ in found.signatures], "not signed by the founders")
    found.verify_all()
    need(workspace is None or found.hash == workspace, "the genesis of another workspace")
    return found


def agent_id(workspace: bytes, identity_key: bytes) -> bytes:
    return H("agent-id", workspace + identity_key)[:16]


def credential_id(invite_key: bytes) -> bytes:
    return H("credential-id", invite_key)[:16]


def attrs_hash(salt: bytes, tags: list[str]) -> bytes:
    return H("attrs", salt + cbor({0: tags}))


# --- Sections 4 and 7: wrap keys and wraps --------------------------------------------------------


def ml_kem_public(key: bytes) -> MLKEM768PublicKey:
    """Refuses a key that is not canonical (FIPS 203 section 7.2)."""
    need(len(key) == 1184, "an ML-KEM key of a wrong length")
    twelve_bits = int.from_bytes(key[:1152], "little")
    need(all((twelve_bits >> (12 * i)) & 0xFFF < 3329 for i in range(768)), "an ML-KEM key that is not canonical")
    try:
        return MLKEM768PublicKey.from_public_bytes(key)
    except ValueError as error:
        raise Refused("an ML-KEM key that is not usable") from error


def ml_kem_encapsulate(key: bytes, m: bytes | None = None) -> tuple[bytes, bytes]:
    """Secret and ciphertext; `m` fixes the randomness, which kyber-py allows and OpenSSL does not."""
    public = ml_kem_public(key)
    if m is not None:
        return ML_KEM_768._encaps_internal(key, m)
    return public.encapsulate()


class MlKemSecret:
    def __init__(self, seed: bytes) -> None:
        self._key = MLKEM768PrivateKey.from_seed_bytes(seed)
        self.public = self._key.public_key().public_bytes_raw()

    def decapsulate(self, ct: bytes) -> bytes:
        try:
            return self._key.decapsulate(ct)
        except ValueError as error:
            raise Refused("an ML-KEM ciphertext of a wrong length") from error


class WrapKey:
    """96 bytes: X25519 secret, then d and z of ML-KEM."""

    def __init__(self, seed: bytes) -> None:
        self.x25519, self.kem = seed[:32], MlKemSecret(seed[32:])
        self.public = x25519_public(self.x25519) + self.kem.public
        self.hash = wrap_key_hash(self.public)


def wrap_key_hash(public: bytes) -> bytes:
    need(len(public) == 1216, "a wrap key of a wrong length")
    return H("wrap-key", public)


def _wrap_cipher(
    workspace: bytes, epoch: int, recipient: bytes, e_pub: bytes, shared: bytes, kem: bytes, ct: bytes
) -> ChaCha20Poly1305:
    parts = recipient[:32] + e_pub + shared + kem + H("ek", recipient[32:]) + H("ct", ct)
    return ChaCha20Poly1305(H("wrap", workspace + u32(epoch) + parts))


def wrap(secrets: bytes, workspace: bytes, epoch: int, recipient: bytes, e: bytes, m: bytes | None = None) -> bytes:
    """Wraps M || W for whoever holds the secret half of `recipient`."""
    wrap_key_hash(recipient)
    kem, ct = ml_kem_encapsulate(recipient[32:], m)
    e_pub = x25519_public(e)
    cipher = _wrap_cipher(workspace, epoch, recipient, e_pub, x25519(e, recipient[:32]), kem, ct)
    return e_pub + ct + cipher.encrypt(bytes(12), secrets, None)


def unwrap(sealed: bytes, workspace: bytes, epoch: int, key: WrapKey, commit: bytes) -> tuple[bytes, bytes]:
    """M and W, which are those that `commit` commits to."""
    need(len(sealed) == 1200, "a wrap of a wrong length")
    e_pub, ct = sealed[:32], sealed[32:1120]
    shared, kem = x25519(key.x25519, e_pub), key.kem.decapsulate(ct)
    try:
        secrets = _wrap_cipher(workspace, epoch, key.public, e_pub, shared, kem, ct).decrypt(
            bytes(12), sealed[1120:], None
        )
    except InvalidTag as error:
        raise Refused("the wrap does not open") from error
    need(H("epoch", secrets) == commit, "secrets of another epoch")
    return secrets[:32], secrets[32:]


# --- Sections 8 and 25: names and records ---------------------------------------------------------


@dataclass(frozen=True)
class Names:
    """What a name source gives: of an epoch, or of a share."""

    source: bytes

    @property
    def name_key(self) -> bytes:
        return KDF(self.source, "names")

    def tag(self, name: str) -> bytes:
        return KDF(KDF(self.source, "index"), service_name(name))[:16]


@dataclass(frozen=True)
class Share:
    """What takes the place of M and W between a share's guests and exposers."""

    secret: bytes

    @staticmethod
    def of(realm_secret: bytes, share_id: bytes) -> "Share":
        return Share(KDF(realm_secret, b"share " + share_id))

    @property
    def realm_secret(self) -> bytes:
        return KDF(self.secret, "share realm")

    @property
    def names(self) -> Names:
        return Names(KDF(self.secret, "share names"))


def open_service_record(
    names: Names, workspace: bytes, service: bytes, agent: bytes, epoch: int, counter: int, sealed: bytes
) -> tuple[Signed, Signed]:
    """The record and the certificate in it, which somebody has yet to judge by section 13."""
    record = Signed("service-record", unseal(names.name_key, (workspace, service, agent, epoch, counter), sealed))
    certificate = Signed("certificate", record.certificate)
    record.verify_by(certificate.identity_key)
    need(
        (record.workspace_id, record.service_id, record.agent_id, record.epoch, record.counter)
        == (workspace, service, agent, epoch, counter),
        "a record that does not belong here",
    )
    need((certificate.workspace_id, certificate.agent_id) == (workspace, agent), "another agent's certificate")
    return record, certificate


def open_agent_record(
    names: Names, workspace: bytes, agent: bytes, identity: bytes, epoch: int, counter: int, sealed: bytes
) -> Signed:
    record = Signed("agent-record", unseal(names.name_key, (workspace, agent, agent, epoch, counter), sealed))
    record.verify_by(identity)
    need(
        (record.workspace_id, record.agent_id, record.epoch, record.counter) == (workspace, agent, epoch, counter),
        "a record that does not belong here",
    )
    return record


def open_share_record(share: Share, workspace: bytes, share_id: bytes, issuer: bytes, sealed: bytes) -> Signed:
    place = (workspace, share_id, NO_ID, 0, 0)
    record = Signed("share-record", unseal(share.names.name_key, place, sealed)).verify_by(issuer)
    need((record.workspace_id, record.share_id) == (workspace, share_id), "the record of another share")
    return record


# --- Section 9: invites ---------------------------------------------------------------------------


@dataclass(frozen=True)
class HubAddress:
    url: str
    host: str
    port: int
    tls: bool
    pin: bytes | None = None

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    def at(self, path: str) -> str:
        return f"{'wss' if self.tls else 'ws'}://{self.authority}{path}"


def hub_address(line: Any) -> HubAddress:
    """With or without `#sha256=…`."""
    need(type(line) is str and re.fullmatch(r"[!-~]+", line), "characters that are not in an address")
    url, mark, fragment = line.partition("#")
    pin = None
    if mark:
        need(re.fullmatch(r"sha256=[0-9a-f]{64}", fragment), "a malformed pin")
        pin = bytes.fromhex(fragment[7:])
    need(len(url) <= 255 and re.match(r"(https?|wss?)://", url), "not the address of a hub")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise Refused("not the address of a hub") from error
    need(parts.hostname and parts.path in ("", "/") and "?" not in url and "@" not in url, "not the address of a hub")
    tls = parts.scheme in ("https", "wss")
    return HubAddress(url, parts.hostname, port if port is not None else 443 if tls else 80, tls, pin)


def _hub_without_pin(value: Any) -> HubAddress:
    need(type(value) is str and "#" not in value, "a pin inside the address")
    return hub_address(value)


INVITE: Fields = {
    0: ("version", VERSION),
    1: ("hub", _hub_without_pin),
    2: ("pin", Optional(HASH)),
    3: ("workspace_id", HASH),
    4: ("log_seq", uint()),
    5: ("log_head", HASH),
    6: ("tags", Optional(array(tag_name, 0, 16, str.encode))),
    7: ("seed", bstr(32)),
    8: ("share_secret", Optional(bstr(32))),
    9: ("label", Optional(label)),
}


class Invite:
    """A line `pc1…`; fields are attributes."""

    def __init__(self, line: str) -> None:
        line = line.strip()
        need(len(line) <= 1023 and line.startswith("pc1") and line == line.lower(), "not an invite")
        data = [bech32.CHARSET.find(c) for c in line[3:]]
        need(len(data) >= 6 and -1 not in data, "the invite is damaged")
        # `bech32` 1.2 knows BIP-173 alone; the constant is what BIP-350 changes.
        need(bech32.bech32_polymod(bech32.bech32_hrp_expand("pc") + data) == 0x2BC830A3, "the invite is damaged")
        raw = bech32.convertbits(data[:-6], 5, 8, False)
        if raw is None:
            raise Refused("bits left over")
        self.__dict__.update(fields(uncbor(bytes(raw)), INVITE))
        need(self.log_seq != 0 or self.log_head == self.workspace_id, "a head that contradicts itself")
        need((self.label is None) == (self.share_secret is None), "a label, and only for a share")
        self.tags: list[str] = self.__dict__["tags"] or []
        self.signing_seed = KDF(self.seed, "invite signing")
        self.wrap_seed = b"".join(KDF(self.seed, "invite wrap " + part) for part in ("x25519", "d", "z"))
        self.salt = KDF(self.seed, "invite attrs")[:16]

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


# --- Section 4: recovery words --------------------------------------------------------------------


def recovery_seed(words: str, english: list[str]) -> bytes:
    """The entropy behind 24 words of BIP-39."""
    found = words.split()
    need(len(found) == 24 and all(word in english for word in found), "not 24 words of the list")
    bits = 0
    for word in found:
        bits = bits << 11 | english.index(word)
    seed = (bits >> 8).to_bytes(32, "big")
    need(hashlib.sha256(seed).digest()[0] == bits & 0xFF, "the words do not belong together")
    return seed


# --- Section 16: check reports --------------------------------------------------------------------

REPORT: Fields = {
    0: ("version", VERSION),
    1: ("outcome", uint(0, 4)),
    2: ("addresses", Optional(uint())),
    3: ("resolved_in", Optional(uint())),
    4: ("connected_in", Optional(uint())),
    5: ("protocol", text(r"[a-z0-9-]{1,24}")),
    6: ("detail", Optional(plain_text)),
    7: ("warning", Optional(plain_text)),
    8: (
        "tls",
        Optional(
            mapping(
                {
                    1: ("version", plain_text),
                    2: ("names", array(plain_text, 0, 8)),
                    3: ("valid_from", Optional(uint())),
                    4: ("valid_until", Optional(uint())),
                    5: ("for_the_name", Optional(boolean)),
                    6: ("trusted", Optional(boolean)),
                }
            )
        ),
    ),
}


def check_report(data: bytes) -> dict[str, Any]:
    need(len(data) <= 4096, "a report that is too long")
    found = fields(uncbor(data), REPORT)
    need((found["addresses"] is None) == (found["resolved_in"] is None), "both or none")
    need((found["connected_in"] is not None) == (found["outcome"] == 0), "the time of a connection")
    return found
