//! Reaching a service: keeps a tunnel to it and hands out streams, whatever happens underneath.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use connect_crypto::{handshake, transport::Transport};
use connect_spec::{
    bytes::Blob,
    control::{ErrorCode, ErrorReport, Reply, Request, TunnelRequest},
    encoding::Encoding,
    ids::{ChannelId, CredentialId, ServiceName, TunnelId},
    record::CloseCode,
    trust::VerifiedPeer,
};
use tokio::{sync::watch, time::timeout};

use crate::{
    agent::{AbortOnDrop, Core, Link},
    clock,
    directory::{Directory, FoundService},
    engine::{backoff::Backoff, channel::CloseReason},
    error::{Error, ErrorKind, Result},
    exposer::{local, prologue},
    io::{
        dial::HubSocket,
        hub::Session,
        tunnel::{End, Status, Stream, Tunnel, open_data_socket},
    },
    random,
};

/// A client that connects while no tunnel is up waits this long for one.
const OPEN_TIMEOUT: Duration = Duration::from_secs(30);
/// Between tries to reach an exposer that is offline: it may come back at any time.
const OFFLINE_RETRY: Duration = Duration::from_secs(3);
/// So often a peer that has too much to do is asked again before anybody is told.
const BUSY_TRIES: u32 = 8;

/// A service that is reached; clones share it.
#[derive(Debug, Clone)]
pub struct Reached(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    state: watch::Sender<State>,
    task: Mutex<Option<AbortOnDrop>>,
}

#[derive(Debug, Clone)]
enum State {
    /// No tunnel; the error says why, after a try.
    Down(Option<Error>),
    /// A tunnel, whose keys may still be unconfirmed.
    Up { tunnel: Tunnel },
    /// Let go of.
    Stopped,
}

/// How a reached service is doing.
#[derive(Debug, Clone, Default)]
pub struct ReachStatus {
    /// Whether the exposer answered an encrypted ping over the tunnel that is up.
    pub active: bool,
    /// The last round trip, through the hub and the encryption.
    pub round_trip: Option<Duration>,
    /// Streams that are open.
    pub streams: usize,
    /// Why there is no tunnel.
    pub error: Option<Error>,
}

impl Reached {
    pub(crate) fn start(core: Arc<Core>, name: ServiceName) -> Self {
        let reached = Self(Arc::new(Inner {
            state: watch::Sender::new(State::Down(None)),
            task: Mutex::new(None),
        }));
        let state = reached.0.state.clone();
        let task = tokio::spawn(async move { keep(&core, &name, &state).await }).abort_handle();
        *reached.0.task.lock().unwrap_or_else(PoisonError::into_inner) = Some(AbortOnDrop(task));
        reached
    }

    /// Waits until the exposer answered over the tunnel.
    ///
    /// # Errors
    /// Why not, as soon as one try has failed; further tries go on in the background.
    pub async fn ready(&self) -> Result<()> {
        let mut state = self.0.state.subscribe();
        loop {
            let current = state.borrow_and_update().clone();
            match current {
                State::Down(None) => {}
                State::Down(Some(error)) => return Err(error),
                State::Stopped => return Err(stopped()),
                State::Up { tunnel } => {
                    let mut status = tunnel.status();
                    let settled = status.wait_for(|status| {
                        matches!(
                            status,
                            Status::Closed | Status::Established { round_trip: Some(_) }
                        )
                    });
                    if let Ok(Status::Established { .. }) = settled.await.as_deref() {
                        return Ok(());
                    }
                }
            }
            state.changed().await.map_err(|_| stopped())?;
        }
    }

    /// Opens a stream to the service. What is written at once waits for the target to answer.
    ///
    /// # Errors
    /// Why there is no tunnel, after waiting 30 s for one.
    pub async fn open(&self) -> Result<Stream> {
        let mut state = self.0.state.subscribe();
        let opened = timeout(OPEN_TIMEOUT, async {
            loop {
                let current = state.borrow_and_update().clone();
                match current {
                    State::Up { tunnel } => {
                        if let Ok(stream) = tunnel.open_stream() {
                            return Ok(stream);
                        }
                    }
                    State::Stopped => return Err(stopped()),
                    State::Down(_) => {}
                }
                state.changed().await.map_err(|_| stopped())?;
            }
        });
        match opened.await {
            Ok(opened) => opened,
            Err(_) => Err(self.status().error.unwrap_or_else(|| {
                Error::new(ErrorKind::ExposerOffline, "no tunnel could be opened in 30 s")
            })),
        }
    }

