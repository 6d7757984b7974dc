//! The trust log against everything that must not happen to it.

use std::collections::BTreeSet;

use connect_crypto::keys::SigningKey;
use connect_spec::{
    cbor::{CborError, FieldsWriter},
    ids::{AgentId, CredentialId, WorkspaceId},
    limits::{
        MAX_ABANDONED, MAX_BRANCHES, MAX_CERTS, MAX_CHANGES, MAX_ENTRY_BYTES, MAX_KEPT,
        MAX_LOCATOR, MAX_LOG_BYTES, MAX_LOG_ENTRIES, MAX_SIGNERS, MAX_TRUST_BYTES,
    },
    log::{Beat, Change, Entry, EntryHash, Head, LogEntry, ObjectHash, Policy, Recovery},
    objects::{Certificate, Credential, CredentialKind, Issuer, SignerRole, UnixTime},
    record::{Record, RecordError, put_trust_entry, trust_entries},
    signed::{Body, ObjectError, Signed},
    trust::{Considered, LogError, TrustError, TrustState},
};
use proptest::prelude::*;

use crate::common::{
    Admission, Agent, DAY, NOW, World, bytes,
    log::{Log, add, key, remove, revoke, sign_by, sorted},
};

const OWNER: SignerRole = SignerRole::Owner;
const ADMIN: SignerRole = SignerRole::Admin;
/// A critical change of a version that does not exist.
const CRITICAL: Change = Change::Unknown(127);
const OPTIONAL: Change = Change::Unknown(128);

fn close(admission: &Admission, keep: Vec<ObjectHash>) -> Change {
    let credential_id = admission.credential.object().id();
    Change::CloseCredential { credential_id, keep: sorted(keep) }
}

fn certificate_hash(agent: &Agent) -> ObjectHash {
    ObjectHash(agent.presented.certificate.hash())
}

fn credential_hash(admission: &Admission) -> ObjectHash {
    ObjectHash(admission.credential.hash())
}

/// A member whose certificate `issuer` signed.
fn certified_by(world: &World, issuer: &SigningKey, name: &str, serial: u64) -> Agent {
    let mut agent = world.member(name);
    let certificate = Certificate {
        issuer: Issuer::Signer(issuer.public()),
        serial,
        ..agent.presented.certificate.object().clone()
    };
    agent.presented.certificate = issuer.sign(&certificate);
    agent
}

/// An invite or a share that `issuer` signed.
fn admitted_by(world: &World, issuer: &SigningKey, name: &str, kind: CredentialKind) -> Admission {
    let admission = world.admission(name, kind);
    let issuer_key = issuer.public();
    let credential = Credential { issuer: issuer_key, ..admission.credential.object().clone() };
    Admission { credential: issuer.sign(&credential), ..admission }
}

fn verdict(state: &TrustState, agent: &Agent, now: UnixTime) -> Option<TrustError> {
    state.verify_peer(agent.id(), agent.presented.clone(), now).err()
}

#[track_caller]
fn trusted(state: &TrustState, agent: &Agent) {
    assert_eq!(verdict(state, agent, NOW), None);
}

#[track_caller]
fn distrusted(state: &TrustState, agent: &Agent, expected: TrustError) {
    assert_eq!(verdict(state, agent, NOW), Some(expected));
}

/// What goes to disk and comes back.
fn restored(state: &TrustState) -> TrustState {
    serde_json::to_string(state)
        .and_then(|stored| serde_json::from_str(&stored))
        .expect("a state can be stored")
}

/// The state with one field of its stored form replaced.
fn patched(state: &TrustState, path: &[&str], value: u64) -> TrustState {
    let mut stored = serde_json::to_value(state).expect("a state can be stored");
    let field = path.iter().fold(&mut stored, |at, name| &mut at[*name]);
    *field = value.into();
    serde_json::from_value(stored).expect("another value of the same type")
}

#[track_caller]
fn refused(log: &Log, by: &[&SigningKey], changes: Vec<Change>, expected: LogError) {
    assert_eq!(log.judge(by, &log.next(changes)).err(), Some(expected));
}

#[track_caller]
fn accepted(log: &Log, by: &[&SigningKey], changes: Vec<Change>) -> TrustState {
    log.judge(by, &log.next(changes)).expect("a sound entry")
}

#[test]
fn an_entry_names_its_workspace_and_its_place() {
    let world = World::new();
    let mut log = Log::new(&world);
    let owner = &world.signer;
    log.push(owner, vec![OPTIONAL]);
    let sound = log.next(vec![OPTIONAL]);
    let refuse = |entry: Entry, expected| {
        assert_eq!(log.judge(&[owner], &entry).err(), Some(expected));
    };
    refuse(
        Entry { workspace_id: WorkspaceId(bytes("other")), ..sound.clone() },
        LogError::Workspace,
    );
    refuse(Entry { seq: 1, ..sound.clone() }, LogError::Place);
    refuse(Entry { seq: 3, ..sound.clone() }, LogError::Place);
    refuse(Entry { seq: u64::MAX, ..sound.clone() }, LogError::Place);
    refuse(Entry { prev: EntryHash(world.workspace.0), ..sound.clone() }, LogError::Place);
    assert_eq!(log.judge_wire(&log.entries[0]).err(), Some(LogError::Place));
    assert!(log.judge(&[owner], &sound).is_ok());
    // Its time is for people.
    assert!(log.judge(&[owner], &Entry { time: 0, ..sound }).is_ok());

    let recovery = log.recovery(&world, 1, &[owner]);
    let key = world.recovery_signer();
    let refuse = |recovery: Recovery, expected| {
        let entry = LogEntry::Recovery(key.sign(&recovery));
        assert_eq!(log.judge_wire(&entry).err(), Some(expected));
    };
    refuse(
        Recovery { workspace_id: WorkspaceId(bytes("other")), ..recovery.clone() },
        LogError::Workspace,
    );
    let base = Head { seq: u64::MAX, ..recovery.base };
    refuse(Recovery { base, ..recovery.clone() }, LogError::Place);
    refuse(Recovery { base: Head::genesis(world.workspace), ..recovery }, LogError::Place);
}

#[test]
fn entries_are_signed_by_signers_alone() {
    let world = World::new();
    let (owner, stranger, second) = (&world.signer, key("stranger"), key("second"));
    let mut log = Log::with_owners(&world, &[&second]);
    let entry = log.next(vec![OPTIONAL]);
    let judge = |by: &[&SigningKey]| log.judge(by, &entry).map(|_| ());
    assert_eq!(judge(&[owner]), Ok(()));
    assert_eq!(judge(&[owner, &second]), Ok(()));
    assert_eq!(judge(&[&stranger]), Err(LogError::Signer));
    assert_eq!(judge(&[owner, &stranger]), Err(LogError::Signer));
    assert_eq!(judge(&[&world.recovery_signer()]), Err(LogError::Signer));

    // Another's signature under the owner's key, over another body, and as another kind.
    let forge = |kind: &str, by: &SigningKey, body: &[u8]| {
        let signature = by.sign_text(kind, body);
        let signed = Signed::new(entry.encode(), vec![(owner.public(), signature)]).unwrap();
        log.judge_wire(&LogEntry::Entry(signed)).err()
    };
    let body = entry.encode();
    assert_eq!(forge("entry", &stranger, &body), Some(LogError::Signature));
    assert_eq!(forge("entry", owner, &body[1..]), Some(LogError::Signature));
    assert_eq!(forge("recovery", owner, &body), Some(LogError::Signature));
    assert_eq!(forge("entry", owner, &body), None);
    // One of two does not hold.
    let signatures = vec![
        (owner.public(), owner.sign_text("entry", &body)),
        (second.public(), stranger.sign_text("entry", &body)),
    ];
    let signed = LogEntry::Entry(Signed::new(body, signatures).unwrap());
    assert_eq!(log.judge_wire(&signed).err(), Some(LogError::Signature));

    // A signer counts before the entry, not in it or after it.
    refused(&log, &[&stranger], vec![add(&stranger, OWNER)], LogError::Signer);
    refused(&log, &[owner, &stranger], vec![add(&stranger, OWNER)], LogError::Signer);
    log.push(owner, vec![remove(&second, vec![])]);
    refused(&log, &[&second], vec![OPTIONAL], LogError::Signer);
}

