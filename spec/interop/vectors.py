"""Holds this implementation against `spec/vectors/*.json`: every case is judged, none is skipped."""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any, Callable

from mnemonic import Mnemonic

import records
from handshake import Claims, Initiator, Keys, Prologue, Responder
from machine import Ended, Player
from objects import (
    Invite,
    Names,
    Share,
    Signed,
    WrapKey,
    attrs_hash,
    check_report,
    genesis,
    hub_address,
    open_agent_record,
    open_service_record,
    open_share_record,
    recovery_seed,
    unwrap,
    wrap,
    wrap_key_hash,
)
from trust import Entry, Log, judge
from wire import (
    KDF,
    H,
    Refused,
    blob,
    ed25519_public,
    need,
    seal,
    signed_text,
    unblob,
    verify,
    x25519_public,
)

Case = dict[str, Any]
# When the handshakes take place.
WHEN = 1_800_000_000
HERE = Path(__file__).resolve().parent
ENGLISH = Mnemonic("english").wordlist
FIELDS_OF_INVITE = ("log_head", "log_seq", "pin", "seed", "tags", "workspace_id", "label", "share_secret")


class Disagrees(Exception):
    """An output is not the one in the vectors."""


def equal(got: Any, wanted: Any, what: str = "output") -> None:
    if isinstance(got, bytes):
        got = got.hex()
    if got != wanted:
        raise Disagrees(f"{what}: {str(got)[:90]} in place of {str(wanted)[:90]}")


def raw(text: str | None) -> bytes | None:
    return None if text is None else bytes.fromhex(text)


def hashes(case: Case, _: Case) -> None:
    data = bytes.fromhex(case["input"])
    equal(H(case["label"], data) if "label" in case else signed_text(case["kind"], data), case["output"])


def keys(case: Case, _: Case) -> None:
    if "words" in case:
        seed = recovery_seed(case["words"], ENGLISH)
        equal(seed, case["seed"])
        equal(ed25519_public(seed), case["public"])
    elif "signature" in case:
        public, body, signature = (bytes.fromhex(case[name]) for name in ("public", "body", "signature"))
        verify(public, case["kind"], body, signature)
    elif "invite_seed" in case:
        seed = bytes.fromhex(case["invite_seed"])
        equal(KDF(seed, "invite signing"), case["signing_seed"])
        parts = [KDF(seed, "invite wrap " + part) for part in ("x25519", "d", "z")]
        equal(b"".join(parts), case["wrap_seed"])
    elif "secret" in case:
        equal(x25519_public(bytes.fromhex(case["secret"])), case["public"])
    elif "hash" in case:
        key = WrapKey(bytes.fromhex(case["seed"]))
        equal(key.public, case["public"])
        equal(key.hash, case["hash"])
    elif "seed" in case:
        equal(ed25519_public(bytes.fromhex(case["seed"])), case["public"])
    else:
        wrap_key_hash(bytes.fromhex(case["public"]))


def signed(case: Case) -> None:
    found = Signed(case["kind"], bytes.fromhex(case["wire"]))
    found.verify_by(bytes.fromhex(case["signer"]))
    if case["kind"] == "genesis":
        genesis(found.wire)
    if "body" in case:
        equal(found.body, case["body"])
        equal(found.hash, case["hash"])


def objects(case: Case, _: Case) -> None:
    signed(case)


def judged(log: Log, case: Case) -> None:
    expected = bytes.fromhex(case["expected"])
    wires = (bytes.fromhex(case["certificate"]), raw(case["credential"]), bytes.fromhex(case["noise_key"]))
    judge(log.view(), *wires, expected, case["now"])


def empty_log(given: Case) -> Log:
    return Log(bytes.fromhex(given["genesis"]), bytes.fromhex(given["workspace_id"]))


def trust(case: Case, given: Case) -> None:
    judged(empty_log(given), case)


