//! The table `services`.

use std::collections::HashSet;

use connect_spec::{
    control::{ListedService, SealedRecord},
    ids::{AgentId, LookupTag, ServiceId},
};

use super::{StoreError, WorkspaceTx, fixed, unsigned};
use crate::limits::{MAX_SERVICES_PER_AGENT, MAX_SERVICES_PER_WORKSPACE};

/// What came of [`WorkspaceTx::expose`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exposed {
    /// Stored; it was not there before.
    New,
    /// Stored over an older record.
    Renewed,
    /// This agent has the name (or the id) already.
    TakenBy(AgentId),
    /// The hub holds a newer record of this service.
    Stale,
    /// It would be one too many of this agent or workspace; the transaction must not be committed.
    TooMany(&'static str),
}

pub(super) type Row = (Vec<u8>, Vec<u8>, i64, i64, Vec<u8>);

/// Reads a row; whether the exposer is online is for the caller to fill in.
pub(super) fn listed(
    (service, agent, epoch, counter, sealed): Row,
) -> Result<ListedService, StoreError> {
    Ok(ListedService {
        service_id: ServiceId(fixed(&service, "service_id")?),
        agent_id: AgentId(fixed(&agent, "agent_id")?),
        record: SealedRecord {
            epoch: unsigned(epoch, "record_epoch")?,
            counter: unsigned(counter, "record_counter")?,
            sealed: sealed.into(),
        },
        online: false,
    })
}

impl WorkspaceTx {
    /// Stores a service of `agent`, over an older record of it.
    ///
    /// The agent's own other service under the same tag gives way: it is the same name with a new id.
    ///
    /// # Errors
    /// [`StoreError::Database`], [`StoreError::Corrupt`].
    pub async fn expose(
        &mut self,
        agent: AgentId,
        service: ServiceId,
        tag: LookupTag,
        record: &SealedRecord,
    ) -> Result<Exposed, StoreError> {
        let workspace = self.id();
        sqlx::query(
            "DELETE FROM connect.services
             WHERE workspace_id = $1 AND tag = $2 AND agent_id = $3 AND service_id <> $4",
        )
        .bind(&workspace)
        .bind(tag.0.as_slice())
        .bind(agent.0.as_slice())
        .bind(service.0.as_slice())
        .execute(self.connection())
        .await?;
        // Waits for a transaction that is inserting the same tag, so the check below sees its row.
        let inserted = sqlx::query(
            "INSERT INTO connect.services
                 (workspace_id, service_id, agent_id, tag, record_epoch, record_counter, record)
             VALUES ($1, $2, $3, $4, $5, $6, $7)
             ON CONFLICT DO NOTHING",
        )
        .bind(&workspace)
        .bind(service.0.as_slice())
        .bind(agent.0.as_slice())
        .bind(tag.0.as_slice())
        .bind(i64::from(record.epoch))
        .bind(i64::from(record.counter))
        .bind(record.sealed.0.as_slice())
        .execute(self.connection())
        .await?;
        if inserted.rows_affected() == 1 {
            return self.count_services(agent).await;
        }
        let holder: Option<(Vec<u8>,)> = sqlx::query_as(
            "SELECT agent_id FROM connect.services
             WHERE workspace_id = $1 AND (tag = $2 OR service_id = $3) AND agent_id <> $4 LIMIT 1",
        )
        .bind(&workspace)
        .bind(tag.0.as_slice())
        .bind(service.0.as_slice())
        .bind(agent.0.as_slice())
        .fetch_optional(self.connection())
        .await?;
        if let Some((holder,)) = holder {
            return Ok(Exposed::TakenBy(AgentId(fixed(&holder, "agent_id")?)));
        }
        let updated = sqlx::query(
            "UPDATE connect.services
             SET tag = $4, record_epoch = $5, record_counter = $6, record = $7, updated_at = now()
             WHERE workspace_id = $1 AND service_id = $2 AND agent_id = $3 AND record_counter <= $6",
        )
        .bind(&workspace)
        .bind(service.0.as_slice())
        .bind(agent.0.as_slice())
        .bind(tag.0.as_slice())
        .bind(i64::from(record.epoch))
        .bind(i64::from(record.counter))
        .bind(record.sealed.0.as_slice())
        .execute(self.connection())
        .await?;
        Ok(if updated.rows_affected() == 1 { Exposed::Renewed } else { Exposed::Stale })
    }

    /// Whether what was inserted is within the limits. Those who insert at the same moment do not see each
    /// other, so a limit is passed by a few at most.
    async fn count_services(&mut self, agent: AgentId) -> Result<Exposed, StoreError> {
        let workspace = self.id();
        let (all, own): (i64, i64) = sqlx::query_as(
            "SELECT count(*), count(*) FILTER (WHERE agent_id = $2)
             FROM connect.services WHERE workspace_id = $1",
        )
        .bind(workspace)
        .bind(agent.0.as_slice())
        .fetch_one(self.connection())
        .await?;
        Ok(if own > MAX_SERVICES_PER_AGENT {
            Exposed::TooMany("this agent")
        } else if all > MAX_SERVICES_PER_WORKSPACE {
            Exposed::TooMany("this workspace")
        } else {
            Exposed::New
        })
    }