#[test]
fn stored_entries_are_judged_by_all_but_their_signatures() {
    let world = World::new();
    let log = Log::new(&world);
    let stranger = key("stranger");
    let entry = log.next(vec![OPTIONAL]);
    let signature = stranger.sign_text("entry", b"");
    let body = entry.encode();
    let signed = Signed::new(body, vec![(world.signer.public(), signature)]).unwrap();
    let mut state = log.state().clone();
    assert_eq!(state.apply_stored(&LogEntry::Entry(signed)), Ok(()));
    let foreign = LogEntry::Entry(stranger.sign(&entry));
    assert_eq!(log.state().clone().apply_stored(&foreign), Err(LogError::Signer));
}

#[test]
fn admins_revoke_and_close_and_owners_do_the_rest() {
    let world = World::new();
    let (owner, admin) = (&world.signer, key("admin"));
    let (second, other) = (key("second"), key("other admin"));
    let mut log = Log::with_owners(&world, &[&second]);
    log.push(owner, vec![add(&admin, ADMIN), add(&other, ADMIN)]);
    let invite = world.admission("invite", CredentialKind::Invite);
    for change in [
        revoke(AgentId(bytes("agent"))),
        revoke(log.agent(&other)),
        revoke(log.agent(&admin)),
        close(&invite, vec![]),
        Change::EpochKey { epoch: 1, commit: bytes("epoch") },
        OPTIONAL,
    ] {
        accepted(&log, &[&admin], vec![change]);
    }
    let owners_only = [
        add(&key("new"), ADMIN),
        add(&admin, OWNER),
        add(&admin, ADMIN),
        remove(&other, vec![]),
        remove(&admin, vec![]),
        Change::Policy(Policy { strict: true }),
        // The agent of an owner, wholly or but for certificates that nobody has.
        revoke(log.agent(&second)),
        Change::RevokeAgent { agent_id: log.agent(&second), below_serial: Some(u64::MAX) },
    ];
    for change in owners_only {
        refused(&log, &[&admin], vec![change.clone()], LogError::Role);
        // An owner's signature beside it does not make the admin's one good.
        refused(&log, &[owner, &admin], vec![change.clone()], LogError::Role);
        refused(&log, &[&admin], vec![OPTIONAL, change.clone()], LogError::Role);
        accepted(&log, &[owner], vec![change]);
    }
    let abandons = vec![EntryHash(bytes("branch"))];
    let entry = Entry { abandons, ..log.next(vec![OPTIONAL]) };
    assert_eq!(log.judge(&[&admin], &entry).err(), Some(LogError::Role));
    assert!(log.judge(&[owner], &entry).is_ok());
}

#[test]
fn there_is_always_an_owner() {
    let world = World::new();
    let (owner, second) = (&world.signer, key("second"));
    let mut log = Log::new(&world);
    let last = LogError::LastOwner;
    refused(&log, &[owner], vec![remove(owner, vec![])], last);
    refused(&log, &[owner], vec![add(owner, ADMIN)], last);
    refused(&log, &[owner], vec![revoke(log.agent(owner))], last);
    refused(&log, &[owner], vec![add(&second, ADMIN), remove(owner, vec![])], last);
    // In one entry the order does not matter, as long as one is left.
    accepted(&log, &[owner], vec![remove(owner, vec![]), add(&second, OWNER)]);
    log.push(owner, vec![add(&second, OWNER)]);
    refused(&log, &[owner], vec![remove(owner, vec![]), revoke(log.agent(&second))], last);
    let state = accepted(&log, &[owner], vec![remove(owner, vec![])]);
    assert_eq!(state.signers().collect::<Vec<_>>(), [(second.public(), OWNER)]);
}

#[test]
fn only_signers_are_removed_and_revoked_agents_do_not_come_back() {
    let world = World::new();
    let (owner, second) = (&world.signer, key("second"));
    let mut log = Log::with_owners(&world, &[&second]);
    refused(&log, &[owner], vec![remove(&key("stranger"), vec![])], LogError::NoSuchSigner);
    let twice = vec![remove(&second, vec![]), remove(&second, vec![])];
    refused(&log, &[owner], twice, LogError::NoSuchSigner);
    let again = vec![revoke(log.agent(&second)), remove(&second, vec![])];
    refused(&log, &[owner], again, LogError::NoSuchSigner);
    let back = vec![revoke(log.agent(&second)), add(&second, ADMIN)];
    refused(&log, &[owner], back, LogError::RevokedSigner);
    log.push(owner, vec![revoke(log.agent(&second))]);
    assert!(!log.state().is_signer(&second.public()));
    refused(&log, &[owner], vec![add(&second, OWNER)], LogError::RevokedSigner);
    // An agent that only lost certificates may become a signer.
    let third = key("third");
    let below = Change::RevokeAgent { agent_id: log.agent(&third), below_serial: Some(9) };
    accepted(&log, &[owner], vec![below, add(&third, ADMIN)]);
}

#[test]
fn epochs_follow_one_another() {
    let world = World::new();
    let owner = &world.signer;
    let mut log = Log::new(&world);
    let epoch = |epoch| Change::EpochKey { epoch, commit: bytes("commit") };
    for number in [0, 2, u32::MAX] {
        refused(&log, &[owner], vec![epoch(number)], LogError::Epoch);
    }
    refused(&log, &[owner], vec![epoch(1), epoch(1)], LogError::Epoch);
    log.push(owner, vec![epoch(1), epoch(2)]);
    assert_eq!(log.state().epoch(), 2);
    assert_eq!(log.state().epoch_commit(0), Some(&world.epoch.commit()));
    assert_eq!(log.state().epoch_commit(2), Some(&bytes("commit")));
    assert_eq!(log.state().epoch_commit(3), None);
    let last =
        Log { states: vec![patched(log.state(), &["epoch"], u32::MAX.into())], ..log.clone() };
    refused(&last, &[owner], vec![epoch(0)], LogError::Epoch);
}

#[test]
fn a_removed_signer_vouches_for_nothing_but_what_is_kept() {
    let world = World::new();
    let (owner, admin) = (&world.signer, key("admin"));
    let mut log = Log::new(&world);
    log.push(owner, vec![add(&admin, ADMIN)]);
    let (kept, other) =
        (certified_by(&world, &admin, "kept", 1), certified_by(&world, &admin, "other", 1));
    let invite = admitted_by(&world, &admin, "invite", CredentialKind::Invite);
    let dropped = admitted_by(&world, &admin, "dropped", CredentialKind::Invite);
    let (joiner, lost) = (world.joined("joiner", &invite), world.joined("lost", &dropped));
    for agent in [&kept, &other, &joiner, &lost] {
        trusted(log.state(), agent);
    }
    log.push(owner, vec![remove(&admin, vec![certificate_hash(&kept), credential_hash(&invite)])]);
    trusted(log.state(), &kept);
    assert_eq!(verdict(log.state(), &kept, UnixTime::MAX - DAY), None);
    trusted(log.state(), &joiner);
    distrusted(log.state(), &other, TrustError::IssuerUnknown);
    distrusted(log.state(), &lost, TrustError::Credential);
    // What it signs later may bear any date.
    distrusted(
        log.state(),
        &certified_by(&world, &admin, "backdated", 1),
        TrustError::IssuerUnknown,
    );
    let backdated = admitted_by(&world, &admin, "backdated", CredentialKind::Invite);
    distrusted(log.state(), &world.joined("backdated", &backdated), TrustError::Credential);
    // Its word for another certificate of an agent that it keeps does not count either.
    distrusted(log.state(), &certified_by(&world, &admin, "kept", 2), TrustError::IssuerUnknown);
    // An owner who names it again vouches for all of it again.
    log.push(owner, vec![add(&admin, ADMIN)]);
    trusted(log.state(), &other);
}