def log(case: Case, given: Case) -> None:
    if "wire" in case:
        return signed(case)
    if "entry" in case:
        entry = Entry(bytes.fromhex(case["entry"]))
        equal([entry.hash.hex(), entry.prev.hex(), entry.seq], [case["hash"], case["prev"], case["seq"]])
        return None
    found = empty_log(given)
    last = len(case["entries"]) - 1
    for at, wire in enumerate(case["entries"]):
        try:
            found.take(bytes.fromhex(wire))
        except Refused as refused:
            if at != last or "branch" in case or "certificate" in case:
                raise Disagrees(f"entry {at + 1} of the log is refused: {refused}") from refused
            raise
    if "branch" in case:
        outcome = found.show(case["after"], [bytes.fromhex(wire) for wire in case["branch"]])
        if "outcome" in case:
            equal(outcome, case["outcome"], "outcome")
    if "certificate" in case:
        judged(found, case)
    if "state" in case:
        view, wanted = found.view(), case["state"]
        said = {
            "closed": sorted(one.hex() for one in view.ended.closed),
            "epoch": view.epoch,
            "forked": view.forked,
            "frozen": view.frozen,
            "head": view.head[1].hex(),
            "recovery_counter": view.recovery_counter,
            "recovery_key": view.recovery_key.hex(),
            "revoked": sorted(one.hex() for one in view.ended.revoked),
            "seq": view.head[0],
            "signers": [{"key": key.hex(), "role": view.signers[key]} for key in sorted(view.signers)],
            "strict": view.strict,
        }
        for name in sorted(wanted.keys() | said.keys()):
            equal(said.get(name), wanted.get(name), name)
    return None


def invites(case: Case, _: Case) -> None:
    if "hub_address" in case:
        hub_address(case["hub_address"])
        return
    found = Invite(case["invite"])
    if "hub_url" in case:
        equal(found.hub.url, case["hub_url"])
    for name in FIELDS_OF_INVITE:
        if name in case:
            equal(getattr(found, name), case[name], name)
    if "attrs" in case:
        equal(attrs_hash(found.salt, found.tags), case["attrs"])


def place_of(case: Case) -> tuple[bytes, bytes, bytes, int, int]:
    ids = (bytes.fromhex(case[name]) for name in ("workspace_id", "object_id", "agent_id"))
    return (*ids, case["epoch"], case["counter"])  # type: ignore[return-value]


def names(case: Case, given: Case) -> None:
    source = Names(bytes.fromhex(given["name_source"]))
    equal(source.name_key, given["name_key"])
    equal(KDF(source.source, "index"), given["index_key"])
    if "service_name" in case:
        tag = source.tag(case["service_name"])
        equal(tag, case.get("tag"))
        return
    place, sealed = place_of(case), bytes.fromhex(case["sealed"])
    if case["kind"] == "service-record":
        record, certificate = open_service_record(source, *place, sealed)
        need(certificate.identity_key.hex() == given["identity"], "another identity")
    else:
        workspace, _, agent, epoch, counter = place
        record = open_agent_record(source, workspace, agent, bytes.fromhex(given["identity"]), epoch, counter, sealed)
    equal(record.wire, case["object"])
    equal(seal(source.name_key, place, record.wire, sealed[:24]), case["sealed"], "sealed again")


def shares(case: Case, given: Case) -> None:
    share = Share.of(bytes.fromhex(given["realm_secret"]), bytes.fromhex(given["share_id"]))
    equal(share.secret, given["share_secret"])
    equal(share.realm_secret, given["share_realm_secret"])
    equal(share.names.source, given["share_name_source"])
    if "service_name" in case:
        equal(share.names.tag(case["service_name"]), case["tag"])
        return
    ids = (bytes.fromhex(case["workspace_id"]), bytes.fromhex(case["share_id"]), bytes.fromhex(given["issuer"]))
    record = open_share_record(share, *ids, bytes.fromhex(case["sealed"]))
    equal(record.wire, case["object"])


def epochs(case: Case, given: Case) -> None:
    secrets = bytes.fromhex(given["realm_secret"] + given["name_source"])
    if "wrap_key" in case:
        wrap(secrets, bytes(32), 0, bytes.fromhex(case["wrap_key"]), bytes([1]) * 32)
        return
    key, workspace = WrapKey(bytes.fromhex(case["wrap_seed"])), bytes.fromhex(case["workspace_id"])
    opened = unwrap(bytes.fromhex(case["sealed"]), workspace, case["epoch"], key, bytes.fromhex(case["commit"]))
    equal(b"".join(opened), secrets.hex())
    if case["valid"]:
        equal(H("epoch", secrets), case["commit"])
        e, m = bytes.fromhex(case["ephemeral_secret"]), bytes.fromhex(case["ml_kem_m"])
        equal(wrap(secrets, workspace, case["epoch"], key.public, e, m), case["sealed"], "wrapped again")


