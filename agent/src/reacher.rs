//! Reaching a service: keeps a channel to its exposer over one tunnel after the other, and hands out
//! streams, whatever happens underneath.

use std::{pin::pin, sync::Arc, time::Duration};

use connect_crypto::{handshake, transport::Transport};
use connect_spec::{
    bytes::Blob,
    control::{ErrorCode, ErrorReport, Reply, Request, TunnelRequest},
    ids::{AgentId, ChannelId, CredentialId, ServiceId, ServiceName, TunnelId},
    limits::PARKED_AT_REACHER,
    prologue::Prologue,
    record::{CloseCode, Purpose},
    trust::{Presented, VerifiedPeer},
};
use tokio::{sync::watch, time::timeout};

use crate::{
    agent::{AbortOnDrop, Core, Link},
    catch_up::{Claims, catch_up},
    clock,
    directory::{Directory, FoundService},
    engine::{
        backoff::Backoff,
        channel::CloseReason,
        rekey::{Failed, Finish, Initiate, Role},
    },
    error::{Error, ErrorKind, Result},
    exposer::{local, prologue},
    identity::Identity,
    io::{
        hub::Session,
        tunnel::{CLOSE_TIMEOUT, ChannelHandle, End, Status, Stream, TunnelEnd},
    },
    keeper, random,
};

/// A client that connects while there is no channel waits this long for one.
const OPEN_TIMEOUT: Duration = Duration::from_secs(30);
/// Between tries to reach an exposer that is offline: it may come back at any time.
const OFFLINE_RETRY: Duration = Duration::from_secs(3);
/// A record that shows an older static key than was seen is looked up once more after this time.
const REPUBLISHED_WITHIN: Duration = Duration::from_secs(1);
/// So often a peer that has too much to do is asked again before anybody is told.
const BUSY_TRIES: u32 = 8;

/// A service that is reached; clones share it.
#[derive(Debug, Clone)]
pub struct Reached(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    state: watch::Sender<State>,
    _task: AbortOnDrop,
}

#[derive(Debug, Clone, Default)]
struct State {
    /// The conversation with the exposer, on a tunnel or waiting for the next.
    channel: Option<ChannelHandle>,
    /// Why the last try to bring up a tunnel failed, or the last tunnel ended.
    error: Option<Error>,
    stopped: bool,
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
    /// How often the keys were replaced under the conversation that goes on.
    pub rekeys: u64,
    /// Why the service is not active.
    pub error: Option<Error>,
}

impl Reached {
    pub(crate) fn start(core: Arc<Core>, name: ServiceName) -> Self {
        let state = watch::Sender::<State>::default();
        let task = tokio::spawn({
            let state = state.clone();
            async move {
                tokio::select! {
                    () = keep(&core, &name, &state) => {}
                    () = let_go(&state) => {}
                }
            }
        });
        Self(Arc::new(Inner { state, _task: AbortOnDrop(task.abort_handle()) }))
    }