#[test]
fn revoking_an_agent_ends_the_signer_that_it_is() {
    let world = World::new();
    let (owner, admin) = (&world.signer, key("admin"));
    let mut log = Log::new(&world);
    log.push(owner, vec![add(&admin, ADMIN)]);
    let agent = certified_by(&world, &admin, "agent", 1);
    let own = world.agent(
        "admin",
        key("admin"),
        world.attrs("admin"),
        owner.sign(&world.certificate(&admin, &world.attrs("admin"))),
        None,
    );
    let below = Change::RevokeAgent { agent_id: own.id(), below_serial: Some(1) };
    let demoted = accepted(&log, &[&admin], vec![below]);
    assert!(demoted.is_signer(&admin.public()));
    let state = accepted(&log, &[&admin], vec![revoke(own.id())]);
    assert!(!state.is_signer(&admin.public()));
    distrusted(&state, &own, TrustError::Revoked);
    distrusted(&state, &agent, TrustError::IssuerUnknown);
    // What is to stay valid is named by removing the signer first.
    let keep = vec![certificate_hash(&agent)];
    let state = accepted(&log, &[owner], vec![remove(&admin, keep), revoke(own.id())]);
    distrusted(&state, &own, TrustError::Revoked);
    trusted(&state, &agent);
}

#[test]
fn certificates_below_a_serial_are_revoked() {
    let world = World::new();
    let owner = &world.signer;
    let mut log = Log::new(&world);
    let agent = |serial| certified_by(&world, owner, "agent", serial);
    let below =
        |serial| vec![Change::RevokeAgent { agent_id: agent(1).id(), below_serial: Some(serial) }];
    log.push(owner, below(0));
    trusted(log.state(), &agent(0));
    log.push(owner, below(5));
    distrusted(log.state(), &agent(4), TrustError::Revoked);
    trusted(log.state(), &agent(5));
    // A lower one takes nothing back.
    log.push(owner, below(3));
    distrusted(log.state(), &agent(4), TrustError::Revoked);
    log.push(owner, vec![revoke(agent(1).id())]);
    distrusted(log.state(), &agent(u64::MAX), TrustError::Revoked);
    log.push(owner, below(1));
    distrusted(log.state(), &agent(u64::MAX), TrustError::Revoked);
}

#[test]
fn a_closed_credential_keeps_what_every_closure_keeps() {
    let world = World::new();
    let owner = &world.signer;
    let mut log = Log::new(&world);
    let invite = world.admission("invite", CredentialKind::Invite);
    let share = world.admission("share", CredentialKind::Share);
    let [one, two, three] = ["one", "two", "three"].map(|name| world.joined(name, &invite));
    let guest = world.joined("guest", &share);
    let id = invite.credential.object().id();
    assert!(!log.state().is_closed(&id));
    let hashes = |agents: &[&Agent]| agents.iter().map(|agent| certificate_hash(agent)).collect();
    log.push(owner, vec![close(&invite, hashes(&[&one, &two])), close(&share, hashes(&[&guest]))]);
    assert!(log.state().is_closed(&id));
    distrusted(log.state(), &three, TrustError::Closed);
    // Kept of an invite: for ever. Of a share: until its end.
    let end = NOW + 90 * DAY;
    assert_eq!(verdict(log.state(), &one, UnixTime::MAX), None);
    assert_eq!(verdict(log.state(), &guest, end), None);
    assert_eq!(verdict(log.state(), &guest, end + 1), Some(TrustError::Expired));
    // A second closure takes away, and gives nothing.
    log.push(owner, vec![close(&invite, hashes(&[&two, &three]))]);
    distrusted(log.state(), &one, TrustError::Closed);
    trusted(log.state(), &two);
    distrusted(log.state(), &three, TrustError::Closed);
    log.push(owner, vec![close(&share, vec![])]);
    distrusted(log.state(), &guest, TrustError::Closed);
    // Kept or not: what is revoked is revoked, and a credential needs an issuer.
    log.push(owner, vec![revoke(two.id())]);
    distrusted(log.state(), &two, TrustError::Revoked);
}

#[test]
fn a_credential_lasts_ninety_days_after_its_last_use() {
    let world = World::new();
    let log = Log::new(&world);
    let admission = world.admission("invite", CredentialKind::Invite);
    let with_end = |certs_end| {
        let credential = Credential { certs_end, ..admission.credential.object().clone() };
        let admission = world.admission("invite", CredentialKind::Invite);
        Admission { credential: world.signer.sign(&credential), ..admission }
    };
    let longest = NOW + 3600 + MAX_CERTS.as_secs();
    trusted(log.state(), &world.joined("joiner", &with_end(longest)));
    distrusted(
        log.state(),
        &world.joined("joiner", &with_end(longest + 1)),
        TrustError::Credential,
    );
    distrusted(
        log.state(),
        &world.joined("joiner", &with_end(UnixTime::MAX)),
        TrustError::Credential,
    );
}

#[test]
fn an_unknown_critical_change_freezes_and_revocations_go_on() {
    let world = World::new();
    let (owner, admin, second) = (&world.signer, key("admin"), key("second"));
    let mut log = Log::with_owners(&world, &[&second]);
    log.push(owner, vec![add(&admin, ADMIN)]);
    let agent = certified_by(&world, owner, "agent", 1);
    let of_admin = certified_by(&world, &admin, "other", 1);

    assert!(!accepted(&log, &[owner], vec![OPTIONAL]).is_frozen());
    refused(&log, &[&key("stranger")], vec![CRITICAL], LogError::Signer);
    // Where all is known that came before, nobody gains by a change that is not.
    let stranger = key("stranger");
    refused(&log, &[owner, &stranger], vec![CRITICAL], LogError::Signer);
    refused(&log, &[&admin], vec![CRITICAL, remove(owner, vec![])], LogError::Role);
    refused(&log, &[&admin], vec![CRITICAL, revoke(log.agent(&second))], LogError::Role);
    assert!(accepted(&log, &[&admin], vec![CRITICAL, revoke(agent.id())]).is_frozen());

    log.push(owner, vec![CRITICAL, revoke(agent.id()), add(&key("new"), OWNER)]);
    assert!(log.state().is_frozen());
    distrusted(log.state(), &agent, TrustError::Revoked);
    assert!(!log.state().is_signer(&key("new").public()));
    trusted(log.state(), &of_admin);
    // Later entries may be by signers that it made: one that is known must do.
    refused(&log, &[&key("new")], vec![OPTIONAL], LogError::Signer);
    let epoch = Change::EpochKey { epoch: 7, commit: bytes("commit") };
    let changes = vec![remove(&admin, vec![]), epoch, Change::Policy(Policy { strict: true })];
    log.push_entry(&[owner, &key("new")], &log.next(changes));
    distrusted(log.state(), &of_admin, TrustError::IssuerUnknown);
    assert_eq!((log.state().epoch(), log.state().policy().strict), (0, false));
    refused(&log, &[&admin], vec![OPTIONAL], LogError::Signer);
    // It stays frozen, a recovery included, unless that one leaves out what is not known.
    log.recover(&world, 1, &[owner]);
    assert!(log.state().is_frozen());
    let mut before = log.cut(2);
    before.recover(&world, 2, &[owner]);
    log.see(&before);
    assert!(!log.state().is_frozen());
    distrusted(log.state(), &agent, TrustError::Revoked);
}

