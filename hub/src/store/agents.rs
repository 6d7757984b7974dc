//! The table `agents`.

use connect_spec::{
    control::{ListedAgent, PresentedBlobs, SealedRecord},
    ids::{AgentId, CredentialId},
    keys::{IdentityKey, StaticPublicKey},
};

use super::{StoreError, WorkspaceTx, fixed, unsigned};
use crate::limits::MAX_AGENTS_PER_WORKSPACE;

/// What an agent shows at login, verified.
#[derive(Debug)]
pub struct AgentLogin<'a> {
    /// The agent.
    pub agent_id: AgentId,
    /// Its identity key.
    pub identity_key: IdentityKey,
    /// Its objects, as they travel.
    pub presented: &'a PresentedBlobs,
    /// The credential that its certificate was made under.
    pub credential_id: Option<CredentialId>,
    /// Counter of its NoiseKey.
    pub noise_key_counter: i64,
    /// The key in it.
    pub static_key: StaticPublicKey,
    /// The key to which epochs are wrapped, as it travels.
    pub wrap_key: &'a [u8],
    /// Where it came from, masked.
    pub address: &'a str,
}

/// What must not go backwards.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KnownAgent {
    /// `Signed<Certificate>` of the last login.
    pub certificate: Vec<u8>,
    /// `Signed<Certificate>` that a signer left for the agent.
    pub renewal: Option<Vec<u8>>,
    /// `Signed<NoiseKey>` of the last login.
    pub noise_key: Vec<u8>,
    /// Counter of the newest NoiseKey that the hub saw.
    pub noise_key_counter: i64,
    /// The key in it.
    pub static_key: StaticPublicKey,
    /// The credential under which the agent joined.
    pub credential_id: Option<CredentialId>,
}

/// Whether an agent found its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Upserted {
    /// It is stored.
    Done,
    /// Another session of the same agent was faster: read it again.
    Raced,
    /// The workspace has as many agents as it may; the transaction must not be committed.
    TooMany,
}

impl WorkspaceTx {
    /// The agent, locked until the end of the transaction.
    ///
    /// # Errors
    /// [`StoreError::Database`], [`StoreError::Corrupt`].
    pub async fn lock_agent(&mut self, agent: AgentId) -> Result<Option<KnownAgent>, StoreError> {
        let workspace = self.id();
        type Row = (Vec<u8>, Option<Vec<u8>>, Vec<u8>, i64, Vec<u8>, Option<Vec<u8>>);
        let row: Option<Row> = sqlx::query_as(
            "SELECT certificate, renewal, noise_key, noise_key_counter, static_key, credential_id
             FROM connect.agents WHERE workspace_id = $1 AND agent_id = $2 FOR UPDATE",
        )
        .bind(workspace)
        .bind(agent.0.as_slice())
        .fetch_optional(self.connection())
        .await?;
        row.map(|(certificate, renewal, noise_key, noise_key_counter, key, credential_id)| {
            Ok(KnownAgent {
                certificate,
                renewal,
                noise_key,
                noise_key_counter,
                static_key: StaticPublicKey(fixed(&key, "static_key")?),
                credential_id: credential_id
                    .map(|id| fixed(&id, "credential_id").map(CredentialId))
                    .transpose()?,
            })
        })
        .transpose()
    }