    /// How the service is doing now.
    #[must_use]
    pub fn status(&self) -> ReachStatus {
        match &*self.0.state.borrow() {
            State::Up { tunnel } => {
                let round_trip = match *tunnel.status().borrow() {
                    Status::Established { round_trip } => round_trip,
                    Status::Greeting | Status::Closed => None,
                };
                ReachStatus {
                    active: round_trip.is_some(),
                    round_trip,
                    streams: tunnel.open_streams(),
                    error: None,
                }
            }
            State::Down(error) => ReachStatus { error: error.clone(), ..ReachStatus::default() },
            State::Stopped => ReachStatus::default(),
        }
    }

    /// Closes the tunnel, if one is up, and returns it: its last words are still to be sent.
    pub(crate) fn stop(&self) -> Option<Tunnel> {
        if let State::Up { tunnel } = self.0.state.send_replace(State::Stopped) {
            tunnel.close(CloseCode::Normal);
            return Some(tunnel);
        }
        self.0.task.lock().unwrap_or_else(PoisonError::into_inner).take();
        None
    }
}

fn stopped() -> Error {
    Error::new(ErrorKind::Other, "the service is not reached any more")
}

/// Keeps one tunnel up until the service is let go of.
async fn keep(core: &Core, name: &ServiceName, state: &watch::Sender<State>) {
    let mut backoff = Backoff::default();
    let mut link = core.link();
    let mut busy = 0;
    loop {
        let session = match &*link.borrow_and_update() {
            Link::Up(session) => Some(session.clone()),
            Link::Down(None) => None,
            Link::Down(Some(error)) => {
                state.send_replace(State::Down(Some(error.clone())));
                None
            }
            Link::Displaced => return,
        };
        let Some(session) = session else {
            if link.changed().await.is_err() {
                return;
            }
            continue;
        };
        let error = match establish(core, &session, name).await {
            Ok(established) => {
                drop(session);
                let (error, confirmed) = established.run(core, name, state).await;
                if confirmed {
                    backoff.reset();
                    busy = 0;
                }
                error
            }
            Err(error) if error.busy && busy < BUSY_TRIES => {
                busy += 1;
                tokio::time::sleep(backoff.next(random::number())).await;
                continue;
            }
            Err(error) => error,
        };
        tracing::debug!(service = %name, %error, "no tunnel");
        let offline = error.kind == ErrorKind::ExposerOffline;
        let stopped = !state.send_if_modified(|state| {
            let goes_on = !matches!(state, State::Stopped);
            if goes_on {
                *state = State::Down(Some(error));
            }
            goes_on
        });
        if stopped {
            return;
        }
        let wait = backoff.next(random::number());
        let wait = if offline { wait.min(OFFLINE_RETRY) } else { wait };
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            // A new session is a new chance.
            _ = link.changed() => {}
        }
    }
}

/// A tunnel whose handshake is done, on its data socket.
struct Established {
    service: FoundService,
    socket: HubSocket,
    encoding: Encoding,
    transport: Transport,
}

/// Finds the service, runs the handshake through the hub, and opens the data socket.
async fn establish(core: &Core, session: &Arc<Session>, name: &ServiceName) -> Result<Established> {
    let identity = &core.identity;
    let service = Directory::new(identity, session.clone()).find(name).await?;
    core.check_noise_key(&service.exposer)?;
    if let Some(pinned) = core.pinned(name).filter(|pinned| *pinned != service.exposer.agent_id()) {
        tracing::warn!(
            service = %name,
            before = %pinned.short(),
            now = %service.exposer.agent_id().short(),
            "the name stands for another agent than when it was last reached"
        );
    }
    if !service.online {
        return Err(offline(name));
    }
    let encoding = core.options.encoding;
    if !session.encodings().contains(&encoding) {
        return Err(Error::new(ErrorKind::Refused, "the hub does not allow this encoding")
            .hint("leave out `--encoding`"));
    }
    let request = TunnelRequest {
        tunnel_id: TunnelId(random::bytes()),
        service_id: service.record.service_id,
        responder: service.exposer.agent_id(),
        share_id: CredentialId([0; 16]),
        channel_id: ChannelId(random::bytes()),
        tunnel_no: 0,
        encoding,
        message: Blob::default(),
    };
    let prologue = prologue(identity, identity.agent_id, &request);
    let (waiting, message) = handshake::initiate(
        &local(identity),
        &prologue,
        &service.exposer.static_key(),
        &mut random::rng(),
    )
    .map_err(|error| untrusted(name, &error))?;
    let request = TunnelRequest { message: Blob(message), ..request };
    let (message, ticket) = match session.try_request(Request::OpenTunnel(request)).await? {
        Reply::TunnelAccepted { message, ticket } => (message, ticket),
        Reply::Error(report) => {
            return Err(refused(name, &report));
        }
        Reply::Done | Reply::Services { .. } | Reply::Agents { .. } => {
            return Err(Error::new(
                ErrorKind::HubUnreachable,
                "the hub gives no answer to a tunnel",
            ));
        }
    };
    let reply = waiting.read(&message.0).map_err(|error| untrusted(name, &error))?;
    let payload = reply.payload();
    let peer: VerifiedPeer = identity
        .trust
        .verify_peer(service.exposer.agent_id(), payload.presented.clone(), clock::now())
        .map_err(|error| untrusted(name, &error))?;
    core.check_noise_key(&peer)?;
    if !peer.certificate().role.may_expose() {
        return Err(untrusted(name, &"its role may not expose"));
    }
    if payload.head != identity.trust.head() {
        return Err(untrusted(name, &"the trust logs of both sides differ"));
    }
    let transport = reply.confirm(&peer).map_err(|error| untrusted(name, &error))?;
    let socket = open_data_socket(&core.hub, &ticket, encoding).await?;
    Ok(Established { service, socket, encoding, transport })
}