#[test]
fn a_change_with_an_unknown_critical_field_is_another_change() {
    let world = World::new();
    let log = Log::new(&world);
    let wire = |optional_key: u64| {
        let change = FieldsWriter::new().uint(0, 3u8).bytes(1, &[7; 16]).uint(optional_key, 1u8);
        let entry = log.next(vec![OPTIONAL]);
        let body = FieldsWriter::new()
            .uint(0, 1u8)
            .bytes(1, &entry.workspace_id.0)
            .uint(2, entry.seq)
            .bytes(3, &entry.prev.0)
            .uint(4, entry.time)
            .maps(5, [change].into_iter())
            .finish();
        let signature = world.signer.sign_text("entry", &body);
        LogEntry::Entry(Signed::new(body, vec![(world.signer.public(), signature)]).unwrap())
    };
    let state = log.judge_wire(&wire(64)).unwrap();
    assert!(!state.is_frozen() && state.is_revoked(&AgentId([7; 16]), 0));
    let state = log.judge_wire(&wire(63)).unwrap();
    assert!(state.is_frozen() && !state.is_revoked(&AgentId([7; 16]), 0));
}

#[test]
fn a_recovery_is_by_the_key_in_force_and_counts_up() {
    let world = World::new();
    let (owner, second) = (&world.signer, key("second"));
    let mut log = Log::new(&world);
    log.push(owner, vec![add(&second, ADMIN)]);
    let recovery_key = world.recovery_signer();
    let judge = |log: &Log, by: &[&SigningKey], recovery: &Recovery| {
        log.judge_wire(&LogEntry::Recovery(sign_by(by, recovery))).map(|_| ())
    };
    let first = log.recovery(&world, 1, &[&second]);
    assert_eq!(judge(&log, &[&recovery_key], &first), Ok(()));
    for by in [&[owner][..], &[&second], &[owner, &recovery_key]] {
        assert_eq!(judge(&log, by, &first), Err(LogError::Recovery));
    }
    let next_key = key("next recovery");
    let next = Recovery { recovery_key: next_key.public(), ..log.recovery(&world, 7, &[&second]) };
    log.try_push(LogEntry::Recovery(recovery_key.sign(&next))).unwrap();
    assert_eq!(log.state().recovery(), (next_key.public(), 7));
    assert_eq!(log.state().signers().collect::<Vec<_>>(), [(second.public(), OWNER)]);
    for counter in [1, 6, 7] {
        let old = log.recovery(&world, counter, &[owner]);
        assert_eq!(judge(&log, &[&next_key], &old), Err(LogError::Recovery));
    }
    let again = log.recovery(&world, 8, &[owner]);
    assert_eq!(judge(&log, &[&recovery_key], &again), Err(LogError::Recovery));
    assert_eq!(judge(&log, &[&next_key], &again), Ok(()));
}

#[test]
fn a_recovery_ends_all_other_signers_but_not_what_was_ended() {
    let world = World::new();
    let (owner, second, third) = (&world.signer, key("second"), key("third"));
    let mut log = Log::with_owners(&world, &[&second, &third]);
    let agents = ["a", "b", "c"].map(|name| certified_by(&world, &second, name, 1));
    let of_owner = certified_by(&world, owner, "d", 1);
    let revoked = certified_by(&world, owner, "revoked", 1);
    log.push(owner, vec![revoke(revoked.id()), remove(&third, vec![])]);
    let recovery = Recovery {
        keep: vec![certificate_hash(&agents[0])],
        ..log.recovery(&world, 1, &[owner, &third])
    };
    log.try_push(LogEntry::Recovery(world.recovery_signer().sign(&recovery))).unwrap();
    trusted(log.state(), &agents[0]);
    distrusted(log.state(), &agents[1], TrustError::IssuerUnknown);
    trusted(log.state(), &of_owner);
    trusted(log.state(), &certified_by(&world, &third, "e", 1));
    distrusted(log.state(), &revoked, TrustError::Revoked);
}

#[test]
fn a_recovery_is_accepted_at_any_height_and_ends_what_came_after_it() {
    let world = World::new();
    let (owner, thief, new) = (&world.signer, key("thief"), key("new"));
    let mut log = Log::new(&world);
    log.push(owner, vec![OPTIONAL]);
    let mut recovered = log.clone();
    log.push(owner, vec![add(&thief, OWNER)]);
    let agent = certified_by(&world, owner, "agent", 1);
    log.push(&thief, vec![remove(owner, vec![]), revoke(agent.id())]);
    log.push(&thief, vec![add(&key("accomplice"), OWNER)]);
    let before = log.clone();
    recovered.recover(&world, 1, &[&new]);
    recovered.push(&new, vec![OPTIONAL]);
    log.see(&recovered);
    assert_eq!(log.head(), recovered.head());
    assert_eq!(log.state().signers().collect::<Vec<_>>(), [(new.public(), OWNER)]);
    // Revocations stay, whoever made them.
    assert!(log.state().is_revoked(&agent.id(), 1));
    // What was cut off is not a fork any more, however it goes on.
    let mut late = before.clone();
    late.push(&thief, vec![revoke(AgentId(bytes("someone")))]);
    assert_eq!(recovered.consider(&before), Ok(Considered::Settled));
    assert_eq!(recovered.consider(&late), Ok(Considered::Settled));
    // Nor does a second recovery with the same counter count.
    let mut second = before.cut(1);
    second.recover(&world, 1, &[&thief]);
    assert_eq!(recovered.consider(&second), Ok(Considered::Settled));
    let mut third = before.cut(0);
    third.recover(&world, 2, &[owner]);
    log.see(&third);
    assert_eq!(log.state().signers().collect::<Vec<_>>(), [(owner.public(), OWNER)]);
    // And a branch that leaves after it is one as any other.
    let (mut left, mut right) = (log.clone(), log.clone());
    left.push(owner, vec![OPTIONAL]);
    right.push_at(0, owner, vec![OPTIONAL]);
    assert!(matches!(left.consider(&right), Ok(Considered::Forked(_))));
}

#[test]
fn in_a_fork_revocations_of_both_branches_count_and_additions_of_none() {
    let world = World::new();
    let owner = &world.signer;
    let (second, third, new) = (key("second"), key("third"), key("new"));
    let base = Log::with_owners(&world, &[&second, &third]);
    let agents = ["a", "b", "c", "d"].map(|name| certified_by(&world, owner, name, 1));
    let of_third = certified_by(&world, &third, "of third", 1);
    let of_new = certified_by(&world, &new, "of new", 1);
    let share = world.admission("share", CredentialKind::Share);
    let guest = world.joined("guest", &share);
    let (mut left, mut right) = (base.clone(), base);
    left.push(owner, vec![add(&new, OWNER), revoke(agents[0].id()), close(&share, vec![])]);
    left.push(owner, vec![Change::Policy(Policy { strict: true }), add(&second, ADMIN)]);
    right.push(&second, vec![add(&new, OWNER), revoke(agents[1].id())]);
    right.push(&second, vec![remove(&third, vec![])]);
    trusted(left.state(), &agents[1]);
    let (ours, theirs) = (left.clone(), right.clone());
    left.see(&theirs);
    right.see(&ours);
    for log in [&left, &right] {
        let state = log.state();
        assert!(state.is_forked() && state.policy().strict);
        distrusted(state, &agents[0], TrustError::Revoked);
        distrusted(state, &agents[1], TrustError::Revoked);
        trusted(state, &agents[2]);
        distrusted(state, &of_third, TrustError::IssuerUnknown);
        distrusted(state, &of_new, TrustError::IssuerUnknown);
        distrusted(state, &guest, TrustError::Closed);
        // A role is the lowest that a branch gives.
        let mut expected = [(owner.public(), OWNER), (second.public(), ADMIN)];
        expected.sort_by_key(|(key, _)| *key);
        assert_eq!(state.signers().collect::<Vec<_>>(), expected);
    }
    // Seen again, nothing changes; grown, the new part counts.
    assert_eq!(left.consider(&theirs), Ok(Considered::Forked(Box::new(left.state().clone()))));
    let mut longer = theirs;
    longer.push(&second, vec![revoke(agents[3].id())]);
    left.see(&longer);
    distrusted(left.state(), &agents[3], TrustError::Revoked);
    let heads: Vec<_> = left.state().branches().collect();
    assert_eq!(heads, [(longer.entries[2].hash(), longer.head())]);
}

