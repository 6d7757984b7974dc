//! The secrets of an epoch on their way from one member to the others. The hub stores what it cannot
//! open; whoever opens a wrap holds it against the log, so any member may make one.

use connect_spec::{
    control::{
        AddressedWrap, ErrorCode, FromHub, Recipient, Reply, UnwrappedAgent, UnwrappedCredential,
    },
    ids::{AgentId, CredentialId},
    objects::AgentRole,
    signed::Signed,
    trust::TrustState,
};

use crate::{
    auth::unix_now,
    effects,
    hub::Hub,
    limits::{MAX_WRAP_BYTES, PAGE_ROWS},
    requests::{Failure, Page, no, unknown_workspace},
    router::Member,
    store::{StoreError, WorkspaceTx},
};

/// Lists who has no wrap of an epoch, as many as fit a message.
pub(crate) async fn missing(hub: &Hub, member: &Member, epoch: u32) -> Result<Reply, Failure> {
    members_only(member)?;
    let mut tx = hub.store().workspace(member.key.0).await?;
    let Some(known) = hub.trust().current(&mut tx).await? else {
        return unknown_workspace();
    };
    let mut agents = Page::new();
    let full = fill_agents(&mut tx, &known.state, epoch, &mut agents).await?;
    let mut credentials = agents.rest();
    if !full {
        fill_credentials(&mut tx, &known.state, epoch, &mut credentials).await?;
    }
    Ok(Reply::MissingWraps { agents: agents.rows, credentials: credentials.rows })
}

async fn fill_agents(
    tx: &mut WorkspaceTx,
    trust: &TrustState,
    epoch: u32,
    page: &mut Page<UnwrappedAgent>,
) -> Result<bool, StoreError> {
    let mut last: Option<AgentId> = None;
    loop {
        let mut rows = tx.agents_without_wrap(epoch, last, PAGE_ROWS).await?;
        let is_last = i64::try_from(rows.len()).is_ok_and(|rows| rows < PAGE_ROWS);
        last = rows.last().map(|row| row.agent_id).or(last);
        let now = unix_now();
        // Guests need none: the secret of a share comes with it.
        rows.retain(|row| {
            effects::verify(trust, row.agent_id, &row.presented, now)
                .is_ok_and(|peer| peer.certificate().role != AgentRole::Guest)
        });
        let full = page.fill(rows);
        if is_last || full {
            return Ok(full);
        }
    }
}

async fn fill_credentials(
    tx: &mut WorkspaceTx,
    trust: &TrustState,
    epoch: u32,
    page: &mut Page<UnwrappedCredential>,
) -> Result<(), StoreError> {
    let mut last: Option<CredentialId> = None;
    loop {
        let rows = tx.invites_without_wrap(epoch, unix_now(), last, PAGE_ROWS).await?;
        let is_last = i64::try_from(rows.len()).is_ok_and(|rows| rows < PAGE_ROWS);
        last = rows.last().map(|row| row.id).or(last);
        let mut open = Vec::new();
        for row in rows {
            let credential =
                Signed::decode(&row.credential).map_err(|_| StoreError::Corrupt("credential"))?;
            if !trust.is_closed(&row.id) && trust.verify_credential(&credential).is_ok() {
                open.push(UnwrappedCredential {
                    credential: row.credential.into(),
                    wrap_key: row.wrap_key.into(),
                });
            }
        }
        if page.fill(open) || is_last {
            return Ok(());
        }
    }
}

/// Stores wraps of the current epoch, or of the one before: all of them, or none.
pub(crate) async fn store(
    hub: &Hub,
    member: &Member,
    mut wraps: Vec<AddressedWrap>,
) -> Result<(), Failure> {
    members_only(member)?;
    if wraps.iter().any(|addressed| addressed.wrap.sealed.0.len() > MAX_WRAP_BYTES) {
        return no(ErrorCode::BadRequest, "a wrap is too long");
    }
    // Rows are locked in one order, whoever stores them.
    wraps.sort_by_key(|addressed| match addressed.recipient {
        Recipient::Agent(id) => (0, id.0, addressed.wrap.epoch),
        Recipient::Credential(id) => (1, id.0, addressed.wrap.epoch),
    });
    let workspace = member.key.0;
    let mut tx = hub.store().workspace(workspace).await?;
    let Some(known) = hub.trust().current(&mut tx).await? else {
        return unknown_workspace();
    };
    let current = known.state.epoch();
    let oldest = current.saturating_sub(1);
    for addressed in &wraps {
        if !(oldest..=current).contains(&addressed.wrap.epoch) {
            return no(ErrorCode::BadRequest, "a wrap is of an epoch that does not count");
        }
        if !tx.store_wrap(addressed).await? {
            return no(ErrorCode::NotFound, "a wrap is for nobody that this hub knows");
        }
    }
    tx.forget_wraps_below(oldest).await?;
    tx.commit().await?;
    hub.route(|router, out| {
        for AddressedWrap { recipient, wrap } in &wraps {
            if let Recipient::Agent(agent) = recipient {
                router.tell(workspace, *agent, &FromHub::WrapStored { epoch: wrap.epoch }, out);
            }
        }
    });
    Ok(())
}

/// Gives an agent its own wrap.
pub(crate) async fn own(hub: &Hub, member: &Member, epoch: u32) -> Result<Reply, Failure> {
    let (workspace, agent) = member.key;
    let mut tx = hub.store().workspace(workspace).await?;
    Ok(Reply::Wrap { wrap: tx.agent_wrap(agent, epoch).await? })
}

fn members_only(member: &Member) -> Result<(), Failure> {
    if member.role == AgentRole::Guest {
        return no(ErrorCode::Forbidden, "guests have no part in the secrets of a workspace");
    }
    Ok(())
}
