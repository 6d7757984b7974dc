//! The trust log as agents read and extend it.
//!
//! Signatures decide what is appended, not who brings it. The hub checks them as a second lock: an
//! agent that reads an entry here checks it again.

use connect_spec::{
    audit::Event,
    bytes::Blob,
    control::{ErrorCode, ErrorReport, Reply},
    ids::{AgentId, WorkspaceId},
    limits::MAX_LOCATOR,
    log::{Change, Head, LogEntry},
    trust::{Considered, LogError, TrustState},
};

use crate::{
    audit,
    effects::{self, Announce},
    hub::Hub,
    limits::LOG_REPLY_BYTES,
    requests::{Failure, Page, no, unknown_workspace},
    store::{StoreError, WorkspaceTx},
    trust::{Known, state_at},
};

/// Gives the entries that follow the newest of the places `have` that the hub has too.
pub(crate) async fn read(
    hub: &Hub,
    workspace: WorkspaceId,
    have: &[Head],
) -> Result<Reply, Failure> {
    if have.len() > MAX_LOCATOR {
        return no(ErrorCode::BadRequest, "too many places of the log");
    }
    let mut tx = hub.store().snapshot(workspace).await?;
    let Some(row) = tx.find_workspace().await? else {
        return unknown_workspace();
    };
    let after = tx.find_in_log(have).await?.unwrap_or(Head::genesis(workspace));
    let part = tx.log_part(after.seq, LOG_REPLY_BYTES).await?;
    let mut page = Page::new();
    page.fill(part.into_iter().map(Blob).collect());
    let more = after.seq.saturating_add(page.rows.len() as u64) < row.head.seq;
    Ok(Reply::Log { after, entries: page.rows, more })
}

/// Appends entries: all of them, or none. Those that the hub has already count as appended.
pub(crate) async fn append(
    hub: &Hub,
    workspace: WorkspaceId,
    wires: &[Blob],
) -> Result<(), Failure> {
    let decoded: Result<Vec<_>, _> = wires.iter().map(|wire| LogEntry::decode(&wire.0)).collect();
    let entries = match decoded {
        Ok(entries) => entries,
        Err(error) => return no(ErrorCode::BadRequest, &format!("an entry: {error}")),
    };
    let (Some(first), Some(last)) = (entries.first(), entries.last()) else {
        return no(ErrorCode::BadRequest, "no entries");
    };
    if entries.iter().any(|entry| entry.workspace_id() != workspace) {
        return refuse(LogError::Workspace);
    }

    let mut tx = hub.store().workspace(workspace).await?;
    let Some(known) = hub.trust().locked(&mut tx).await? else {
        return unknown_workspace();
    };
    let stored = tx.log_hashes(first.head().seq, last.head().seq).await?;
    let is_stored = |entry: &&LogEntry| stored.get(&entry.head().seq) == Some(&entry.hash());
    let new = &entries[entries.iter().take_while(is_stored).count()..];
    let Some(first) = new.first() else {
        return Ok(());
    };

    let mut ends = new.iter().any(ends_something);
    let mut replaced = known.replaced;
    let mut events = Vec::new();
    let state = if first.follows() == known.state.head() {
        let mut state = TrustState::clone(&known.state);
        for entry in new {
            state.apply(entry).or_else(refuse)?;
        }
        tx.append_to_log(new).await?;
        state
    } else {
        let base = first.follows();
        let state = replace(&mut tx, &known, base, new).await?;
        tx.replace_in_log(base.seq, new, &state).await?;
        tracing::warn!(%workspace, base = base.seq, "the end of a trust log was replaced");
        replaced += 1;
        ends = true;
        events.push(audit::now(Event::LogReplaced { base: base.seq }));
        state
    };
    events.extend(new.iter().flat_map(events_of).map(audit::now));
    let revoked: Vec<AgentId> = new.iter().flat_map(revoked_by).collect();
    if !revoked.is_empty() {
        tx.withdraw_services_of(&revoked).await?;
    }

    tx.record(&events).await?;
    let announce = Announce { hub, change: effects::Change { workspace, ends } };
    tx.commit().await?;
    let bytes = known.bytes + wires.iter().map(|wire| wire.0.len()).sum::<usize>();
    hub.trust().learn(Known { state: state.into(), replaced, bytes });
    drop(announce);
    Ok(())
}

