//! The tables `audit_heads` and `audit_events`.

use std::time::Duration;

use connect_spec::{
    audit::{AuditHash, AuditHead, AuditRow, Recorded},
    ids::AgentId,
};

use super::{Store, StoreError, WorkspaceTx, fixed, unsigned};

/// Which rows are wanted. The default is all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AuditFilter {
    /// Those after this number.
    pub after: u64,
    /// Those not older than this, in milliseconds since 1970.
    pub since: Option<u64>,
    /// Those not younger than this, in milliseconds since 1970.
    pub until: Option<u64>,
    /// Those of this kind.
    pub kind: Option<String>,
    /// Those that an agent did, or had done to it.
    pub agent: Option<AgentId>,
}

/// Where an audit log begins and ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AuditBounds {
    /// The last row that was removed for its age.
    pub base: AuditHead,
    /// The last row.
    pub head: AuditHead,
}

impl WorkspaceTx {
    /// Appends events to the audit log: last of all before the commit, since others wait for it.
    ///
    /// # Errors
    /// [`StoreError::Database`].
    pub async fn record(&mut self, events: &[Recorded]) -> Result<(), StoreError> {
        if events.is_empty() {
            return Ok(());
        }
        let events: Vec<String> = events.iter().map(Recorded::encode).collect();
        sqlx::query("SELECT connect.append_audit($1)")
            .bind(events)
            .execute(self.connection())
            .await?;
        Ok(())
    }

    /// Where the audit log begins and ends.
    ///
    /// # Errors
    /// [`StoreError::Database`], [`StoreError::Corrupt`].
    pub async fn audit_bounds(&mut self) -> Result<AuditBounds, StoreError> {
        let workspace = self.id();
        let row: Option<(i64, Vec<u8>, i64, Vec<u8>)> = sqlx::query_as(
            "SELECT base_seq, base_hash, seq, hash FROM connect.audit_heads WHERE workspace_id = $1",
        )
        .bind(workspace)
        .fetch_optional(self.connection())
        .await?;
        let Some((base_seq, base_hash, seq, hash)) = row else {
            return Ok(AuditBounds { base: AuditHead::EMPTY, head: AuditHead::EMPTY });
        };
        Ok(AuditBounds {
            base: AuditHead {
                seq: unsigned(base_seq, "base_seq")?,
                hash: AuditHash(fixed(&base_hash, "base_hash")?),
            },
            head: AuditHead { seq: unsigned(seq, "seq")?, hash: AuditHash(fixed(&hash, "hash")?) },
        })
    }

    /// Up to `limit` rows of the audit log, in order.
    ///
    /// # Errors
    /// [`StoreError::Database`], [`StoreError::Corrupt`].
    pub async fn audit_rows(
        &mut self,
        filter: &AuditFilter,
        limit: i64,
    ) -> Result<Vec<AuditRow>, StoreError> {
        let workspace = self.id();
        let column = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        let rows: Vec<(i64, Vec<u8>, String)> = sqlx::query_as(
            "SELECT seq, hash, event FROM connect.audit_events
             WHERE workspace_id = $1 AND seq > $2 AND ($3::bigint IS NULL OR at >= $3)
               AND ($4::bigint IS NULL OR at <= $4) AND ($5::text IS NULL OR kind = $5)
               AND ($6::text IS NULL OR agent_id = $6 OR peer_id = $6)
             ORDER BY seq LIMIT $7",
        )
        .bind(workspace)
        .bind(column(filter.after))
        .bind(filter.since.map(column))
        .bind(filter.until.map(column))
        .bind(filter.kind.as_deref())
        .bind(filter.agent.map(|agent| agent.to_string()))
        .bind(limit)
        .fetch_all(self.connection())
        .await?;
        rows.into_iter()
            .map(|(seq, hash, event)| {
                let (seq, hash) = (unsigned(seq, "seq")?, AuditHash(fixed(&hash, "hash")?));
                Ok(AuditRow { seq, hash, event })
            })
            .collect()
    }
}

impl Store {
    /// Removes rows of all audit logs that are older than `keep`, as many as are quickly done; says how
    /// many. None are left when it says 0.
    ///
    /// # Errors
    /// [`StoreError::Database`]; also when `keep` is less than 30 days.
    pub async fn expire_audit(&self, keep: Duration) -> Result<u64, StoreError> {
        let (removed,): (i64,) =
            sqlx::query_as("SELECT connect.expire_audit(make_interval(secs => $1))")
                .bind(keep.as_secs_f64())
                .fetch_one(&self.pool)
                .await?;
        unsigned(removed, "expire_audit")
    }
}
