//! Whether the database is there, known before anybody has to wait for it.
//!
//! One connection of its own does nothing but wait: when it is cut, the server is gone. A server that
//! only stands still is found by a question every few seconds.

use std::time::Duration;

use sqlx::postgres::{PgListener, PgPoolOptions};
use tokio::time::{Instant, sleep, timeout};

use super::Store;

/// How often the database is asked whether it still answers. A cut connection tells at once.
const PING_INTERVAL: Duration = Duration::from_secs(5);
/// A database that needs longer to answer nothing is away.
const PING_LIMIT: Duration = Duration::from_secs(5);
/// Between attempts to reach a database that is away: a local one is restarted in a second or two.
const RETRY_INTERVAL: Duration = Duration::from_millis(500);

impl Store {
    /// Whether the database was there when it was last looked at. True until [`Store::watch`] runs.
    #[must_use]
    pub fn is_up(&self) -> bool {
        *self.up.borrow()
    }

    /// Watches the database; never returns.
    pub async fn watch(&self) {
        let mut away: Option<Instant> = None;
        loop {
            match timeout(PING_LIMIT, self.listener()).await {
                Ok(Ok(mut listener)) => {
                    if let Some(since) = away.take() {
                        tracing::warn!(away = ?since.elapsed(), "the database is back");
                    }
                    self.up.send_replace(true);
                    until_lost(&mut listener).await;
                }
                Ok(Err(_)) | Err(_) => sleep(RETRY_INTERVAL).await,
            }
            if away.is_none() {
                away = Some(Instant::now());
                self.up.send_replace(false);
                tracing::error!(
                    "the database is away: logins, requests and new tunnels are refused until it is back"
                );
            }
        }
    }

    /// A connection beside the pool, so that a pool without a free one is not taken for an outage.
    async fn listener(&self) -> sqlx::Result<PgListener> {
        let options = (*self.pool.connect_options()).clone();
        let pool = PgPoolOptions::new().max_connections(1).acquire_timeout(PING_LIMIT);
        let mut listener = PgListener::connect_with(&pool.connect_lazy_with(options)).await?;
        listener.eager_reconnect(false);
        sqlx::query("SELECT").execute(&mut listener).await?;
        Ok(listener)
    }
}

/// Returns when the connection is cut, or the server no longer answers on it.
async fn until_lost(listener: &mut PgListener) {
    loop {
        match timeout(PING_INTERVAL, listener.try_recv()).await {
            // Nobody notifies us; whatever it was, the server lives.
            Ok(Ok(Some(_))) => {}
            Ok(Ok(None) | Err(_)) => return,
            Err(_) => {
                match timeout(PING_LIMIT, sqlx::query("SELECT").execute(&mut *listener)).await {
                    Ok(Ok(_)) => {}
                    Ok(Err(_)) | Err(_) => return,
                }
            }
        }
    }
}
