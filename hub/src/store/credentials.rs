//! The tables `credentials` and `wraps`: invites, and what their holders need to join.

use connect_spec::{control::EpochWrap, ids::CredentialId, objects::CredentialKind};

use super::{StoreError, WorkspaceTx, unsigned};

/// A credential to store, verified.
#[derive(Debug)]
pub struct NewCredential<'a> {
    /// Its id.
    pub id: CredentialId,
    /// `Signed<Credential>`.
    pub credential: &'a [u8],
    /// Invite or share.
    pub kind: CredentialKind,
    /// How many agents may join with it.
    pub uses: u32,
    /// Unix time after which nobody joins with it.
    pub join_until: i64,
    /// Unix time after which certificates made under it are invalid.
    pub certs_end: i64,
    /// The public key to which later epochs are wrapped.
    pub wrap_key: &'a [u8],
    /// M and W of the current epoch.
    pub wrap: &'a EpochWrap,
}

/// A credential as stored.
#[derive(Debug)]
pub struct CredentialRow {
    /// `Signed<Credential>`.
    pub credential: Vec<u8>,
    /// How many agents may join with it.
    pub uses: u32,
    /// How many did.
    pub used: u32,
    /// Unix time after which nobody joins with it.
    pub join_until: u64,
}

impl WorkspaceTx {
    /// Stores a credential with its wrap; false when the id exists already.
    ///
    /// # Errors
    /// [`StoreError::Database`].
    pub async fn insert_credential(&mut self, new: &NewCredential<'_>) -> Result<bool, StoreError> {
        let workspace = self.id();
        let kind: i16 = match new.kind {
            CredentialKind::Invite => 1,
            CredentialKind::Share => 2,
        };
        let inserted = sqlx::query(
            "INSERT INTO connect.credentials
                 (workspace_id, credential_id, credential, kind, uses, join_until, certs_end, wrap_key)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8)
             ON CONFLICT DO NOTHING",
        )
        .bind(&workspace)
        .bind(new.id.0.as_slice())
        .bind(new.credential)
        .bind(kind)
        .bind(i64::from(new.uses))
        .bind(new.join_until)
        .bind(new.certs_end)
        .bind(new.wrap_key)
        .execute(self.connection())
        .await?;
        if inserted.rows_affected() == 0 {
            return Ok(false);
        }
        sqlx::query(
            "INSERT INTO connect.wraps (workspace_id, epoch, credential_id, wrap) VALUES ($1, $2, $3, $4)",
        )
        .bind(&workspace)
        .bind(i64::from(new.wrap.epoch))
        .bind(new.id.0.as_slice())
        .bind(new.wrap.sealed.0.as_slice())
        .execute(self.connection())
        .await?;
        Ok(true)
    }

    /// The credential of this id.
    ///
    /// # Errors
    /// [`StoreError::Database`], [`StoreError::Corrupt`].
    pub async fn find_credential(
        &mut self,
        id: CredentialId,
    ) -> Result<Option<CredentialRow>, StoreError> {
        let workspace = self.id();
        let row: Option<(Vec<u8>, i64, i64, i64)> = sqlx::query_as(
            "SELECT credential, uses, used, join_until FROM connect.credentials
             WHERE workspace_id = $1 AND credential_id = $2",
        )
        .bind(workspace)
        .bind(id.0.as_slice())
        .fetch_optional(self.connection())
        .await?;
        row.map(|(credential, uses, used, join_until)| {
            Ok(CredentialRow {
                credential,
                uses: unsigned(uses, "uses")?,
                used: unsigned(used, "used")?,
                join_until: unsigned(join_until, "join_until")?,
            })
        })
        .transpose()
    }

    /// Counts one use; false when all are spent. Two that join at once cannot both take the last.
    ///
    /// # Errors
    /// [`StoreError::Database`].
    pub async fn spend_credential_use(&mut self, id: CredentialId) -> Result<bool, StoreError> {
        let workspace = self.id();
        let done = sqlx::query(
            "UPDATE connect.credentials SET used = used + 1
             WHERE workspace_id = $1 AND credential_id = $2 AND used < uses",
        )
        .bind(workspace)
        .bind(id.0.as_slice())
        .execute(self.connection())
        .await?;
        Ok(done.rows_affected() == 1)
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