    /// Waits until the exposer answered an encrypted ping.
    ///
    /// # Errors
    /// Why not, as soon as one try has failed; further tries go on in the background.
    pub async fn ready(&self) -> Result<()> {
        let mut state = self.0.state.subscribe();
        loop {
            let current = state.borrow_and_update().clone();
            if current.stopped {
                return Err(stopped());
            }
            if let Some(error) = current.error {
                return Err(error);
            }
            let answered = async {
                match &current.channel {
                    Some(channel) => channel.answered().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = answered => return Ok(()),
                changed = state.changed() => changed.map_err(|_| stopped())?,
            }
        }
    }

    /// Opens a stream to the service. What is written at once waits for the target to answer.
    ///
    /// # Errors
    /// Why there is no channel, after waiting 30 s for one.
    pub async fn open(&self) -> Result<Stream> {
        self.open_for(Purpose::Target).await.map(|(stream, _)| stream)
    }

    /// Opens a stream for a purpose; also gives the channel that it is in.
    pub(crate) async fn open_for(&self, purpose: Purpose) -> Result<(Stream, ChannelHandle)> {
        let mut state = self.0.state.subscribe();
        let opened = timeout(OPEN_TIMEOUT, async {
            loop {
                let current = state.borrow_and_update().clone();
                if current.stopped {
                    return Err(stopped());
                }
                if let Some(channel) = current.channel
                    && let Ok(stream) = channel.open_stream(purpose)
                {
                    return Ok((stream, channel));
                }
                state.changed().await.map_err(|_| stopped())?;
            }
        });
        opened.await.unwrap_or_else(|_| {
            Err(self.status().error.unwrap_or_else(|| {
                Error::new(ErrorKind::ExposerOffline, "no tunnel could be opened in 30 s")
            }))
        })
    }

    /// How the service is doing now.
    #[must_use]
    pub fn status(&self) -> ReachStatus {
        let state = self.0.state.borrow().clone();
        let round_trip = state.channel.as_ref().and_then(ChannelHandle::round_trip);
        ReachStatus {
            active: round_trip.is_some(),
            round_trip,
            streams: state.channel.as_ref().map_or(0, ChannelHandle::open_streams),
            rekeys: state.channel.as_ref().map_or(0, ChannelHandle::rekeys),
            error: state.error.filter(|_| round_trip.is_none()),
        }
    }

    /// Closes the channel, if there is one, and returns it: its last words are still to be sent.
    pub(crate) fn stop(&self) -> Option<ChannelHandle> {
        self.0.state.send_modify(|state| state.stopped = true);
        let channel = self.0.state.borrow().channel.clone()?;
        channel.close(CloseCode::Normal);
        // The task that sends the last word must outlive whoever lets go, but no runtime does.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let (task, closing) = (self.clone(), channel.clone());
            runtime.spawn(async move {
                // A hub that does not take it must not hold up the end.
                let _ = timeout(CLOSE_TIMEOUT, closing.closed()).await;
                drop(task);
            });
        }
        Some(channel)
    }
}

/// Waits until the service is let go of and the exposer was told.
async fn let_go(state: &watch::Sender<State>) {
    let stopped =
        state.subscribe().wait_for(|state| state.stopped).await.map(|state| state.clone());
    // The sender is right here.
    if let Ok(State { channel: Some(channel), .. }) = stopped {
        channel.closed().await;
    }
}

fn stopped() -> Error {
    Error::new(ErrorKind::Other, "the service is not reached any more")
}

/// A channel to one exposer, and which tunnel of it is next.
struct Conversation {
    channel: ChannelHandle,
    channel_id: ChannelId,
    next_tunnel: u32,
    exposer: AgentId,
    service_id: ServiceId,
    /// Ends the channel when no tunnel comes back in time.
    _expiry: AbortOnDrop,
}

impl Conversation {
    fn begin(service: &FoundService) -> Self {
        let channel = ChannelHandle::reacher();
        let expiring = channel.clone();
        let expiry = tokio::spawn(async move { expiring.expire_after(PARKED_AT_REACHER).await });
        Self {
            channel,
            channel_id: ChannelId(random::bytes()),
            next_tunnel: 0,
            exposer: service.exposer.agent_id(),
            service_id: service.record.service_id,
            _expiry: AbortOnDrop(expiry.abort_handle()),
        }
    }

    /// Whether a tunnel to `service` can carry this conversation on.
    fn goes_on_with(&self, service: &FoundService) -> bool {
        let over = *self.channel.status().borrow() == Status::Closed;
        !over
            && self.exposer == service.exposer.agent_id()
            && self.service_id == service.record.service_id
    }
}

/// Keeps the service reached until it is let go of: one tunnel after the other, and a new channel when
/// the old one is over.
async fn keep(core: &Arc<Core>, name: &ServiceName, state: &watch::Sender<State>) {
    let mut backoff = Backoff::default();
    let mut link = core.link();
    let mut cuts = core.hub.sockets().cuts();
    let mut conversation: Option<Conversation> = None;
    let mut busy = 0;
    while !state.borrow().stopped {
        let current = link.borrow_and_update().clone();
        let session = match current {
            Link::Up(session) => session,
            Link::Displaced => return,
            Link::Down(error) => {
                if error.is_some() {
                    state.send_modify(|state| state.error = error);
                }
                if link.changed().await.is_err() {
                    return;
                }
                continue;
            }
        };
        let Err(error) = connect(core, session, name, state, &mut conversation, &mut backoff).await
        else {
            return;
        };
        if error.kind == ErrorKind::TrustViolation {
            tracing::warn!(event = "untrusted", service = %name, %error, "no tunnel");
        } else {
            tracing::debug!(service = %name, %error, "no tunnel");
        }
        let offline = error.kind == ErrorKind::ExposerOffline;
        busy = if error.busy { busy + 1 } else { 0 };
        let asked = error.retry_in;
        if busy == 0 || busy > BUSY_TRIES {
            state.send_modify(|state| state.error = Some(error));
        }
        let wait = backoff.next_after(asked, random::number());
        let wait = if offline { wait.min(OFFLINE_RETRY) } else { wait };
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            // A new session is a new chance.
            _ = link.changed() => {}
            // And so is another network; the sender lives as long as the core.
            _ = cuts.changed() => backoff.reset(),
        }
    }
}

