//! Vectors of the trust log: encodings, whole logs, forks, and peers judged at a head.

use connect_crypto::keys::SigningKey;
use connect_spec::{
    cbor::FieldsWriter,
    ids::{AgentId, CredentialId, WorkspaceId},
    log::{Beat, Change, Entry, EntryHash, Head, LogEntry, ObjectHash, Policy, Recovery},
    objects::{Certificate, Credential, CredentialKind, Founder, Issuer, SignerRole, UnixTime},
    signed::{Body, ObjectError, Signed},
    trust::{Considered, LogError, TrustState},
};
use serde_json::{Value, json};

use super::{File, envelope, hex, judge, merged, object, refused_object, sign};
use crate::common::{
    Admission, Agent, DAY, NOW, World, bytes,
    log::{Log, add, key, remove, revoke, sign_by, sorted},
};

const OWNER: SignerRole = SignerRole::Owner;
const ADMIN: SignerRole = SignerRole::Admin;
const CRITICAL: Change = Change::Unknown(127);
const OPTIONAL: Change = Change::Unknown(128);

pub(super) fn log() -> File {
    let world = World::new();
    let mut file = File::new(
        "log",
        "The trust log. Cases with `wire`: a signed object of `kind`, as in objects.json. With `entry`: \
         an entry as it travels. With `entries`: a log that follows the genesis; where the case is \
         invalid, only its last entry does not hold, unless there is more. With `branch`: those entries \
         leave the log after entry `after`, and `outcome` is what becomes of it: `settled`, `forked` or \
         `replaces`. With `certificate`: a peer judged by the log, after the branch if there is one. \
         `state` is what the log says then: signers with their roles, agents of which no certificate \
         counts, closed credentials",
    )
    .given(json!({
        "workspace_id": hex(world.workspace.0),
        "genesis": hex(world.genesis.encode()),
    }));
    encodings(&mut file, &world);
    logs(&mut file, &world);
    forks(&mut file, &world);
    peers(&mut file, &world);
    file
}

/// The fields of an entry, to be written in ways that no program does.
fn raw_entry(log: &Log, changes: Vec<FieldsWriter>) -> FieldsWriter {
    let entry = log.next(vec![OPTIONAL]);
    FieldsWriter::new()
        .uint(0, 1u8)
        .bytes(1, &entry.workspace_id.0)
        .uint(2, entry.seq)
        .bytes(3, &entry.prev.0)
        .uint(4, entry.time)
        .maps(5, changes.into_iter())
}

