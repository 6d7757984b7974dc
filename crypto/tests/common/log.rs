//! A trust log under construction, with the state after each of its entries.

use connect_crypto::keys::SigningKey;
use connect_spec::{
    ids::{AgentId, WorkspaceId},
    log::{Change, Entry, EntryHash, Head, LogEntry, ObjectHash, Recovery},
    objects::{Founder, SignerRole, UnixTime},
    signed::{Body, Signed},
    trust::{Considered, LogError, TrustState},
};

use super::{NOW, World, secret};

/// The key of a signer or an agent by its name.
pub fn key(name: &str) -> SigningKey {
    SigningKey::from_seed(secret(&format!("{name} identity")))
}

/// A list of a signed body: ascending, none twice.
pub fn sorted<T: Ord>(mut list: Vec<T>) -> Vec<T> {
    list.sort();
    list.dedup();
    list
}

pub fn add(key: &SigningKey, role: SignerRole) -> Change {
    Change::AddSigner { key: key.public(), role }
}

pub fn remove(key: &SigningKey, keep: Vec<ObjectHash>) -> Change {
    Change::RemoveSigner { key: key.public(), keep: sorted(keep) }
}

pub fn revoke(agent_id: AgentId) -> Change {
    Change::RevokeAgent { agent_id, below_serial: None }
}

/// Signs a body by some keys, whatever they are.
pub fn sign_by<T: Body>(by: &[&SigningKey], object: &T) -> Signed<T> {
    let body = object.encode();
    let sign = |key: &&SigningKey| (key.public(), key.sign_text(T::KIND, &body));
    let signatures = by.iter().map(sign).collect();
    Signed::new(body, signatures).expect("an object that its own kind admits")
}

#[derive(Clone)]
pub struct Log {
    pub workspace: WorkspaceId,
    /// After the genesis, and after each entry.
    pub states: Vec<TrustState>,
    pub entries: Vec<LogEntry>,
}

impl Log {
    pub fn new(world: &World) -> Self {
        let states = vec![world.trust.clone()];
        Self { workspace: world.workspace, states, entries: Vec::new() }
    }

    /// A log whose founder made owners of others.
    pub fn with_owners(world: &World, owners: &[&SigningKey]) -> Self {
        let mut log = Self::new(world);
        for owner in owners {
            log.push(&world.signer, vec![add(owner, SignerRole::Owner)]);
        }
        log
    }

    pub fn state(&self) -> &TrustState {
        self.states.last().expect("there is the genesis")
    }

    pub fn head(&self) -> Head {
        self.state().head()
    }

    pub fn agent(&self, key: &SigningKey) -> AgentId {
        AgentId::of(&self.workspace, &key.public())
    }

    /// The next entry, not signed yet.
    pub fn next(&self, changes: Vec<Change>) -> Entry {
        Entry {
            workspace_id: self.workspace,
            seq: self.head().seq + 1,
            prev: self.head().hash,
            time: NOW,
            changes,
            abandons: Vec::new(),
        }
    }

    /// What the log makes of an entry; it stays as it is.
    pub fn judge(&self, by: &[&SigningKey], entry: &Entry) -> Result<TrustState, LogError> {
        self.judge_wire(&LogEntry::Entry(sign_by(by, entry)))
    }

    pub fn judge_wire(&self, entry: &LogEntry) -> Result<TrustState, LogError> {
        let mut state = self.state().clone();
        state.apply(entry).map(|()| state)
    }

    pub fn try_push(&mut self, entry: LogEntry) -> Result<(), LogError> {
        let state = self.judge_wire(&entry)?;
        self.states.push(state);
        self.entries.push(entry);
        Ok(())
    }

    #[track_caller]
    pub fn push_entry(&mut self, by: &[&SigningKey], entry: &Entry) -> EntryHash {
        let entry = LogEntry::Entry(sign_by(by, entry));
        let hash = entry.hash();
        self.try_push(entry).expect("a sound entry");
        hash
    }

    /// Appends an entry that holds, and tells its hash.
    #[track_caller]
    pub fn push(&mut self, by: &SigningKey, changes: Vec<Change>) -> EntryHash {
        self.push_entry(&[by], &self.next(changes))
    }

    /// As [`Log::push`], at another time: the same changes in another entry.
    #[track_caller]
    pub fn push_at(&mut self, time: UnixTime, by: &SigningKey, changes: Vec<Change>) -> EntryHash {
        self.push_entry(&[by], &Entry { time, ..self.next(changes) })
    }

    /// Appends an entry that gives up branches.
    #[track_caller]
    pub fn abandon(&mut self, by: &SigningKey, firsts: Vec<EntryHash>) -> EntryHash {
        let entry = self.next(vec![Change::Unknown(200)]);
        self.push_entry(&[by], &Entry { abandons: sorted(firsts), ..entry })
    }

    /// A recovery that follows the head.
    pub fn recovery(&self, world: &World, counter: u64, signers: &[&SigningKey]) -> Recovery {
        let founder = |key: &&SigningKey| Founder { key: key.public(), role: SignerRole::Owner };
        let mut signers: Vec<_> = signers.iter().map(founder).collect();
        signers.sort_by_key(|signer| signer.key);
        Recovery {
            workspace_id: self.workspace,
            counter,
            base: self.head(),
            signers,
            recovery_key: world.recovery.public(),
            keep: Vec::new(),
            time: NOW,
        }
    }

    #[track_caller]
    pub fn recover(&mut self, world: &World, counter: u64, signers: &[&SigningKey]) -> EntryHash {
        let recovery = self.recovery(world, counter, signers);
        let entry = LogEntry::Recovery(sign_by(&[&world.recovery_signer()], &recovery));
        let hash = entry.hash();
        self.try_push(entry).expect("a sound recovery");
        hash
    }

    /// The log up to an entry, to go on in another way.
    pub fn cut(&self, seq: usize) -> Self {
        let mut cut = self.clone();
        cut.states.truncate(seq + 1);
        cut.entries.truncate(seq);
        cut
    }

    /// The number of the last entry that both logs have.
    pub fn common(&self, other: &Self) -> usize {
        let same = |(ours, theirs): &(&LogEntry, &LogEntry)| ours.hash() == theirs.hash();
        self.entries.iter().zip(&other.entries).take_while(same).count()
    }

    /// What this log makes of another one that leaves it somewhere.
    pub fn consider(&self, other: &Self) -> Result<Considered, LogError> {
        let after = self.common(other);
        let held = self.entries.get(after).ok_or(LogError::NoBranch)?;
        self.state().consider(&self.states[after], held, &other.entries[after..])
    }

    /// Takes over what another log shows, as an agent does.
    #[track_caller]
    pub fn see(&mut self, other: &Self) {
        let after = self.common(other);
        if after == self.entries.len() {
            for entry in &other.entries[after..] {
                self.try_push(entry.clone()).expect("a longer log");
            }
            return;
        }
        if after == other.entries.len() {
            return;
        }
        match self.consider(other).expect("a branch that holds") {
            Considered::Settled => {}
            Considered::Forked(state) => *self.states.last_mut().expect("some") = *state,
            Considered::Replaces(state) => {
                *self = other.clone();
                *self.states.last_mut().expect("some") = *state;
            }
        }
    }
}

impl World {
    /// The recovery key as one that signs: its seed is the first draw of its randomness.
    pub fn recovery_signer(&self) -> SigningKey {
        let signer = SigningKey::from_seed(secret(&format!("{} recovery 0", self.name)));
        assert_eq!(signer.public(), self.recovery.public());
        signer
    }
}
