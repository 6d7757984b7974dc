//! What is fuzzed: functions of any bytes, each of which panics when a promise does not hold.
//!
//! `targets/` hands them to libFuzzer (`make fuzz`). The tests here replay the corpus and try what is
//! near it, on stable, with each `make test`. Found crashes go to `corpus/` as files, before the fix.

mod channels;
mod engine;
mod files;
mod frames;
mod handshakes;
mod invites;
#[path = "../crypto/tests/common/noise.rs"]
mod noise;
mod opener;
mod requests;
mod routers;
mod sealed;
mod trust_log;
#[path = "../crypto/tests/common/mod.rs"]
mod world;

use connect_spec::{
    audit::{AuditFault, AuditHead, AuditRow, Chain, link},
    check::CheckReport,
    control::{self, FromAgent, FromHub, Reply},
    encoding::{decode_base64, encode_base64},
    ids::WorkspaceId,
    log::{Beat, Entry, LogEntry, Recovery},
    objects::{AgentRecord, Certificate, Credential, Genesis, NoiseKey, ServiceRecord},
    record::{Record, put_trust_entry, trust_entries},
    signed::{Body, Signed},
};

/// A target: accepts any bytes, panics on a broken promise only.
pub type Target = fn(&[u8]);

/// Each target by the name of its program and of its directory under `corpus/`.
pub const TARGETS: [(&str, Target); 17] = [
    ("agent_files", agent_files),
    ("audit_rows", audit_rows),
    ("base64_packet", base64_packet),
    ("channel_machine", channel_machine),
    ("check_report", check_report),
    ("control_frame", control_frame),
    ("data_frames", data_frames),
    ("handshake_reader", handshake_reader),
    ("hub_router", hub_router),
    ("invites", invites),
    ("log_entry", log_entry),
    ("record_decode", record_decode),
    ("record_open", record_open),
    ("rest_inputs", rest_inputs),
    ("sealed_record", sealed_record),
    ("signed_object", signed_object),
    ("trust_log", trust_log),
];

/// A workspace for what belongs to one.
const WORKSPACE: WorkspaceId = WorkspaceId([0x11; 32]);

/// An audit log, as a reply of the hub, or as events of which each line is one.
pub fn audit_rows(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    if let Ok(FromHub::Reply { reply: Reply::Audit { base, head, rows, .. }, .. }) =
        control::decode(text)
    {
        follow(base, head, &rows, Vec::new());
        follow(base, head, &rows, vec![head, base]);
    }
    chain_events(text);
}

/// Whatever the hub sends, it is taken up to a head that is its own, or refused.
fn follow(base: AuditHead, head: AuditHead, rows: &[AuditRow], seen: Vec<AuditHead>) {
    let Ok(mut chain) = Chain::new(WORKSPACE, base, seen) else { return };
    for row in rows {
        if chain.next(row).is_err() {
            return;
        }
        assert_eq!(chain.head(), AuditHead { seq: row.seq, hash: row.hash });
    }
    if chain.check_end(head).is_ok() {
        assert_eq!(chain.head(), head);
    }
}

/// A log of which each row is chained to the one before it is taken as far as its rows are events, and with
/// no other hash.
fn chain_events(text: &str) {
    let mut chain =
        Chain::new(WORKSPACE, AuditHead::EMPTY, Vec::new()).expect("nothing was seen before");
    for event in text.lines() {
        let before = chain.clone();
        let last = before.head();
        let chained = |event: String| {
            let hash = link(&WORKSPACE, &last.hash, last.seq + 1, &event);
            AuditRow { seq: last.seq + 1, hash, event }
        };
        let row = chained(event.to_owned());
        let mut bent = row.clone();
        bent.hash.0[0] ^= 1;
        assert_eq!(before.clone().next(&bent), Err(AuditFault::Changed(row.seq)));
        let Ok(recorded) = chain.next(&row) else {
            assert_eq!(chain.head(), last);
            continue;
        };
        assert_eq!(chain.head(), AuditHead { seq: row.seq, hash: row.hash });
        // Written by this version, it means the same.
        assert_eq!(before.clone().next(&chained(recorded.encode())).as_ref(), Ok(&recorded));
        // Whatever the ids are, looking for them does no harm.
        let _ = recorded.event.ids();
    }
    assert_eq!(chain.check_end(chain.head()), Ok(()));
}

/// A text frame has one spelling: what decodes is spelled the same again.
pub fn base64_packet(input: &[u8]) {
    if let Ok(record) = decode_base64(&mut input.to_vec()) {
        let mut text = Vec::new();
        encode_base64(record, &mut text);
        assert_eq!(text, input);
    }
}

/// A report means the same after it was read and written, and holds nothing that acts on a terminal.
pub fn check_report(input: &[u8]) {
    if let Ok(report) = CheckReport::decode(input) {
        assert_eq!(CheckReport::decode(&report.encode()).as_ref(), Ok(&report));
        for text in [&report.detail, &report.warning].into_iter().flatten() {
            assert!(!text.as_str().contains(char::is_control));
        }
    }
}