def prologues(case: Case, _: Case) -> None:
    ids = ("tunnel_id", "service_id", "initiator", "responder", "share_id", "channel_id", "previous_hash")
    made = Prologue(
        workspace=bytes.fromhex(case["workspace_id"]),
        **{name: bytes.fromhex(case[name]) for name in ids},  # type: ignore[arg-type]
        **{name: case[name] for name in ("tunnel_no", "realm", "encoding", "rekey")},
    )
    equal(made.encode(), case["encoded"])


def packets(case: Case, _: Case) -> None:
    data = unblob(case["text"])
    equal(data, case.get("record"))
    equal(blob(data), case["text"])


def checks(case: Case, _: Case) -> None:
    check_report(bytes.fromhex(case["report"]))


def plain_records(case: Case, _: Case) -> None:
    wire = bytes.fromhex(case["record"])
    equal(records.decode(wire).encode(), case["record"], "encoded again")


def channels(case: Case, _: Case) -> None:
    player, code = Player(case["side"]), None
    try:
        asyncio.run(player.play(case["steps"]))
    except Ended as ended:
        code = ended.args[0]
    if code is not None:
        equal(code, case.get("code"), "the code")
        raise Refused(f"the channel ends with {code}")
    if case["valid"]:
        if case["greeting"] is not None:
            equal(player.greeting, case["greeting"], "the greeting")
        for name, seen in (("got", player.got), ("sends", player.sends)):
            equal([seen[number] for number in sorted(seen)], case[name], name)


# --- handshake.json -------------------------------------------------------------------------------


class RawPrologue:
    """A prologue of the vectors, as bytes."""

    def __init__(self, encoded: bytes) -> None:
        self._encoded, self.realm = encoded, encoded[188]

    def encode(self) -> bytes:
        return self._encoded


class Run:
    """One handshake between the two agents given, with all randomness fixed."""

    def __init__(self, given: Case, case: Case) -> None:
        self.given = given
        self.fixed = {**given, **{name: case[name] for name in case if name in given}}
        self.prologue = bytes.fromhex(self.fixed["prologue"])
        self.secret = bytes.fromhex(given["realm_secret"])

    def side(self, name: str) -> tuple[bytes, Claims]:
        side = self.given[name]
        wires = (bytes.fromhex(side["certificate"]), raw(side.get("credential")), bytes.fromhex(side["noise_key"]))
        attrs = (bytes.fromhex(side["attrs_salt"]), side["attrs_tags"])
        head = (self.given["log_seq"], bytes.fromhex(self.given["log_head"]))
        return bytes.fromhex(side["static_secret"]), Claims(*wires, *attrs, *head)

    def initiator(self, prologue: bytes | None = None) -> Initiator:
        _, static = self.side("responder")[1], Signed("noise-key", self.side("responder")[1].noise_key).static_key
        e, seed = (bytes.fromhex(self.fixed[f"initiator_{name}"]) for name in ("ephemeral_secret", "ml_kem_seed"))
        return Initiator(self.side("initiator")[0], static, RawPrologue(prologue or self.prologue), e, seed)  # type: ignore[arg-type]

    def responder(self, prologue: bytes | None = None, static: bytes | None = None) -> Responder:
        e, m = (bytes.fromhex(self.fixed[f"responder_{name}"]) for name in ("ephemeral_secret", "ml_kem_m"))
        return Responder(static or self.side("responder")[0], RawPrologue(prologue or self.prologue), e, m)  # type: ignore[arg-type]

    def judge(self, name: str, said: Claims, static: bytes) -> None:
        """Steps 1 to 7 of section 13, of what a side said of itself."""
        view = Log(bytes.fromhex(self.given["genesis"]), bytes.fromhex(self.given["workspace_id"])).view()
        expected = bytes.fromhex(self.given[name]["agent_id"])
        peer = judge(view, said.certificate, said.credential, said.noise_key, expected, WHEN)
        need(peer.noise_key.static_key == static, "another static key")
        need(attrs_hash(said.salt, said.tags) == peer.certificate.attrs, "other tags")

    def whole(self) -> tuple[Initiator, bytes, Responder, bytes, Keys, Keys]:
        one, two = self.initiator(), self.responder()
        message1 = one.message1(self.side("initiator")[1])
        read = two.message1(message1)
        need(two.remote_static() == Signed("noise-key", read.noise_key).static_key, "another static key")
        message2, of_two = two.message2(self.side("responder")[1], self.secret)
        _, of_one = one.message2(message2, self.secret)
        return one, message1, two, message2, of_one, of_two