    /// Stores an agent that was not there.
    ///
    /// # Errors
    /// [`StoreError::Database`].
    pub async fn insert_agent(&mut self, login: &AgentLogin<'_>) -> Result<Upserted, StoreError> {
        let workspace = self.id();
        let done = sqlx::query(
            "INSERT INTO connect.agents (workspace_id, agent_id, identity_key, certificate, credential_id,
                 noise_key, noise_key_counter, static_key, wrap_key, last_address)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
             ON CONFLICT DO NOTHING",
        )
        .bind(workspace)
        .bind(login.agent_id.0.as_slice())
        .bind(login.identity_key.0.as_slice())
        .bind(login.presented.certificate.0.as_slice())
        .bind(login.credential_id.map(|id| id.0.to_vec()))
        .bind(login.presented.noise_key.0.as_slice())
        .bind(login.noise_key_counter)
        .bind(login.static_key.0.as_slice())
        .bind(login.wrap_key)
        .bind(login.address)
        .execute(self.connection())
        .await?;
        if done.rows_affected() == 0 {
            return Ok(Upserted::Raced);
        }
        let workspace = self.id();
        let (agents,): (i64,) =
            sqlx::query_as("SELECT count(*) FROM connect.agents WHERE workspace_id = $1")
                .bind(workspace)
                .fetch_one(self.connection())
                .await?;
        Ok(if agents > MAX_AGENTS_PER_WORKSPACE { Upserted::TooMany } else { Upserted::Done })
    }

    /// Leaves a certificate for an agent until it logs in with it.
    ///
    /// # Errors
    /// [`StoreError::Database`].
    pub async fn leave_renewal(
        &mut self,
        agent: AgentId,
        certificate: &[u8],
    ) -> Result<(), StoreError> {
        let workspace = self.id();
        sqlx::query(
            "UPDATE connect.agents SET renewal = $3 WHERE workspace_id = $1 AND agent_id = $2",
        )
        .bind(workspace)
        .bind(agent.0.as_slice())
        .bind(certificate)
        .execute(self.connection())
        .await?;
        Ok(())
    }

    /// Brings a known agent, locked before, up to date with what it shows; what was left for it is gone.
    ///
    /// # Errors
    /// [`StoreError::Database`].
    pub async fn update_agent(&mut self, login: &AgentLogin<'_>) -> Result<(), StoreError> {
        let workspace = self.id();
        sqlx::query(
            "UPDATE connect.agents
             SET certificate = $3, credential_id = $4, noise_key = $5, noise_key_counter = $6,
                 static_key = $7, wrap_key = $8, last_address = $9, last_seen_at = now(),
                 renewal = NULL
             WHERE workspace_id = $1 AND agent_id = $2",
        )
        .bind(workspace)
        .bind(login.agent_id.0.as_slice())
        .bind(login.presented.certificate.0.as_slice())
        .bind(login.credential_id.map(|id| id.0.to_vec()))
        .bind(login.presented.noise_key.0.as_slice())
        .bind(login.noise_key_counter)
        .bind(login.static_key.0.as_slice())
        .bind(login.wrap_key)
        .bind(login.address)
        .execute(self.connection())
        .await?;
        Ok(())
    }

    /// Stores the sealed AgentRecord; false when the hub holds a newer one.
    ///
    /// # Errors
    /// [`StoreError::Database`].
    pub async fn publish_agent(
        &mut self,
        agent: AgentId,
        record: &SealedRecord,
    ) -> Result<bool, StoreError> {
        let workspace = self.id();
        let done = sqlx::query(
            "UPDATE connect.agents SET record_epoch = $3, record_counter = $4, record = $5
             WHERE workspace_id = $1 AND agent_id = $2 AND coalesce(record_counter, 0) <= $4",
        )
        .bind(workspace)
        .bind(agent.0.as_slice())
        .bind(i64::from(record.epoch))
        .bind(i64::from(record.counter))
        .bind(record.sealed.0.as_slice())
        .execute(self.connection())
        .await?;
        Ok(done.rows_affected() == 1)
    }

    /// What these agents showed at their last logins.
    ///
    /// # Errors
    /// [`StoreError::Database`], [`StoreError::Corrupt`].
    pub async fn presented_by(
        &mut self,
        agents: &[AgentId],
    ) -> Result<Vec<(AgentId, PresentedBlobs)>, StoreError> {
        type Row = (Vec<u8>, Vec<u8>, Option<Vec<u8>>, Vec<u8>);
        let workspace = self.id();
        let ids: Vec<Vec<u8>> = agents.iter().map(|id| id.0.to_vec()).collect();
        let rows: Vec<Row> = sqlx::query_as(
            "SELECT a.agent_id, a.certificate, c.credential, a.noise_key
             FROM connect.agents a
             LEFT JOIN connect.credentials c
                 ON c.workspace_id = a.workspace_id AND c.credential_id = a.credential_id
             WHERE a.workspace_id = $1 AND a.agent_id = ANY ($2)",
        )
        .bind(workspace)
        .bind(ids)
        .fetch_all(self.connection())
        .await?;
        rows.into_iter()
            .map(|(id, certificate, credential, noise_key)| {
                let presented = PresentedBlobs {
                    certificate: certificate.into(),
                    credential: credential.map(Into::into),
                    noise_key: noise_key.into(),
                };
                Ok((AgentId(fixed(&id, "agent_id")?), presented))
            })
            .collect()
    }

    /// Up to `limit` agents whose id follows `after`, in ascending order; all as if offline.
    ///
    /// # Errors
    /// [`StoreError::Database`], [`StoreError::Corrupt`].
    pub async fn agents(
        &mut self,
        after: Option<AgentId>,
        limit: i64,
    ) -> Result<Vec<ListedAgent>, StoreError> {
        type Row = (
            Vec<u8>,
            Vec<u8>,
            Option<Vec<u8>>,
            Vec<u8>,
            Option<i64>,
            Option<i64>,
            Option<Vec<u8>>,
            i64,
        );
        let workspace = self.id();
        let rows: Vec<Row> = sqlx::query_as(
            "SELECT a.agent_id, a.certificate, c.credential, a.noise_key,
                    a.record_epoch, a.record_counter, a.record,
                    extract(epoch FROM a.created_at)::bigint
             FROM connect.agents a
             LEFT JOIN connect.credentials c
                 ON c.workspace_id = a.workspace_id AND c.credential_id = a.credential_id
             WHERE a.workspace_id = $1 AND ($2::bytea IS NULL OR a.agent_id > $2)
             ORDER BY a.agent_id LIMIT $3",
        )
        .bind(workspace)
        .bind(after.map(|id| id.0.to_vec()))
        .bind(limit)
        .fetch_all(self.connection())
        .await?;
        rows.into_iter()
            .map(|(id, certificate, credential, noise_key, epoch, counter, sealed, joined)| {
                let record = match (epoch, counter, sealed) {
                    (Some(epoch), Some(counter), Some(sealed)) => Some(SealedRecord {
                        epoch: unsigned(epoch, "record_epoch")?,
                        counter: unsigned(counter, "record_counter")?,
                        sealed: sealed.into(),
                    }),
                    _ => None,
                };
                Ok(ListedAgent {
                    agent_id: AgentId(fixed(&id, "agent_id")?),
                    presented: PresentedBlobs {
                        certificate: certificate.into(),
                        credential: credential.map(Into::into),
                        noise_key: noise_key.into(),
                    },
                    record,
                    online: false,
                    joined_at: unsigned(joined, "created_at")?,
                })
            })
            .collect()
    }
}