#[test]
fn in_a_fork_a_closed_credential_keeps_what_both_branches_keep() {
    let world = World::new();
    let (owner, second) = (&world.signer, key("second"));
    let base = Log::with_owners(&world, &[&second]);
    let invite = world.admission("invite", CredentialKind::Invite);
    let [one, two, three] = ["one", "two", "three"].map(|name| world.joined(name, &invite));
    let hashes = |agents: &[&Agent]| agents.iter().map(|agent| certificate_hash(agent)).collect();
    let (mut left, mut right) = (base.clone(), base);
    left.push(owner, vec![close(&invite, hashes(&[&one, &two]))]);
    right.push(&second, vec![close(&invite, hashes(&[&two, &three]))]);
    let (ours, theirs) = (left.clone(), right.clone());
    left.see(&theirs);
    right.see(&ours);
    for log in [&left, &right] {
        distrusted(log.state(), &one, TrustError::Closed);
        trusted(log.state(), &two);
        distrusted(log.state(), &three, TrustError::Closed);
    }
}

#[test]
fn a_signer_named_anew_in_a_fork_is_an_addition() {
    let world = World::new();
    let (owner, second) = (&world.signer, key("second"));
    let base = Log::with_owners(&world, &[&second]);
    let (mut left, mut right) = (base.clone(), base);
    left.push(owner, vec![remove(&second, vec![])]);
    left.push(owner, vec![add(&second, OWNER)]);
    right.push_at(0, owner, vec![OPTIONAL]);
    let (ours, theirs) = (left.clone(), right.clone());
    left.see(&theirs);
    right.see(&ours);
    assert!(!left.state().is_signer(&second.public()));
    assert!(!right.state().is_signer(&second.public()));
}

#[test]
fn two_owners_that_remove_each_other_are_both_out_until_a_recovery() {
    let world = World::new();
    let (honest, thief, new) = (&world.signer, key("thief"), key("new"));
    let base = Log::with_owners(&world, &[&thief]);
    let agents = [certified_by(&world, honest, "a", 1), certified_by(&world, &thief, "b", 1)];
    let (mut ours, mut theirs) = (base.clone(), base.clone());
    let first = ours.push(honest, vec![remove(&thief, vec![])]);
    let second = theirs.push(&thief, vec![remove(honest, vec![])]);
    // Each gives the other up as well, before or after the other is known: it makes no difference.
    let (mut ours_abandons, mut theirs_abandons) = (ours.clone(), theirs.clone());
    ours_abandons.abandon(honest, vec![second]);
    theirs_abandons.abandon(&thief, vec![first]);
    let logs = [&ours, &theirs, &ours_abandons, &theirs_abandons];
    for own in logs {
        for shown in [[&ours, &theirs_abandons], [&ours_abandons, &theirs]] {
            for order in [[0, 1], [1, 0]] {
                let mut seen = own.clone();
                order.iter().for_each(|which| seen.see(shown[*which]));
                if seen.common(own) < own.entries.len() {
                    panic!("a removed owner cannot replace a log");
                }
                assert!(seen.state().is_forked());
                assert_eq!(seen.state().signers().count(), 0);
                for agent in &agents {
                    distrusted(seen.state(), agent, TrustError::IssuerUnknown);
                }
                let mut recovered = base.clone();
                recovered.recover(&world, 1, &[&new]);
                seen.see(&recovered);
                assert!(!seen.state().is_forked());
                assert_eq!(seen.state().signers().collect::<Vec<_>>(), [(new.public(), OWNER)]);
            }
        }
    }
}

#[test]
fn an_owner_that_signed_one_sibling_settles_a_fork() {
    let world = World::new();
    let (owner, second, new) = (&world.signer, key("second"), key("new"));
    let base = Log::with_owners(&world, &[&second, &new]);
    let agents = ["a", "b"].map(|name| certified_by(&world, owner, name, 1));
    let (mut kept, mut lost) = (base.clone(), base);
    kept.push(owner, vec![revoke(agents[0].id()), add(&key("added"), ADMIN)]);
    let first = lost.push(&second, vec![revoke(agents[1].id()), remove(&new, vec![])]);
    let unsettled = kept.clone();
    kept.abandon(owner, vec![first]);

    // Whether one has the branch that is kept or the other, saw the fork first or its end.
    let mut orders = [kept.clone(), lost.clone(), unsettled.clone(), lost.clone()];
    orders[0].see(&lost);
    orders[1].see(&kept);
    orders[2].see(&lost);
    assert!(orders[2].state().is_forked());
    assert!(!orders[2].state().is_signer(&new.public()));
    orders[2].see(&kept);
    orders[3].see(&unsettled);
    orders[3].see(&kept);
    for log in &orders {
        let state = log.state();
        assert_eq!(state.head(), kept.head());
        assert!(!state.is_forked());
        // Revoked agents stay so; who was a signer before is one, and an addition counts.
        distrusted(state, &agents[0], TrustError::Revoked);
        distrusted(state, &agents[1], TrustError::Revoked);
        assert!(state.is_signer(&new.public()) && state.is_signer(&key("added").public()));
        assert_eq!(log.consider(&lost), Ok(Considered::Settled));
    }
    // It stays settled until it is shown to remove the one who settled it.
    let mut longer = lost.clone();
    longer.push(&second, vec![remove(owner, vec![])]);
    for mut log in orders {
        log.see(&longer);
        assert!(log.state().is_forked() && !log.state().is_signer(&owner.public()));
    }
}

#[test]
fn who_signed_both_siblings_does_not_settle() {
    let world = World::new();
    let (owner, second) = (&world.signer, key("second"));
    let base = Log::with_owners(&world, &[&second]);
    let (mut left, mut right) = (base.clone(), base.clone());
    left.push(owner, vec![OPTIONAL]);
    let first = right.push_at(0, owner, vec![OPTIONAL]);
    left.abandon(owner, vec![first]);
    for (mut own, shown) in [(left.clone(), &right), (right.clone(), &left)] {
        own.see(shown);
        assert!(own.state().is_forked());
        assert_eq!(own.common(shown), 1);
    }
    // Nor does an admin, nor one that the branch made an owner.
    let admin = key("admin");
    let mut third = base;
    third.push(owner, vec![add(&admin, ADMIN)]);
    let (mut left, mut right) = (third.clone(), third);
    left.push(&second, vec![add(&admin, OWNER)]);
    let first = right.push_at(0, &second, vec![OPTIONAL]);
    left.abandon(&admin, vec![first]);
    left.see(&right);
    assert!(left.state().is_forked());
    // The other owner does.
    left.abandon(owner, vec![first]);
    assert!(!left.state().is_forked());
    right.see(&left);
    assert_eq!(right.head(), left.head());
}

#[test]
fn who_signed_two_of_three_siblings_does_not_settle() {
    let world = World::new();
    let (owner, second) = (&world.signer, key("second"));
    let base = Log::with_owners(&world, &[&second]);
    let [mut own, mut left, mut right] = [base.clone(), base.clone(), base];
    own.push(&second, vec![OPTIONAL]);
    let firsts =
        vec![left.push_at(1, owner, vec![OPTIONAL]), right.push_at(2, owner, vec![OPTIONAL])];
    own.see(&left);
    own.see(&right);
    own.abandon(owner, firsts.clone());
    assert!(own.state().is_forked());
    // The first one that is settled does not free the other: who signed twice did so.
    own.push(&second, vec![OPTIONAL]);
    own.abandon(&second, firsts);
    assert_eq!(own.state().branches().count(), 0);
}

