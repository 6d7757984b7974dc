//! Sequences of entries, forks and recoveries: four bytes of input are one thing that happens.
//!
//! The keys are fixed, so that what is signed is judged and not merely refused.

use std::sync::OnceLock;

use connect_spec::{
    ids::{AgentId, CredentialId, WorkspaceId},
    keys::{IdentityKey, Signature, signed_text},
    limits::MAX_BRANCHES,
    log::{Change, Entry, EntryHash, Head, LogEntry, ObjectHash, Policy, Recovery},
    objects::{Founder, Genesis, SUITE_1, SignerRole},
    signed::{Body, Signed},
    trust::{Considered, LogError, TrustState},
};
use ed25519_dalek::{Signer as _, SigningKey};

/// Founders, then who may become signers.
const KEYS: u8 = 5;
const RECOVERY: u8 = 100;
/// More of them would only be slower.
const MOST_STEPS: usize = 24;

fn key(number: u8) -> SigningKey {
    SigningKey::from_bytes(&[number + 1; 32])
}

fn public(number: u8) -> IdentityKey {
    static KEYS_OF: OnceLock<Vec<IdentityKey>> = OnceLock::new();
    let all = KEYS_OF.get_or_init(|| {
        (0..=RECOVERY).map(|number| IdentityKey(key(number).verifying_key().to_bytes())).collect()
    });
    all[usize::from(number)]
}

fn signed<T: Body>(object: &T, by: &[u8]) -> Signed<T> {
    let body = object.encode();
    let text = signed_text(T::KIND, &body);
    let sign = |number: &u8| (public(*number), Signature(key(*number).sign(&text).to_bytes()));
    Signed::new(body, by.iter().map(sign).collect()).expect("operations are within the limits")
}

fn founders(numbers: impl IntoIterator<Item = u8>) -> Vec<Founder> {
    let founder = |number| Founder { key: public(number), role: SignerRole::Owner };
    let mut founders: Vec<_> = numbers.into_iter().map(founder).collect();
    founders.sort_by_key(|founder| founder.key);
    founders
}

/// The state at a genesis with three owners.
fn beginning() -> &'static TrustState {
    static BEGINNING: OnceLock<TrustState> = OnceLock::new();
    BEGINNING.get_or_init(|| {
        let genesis = Genesis {
            suite: SUITE_1,
            salt: [7; 16],
            founders: founders(0..3),
            recovery_key: public(RECOVERY),
            epoch_commit: [8; 32],
        };
        let genesis = signed(&genesis, &[0, 1, 2]);
        TrustState::from_genesis(WorkspaceId(genesis.hash()), &genesis).expect("a sound genesis")
    })
}

/// One agent's log.
#[derive(Clone)]
struct Log {
    /// After the genesis and each entry, for one who saw nothing else.
    plain: Vec<TrustState>,
    entries: Vec<LogEntry>,
    /// With the branches that were seen.
    state: TrustState,
}

impl Log {
    fn new() -> Self {
        let state = beginning().clone();
        Self { plain: vec![state.clone()], entries: Vec::new(), state }
    }

    fn head(&self) -> Head {
        self.state.head()
    }

    fn cut(&self, seq: usize) -> Self {
        let plain = self.plain[..=seq].to_vec();
        let state = plain[seq].clone();
        Self { plain, entries: self.entries[..seq].to_vec(), state }
    }

    fn common(&self, other: &Self) -> usize {
        let same = |(ours, theirs): &(&LogEntry, &LogEntry)| ours.hash() == theirs.hash();
        self.entries.iter().zip(&other.entries).take_while(same).count()
    }

    /// Appends an entry, if it holds.
    fn push(&mut self, entry: LogEntry) {
        assert_eq!(LogEntry::decode(&entry.encode()).as_ref(), Ok(&entry));
        let mut plain = self.plain.last().expect("there is the genesis").clone();
        let outcome = plain.apply(&entry);
        let mut state = self.state.clone();
        assert_eq!(state.apply_stored(&entry), outcome, "what else was seen changes no verdict");
        if outcome.is_err() {
            assert_eq!(state, self.state);
            assert_eq!(Some(&plain), self.plain.last());
            return;
        }
        assert_eq!(state.head(), entry.head());
        assert_eq!(state.head().seq, self.head().seq + 1);
        nothing_came_back(&self.state, &state);
        let owned = plain.signers().any(|(_, role)| role == SignerRole::Owner);
        assert!(owned || plain.is_frozen());
        self.plain.push(plain);
        self.entries.push(entry);
        self.state = state;
    }

