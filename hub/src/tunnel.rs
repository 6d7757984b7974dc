//! One data socket from its upgrade to its end: waits for the other end, then relays.

use std::{sync::Arc, time::Instant};

use connect_spec::{audit::Event, control::close, limits::HANDSHAKE_TIMEOUT};
use tokio::time::timeout;

use crate::{
    audit::tunnel_end,
    hub::{First, Hub, Joined},
    relay::{self, Leg, Side},
    router::{Claim, Parties},
    server::Conn,
};

/// An end of a tunnel that showed its ticket. Dropped before it is handed over, it ends the tunnel.
#[derive(Debug)]
pub struct Admitted {
    hub: Arc<Hub>,
    claim: Claim,
    handed_over: bool,
}

impl Admitted {
    /// Takes responsibility for a claim.
    #[must_use]
    pub fn new(hub: Arc<Hub>, claim: Claim) -> Self {
        Self { hub, claim, handed_over: false }
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        if !self.handed_over {
            self.hub.close_tunnel(&self.claim);
        }
    }
}

/// Serves one end. The end that comes second hands its socket to the first, which then serves both.
pub async fn serve(mut admitted: Admitted, leg: Leg<Conn>) {
    let hub = Arc::clone(&admitted.hub);
    let First { leg: mine, other, mut cut, meter } = match hub.join(&admitted.claim, leg) {
        Joined::First(first) => first,
        Joined::HandedOver => {
            admitted.handed_over = true;
            return;
        }
        Joined::TooLate(mine) => return relay::refuse(mine.io, close::PEER_GONE).await,
    };
    // Nothing is read meanwhile: what this end sends early waits in the sockets.
    let other = tokio::select! {
        // A cut comes with the end of the place, which drops the other end's way: look here first.
        biased;
        code = &mut cut => return relay::refuse(mine.io, code.unwrap_or(close::PEER_GONE)).await,
        () = hub.stopped() => return relay::refuse(mine.io, close::RESTARTING).await,
        other = timeout(HANDSHAKE_TIMEOUT, other) => other,
    };
    let Ok(Ok(other)) = other else {
        return relay::refuse(mine.io, close::PEER_GONE).await;
    };
    let (reacher, exposer) = match admitted.claim.side {
        Side::Reacher => (mine, other),
        Side::Exposer => (other, mine),
    };
    let stop = async {
        tokio::select! {
            code = cut => code.unwrap_or(close::PEER_GONE),
            () = hub.stopped() => close::RESTARTING,
        }
    };
    let (workspace, tunnel_id) = admitted.claim.tunnel;
    let Parties { reacher: agent_id, exposer: peer_id, service: service_id, share: share_id } =
        admitted.claim.parties;
    let opened = Event::TunnelOpened { agent_id, peer_id, service_id, tunnel_id, share_id };
    hub.note(workspace, opened);
    let since = Instant::now();
    let ended = relay::relay(reacher, exposer, admitted.claim.encoding, &meter, stop).await;
    let closed = Event::TunnelClosed {
        agent_id,
        peer_id,
        service_id,
        tunnel_id,
        duration_ms: u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX),
        bytes_from_agent: meter.sent.by(Side::Reacher),
        bytes_from_peer: meter.sent.by(Side::Exposer),
        reason: tunnel_end(ended),
    };
    tracing::debug!(tunnel = %tunnel_id, ?ended, "tunnel ended");
    hub.note(workspace, closed);
}
