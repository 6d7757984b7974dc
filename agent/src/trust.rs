//! The agent's own copy of the trust log: on disk, verified, and never behind what it once was.
//!
//! `trust/log-N` holds the entries, each after its length as u32; `trust/head.json` names that file and
//! a place in it that must be there; `trust/state.json` is the state at some place, so that a start
//! verifies nothing again. Other branches of a forked log lie in `evidence/`. Several processes may
//! use the files: each takes `trust/lock` and reads what the others wrote before it writes.

use std::{
    fs::{self, File},
    io::{Read, Seek, SeekFrom, Write},
    os::unix::fs::OpenOptionsExt,
    path::PathBuf,
    sync::Arc,
};

use connect_spec::{
    ids::WorkspaceId,
    limits::MAX_LOG_BYTES,
    log::{self, EntryHash, Head, LogEntry},
    objects::Genesis,
    signed::Signed,
    trust::{Considered, TrustState},
};
use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, ErrorKind, Result},
    home::Home,
};

/// The state is saved when this many entries were added since: reading back that many takes no time
/// that anybody would see.
const SAVE_STATE_EVERY: u64 = 256;

/// Where the log is and how far it must reach, as `trust/head.json` holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Anchor {
    #[serde(flatten)]
    head: Head,
    /// Number of the file; another one when entries were replaced.
    #[serde(default)]
    file: u32,
}

/// One entry in the file.
#[derive(Debug, Clone, Copy)]
struct Place {
    /// Where it begins, with its length.
    offset: u64,
    hash: EntryHash,
}

/// The trust log of one home.
#[derive(Debug)]
pub(crate) struct TrustLog {
    home: Home,
    genesis: Arc<Signed<Genesis>>,
    anchor: Anchor,
    /// Of entry 1 and on.
    places: Vec<Place>,
    /// Length of the file, as far as it is understood.
    end: u64,
    state: Arc<TrustState>,
    /// The entry that the saved state ends with.
    saved: u64,
}

/// What came of entries that were taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Taken {
    /// All of them were known, or nothing comes of them.
    Nothing,
    /// The log grew.
    Grew,
    /// They prove a fork.
    Forked,
    /// They took the place of own entries.
    Replaced,
}

/// Held while a process changes what several processes of a home share.
pub(crate) struct TrustLock {
    _file: File,
}

impl TrustLock {
    pub(crate) fn held_by(file: File) -> Self {
        Self { _file: file }
    }
}

impl TrustLog {
    /// Begins the log of a new home.
    pub(crate) fn create(
        home: &Home,
        anchor: WorkspaceId,
        genesis: Arc<Signed<Genesis>>,
    ) -> Result<Self> {
        let state = TrustState::from_genesis(anchor, &genesis).map_err(Error::trust)?;
        let _lock = home.lock_trust()?;
        home.write("trust/genesis", &genesis.encode())?;
        home.write("trust/log-0", &[])?;
        let anchor = Anchor { head: state.head(), file: 0 };
        home.write_json("trust/head.json", &anchor)?;
        let state = Arc::new(state);
        Ok(Self {
            home: home.clone(),
            genesis,
            anchor,
            places: Vec::new(),
            end: 0,
            state,
            saved: 0,
        })
    }

    /// Reads the log of a home. Nothing is verified again, but that it reaches as far as it did.
    ///
    /// # Errors
    /// [`ErrorKind::TrustViolation`] when the files do not hold together.
    pub(crate) fn load(home: &Home, anchor: WorkspaceId) -> Result<Self> {
        let _lock = home.lock_trust()?;
        Self::read(home, anchor)
    }