fn encodings(file: &mut File, world: &World) {
    let log = Log::new(world);
    let owner = &world.signer;
    let hash = |number: u8| [number; 32];
    let kept = vec![ObjectHash(hash(1)), ObjectHash(hash(2))];
    let entry = Entry {
        abandons: vec![EntryHash(hash(3)), EntryHash(hash(4))],
        ..log.next(vec![
            add(&key("admin"), ADMIN),
            remove(&key("second"), kept.clone()),
            revoke(AgentId(bytes("agent"))),
            Change::RevokeAgent { agent_id: AgentId(bytes("other")), below_serial: Some(2) },
            Change::CloseCredential { credential_id: CredentialId([5; 16]), keep: kept.clone() },
            Change::EpochKey { epoch: 1, commit: hash(6) },
            Change::Policy(Policy { strict: true }),
        ])
    };
    object(file, "entry", owner, &entry);
    let recovery_key = world.recovery_signer();
    let recovery = Recovery { keep: kept.clone(), ..log.recovery(world, 1, &[owner, &key("b")]) };
    object(file, "recovery", &recovery_key, &recovery);
    let witness = key("witness");
    let beat = Beat {
        workspace_id: world.workspace,
        agent_id: AgentId::of(&world.workspace, &witness.public()),
        head: world.head(),
        time: NOW,
    };
    object(file, "beat", &witness, &beat);

    let mut refuse = |name: &str, entry: Entry| refused_object(file, name, owner, &entry);
    refuse("seq 0", Entry { seq: 0, ..entry.clone() });
    refuse("no changes", log.next(vec![]));
    refuse("17 changes", log.next(vec![OPTIONAL; 17]));
    let abandons = |numbers: &[u8]| Entry {
        abandons: numbers.iter().map(|number| EntryHash(hash(*number))).collect(),
        ..log.next(vec![OPTIONAL])
    };
    refuse("abandons out of order", abandons(&[4, 3]));
    refuse("the same branch abandoned twice", abandons(&[3, 3]));
    refuse("17 branches abandoned", abandons(&(0..17).collect::<Vec<_>>()));
    for (name, keep) in [
        ("out of order", vec![ObjectHash(hash(2)), ObjectHash(hash(1))]),
        ("with the same hash twice", vec![ObjectHash(hash(1)); 2]),
    ] {
        let key = key("second").public();
        let removal = Change::RemoveSigner { key, keep: keep.clone() };
        refuse(&format!("removal that keeps a list {name}"), log.next(vec![removal]));
        let credential_id = CredentialId([5; 16]);
        let closure = Change::CloseCredential { credential_id, keep: keep.clone() };
        refuse(&format!("closure that keeps a list {name}"), log.next(vec![closure]));
    }

    let mut refuse = |name: &str, recovery: Recovery| {
        refused_object(file, name, &recovery_key, &recovery);
    };
    refuse("counter 0", Recovery { counter: 0, ..recovery.clone() });
    refuse("no signers", Recovery { signers: vec![], ..recovery.clone() });
    let founder = |role| Founder { key: owner.public(), role };
    refuse("no owner", Recovery { signers: vec![founder(ADMIN)], ..recovery.clone() });
    refuse(
        "the same signer twice",
        Recovery { signers: vec![founder(OWNER); 2], ..recovery.clone() },
    );
    let mut signers = recovery.signers.clone();
    signers.reverse();
    refuse("signers out of order", Recovery { signers, ..recovery.clone() });
    let keep = vec![ObjectHash(hash(2)), ObjectHash(hash(1))];
    refuse("keeps a list out of order", Recovery { keep, ..recovery.clone() });

    raw_entries(file, world, &log);
    wires(file, world, &log, &recovery);
}

/// Entries that no [`Entry`] writes.
fn raw_entries(file: &mut File, world: &World, log: &Log) {
    let owner = &world.signer;
    let change = |kind: u64| FieldsWriter::new().uint(0, kind);
    let agent = AgentId([7; 16]);
    let describe = |body: &[u8]| {
        let wire = envelope(body, &[sign(owner, "entry", body)]);
        (
            wire.clone(),
            json!({ "kind": "entry", "signer": hex(owner.public().0), "wire": hex(wire) }),
        )
    };
    for (name, change) in [
        ("change of an unknown critical kind", change(127).uint(1, 1u8)),
        ("change of an unknown optional kind", change(128).uint(1, 1u8)),
        ("revocation with an unknown optional field", change(3).bytes(1, &agent.0).uint(64, 1u8)),
        ("revocation with an unknown critical field", change(3).bytes(1, &agent.0).uint(63, 1u8)),
    ] {
        let body = raw_entry(log, vec![change]).finish();
        let (wire, case) = describe(&body);
        judge::<Entry>(&wire, owner).expect(name);
        file.valid(&format!("entry: {name}"), case);
    }
    let mut refuse = |name: &str, body: Vec<u8>| {
        let (wire, case) = describe(&body);
        file.invalid(&format!("entry: {name}"), judge::<Entry>(&wire, owner), case);
    };
    let none: [&[u8]; 0] = [];
    refuse(
        "abandons empty, not absent",
        raw_entry(log, vec![change(128)]).byte_strings(6, none.into_iter()).finish(),
    );
    refuse(
        "an abandoned hash of 31 bytes",
        raw_entry(log, vec![change(128)]).byte_strings(6, [&[7; 31][..]].into_iter()).finish(),
    );
    let cases = [
        ("change without a kind", FieldsWriter::new().bytes(1, &agent.0)),
        ("signer added without a role", change(1).bytes(1, &[7; 32])),
        ("signer added in role 0", change(1).bytes(1, &[7; 32]).uint(2, 0u8)),
        ("signer added in role 3", change(1).bytes(1, &[7; 32]).uint(2, 3u8)),
        ("signer added with a key of 31 bytes", change(1).bytes(1, &[7; 31]).uint(2, 1u8)),
        ("signer removed without a list of what is kept", change(2).bytes(1, &[7; 32])),
        ("revocation of no agent", change(3)),
        ("revocation of 15 bytes", change(3).bytes(1, &[7; 15])),
        ("closure without a list of what is kept", change(4).bytes(1, &[7; 16])),
        ("epoch of 33 bits", change(5).uint(1, 1u64 << 32).bytes(2, &[7; 32])),
        ("epoch without a commit", change(5).uint(1, 1u8)),
        ("policy that says nothing", change(6)),
        ("policy that says 1", change(6).uint(1, 1u8)),
    ];
    for (name, change) in cases {
        refuse(name, raw_entry(log, vec![change]).finish());
    }
}

