//! The table `shared_services`: what the guests of a share look up.

use connect_spec::{
    control::{ListedService, SealedRecord},
    ids::{CredentialId, LookupTag, ServiceId},
};

use super::{StoreError, WorkspaceTx, services};

impl WorkspaceTx {
    /// Stores a service for the guests of a share, over an older record of it; false when the hub holds a
    /// newer one. Share and service must exist.
    ///
    /// # Errors
    /// [`StoreError::Database`].
    pub async fn expose_to_share(
        &mut self,
        share: CredentialId,
        service: ServiceId,
        tag: LookupTag,
        record: &SealedRecord,
    ) -> Result<bool, StoreError> {
        let workspace = self.id();
        let stored = sqlx::query(
            "INSERT INTO connect.shared_services AS h
                 (workspace_id, share_id, service_id, tag, record_epoch, record_counter, record)
             VALUES ($1, $2, $3, $4, $5, $6, $7)
             ON CONFLICT (workspace_id, share_id, service_id) DO UPDATE
             SET tag = $4, record_epoch = $5, record_counter = $6, record = $7
             WHERE h.record_counter <= $6",
        )
        .bind(workspace)
        .bind(share.0.as_slice())
        .bind(service.0.as_slice())
        .bind(tag.0.as_slice())
        .bind(i64::from(record.epoch))
        .bind(i64::from(record.counter))
        .bind(record.sealed.0.as_slice())
        .execute(self.connection())
        .await?;
        Ok(stored.rows_affected() == 1)
    }

    /// The services of a share, or those under a tag, in ascending order of id and as if offline. A share
    /// names few; under one tag there are two only where their names are alike.
    ///
    /// # Errors
    /// [`StoreError::Database`], [`StoreError::Corrupt`].
    pub async fn shared_services(
        &mut self,
        share: CredentialId,
        tag: Option<LookupTag>,
    ) -> Result<Vec<ListedService>, StoreError> {
        let workspace = self.id();
        let rows: Vec<services::Row> = sqlx::query_as(
            "SELECT s.service_id, s.agent_id, h.record_epoch, h.record_counter, h.record
             FROM connect.shared_services h
             JOIN connect.services s
               ON s.workspace_id = h.workspace_id AND s.service_id = h.service_id
             WHERE h.workspace_id = $1 AND h.share_id = $2 AND ($3::bytea IS NULL OR h.tag = $3)
             ORDER BY s.service_id",
        )
        .bind(workspace)
        .bind(share.0.as_slice())
        .bind(tag.map(|tag| tag.0.to_vec()))
        .fetch_all(self.connection())
        .await?;
        rows.into_iter().map(services::listed).collect()
    }
}