/// Brings up one tunnel and runs it to its end. `Ok` when the service was let go of.
async fn connect(
    core: &Arc<Core>,
    session: Arc<Session>,
    name: &ServiceName,
    state: &watch::Sender<State>,
    conversation: &mut Option<Conversation>,
    backoff: &mut Backoff,
) -> Result<()> {
    let mut service = find(core, &session, name).await?;
    if let Some(old) = conversation.take_if(|going| !going.goes_on_with(&service)) {
        old.channel.close(CloseCode::Lost);
    }
    let conversation = conversation.get_or_insert_with(|| Conversation::begin(&service));
    let (end, shown) = match establish(core, &session, name, &service, conversation).await {
        Err(error) if matches!(error.kind, ErrorKind::Refused | ErrorKind::TrustViolation) => {
            // The exposer may have rotated its static key since it was looked up. What the hub says now
            // must not hide what was wrong before.
            let Ok(again) = find(core, &session, name).await else {
                return Err(error);
            };
            let is_newer = again.exposer.noise_key_counter() > service.exposer.noise_key_counter();
            if !is_newer || !conversation.goes_on_with(&again) {
                return Err(error);
            }
            service = again;
            establish(core, &session, name, &service, conversation).await?
        }
        established => established?,
    };
    drop(session);

    let channel = conversation.channel.clone();
    state.send_modify(|state| {
        state.channel = Some(channel.clone());
        state.error = None;
    });
    if state.borrow().stopped {
        channel.close(CloseCode::Normal);
    }
    let confirming = async {
        channel.confirmed().await;
        core.remember(&service.exposer, Some(name));
        backoff.reset();
    };
    // The confirmation is waited for only as long as the tunnel lives.
    let run = async {
        let mut running = pin!(channel.run(end, None));
        tokio::select! {
            end = &mut running => end,
            () = confirming => running.await,
        }
    };
    let mut run = pin!(run);
    let end = tokio::select! {
        end = &mut run => end,
        error = distrusted(core, name, shown) => {
            tracing::warn!(event = "peer_ended", service = %name, %error, "the channel was closed");
            channel.close(CloseCode::Forbidden);
            // The last record is on its way; a peer that does not read it cannot hold us.
            let _ = timeout(CLOSE_TIMEOUT, run).await;
            return Err(error);
        }
    };
    if matches!(end, End::Tampered) {
        tracing::warn!(service = %name, "a packet was altered on the way; the tunnel was closed");
        core.note_altered(service.exposer.agent_id(), service.record.service_id, name);
    }
    if state.borrow().stopped { Ok(()) } else { Err(why_ended(name, &end)) }
}

/// Finds the service and holds its exposer against what is known of it.
async fn find(core: &Core, session: &Arc<Session>, name: &ServiceName) -> Result<FoundService> {
    let directory = Directory::new(core.workspace.clone(), session.clone());
    let mut service = directory.find(name).await?;
    if core.has_newer_key_than(&service.exposer) {
        // An exposer that rotates its static key publishes one service after the other.
        tokio::time::sleep(REPUBLISHED_WITHIN).await;
        service = directory.find(name).await?;
    }
    core.check_noise_key(&service.exposer)?;
    let exposer = service.exposer.agent_id();
    if let Some(pinned) = core.pinned(name).filter(|pinned| *pinned != exposer) {
        tracing::warn!(
            event = "name_taken_over",
            service = %name,
            before = %pinned.short(),
            now = %exposer.short(),
            "the name stands for another agent than when it was last reached"
        );
        if core.identity().trust.policy().strict {
            return Err(Error::trust(format_args!(
                "`{name}` was exposed by agent {} and is now by agent {}; the policy is strict",
                pinned.short(),
                exposer.short()
            ))
            .hint("if that is as it should be: `connect reach NAME --accept-new`"));
        }
    }
    if service.online { Ok(service) } else { Err(offline(name)) }
}