/// The byte before the signed object.
fn wires(file: &mut File, world: &World, log: &Log, recovery: &Recovery) {
    let entry = world.signer.sign(&log.next(vec![OPTIONAL])).encode();
    let recovery = world.recovery_signer().sign(recovery).encode();
    let with = |kind: u8, signed: &[u8]| [&[kind], signed].concat();
    for (name, wire) in [("an entry", with(1, &entry)), ("a recovery", with(2, &recovery))] {
        let read = LogEntry::decode(&wire).expect(name);
        assert_eq!(read.encode(), wire);
        let case = json!({
            "entry": hex(&wire),
            "hash": hex(read.hash().0),
            "seq": read.head().seq,
            "prev": hex(read.follows().hash.0),
        });
        file.valid(&format!("as it travels: {name}"), case);
    }
    for (name, wire) in [
        ("nothing", vec![]),
        ("a kind and nothing", vec![1]),
        ("kind 0", with(0, &entry)),
        ("kind 3", with(3, &entry)),
        ("no kind", entry.clone()),
        ("an entry as a recovery", with(2, &entry)),
        ("a recovery as an entry", with(1, &recovery)),
        ("an entry and a byte", [&with(1, &entry)[..], &[0]].concat()),
        ("an entry less a byte", with(1, &entry[..entry.len() - 1])),
        ("two entries", [with(1, &entry), with(1, &entry)].concat()),
    ] {
        let read: Result<_, ObjectError> = LogEntry::decode(&wire);
        file.invalid(&format!("as it travels: {name}"), read, json!({ "entry": hex(&wire) }));
    }
}

/// The agents and credentials that `state` is asked about.
fn ids(world: &World) -> (Vec<AgentId>, Vec<CredentialId>) {
    let named = |name: &str| AgentId::of(&world.workspace, &key(name).public());
    let agents = ["agent", "kept", "joiner", "admin", "second", "third"].map(named);
    let credential = |name| world.admission(name, CredentialKind::Invite).credential.object().id();
    (agents.to_vec(), ["invite", "share"].map(credential).to_vec())
}

fn described(world: &World, state: &TrustState) -> Value {
    let role = |role| match role {
        SignerRole::Owner => 1,
        SignerRole::Admin => 2,
    };
    let signers: Vec<_> =
        state.signers().map(|(key, is)| json!({ "key": hex(key.0), "role": role(is) })).collect();
    let (agents, credentials) = ids(world);
    let revoked: Vec<_> = agents.iter().filter(|agent| state.is_revoked(agent, u64::MAX)).collect();
    let closed: Vec<_> = credentials.iter().filter(|id| state.is_closed(id)).collect();
    let (recovery_key, recovery_counter) = state.recovery();
    json!({
        "seq": state.head().seq,
        "head": hex(state.head().hash.0),
        "signers": signers,
        "revoked": revoked,
        "closed": closed,
        "epoch": state.epoch(),
        "strict": state.policy().strict,
        "frozen": state.is_frozen(),
        "forked": state.is_forked(),
        "recovery_key": hex(recovery_key.0),
        "recovery_counter": recovery_counter,
    })
}

fn wires_of(entries: &[LogEntry]) -> Vec<String> {
    entries.iter().map(|entry| hex(entry.encode())).collect()
}