#[test]
fn of_two_branches_that_give_each_other_up_all_choose_the_same() {
    let world = World::new();
    let (owner, second) = (&world.signer, key("second"));
    let base = Log::with_owners(&world, &[&second]);
    let (mut left, mut right) = (base.clone(), base);
    let first = left.push(owner, vec![OPTIONAL]);
    let other = right.push_at(0, &second, vec![OPTIONAL]);
    left.abandon(owner, vec![other]);
    right.abandon(&second, vec![first]);
    let expected = if first < other { left.head() } else { right.head() };
    for (mut own, shown) in [(left.clone(), &right), (right.clone(), &left)] {
        own.see(shown);
        assert_eq!(own.head(), expected);
        assert!(!own.state().is_forked());
    }
}

#[test]
fn another_signature_makes_no_other_entry() {
    let world = World::new();
    let (owner, second) = (&world.signer, key("second"));
    let base = Log::with_owners(&world, &[&second]);
    let (mut left, mut right) = (base.clone(), base);
    let first = left.push(owner, vec![OPTIONAL]);
    assert_eq!(right.push(&second, vec![OPTIONAL]), first);
    assert_eq!(left.state(), right.state());
    let branch = &right.entries[1..];
    let judged = left.state().consider(&left.states[1], &left.entries[1], branch);
    assert_eq!(judged, Err(LogError::NoBranch));
}

#[test]
fn a_claim_is_no_branch() {
    let world = World::new();
    let owner = &world.signer;
    let mut log = Log::new(&world);
    log.push(owner, vec![OPTIONAL]);
    log.push(owner, vec![OPTIONAL]);
    let mut other = log.cut(1);
    other.push_at(0, owner, vec![OPTIONAL]);
    let (state, base) = (log.state(), &log.states[1]);
    let consider = |base: &TrustState, held: usize, branch: &[LogEntry]| {
        state.consider(base, &log.entries[held], branch).map(|_| ())
    };
    assert_eq!(consider(base, 1, &other.entries[1..]), Ok(()));
    assert_eq!(consider(base, 1, &[]), Err(LogError::NoBranch));
    assert_eq!(consider(base, 1, &log.entries[1..]), Err(LogError::NoBranch));
    assert_eq!(consider(base, 0, &other.entries[1..]), Err(LogError::NoBranch));
    assert_eq!(consider(base, 1, &other.entries), Err(LogError::NoBranch));
    assert_eq!(consider(&log.states[0], 1, &other.entries[1..]), Err(LogError::NoBranch));
    // One that does not hold makes all of the branch void.
    let stranger = key("stranger");
    let forged = LogEntry::Entry(stranger.sign(&other.next(vec![revoke(AgentId(bytes("a")))])));
    let branch = [other.entries[1].clone(), forged];
    assert_eq!(consider(base, 1, &branch), Err(LogError::Signer));
    let unsigned = LogEntry::Entry(stranger.sign(&log.cut(1).next(vec![CRITICAL])));
    assert_eq!(consider(base, 1, &[unsigned]), Err(LogError::Signer));
}

#[test]
fn a_log_takes_eight_branches_and_then_nobody_counts() {
    let world = World::new();
    let (owner, second) = (&world.signer, key("second"));
    let base = Log::with_owners(&world, &[&second]);
    let agent = certified_by(&world, owner, "agent", 1);
    let mut log = base.clone();
    log.push(owner, vec![OPTIONAL]);
    let branch = |time| {
        let mut branch = base.clone();
        let first = branch.push_at(time, &second, vec![OPTIONAL]);
        (branch, first)
    };
    let most = MAX_BRANCHES as u64;
    let firsts: Vec<_> = (0..most)
        .map(|time| {
            trusted(log.state(), &agent);
            let (branch, first) = branch(time);
            log.see(&branch);
            first
        })
        .collect();
    assert_eq!(log.state().branches().count(), MAX_BRANCHES);
    // A ninth could hold any revocation.
    let (ninth, _) = branch(most);
    assert_eq!(log.consider(&ninth), Err(LogError::TooManyBranches));
    distrusted(log.state(), &agent, TrustError::IssuerUnknown);
    assert!(log.consider(&branch(0).0).is_ok());
    log.abandon(owner, firsts[..1].to_vec());
    trusted(log.state(), &agent);
    log.see(&ninth);
    distrusted(log.state(), &agent, TrustError::IssuerUnknown);
}

#[test]
fn lists_of_an_entry_are_bounded() {
    let world = World::new();
    let log = Log::new(&world);
    let owner = &world.signer;
    let decode = |entry: &Entry| Entry::decode(&entry.encode()).map(|_| ());
    let too_many = |field| Err(ObjectError::Cbor(CborError::Type(field)));
    let hashes = |count: usize| {
        let hash = |number: usize| -> [u8; 32] { bytes(&number.to_string()) };
        sorted((0..count).map(hash).collect())
    };

    let changes = |count| log.next(vec![OPTIONAL; count]);
    assert_eq!(decode(&changes(MAX_CHANGES)), Ok(()));
    assert_eq!(decode(&changes(MAX_CHANGES + 1)), too_many(5));
    assert_eq!(decode(&changes(0)), Err(ObjectError::Value(5)));

    let abandons = |count| {
        let abandons = hashes(count).into_iter().map(EntryHash).collect();
        Entry { abandons, ..changes(1) }
    };
    assert_eq!(decode(&abandons(MAX_ABANDONED)), Ok(()));
    assert_eq!(decode(&abandons(MAX_ABANDONED + 1)), too_many(6));

    let kept = |count| hashes(count).into_iter().map(ObjectHash).collect::<Vec<_>>();
    for keep in [
        |keep| Change::RemoveSigner { key: bytes_key("a"), keep },
        |keep| Change::CloseCredential { credential_id: CredentialId([1; 16]), keep },
    ] {
        assert_eq!(decode(&log.next(vec![keep(kept(MAX_KEPT))])), Ok(()));
        assert_eq!(decode(&log.next(vec![keep(kept(MAX_KEPT + 1))])), too_many(2));
    }
    let recovery = |keep| Recovery { keep, ..log.recovery(&world, 1, &[owner]) };
    let decode = |recovery: &Recovery| Recovery::decode(&recovery.encode()).map(|_| ());
    assert_eq!(decode(&recovery(kept(MAX_KEPT))), Ok(()));
    assert_eq!(decode(&recovery(kept(MAX_KEPT + 1))), too_many(7));
    let keys: Vec<_> = (0..=MAX_SIGNERS).map(|number| key(&format!("signer {number}"))).collect();
    let keys: Vec<_> = keys.iter().collect();
    assert_eq!(decode(&log.recovery(&world, 1, &keys[..MAX_SIGNERS])), Ok(()));
    assert_eq!(decode(&log.recovery(&world, 1, &keys)), too_many(5));
    assert_eq!(decode(&log.recovery(&world, 0, &[owner])), Err(ObjectError::Value(2)));
    assert_eq!(decode(&log.recovery(&world, 1, &[])), Err(ObjectError::Value(5)));
}

fn bytes_key(label: &str) -> connect_spec::keys::IdentityKey {
    connect_spec::keys::IdentityKey(bytes(label))
}

