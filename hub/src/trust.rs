//! What the trust logs say, kept in memory and brought up to what the database holds.
//!
//! Only entries that a hub verified are in the database, so reading them back costs no signatures.
//! Several hubs may share a database: each reads what the others appended, and a log whose end was
//! replaced is known by its number of replacements.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use connect_spec::{
    ids::WorkspaceId,
    log::{Head, LogEntry},
    signed::Signed,
    trust::TrustState,
};

use crate::{
    limits::{LOG_PART_BYTES, MAX_TRUST_CACHE_BYTES, MAX_TRUST_CACHE_STATES},
    store::{StoreError, WorkspaceRow, WorkspaceTx},
};

/// The trust state of a workspace.
#[derive(Debug, Clone)]
pub struct Known {
    /// What the log says.
    pub state: Arc<TrustState>,
    /// How often the end of the log had been replaced.
    pub replaced: u64,
    /// Bytes that the state was made from: what it costs at most, roughly.
    pub bytes: usize,
}

impl Known {
    /// Whether this describes a later log than `other`.
    fn is_after(&self, other: &Self) -> bool {
        (self.replaced, self.state.head().seq) > (other.replaced, other.state.head().seq)
    }
}

#[derive(Debug)]
struct Cached {
    known: Known,
    used: u64,
}

#[derive(Debug, Default)]
struct Inner {
    clock: u64,
    bytes: usize,
    states: BTreeMap<WorkspaceId, Cached>,
}

impl Inner {
    fn put(&mut self, known: Known) {
        self.clock += 1;
        self.bytes += known.bytes;
        let cached = Cached { known, used: self.clock };
        if let Some(older) = self.states.insert(cached.known.state.workspace_id(), cached) {
            self.bytes -= older.known.bytes;
        }
        // The newest stays, however large it is.
        while self.states.len() > 1
            && (self.states.len() > MAX_TRUST_CACHE_STATES || self.bytes > MAX_TRUST_CACHE_BYTES)
        {
            let oldest = self.states.iter().min_by_key(|(_, cached)| cached.used);
            let Some(workspace) = oldest.map(|(workspace, _)| *workspace) else {
                return;
            };
            if let Some(cached) = self.states.remove(&workspace) {
                self.bytes -= cached.known.bytes;
            }
        }
    }
}

/// The trust states of the workspaces that were asked for last.
#[derive(Debug, Default)]
pub struct TrustCache {
    inner: Mutex<Inner>,
}

