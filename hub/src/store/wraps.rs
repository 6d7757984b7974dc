//! The table `wraps`: the secrets of an epoch, for one agent or one credential each.

use connect_spec::{
    control::{AddressedWrap, EpochWrap, PresentedBlobs, Recipient, UnwrappedAgent},
    ids::{AgentId, CredentialId},
};

use super::{StoreError, WorkspaceTx, fixed, unsigned};

/// A credential without a wrap that agents may still join by.
#[derive(Debug)]
pub struct UnwrappedRow {
    /// Its id.
    pub id: CredentialId,
    /// `Signed<Credential>`.
    pub credential: Vec<u8>,
    /// The key to wrap to.
    pub wrap_key: Vec<u8>,
}

impl WorkspaceTx {
    /// Up to `limit` agents without a wrap of an epoch whose id follows `after`, in ascending order.
    ///
    /// # Errors
    /// [`StoreError::Database`], [`StoreError::Corrupt`].
    pub async fn agents_without_wrap(
        &mut self,
        epoch: u32,
        after: Option<AgentId>,
        limit: i64,
    ) -> Result<Vec<UnwrappedAgent>, StoreError> {
        type Row = (Vec<u8>, Vec<u8>, Option<Vec<u8>>, Vec<u8>, Vec<u8>);
        let workspace = self.id();
        let rows: Vec<Row> = sqlx::query_as(
            "SELECT a.agent_id, a.certificate, c.credential, a.noise_key, a.wrap_key
             FROM connect.agents a
             LEFT JOIN connect.credentials c
                 ON c.workspace_id = a.workspace_id AND c.credential_id = a.credential_id
             WHERE a.workspace_id = $1 AND ($3::bytea IS NULL OR a.agent_id > $3)
               AND NOT EXISTS (SELECT FROM connect.wraps w
                               WHERE w.workspace_id = a.workspace_id AND w.agent_id = a.agent_id
                                 AND w.epoch = $2)
             ORDER BY a.agent_id LIMIT $4",
        )
        .bind(workspace)
        .bind(i64::from(epoch))
        .bind(after.map(|id| id.0.to_vec()))
        .bind(limit)
        .fetch_all(self.connection())
        .await?;
        rows.into_iter()
            .map(|(id, certificate, credential, noise_key, wrap_key)| {
                Ok(UnwrappedAgent {
                    agent_id: AgentId(fixed(&id, "agent_id")?),
                    presented: PresentedBlobs {
                        certificate: certificate.into(),
                        credential: credential.map(Into::into),
                        noise_key: noise_key.into(),
                    },
                    wrap_key: wrap_key.into(),
                })
            })
            .collect()
    }

    /// Up to `limit` invites without a wrap of an epoch that have uses left at the time `now`, whose id
    /// follows `after`, in ascending order.
    ///
    /// # Errors
    /// [`StoreError::Database`], [`StoreError::Corrupt`].
    pub async fn invites_without_wrap(
        &mut self,
        epoch: u32,
        now: u64,
        after: Option<CredentialId>,
        limit: i64,
    ) -> Result<Vec<UnwrappedRow>, StoreError> {
        let workspace = self.id();
        let rows: Vec<(Vec<u8>, Vec<u8>, Vec<u8>)> = sqlx::query_as(
            "SELECT c.credential_id, c.credential, c.wrap_key FROM connect.credentials c
             WHERE c.workspace_id = $1 AND ($4::bytea IS NULL OR c.credential_id > $4)
               AND c.kind = 1 AND c.wrap_key IS NOT NULL AND c.used < c.uses AND c.join_until >= $3
               AND NOT EXISTS (SELECT FROM connect.wraps w
                               WHERE w.workspace_id = c.workspace_id
                                 AND w.credential_id = c.credential_id AND w.epoch = $2)
             ORDER BY c.credential_id LIMIT $5",
        )
        .bind(workspace)
        .bind(i64::from(epoch))
        .bind(i64::try_from(now).unwrap_or(i64::MAX))
        .bind(after.map(|id| id.0.to_vec()))
        .bind(limit)
        .fetch_all(self.connection())
        .await?;
        rows.into_iter()
            .map(|(id, credential, wrap_key)| {
                let id = CredentialId(fixed(&id, "credential_id")?);
                Ok(UnwrappedRow { id, credential, wrap_key })
            })
            .collect()
    }