    fn read(home: &Home, workspace: WorkspaceId) -> Result<Self> {
        let genesis = Signed::<Genesis>::decode(&home.read("trust/genesis")?)
            .map_err(|_| home.damaged("trust/genesis"))?;
        let begin = TrustState::from_genesis(workspace, &genesis)
            .map_err(|_| home.damaged("trust/genesis"))?;
        let anchor: Anchor = home.read_json("trust/head.json")?;
        let mut log = Self {
            home: home.clone(),
            genesis: Arc::new(genesis),
            anchor,
            places: Vec::new(),
            end: 0,
            state: Arc::new(begin),
            saved: 0,
        };
        // A state that does not fit, as after a change of its format, is only slower to do without; but
        // the other branches that it knows of are nowhere else.
        let saved: Option<TrustState> = home.read_json_if_there("trust/state.json")?;
        let mut unread = log.read_tail()?;
        if let Some(saved) = saved
            && saved.workspace_id() == workspace
            && log.hash_at(saved.head().seq) == Some(saved.head().hash)
        {
            unread.drain(..usize::try_from(saved.head().seq).unwrap_or(usize::MAX));
            log.saved = saved.head().seq;
            log.state = Arc::new(saved);
        }
        log.replay(&unread)?;
        if log.hash_at(anchor.head.seq) != Some(anchor.head.hash) {
            return Err(home.damaged("trust/head.json"));
        }
        Ok(log)
    }

    fn file_name(file: u32) -> String {
        format!("trust/log-{file}")
    }

    fn path(&self) -> PathBuf {
        self.home.path(&Self::file_name(self.anchor.file))
    }

    fn damaged(&self) -> Error {
        self.home.damaged(&Self::file_name(self.anchor.file))
    }

    /// Reads the entries that the file has beyond those known; a last one that a crash cut off is not one.
    fn read_tail(&mut self) -> Result<Vec<LogEntry>> {
        let mut raw = Vec::new();
        let mut file = File::open(self.path())?;
        file.seek(SeekFrom::Start(self.end))?;
        // Envelopes and lengths add to the bodies that the limit counts.
        file.take(2 * MAX_LOG_BYTES).read_to_end(&mut raw)?;
        let mut entries = Vec::new();
        let mut rest = raw.as_slice();
        while let Some((wire, after)) = split_entry(rest) {
            let entry = LogEntry::decode(wire).map_err(|_| self.damaged())?;
            self.places.push(Place { offset: self.end, hash: entry.hash() });
            self.end += (rest.len() - after.len()) as u64;
            entries.push(entry);
            rest = after;
        }
        Ok(entries)
    }

    fn replay(&mut self, entries: &[LogEntry]) -> Result<()> {
        if entries.is_empty() {
            return Ok(());
        }
        let mut state = TrustState::clone(&self.state);
        for entry in entries {
            state.apply_stored(entry).map_err(|_| self.damaged())?;
        }
        self.state = Arc::new(state);
        Ok(())
    }

    /// Takes over what another process of this home wrote meanwhile.
    fn refresh(&mut self) -> Result<()> {
        let anchor: Anchor = self.home.read_json("trust/head.json")?;
        if anchor == self.anchor {
            return Ok(());
        }
        if anchor.file != self.anchor.file {
            *self = Self::read(&self.home, self.state.workspace_id())?;
            return Ok(());
        }
        let entries = self.read_tail()?;
        self.replay(&entries)?;
        self.anchor = anchor;
        Ok(())
    }

    /// What the log says.
    pub(crate) fn state(&self) -> &Arc<TrustState> {
        &self.state
    }

    /// The genesis.
    pub(crate) fn genesis(&self) -> &Arc<Signed<Genesis>> {
        &self.genesis
    }

    fn hash_at(&self, seq: u64) -> Option<EntryHash> {
        let Some(index) = seq.checked_sub(1) else {
            return Some(EntryHash(self.state.workspace_id().0));
        };
        self.places.get(usize::try_from(index).ok()?).map(|place| place.hash)
    }

    /// Whether the log, or a known branch of it, contains this place.
    pub(crate) fn knows(&self, head: &Head) -> bool {
        self.hash_at(head.seq) == Some(head.hash)
            || self.state.branches().any(|(_, branch)| branch == *head)
    }

    /// The places that are named to whoever may have more.
    pub(crate) fn locator(&self) -> Vec<Head> {
        let head = |seq| self.hash_at(seq).map(|hash| Head { seq, hash });
        log::locator(self.state.head().seq).into_iter().filter_map(head).collect()
    }

