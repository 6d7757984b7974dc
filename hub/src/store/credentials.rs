//! The table `credentials`: invites and shares.

use connect_spec::{
    control::{EpochWrap, ListedCredential},
    ids::CredentialId,
    objects::CredentialKind,
};

use super::{StoreError, WorkspaceTx, fixed, unsigned};

/// Rows that are looked at to count the open ones among them.
const MAX_USABLE_ROWS: i64 = 65_536;

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
    /// What lets it be used. Without that it is stored as used up.
    pub open: Option<Opening<'a>>,
}

/// What comes with a credential that is to be used.
#[derive(Debug, Clone, Copy)]
pub enum Opening<'a> {
    /// With an invite.
    Invite {
        /// The public key to which later epochs are wrapped.
        wrap_key: &'a [u8],
        /// M and W of the current one.
        wrap: &'a EpochWrap,
    },
    /// With a share.
    Share {
        /// The sealed ShareRecord.
        record: &'a [u8],
    },
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

/// A listed credential: id, wire, how often it was used, and what a share is called.
type Row = (Vec<u8>, Vec<u8>, i64, Option<Vec<u8>>);

/// A kind as its column holds it.
fn column(kind: CredentialKind) -> i16 {
    match kind {
        CredentialKind::Invite => 1,
        CredentialKind::Share => 2,
    }
}

impl WorkspaceTx {
    /// Stores a credential, with its wrap if it is to be used; false when the id exists already.
    ///
    /// # Errors
    /// [`StoreError::Database`].
    pub async fn insert_credential(&mut self, new: &NewCredential<'_>) -> Result<bool, StoreError> {
        let workspace = self.id();
        let (wrap_key, wrap, record) = match new.open {
            Some(Opening::Invite { wrap_key, wrap }) => (Some(wrap_key), Some(wrap), None),
            Some(Opening::Share { record }) => (None, None, Some(record)),
            None => (None, None, None),
        };
        let inserted = sqlx::query(
            "INSERT INTO connect.credentials
                 (workspace_id, credential_id, credential, kind, uses, used, join_until, certs_end, wrap_key,
                  record)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
             ON CONFLICT DO NOTHING",
        )
        .bind(&workspace)
        .bind(new.id.0.as_slice())
        .bind(new.credential)
        .bind(column(new.kind))
        .bind(i64::from(new.uses))
        .bind(if new.open.is_some() { 0 } else { i64::from(new.uses) })
        .bind(new.join_until)
        .bind(new.certs_end)
        .bind(wrap_key)
        .bind(record)
        .execute(self.connection())
        .await?;
        if inserted.rows_affected() == 0 {
            return Ok(false);
        }
        let Some(wrap) = wrap else {
            return Ok(true);
        };
        sqlx::query(
            "INSERT INTO connect.wraps (workspace_id, epoch, credential_id, wrap) VALUES ($1, $2, $3, $4)",
        )
        .bind(&workspace)
        .bind(i64::from(wrap.epoch))
        .bind(new.id.0.as_slice())
        .bind(wrap.sealed.0.as_slice())
        .execute(self.connection())
        .await?;
        Ok(true)
    }

    /// Those of which a use is left and whose time is not over, closed ones among them; of very many a part.
    ///
    /// # Errors
    /// [`StoreError::Database`], [`StoreError::Corrupt`].
    pub async fn usable_credentials(&mut self, now: i64) -> Result<Vec<CredentialId>, StoreError> {
        let workspace = self.id();
        let rows: Vec<(Vec<u8>,)> = sqlx::query_as(
            "SELECT credential_id FROM connect.credentials
             WHERE workspace_id = $1 AND used < uses AND join_until >= $2 LIMIT $3",
        )
        .bind(workspace)
        .bind(now)
        .bind(MAX_USABLE_ROWS)
        .fetch_all(self.connection())
        .await?;
        rows.iter().map(|(id,)| Ok(CredentialId(fixed(id, "credential_id")?))).collect()
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

    /// Up to `limit` credentials whose id follows `after`, in ascending order, closed ones too.
    ///
    /// # Errors
    /// [`StoreError::Database`], [`StoreError::Corrupt`].
    pub async fn credentials(
        &mut self,
        after: Option<CredentialId>,
        limit: i64,
    ) -> Result<Vec<(CredentialId, ListedCredential)>, StoreError> {
        self.list_credentials(None, after, limit).await
    }

    /// The shares among them.
    ///
    /// # Errors
    /// [`StoreError::Database`], [`StoreError::Corrupt`].
    pub async fn shares(
        &mut self,
        after: Option<CredentialId>,
        limit: i64,
    ) -> Result<Vec<(CredentialId, ListedCredential)>, StoreError> {
        self.list_credentials(Some(CredentialKind::Share), after, limit).await
    }

    async fn list_credentials(
        &mut self,
        kind: Option<CredentialKind>,
        after: Option<CredentialId>,
        limit: i64,
    ) -> Result<Vec<(CredentialId, ListedCredential)>, StoreError> {
        let workspace = self.id();
        let rows: Vec<Row> = sqlx::query_as(
            "SELECT credential_id, credential, used, record FROM connect.credentials
             WHERE workspace_id = $1 AND ($2::bytea IS NULL OR credential_id > $2)
               AND ($4::smallint IS NULL OR kind = $4)
             ORDER BY credential_id LIMIT $3",
        )
        .bind(workspace)
        .bind(after.map(|id| id.0.to_vec()))
        .bind(limit)
        .bind(kind.map(column))
        .fetch_all(self.connection())
        .await?;
        rows.into_iter()
            .map(|(id, credential, used, record)| {
                let (credential, record) = (credential.into(), record.map(Into::into));
                Ok((
                    CredentialId(fixed(&id, "credential_id")?),
                    ListedCredential { credential, used: unsigned(used, "used")?, record },
                ))
            })
            .collect()
    }
}