fn entries(log: &Log) -> Value {
    json!({ "entries": wires_of(&log.entries) })
}

/// A log with a second owner and an admin.
fn staffed(world: &World) -> Log {
    let mut log = Log::with_owners(world, &[&key("second")]);
    log.push(&world.signer, vec![add(&key("admin"), ADMIN)]);
    log
}

fn close(name: &str, world: &World, keep: Vec<ObjectHash>) -> Change {
    let credential_id = world.admission(name, CredentialKind::Invite).credential.object().id();
    Change::CloseCredential { credential_id, keep: sorted(keep) }
}

fn logs(file: &mut File, world: &World) {
    let (owner, admin, second) = (&world.signer, key("admin"), key("second"));
    let log = staffed(world);
    let agent = log.agent(&key("agent"));
    let mut valid = |name: &str, log: &Log| {
        let state = described(world, log.state());
        file.valid(&format!("log: {name}"), merged(&[entries(log), json!({ "state": state })]));
    };
    valid("two owners and an admin", &log);
    let mut all = log.clone();
    all.push(&admin, vec![revoke(agent), close("invite", world, vec![])]);
    let epoch = |epoch| Change::EpochKey { epoch, commit: bytes("commit") };
    all.push(&admin, vec![epoch(1), epoch(2)]);
    all.push(owner, vec![remove(&admin, vec![]), Change::Policy(Policy { strict: true })]);
    let by_two = all.next(vec![revoke(all.agent(&key("third")))]);
    all.push_entry(&[owner, &second], &by_two);
    valid("every change", &all);
    let mut revoked = log.clone();
    revoked.push(owner, vec![revoke(log.agent(&second))]);
    valid("an owner's agent is revoked, and the owner with it", &revoked);
    let mut frozen = log.clone();
    frozen.push(owner, vec![CRITICAL, revoke(agent), add(&key("third"), OWNER)]);
    frozen.push_entry(&[owner, &key("third")], &frozen.next(vec![remove(&admin, vec![])]));
    valid("frozen by an unknown critical change, revocations go on", &frozen);
    let mut recovered = revoked.clone();
    recovered.recover(world, 3, &[&key("third")]);
    recovered.push(&key("third"), vec![OPTIONAL]);
    valid("recovered", &recovered);

    let mut refuse = |name: &str, log: &Log, entry: LogEntry| {
        let judged = log.judge_wire(&entry);
        let wires = [wires_of(&log.entries), wires_of(&[entry])].concat();
        file.invalid(&format!("log: {name}"), judged, json!({ "entries": wires }));
    };
    let by = |by: &[&SigningKey], entry: &Entry| LogEntry::Entry(sign_by(by, entry));
    let next = log.next(vec![OPTIONAL]);
    for (name, entry) in [
        (
            "of another workspace",
            Entry { workspace_id: WorkspaceId(bytes("other")), ..next.clone() },
        ),
        ("a number left out", Entry { seq: 4, ..next.clone() }),
        ("a number again", Entry { seq: 2, ..next.clone() }),
        ("another entry before", Entry { prev: EntryHash(bytes("other")), ..next.clone() }),
        ("the genesis before", Entry { prev: EntryHash(world.workspace.0), ..next.clone() }),
    ] {
        refuse(name, &log, by(&[owner], &entry));
    }
    refuse("the last entry again", &log, log.entries[1].clone());
    let third = key("third");
    refuse("by a stranger", &log, by(&[&third], &next));
    refuse("by an owner and a stranger", &log, by(&[owner, &third], &next));
    refuse("by the recovery key", &log, by(&[&world.recovery_signer()], &next));
    let adds_itself = log.next(vec![add(&third, OWNER)]);
    refuse("by a stranger that adds itself", &log, by(&[&third], &adds_itself));
    refuse("by an owner and the one that it adds", &log, by(&[owner, &third], &adds_itself));
    refuse("by a signer that was removed", &all, by(&[&admin], &all.next(vec![OPTIONAL])));
    refuse(
        "by a signer whose agent was revoked",
        &revoked,
        by(&[&second], &revoked.next(vec![OPTIONAL])),
    );
    let body = next.encode();
    let forged = vec![(owner.public(), third.sign_text("entry", &body))];
    let forged = Signed::new(body.clone(), forged).expect("well-formed");
    refuse("with another's signature", &log, LogEntry::Entry(forged));
    let signatures = vec![
        (owner.public(), owner.sign_text("entry", &body)),
        (second.public(), third.sign_text("entry", &body)),
    ];
    let forged = Signed::new(body, signatures).expect("well-formed");
    refuse("with one good signature of two", &log, LogEntry::Entry(forged));
    for (name, change) in [
        ("an admin adds a signer", add(&third, ADMIN)),
        ("an admin makes itself an owner", add(&admin, OWNER)),
        ("an admin removes a signer", remove(&second, vec![])),
        ("an admin sets the policy", Change::Policy(Policy { strict: false })),
        ("an admin revokes an owner's agent", revoke(log.agent(&second))),
        (
            "an admin revokes certificates of an owner's agent",
            Change::RevokeAgent { agent_id: log.agent(&second), below_serial: Some(u64::MAX) },
        ),
    ] {
        let entry = log.next(vec![change.clone()]);
        refuse(name, &log, by(&[&admin], &entry));
        refuse(&format!("{name}, an owner beside it"), &log, by(&[owner, &admin], &entry));
        let hidden = log.next(vec![CRITICAL, change]);
        refuse(&format!("{name}, beside an unknown change"), &log, by(&[&admin], &hidden));
    }
    let abandons = Entry { abandons: vec![EntryHash([7; 32])], ..next.clone() };
    refuse("an admin gives up a branch", &log, by(&[&admin], &abandons));
    for (name, changes) in [
        ("both owners are removed", vec![remove(owner, vec![]), remove(&second, vec![])]),
        (
            "an owner is removed, the other revoked",
            vec![remove(owner, vec![]), revoke(log.agent(&second))],
        ),
        ("both owners become admins", vec![add(owner, ADMIN), add(&second, ADMIN)]),
        ("a stranger is removed", vec![remove(&third, vec![])]),
        ("a signer is removed twice", vec![remove(&second, vec![]), remove(&second, vec![])]),
        (
            "a signer is revoked, then removed",
            vec![revoke(log.agent(&second)), remove(&second, vec![])],
        ),
        (
            "an agent is revoked and made a signer",
            vec![revoke(log.agent(&third)), add(&third, ADMIN)],
        ),
        ("epoch 0 again", vec![epoch(0)]),
        ("epoch 2 after epoch 0", vec![epoch(2)]),
        ("epoch 1 twice", vec![epoch(1), epoch(1)]),
    ] {
        refuse(name, &log, by(&[owner], &log.next(changes)));
    }
    refuse(
        "a revoked agent is made a signer",
        &revoked,
        by(&[owner], &revoked.next(vec![add(&second, OWNER)])),
    );
    refuse(
        "frozen, by the one that the unknown entry may have added",
        &frozen,
        by(&[&third], &frozen.next(vec![OPTIONAL])),
    );
    let recovery =
        |by: &[&SigningKey], recovery: &Recovery| LogEntry::Recovery(sign_by(by, recovery));
    let recovery_key = world.recovery_signer();
    let first = log.recovery(world, 1, &[&third]);
    refuse("recovery by an owner", &log, recovery(&[owner], &first));
    refuse("recovery by its own signer", &log, recovery(&[&third], &first));
    refuse("recovery by two", &log, recovery(&[&recovery_key, owner], &first));
    let base = Head::genesis(world.workspace);
    refuse(
        "recovery that follows another entry",
        &log,
        recovery(&[&recovery_key], &Recovery { base, ..first.clone() }),
    );
    let other = Recovery { workspace_id: WorkspaceId(bytes("other")), ..first };
    refuse("recovery of another workspace", &log, recovery(&[&recovery_key], &other));
    for counter in [2, 3] {
        let again = recovered.recovery(world, counter, &[owner]);
        refuse(
            &format!("recovery {counter} after recovery 3"),
            &recovered,
            recovery(&[&recovery_key], &again),
        );
    }
}