    /// The newest of the places that this log has too, or its beginning.
    pub(crate) fn common(&self, have: &[Head]) -> Head {
        let known = have.iter().find(|head| self.hash_at(head.seq) == Some(head.hash));
        known.copied().unwrap_or_else(|| Head::genesis(self.state.workspace_id()))
    }

    /// The entries after a place of this log, as they travel, up to about `most` bytes of them.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub(crate) fn entries_after(&self, seq: u64, most: usize) -> Result<Vec<Vec<u8>>> {
        let index = usize::try_from(seq).unwrap_or(usize::MAX);
        let Some(from) = self.places.get(index) else {
            return Ok(Vec::new());
        };
        let mut raw = Vec::new();
        let mut file = File::open(self.path())?;
        file.seek(SeekFrom::Start(from.offset))?;
        // At least one entry, however long.
        let next = self.places.get(index + 1).map_or(self.end, |place| place.offset);
        let length = (next - from.offset).max(most as u64).min(self.end - from.offset);
        file.take(length).read_to_end(&mut raw)?;
        let mut entries = Vec::new();
        let mut rest = raw.as_slice();
        while let Some((wire, after)) = split_entry(rest) {
            entries.push(wire.to_vec());
            rest = after;
        }
        Ok(entries)
    }

    /// All entries, for people.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub(crate) fn all(&self) -> Result<Vec<LogEntry>> {
        let wires = self.entries_after(0, usize::MAX)?;
        wires.iter().map(|wire| LogEntry::decode(wire).map_err(|_| self.damaged())).collect()
    }

    /// The state of this log at an earlier entry.
    fn state_at(&self, seq: u64) -> Result<(TrustState, Vec<LogEntry>)> {
        let mut state = TrustState::from_genesis(self.state.workspace_id(), &self.genesis)
            .map_err(|_| self.damaged())?;
        let mut entries = self.all()?;
        let later =
            entries.split_off(usize::try_from(seq).unwrap_or(usize::MAX).min(entries.len()));
        for entry in &entries {
            state.apply_stored(entry).map_err(|_| self.damaged())?;
        }
        Ok((state, later))
    }

    /// Takes entries that follow one another from a place of this log on. What holds is kept, even when
    /// a later one does not.
    ///
    /// # Errors
    /// [`ErrorKind::TrustViolation`] for the first entry that does not hold.
    pub(crate) fn take(&mut self, entries: &[LogEntry]) -> Result<Taken> {
        let _lock = self.home.lock_trust()?;
        self.refresh()?;
        let known = entries
            .iter()
            .take_while(|entry| self.hash_at(entry.head().seq) == Some(entry.hash()))
            .count();
        let entries = &entries[known..];
        let Some(first) = entries.first() else {
            return Ok(Taken::Nothing);
        };
        let follows = first.follows();
        if follows == self.state.head() {
            return self.grow(entries);
        }
        if self.hash_at(follows.seq) != Some(follows.hash) {
            return Err(bad_entry(&"it follows no entry that is known here"));
        }
        self.consider(follows.seq, entries)
    }

    fn grow(&mut self, entries: &[LogEntry]) -> Result<Taken> {
        let mut state = TrustState::clone(&self.state);
        let applied = entries.iter().map_while(|entry| match state.apply(entry) {
            Ok(()) => Some(Ok(entry.encode())),
            Err(error) => Some(Err(error)),
        });
        let mut wires = Vec::new();
        let mut failed = None;
        for wire in applied {
            match wire {
                Ok(wire) => wires.push(wire),
                Err(error) => {
                    failed = Some(error);
                    break;
                }
            }
        }
        if !wires.is_empty() {
            self.append(&wires, state)?;
        }
        match failed {
            Some(error) => Err(bad_entry(&error)),
            None => Ok(Taken::Grew),
        }
    }

    /// Writes entries, then where the log ends, and only then uses them.
    fn append(&mut self, wires: &[Vec<u8>], state: TrustState) -> Result<()> {
        let mut file = fs::OpenOptions::new().write(true).mode(0o600).open(self.path())?;
        // A crash may have left half an entry.
        file.set_len(self.end)?;
        file.seek(SeekFrom::Start(self.end))?;
        file.write_all(&join(wires))?;
        file.sync_all()?;
        self.anchor.head = state.head();
        self.home.write_json("trust/head.json", &self.anchor)?;
        for wire in wires {
            let hash = LogEntry::decode(wire).map_err(|_| self.damaged())?.hash();
            self.places.push(Place { offset: self.end, hash });
            self.end += 4 + wire.len() as u64;
        }
        self.state = Arc::new(state);
        if self.state.head().seq - self.saved >= SAVE_STATE_EVERY {
            self.save_state()?;
        }
        Ok(())
    }

    fn save_state(&mut self) -> Result<()> {
        self.home.write_json("trust/state.json", &*self.state)?;
        self.saved = self.state.head().seq;
        Ok(())
    }

    /// Judges entries that leave this log before its end.
    fn consider(&mut self, after: u64, branch: &[LogEntry]) -> Result<Taken> {
        let (base, own) = self.state_at(after)?;
        let held = own.first().ok_or_else(|| self.damaged())?;
        let considered =
            self.state.consider(&base, held, branch).map_err(|error| bad_entry(&error))?;
        match considered {
            Considered::Settled => Ok(Taken::Nothing),
            Considered::Forked(state) => {
                if *state == *self.state {
                    return Ok(Taken::Nothing);
                }
                self.keep_evidence(branch)?;
                self.state = Arc::new(*state);
                self.save_state()?;
                tracing::error!(
                    event = "fork",
                    after,
                    "the trust log forked: two entries were signed for one place; revocations of \
                     both count, additions of neither. An owner settles it: `connect trust settle`"
                );
                Ok(Taken::Forked)
            }
            Considered::Replaces(state) => {
                self.keep_evidence(&own)?;
                let mut wires = self.entries_after(0, usize::MAX)?;
                wires.truncate(usize::try_from(after).unwrap_or(usize::MAX));
                wires.extend(branch.iter().map(LogEntry::encode));
                let old = self.path();
                let anchor = Anchor { head: state.head(), file: self.anchor.file.wrapping_add(1) };
                self.home.write(&Self::file_name(anchor.file), &join(&wires))?;
                self.home.write_json("trust/state.json", &*state)?;
                self.home.write_json("trust/head.json", &anchor)?;
                *self = Self::read(&self.home, state.workspace_id())?;
                // What is left of it is in the evidence.
                let _ = fs::remove_file(old);
                tracing::warn!(
                    event = "log_replaced",
                    after,
                    "entries of the trust log were replaced by those that an owner or the recovery \
                     key put in their place"
                );
                Ok(Taken::Replaced)
            }
        }
    }

    fn keep_evidence(&self, entries: &[LogEntry]) -> Result<()> {
        let Some(first) = entries.first() else {
            return Ok(());
        };
        let wires: Vec<_> = entries.iter().map(LogEntry::encode).collect();
        let name = format!("evidence/branch-{}", hex::encode(&first.hash().0[..16]));
        self.home.write(&name, &join(&wires))
    }
}

fn bad_entry(why: &dyn std::fmt::Display) -> Error {
    Error::new(
        ErrorKind::TrustViolation,
        format_args!("an entry of the trust log does not hold: {why}"),
    )
    .hint("whoever showed it, hub or peer, is wrong or lies; report it to the workspace's owners")
}

/// The first entry of a file, and the rest.
fn split_entry(raw: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = raw.split_first_chunk::<4>()?;
    rest.split_at_checked(usize::try_from(u32::from_be_bytes(*length)).ok()?)
}

fn join(wires: &[Vec<u8>]) -> Vec<u8> {
    let mut joined = Vec::with_capacity(wires.iter().map(|wire| 4 + wire.len()).sum());
    for wire in wires {
        let length = u32::try_from(wire.len()).expect("entries are short");
        joined.extend_from_slice(&length.to_be_bytes());
        joined.extend_from_slice(wire);
    }
    joined
}
