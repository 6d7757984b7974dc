//! What happened, on its way into the audit logs, and out again.
//!
//! What changes the database is recorded in the same transaction ([`WorkspaceTx::record`]). All else
//! comes here: it waits in memory for [`AUDIT_DELAY`], so that many events cost one transaction, and
//! for longer while the database is away. A hub that is killed loses what waits.
//!
//! [`WorkspaceTx::record`]: crate::store::WorkspaceTx::record

use std::{
    collections::BTreeMap,
    future::ready,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use connect_spec::{
    audit::{Event, Recorded, TunnelEnd},
    control::{ErrorCode, Reply, close},
    ids::WorkspaceId,
    objects::AgentRole,
};
use futures_util::{StreamExt as _, stream};
use tokio::{
    sync::Notify,
    time::{interval, sleep, timeout},
};

use crate::{
    config::Retention,
    hub::Hub,
    limits::{
        AUDIT_BATCH, AUDIT_DELAY, AUDIT_EXPIRY_INTERVAL, AUDIT_LOOK_BACK, AUDIT_WRITERS,
        DRAIN_LIMIT, EFFECTS_PAUSE, MAX_AUDIT_QUEUE, PAGE_ROWS,
    },
    relay::{Ended, Side},
    requests::{Failure, Page, no, store_trouble},
    router::Member,
    store::{AuditFilter, Store, StoreError},
};

/// An event that happens now.
#[must_use]
pub fn now(event: Event) -> Recorded {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Recorded { at: u64::try_from(since.as_millis()).unwrap_or(u64::MAX), event }
}

/// What waits for one workspace.
#[derive(Debug, Default)]
struct Waiting {
    events: Vec<Recorded>,
    lost: u64,
}

/// Events that wait to be written.
#[derive(Debug, Default)]
pub struct Queue {
    waiting: Mutex<BTreeMap<WorkspaceId, Waiting>>,
    added: Notify,
    finishing: Notify,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<WorkspaceId, Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds an event. A refusal that is like one that waits is counted there. What finds the queue of its
    /// workspace full is counted and lost.
    pub fn add(&self, workspace: WorkspaceId, mut event: Event) {
        let mut all = self.lock();
        let waiting = all.entry(workspace).or_default();
        let mut latest = waiting.events.iter_mut().rev().take(AUDIT_LOOK_BACK);
        if latest.any(|other| count_with(&mut other.event, &mut event)) {
            return;
        }
        if waiting.events.len() < MAX_AUDIT_QUEUE {
            waiting.events.push(now(event));
        } else {
            waiting.lost += 1;
        }
        drop(all);
        self.added.notify_one();
    }

    /// Whether so much waits for a workspace that nothing should happen that had to be recorded.
    #[must_use]
    pub fn is_full(&self, workspace: WorkspaceId) -> bool {
        self.lock()
            .get(&workspace)
            .is_some_and(|waiting| waiting.events.len() >= MAX_AUDIT_QUEUE / 2)
    }

    fn take(&self, workspace: WorkspaceId) -> Vec<Recorded> {
        let mut all = self.lock();
        let Some(waiting) = all.get_mut(&workspace) else {
            return Vec::new();
        };
        let mut batch: Vec<_> =
            waiting.events.drain(..waiting.events.len().min(AUDIT_BATCH)).collect();
        if waiting.events.is_empty() {
            if waiting.lost > 0 {
                batch.push(now(Event::EventsLost { count: waiting.lost }));
            }
            all.remove(&workspace);
        }
        batch
    }

    fn put_back(&self, workspace: WorkspaceId, batch: Vec<Recorded>) {
        let mut all = self.lock();
        let waiting = all.entry(workspace).or_default();
        waiting.events.splice(..0, batch);
    }

    /// Ends [`write`] once nothing waits.
    pub fn finish(&self) {
        self.finishing.notify_one();
    }
}

/// How many a refusal stands for, and what it has in common with others of the same; `None` for all else.
fn refusal(event: &mut Event) -> Option<(&mut u64, impl PartialEq + use<>)> {
    if let Event::TunnelRefused { agent_id, peer_id, service_id, code, count } = event {
        // Who asks for too much may ask for anything.
        let any = matches!(code, ErrorCode::RateLimited | ErrorCode::Busy);
        let what = (!any).then_some((*peer_id, *service_id));
        Some((count, (*agent_id, *code, what, String::new())))
    } else if let Event::LoginRefused { agent_id, code, count, address } = event {
        Some((count, (*agent_id, *code, None, address.clone())))
    } else {
        None
    }
}

/// Counts `new` with `old`, if both are refusals of the same.
fn count_with(old: &mut Event, new: &mut Event) -> bool {
    let (Some((count, old)), Some((more, new))) = (refusal(old), refusal(new)) else {
        return false;
    };
    *count += if old == new { *more } else { 0 };
    old == new
}

/// Writes what waits, until [`Queue::finish`].
pub async fn write(queue: &Queue, store: &Store) {
    loop {
        let finishing = tokio::select! {
            () = queue.added.notified() => {
                sleep(AUDIT_DELAY).await;
                false
            }
            () = queue.finishing.notified() => true,
        };
        if finishing {
            if timeout(DRAIN_LIMIT, flush(queue, store)).await != Ok(true) {
                tracing::error!("the last events could not be written into the audit logs");
            }
            return;
        }
        if !flush(queue, store).await {
            sleep(EFFECTS_PAUSE).await;
            queue.added.notify_one();
        }
    }
}

/// Writes a batch for each workspace until nothing waits; false when something could not be written. One
/// whose turn at the database does not come keeps a writer busy and not the others.
async fn flush(queue: &Queue, store: &Store) -> bool {
    loop {
        let workspaces: Vec<WorkspaceId> = queue.lock().keys().copied().collect();
        if workspaces.is_empty() {
            return true;
        }
        // All of them are tried, whatever becomes of one.
        let all_written = stream::iter(workspaces)
            .map(|workspace| write_batch(queue, store, workspace))
            .buffer_unordered(AUDIT_WRITERS)
            .fold(true, |all, written| ready(all && written))
            .await;
        if !all_written {
            return false;
        }
    }
}

/// Writes a batch of a workspace, or puts it back; false when it could not be written.
async fn write_batch(queue: &Queue, store: &Store, workspace: WorkspaceId) -> bool {
    let batch = queue.take(workspace);
    let Err(error) = store_batch(store, workspace, &batch).await else {
        return true;
    };
    // Logs it.
    store_trouble(&error);
    // Of a commit that failed it is not known whether it was done: twice is better than never.
    if error.is_passing() {
        queue.put_back(workspace, batch);
    }
    false
}

async fn store_batch(
    store: &Store,
    workspace: WorkspaceId,
    batch: &[Recorded],
) -> Result<(), StoreError> {
    let mut tx = store.workspace(workspace).await?;
    tx.record(batch).await?;
    tx.commit().await
}

/// Removes rows that are older than they are kept, every now and then; never returns.
pub async fn expire(store: &Store, retention: Retention) {
    let Retention::For(keep) = retention else {
        return std::future::pending().await;
    };
    let mut due = interval(AUDIT_EXPIRY_INTERVAL);
    loop {
        due.tick().await;
        let mut removed = 0;
        let failed = loop {
            match store.expire_audit(keep).await {
                Ok(0) => break None,
                Ok(rows) => removed += rows,
                Err(error) => break Some(error),
            }
        };
        if removed > 0 {
            tracing::info!(rows = removed, "rows of audit logs were removed for their age");
        }
        if let Some(error) = failed {
            // Logs it.
            store_trouble(&error);
        }
    }
}

/// Why a tunnel ended, as the audit log has it.
#[must_use]
pub fn tunnel_end(ended: Ended) -> TunnelEnd {
    match ended {
        Ended::Closed(Side::Reacher) => TunnelEnd::ReacherClosed,
        Ended::Closed(Side::Exposer) => TunnelEnd::ExposerClosed,
        Ended::Vanished(Side::Reacher) => TunnelEnd::ReacherGone,
        Ended::Vanished(Side::Exposer) => TunnelEnd::ExposerGone,
        Ended::Violated(..) => TunnelEnd::Violation,
        Ended::Idle => TunnelEnd::Idle,
        Ended::Stopped(close::REVOKED) => TunnelEnd::Revoked,
        Ended::Stopped(close::CUT) => TunnelEnd::Cut,
        Ended::Stopped(close::RESTARTING) => TunnelEnd::HubStopped,
        Ended::Stopped(_) => TunnelEnd::Moved,
    }
}

/// Gives the rows that follow number `after`, as many as fit a message.
pub(crate) async fn read(
    hub: &Hub,
    member: &Member,
    after: u64,
    since: Option<u64>,
) -> Result<Reply, Failure> {
    if member.role == AgentRole::Guest {
        return no(ErrorCode::Forbidden, "guests do not see the audit log of a workspace");
    }
    let mut tx = hub.store().snapshot(member.key.0).await?;
    let bounds = tx.audit_bounds().await?;
    let mut filter = AuditFilter { after, since, ..AuditFilter::default() };
    let mut page = Page::new();
    loop {
        let rows = tx.audit_rows(&filter, PAGE_ROWS).await?;
        let is_last = i64::try_from(rows.len()).is_ok_and(|rows| rows < PAGE_ROWS);
        filter.after = rows.last().map_or(filter.after, |row| row.seq);
        let full = page.fill(rows);
        if is_last || full {
            let (base, head) = (bounds.base, bounds.head);
            return Ok(Reply::Audit { base, head, rows: page.rows, more: full });
        }
    }
}

#[cfg(test)]
mod tests {
    use connect_spec::ids::{AgentId, ServiceId};

    use super::*;

    const ONE: WorkspaceId = WorkspaceId([1; 32]);
    const OTHER: WorkspaceId = WorkspaceId([2; 32]);

    fn refused(service: u8, code: ErrorCode) -> Event {
        Event::TunnelRefused {
            agent_id: AgentId([1; 16]),
            peer_id: AgentId([2; 16]),
            service_id: ServiceId([service; 16]),
            code,
            count: 1,
        }
    }

    #[track_caller]
    fn check_counts(events: &[Event], counts: &[u64]) {
        let queue = Queue::default();
        for event in events {
            queue.add(ONE, event.clone());
        }
        let found: Vec<u64> = queue
            .take(ONE)
            .into_iter()
            .map(|mut recorded| *refusal(&mut recorded.event).unwrap().0)
            .collect();
        assert_eq!(found, counts);
    }

    #[test]
    fn refusals_of_the_same_are_one_row() {
        let (offline, limited) = (ErrorCode::Offline, ErrorCode::RateLimited);
        check_counts(&[refused(1, offline), refused(1, offline), refused(2, offline)], &[2, 1]);
        check_counts(&[refused(1, limited), refused(2, limited), refused(3, limited)], &[3]);
        check_counts(&[refused(1, offline), refused(1, limited)], &[1, 1]);
    }

    #[test]
    fn one_workspace_fills_its_own_queue_only() {
        let queue = Queue::default();
        let event = |number: usize| Event::LogReplaced { base: number as u64 };
        for number in 0..MAX_AUDIT_QUEUE + 7 {
            queue.add(ONE, event(number));
        }
        queue.add(OTHER, event(0));
        assert!(queue.is_full(ONE) && !queue.is_full(OTHER));
        let mut written = Vec::new();
        while queue.lock().contains_key(&ONE) {
            let batch = queue.take(ONE);
            assert!(batch.len() <= AUDIT_BATCH + 1);
            written.extend(batch.into_iter().map(|recorded| recorded.event));
        }
        assert_eq!(written.len(), MAX_AUDIT_QUEUE + 1);
        assert_eq!(written[9], event(9));
        assert_eq!(written.last(), Some(&Event::EventsLost { count: 7 }));
    }

    #[test]
    fn what_could_not_be_written_keeps_its_place() {
        let queue = Queue::default();
        for number in 0..3 {
            queue.add(ONE, Event::LogReplaced { base: number });
        }
        let batch = queue.take(ONE);
        queue.add(ONE, Event::LogReplaced { base: 3 });
        queue.put_back(ONE, batch);
        let order: Vec<Event> =
            queue.take(ONE).into_iter().map(|recorded| recorded.event).collect();
        let expected: Vec<Event> = (0..4).map(|base| Event::LogReplaced { base }).collect();
        assert_eq!(order, expected);
    }
}