fn offline(name: &ServiceName) -> Error {
    Error::new(ErrorKind::ExposerOffline, format_args!("the exposer of `{name}` is offline"))
        .hint("start its agent (`connect up` there); this side goes on trying")
}

/// Why there is no tunnel, as the hub tells it.
fn refused(name: &ServiceName, report: &ErrorReport) -> Error {
    let gone = [ErrorCode::Offline, ErrorCode::Timeout, ErrorCode::NotFound];
    if gone.contains(&report.code) {
        return offline(name);
    }
    if report.code == ErrorCode::Forbidden {
        return Error::new(
            ErrorKind::Refused,
            format_args!("the exposer does not allow `{name}` to this agent"),
        )
        .hint("ask its owner to add this agent or one of its tags with `--allow`");
    }
    Error::from_hub(report)
}

fn untrusted(name: &ServiceName, why: &dyn std::fmt::Display) -> Error {
    Error::trust(format_args!("the exposer of `{name}` could not be verified: {why}"))
}

impl Established {
    /// Runs the tunnel until it ends; says why, and whether the peer ever confirmed its keys.
    async fn run(
        self,
        core: &Core,
        name: &ServiceName,
        state: &watch::Sender<State>,
    ) -> (Error, bool) {
        let tunnel = Tunnel::reacher();
        let up = State::Up { tunnel: tunnel.clone() };
        let stopped = !state.send_if_modified(|state| {
            let goes_on = !matches!(state, State::Stopped);
            if goes_on {
                *state = up;
            }
            goes_on
        });
        if stopped {
            tunnel.close(CloseCode::Normal);
        }
        let mut status = tunnel.status();
        let (sealer, opener) = self.transport.split();
        let running = tunnel.run(self.socket, self.encoding, sealer, opener);
        let confirming = async {
            let settled = status.wait_for(|status| *status != Status::Greeting).await;
            let confirmed = matches!(settled.as_deref(), Ok(Status::Established { .. }));
            if confirmed {
                core.remember(&self.service.exposer, Some(name));
            }
            confirmed
        };
        let (end, confirmed) = tokio::join!(running, confirming);
        (why_ended(name, &end), confirmed)
    }
}

fn why_ended(name: &ServiceName, end: &End) -> Error {
    match end {
        End::Tampered => {
            tracing::warn!(service = %name, "a packet was altered on the way; the tunnel was closed");
            Error::trust(format_args!("a packet of `{name}` was altered on the way"))
        }
        End::Channel(CloseReason::Peer(CloseCode::ServiceGone)) => {
            Error::new(ErrorKind::ServiceNotFound, format_args!("`{name}` is not exposed any more"))
        }
        End::Channel(CloseReason::Peer(CloseCode::Forbidden)) => Error::new(
            ErrorKind::Refused,
            format_args!("the exposer of `{name}` does not allow this agent any more"),
        ),
        End::Channel(reason) => Error::new(
            ErrorKind::ExposerOffline,
            format_args!("the tunnel to `{name}` ended: {reason}"),
        ),
        End::Socket(cause) => Error::new(
            ErrorKind::HubUnreachable,
            format_args!("the tunnel to `{name}` was lost: {cause}"),
        ),
    }
}