def changed(case: Case, message: bytes) -> bytes:
    if "replaced_by" in case:
        return bytes.fromhex(case["replaced_by"])
    if "position" in case:
        at = case["position"]
        return message[:at] + bytes([message[at] ^ 1]) + message[at + 1 :]
    return message[: case.get("length", len(message))] + bytes.fromhex(case.get("append", ""))


def handshakes(case: Case, given: Case, cases: list[Case]) -> None:
    if case["valid"]:
        run = Run(given, case)
        one, message1, two, message2, of_one, of_two = run.whole()
        for got, name in ((message1, "message1"), (message2, "message2"), (one.psk, "psk"), (two.psk, "psk")):
            equal(got, case[name], name)
        equal(one.kem_secret, case["ml_kem_secret"])
        equal(two.kem_secret, case["ml_kem_secret"])
        for side in (of_one, of_two):
            equal(side.hash, case["handshake_hash"])
        for side, other, name in ((of_one, of_two, "initiator"), (of_two, of_one, "responder")):
            for plain, sealed in zip(case.get(name + "_plaintexts", []), case.get(name + "_records", []), strict=True):
                equal(side.seal(bytes.fromhex(plain)), sealed, "record")
                equal(other.open(bytes.fromhex(sealed)), plain, "record")
        return
    of_rekey = case["name"].startswith("rekey")
    valid = [one for one in cases if one["valid"]][1 if of_rekey else 0]
    if "of" in case:
        valid = next(one for one in cases if one["name"] == case["of"])
    run = Run(given, valid)
    one, message1, _, message2, _, of_two = run.whole()
    if "record" in case:
        for sealed in valid["initiator_records"][: case["opened_before"]]:
            of_two.open(bytes.fromhex(sealed))
        of_two.open(bytes.fromhex(case["record"]))
        return
    prologue = raw(case.get("prologue"))
    if case["message"] == 1:
        answering = run.responder(prologue, raw(case.get("static_secret")))
        run.judge("initiator", answering.message1(changed(case, message1)), answering.remote_static())
    else:
        reader = run.initiator(prologue)
        reader.message1(run.side("initiator")[1])
        said, _ = reader.message2(changed(case, message2), run.secret)
        run.judge("responder", said, Signed("noise-key", run.side("responder")[1].noise_key).static_key)


JUDGES: dict[str, Callable[..., None]] = {
    "channels.json": channels,
    "checks.json": checks,
    "epochs.json": epochs,
    "handshake.json": handshakes,
    "hashes.json": hashes,
    "invites.json": invites,
    "keys.json": keys,
    "log.json": log,
    "names.json": names,
    "objects.json": objects,
    "packets.json": packets,
    "prologues.json": prologues,
    "records.json": plain_records,
    "shares.json": shares,
    "trust.json": trust,
}


def check_all(directory: Path, verbose: bool = True) -> int:
    """Judges every case; gives how many disagree. Prints a line for each file.

    With INTEROP_REASONS=1 also why each case was refused, beside the reason in the vectors.
    """
    wrong = 0
    for path in sorted(directory.glob("*.json")):
        file = json.loads(path.read_text())
        counts: Counter[str] = Counter()
        judge_case = JUDGES.get(path.name)
        for case in file["cases"]:
            if judge_case is None:
                counts["skipped: no judge for this file"] += 1
                wrong += 1
                continue
            extra = (file["cases"],) if judge_case is handshakes else ()
            try:
                judge_case(case, file["given"], *extra)
                verdict = None if case["valid"] else "accepted"
            except Refused as refused:
                verdict = f"refused: {refused}" if case["valid"] else None
                if verdict is None and "INTEROP_REASONS" in os.environ:
                    print(f"  {case['name']:60} | {case['reason']:60} | {refused}")
            except Disagrees as disagrees:
                verdict = str(disagrees)
            if verdict is None:
                counts["accepted, outputs equal" if case["valid"] else "refused"] += 1
            else:
                wrong += 1
                counts["DISAGREE"] += 1
                print(f"  {path.name}: {case['name']}: {verdict}")
        if verbose:
            said = ", ".join(f"{number} {what}" for what, number in sorted(counts.items()))
            print(f"{path.name:16} {len(file['cases']):4} cases: {said}")
    return wrong


if __name__ == "__main__":
    raise SystemExit(1 if check_all(HERE.parent / "vectors") else 0)
