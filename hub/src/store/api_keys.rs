//! The table `api_keys`.

use std::time::Duration;

use connect_spec::{
    audit::{ApiKeyId, Scope},
    control::{ApiKey, ListedApiKey},
    ids::{AgentId, WorkspaceId},
};
use sha2::{Digest as _, Sha256};

use super::{Store, StoreError, WorkspaceTx, fixed, unsigned};

/// What the table keeps of a key. It holds 256 random bits, so a plain hash is enough.
fn key_hash(key: &ApiKey) -> [u8; 32] {
    Sha256::digest(key.reveal().as_bytes()).into()
}

/// How a key is called where it must not be shown.
#[must_use]
pub fn key_id(key: &ApiKey) -> ApiKeyId {
    let mut id = [0; ApiKeyId::BYTES];
    id.copy_from_slice(&key_hash(key)[..ApiKeyId::BYTES]);
    ApiKeyId(id)
}

/// A key that is in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Authorized {
    /// Which.
    pub key_id: ApiKeyId,
    /// Who made it.
    pub agent_id: AgentId,
    /// What it may do.
    pub scopes: Vec<Scope>,
}

fn scope_name(scope: Scope) -> &'static str {
    match scope {
        Scope::Read => "read",
        Scope::Audit => "audit",
        Scope::Write => "write",
    }
}

fn scopes(names: &[String]) -> Result<Vec<Scope>, StoreError> {
    let scope = |name: &String| {
        let all = [Scope::Read, Scope::Audit, Scope::Write];
        all.into_iter()
            .find(|scope| scope_name(*scope) == name)
            .ok_or(StoreError::Corrupt("scopes"))
    };
    names.iter().map(scope).collect()
}

type Row = (Vec<u8>, Vec<u8>, Vec<String>, i64, i64, Option<i64>);

fn listed(row: Row) -> Result<ListedApiKey, StoreError> {
    let (key_id, agent_id, names, created_at, expires_at, last_used_at) = row;
    Ok(ListedApiKey {
        key_id: ApiKeyId(fixed(&key_id, "key_id")?),
        agent_id: AgentId(fixed(&agent_id, "agent_id")?),
        scopes: scopes(&names)?,
        created_at: unsigned(created_at, "created_at")?,
        expires_at: unsigned(expires_at, "expires_at")?,
        last_used_at: last_used_at.map(|at| unsigned(at, "last_used_at")).transpose()?,
    })
}

impl Store {
    /// The workspace that a key is for, if there is such a key, in force or not.
    ///
    /// # Errors
    /// [`StoreError::Database`], [`StoreError::Corrupt`].
    pub async fn workspace_of(&self, key: &ApiKey) -> Result<Option<WorkspaceId>, StoreError> {
        let (workspace,): (Option<Vec<u8>>,) =
            sqlx::query_as("SELECT connect.workspace_of_api_key($1)")
                .bind(key_hash(key).as_slice())
                .fetch_one(&self.pool)
                .await?;
        workspace.map(|id| fixed(&id, "workspace_id").map(WorkspaceId)).transpose()
    }
}

impl WorkspaceTx {
    /// Stores a key of `agent`; the time when it expires, in seconds since 1970.
    ///
    /// # Errors
    /// [`StoreError::Database`], [`StoreError::Corrupt`].
    pub async fn insert_api_key(
        &mut self,
        agent: AgentId,
        key: &ApiKey,
        scopes: &[Scope],
        valid_for: Duration,
    ) -> Result<u64, StoreError> {
        let workspace = self.id();
        let names: Vec<&str> = scopes.iter().copied().map(scope_name).collect();
        let (expires_at,): (i64,) = sqlx::query_as(
            "INSERT INTO connect.api_keys
                 (workspace_id, key_id, key_hash, agent_id, scopes, expires_at)
             VALUES ($1, $2, $3, $4, $5, now() + make_interval(secs => $6))
             RETURNING extract(epoch FROM expires_at)::bigint",
        )
        .bind(workspace)
        .bind(key_id(key).0.as_slice())
        .bind(key_hash(key).as_slice())
        .bind(agent.0.as_slice())
        .bind(names)
        .bind(valid_for.as_secs_f64())
        .fetch_one(self.connection())
        .await?;
        unsigned(expires_at, "expires_at")
    }

    /// How many keys the workspace has that are in force.
    ///
    /// # Errors
    /// [`StoreError::Database`].
    pub async fn count_api_keys(&mut self) -> Result<i64, StoreError> {
        let workspace = self.id();
        let (count,): (i64,) = sqlx::query_as(
            "SELECT count(*) FROM connect.api_keys WHERE workspace_id = $1 AND expires_at > now()",
        )
        .bind(workspace)
        .fetch_one(self.connection())
        .await?;
        Ok(count)
    }

    /// All keys, the oldest first; those that expired are forgotten after `kept`.
    ///
    /// # Errors
    /// [`StoreError::Database`], [`StoreError::Corrupt`].
    pub async fn api_keys(&mut self, kept: Duration) -> Result<Vec<ListedApiKey>, StoreError> {
        let workspace = self.id();
        let rows: Vec<Row> = sqlx::query_as(
            "SELECT key_id, agent_id, scopes, extract(epoch FROM created_at)::bigint,
                    extract(epoch FROM expires_at)::bigint, extract(epoch FROM last_used_at)::bigint
             FROM connect.api_keys
             WHERE workspace_id = $1 AND expires_at > now() - make_interval(secs => $2)
             ORDER BY created_at, key_id",
        )
        .bind(workspace)
        .bind(kept.as_secs_f64())
        .fetch_all(self.connection())
        .await?;
        rows.into_iter().map(listed).collect()
    }

    /// Removes a key; false when there is none of this id.
    ///
    /// # Errors
    /// [`StoreError::Database`].
    pub async fn revoke_api_key(&mut self, key: ApiKeyId) -> Result<bool, StoreError> {
        let workspace = self.id();
        let done =
            sqlx::query("DELETE FROM connect.api_keys WHERE workspace_id = $1 AND key_id = $2")
                .bind(workspace)
                .bind(key.0.as_slice())
                .execute(self.connection())
                .await?;
        Ok(done.rows_affected() == 1)
    }

    /// Looks a key up and notes, to the minute, that it was used; `None` when it has expired or was
    /// revoked.
    ///
    /// # Errors
    /// [`StoreError::Database`], [`StoreError::Corrupt`].
    pub async fn use_api_key(&mut self, key: &ApiKey) -> Result<Option<Authorized>, StoreError> {
        type Row = (Vec<u8>, Vec<u8>, Vec<String>, bool);
        let workspace = self.id();
        let row: Option<Row> = sqlx::query_as(
            "SELECT key_id, agent_id, scopes, coalesce(last_used_at < now() - interval '1 minute', true)
             FROM connect.api_keys
             WHERE workspace_id = $1 AND key_hash = $2 AND expires_at > now()",
        )
        .bind(&workspace)
        .bind(key_hash(key).as_slice())
        .fetch_optional(self.connection())
        .await?;
        let Some((id, agent, names, is_due)) = row else {
            return Ok(None);
        };
        if is_due {
            sqlx::query(
                "UPDATE connect.api_keys SET last_used_at = now()
                 WHERE workspace_id = $1 AND key_id = $2",
            )
            .bind(&workspace)
            .bind(&id)
            .execute(self.connection())
            .await?;
        }
        Ok(Some(Authorized {
            key_id: ApiKeyId(fixed(&id, "key_id")?),
            agent_id: AgentId(fixed(&agent, "agent_id")?),
            scopes: scopes(&names)?,
        }))
    }
}