    /// Sees another log, as an agent does.
    fn see(&mut self, other: &Self) {
        let after = self.common(other);
        let (Some(held), Some(_)) = (self.entries.get(after), other.entries.get(after)) else {
            return;
        };
        let branch = &other.entries[after..];
        let (state, replaced) = match self.state.consider(&self.plain[after], held, branch) {
            Ok(Considered::Settled) => return,
            Ok(Considered::Forked(state)) => (*state, false),
            Ok(Considered::Replaces(state)) => (*state, true),
            Err(error) => {
                assert_eq!(error, LogError::TooManyBranches, "the branch holds by itself");
                assert!(self.state.branches().count() >= MAX_BRANCHES);
                return;
            }
        };
        nothing_came_back(&self.state, &state);
        if replaced {
            assert_eq!(state.head(), other.head());
            *self = Self { state, ..other.clone() };
            return;
        }
        assert_eq!(state.head(), self.head());
        self.state = state;
        match self.state.consider(&self.plain[after], held, branch) {
            Ok(Considered::Forked(again)) => assert_eq!(*again, self.state),
            again => assert_eq!(again, Ok(Considered::Settled)),
        }
    }
}

fn credential(number: u8) -> CredentialId {
    CredentialId([number % 2; 16])
}

/// What is revoked and what is closed stays so.
fn nothing_came_back(before: &TrustState, after: &TrustState) {
    let workspace = before.workspace_id();
    for number in 0..KEYS {
        let agent = AgentId::of(&workspace, &public(number));
        for serial in [0, 1, 3, u64::MAX] {
            assert!(!before.is_revoked(&agent, serial) || after.is_revoked(&agent, serial));
        }
        let credential = credential(number);
        assert!(!before.is_closed(&credential) || after.is_closed(&credential));
    }
}

fn change(log: &Log, kind: u8, who: u8) -> Change {
    let key = public(who % KEYS);
    let agent_id = AgentId::of(&log.state.workspace_id(), &key);
    let keep = if who & 0x40 == 0 { vec![] } else { vec![ObjectHash([who; 32])] };
    match kind % 11 {
        0 => Change::AddSigner { key, role: SignerRole::Owner },
        1 => Change::AddSigner { key, role: SignerRole::Admin },
        2 => Change::RemoveSigner { key, keep },
        3 => Change::RevokeAgent { agent_id, below_serial: None },
        4 => Change::RevokeAgent { agent_id, below_serial: Some(u64::from(who >> 5)) },
        5 => Change::CloseCredential { credential_id: credential(who), keep },
        6 => Change::EpochKey { epoch: log.state.epoch() + 1, commit: [9; 32] },
        7 => Change::EpochKey { epoch: u32::from(who), commit: [9; 32] },
        8 => Change::Policy(Policy { strict: who & 1 == 1 }),
        9 => Change::Unknown(100 + u64::from(who)),
        _ => Change::Unknown(200),
    }
}

/// An entry by the key in the low bits of `signer`, and by a second one if a high bit is set.
fn entry(log: &Log, other: &Log, signer: u8, kind: u8, who: u8) -> LogEntry {
    let mut changes = vec![change(log, kind & 0x0f, who)];
    if kind & 0x80 != 0 {
        changes.push(change(log, kind >> 4 & 0x07, who.rotate_left(3)));
    }
    let mut abandons: Vec<EntryHash> = Vec::new();
    if signer & 0x40 != 0 {
        let first = other.entries.get(log.common(other)).map(LogEntry::hash);
        abandons.extend(first);
        abandons.extend(log.state.branches().map(|(first, _)| first));
        abandons.sort();
        abandons.dedup();
    }
    let entry = Entry {
        workspace_id: log.state.workspace_id(),
        seq: log.head().seq + 1,
        prev: log.head().hash,
        time: u64::from(signer),
        changes,
        abandons,
    };
    let (one, two) = (signer % KEYS, (signer >> 3) % KEYS);
    let both = signer & 0x80 != 0 && one != two;
    let by: &[u8] = if both { &[one, two] } else { &[one] };
    LogEntry::Entry(signed(&entry, by))
}

/// A recovery, by its key unless `by` says otherwise.
fn recovery(log: &Log, by: u8, counter: u8, signers: u8) -> LogEntry {
    let recovery = Recovery {
        workspace_id: log.state.workspace_id(),
        counter: u64::from(counter % 8) + 1,
        base: log.head(),
        signers: founders([signers % KEYS]),
        recovery_key: public(if signers & 0x80 == 0 { RECOVERY } else { signers % KEYS }),
        keep: vec![],
        time: 0,
    };
    LogEntry::Recovery(signed(&recovery, &[if by & 1 == 0 { RECOVERY } else { by % KEYS }]))
}

/// Entries apply whole or not at all, one after the other, and what they end does not come back; forks
/// are judged by what was seen, and never panic.
pub(crate) fn run(input: &[u8]) {
    let (steps, _) = input.as_chunks::<4>();
    if steps.is_empty() {
        return;
    }
    let [mut left, mut right] = [Log::new(), Log::new()];
    for [action, one, two, three] in steps.iter().take(MOST_STEPS) {
        match action % 8 {
            0 | 1 => left.push(entry(&left, &right, *one, *two, *three)),
            2 | 3 => right.push(entry(&right, &left, *one, *two, *three)),
            4 => right = left.cut(usize::from(*one) % left.plain.len()),
            5 => left.see(&right),
            6 => right.see(&left),
            _ if one & 0x80 == 0 => left.push(recovery(&left, *one, *two, *three)),
            _ => right.push(recovery(&right, *one, *two, *three)),
        }
    }
}
