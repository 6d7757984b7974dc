//! The table `workspaces`.

use connect_spec::log::{EntryHash, Head};

use super::{StoreError, WorkspaceTx, fixed, unsigned};

/// A workspace as stored.
#[derive(Debug)]
pub struct WorkspaceRow {
    /// `Signed<Genesis>`.
    pub genesis: Vec<u8>,
    /// The head of the trust log.
    pub head: Head,
    /// How often the end of the log was replaced.
    pub replaced: u64,
}

impl WorkspaceTx {
    /// This workspace, if the hub knows it.
    ///
    /// # Errors
    /// [`StoreError::Database`], [`StoreError::Corrupt`].
    pub async fn find_workspace(&mut self) -> Result<Option<WorkspaceRow>, StoreError> {
        self.workspace_row(
            "SELECT genesis, head_seq, head_hash, replaced FROM connect.workspaces
             WHERE workspace_id = $1",
        )
        .await
    }

    /// The same, with a log that stays as it is until the end of the transaction.
    ///
    /// # Errors
    /// [`StoreError::Database`], [`StoreError::Corrupt`].
    pub async fn find_workspace_at_rest(&mut self) -> Result<Option<WorkspaceRow>, StoreError> {
        self.workspace_row(
            "SELECT genesis, head_seq, head_hash, replaced FROM connect.workspaces
             WHERE workspace_id = $1 FOR SHARE",
        )
        .await
    }

    /// The same, with a log that only this transaction may change until its end.
    ///
    /// # Errors
    /// [`StoreError::Database`], [`StoreError::Corrupt`].
    pub async fn lock_workspace(&mut self) -> Result<Option<WorkspaceRow>, StoreError> {
        self.workspace_row(
            "SELECT genesis, head_seq, head_hash, replaced FROM connect.workspaces
             WHERE workspace_id = $1 FOR NO KEY UPDATE",
        )
        .await
    }

    async fn workspace_row(
        &mut self,
        sql: &'static str,
    ) -> Result<Option<WorkspaceRow>, StoreError> {
        let id = self.id();
        let row: Option<(Vec<u8>, i64, Vec<u8>, i64)> =
            sqlx::query_as(sql).bind(id).fetch_optional(self.connection()).await?;
        row.map(|(genesis, seq, hash, replaced)| {
            let head = Head {
                seq: unsigned(seq, "head_seq")?,
                hash: EntryHash(fixed(&hash, "head_hash")?),
            };
            Ok(WorkspaceRow { genesis, head, replaced: unsigned(replaced, "replaced")? })
        })
        .transpose()
    }

    /// Stores this workspace with a log that holds `genesis` alone; false when it exists already.
    ///
    /// # Errors
    /// [`StoreError::Database`].
    pub async fn insert_workspace(&mut self, genesis: &[u8]) -> Result<bool, StoreError> {
        let id = self.id();
        let head = Head::genesis(self.workspace);
        let done = sqlx::query(
            "INSERT INTO connect.workspaces (workspace_id, genesis, head_hash) VALUES ($1, $2, $3)
             ON CONFLICT DO NOTHING",
        )
        .bind(id)
        .bind(genesis)
        .bind(head.hash.0.as_slice())
        .execute(self.connection())
        .await?;
        Ok(done.rows_affected() == 1)
    }
}