    /// Removes a service of `agent`; false when it has none of this id.
    ///
    /// # Errors
    /// [`StoreError::Database`].
    pub async fn unexpose(
        &mut self,
        agent: AgentId,
        service: ServiceId,
    ) -> Result<bool, StoreError> {
        let workspace = self.id();
        let done = sqlx::query(
            "DELETE FROM connect.services WHERE workspace_id = $1 AND service_id = $2 AND agent_id = $3",
        )
        .bind(workspace)
        .bind(service.0.as_slice())
        .bind(agent.0.as_slice())
        .execute(self.connection())
        .await?;
        Ok(done.rows_affected() == 1)
    }

    /// Takes a name from the agent that has it.
    ///
    /// # Errors
    /// [`StoreError::Database`].
    pub async fn withdraw_name(
        &mut self,
        holder: AgentId,
        tag: LookupTag,
    ) -> Result<(), StoreError> {
        let workspace = self.id();
        sqlx::query(
            "DELETE FROM connect.services WHERE workspace_id = $1 AND tag = $2 AND agent_id = $3",
        )
        .bind(workspace)
        .bind(tag.0.as_slice())
        .bind(holder.0.as_slice())
        .execute(self.connection())
        .await?;
        Ok(())
    }

    /// Removes all services of these agents.
    ///
    /// # Errors
    /// [`StoreError::Database`].
    pub async fn withdraw_services_of(&mut self, agents: &[AgentId]) -> Result<(), StoreError> {
        let workspace = self.id();
        let ids: Vec<Vec<u8>> = agents.iter().map(|id| id.0.to_vec()).collect();
        sqlx::query("DELETE FROM connect.services WHERE workspace_id = $1 AND agent_id = ANY ($2)")
            .bind(workspace)
            .bind(ids)
            .execute(self.connection())
            .await?;
        Ok(())
    }

    /// The agents that expose something.
    ///
    /// # Errors
    /// [`StoreError::Database`], [`StoreError::Corrupt`].
    pub async fn exposing_agents(&mut self) -> Result<Vec<AgentId>, StoreError> {
        let workspace = self.id();
        let rows: Vec<(Vec<u8>,)> = sqlx::query_as(
            "SELECT DISTINCT agent_id FROM connect.services WHERE workspace_id = $1",
        )
        .bind(workspace)
        .fetch_all(self.connection())
        .await?;
        rows.iter().map(|(id,)| fixed(id, "agent_id").map(AgentId)).collect()
    }

    /// The service under a tag; as if offline.
    ///
    /// # Errors
    /// [`StoreError::Database`], [`StoreError::Corrupt`].
    pub async fn find_by_tag(
        &mut self,
        tag: LookupTag,
    ) -> Result<Option<ListedService>, StoreError> {
        let workspace = self.id();
        let row: Option<Row> = sqlx::query_as(
            "SELECT service_id, agent_id, record_epoch, record_counter, record FROM connect.services
             WHERE workspace_id = $1 AND tag = $2",
        )
        .bind(workspace)
        .bind(tag.0.as_slice())
        .fetch_optional(self.connection())
        .await?;
        row.map(listed).transpose()
    }

    /// What `agent` exposes.
    ///
    /// # Errors
    /// [`StoreError::Database`], [`StoreError::Corrupt`].
    pub async fn services_of(&mut self, agent: AgentId) -> Result<HashSet<ServiceId>, StoreError> {
        let workspace = self.id();
        let rows: Vec<(Vec<u8>,)> = sqlx::query_as(
            "SELECT service_id FROM connect.services WHERE workspace_id = $1 AND agent_id = $2",
        )
        .bind(workspace)
        .bind(agent.0.as_slice())
        .fetch_all(self.connection())
        .await?;
        rows.iter().map(|(id,)| fixed(id, "service_id").map(ServiceId)).collect()
    }

    /// Whose service this is.
    ///
    /// # Errors
    /// [`StoreError::Database`], [`StoreError::Corrupt`].
    pub async fn exposer_of(&mut self, service: ServiceId) -> Result<Option<AgentId>, StoreError> {
        let workspace = self.id();
        let row: Option<(Vec<u8>,)> = sqlx::query_as(
            "SELECT agent_id FROM connect.services WHERE workspace_id = $1 AND service_id = $2",
        )
        .bind(workspace)
        .bind(service.0.as_slice())
        .fetch_optional(self.connection())
        .await?;
        row.map(|(agent,)| Ok(AgentId(fixed(&agent, "agent_id")?))).transpose()
    }

    /// Up to `limit` services whose id follows `after`, in ascending order; all as if offline.
    ///
    /// # Errors
    /// [`StoreError::Database`], [`StoreError::Corrupt`].
    pub async fn services(
        &mut self,
        after: Option<ServiceId>,
        limit: i64,
    ) -> Result<Vec<ListedService>, StoreError> {
        let workspace = self.id();
        let rows: Vec<Row> = sqlx::query_as(
            "SELECT service_id, agent_id, record_epoch, record_counter, record FROM connect.services
             WHERE workspace_id = $1 AND ($2::bytea IS NULL OR service_id > $2)
             ORDER BY service_id LIMIT $3",
        )
        .bind(workspace)
        .bind(after.map(|id| id.0.to_vec()))
        .bind(limit)
        .fetch_all(self.connection())
        .await?;
        rows.into_iter().map(listed).collect()
    }
}
