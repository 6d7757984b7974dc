//! What a change of the trust log means for those who are online.
//!
//! Whoever appends may be gone before its effects are done, so they are not done in its session: it
//! leaves the workspace in a queue, whatever becomes of it, and two loops work the queues off. The
//! first closes what the log revokes by name and tells everybody else; the second judges everybody
//! again, which takes three signatures an agent.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use connect_spec::{
    control::{ErrorCode, ErrorReport, PresentedBlobs},
    ids::{AgentId, WorkspaceId},
    objects::UnixTime,
    signed::{ObjectError, Signed},
    trust::{Presented, TrustError, TrustState, VerifiedPeer},
};
use tokio::{sync::Notify, time::sleep};

use crate::{
    auth::unix_now,
    hub::Hub,
    limits::{EFFECTS_PAUSE, JUDGED_AT_ONCE},
    requests::store_trouble,
    store::StoreError,
};

/// A change of a workspace's log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Change {
    /// The workspace.
    pub workspace: WorkspaceId,
    /// Whether it may have ended somebody.
    pub ends: bool,
}

/// Changes whose effects are to be done, each workspace once.
#[derive(Debug, Default)]
pub struct Queue {
    changes: Mutex<VecDeque<Change>>,
    added: Notify,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, VecDeque<Change>> {
        self.changes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a change.
    pub fn add(&self, change: Change) {
        let mut changes = self.lock();
        match changes.iter_mut().find(|other| other.workspace == change.workspace) {
            Some(other) => other.ends |= change.ends,
            None => changes.push_back(change),
        }
        drop(changes);
        self.added.notify_one();
    }

    async fn next(&self) -> Change {
        loop {
            let next = self.lock().pop_front();
            match next {
                Some(change) => return change,
                None => self.added.notified().await,
            }
        }
    }
}

/// Adds a change to the queue when dropped: also when whoever makes it is cancelled half-way through
/// the commit, of which nobody knows the outcome then.
#[derive(Debug)]
#[must_use]
pub struct Announce<'h> {
    /// Where to.
    pub hub: &'h Hub,
    /// What changed.
    pub change: Change,
}

impl Drop for Announce<'_> {
    fn drop(&mut self) {
        self.hub.changed().add(self.change);
    }
}

/// Works both queues off; never returns.
pub async fn run(hub: &Hub) {
    let announcing = async {
        loop {
            let change = hub.changed().next().await;
            match announce(hub, change.workspace).await {
                Ok(()) if change.ends => hub.to_judge().add(change),
                Ok(()) => {}
                Err(error) => again(hub.changed(), change, &error).await,
            }
        }
    };
    let judging = async {
        loop {
            let change = hub.to_judge().next().await;
            if let Err(error) = judge_all(hub, change.workspace).await {
                again(hub.to_judge(), change, &error).await;
            }
        }
    };
    tokio::join!(announcing, judging);
}

/// While the database is away, the change waits for it at the end of the queue. What this hub cannot read
/// it cannot read later either.
async fn again(queue: &Queue, change: Change, error: &StoreError) {
    // Logs it.
    store_trouble(error);
    if error.is_passing() {
        sleep(EFFECTS_PAUSE).await;
        queue.add(change);
    }
}

/// Ends whom the log revokes by name, and tells all others that it grew.
async fn announce(hub: &Hub, workspace: WorkspaceId) -> Result<(), StoreError> {
    let mut tx = hub.store().workspace(workspace).await?;
    // At rest: a commit that is under way is waited for.
    let known = hub.trust().at_rest(&mut tx).await?;
    tx.commit().await?;
    if let Some(known) = known {
        hub.route(|router, out| router.handle_log(&known.state, Instant::now(), out));
    }
    Ok(())
}

/// Judges everybody who is online or exposes something.
async fn judge_all(hub: &Hub, workspace: WorkspaceId) -> Result<(), StoreError> {
    let mut agents = hub.route(|router, _| router.agents_of(workspace));
    let mut tx = hub.store().workspace(workspace).await?;
    agents.extend(tx.exposing_agents().await?);
    tx.commit().await?;
    let agents: Vec<AgentId> = agents.into_iter().collect();
    for agents in agents.chunks(JUDGED_AT_ONCE) {
        judge(hub, workspace, agents).await?;
    }
    Ok(())
}

/// Ends the sessions, tunnels and services of those agents that no longer pass.
///
/// # Errors
/// [`StoreError`].
pub async fn judge(
    hub: &Hub,
    workspace: WorkspaceId,
    agents: &[AgentId],
) -> Result<(), StoreError> {
    let mut tx = hub.store().workspace(workspace).await?;
    let Some(known) = hub.trust().current(&mut tx).await? else {
        return Ok(());
    };
    let now = unix_now();
    let mut ended = Vec::new();
    for (agent, shown) in tx.presented_by(agents).await? {
        if let Err(error) = verify(&known.state, agent, &shown, now) {
            tracing::info!(%agent, %error, "an agent is a member no more");
            ended.push((agent, ErrorReport::new(ErrorCode::Revoked, error.to_string())));
        }
    }
    if !ended.is_empty() {
        let agents: Vec<AgentId> = ended.iter().map(|(agent, _)| *agent).collect();
        tx.withdraw_services_of(&agents).await?;
    }
    tx.commit().await?;
    // Last: whoever sees the end finds the names free.
    for (agent, report) in ended {
        hub.route(|router, out| {
            router.handle_end((workspace, agent), &report, Instant::now(), out);
        });
    }
    Ok(())
}

/// Judges what an agent showed at its last login.
///
/// # Errors
/// [`TrustError`]; objects that cannot be read are not signed by anybody.
pub fn verify(
    trust: &TrustState,
    agent: AgentId,
    shown: &PresentedBlobs,
    now: UnixTime,
) -> Result<VerifiedPeer, TrustError> {
    let presented = decode(shown).map_err(|_| TrustError::Certificate)?;
    trust.verify_peer(agent, presented, now)
}

fn decode(shown: &PresentedBlobs) -> Result<Presented, ObjectError> {
    Ok(Presented {
        certificate: Signed::decode(&shown.certificate.0)?,
        credential: shown.credential.as_ref().map(|wire| Signed::decode(&wire.0)).transpose()?,
        noise_key: Signed::decode(&shown.noise_key.0)?,
    })
}