/// Runs the handshake through the hub, and opens the data socket. Also tells what the exposer shows of
/// itself, then and whenever keys are replaced.
async fn establish(
    core: &Arc<Core>,
    session: &Session,
    name: &ServiceName,
    service: &FoundService,
    conversation: &mut Conversation,
) -> Result<(TunnelEnd, watch::Receiver<VerifiedPeer>)> {
    let identity = core.identity();
    let encoding = core.options.encoding;
    if !session.encodings().contains(&encoding) {
        return Err(Error::new(ErrorKind::Refused, "the hub does not allow this encoding")
            .hint("leave out `--encoding`"));
    }
    keeper::check_policy(core, session, &identity, &service.exposer).await?;
    let request = TunnelRequest {
        tunnel_id: TunnelId(random::bytes()),
        service_id: service.record.service_id,
        responder: service.exposer.agent_id(),
        share_id: identity.share_id().unwrap_or(CredentialId::NONE),
        channel_id: conversation.channel_id,
        tunnel_no: conversation.next_tunnel,
        encoding,
        message: Blob::default(),
    };
    // Counted when it is tried: a number is never used twice.
    conversation.next_tunnel = conversation.next_tunnel.saturating_add(1);
    let prologue = prologue(&identity, identity.agent_id, &request);
    let (waiting, message) = handshake::initiate(
        &local(&identity, &identity.noise, &identity.epochs.current().secrets.realm),
        &prologue,
        &service.exposer.static_key(),
        &mut random::rng(),
    )
    .map_err(|error| untrusted(name, &error))?;
    let request = TunnelRequest { message: Blob(message), ..request };
    let answer = session.try_request(Request::OpenTunnel(request)).await?;
    if let Reply::Error(report) = &answer {
        return Err(refused(name, report));
    }
    let Reply::TunnelAccepted { message, ticket } = answer else {
        return Err(Error::new(ErrorKind::HubUnreachable, "the hub gives no answer to a tunnel"));
    };
    let reply = waiting.read(&message.0).map_err(|error| untrusted(name, &error))?;
    let payload = reply.payload();
    let presented = payload.presented.clone();
    let peer = judge(name, &identity, service.exposer.agent_id(), presented)?;
    core.check_noise_key(&peer)?;
    let claims = Claims { own: identity.trust.head(), peer: payload.head };
    let transport = reply.confirm(&peer).map_err(|error| untrusted(name, &error))?;
    let (shows, shown) = watch::channel(peer.clone());
    let role = Role::Reacher(begin_rekey(core.clone(), name.clone(), prologue, shows));
    let after = core.options.rekey_after;
    let mut end = TunnelEnd::open(&core.hub, &ticket, encoding, transport, role, after).await?;
    let still_good = |identity: &Identity| {
        judge(name, identity, peer.agent_id(), peer.presented().clone()).map(|_| ())
    };
    let caught_up = catch_up(&mut end, &core.workspace, claims, still_good).await;
    // What was learned may also be that nobody gets a tunnel now.
    let allowed = match caught_up {
        Ok(()) => keeper::check_policy(core, session, &core.identity(), &peer).await,
        failed => failed,
    };
    if let Err(error) = allowed {
        tracing::warn!(event = "peer_ended", service = %name, %error, "tunnel closed");
        if error.altered {
            core.note_altered(peer.agent_id(), service.record.service_id, name);
        }
        end.refuse(CloseCode::Forbidden).await;
        return Err(error);
    }
    Ok((end, shown))
}

