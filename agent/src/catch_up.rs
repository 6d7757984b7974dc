//! What both ends of a tunnel do first when their trust logs differ: whoever is behind pulls the entries
//! from the other, and then judges that very peer again, before any application byte.
//!
//! So a hub that withholds a revocation is found out at the first contact with an informed peer.
//! PROTOCOL.md, "Catching up".

use std::sync::Arc;

use connect_spec::{
    limits::{CATCH_UP_TIMEOUT, MAX_LOG_BYTES, MAX_TRUST_BYTES},
    log::{Head, LogEntry},
    record::{CloseCode, Record, put_trust_entry, trust_entries},
};
use tokio::time::timeout;

use crate::{
    error::{Error, ErrorKind, Result},
    identity::Identity,
    io::tunnel::{End, TunnelEnd},
    trust::Taken,
    workspace::Workspace,
};

/// The heads that both sides named in the handshake.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Claims {
    pub(crate) own: Head,
    pub(crate) peer: Head,
}

/// Catches up, if the heads differ; `judge` decides about the peer by what is known then.
///
/// # Errors
/// What `judge` says; [`ErrorKind::TrustViolation`] when the peer shows entries that do not hold, or not
/// what it claimed. The tunnel is to be closed then.
pub(crate) async fn catch_up(
    end: &mut TunnelEnd,
    workspace: &Arc<Workspace>,
    claims: Claims,
    judge: impl Fn(&Identity) -> Result<()>,
) -> Result<()> {
    if claims.own == claims.peer {
        return Ok(());
    }
    timeout(CATCH_UP_TIMEOUT, exchange(end, workspace, claims.peer, judge))
        .await
        .unwrap_or_else(|_| Err(undelivered("in time")))
}

async fn exchange(
    end: &mut TunnelEnd,
    workspace: &Arc<Workspace>,
    claimed: Head,
    judge: impl Fn(&Identity) -> Result<()>,
) -> Result<()> {
    let mut asked = !workspace.knows(&claimed);
    let first = if asked {
        let have = workspace.log().locator();
        Record::TrustGet(have)
    } else {
        judge(&workspace.identity())?;
        Record::Ready
    };
    end.send_record(&first).await.map_err(lost)?;
    let mut sent_ready = !asked;
    let mut heard_ready = false;
    let mut received = Received::default();
    while !(sent_ready && heard_ready) {
        let record = end.read_record().await.map_err(lost)?;
        let record = Record::decode(&record).map_err(|_| unexpected())?;
        match record {
            Record::Ready if !heard_ready => heard_ready = true,
            Record::TrustGet(have) if !heard_ready => {
                let (more, entries) = page(workspace, &have)?;
                let answer = Record::Trust { more, entries: &entries };
                end.send_record(&answer).await.map_err(lost)?;
            }
            Record::Trust { more, entries } if asked => {
                received.take(workspace, entries).await?;
                if more {
                    let have = received.newest.map_or_else(Vec::new, |newest| vec![newest]);
                    end.send_record(&Record::TrustGet(have)).await.map_err(lost)?;
                    continue;
                }
                asked = false;
                received.finish(workspace).await?;
                // What a settled branch ends with was shown and judged, but is not kept.
                if received.newest != Some(claimed) && !workspace.knows(&claimed) {
                    return Err(undelivered("at all"));
                }
                judge(&workspace.identity())?;
                end.send_record(&Record::Ready).await.map_err(lost)?;
                sent_ready = true;
            }
            Record::TunnelClose(code) => return Err(closed(code)),
            Record::Hello { .. }
            | Record::Welcome(_)
            | Record::Ready
            | Record::TrustGet(_)
            | Record::Trust { .. }
            | Record::Open { .. }
            | Record::Opened(_)
            | Record::Data { .. }
            | Record::Ack { .. }
            | Record::Window { .. }
            | Record::Fin { .. }
            | Record::Reset { .. }
            | Record::Ping(_)
            | Record::Pong(_)
            | Record::HsWant(_)
            | Record::Hs1 { .. }
            | Record::Hs2 { .. }
            | Record::Switch(_)
            | Record::ChannelClose(_) => return Err(unexpected()),
        }
    }
    Ok(())
}

/// Entries that came in, as far as they are not taken into the log yet.
#[derive(Default)]
struct Received {
    bytes: u64,
    newest: Option<Head>,
    waiting: Vec<LogEntry>,
    /// Whether what waits begins with entries that hold.
    holds: bool,
}

impl Received {
    async fn take(&mut self, workspace: &Arc<Workspace>, entries: &[u8]) -> Result<()> {
        self.bytes += entries.len() as u64;
        if self.bytes > MAX_LOG_BYTES {
            return Err(undelivered("within the limit"));
        }
        for wire in trust_entries(entries).unwrap_or_default() {
            let entry = LogEntry::decode(wire).map_err(|_| unexpected())?;
            if self.newest.is_some_and(|newest| newest != entry.follows()) {
                return Err(unexpected());
            }
            self.newest = Some(entry.head());
            self.waiting.push(entry);
        }
        // What follows the own log is kept even if the rest never comes; a branch is judged as a whole.
        let follows = self.waiting.first().map(LogEntry::follows);
        if follows == Some(workspace.identity().trust.head()) {
            self.finish(workspace).await?;
        } else if !self.holds {
            // Whoever is no signer makes nobody wait for, and keep, what is worth nothing.
            self.holds = workspace.check(&self.waiting).await?;
            if !self.holds {
                self.waiting.clear();
            }
        }
        Ok(())
    }

    async fn finish(&mut self, workspace: &Arc<Workspace>) -> Result<()> {
        let taken = workspace.learn(std::mem::take(&mut self.waiting)).await?;
        if taken != Taken::Nothing {
            tracing::warn!(
                event = "log_from_peer",
                ?taken,
                "a peer showed entries of the trust log that the hub had not"
            );
        }
        Ok(())
    }
}

/// One record's worth of the entries after the newest common place.
fn page(workspace: &Workspace, have: &[Head]) -> Result<(bool, Vec<u8>)> {
    let log = workspace.log();
    let after = log.common(have).seq;
    let mut entries = Vec::new();
    let mut sent = after;
    for wire in log.entries_after(after, MAX_TRUST_BYTES)? {
        if !put_trust_entry(&mut entries, &wire) {
            break;
        }
        sent += 1;
    }
    Ok((sent < log.state().head().seq, entries))
}

fn lost(end: End) -> Error {
    let altered = matches!(end, End::Tampered);
    let lost = Error::new(ErrorKind::ExposerOffline, format_args!("the tunnel was lost: {end}"));
    Error { altered, ..lost }
}

fn closed(code: CloseCode) -> Error {
    if code == CloseCode::Forbidden {
        return Error::new(
            ErrorKind::Refused,
            "the peer does not trust this agent: it knows entries of the trust log that end it",
        )
        .hint("ask an owner of the workspace whether this agent was revoked");
    }
    Error::new(
        ErrorKind::ExposerOffline,
        format_args!("the peer closed the tunnel while the trust logs were compared: {code:?}"),
    )
}

fn undelivered(how: &str) -> Error {
    Error::trust(format_args!(
        "the peer claimed a trust log that it did not show {how}: the claim is made up, or it is old"
    ))
}

fn unexpected() -> Error {
    Error::trust("the peer broke the protocol while the trust logs were compared")
}
