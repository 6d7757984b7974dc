//! The table `log_entries`, and what `workspaces` says of the trust log.

use std::collections::BTreeMap;

use connect_spec::{
    log::{EntryHash, Head, LogEntry},
    trust::TrustState,
};

use super::{StoreError, WorkspaceTx, fixed, unsigned};

/// Rows that a part of the log has at most; its size in bytes ends it earlier.
const PART_ROWS: i64 = 1024;

impl WorkspaceTx {
    /// The newest of these places that the stored log has; `None` when it has none of them.
    ///
    /// # Errors
    /// [`StoreError::Database`], [`StoreError::Corrupt`].
    pub async fn find_in_log(&mut self, places: &[Head]) -> Result<Option<Head>, StoreError> {
        let workspace = self.id();
        // A number beyond what the column holds is in no log.
        let (numbers, hashes): (Vec<i64>, Vec<Vec<u8>>) = places
            .iter()
            .filter_map(|place| Some((i64::try_from(place.seq).ok()?, place.hash.0.to_vec())))
            .unzip();
        let row: Option<(i64, Vec<u8>)> = sqlx::query_as(
            "SELECT e.seq, e.hash FROM connect.log_entries e
             JOIN unnest($2::bigint[], $3::bytea[]) AS place (seq, hash)
                 ON place.seq = e.seq AND place.hash = e.hash
             WHERE e.workspace_id = $1 ORDER BY e.seq DESC LIMIT 1",
        )
        .bind(workspace)
        .bind(numbers)
        .bind(hashes)
        .fetch_optional(self.connection())
        .await?;
        row.map(|(seq, hash)| {
            Ok(Head { seq: unsigned(seq, "seq")?, hash: EntryHash(fixed(&hash, "hash")?) })
        })
        .transpose()
    }

    /// The hashes of the stored entries from number `first` to number `last`.
    ///
    /// # Errors
    /// [`StoreError::Database`], [`StoreError::Corrupt`].
    pub async fn log_hashes(
        &mut self,
        first: u64,
        last: u64,
    ) -> Result<BTreeMap<u64, EntryHash>, StoreError> {
        let workspace = self.id();
        let rows: Vec<(i64, Vec<u8>)> = sqlx::query_as(
            "SELECT seq, hash FROM connect.log_entries
             WHERE workspace_id = $1 AND seq BETWEEN $2 AND $3",
        )
        .bind(workspace)
        .bind(column(first))
        .bind(column(last))
        .fetch_all(self.connection())
        .await?;
        rows.into_iter()
            .map(|(seq, hash)| Ok((unsigned(seq, "seq")?, EntryHash(fixed(&hash, "hash")?))))
            .collect()
    }

    /// The entries after number `after`, in order, as they travel: at most `bytes` of them together, but
    /// at least one if there is one.
    ///
    /// # Errors
    /// [`StoreError::Database`].
    pub async fn log_part(&mut self, after: u64, bytes: usize) -> Result<Vec<Vec<u8>>, StoreError> {
        let workspace = self.id();
        let rows: Vec<(Vec<u8>,)> = sqlx::query_as(
            "SELECT entry FROM (
                 SELECT seq, entry, row_number() OVER (ORDER BY seq) AS number,
                        sum(octet_length(entry)) OVER (ORDER BY seq) AS total
                 FROM (SELECT seq, entry FROM connect.log_entries
                       WHERE workspace_id = $1 AND seq > $2 ORDER BY seq LIMIT $4) AS part
             ) AS measured
             WHERE number = 1 OR total <= $3 ORDER BY seq",
        )
        .bind(workspace)
        .bind(column(after))
        .bind(i64::try_from(bytes).unwrap_or(i64::MAX))
        .bind(PART_ROWS)
        .fetch_all(self.connection())
        .await?;
        Ok(rows.into_iter().map(|(entry,)| entry).collect())
    }

    /// Stores entries that follow the head, which moves to the last of them.
    ///
    /// # Errors
    /// [`StoreError::Database`].
    pub async fn append_to_log(&mut self, entries: &[LogEntry]) -> Result<(), StoreError> {
        let Some(head) = entries.last().map(LogEntry::head) else {
            return Ok(());
        };
        let workspace = self.id();
        let numbers: Vec<i64> = entries.iter().map(|entry| column(entry.head().seq)).collect();
        let hashes: Vec<Vec<u8>> = entries.iter().map(|entry| entry.hash().0.to_vec()).collect();
        let wires: Vec<Vec<u8>> = entries.iter().map(LogEntry::encode).collect();
        sqlx::query(
            "INSERT INTO connect.log_entries (workspace_id, seq, hash, entry)
             SELECT $1, new.seq, new.hash, new.entry
             FROM unnest($2::bigint[], $3::bytea[], $4::bytea[]) AS new (seq, hash, entry)",
        )
        .bind(&workspace)
        .bind(numbers)
        .bind(hashes)
        .bind(wires)
        .execute(self.connection())
        .await?;
        sqlx::query(
            "UPDATE connect.workspaces SET head_seq = $2, head_hash = $3 WHERE workspace_id = $1",
        )
        .bind(workspace)
        .bind(column(head.seq))
        .bind(head.hash.0.as_slice())
        .execute(self.connection())
        .await?;
        Ok(())
    }

    /// Stores entries in place of all that follow number `base`, and the state that they lead to.
    ///
    /// # Errors
    /// [`StoreError::Database`].
    pub async fn replace_in_log(
        &mut self,
        base: u64,
        entries: &[LogEntry],
        state: &TrustState,
    ) -> Result<(), StoreError> {
        let workspace = self.id();
        sqlx::query("DELETE FROM connect.log_entries WHERE workspace_id = $1 AND seq > $2")
            .bind(&workspace)
            .bind(column(base))
            .execute(self.connection())
            .await?;
        self.append_to_log(entries).await?;
        let state = serde_json::to_vec(state).map_err(|_| StoreError::Corrupt("trust"))?;
        sqlx::query(
            "UPDATE connect.workspaces SET replaced = replaced + 1, trust = $2
             WHERE workspace_id = $1",
        )
        .bind(workspace)
        .bind(state)
        .execute(self.connection())
        .await?;
        Ok(())
    }

    /// The state that the last replacement in the log led to, and its length as stored.
    ///
    /// # Errors
    /// [`StoreError::Database`], [`StoreError::Corrupt`].
    pub async fn replaced_trust(&mut self) -> Result<Option<(TrustState, usize)>, StoreError> {
        let workspace = self.id();
        let (raw,): (Option<Vec<u8>>,) =
            sqlx::query_as("SELECT trust FROM connect.workspaces WHERE workspace_id = $1")
                .bind(workspace)
                .fetch_one(self.connection())
                .await?;
        raw.map(|raw| {
            let state = serde_json::from_slice(&raw).map_err(|_| StoreError::Corrupt("trust"))?;
            Ok((state, raw.len()))
        })
        .transpose()
    }
}

/// A number of the log as its column holds it. No entry that was verified has a larger one.
fn column(seq: u64) -> i64 {
    i64::try_from(seq).unwrap_or(i64::MAX)
}