#[test]
fn there_are_sixty_four_signers_at_most() {
    let world = World::new();
    let owner = &world.signer;
    let mut log = Log::new(&world);
    let keys: Vec<_> = (1..=MAX_SIGNERS).map(|number| key(&format!("signer {number}"))).collect();
    for key in &keys[..MAX_SIGNERS - 1] {
        log.push(owner, vec![add(key, ADMIN)]);
    }
    assert_eq!(log.state().signers().count(), MAX_SIGNERS);
    let last = &keys[MAX_SIGNERS - 1];
    refused(&log, &[owner], vec![add(last, ADMIN)], LogError::TooManySigners);
    accepted(&log, &[owner], vec![add(&keys[0], OWNER)]);
    accepted(&log, &[owner], vec![remove(&keys[0], vec![]), add(last, ADMIN)]);
}

#[test]
fn an_entry_has_forty_kibibytes_at_most_and_fits_every_message() {
    let world = World::new();
    let log = Log::new(&world);
    let sized = |size: usize| {
        let entry = log.next(vec![OPTIONAL]);
        let with = |padding: usize| {
            FieldsWriter::new()
                .uint(0, 1u8)
                .bytes(1, &entry.workspace_id.0)
                .uint(2, entry.seq)
                .bytes(3, &entry.prev.0)
                .uint(4, entry.time)
                .maps(5, [FieldsWriter::new().uint(0, 128u8)].into_iter())
                .bytes(64, &vec![0; padding])
                .finish()
        };
        let body = with(size - (with(1000).len() - 1000));
        assert_eq!(body.len(), size);
        let signers: Vec<_> = (0..16).map(|number| key(&number.to_string())).collect();
        let sign = |key: &SigningKey| (key.public(), key.sign_text("entry", &body));
        let signatures = signers.iter().map(sign).collect();
        Signed::<Entry>::new(body, signatures)
    };
    let longest = LogEntry::Entry(sized(MAX_ENTRY_BYTES).unwrap()).encode();
    assert!(LogEntry::decode(&longest).is_ok());
    let over = sized(MAX_ENTRY_BYTES + 1).err();
    assert_eq!(over, Some(ObjectError::TooLong(MAX_ENTRY_BYTES)));
    let mut body = Vec::new();
    assert!(put_trust_entry(&mut body, &longest));
    let reply = connect_spec::control::FromHub::Reply {
        id: u64::MAX,
        reply: connect_spec::control::Reply::Log {
            after: Head { seq: u64::MAX, hash: EntryHash([0xff; 32]) },
            entries: vec![connect_spec::bytes::Blob(longest)],
            more: false,
        },
    };
    assert!(connect_spec::control::encode(&reply).len() <= connect_spec::limits::MAX_CONTROL_BYTES);
}

#[test]
fn a_log_has_a_hundred_thousand_entries_at_most() {
    let world = World::new();
    let owner = &world.signer;
    let at = |seq: u64| {
        let state = patched(&world.trust, &["head", "seq"], seq);
        Log { states: vec![state], ..Log::new(&world) }
    };
    let mut log = at(MAX_LOG_ENTRIES - 1);
    log.push(owner, vec![OPTIONAL]);
    assert_eq!(log.head().seq, MAX_LOG_ENTRIES);
    refused(&log, &[owner], vec![OPTIONAL], LogError::Full);
    let recovery = log.recovery(&world, 1, &[owner]);
    let recovery = LogEntry::Recovery(world.recovery_signer().sign(&recovery));
    assert_eq!(log.judge_wire(&recovery).err(), Some(LogError::Full));
}

#[test]
fn a_log_has_sixty_four_mebibytes_at_most() {
    let world = World::new();
    let owner = &world.signer;
    let log = Log::new(&world);
    let length = log.next(vec![OPTIONAL]).encode().len() as u64;
    let at = |bytes: u64| {
        let state = patched(&world.trust, &["bytes"], bytes);
        Log { states: vec![state], ..Log::new(&world) }
    };
    let state = accepted(&at(MAX_LOG_BYTES - length), &[owner], vec![OPTIONAL]);
    assert_eq!(state, patched(&state, &["bytes"], MAX_LOG_BYTES));
    refused(&at(MAX_LOG_BYTES - length + 1), &[owner], vec![OPTIONAL], LogError::Full);
    // All bodies count, and nothing else does.
    let second = key("second");
    let mut twice = Log::with_owners(&world, &[&second]);
    let counted = |log: &Log| serde_json::to_value(log.state()).unwrap()["bytes"].as_u64();
    let before = counted(&twice).unwrap();
    let next = twice.next(vec![OPTIONAL]);
    twice.push_entry(&[owner, &second], &next);
    assert_eq!(counted(&twice), Some(before + next.encode().len() as u64));
}

#[test]
fn trust_records_are_bounded() {
    let place = |seq| Head { seq, hash: EntryHash([7; 32]) };
    let get = |count: u64| {
        let mut record = Vec::new();
        Record::TrustGet((0..count).map(|n| place(100 - n)).collect()).encode(&mut record);
        Record::decode(&record).map(|_| ())
    };
    assert_eq!(get(0), Ok(()));
    assert_eq!(get(MAX_LOCATOR as u64), Ok(()));
    assert_eq!(get(MAX_LOCATOR as u64 + 1), Err(RecordError::Value(0x04)));

    let trust = |entries: &[u8]| {
        let mut record = Vec::new();
        Record::Trust { more: false, entries }.encode(&mut record);
        Record::decode(&record).map(|_| ())
    };
    let mut entries = Vec::new();
    assert!(!put_trust_entry(&mut entries, &[7; MAX_TRUST_BYTES - 3]));
    assert!(put_trust_entry(&mut entries, &[7; MAX_TRUST_BYTES - 4 - 5]));
    assert!(!put_trust_entry(&mut entries, &[7; 2]));
    assert!(put_trust_entry(&mut entries, &[7; 1]));
    assert_eq!(entries.len(), MAX_TRUST_BYTES);
    assert_eq!(trust(&entries), Ok(()));
    assert_eq!(trust_entries(&entries).unwrap().last(), Some(&&[7][..]));
    entries.truncate(entries.len() - 1);
    assert_eq!(trust(&entries), Err(RecordError::Value(0x05)));
    let mut entries = Vec::new();
    entries.extend(u32::try_from(MAX_TRUST_BYTES - 3).unwrap().to_be_bytes());
    entries.resize(MAX_TRUST_BYTES + 1, 7);
    assert_eq!(trust(&entries), Err(RecordError::Value(0x05)));
}

#[test]
fn a_beat_is_signed_by_its_witness() {
    let world = World::new();
    let agent = world.member("agent");
    let beat =
        Beat { workspace_id: world.workspace, agent_id: agent.id(), head: world.head(), time: NOW };
    let signed = agent.identity.sign(&beat);
    let read = Signed::<Beat>::decode(&signed.encode()).unwrap();
    assert_eq!(read.object(), &beat);
    assert!(read.verify_by(&agent.identity.public()).is_ok());
    assert!(read.verify_by(&world.signer.public()).is_err());
}

/// Who may appear in a random log, by number.
struct Cast {
    world: World,
    keys: Vec<SigningKey>,
    shares: Vec<Admission>,
    agents: Vec<Agent>,
}

impl Cast {
    fn new() -> Self {
        let world = World::new();
        let mut keys = vec![SigningKey::from_seed(world.signer.seed().clone())];
        keys.extend(["one", "two", "three", "four"].map(key));
        let shares: Vec<_> = ["x", "y"]
            .into_iter()
            .enumerate()
            .map(|(number, name)| admitted_by(&world, &keys[number], name, CredentialKind::Invite))
            .collect();
        let mut agents = Vec::new();
        for issuer in &keys {
            agents.push(certified_by(&world, issuer, "one", 1));
            agents.push(certified_by(&world, issuer, "three", 5));
            agents.push(certified_by(&world, issuer, "plain", 3));
        }
        for share in &shares {
            agents.push(world.joined("four", share));
            agents.push(world.joined("plain", share));
        }
        Self { world, keys, shares, agents }
    }