/// A log and another one that leaves it.
fn fork(own: &Log, other: &Log) -> (usize, Value) {
    let after = own.common(other);
    let branch = wires_of(&other.entries[after..]);
    (after, merged(&[entries(own), json!({ "after": after, "branch": branch })]))
}

fn forks(file: &mut File, world: &World) {
    let (owner, second, third) = (&world.signer, key("second"), key("third"));
    let base = staffed(world);
    let agent = base.agent(&key("agent"));
    let mut valid = |name: &str, own: &Log, other: &Log| {
        let (outcome, state) = match own.consider(other).expect(name) {
            Considered::Settled => ("settled", own.state().clone()),
            Considered::Forked(state) => ("forked", *state),
            Considered::Replaces(state) => ("replaces", *state),
        };
        let result = json!({ "outcome": outcome, "state": described(world, &state) });
        file.valid(&format!("fork: {name}"), merged(&[fork(own, other).1, result]));
    };
    let (mut left, mut right) = (base.clone(), base.clone());
    left.push(owner, vec![add(&third, OWNER), revoke(base.agent(&key("kept")))]);
    let first = right.push(&second, vec![remove(&key("admin"), vec![]), revoke(agent)]);
    right.push(&second, vec![close("invite", world, vec![]), add(&third, OWNER)]);
    valid("revocations of both, additions of none", &left, &right);
    valid("the same, from the other side", &right, &left);
    let mut settled = left.clone();
    settled.abandon(owner, vec![first]);
    valid("given up before it is shown: what it revoked stays", &settled, &right);
    valid("the own branch is given up", &right, &settled);
    let mut out = (left.clone(), right.clone());
    out.0.push(owner, vec![remove(&second, vec![])]);
    out.0.abandon(owner, vec![first]);
    out.1.push(&second, vec![remove(owner, vec![])]);
    valid("owners that remove each other are both out", &out.0, &out.1);
    let mut recovered = base.cut(1);
    recovered.recover(world, 1, &[&third]);
    valid("a recovery replaces, revocations stay", &right, &recovered);
    valid("a branch that a recovery cut off", &recovered, &right);
    let (mut ours, mut theirs) = (base.clone(), base.clone());
    ours.push(owner, vec![OPTIONAL]);
    let twin = theirs.push_at(0, owner, vec![OPTIONAL]);
    ours.abandon(owner, vec![twin]);
    valid("given up by one who signed both", &ours, &theirs);
    let (mut lowered, mut gives_up) = (base.clone(), base.clone());
    let first = lowered.push(owner, vec![add(&second, ADMIN)]);
    lowered.push(owner, vec![add(&second, OWNER)]);
    gives_up.abandon(&second, vec![first]);
    valid("given up by one who was no owner for a while", &lowered, &gives_up);
    valid("that one, from the other side", &gives_up, &lowered);

    let mut refuse = |name: &str, own: &Log, after: usize, branch: &[LogEntry]| {
        let held = &own.entries[after];
        let judged: Result<Considered, LogError> =
            own.state().consider(&own.states[after], held, branch);
        let case = merged(&[entries(own), json!({ "after": after, "branch": wires_of(branch) })]);
        file.invalid(&format!("fork: {name}"), judged, case);
    };
    let branch = &right.entries[2..];
    refuse("no entry", &left, 2, &[]);
    refuse("the own entry", &left, 2, &left.entries[2..]);
    let again = LogEntry::Entry(sign_by(
        &[owner, &second],
        &base.next(vec![add(&third, OWNER), revoke(base.agent(&key("kept")))]),
    ));
    refuse("the own entry, signed by another too", &left, 2, &[again]);
    refuse("it leaves the log elsewhere", &left, 1, branch);
    refuse("its first entry is left out", &left, 2, &branch[1..]);
    refuse("its entries are swapped", &left, 2, &[branch[1].clone(), branch[0].clone()]);
    refuse("its first entry twice", &left, 2, &[branch[0].clone(), branch[0].clone()]);
    let forged = LogEntry::Entry(third.sign(&base.next(vec![OPTIONAL])));
    refuse("signed by a stranger", &left, 2, &[forged]);
    let by_added = LogEntry::Entry(third.sign(&right.cut(3).next(vec![OPTIONAL])));
    refuse(
        "signed by one that only the own branch added",
        &left,
        2,
        &[branch[0].clone(), by_added],
    );
    let mut late = base.cut(0);
    late.push(owner, vec![OPTIONAL]);
    let by_later = LogEntry::Entry(second.sign(&base.cut(0).next(vec![revoke(agent)])));
    refuse("signed by one that was no signer yet", &left, 0, &[by_later]);
    let recovery = base.cut(1).recovery(world, 1, &[&third]);
    let forged = LogEntry::Recovery(owner.sign(&recovery));
    refuse("recovery by an owner", &left, 1, &[forged]);
    let by_admin = key("admin").sign(&base.next(vec![remove(owner, vec![])]));
    refuse("an admin removes an owner", &left, 2, &[LogEntry::Entry(by_admin)]);
}