impl TrustCache {
    /// No step under the lock can fail half-way, so the state behind a poisoned lock is sound.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, workspace: WorkspaceId) -> Option<Known> {
        let mut inner = self.lock();
        inner.clock += 1;
        let now = inner.clock;
        inner.states.get_mut(&workspace).map(|cached| {
            cached.used = now;
            cached.known.clone()
        })
    }

    /// The newest head that is known without asking the database.
    #[must_use]
    pub fn head(&self, workspace: WorkspaceId) -> Option<Head> {
        self.lock().states.get(&workspace).map(|cached| cached.known.state.head())
    }

    /// Takes in a state that was committed, unless a later one is known.
    pub fn learn(&self, known: Known) {
        let mut inner = self.lock();
        let workspace = known.state.workspace_id();
        if inner.states.get(&workspace).is_none_or(|cached| known.is_after(&cached.known)) {
            inner.put(known);
        }
    }

    /// The trust state of the transaction's workspace, or a later one; `None` when the hub does not
    /// know the workspace.
    ///
    /// # Errors
    /// [`StoreError::Database`], [`StoreError::Corrupt`].
    pub async fn current(&self, tx: &mut WorkspaceTx) -> Result<Option<Known>, StoreError> {
        let Some(row) = tx.find_workspace().await? else {
            return Ok(None);
        };
        if let Some(known) = self.find(tx.workspace_id())
            && (known.replaced, known.state.head().seq) >= (row.replaced, row.head.seq)
        {
            return Ok(Some(known));
        }
        self.at_rest(tx).await
    }

    /// The trust state of the transaction's workspace, which nobody changes before the transaction ends.
    ///
    /// # Errors
    /// [`StoreError::Database`], [`StoreError::Corrupt`].
    pub async fn at_rest(&self, tx: &mut WorkspaceTx) -> Result<Option<Known>, StoreError> {
        match tx.find_workspace_at_rest().await? {
            Some(row) => self.load(tx, &row).await.map(Some),
            None => Ok(None),
        }
    }

    /// The trust state of the transaction's workspace, which only this transaction may change.
    ///
    /// # Errors
    /// [`StoreError::Database`], [`StoreError::Corrupt`].
    pub async fn locked(&self, tx: &mut WorkspaceTx) -> Result<Option<Known>, StoreError> {
        match tx.lock_workspace().await? {
            Some(row) => self.load(tx, &row).await.map(Some),
            None => Ok(None),
        }
    }

    /// The state at exactly the head of a locked row.
    async fn load(&self, tx: &mut WorkspaceTx, row: &WorkspaceRow) -> Result<Known, StoreError> {
        let cached = self.find(tx.workspace_id()).filter(|known| known.replaced == row.replaced);
        if let Some(known) = cached {
            if known.state.head() == row.head {
                return Ok(known);
            }
            if known.state.head().seq < row.head.seq {
                match catch_up(known, tx, row.head).await {
                    Ok(known) => {
                        self.lock().put(known.clone());
                        return Ok(known);
                    }
                    Err(StoreError::Corrupt(_)) => {}
                    Err(error) => return Err(error),
                }
            }
            // The database was put back to an older copy while this hub was running.
            tracing::warn!(workspace = %tx.workspace_id(), "the trust log in the database went back");
        }
        let start = match tx.replaced_trust().await? {
            Some((state, bytes)) => Known { state: Arc::new(state), replaced: row.replaced, bytes },
            None => from_genesis(tx.workspace_id(), row)?,
        };
        let known = catch_up(start, tx, row.head).await?;
        self.lock().put(known.clone());
        Ok(known)
    }
}

fn from_genesis(workspace: WorkspaceId, row: &WorkspaceRow) -> Result<Known, StoreError> {
    let genesis = Signed::decode(&row.genesis).map_err(|_| StoreError::Corrupt("genesis"))?;
    let state = TrustState::from_genesis(workspace, &genesis)
        .map_err(|_| StoreError::Corrupt("genesis"))?;
    Ok(Known { state: Arc::new(state), replaced: row.replaced, bytes: row.genesis.len() })
}

/// The state of the stored log at an earlier place, by its own entries alone.
///
/// # Errors
/// [`StoreError::Database`], [`StoreError::Corrupt`].
pub async fn state_at(tx: &mut WorkspaceTx, place: Head) -> Result<TrustState, StoreError> {
    let row = tx.find_workspace().await?.ok_or(StoreError::Corrupt("workspace_id"))?;
    let start = from_genesis(tx.workspace_id(), &row)?;
    catch_up(start, tx, place).await.map(|known| Arc::unwrap_or_clone(known.state))
}

/// Reads the stored entries that lead from a state to `head`.
async fn catch_up(known: Known, tx: &mut WorkspaceTx, head: Head) -> Result<Known, StoreError> {
    let Known { state, replaced, mut bytes } = known;
    let mut state = Arc::unwrap_or_clone(state);
    while state.head().seq < head.seq {
        let part = tx.log_part(state.head().seq, LOG_PART_BYTES).await?;
        if part.is_empty() {
            break;
        }
        for wire in part {
            if state.head().seq == head.seq {
                break;
            }
            let entry = LogEntry::decode(&wire).map_err(|_| StoreError::Corrupt("entry"))?;
            state.apply_stored(&entry).map_err(|_| StoreError::Corrupt("entry"))?;
            bytes += wire.len();
        }
    }
    if state.head() != head {
        return Err(StoreError::Corrupt("head_hash"));
    }
    Ok(Known { state: Arc::new(state), replaced, bytes })
}