/// The reacher's half of the handshakes that replace the keys of a tunnel: the exposer is judged as if
/// it answered for a new tunnel, by what is known then. The hub has no part in it.
fn begin_rekey(
    core: Arc<Core>,
    name: ServiceName,
    first: Prologue,
    shows: watch::Sender<VerifiedPeer>,
) -> Initiate<Transport> {
    let (shows, responder) = (Arc::new(shows), first.responder);
    Box::new(move |place| {
        let identity = core.identity();
        let exposer = core.newest_static_key(&shows.borrow());
        let (waiting, message1) = handshake::initiate(
            &local(&identity, &identity.noise, &identity.epochs.current().secrets.realm),
            &place.prologue(&first),
            &exposer,
            &mut random::rng(),
        )?;
        let (core, name, shows) = (core.clone(), name.clone(), shows.clone());
        let finish: Finish<Transport> = Box::new(move |message2| {
            let reply = waiting.read(message2)?;
            let presented = reply.payload().presented.clone();
            let identity = core.identity();
            let peer = judge(&name, &identity, responder, presented)
                .and_then(|peer| core.check_noise_key(&peer).map(|()| peer))
                .map_err(|error| {
                    tracing::warn!(
                        event = "peer_ended",
                        service = %name,
                        %error,
                        "a tunnel gets no new keys"
                    );
                    Failed { code: CloseCode::Forbidden, why: error.to_string() }
                })?;
            let transport = reply.confirm(&peer)?;
            core.remember(&peer, Some(&name));
            shows.send_replace(peer);
            Ok(transport)
        });
        Ok((finish, message1))
    })
}

/// Whether an agent is an exposer, by what is known now.
fn judge(
    name: &ServiceName,
    identity: &Identity,
    exposer: AgentId,
    presented: Presented,
) -> Result<VerifiedPeer> {
    let peer = identity
        .trust
        .verify_peer(exposer, presented, clock::now())
        .map_err(|error| untrusted(name, &error))?;
    if peer.certificate().role.may_expose() {
        Ok(peer)
    } else {
        Err(untrusted(name, &"its role may not expose"))
    }
}

/// Waits until the trust log says that the exposer is none any more, by what it showed last.
async fn distrusted(
    core: &Core,
    name: &ServiceName,
    mut shown: watch::Receiver<VerifiedPeer>,
) -> Error {
    let mut identities = core.identity_changes();
    loop {
        let identity = identities.borrow_and_update().clone();
        let exposer = shown.borrow_and_update().clone();
        let presented = exposer.presented().clone();
        if let Err(error) = judge(name, &identity, exposer.agent_id(), presented) {
            return error;
        }
        tokio::select! {
            Ok(()) = identities.changed() => {}
            Ok(()) = shown.changed() => {}
            // The senders live as long as the core and the tunnel.
            else => std::future::pending::<()>().await,
        }
    }
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

fn why_ended(name: &ServiceName, end: &End) -> Error {
    match end {
        End::Tampered => Error::trust(format_args!("a packet of `{name}` was altered on the way")),
        End::Channel(CloseReason::Peer(CloseCode::ServiceGone)) => {
            Error::new(ErrorKind::ServiceNotFound, format_args!("`{name}` is not exposed any more"))
        }
        End::Channel(CloseReason::Peer(CloseCode::Forbidden)) => Error::new(
            ErrorKind::Refused,
            format_args!("the exposer of `{name}` does not allow this agent any more"),
        ),
        End::Channel(_) | End::Peer(_) | End::Silent | End::Replaced | End::Rekey(_) => Error::new(
            ErrorKind::ExposerOffline,
            format_args!("the tunnel to `{name}` ended: {end}"),
        ),
        End::Socket(cause) => Error::new(
            ErrorKind::HubUnreachable,
            format_args!("the tunnel to `{name}` was lost: {cause}"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use connect_spec::objects::AgentRole;

    use super::*;
    use crate::{common::World, identity::tests::identity};

    #[test]
    fn whose_role_is_to_reach_exposes_nothing() {
        let world = World::new();
        let own = Identity { trust: Arc::new(world.trust.clone()), ..identity() };
        let name = "svc".parse().expect("a name");
        for (role, expected) in
            [(AgentRole::Member, true), (AgentRole::Exposer, true), (AgentRole::Reacher, false)]
        {
            let agent = world.member_as("agent", role);
            let judged = judge(&name, &own, agent.id(), agent.presented);
            assert_eq!(judged.is_ok(), expected, "{role:?}");
        }
    }
}