fn peers(file: &mut File, world: &World) {
    let (owner, admin, second) = (&world.signer, key("admin"), key("second"));
    let base = staffed(world);
    let certified = |issuer: &SigningKey, name: &str, serial: u64| {
        let mut agent = world.member(name);
        let certificate = Certificate {
            issuer: Issuer::Signer(issuer.public()),
            serial,
            ..agent.presented.certificate.object().clone()
        };
        agent.presented.certificate = issuer.sign(&certificate);
        agent
    };
    let admitted = |issuer: &SigningKey, name: &str, kind: CredentialKind| {
        let admission = world.admission(name, kind);
        let issuer_key = issuer.public();
        let credential = Credential { issuer: issuer_key, ..admission.credential.object().clone() };
        Admission { credential: issuer.sign(&credential), ..admission }
    };
    let certificate = |agent: &Agent| ObjectHash(agent.presented.certificate.hash());
    let describe = |log: Value, agent: &Agent, now: UnixTime| {
        let presented = &agent.presented;
        merged(&[
            log,
            json!({
                "expected": hex(agent.id().0),
                "now": now,
                "certificate": hex(presented.certificate.encode()),
                "credential": presented.credential.as_ref().map(|c| hex(c.encode())),
                "noise_key": hex(presented.noise_key.encode()),
            }),
        ])
    };
    let verify = |state: &TrustState, agent: &Agent, now: UnixTime| {
        state.verify_peer(agent.id(), agent.presented.clone(), now)
    };
    let grown = |changes: Vec<Change>| {
        let mut log = base.clone();
        log.push(owner, changes);
        log
    };
    let agent = certified(&admin, "agent", 3);
    let kept = certified(&admin, "kept", 1);
    let invite = admitted(&admin, "invite", CredentialKind::Invite);
    let share = admitted(&admin, "share", CredentialKind::Share);
    let (joiner, guest) = (world.joined("joiner", &invite), world.joined("guest", &share));
    let other = world.joined("agent", &invite);
    let credential = |admission: &Admission| ObjectHash(admission.credential.hash());
    let removed =
        grown(vec![remove(&admin, sorted(vec![certificate(&kept), credential(&invite)]))]);
    let closed = grown(vec![
        close("invite", world, vec![certificate(&joiner)]),
        close("share", world, vec![certificate(&guest)]),
    ]);
    let mut twice = closed.clone();
    twice.push(owner, vec![close("invite", world, vec![certificate(&other)])]);
    let below = |serial| {
        grown(vec![Change::RevokeAgent { agent_id: agent.id(), below_serial: Some(serial) }])
    };
    let revoked = grown(vec![revoke(agent.id())]);
    let named_anew = {
        let mut log = removed.clone();
        log.push(owner, vec![add(&admin, ADMIN)]);
        log
    };
    let end = NOW + 90 * DAY;
    for (name, log, agent, now) in [
        ("by an admin", &base, &agent, NOW),
        ("serial that is not below", &below(3), &agent, NOW),
        ("kept of a removed signer", &removed, &kept, UnixTime::MAX - DAY),
        ("joined by an invite that is kept of a removed signer", &removed, &joiner, NOW),
        ("kept of a closed invite, long after its end", &closed, &joiner, UnixTime::MAX),
        ("kept of a closed share, in its last second", &closed, &guest, end),
        ("of a signer that was named anew", &named_anew, &agent, NOW),
    ] {
        verify(log.state(), agent, now).expect(name);
        file.valid(&format!("peer: {name}"), describe(entries(log), agent, now));
    }
    let mut refuse = |name: &str, log: &Log, agent: &Agent, now: UnixTime| {
        let judged = verify(log.state(), agent, now);
        file.invalid(&format!("peer: {name}"), judged, describe(entries(log), agent, now));
    };
    refuse("revoked", &revoked, &agent, NOW);
    refuse("revoked, with a new certificate", &revoked, &certified(owner, "agent", u64::MAX), NOW);
    refuse("serial that is below", &below(4), &agent, NOW);
    refuse("not kept of a removed signer", &removed, &agent, NOW);
    refuse("certified by a removed signer later", &removed, &certified(&admin, "joiner", 1), NOW);
    refuse("certified anew by a removed signer", &removed, &certified(&admin, "kept", 2), NOW);
    refuse("admitted by a share that is not kept of a removed signer", &removed, &guest, NOW);
    refuse("certified by a signer that is not yet one", &base.cut(1), &agent, NOW);
    refuse("admitted by a signer that is not yet one", &base.cut(1), &joiner, NOW);
    refuse("joined by a closed invite, not kept", &closed, &other, NOW);
    refuse("kept by the first of two closures only", &twice, &joiner, NOW);
    refuse("kept by the second of two closures only", &twice, &other, NOW);
    refuse("kept of a closed share, a second after its end", &closed, &guest, end + 1);
    let revoked_signer = grown(vec![revoke(base.agent(&admin))]);
    refuse("certified by a signer whose agent was revoked", &revoked_signer, &agent, NOW);
    let mut recovered = base.clone();
    recovered.recover(world, 1, &[&second]);
    refuse("certified by a signer that a recovery left out", &recovered, &agent, NOW);
    let longest = MAX_LIFE + NOW + 3600;
    let long = |certs_end| {
        let credential = Credential { certs_end, ..invite.credential.object().clone() };
        let admission = world.admission("invite", CredentialKind::Invite);
        world.joined("joiner", &Admission { credential: admin.sign(&credential), ..admission })
    };
    verify(base.state(), &long(longest), NOW).expect("ninety days");
    refuse("a credential that lasts a second too long", &base, &long(longest + 1), NOW);

    let (mut own, mut branch) = (base.clone(), base.clone());
    own.push(owner, vec![add(&key("third"), OWNER)]);
    branch.push(&second, vec![remove(&admin, vec![certificate(&kept)]), revoke(joiner.id())]);
    branch.push(&second, vec![close("share", world, vec![])]);
    let shown = fork(&own, &branch).1;
    let mut forked = own.clone();
    forked.see(&branch);
    let kept_by_owner = certified(owner, "joiner", 9);
    let shared = world.joined("guest", &admitted(owner, "share", CredentialKind::Share));
    let by_third = certified(&key("third"), "agent", 1);
    for (name, agent) in [
        ("in a fork, kept of a signer that the branch removed", &kept),
        ("in a fork, certified by an owner", &certified(owner, "agent", 1)),
    ] {
        verify(forked.state(), agent, NOW).expect(name);
        file.valid(&format!("peer: {name}"), describe(shown.clone(), agent, NOW));
    }
    for (name, agent) in [
        ("in a fork, certified by a signer that the branch removed", &agent),
        ("in a fork, revoked on the branch", &kept_by_owner),
        ("in a fork, by a share that the branch closed", &shared),
        ("in a fork, certified by an owner that the own branch added", &by_third),
    ] {
        let judged = verify(forked.state(), agent, NOW);
        file.invalid(&format!("peer: {name}"), judged, describe(shown.clone(), agent, NOW));
    }
}

/// Seconds for which certificates count after the last one could be made.
const MAX_LIFE: u64 = 90 * DAY;
