//! API keys: how members make, list and revoke them, and what one is worth when it is shown.

use std::time::Duration;

use connect_spec::{
    audit::{ApiKeyId, Event, Scope},
    control::{ApiKey, ErrorCode, Reply},
    ids::WorkspaceId,
    objects::AgentRole,
};

use crate::{
    audit,
    auth::unix_now,
    effects,
    hub::{Hub, random},
    limits::{EXPIRED_API_KEYS_LISTED, MAX_API_KEY_AGE, MAX_API_KEYS},
    requests::{Failure, no, unknown_workspace},
    router::Member,
    store::{Authorized, StoreError, WorkspaceTx, key_id},
};

/// Keys show what every member sees, so members alone make them.
fn members_only(member: &Member) -> Result<(), Failure> {
    if member.role != AgentRole::Member {
        return no(ErrorCode::Forbidden, "only members have to do with API keys");
    }
    Ok(())
}

/// Makes a key.
pub(crate) async fn create(
    hub: &Hub,
    member: &Member,
    scopes: &[Scope],
    valid_for: Duration,
) -> Result<Reply, Failure> {
    members_only(member)?;
    let mut scopes = scopes.to_vec();
    scopes.sort_unstable();
    scopes.dedup();
    if scopes.is_empty() {
        return no(ErrorCode::BadRequest, "an API key needs a scope");
    }
    if valid_for.is_zero() || valid_for > MAX_API_KEY_AGE {
        return no(ErrorCode::BadRequest, "an API key is valid for a year at most");
    }
    let Some(random) = random() else {
        return no(ErrorCode::Internal, "the hub has no randomness");
    };
    let (workspace, agent) = member.key;
    let key = ApiKey::new(random);
    let mut tx = hub.store().workspace(workspace).await?;
    if tx.lock_workspace().await?.is_none() {
        return unknown_workspace();
    }
    if tx.count_api_keys().await? >= MAX_API_KEYS {
        return no(ErrorCode::Busy, "this workspace has as many API keys as the hub allows");
    }
    let expires_at = tx.insert_api_key(agent, &key, &scopes, valid_for).await?;
    let key_id = key_id(&key);
    let created = Event::ApiKeyCreated { agent_id: agent, key_id, scopes, expires_at };
    tx.record(&[audit::now(created)]).await?;
    tx.commit().await?;
    Ok(Reply::ApiKeyCreated { key, key_id, expires_at })
}

/// Lists the keys.
pub(crate) async fn list(hub: &Hub, member: &Member) -> Result<Reply, Failure> {
    members_only(member)?;
    let mut tx = hub.store().workspace(member.key.0).await?;
    Ok(Reply::ApiKeys { keys: tx.api_keys(EXPIRED_API_KEYS_LISTED).await? })
}

/// Ends a key.
pub(crate) async fn revoke(hub: &Hub, member: &Member, key_id: ApiKeyId) -> Result<(), Failure> {
    members_only(member)?;
    let (workspace, agent_id) = member.key;
    let mut tx = hub.store().workspace(workspace).await?;
    if !tx.revoke_api_key(key_id).await? {
        return no(ErrorCode::NotFound, "no such API key");
    }
    tx.record(&[audit::now(Event::ApiKeyRevoked { agent_id, key_id })]).await?;
    tx.commit().await?;
    Ok(())
}

/// What a key may do, and where: `None` when it is unknown, expired or revoked, or whoever made it is a
/// member no more.
///
/// # Errors
/// [`StoreError`].
pub async fn authorize(
    hub: &Hub,
    key: &ApiKey,
) -> Result<Option<(WorkspaceId, Authorized)>, StoreError> {
    let Some(workspace) = hub.store().workspace_of(key).await? else {
        return Ok(None);
    };
    let mut tx = hub.store().workspace(workspace).await?;
    let Some(authorized) = tx.use_api_key(key).await? else {
        return Ok(None);
    };
    if !is_member(hub, &mut tx, &authorized).await? {
        return Ok(None);
    }
    tx.commit().await?;
    Ok(Some((workspace, authorized)))
}

async fn is_member(
    hub: &Hub,
    tx: &mut WorkspaceTx,
    authorized: &Authorized,
) -> Result<bool, StoreError> {
    let Some(known) = hub.trust().current(tx).await? else {
        return Ok(false);
    };
    let presented = tx.presented_by(&[authorized.agent_id]).await?;
    Ok(presented.into_iter().any(|(agent, shown)| {
        effects::verify(&known.state, agent, &shown, unix_now())
            .is_ok_and(|peer| peer.certificate().role == AgentRole::Member)
    }))
}