/// A control message means the same after a hub has read and written it.
pub fn control_frame(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    if let Ok(message) = control::decode::<FromAgent>(text) {
        assert_eq!(control::decode(&control::encode(&message)), Ok(message));
    }
    if let Ok(message) = control::decode::<FromHub>(text) {
        assert_eq!(control::decode(&control::encode(&message)), Ok(message));
    }
}

/// A record that decodes can be written and means the same; only its padding may differ.
pub fn record_decode(input: &[u8]) {
    if let Ok(record) = Record::decode(input) {
        let mut written = Vec::new();
        record.encode(&mut written);
        if let Record::Trust { entries, .. } = &record {
            // One spelling, and the entries of a peer are read from it.
            assert_eq!(written, input);
            same_entries(entries);
        }
        assert_eq!(Record::decode(&written), Ok(record));
    }
}

fn same_entries(entries: &[u8]) {
    let split = trust_entries(entries).expect("a record that decodes has whole entries");
    let mut joined = Vec::new();
    for entry in split {
        assert!(put_trust_entry(&mut joined, entry));
        log_entry(entry);
    }
    assert_eq!(joined, entries);
}

/// An entry of the trust log has one spelling, and names one place.
pub fn log_entry(input: &[u8]) {
    if let Ok(entry) = LogEntry::decode(input) {
        assert_eq!(entry.encode(), input);
        assert_eq!(LogEntry::decode(&entry.encode()).as_ref(), Ok(&entry));
        let (place, before) = (entry.head(), entry.follows());
        assert_eq!(place.seq, before.seq.saturating_add(1));
        assert_ne!(place.hash, before.hash);
        assert!(!entry.signed_by().is_empty());
        let written = match &entry {
            LogEntry::Entry(entry) => entry.object().changes.len(),
            LogEntry::Recovery(recovery) => recovery.object().signers.len(),
        };
        assert_ne!(written, 0);
    }
}

/// Operations on two logs, four bytes each: entries, forks, recoveries.
pub fn trust_log(input: &[u8]) {
    trust_log::run(input);
}

/// A signed object has one spelling, of whatever kind it is.
pub fn signed_object(input: &[u8]) {
    one_spelling::<AgentRecord>(input);
    one_spelling::<Beat>(input);
    one_spelling::<Certificate>(input);
    one_spelling::<Credential>(input);
    one_spelling::<Entry>(input);
    one_spelling::<Genesis>(input);
    one_spelling::<NoiseKey>(input);
    one_spelling::<Recovery>(input);
    one_spelling::<ServiceRecord>(input);
}

fn one_spelling<T: Body + PartialEq + std::fmt::Debug>(input: &[u8]) {
    if let Ok(signed) = Signed::<T>::decode(input) {
        assert_eq!(signed.encode(), input);
        // Fields of later versions are skipped, so the body may be longer than what is written; its meaning
        // stays. Of a change of a later version only the number is known, and may be that of a known one.
        if T::KIND != Entry::KIND {
            assert_eq!(T::decode(&signed.object().encode()).as_ref(), Ok(signed.object()));
        }
        // Whether it verifies does not matter here, only that looking does no harm.
        let _ = signed.verify_all();
    }
}

/// Codes of invites and shares, and hub addresses: what is taken has one spelling.
pub fn invites(input: &[u8]) {
    invites::run(input);
}

/// A record of a name, an agent or a share, sealed by whoever has the key, opens as PROTOCOL.md says.
pub fn sealed_record(input: &[u8]) {
    sealed::run(input);
}

/// Both messages of a handshake, with anything in them.
pub fn handshake_reader(input: &[u8]) {
    handshakes::run(input);
}

/// Two channels and what happens to them, four bytes each: applications, lost tunnels, hostile records.
pub fn channel_machine(input: &[u8]) {
    channels::run(input);
}

/// Agents of two workspaces at a hub, four bytes for each thing that they do.
pub fn hub_router(input: &[u8]) {
    routers::run(input);
}

/// Heads of frames, masks, and frames through a relay.
pub fn data_frames(input: &[u8]) {
    frames::run(input);
}

/// Records as they come out of a tunnel, by a peer that has its keys or has not.
pub fn record_open(input: &[u8]) {
    opener::run(input);
}

/// A file of an agent's home, in the place of a sound one.
pub fn agent_files(input: &[u8]) {
    files::run(input);
}

/// A path, a query and a header for the REST interface of a hub.
pub fn rest_inputs(input: &[u8]) {
    requests::run(input);
}

/// Seeds of the targets that only their own modules can write: target, name, bytes.
#[must_use]
pub fn seeds() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let of = |target, seeds: Vec<(&'static str, Vec<u8>)>| {
        seeds.into_iter().map(move |(name, seed)| (target, name, seed))
    };
    of("agent_files", files::seeds())
        .chain(of("channel_machine", channels::seeds()))
        .chain(of("data_frames", frames::seeds()))
        .chain(of("handshake_reader", handshakes::seeds()))
        .chain(of("hub_router", routers::seeds()))
        .chain(of("invites", invites::seeds()))
        .chain(of("rest_inputs", requests::seeds()))
        .chain(of("sealed_record", sealed::seeds()))
        .collect()
}