/// The state after entries that take the place of all that follow `base`, if they may: a recovery, or an
/// owner who gives the others up.
async fn replace(
    tx: &mut WorkspaceTx,
    known: &Known,
    base: Head,
    new: &[LogEntry],
) -> Result<TrustState, Failure> {
    let conflict =
        || no(ErrorCode::Conflict, "the entries do not follow the hub's log: read it again");
    let is_stored =
        base == Head::genesis(tx.workspace_id()) || tx.find_in_log(&[base]).await? == Some(base);
    let held = tx.log_part(base.seq, 1).await?;
    let Some(held) = held.first().filter(|_| is_stored) else {
        return conflict();
    };
    let held = LogEntry::decode(held).map_err(|_| StoreError::Corrupt("entry"))?;
    // The state at the base is made from all entries before it: not for entries that were only late.
    let (_, counter) = known.state.recovery();
    let may_replace = new.iter().any(|entry| match entry {
        LogEntry::Entry(entry) => entry.object().abandons.contains(&held.hash()),
        LogEntry::Recovery(recovery) => recovery.object().counter > counter,
    });
    if !may_replace {
        return conflict();
    }
    let base = state_at(tx, base).await?;
    match known.state.consider(&base, &held, new) {
        Ok(Considered::Replaces(state)) => Ok(*state),
        Ok(Considered::Settled | Considered::Forked(_)) => conflict(),
        Err(error) => refuse(error),
    }
}

/// Tells why an entry does not belong in the log.
fn refuse<T>(error: LogError) -> Result<T, Failure> {
    let code = match error {
        LogError::Place | LogError::NoBranch | LogError::Epoch => ErrorCode::BadRequest,
        LogError::Workspace
        | LogError::Signature
        | LogError::Signer
        | LogError::Role
        | LogError::LastOwner
        | LogError::NoSuchSigner
        | LogError::RevokedSigner
        | LogError::TooManySigners
        | LogError::Recovery
        | LogError::Full
        | LogError::TooManyBranches => ErrorCode::Forbidden,
    };
    Err(Failure::Report(ErrorReport::new(code, error.to_string())))
}

/// What an entry is in the audit log.
fn events_of(entry: &LogEntry) -> Vec<Event> {
    let number = entry.head().seq;
    let LogEntry::Entry(entry) = entry else {
        return vec![Event::Recovered { entry: number }];
    };
    let events = entry.object().changes.iter().filter_map(|change| {
        Some(match change {
            Change::AddSigner { key, role } => {
                Event::SignerAdded { key: *key, role: *role, entry: number }
            }
            Change::RemoveSigner { key, .. } => Event::SignerRemoved { key: *key, entry: number },
            Change::RevokeAgent { agent_id, below_serial } => Event::AgentRevoked {
                agent_id: *agent_id,
                entry: number,
                below_serial: *below_serial,
            },
            Change::CloseCredential { credential_id, keep } => Event::CredentialClosed {
                credential_id: *credential_id,
                entry: number,
                kept: keep.len() as u64,
            },
            Change::EpochKey { epoch, .. } => Event::EpochBegan { epoch: *epoch, entry: number },
            Change::Policy(policy) => Event::PolicySet { strict: policy.strict, entry: number },
            Change::Unknown(_) => return None,
        })
    });
    events.collect()
}

/// Whether somebody may be out by an entry.
fn ends_something(entry: &LogEntry) -> bool {
    match entry {
        LogEntry::Entry(entry) => entry.object().changes.iter().any(|change| match change {
            Change::RemoveSigner { .. }
            | Change::RevokeAgent { .. }
            | Change::CloseCredential { .. } => true,
            Change::AddSigner { .. }
            | Change::EpochKey { .. }
            | Change::Policy(_)
            | Change::Unknown(_) => false,
        }),
        LogEntry::Recovery(_) => true,
    }
}

/// The agents that are out by an entry, whatever their certificates say.
fn revoked_by(entry: &LogEntry) -> Vec<AgentId> {
    let LogEntry::Entry(entry) = entry else {
        return Vec::new();
    };
    let revoked = entry.object().changes.iter().filter_map(|change| match change {
        Change::RevokeAgent { agent_id, below_serial: None } => Some(*agent_id),
        Change::RevokeAgent { below_serial: Some(_), .. }
        | Change::AddSigner { .. }
        | Change::RemoveSigner { .. }
        | Change::CloseCredential { .. }
        | Change::EpochKey { .. }
        | Change::Policy(_)
        | Change::Unknown(_) => None,
    });
    revoked.collect()
}