    /// Stores a wrap over an older one of the same epoch; false when there is no such recipient.
    ///
    /// # Errors
    /// [`StoreError::Database`].
    pub async fn store_wrap(&mut self, addressed: &AddressedWrap) -> Result<bool, StoreError> {
        let workspace = self.id();
        let (sql, id) = match addressed.recipient {
            Recipient::Agent(id) => (
                "INSERT INTO connect.wraps (workspace_id, epoch, agent_id, wrap)
                 SELECT workspace_id, $2, agent_id, $4 FROM connect.agents
                 WHERE workspace_id = $1 AND agent_id = $3
                 ON CONFLICT (workspace_id, agent_id, epoch) WHERE agent_id IS NOT NULL
                     DO UPDATE SET wrap = excluded.wrap",
                id.0,
            ),
            Recipient::Credential(id) => (
                "INSERT INTO connect.wraps (workspace_id, epoch, credential_id, wrap)
                 SELECT workspace_id, $2, credential_id, $4 FROM connect.credentials
                 WHERE workspace_id = $1 AND credential_id = $3
                 ON CONFLICT (workspace_id, credential_id, epoch) WHERE credential_id IS NOT NULL
                     DO UPDATE SET wrap = excluded.wrap",
                id.0,
            ),
        };
        let done = sqlx::query(sql)
            .bind(workspace)
            .bind(i64::from(addressed.wrap.epoch))
            .bind(id.as_slice())
            .bind(addressed.wrap.sealed.0.as_slice())
            .execute(self.connection())
            .await?;
        Ok(done.rows_affected() == 1)
    }

    /// Removes the wraps of epochs below `oldest` of all that have a newer one.
    ///
    /// # Errors
    /// [`StoreError::Database`].
    pub async fn forget_wraps_below(&mut self, oldest: u32) -> Result<(), StoreError> {
        let workspace = self.id();
        sqlx::query(
            "DELETE FROM connect.wraps old WHERE old.workspace_id = $1 AND old.epoch < $2
               AND EXISTS (SELECT FROM connect.wraps new
                           WHERE new.workspace_id = $1 AND new.epoch >= $2
                             AND (new.agent_id = old.agent_id
                                  OR new.credential_id = old.credential_id))",
        )
        .bind(workspace)
        .bind(i64::from(oldest))
        .execute(self.connection())
        .await?;
        Ok(())
    }

    /// The wrap of an epoch for an agent.
    ///
    /// # Errors
    /// [`StoreError::Database`], [`StoreError::Corrupt`].
    pub async fn agent_wrap(
        &mut self,
        agent: AgentId,
        epoch: u32,
    ) -> Result<Option<EpochWrap>, StoreError> {
        let workspace = self.id();
        let row: Option<(Vec<u8>,)> = sqlx::query_as(
            "SELECT wrap FROM connect.wraps
             WHERE workspace_id = $1 AND agent_id = $2 AND epoch = $3",
        )
        .bind(workspace)
        .bind(agent.0.as_slice())
        .bind(i64::from(epoch))
        .fetch_optional(self.connection())
        .await?;
        Ok(row.map(|(wrap,)| EpochWrap { epoch, sealed: wrap.into() }))
    }

    /// The newest wrap for the holder of a credential.
    ///
    /// # Errors
    /// [`StoreError::Database`], [`StoreError::Corrupt`].
    pub async fn newest_credential_wrap(
        &mut self,
        id: CredentialId,
    ) -> Result<Option<EpochWrap>, StoreError> {
        let workspace = self.id();
        let row: Option<(i64, Vec<u8>)> = sqlx::query_as(
            "SELECT epoch, wrap FROM connect.wraps WHERE workspace_id = $1 AND credential_id = $2
             ORDER BY epoch DESC LIMIT 1",
        )
        .bind(workspace)
        .bind(id.0.as_slice())
        .fetch_optional(self.connection())
        .await?;
        row.map(|(epoch, wrap)| {
            Ok(EpochWrap { epoch: unsigned(epoch, "epoch")?, sealed: wrap.into() })
        })
        .transpose()
    }
}
