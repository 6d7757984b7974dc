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
    /// How often another branch was learned of: the state has news then though the head has none.
    #[serde(default)]
    branches: u32,
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
        let anchor = Anchor { head: state.head(), file: 0, branches: 0 };
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
        if (anchor.file, anchor.branches) != (self.anchor.file, self.anchor.branches) {
            *self = Self::read(&self.home, self.state.workspace_id())?;
            return Ok(());
        }
        let entries = self.read_tail()?;
        self.replay(&entries)?;
        self.anchor = anchor;
        Ok(())
    }

    /// As [`TrustLog::refresh`], on its own.
    ///
    /// # Errors
    /// When the files cannot be read.
    pub(crate) fn reload(&mut self) -> Result<()> {
        let _lock = self.home.lock_trust()?;
        self.refresh()
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
        let Some((after, entries)) = self.unknown(entries)? else {
            return Ok(Taken::Nothing);
        };
        if after == self.state.head().seq {
            self.grow(entries)
        } else {
            self.consider(after, entries)
        }
    }

    /// Looks at the beginning of a long list of entries, before the rest of it is waited for: false when
    /// all of them are known. Nothing is kept.
    ///
    /// # Errors
    /// [`ErrorKind::TrustViolation`] for the first entry that does not hold.
    pub(crate) fn check(&mut self, entries: &[LogEntry]) -> Result<bool> {
        self.reload()?;
        let Some((after, entries)) = self.unknown(entries)? else {
            return Ok(false);
        };
        let (mut base, own) = self.state_at(after)?;
        match own.first() {
            Some(held) => self.state.consider(&base, held, entries).map(drop),
            None => entries.iter().try_for_each(|entry| base.apply(entry)),
        }
        .map_err(|error| bad_entry(&error))?;
        Ok(true)
    }

    /// Those of the entries that are not known, and the place in this log that they follow.
    fn unknown<'e>(&self, entries: &'e [LogEntry]) -> Result<Option<(u64, &'e [LogEntry])>> {
        let is_known = |entry: &&LogEntry| self.hash_at(entry.head().seq) == Some(entry.hash());
        let entries = &entries[entries.iter().take_while(is_known).count()..];
        let Some(follows) = entries.first().map(LogEntry::follows) else {
            return Ok(None);
        };
        if self.hash_at(follows.seq) != Some(follows.hash) {
            return Err(bad_entry(&"it follows no entry that is known here"));
        }
        Ok(Some((follows.seq, entries)))
    }

    fn grow(&mut self, entries: &[LogEntry]) -> Result<Taken> {
        let mut state = TrustState::clone(&self.state);
        let failed = entries
            .iter()
            .enumerate()
            .find_map(|(index, entry)| state.apply(entry).err().map(|error| (index, error)));
        let good = &entries[..failed.map_or(entries.len(), |(index, _)| index)];
        if !good.is_empty() {
            self.append(good, state)?;
        }
        match failed {
            Some((_, error)) => Err(bad_entry(&error)),
            None => Ok(Taken::Grew),
        }
    }

    /// Writes entries, then where the log ends, and only then uses them.
    fn append(&mut self, entries: &[LogEntry], state: TrustState) -> Result<()> {
        let wires: Vec<_> = entries.iter().map(LogEntry::encode).collect();
        let mut file = fs::OpenOptions::new().write(true).mode(0o600).open(self.path())?;
        // A crash may have left half an entry.
        file.set_len(self.end)?;
        file.seek(SeekFrom::Start(self.end))?;
        file.write_all(&join(&wires))?;
        file.sync_all()?;
        self.anchor.head = state.head();
        self.home.write_json("trust/head.json", &self.anchor)?;
        for (entry, wire) in entries.iter().zip(&wires) {
            self.places.push(Place { offset: self.end, hash: entry.hash() });
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
                // Another process that saves its own state next must have read this one.
                self.anchor.branches = self.anchor.branches.wrapping_add(1);
                self.home.write_json("trust/head.json", &self.anchor)?;
                if !self.state.is_forked() {
                    // A branch that was given up before it was shown: what it revoked stays so.
                    return Ok(Taken::Nothing);
                }
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
                let anchor = Anchor {
                    head: state.head(),
                    file: self.anchor.file.wrapping_add(1),
                    branches: self.anchor.branches,
                };
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

#[cfg(test)]
mod tests {
    use connect_crypto::{founding::Founding, keys::SigningKey};
    use connect_spec::{
        ids::AgentId,
        log::{Change, Entry},
        objects::SignerRole,
    };

    use super::*;
    use crate::random;

    struct Begun {
        _dir: tempfile::TempDir,
        home: Home,
        id: WorkspaceId,
        founder: SigningKey,
        log: TrustLog,
    }

    fn begin() -> Begun {
        let dir = tempfile::tempdir().expect("a directory");
        let home = Home::at(dir.path().join("home"));
        let founding = Founding::create(&mut random::rng());
        let id = WorkspaceId(founding.genesis.hash());
        let log = TrustLog::create(&home, id, Arc::new(founding.genesis)).expect("a new log");
        Begun { _dir: dir, home, id, founder: founding.signer, log }
    }

    fn entry(id: WorkspaceId, follows: Head, signer: &SigningKey, change: Change) -> LogEntry {
        LogEntry::Entry(signer.sign(&Entry {
            workspace_id: id,
            seq: follows.seq + 1,
            prev: follows.hash,
            time: 1,
            changes: vec![change],
            abandons: Vec::new(),
        }))
    }

    fn revoke(number: u32) -> Change {
        let mut agent = [0; 16];
        agent[..4].copy_from_slice(&number.to_be_bytes());
        Change::RevokeAgent { agent_id: AgentId(agent), below_serial: None }
    }

    /// Entries that revoke one agent after the other.
    fn chain(begun: &Begun, from: Head, numbers: std::ops::Range<u32>) -> Vec<LogEntry> {
        let mut head = from;
        let made = numbers.map(|number| {
            let entry = entry(begun.id, head, &begun.founder, revoke(number));
            head = entry.head();
            entry
        });
        made.collect()
    }

    #[test]
    fn a_log_is_read_back_as_it_was() {
        let mut begun = begin();
        let genesis = begun.log.state().head();
        let entries = chain(&begun, genesis, 0..600);
        assert_eq!(begun.log.take(&entries[..10]).expect("sound"), Taken::Grew);
        assert_eq!(begun.log.take(&entries).expect("sound, the first ones known"), Taken::Grew);
        assert_eq!(begun.log.take(&entries).expect("all known"), Taken::Nothing);
        let again = TrustLog::load(&begun.home, begun.id).expect("what was written");
        assert_eq!(again.state(), begun.log.state());
        assert_eq!(again.locator(), begun.log.locator());
        assert_eq!(again.all().expect("readable"), entries);
        assert!(again.saved > 0, "the state was saved on the way");
        assert!(again.knows(&entries[5].head()) && !again.knows(&Head { seq: 6, ..genesis }));
    }

    #[test]
    fn another_process_of_the_home_may_have_written() {
        let mut begun = begin();
        let genesis = begun.log.state().head();
        let entries = chain(&begun, genesis, 0..5);
        let mut other = TrustLog::load(&begun.home, begun.id).expect("the same log");
        other.take(&entries[..3]).expect("sound");
        // What the first process did not know of it takes over before it writes.
        assert_eq!(begun.log.take(&entries).expect("sound"), Taken::Grew);
        assert_eq!(begun.log.state().head(), entries[4].head());
        let again = TrustLog::load(&begun.home, begun.id).expect("both wrote");
        assert_eq!(again.all().expect("readable"), entries);
    }

    #[test]
    fn what_a_crash_leaves_is_mended_and_what_is_missing_is_noticed() {
        let mut begun = begin();
        let genesis = begun.log.state().head();
        let entries = chain(&begun, genesis, 0..3);
        begun.log.take(&entries[..2]).expect("sound");
        let path = begun.home.path("trust/log-0");
        let whole = fs::read(&path).expect("the log");
        let third = join(&[entries[2].encode()]);

        // Half an entry, as of a crash while it was written.
        fs::write(&path, [whole.as_slice(), &third[..third.len() - 1]].concat()).expect("written");
        let mut mended = TrustLog::load(&begun.home, begun.id).expect("the whole entries count");
        assert_eq!(mended.state().head(), entries[1].head());
        mended.take(&entries).expect("sound");
        assert_eq!(fs::read(&path).expect("the log"), [whole.as_slice(), &third].concat());

        // A log that does not reach as far as it did.
        fs::write(&path, &whole[..whole.len() / 2]).expect("written");
        let error = TrustLog::load(&begun.home, begun.id).expect_err("a shorter log");
        assert_eq!(error.kind, ErrorKind::TrustViolation);
    }

    #[test]
    fn entries_that_do_not_hold_change_nothing_on_disk() {
        let mut begun = begin();
        let genesis = begun.log.state().head();
        let sound = chain(&begun, genesis, 0..2);
        let stranger = SigningKey::generate(&mut random::rng());
        let forged = entry(begun.id, sound[1].head(), &stranger, revoke(9));
        let error = begun.log.take(&[sound[0].clone(), sound[1].clone(), forged]);
        assert_eq!(error.expect_err("forged").kind, ErrorKind::TrustViolation);
        // What held before it is kept.
        assert_eq!(begun.log.state().head(), sound[1].head());
        let nowhere = Head { seq: 1, hash: EntryHash([7; 32]) };
        let detached = entry(begun.id, nowhere, &begun.founder, revoke(9));
        assert!(begun.log.take(&[detached]).is_err());
        let again = TrustLog::load(&begun.home, begun.id).expect("what held");
        assert_eq!(again.state().head(), sound[1].head());
    }

    #[test]
    fn beginning_of_a_branch_is_checked_and_nothing_of_it_kept() {
        let mut begun = begin();
        let genesis = begun.log.state().head();
        let ours = chain(&begun, genesis, 0..3);
        begun.log.take(&ours).expect("sound");
        let before = begun.log.state().clone();
        let check = |begun: &mut Begun, entries: &[LogEntry]| begun.log.check(entries);
        assert!(!check(&mut begun, &[]).expect("nothing"));
        assert!(!check(&mut begun, &ours).expect("all known"));
        // What goes on, and what branches off, behind what is known.
        let more = chain(&begun, ours[2].head(), 3..5);
        assert!(check(&mut begun, &more).expect("sound"));
        let branch = [&ours[..1], &chain(&begun, ours[0].head(), 7..9)].concat();
        assert!(check(&mut begun, &branch).expect("signed"));
        let stranger = SigningKey::generate(&mut random::rng());
        for follows in [ours[0].head(), ours[2].head(), genesis] {
            let forged = entry(begun.id, follows, &stranger, revoke(9));
            assert!(check(&mut begun, &[forged]).is_err());
        }
        assert_eq!(*begun.log.state(), before);
        let evidence = fs::read_dir(begun.home.path("evidence")).map(Iterator::count);
        assert_eq!(evidence.unwrap_or_default(), 0);
    }

    #[test]
    fn a_fork_that_one_process_learns_of_is_not_forgotten_by_another() {
        let mut begun = begin();
        let genesis = begun.log.state().head();
        let ours = chain(&begun, genesis, 0..1);
        let theirs = chain(&begun, genesis, 1..2);
        begun.log.take(&ours).expect("sound");
        let mut other = TrustLog::load(&begun.home, begun.id).expect("the same log");
        assert_eq!(other.take(&theirs).expect("a branch"), Taken::Forked);
        // The first process saves a state of its own, long after.
        let more = chain(&begun, ours[0].head(), 2..400);
        begun.log.take(&more).expect("sound");
        assert!(begun.log.state().is_forked());
        let again = TrustLog::load(&begun.home, begun.id).expect("what both wrote");
        assert!(again.saved > 1 && again.state().is_forked());
    }

    #[test]
    fn a_fork_is_remembered_with_its_evidence_and_settled_by_an_owner() {
        let mut begun = begin();
        let genesis = begun.log.state().head();
        let second = SigningKey::generate(&mut random::rng());
        let add = Change::AddSigner { key: second.public(), role: SignerRole::Owner };
        let first = entry(begun.id, genesis, &begun.founder, add);
        let ours = entry(begun.id, first.head(), &begun.founder, revoke(1));
        let theirs = entry(begun.id, first.head(), &second, revoke(2));
        begun.log.take(&[first.clone(), ours.clone()]).expect("sound");
        assert_eq!(begun.log.take(std::slice::from_ref(&theirs)).expect("a branch"), Taken::Forked);
        assert_eq!(begun.log.take(std::slice::from_ref(&theirs)).expect("known"), Taken::Nothing);
        let mut again = TrustLog::load(&begun.home, begun.id).expect("with the fork");
        assert!(again.state().is_forked());
        for number in [1_u32, 2] {
            let Change::RevokeAgent { agent_id, .. } = revoke(number) else { unreachable!() };
            assert!(again.state().is_revoked(&agent_id, 1), "revocations of both branches count");
        }
        assert!(again.knows(&theirs.head()), "a peer on the other branch is no stranger");

        // The second owner gives up our branch, for the first one signed only that.
        let settle = LogEntry::Entry(second.sign(&Entry {
            workspace_id: begun.id,
            seq: theirs.head().seq + 1,
            prev: theirs.head().hash,
            time: 1,
            changes: vec![revoke(3)],
            abandons: vec![ours.hash()],
        }));
        assert_eq!(again.take(&[theirs, settle.clone()]).expect("settled"), Taken::Replaced);
        let settled = TrustLog::load(&begun.home, begun.id).expect("the other branch");
        assert_eq!(settled.state().head(), settle.head());
        assert!(!settled.state().is_forked());
        assert_eq!(fs::read_dir(begun.home.path("evidence")).expect("kept").count(), 2);
        // The process that had the old file finds the new one.
        assert_eq!(begun.log.take(std::slice::from_ref(&settle)).expect("known"), Taken::Nothing);
        assert_eq!(begun.log.state().head(), settle.head());
    }
}