    /// A log with owners and an admin, so that much can go wrong.
    fn log(&self) -> Log {
        let mut log = Log::with_owners(&self.world, &[&self.keys[1], &self.keys[2]]);
        log.push(&self.keys[0], vec![add(&self.keys[3], ADMIN)]);
        log
    }

    fn keep(&self, bits: u8) -> Vec<ObjectHash> {
        let of = |(number, agent): (usize, &Agent)| {
            let chosen = bits >> (number % 8) & 1 == 1;
            chosen.then(|| certificate_hash(agent))
        };
        let shares = self.shares.iter().filter(|_| bits & 4 == 0).map(credential_hash);
        sorted(self.agents.iter().enumerate().filter_map(of).chain(shares).collect())
    }

    fn change(&self, log: &Log, (kind, who, detail): Step) -> Change {
        let key = &self.keys[usize::from(who) % self.keys.len()];
        let agent = &self.agents[usize::from(who) % self.agents.len()];
        match kind {
            0 => add(key, OWNER),
            1 => add(key, ADMIN),
            2 => remove(key, self.keep(detail)),
            3 => revoke(log.agent(key)),
            4 => revoke(agent.id()),
            5 => Change::RevokeAgent {
                agent_id: agent.id(),
                below_serial: Some(u64::from(detail % 7)),
            },
            6 => close(&self.shares[usize::from(who) % self.shares.len()], self.keep(detail)),
            7 => Change::EpochKey { epoch: log.state().epoch() + 1, commit: bytes("commit") },
            8 => Change::Policy(Policy { strict: true }),
            9 => Change::Policy(Policy::default()),
            10 => CRITICAL,
            _ => OPTIONAL,
        }
    }

    /// Tries to append an entry, checks what must hold whether it succeeds or not, and tells which.
    fn step(&self, log: &mut Log, (signer, time, steps): &Move) -> bool {
        let changes: Vec<_> = steps.iter().map(|step| self.change(log, *step)).collect();
        let entry = Entry { time: u64::from(*time), ..log.next(changes) };
        let by = &self.keys[usize::from(*signer) % self.keys.len()];
        let wire = LogEntry::Entry(by.sign(&entry));
        assert_eq!(LogEntry::decode(&wire.encode()).as_ref(), Ok(&wire));
        let before = log.state().clone();
        let mut state = before.clone();
        let outcome = state.apply(&wire);
        let mut stored = restored(&before);
        assert_eq!(stored.apply_stored(&wire), outcome);
        assert_eq!(stored, state);
        assert_eq!(restored(&state), state);
        if outcome.is_err() {
            assert_eq!(state, before);
            return false;
        }
        assert_eq!(state.head(), wire.head());
        assert_eq!(state.head().seq, before.head().seq + 1);
        self.nothing_came_back(&before, &state);
        if !state.is_frozen() {
            assert!(owns(log, &state), "an owner is left");
        }
        log.states.push(state);
        log.entries.push(wire);
        true
    }

    fn ids(&self, workspace: WorkspaceId) -> BTreeSet<AgentId> {
        let of_key = |key: &SigningKey| AgentId::of(&workspace, &key.public());
        self.keys.iter().map(of_key).chain(self.agents.iter().map(Agent::id)).collect()
    }

    /// What is revoked and what is closed stays so.
    fn nothing_came_back(&self, before: &TrustState, after: &TrustState) {
        for id in self.ids(before.workspace_id()) {
            for serial in [0, 1, 3, 5, 6, u64::MAX] {
                assert!(!before.is_revoked(&id, serial) || after.is_revoked(&id, serial));
            }
        }
        for share in &self.shares {
            let id = share.credential.object().id();
            assert!(!before.is_closed(&id) || after.is_closed(&id));
        }
        for agent in &self.agents {
            let ended = [Some(TrustError::Revoked), Some(TrustError::Closed)];
            if ended.contains(&verdict(before, agent, NOW)) {
                assert_ne!(verdict(after, agent, NOW), None);
            }
        }
    }

    /// All that one can be asked about who is trusted.
    fn judgement(&self, state: &TrustState) -> impl PartialEq + std::fmt::Debug + use<> {
        let roles: Vec<_> = self.keys.iter().map(|key| state.signer_role(&key.public())).collect();
        let agents: Vec<_> = self.agents.iter().map(|agent| verdict(state, agent, NOW)).collect();
        let closed: Vec<_> = self
            .shares
            .iter()
            .map(|share| state.is_closed(&share.credential.object().id()))
            .collect();
        (state.is_forked(), state.policy(), roles, agents, closed)
    }
}

/// Whether the log has an owner when forks are left aside.
fn owns(log: &Log, state: &TrustState) -> bool {
    state.is_forked() || log.states[0].is_forked() || state.signers().any(|(_, role)| role == OWNER)
}

type Step = (u8, u8, u8);
type Move = (u8, u8, Vec<Step>);

fn moves(kinds: std::ops::Range<u8>, most: usize) -> impl Strategy<Value = Vec<Move>> {
    let step = (kinds, any::<u8>(), any::<u8>());
    // Mostly the owners of the beginning, sometimes another.
    let signer = prop_oneof![4 => 0u8..3, 1 => 3u8..5];
    let one = (signer, any::<u8>(), proptest::collection::vec(step, 1..4));
    proptest::collection::vec(one, 0..most)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn an_entry_applies_whole_or_not_at_all(moves in moves(0..12, 12)) {
        let cast = Cast::new();
        let mut log = cast.log();
        for one in &moves {
            cast.step(&mut log, one);
        }
    }

    /// Roles only fall, the policy only hardens and nobody returns here: on its own branch an agent sees
    /// where they end, not every value that they had.
    #[test]
    fn whoever_saw_the_same_branches_judges_alike(
        common in moves(0..10, 4),
        branches in proptest::collection::vec(moves(1..9, 4), 2..=3),
        inner in any::<bool>(),
        middle in 0usize..3,
    ) {
        let cast = Cast::new();
        let mut base = cast.log();
        common.iter().for_each(|one| { cast.step(&mut base, one); });
        let mut logs: Vec<Log> = Vec::new();
        for (number, moves) in (0u8..).zip(&branches) {
            // The third may leave the second in its middle.
            let mut log = match logs.get(1) {
                Some(second) if inner => second.cut((base.entries.len() + middle).min(second.entries.len())),
                _ => base.clone(),
            };
            for (signer, _, steps) in moves {
                let returns = |(kind, who, _): &Step| {
                    let key = cast.keys[usize::from(*who) % cast.keys.len()].public();
                    *kind == 1 && base.state().is_signer(&key) && !log.state().is_signer(&key)
                };
                if !steps.iter().any(returns) {
                    cast.step(&mut log, &(*signer, number, steps.clone()));
                }
            }
            logs.push(log);
        }
        let mut judgements = Vec::new();
        let orders: &[&[usize]] = match logs.len() {
            2 => &[&[0, 1], &[1, 0]],
            _ => &[&[0, 1, 2], &[0, 2, 1], &[1, 0, 2], &[1, 2, 0], &[2, 0, 1], &[2, 1, 0]],
        };
        for order in orders {
            let mut seen = logs[order[0]].clone();
            for other in &order[1..] {
                let before = seen.state().clone();
                // A part of it, then all of it, then again.
                let shown = &logs[*other];
                seen.see(&shown.cut(shown.entries.len().saturating_sub(1)));
                seen.see(shown);
                let after = seen.state().clone();
                seen.see(shown);
                prop_assert_eq!(seen.state(), &after);
                prop_assert_eq!(&restored(&after), &after);
                cast.nothing_came_back(&before, &after);
            }
            judgements.push(cast.judgement(seen.state()));
        }
        for judgement in &judgements {
            prop_assert_eq!(judgement, &judgements[0]);
        }
    }
}
