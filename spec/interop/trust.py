"""The trust log, what it says, and the judgement of a peer by it (PROTOCOL.md sections 13, 19 and 20)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Sequence

from objects import ADMIN, DAY, GUEST, OWNER, Signed, agent_id, genesis
from wire import Refused, need

ENDS = ("remove_signer", "revoke_agent", "close_credential")
MOST_ENTRIES, MOST_BYTES, MOST_BRANCHES = 100_000, 64 << 20, 8
Head = tuple[int, bytes]


class Entry:
    """An entry or a recovery as it travels: `kind u8 || envelope`."""

    def __init__(self, wire: bytes) -> None:
        need(wire and wire[0] in (1, 2), "an entry of an unknown wire kind")
        self.wire, self.recovery = wire, wire[0] == 2
        self.signed = Signed("recovery" if self.recovery else "entry", wire[1:])
        self.hash = self.signed.hash
        self.seq: int = self.signed.base_seq + 1 if self.recovery else self.signed.seq
        self.prev: bytes = self.signed.base_hash if self.recovery else self.signed.prev
        self.keys = [key for key, _ in self.signed.signatures]
        self.abandons: list[bytes] = [] if self.recovery else self.signed.abandons or []


@dataclass
class Ended:
    """What nothing takes back: revocations and closures."""

    revoked: frozenset[bytes] = frozenset()
    below: dict[bytes, int] = field(default_factory=dict)
    closed: dict[bytes, frozenset[bytes]] = field(default_factory=dict)

    def and_also(self, other: "Ended") -> "Ended":
        """All of both: the higher serial, and of certificates what every closure keeps."""
        below, closed = dict(self.below), dict(self.closed)
        for agent, serial in other.below.items():
            below[agent] = max(serial, below.get(agent, 0))
        for credential, keep in other.closed.items():
            closed[credential] = closed[credential] & keep if credential in closed else keep
        return Ended(self.revoked | other.revoked, below, closed)


@dataclass
class State:
    """What the log says at one place of one branch, or (`Log.view`) of all branches together."""

    workspace: bytes
    head: Head
    signers: dict[bytes, int]
    removed: dict[bytes, frozenset[bytes]]
    ended: Ended
    epoch: int
    commits: dict[int, bytes]
    strict: bool
    recovery_key: bytes
    recovery_counter: int
    frozen: bool
    size: int = 0
    forked: bool = False

    def take(self, entry: Entry) -> "State":
        """The state after one more entry (*Taking an entry*)."""
        signed = entry.signed
        need(signed.workspace_id == self.workspace, "an entry of another workspace")
        need((entry.seq - 1, entry.prev) == self.head, "the entry does not follow")
        size = self.size + len(signed.body)
        need(entry.seq < MOST_ENTRIES and size <= MOST_BYTES, "the log is full")
        signed.verify_all()
        after = replace(
            self,
            head=(entry.seq, entry.hash),
            size=size,
            signers=dict(self.signers),
            removed=dict(self.removed),
            commits=dict(self.commits),
        )
        if entry.recovery:
            need(entry.keys == [self.recovery_key], "a recovery by another key")
            need(signed.counter > self.recovery_counter, "a recovery that is not above the last")
            after._recover(signed)
        else:
            after._change(self, entry)
        return after

    def _recover(self, signed: Signed) -> None:
        named = {one["key"]: one["role"] for one in signed.signers}
        for key in self.signers:
            self.removed[key] = frozenset(signed.keep)
        for key in named:
            self.removed.pop(key, None)
        self.signers = named
        self.recovery_key, self.recovery_counter = signed.recovery_key, signed.counter

    def _change(self, before: "State", entry: Entry) -> None:
        changes: list[dict[str, Any]] = entry.signed.changes
        known = [key for key in entry.keys if key in before.signers]
        # After a critical change that is unknown there may be signers that are not known.
        need(known and (before.frozen or known == entry.keys), "an entry by somebody who is no signer")
        by_owners = all(before.signers[key] == OWNER for key in known)
        if not before.frozen:
            need(by_owners or not entry.abandons, "only owners give up branches")
            self.frozen = any(change["do"] == "unknown" for change in changes)
        for change in changes:
            # The entry that freezes is judged by who may make its changes; those after it by nothing more.
            at = before if self.frozen else self
            need(by_owners or before.frozen or not at.is_for_owners(change), "only owners may do that")
            if not self.frozen:
                self._check(change)
            if not self.frozen or change["do"] in ENDS:
                self._apply(change)
        need(self.frozen or OWNER in self.signers.values(), "no owner is left")

    def is_for_owners(self, change: dict[str, Any]) -> bool:
        owners = [agent_id(self.workspace, key) for key, role in self.signers.items() if role == OWNER]
        return change["do"] in ("add_signer", "remove_signer", "policy") or change.get("agent_id") in owners

    def _check(self, change: dict[str, Any]) -> None:
        """What else a change needs, at its place in the entry."""
        if change["do"] == "remove_signer":
            need(change["key"] in self.signers, "it removes somebody who is no signer")
        elif change["do"] == "add_signer":
            need(agent_id(self.workspace, change["key"]) not in self.ended.revoked, "it names a revoked agent")
            need(len(self.signers | {change["key"]: 0}) <= 64, "too many signers")
        elif change["do"] == "epoch_key":
            need(change["epoch"] == self.epoch + 1, "an epoch that is not the next")

    def _apply(self, change: dict[str, Any]) -> None:
        do = change["do"]
        if do == "revoke_agent" and change["below_serial"] is not None:
            self.ended = self.ended.and_also(Ended(below={change["agent_id"]: change["below_serial"]}))
        elif do == "revoke_agent":
            self.ended = self.ended.and_also(Ended(revoked=frozenset([change["agent_id"]])))
            for key in list(self.signers):
                if agent_id(self.workspace, key) == change["agent_id"]:
                    del self.signers[key]
                    self.removed[key] = frozenset()
        elif do == "close_credential":
            self.ended = self.ended.and_also(Ended(closed={change["credential_id"]: frozenset(change["keep"])}))
        elif do == "remove_signer":
            if self.signers.pop(change["key"], None) is not None:
                self.removed[change["key"]] = frozenset(change["keep"])
        elif do == "add_signer":
            self.signers[change["key"]] = change["role"]
            self.removed.pop(change["key"], None)
        elif do == "epoch_key":
            self.epoch += 1
            self.commits[self.epoch] = change["commit"]
        elif do == "policy":
            self.strict = change["strict"]

    def vouches(self, key: bytes, object_hash: bytes) -> bool:
        return key in self.signers or object_hash in self.removed.get(key, frozenset())


@dataclass
class Branch:
    """Entries that leave the log after entry `after`; `states` begins with the one they leave from."""

    after: int
    entries: list[Entry]
    states: list[State]

    @property
    def parting(self) -> State:
        return self.states[0]

    def ended(self) -> Ended:
        return self.states[-1].ended


class Log:
    """The own branch, those of others that are known, and what all of them say."""

    def __init__(self, genesis_wire: bytes, workspace: bytes) -> None:
        first = genesis(genesis_wire, workspace)
        self.entries: list[Entry] = []
        self.states = [
            State(
                workspace=workspace,
                head=(0, workspace),
                signers={one["key"]: one["role"] for one in first.founders},
                removed={},
                ended=Ended(),
                epoch=0,
                commits={0: first.epoch_commit},
                strict=False,
                recovery_key=first.recovery_key,
                recovery_counter=0,
                frozen=False,
            )
        ]
        self.branches: list[Branch] = []
        self.ended_elsewhere = Ended()

    @property
    def head(self) -> Head:
        return self.states[-1].head

    def has(self, head: Head) -> bool:
        return any(state.head == head for state in self.states) or any(
            branch.states[-1].head == head for branch in self.branches
        )

    def take(self, wire: bytes) -> None:
        """One more entry of the own branch."""
        entry = Entry(wire)
        self.states.append(self.states[-1].take(entry))
        self.entries.append(entry)

    def after(self, places: Sequence[Head]) -> tuple[Head, list[Entry]]:
        """The entries that follow the newest of `places` that this log has, or the genesis."""
        seqs = [seq for seq, place in places if seq < len(self.states) and self.states[seq].head == (seq, place)]
        at = max(seqs, default=0)
        return self.states[at].head, self.entries[at:]

    def locator(self) -> list[Head]:
        """Section 20: the own head and the entries 1, 2, 4, 8 … before it, without the genesis."""
        backs = [0] + [1 << power for power in range(19)]
        return [self.states[self.head[0] - back].head for back in backs if back < self.head[0]]

    def own_tail(self, after: int) -> Branch:
        return Branch(after, self.entries[after:], self.states[after:])

    def show(self, after: int, wires: Sequence[bytes]) -> str:
        """A branch of somebody else: what becomes of it (*Forks*, *Giving up*, *Recovery*).

        `settled`: it changes nothing. `replaces`: the own branch changed over to it. `forked`: it is kept, and
        heeded; if the own branch gave it up, its revocations and closures alone are.
        """
        entries = [Entry(wire) for wire in wires]
        need(entries and after < len(self.entries), "no branch")
        need(entries[0].hash != self.entries[after].hash, "the branch does not leave the log here")
        states = [self.states[after]]
        for entry in entries:
            states.append(states[-1].take(entry))
        other, own = Branch(after, entries, states), self.own_tail(after)
        if states[-1].recovery_counter > self.states[-1].recovery_counter:
            self._change_over(other, own)
            return "replaces"
        if any(entry.recovery for entry in own.entries):
            return "settled"
        others = [branch for branch in self.branches if branch.entries[0].hash != entries[0].hash]
        wins = _gives_up(other, own, others)
        if wins and _gives_up(own, other, others):
            wins = other.entries[0].hash < own.entries[0].hash
        if wins:
            self._change_over(other, own)
            return "replaces"
        need(len(others) < MOST_BRANCHES, "too many branches")
        self.branches = others + [other]
        return "forked"

    def forks(self) -> list[Branch]:
        """The branches that the own one did not give up."""
        return [
            branch
            for branch in self.branches
            if not _gives_up(self.own_tail(branch.after), branch, [one for one in self.branches if one is not branch])
        ]

    def _change_over(self, to: Branch, own: Branch) -> None:
        self.ended_elsewhere = self.ended_elsewhere.and_also(own.ended())
        self.entries[to.after :] = to.entries
        self.states[to.after :] = to.states
        self.branches = [branch for branch in self.branches if branch.after < to.after]
        if any(entry.recovery for entry in to.entries):
            self.branches = []

    def view(self) -> State:
        """What all known branches say together."""
        said = replace(self.states[-1], forked=bool(self.forks()))
        said.ended = said.ended.and_also(self.ended_elsewhere)
        said.signers, said.removed = dict(said.signers), dict(said.removed)
        for branch in self.branches:
            said.ended = said.ended.and_also(branch.ended())
        for branch in self.forks():
            said.strict = said.strict or branch.states[-1].strict
            along = self.own_tail(branch.after).states + branch.states
            for key, keep in branch.states[-1].removed.items():
                said.removed[key] = said.removed[key] & keep if key in said.removed else keep
            for key in list(said.signers):
                roles = [state.signers.get(key) for state in along]
                if None in roles:
                    del said.signers[key]
                else:
                    said.signers[key] = max(role for role in roles if role is not None)
        return said


assert OWNER < ADMIN  # `max` above takes the lower role


def _gives_up(stays: Branch, goes: Branch, others: Sequence[Branch]) -> bool:
    """Whether an entry of `stays` gives `goes` up, and counts."""

    def counts(key: bytes) -> bool:
        owner = all(state.signers.get(key) == OWNER for state in goes.states)
        elsewhere = all(state.signers.get(key) == OWNER for branch in others for state in branch.states)
        return owner and elsewhere and not (key in stays.entries[0].keys and key in goes.entries[0].keys)

    return any(
        goes.entries[0].hash in entry.abandons and not state.frozen and all(counts(key) for key in entry.keys)
        for entry, state in zip(stays.entries, stays.states[1:])
    )


# --- Section 13: verifying a peer -----------------------------------------------------------------


@dataclass
class Peer:
    """Who passed."""

    certificate: Signed
    credential: Signed | None
    noise_key: Signed

    @property
    def agent_id(self) -> bytes:
        return self.certificate.agent_id


def judge(
    state: State,
    certificate_wire: bytes,
    credential_wire: bytes | None,
    noise_key_wire: bytes,
    expected: bytes,
    now: int,
) -> Peer:
    """Steps 1 to 5 and 7; the rest needs a handshake."""
    certificate = Signed("certificate", certificate_wire)
    credential = None if credential_wire is None else Signed("credential", credential_wire)
    noise_key = Signed("noise-key", noise_key_wire)
    need(all(one.workspace_id == state.workspace for one in (certificate, noise_key)), "of another workspace")
    need(certificate.agent_id == expected, "another agent than was named")
    need(noise_key.agent_id == certificate.agent_id, "the NoiseKey of another agent")
    noise_key.verify_by(certificate.identity_key)
    peer = Peer(certificate, credential, noise_key)
    judge_again(state, peer, now)
    return peer


def judge_again(state: State, peer: Peer, now: int) -> None:
    """Steps 4, 5 and 7."""
    certificate, credential = peer.certificate, peer.credential
    if certificate.issuer_kind == 0:
        need(credential is None, "a credential beside a signer's certificate")
        need(state.vouches(certificate.issuer, certificate.hash), "the certificate's issuer is unknown")
        certificate.verify_by(certificate.issuer)
        need(certificate.role != GUEST and certificate.services is None, "a guest without a share")
    else:
        if credential is None or credential.hash != certificate.issuer:
            raise Refused("the certificate's issuer is unknown")
        need(credential.workspace_id == state.workspace, "a credential of another workspace")
        need(state.vouches(credential.issuer, credential.hash), "the credential's issuer is unknown")
        credential.verify_by(credential.issuer)
        certificate.verify_by(credential.invite_key)
        granted = (credential.role, credential.attrs, credential.services)
        need((certificate.role, certificate.attrs, certificate.services) == granted, "more than the credential grants")
        closed = state.ended.closed.get(credential.credential_id)
        need(closed is None or certificate.hash in closed, "admitted by a closed credential")
        if credential.share or closed is None:
            grace = 0 if credential.share else DAY
            need(now <= credential.certs_end + grace, "the certificate has expired")
    need(certificate.agent_id not in state.ended.revoked, "the agent was revoked")
    need(certificate.serial >= state.ended.below.get(certificate.agent_id, 0), "the certificate was revoked")
    need(certificate.not_after is None or now <= certificate.not_after + DAY, "the certificate has expired")
