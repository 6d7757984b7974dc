//! How many transactions of one workspace run at once, so that it cannot take every connection.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use connect_spec::ids::WorkspaceId;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

use super::{ACQUIRE_LIMIT, StoreError};
use crate::limits::TRANSACTIONS_PER_WORKSPACE;

/// The workspaces of which a transaction runs or waits.
type Places = Arc<Mutex<HashMap<WorkspaceId, Arc<Semaphore>>>>;

/// Hands out turns.
#[derive(Debug, Clone, Default)]
pub(super) struct Turns {
    places: Places,
}

/// The right to one transaction, or to wait for one; given back when dropped.
#[derive(Debug)]
pub(super) struct Turn {
    workspace: WorkspaceId,
    places: Places,
    semaphore: Arc<Semaphore>,
    permit: Option<OwnedSemaphorePermit>,
}

impl Turns {
    /// Waits for a turn of this workspace. Whoever holds one must not wait for another.
    ///
    /// # Errors
    /// [`StoreError::Crowded`].
    pub(super) async fn take(&self, workspace: WorkspaceId) -> Result<Turn, StoreError> {
        let semaphore = {
            let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
            let place = places.entry(workspace);
            Arc::clone(
                place.or_insert_with(|| Arc::new(Semaphore::new(TRANSACTIONS_PER_WORKSPACE))),
            )
        };
        let places = Arc::clone(&self.places);
        let mut turn = Turn { workspace, places, semaphore, permit: None };
        let permit = Arc::clone(&turn.semaphore).acquire_owned();
        // The semaphore is never closed.
        turn.permit = timeout(ACQUIRE_LIMIT, permit).await.map_err(|_| StoreError::Crowded)?.ok();
        Ok(turn)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.permit = None;
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        // The map's and this one's: nobody else runs or waits.
        if Arc::strong_count(&self.semaphore) == 2 {
            places.remove(&self.workspace);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: WorkspaceId = WorkspaceId([1; 32]);
    const B: WorkspaceId = WorkspaceId([2; 32]);

    #[tokio::test(start_paused = true)]
    async fn one_workspace_waits_for_itself_and_for_no_other() {
        let turns = Turns::default();
        let mut held = Vec::new();
        for _ in 0..TRANSACTIONS_PER_WORKSPACE {
            held.push(turns.take(A).await.unwrap());
        }
        assert!(matches!(turns.take(A).await, Err(StoreError::Crowded)));
        let other = turns.take(B).await.unwrap();
        let waiting = turns.take(A);
        let leaving = async { drop(held.pop()) };
        let (next, ()) = tokio::join!(waiting, leaving);
        held.push(next.unwrap());
        // One that gives up while it waits leaves nothing behind.
        let mut gone = Box::pin(turns.take(A));
        let polled = timeout(std::time::Duration::ZERO, &mut gone).await;
        assert!(polled.is_err(), "nobody left");
        drop(gone);
        drop((held, other));
        assert!(turns.places.lock().unwrap().is_empty());
    }
}
