//! Whether targets accept connections, looked at again and again, and told to whoever lists the services.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{
    sync::Notify,
    time::{sleep, timeout},
};

use crate::{
    agent::{Core, Link},
    probe::knock,
    random,
    target::Target,
};

/// A look that takes longer found nobody: it only informs.
const LOOK_TIMEOUT: Duration = Duration::from_secs(2);
/// Looks are spread by up to a sixth of their interval.
const JITTER_SHARE: u32 = 6;
/// A server that greets writes each visitor who says nothing, or whom it has to refuse, into its log: one that
/// is well is looked at so rarely. A client that finds it down is news at once.
const GREETERS_EVERY: u32 = 20;
/// Between two rounds of publishing, whatever happens: a target that comes and goes is no flood for the hub.
const BETWEEN_ROUNDS: Duration = Duration::from_secs(1);

/// How the target of one service is, as it was last seen.
#[derive(Debug, Default)]
pub(crate) struct Health {
    ok: AtomicBool,
    /// Whether it spoke first when it was last looked at.
    greets: Arc<AtomicBool>,
    seen: Mutex<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    /// When the target was last tried, by a look or for a client.
    tried: Option<Instant>,
    /// What the hub's record says; `None` while there is none.
    published: Option<bool>,
}

impl Health {
    /// Whether the target answered when it was last tried.
    pub(crate) fn is_ok(&self) -> bool {
        self.ok.load(Ordering::Relaxed)
    }

    /// Takes note of a try; returns whether the published record is wrong by now.
    pub(crate) fn note(&self, ok: bool) -> bool {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.tried = Some(Instant::now());
        self.ok.store(ok, Ordering::Relaxed);
        seen.published.is_some_and(|published| published != ok)
    }

    /// Looks whether the target accepts a connection.
    pub(crate) async fn look(&self, target: &Target) -> bool {
        let knocked = timeout(LOOK_TIMEOUT, knock(target, self.greets.clone())).await;
        let ok = matches!(knocked, Ok(Ok(())));
        self.note(ok);
        ok
    }

    /// What the hub's record says from now on.
    pub(crate) fn published(&self, ok: bool) {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).published = Some(ok);
    }

    fn is_news(&self) -> bool {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.published.is_some_and(|published| published != self.is_ok())
    }

    /// Whether it is time for another look, where each is looked at once in `every`.
    pub(crate) fn is_due(&self, every: Duration) -> bool {
        let rarely = self.is_ok() && self.greets.load(Ordering::Relaxed);
        // Somewhat less, so that a jitter does not skip a round.
        let pause = if rarely { every * GREETERS_EVERY } else { every } - every / 2;
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.tried.is_none_or(|tried| tried.elapsed() >= pause)
    }
}

/// Looks at every target once in `every`, unless a client just did, and publishes what changed. A dial that
/// went another way than the record says wakes it at once (`changed`).
pub(crate) async fn watch(core: Arc<Core>, every: Duration, changed: Arc<Notify>) {
    loop {
        let jitter = every / JITTER_SHARE * (random::number() % 256) / 256;
        tokio::select! {
            () = sleep(every - every / JITTER_SHARE + jitter) => look_at_all(&core, every).await,
            () = changed.notified() => {}
        }
        publish_news(&core).await;
        sleep(BETWEEN_ROUNDS.min(every)).await;
    }
}

async fn look_at_all(core: &Core, every: Duration) {
    let services = core.exposer.all().into_iter();
    let due = services.filter(|service| service.health.is_due(every));
    let looks = due.map(|service| async move { service.health.look(&service.target).await });
    futures_util::future::join_all(looks).await;
}

/// Publishes the services whose records are wrong. While the hub is away nothing is tried: the next login
/// publishes everything.
async fn publish_news(core: &Core) {
    let Link::Up(session) = core.link().borrow().clone() else { return };
    for service in core.exposer.all().into_iter().filter(|service| service.health.is_news()) {
        let ok = service.health.is_ok();
        let published = core.publish_as(&session, &service, ok, false).await;
        if published.is_ok() && !core.exposer.all().iter().any(|other| Arc::ptr_eq(other, &service))
        {
            // It was withdrawn, or exposed anew, while it was published.
            core.publish_or_withdraw(&session, service.service_id).await;
        }
        match published {
            Ok(()) if ok => tracing::info!(service = %service.name, "the target answers again"),
            Ok(()) => tracing::warn!(service = %service.name, "the target does not answer"),
            Err(error) => tracing::debug!(service = %service.name, %error, "not published"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn servers_that_greet_are_looked_at_rarely_while_they_are_well() {
        let every = Duration::from_millis(40);
        let health = Health::default();
        assert!(health.is_due(every), "it was never looked at");
        health.note(true);
        assert!(!health.is_due(every), "a client was just served");
        sleep(every).await;
        assert!(health.is_due(every));
        health.greets.store(true, Ordering::Relaxed);
        assert!(!health.is_due(every));
        health.note(false);
        sleep(every).await;
        assert!(health.is_due(every), "one that is down may be back");
    }
}
