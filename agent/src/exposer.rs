//! Offering services: what is exposed, who may come, and the responder's half of every tunnel.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet, VecDeque},
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use connect_crypto::{
    CryptoError,
    epoch::RealmSecret,
    handshake::{self, HandshakeError, Received},
    transport::Transport,
};
use connect_spec::{
    bytes::Blob,
    control::{ErrorCode, FromAgent, SealedRecord, Ticket, TunnelRequest},
    ids::{AgentId, ChannelId, CredentialId, ServiceId, ServiceName, TunnelId},
    limits::{
        HANDSHAKE_TIMEOUT, MAX_FIRST_MESSAGES_PER_SEC, MAX_HALF_OPEN, MAX_HALF_OPEN_PER_PEER,
        MAX_PARKED_PER_PEER, PARKED_AT_EXPOSER, REMEMBERED_TUNNELS,
    },
    log::Head,
    objects::{AgentRole, Credential, ServiceRecord},
    prologue::{Prologue, Realm},
    record::{CloseCode, Purpose, ResetCode, StreamId},
    trust::{TrustError, VerifiedPeer},
};
use tokio::{
    net::TcpStream,
    sync::{Notify, mpsc},
    task::JoinSet,
    time::timeout,
};

use crate::{
    agent::Core,
    catch_up::{Claims, catch_up},
    check, clock,
    engine::rekey::{Answer, Answered, Failed, Role},
    error::{Error, ErrorKind},
    health::Health,
    identity::{Epoch, Identity, NoiseIdentity},
    io::{
        hub::Session,
        splice::splice,
        tunnel::{ChannelHandle, End, Status, Stream, TunnelEnd},
    },
    keeper, random,
    target::Target,
};

/// A target that does not answer a dial within this time is reported to the client.
const DIAL_TIMEOUT: Duration = Duration::from_secs(10);

/// A service that this agent offers.
#[derive(Debug)]
pub struct Exposed {
    /// Its name.
    pub name: ServiceName,
    /// Its id.
    pub service_id: ServiceId,
    /// Where its connections go; never leaves this machine.
    pub target: Target,
    /// Tags and agents that may reach it; empty: every member.
    pub allow: BTreeSet<String>,
    /// What is spoken there, where that was found out; else the port says.
    protocol: Option<String>,
    /// How its target is.
    pub(crate) health: Health,
}

impl Exposed {
    /// A service to offer.
    #[must_use]
    pub fn new(
        name: ServiceName,
        service_id: ServiceId,
        target: Target,
        allow: BTreeSet<String>,
    ) -> Self {
        Self { name, service_id, target, allow, protocol: None, health: Health::default() }
    }

    /// The same service, speaking what was found out.
    #[must_use]
    pub(crate) fn speaking(self, protocol: Option<String>) -> Self {
        Self { protocol, ..self }
    }

    /// What is spoken there, as far as it is known.
    pub(crate) fn protocol(&self) -> &str {
        self.protocol.as_deref().unwrap_or_else(|| self.target.protocol())
    }

    /// Whether the target answered when it was last tried.
    #[must_use]
    pub fn target_ok(&self) -> bool {
        self.health.is_ok()
    }

    /// The signed and sealed record that others find: members by the current epoch, guests by that of their
    /// share.
    pub(crate) fn record(
        &self,
        identity: &Identity,
        epoch: &Epoch,
        counter: u32,
        target_ok: bool,
    ) -> Result<SealedRecord, CryptoError> {
        let presented = &identity.noise.presented;
        let record = identity.signing.sign(&ServiceRecord {
            workspace_id: identity.workspace_id(),
            service_id: self.service_id,
            agent_id: identity.agent_id,
            counter,
            epoch: epoch.number,
            name: self.name.clone(),
            protocol: self.protocol().to_owned(),
            certificate: presented.certificate.clone(),
            credential: presented.credential.clone(),
            noise_key: presented.noise_key.clone(),
            port_hint: Some(self.target.port()),
            target_ok: Some(target_ok),
        });
        epoch.names.seal_service(&record, &mut random::rng())
    }

    fn allows(&self, peer: AgentId, tags: &[String]) -> bool {
        self.allow.is_empty()
            || self.allow.contains(&peer.to_string())
            || tags.iter().any(|tag| self.allow.contains(tag))
    }

    async fn dial(&self) -> Result<TcpStream, ResetCode> {
        match timeout(DIAL_TIMEOUT, self.target.connect()).await {
            Ok(Ok(tcp)) => tcp.set_nodelay(true).map(|()| tcp).map_err(|_| ResetCode::Aborted),
            Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => {
                Err(ResetCode::TargetRefused)
            }
            Ok(Err(error)) if error.kind() == io::ErrorKind::TimedOut => {
                Err(ResetCode::TargetTimeout)
            }
            Ok(Err(_)) => Err(ResetCode::TargetUnreachable),
            Err(_) => Err(ResetCode::TargetTimeout),
        }
    }
}

/// The services of this agent, the channels to them, and the guard at their door.
#[derive(Debug, Default)]
pub(crate) struct Exposer {
    services: Mutex<BTreeMap<ServiceName, Arc<Exposed>>>,
    shares: Mutex<BTreeMap<CredentialId, Credential>>,
    channels: Mutex<BTreeMap<ChannelKey, LiveChannel>>,
    door: Mutex<Door>,
    /// A dial went another way than the record of its service says.
    pub(crate) health_changed: Arc<Notify>,
}

/// What names a channel. The workspace is the agent's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct ChannelKey {
    peer: AgentId,
    service_id: ServiceId,
    share_id: CredentialId,
    channel_id: ChannelId,
}

/// A channel from its first tunnel to its end, whether it is on a tunnel or waits for the next.
#[derive(Debug)]
struct LiveChannel {
    handle: ChannelHandle,
    /// Number of its newest tunnel.
    tunnel_no: u32,
    /// Who is at the other end, as it showed itself last.
    user: User,
}

/// A peer and what it uses: what is judged again whenever the trust log changes.
#[derive(Debug)]
struct User {
    peer: VerifiedPeer,
    tags: Vec<String>,
    service: Arc<Exposed>,
    /// That of a guest.
    share_id: CredentialId,
}

impl User {
    fn judge(&self, identity: &Identity) -> Result<(), Refusal> {
        let presented = self.peer.presented().clone();
        identity.trust.verify_peer(self.peer.agent_id(), presented, clock::now())?;
        authorise(&self.service, &self.peer, &self.tags, self.share_id)
    }
}

impl From<Refusal> for Failed {
    fn from(refusal: Refusal) -> Self {
        Self { code: CloseCode::Forbidden, why: refusal.why }
    }
}

impl From<HandshakeError> for Failed {
    fn from(error: HandshakeError) -> Self {
        Self { code: CloseCode::Protocol, why: error.to_string() }
    }
}

/// Why a tunnel is not accepted: what the peer is told, and what this agent's log says.
struct Refusal {
    code: ErrorCode,
    event: &'static str,
    why: String,
}

impl Refusal {
    fn new(code: ErrorCode, why: impl std::fmt::Display) -> Self {
        Self { code, event: "refused", why: why.to_string() }
    }
}

impl From<TrustError> for Refusal {
    fn from(error: TrustError) -> Self {
        // What exactly is wrong is for this agent's log: the hub, which carries the answer, need not know.
        let unknown = error == TrustError::IssuerUnknown;
        let code = if unknown { ErrorCode::IssuerUnknown } else { ErrorCode::Refused };
        Self { code, event: error.code(), why: error.to_string() }
    }
}

/// Whether a peer that could not be verified may be known to a newer log than this agent's.
fn is_news(
    verified: &Result<VerifiedPeer, TrustError>,
    identity: &Identity,
    claimed: Head,
) -> bool {
    let unknown = matches!(verified, Err(TrustError::IssuerUnknown | TrustError::Credential));
    unknown && claimed.seq > identity.trust.head().seq
}

impl Exposer {
    fn services(&self) -> MutexGuard<'_, BTreeMap<ServiceName, Arc<Exposed>>> {
        self.services.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn channels(&self) -> MutexGuard<'_, BTreeMap<ChannelKey, LiveChannel>> {
        self.channels.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn door(&self) -> MutexGuard<'_, Door> {
        self.door.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Offers a service. One of the same name is replaced, and the channels to it end: what they would
    /// carry on with may be another target, or not be allowed any more.
    pub(crate) fn add(&self, service: Arc<Exposed>) {
        let old = self.services().insert(service.name.clone(), service.clone());
        if let Some(old) = old {
            self.close_channels(old.service_id, CloseCode::ServiceGone);
        }
    }

    pub(crate) fn remove(&self, name: &ServiceName) -> Option<Arc<Exposed>> {
        let removed = self.services().remove(name)?;
        self.close_channels(removed.service_id, CloseCode::ServiceGone);
        Some(removed)
    }

    /// The open shares that name services of this agent, as they were last learned of.
    pub(crate) fn shares(&self) -> MutexGuard<'_, BTreeMap<CredentialId, Credential>> {
        self.shares.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Those of them that name one service.
    pub(crate) fn shares_of(&self, service: ServiceId) -> Vec<CredentialId> {
        let shares = self.shares();
        let naming = shares.iter().filter(|(_, share)| names_service(share, service));
        naming.map(|(id, _)| *id).collect()
    }

    pub(crate) fn all(&self) -> Vec<Arc<Exposed>> {
        self.services().values().cloned().collect()
    }

    /// Each service with the number of streams that are open to it.
    pub(crate) fn status(&self) -> Vec<(Arc<Exposed>, usize)> {
        let channels = self.channels();
        let streams = |service: &Exposed| {
            let mine = channels.iter().filter(|(key, _)| key.service_id == service.service_id);
            mine.map(|(_, channel)| channel.handle.open_streams()).sum()
        };
        self.all()
            .into_iter()
            .map(|service| {
                let open = streams(&service);
                (service, open)
            })
            .collect()
    }

    /// Closes every channel; returns those whose last words are still to be sent.
    pub(crate) fn stop(&self) -> Vec<ChannelHandle> {
        self.services().clear();
        let channels: Vec<_> =
            self.channels().values().map(|channel| channel.handle.clone()).collect();
        for channel in &channels {
            channel.close(CloseCode::Normal);
        }
        channels
    }

    fn find(&self, id: ServiceId) -> Option<Arc<Exposed>> {
        self.services().values().find(|service| service.service_id == id).cloned()
    }

    fn close_channels(&self, service: ServiceId, code: CloseCode) {
        for (key, channel) in &*self.channels() {
            if key.service_id == service {
                channel.handle.close(code);
            }
        }
    }

    /// Answers a request for a tunnel, and serves the tunnel on a task of its own.
    pub(crate) async fn answer(
        &self,
        core: &Arc<Core>,
        session: &Session,
        initiator: AgentId,
        request: TunnelRequest,
        ticket: Ticket,
    ) {
        let tunnel_id = request.tunnel_id;
        let entered = self.door().enter(initiator, tunnel_id, Instant::now());
        let answered = match entered {
            Ok(()) => {
                let _place = HalfOpen { exposer: self, peer: initiator };
                self.accept(core, session, initiator, request, ticket).await
            }
            Err(refusal) => Err(refusal),
        };
        if let Err(refusal) = answered {
            tracing::warn!(
                event = refusal.event,
                peer = %initiator.short(),
                why = refusal.why,
                "tunnel refused"
            );
            let refuse = FromAgent::RefuseTunnel { tunnel_id, code: refusal.code };
            // A session that is gone has forgotten the request too.
            let _ = session.tell(refuse).await;
        }
    }

    /// Verifies the initiator, answers it, and waits until its first record confirms the keys.
    async fn accept(
        &self,
        core: &Arc<Core>,
        session: &Session,
        initiator: AgentId,
        request: TunnelRequest,
        ticket: Ticket,
    ) -> Result<(), Refusal> {
        let service = self
            .find(request.service_id)
            .ok_or_else(|| Refusal::new(ErrorCode::NotFound, "no such service here"))?;
        let begun = core.identity();
        let mut identity = begun.clone();
        if request.responder != identity.agent_id {
            return Err(Refusal::new(ErrorCode::Refused, "meant for another agent"));
        }
        let prologue = prologue(&identity, initiator, &request);
        let (noise, received) = receive(&begun, &prologue, &request.message.0)
            .map_err(|error| Refusal::new(ErrorCode::Refused, error))?;
        let payload = received.payload();
        let presented = &payload.presented;
        let verify = |identity: &Identity| {
            identity.trust.verify_peer(initiator, presented.clone(), clock::now())
        };
        let mut verified = verify(&identity);
        if is_news(&verified, &identity, payload.head) {
            // Its issuer may be a signer that this agent has not heard of yet. A hub that does not say
            // so is no reason to fail otherwise than before.
            let _ = core.workspace.sync(session).await;
            identity = core.identity();
            verified = verify(&identity);
        }
        let peer = verified?;
        core.check_noise_key(&peer).map_err(|error| Refusal::new(ErrorCode::Refused, error))?;
        let share_id = request.share_id;
        authorise(&service, &peer, &payload.attrs.tags, share_id)?;
        core.admit_guest(&peer).map_err(|error| Refusal::new(ErrorCode::Forbidden, error))?;
        keeper::check_policy(core, session, &identity, &peer).await.map_err(|error| {
            let frozen = identity.trust.is_frozen();
            Refusal::new(if frozen { ErrorCode::UpgradeNeeded } else { ErrorCode::Refused }, error)
        })?;
        let tags = payload.attrs.tags.clone();
        let claims = Claims { own: identity.trust.head(), peer: payload.head };

        let share = guest_epoch(&identity, share_id);
        let realm = &share.as_ref().unwrap_or(identity.epochs.current()).secrets.realm;
        let (transport, message) = received
            .answer(&peer, &local(&identity, noise, realm), &mut random::rng())
            .map_err(|error| Refusal::new(ErrorCode::Refused, error))?;
        let accept =
            FromAgent::AcceptTunnel { tunnel_id: request.tunnel_id, message: Blob(message) };
        let failed = |error: &dyn std::fmt::Display| Refusal::new(ErrorCode::Offline, error);
        session.tell(accept).await.map_err(|error| failed(&error))?;
        let key = ChannelKey {
            peer: initiator,
            service_id: request.service_id,
            share_id,
            channel_id: request.channel_id,
        };
        let answer = answer_rekey(core.clone(), key, service.clone(), prologue);
        let (role, after) = (Role::Exposer(answer), core.options.rekey_after);
        let mut end = TunnelEnd::open(&core.hub, &ticket, request.encoding, transport, role, after)
            .await
            .map_err(|error| failed(&error))?;
        let user = User { peer, tags, service, share_id };
        let judge = |identity: &Identity| {
            user.judge(identity).map_err(|refusal| Error::new(ErrorKind::Refused, refusal.why))
        };
        let caught_up = catch_up(&mut end, &core.workspace, claims, judge).await;
        // What was learned may also be that nobody gets a tunnel now.
        let allowed = match caught_up {
            Ok(()) => keeper::check_policy(core, session, &core.identity(), &user.peer).await,
            failed => failed,
        };
        let service = user.service.clone();
        let altered = |core: &Core| core.note_altered(initiator, service.service_id, &service.name);
        if let Err(error) = allowed {
            tracing::warn!(event = "peer_ended", peer = %initiator.short(), %error, "tunnel closed");
            if error.altered {
                altered(core);
            }
            end.refuse(CloseCode::Forbidden).await;
            return Ok(());
        }
        // The initiator's first record proves that this is no replay; nothing is touched before.
        let first = match timeout(HANDSHAKE_TIMEOUT, end.read_record()).await {
            Ok(Ok(first)) => first,
            Ok(Err(ended)) => {
                if matches!(ended, End::Tampered) {
                    altered(core);
                }
                return Err(failed(&ended));
            }
            Err(_) => return Err(failed(&"the initiator says nothing")),
        };
        core.remember(&user.peer, None);
        match self.enter(core, user, key, request.tunnel_no) {
            Some(channel) => {
                // Lives exactly as long as the tunnel, which every way of stopping the agent closes.
                let carrying = core.clone();
                tokio::spawn(async move {
                    let ended = channel.run(end, Some(first)).await;
                    tracing::debug!(peer = %initiator.short(), %ended, "tunnel ended");
                    if matches!(ended, End::Tampered) {
                        carrying.note_altered(initiator, service.service_id, &service.name);
                    }
                });
                // What was learned since it was judged was not held against it yet.
                self.judge_again(&core.identity());
            }
            None => end.refuse(CloseCode::Stale).await,
        }
        Ok(())
    }

    /// Ends the channels of guests whose share is over: that comes with time, and the trust log says nothing
    /// of it.
    pub(crate) fn end_expired(&self, identity: &Identity) {
        let now = clock::now();
        self.end_refused(identity, |user| {
            let share = user.peer.presented().credential.as_ref();
            user.share_id != CredentialId::NONE
                && share.is_some_and(|share| share.object().certs_end < now)
        });
    }

    /// Ends the channels of those peers that are not trusted, or not allowed, any more.
    pub(crate) fn judge_again(&self, identity: &Identity) {
        self.end_refused(identity, |_| true);
    }

    fn end_refused(&self, identity: &Identity, judged: impl Fn(&User) -> bool) {
        for channel in self.channels().values().filter(|channel| judged(&channel.user)) {
            if let Err(refusal) = channel.user.judge(identity) {
                if *channel.handle.status().borrow() != Status::Closed {
                    tracing::warn!(
                        event = "peer_ended",
                        code = refusal.event,
                        peer = %channel.user.peer.agent_id().short(),
                        why = refusal.why,
                        "a channel was closed"
                    );
                }
                channel.handle.close(CloseCode::Forbidden);
            }
        }
    }

    /// Takes over what a peer showed in a rekey: from here on it is judged by that.
    fn renew(&self, key: &ChannelKey, tunnel_no: u32, user: User, identity: &Identity) {
        if let Some(channel) = self.channels().get_mut(key)
            && channel.tunnel_no == tunnel_no
        {
            // What was learned since it was judged was not held against it yet.
            if user.judge(identity).is_err() {
                channel.handle.close(CloseCode::Forbidden);
            }
            channel.user = user;
        }
    }

    /// The channel that a tunnel is for, begun if it is new; `None` for a tunnel that comes too late.
    fn enter(
        &self,
        core: &Arc<Core>,
        user: User,
        key: ChannelKey,
        tunnel_no: u32,
    ) -> Option<ChannelHandle> {
        let mut channels = self.channels();
        if let Some(channel) = channels.get_mut(&key) {
            if tunnel_no <= channel.tunnel_no {
                return None;
            }
            channel.tunnel_no = tunnel_no;
            channel.user = user;
            return Some(channel.handle.clone());
        }
        make_room(&channels, key.peer);
        let (handle, streams) = ChannelHandle::exposer();
        let service = user.service.clone();
        let channel = LiveChannel { handle: handle.clone(), tunnel_no, user };
        channels.insert(key, channel);
        // Lives exactly as long as the channel.
        tokio::spawn({
            let (core, handle) = (core.clone(), handle.clone());
            async move {
                tokio::join!(
                    serve_streams(&handle, &service, streams, &core.exposer.health_changed),
                    handle.expire_after(PARKED_AT_EXPOSER),
                );
                core.exposer.channels().remove(&key);
            }
        });
        Some(handle)
    }
}

/// Ends the channel of a peer that has waited longest for a tunnel, when too many wait.
fn make_room(channels: &BTreeMap<ChannelKey, LiveChannel>, peer: AgentId) {
    let parked: Vec<_> = channels
        .iter()
        .filter(|(key, _)| key.peer == peer)
        .map(|(_, channel)| &channel.handle)
        .filter(|handle| *handle.status().borrow() == Status::Detached)
        .collect();
    if parked.len() >= MAX_PARKED_PER_PEER
        && let Some(oldest) = parked.into_iter().min_by_key(|handle| handle.heard())
    {
        oldest.close(CloseCode::Busy);
    }
}

/// A place among the half-open handshakes, given back when the handshake ends or is given up.
struct HalfOpen<'e> {
    exposer: &'e Exposer,
    peer: AgentId,
}

impl Drop for HalfOpen<'_> {
    fn drop(&mut self) {
        self.exposer.door().leave(self.peer);
    }
}

/// Whether a share names a service.
pub(crate) fn names_service(share: &Credential, service: ServiceId) -> bool {
    share.services.as_ref().is_some_and(|services| services.contains(&service))
}

/// What takes the place of an epoch between this agent and a guest.
fn guest_epoch(identity: &Identity, share_id: CredentialId) -> Option<Epoch> {
    (share_id != CredentialId::NONE).then(|| identity.share_epoch(&share_id))
}

/// Step 8 of "Verifying a peer": may this peer use this service?
fn authorise(
    service: &Exposed,
    peer: &VerifiedPeer,
    tags: &[String],
    share_id: CredentialId,
) -> Result<(), Refusal> {
    let role = peer.certificate().role;
    if !role.may_reach() {
        return Err(Refusal::new(ErrorCode::Forbidden, "the peer's role may not reach"));
    }
    if role == AgentRole::Guest {
        // The secrets under which it speaks must be those of the very share that admits it.
        if peer.credential_id() != Some(share_id) {
            return Err(Refusal::new(ErrorCode::Refused, "the peer is a guest of another share"));
        }
        if !peer.services().unwrap_or_default().contains(&service.service_id) {
            return Err(Refusal::new(
                ErrorCode::Forbidden,
                format_args!("the peer's share does not name `{}`", service.name),
            ));
        }
    } else if share_id != CredentialId::NONE {
        return Err(Refusal::new(ErrorCode::Refused, "the peer is no guest"));
    }
    if !service.allows(peer.agent_id(), tags) {
        return Err(Refusal::new(
            ErrorCode::Forbidden,
            format_args!("`{}` is not allowed to this peer", service.name),
        ));
    }
    Ok(())
}

/// Serves each stream that arrives; ends when the channel does.
async fn serve_streams(
    channel: &ChannelHandle,
    service: &Arc<Exposed>,
    mut streams: mpsc::UnboundedReceiver<(StreamId, Purpose)>,
    health_changed: &Arc<Notify>,
) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            next = streams.recv() => {
                let Some((id, purpose)) = next else {
                    // The channel is over; connections see it and end by themselves.
                    while connections.join_next().await.is_some() {}
                    return;
                };
                let (stream, service) = (channel.incoming_stream(id), service.clone());
                let changed = health_changed.clone();
                connections.spawn(async move {
                    match purpose {
                        Purpose::Target => serve_stream(stream, service, &changed).await,
                        Purpose::Check | Purpose::Sink | Purpose::Source | Purpose::Other(_) => {
                            check::serve(stream, purpose, &service.target).await;
                        }
                    }
                });
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn serve_stream(stream: Stream, service: Arc<Exposed>, health_changed: &Notify) {
    let dialled = service.dial().await;
    if service.health.note(dialled.is_ok()) {
        health_changed.notify_one();
    }
    match dialled {
        Ok(tcp) => {
            stream.opened();
            splice(tcp, &stream).await;
        }
        Err(code) => {
            tracing::warn!(service = %service.name, ?code, "the target did not answer");
            stream.reset(code);
        }
    }
}

/// What both sides of a tunnel agree on before the first byte, as the request names it.
pub(crate) fn prologue(
    identity: &Identity,
    initiator: AgentId,
    request: &TunnelRequest,
) -> Prologue {
    Prologue {
        workspace_id: identity.workspace_id(),
        tunnel_id: request.tunnel_id,
        service_id: request.service_id,
        initiator,
        responder: request.responder,
        share_id: request.share_id,
        channel_id: request.channel_id,
        tunnel_no: request.tunnel_no,
        rekey: 0,
        previous_hash: [0; 32],
        realm: if request.share_id == CredentialId::NONE { Realm::Member } else { Realm::Share },
        encoding: request.encoding,
    }
}

/// Reads message 1 with the static key that it was made for: the current one, or the one before.
fn receive<'i>(
    identity: &'i Identity,
    prologue: &Prologue,
    message1: &[u8],
) -> Result<(&'i NoiseIdentity, Received), HandshakeError> {
    let mut refused = HandshakeError::Decrypt;
    for noise in identity.answering(clock::now()) {
        match handshake::receive(&noise.static_keypair, prologue, message1) {
            Ok(received) => return Ok((noise, received)),
            Err(error) => refused = error,
        }
        if refused != HandshakeError::Decrypt {
            break;
        }
    }
    Err(refused)
}

/// The exposer's half of the handshakes that replace the keys of a tunnel: whoever asks for a new key is
/// judged as if it asked for a tunnel, by what is known then. The hub has no part in it.
fn answer_rekey(
    core: Arc<Core>,
    key: ChannelKey,
    service: Arc<Exposed>,
    first: Prologue,
) -> Answer<Transport> {
    let tunnel_no = first.tunnel_no;
    Box::new(move |place, message1| {
        let identity = core.identity();
        let prologue = place.prologue(&first);
        let (noise, received) = receive(&identity, &prologue, message1)?;
        let payload = received.payload();
        let presented = payload.presented.clone();
        let peer = identity
            .trust
            .verify_peer(key.peer, presented, clock::now())
            .map_err(|error| refused_rekey(key.peer, error.into()))?;
        let tags = payload.attrs.tags.clone();
        core.check_noise_key(&peer)
            .map_err(|error| Refusal::new(ErrorCode::Refused, error))
            .and_then(|()| authorise(&service, &peer, &tags, key.share_id))
            .map_err(|refusal| refused_rekey(key.peer, refusal))?;
        let share = guest_epoch(&identity, key.share_id);
        let realm = &share.as_ref().unwrap_or(identity.epochs.current()).secrets.realm;
        let (keys, message2) =
            received.answer(&peer, &local(&identity, noise, realm), &mut random::rng())?;
        let user = User { peer, tags, service: service.clone(), share_id: key.share_id };
        let confirmed = Box::new({
            let core = core.clone();
            move || {
                core.remember(&user.peer, None);
                core.exposer.renew(&key, tunnel_no, user, &core.identity());
            }
        });
        Ok(Answered { keys, message2, confirmed })
    })
}

fn refused_rekey(peer: AgentId, refusal: Refusal) -> Failed {
    tracing::warn!(
        event = "peer_ended",
        code = refusal.event,
        peer = %peer.short(),
        why = refusal.why,
        "a tunnel gets no new keys"
    );
    refusal.into()
}

/// This agent's own side of a handshake that uses the static key of `noise`.
pub(crate) fn local<'i>(
    identity: &'i Identity,
    noise: &'i NoiseIdentity,
    realm_secret: &'i RealmSecret,
) -> handshake::Local<'i> {
    handshake::Local {
        static_keypair: &noise.static_keypair,
        presented: &noise.presented,
        attrs: &identity.attrs,
        head: identity.trust.head(),
        realm_secret,
    }
}

/// Limits of what strangers can make this agent compute and remember.
#[derive(Debug, Default)]
struct Door {
    half_open: BTreeMap<AgentId, usize>,
    /// Tunnel ids that were answered once; asked for only by id, so their order never shows.
    seen: HashSet<TunnelId>,
    seen_order: VecDeque<TunnelId>,
    second: Option<Instant>,
    this_second: u32,
}

impl Door {
    fn enter(&mut self, peer: AgentId, tunnel: TunnelId, now: Instant) -> Result<(), Refusal> {
        let busy = |why| Err(Refusal::new(ErrorCode::Busy, why));
        if self.second.is_none_or(|second| now.duration_since(second) >= Duration::from_secs(1)) {
            (self.second, self.this_second) = (Some(now), 0);
        }
        self.this_second += 1;
        if self.this_second > MAX_FIRST_MESSAGES_PER_SEC {
            return busy("too many handshakes in a second");
        }
        if self.half_open.values().sum::<usize>() >= MAX_HALF_OPEN {
            return busy("too many handshakes at once");
        }
        if self.half_open.get(&peer).is_some_and(|open| *open >= MAX_HALF_OPEN_PER_PEER) {
            return busy("too many handshakes of one peer at once");
        }
        if !self.seen.insert(tunnel) {
            return Err(Refusal::new(ErrorCode::Refused, "a repeated tunnel id"));
        }
        self.seen_order.push_back(tunnel);
        if self.seen_order.len() > REMEMBERED_TUNNELS
            && let Some(oldest) = self.seen_order.pop_front()
        {
            self.seen.remove(&oldest);
        }
        *self.half_open.entry(peer).or_default() += 1;
        Ok(())
    }

    fn leave(&mut self, peer: AgentId) {
        if let Some(open) = self.half_open.get_mut(&peer) {
            *open -= 1;
            if *open == 0 {
                self.half_open.remove(&peer);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use connect_spec::objects::CredentialKind;

    use super::*;
    use crate::common::{self, World};

    fn tunnel(number: u32) -> TunnelId {
        let mut id = [0; 16];
        id[..4].copy_from_slice(&number.to_be_bytes());
        TunnelId(id)
    }

    const PEER: AgentId = AgentId([1; 16]);

    #[track_caller]
    fn refused(result: Result<(), Refusal>, expected: ErrorCode) {
        assert_eq!(result.err().map(|refusal| refusal.code), Some(expected));
    }

    #[test]
    fn guests_use_what_their_share_names_and_under_its_secrets_alone() {
        let world = World::new();
        let [named, other] = ["named", "other"].map(|name| {
            let id = ServiceId(common::bytes(name));
            let target = "localhost:1".parse().expect("a target");
            Exposed::new(name.parse().expect("a name"), id, target, BTreeSet::new())
        });
        let mut share = world.admission("share", CredentialKind::Share);
        let credential = Credential {
            services: Some(vec![named.service_id]),
            ..share.credential.object().clone()
        };
        share.credential = world.signer.sign(&credential);
        let verified = |agent: &common::Agent| {
            let state = world.trust.clone();
            state.verify_peer(agent.id(), agent.presented.clone(), common::NOW).expect("trusted")
        };
        let (guest, member) = (world.joined("guest", &share), world.member("member"));
        let (guest, member) = (verified(&guest), verified(&member));
        let check = |service: &Exposed, peer: &VerifiedPeer, share_id, expected| {
            let refused = authorise(service, peer, &[], share_id).err().map(|refusal| refusal.code);
            assert_eq!(refused, expected);
        };
        let (id, none) = (credential.id(), CredentialId::NONE);
        check(&named, &guest, id, None);
        check(&other, &guest, id, Some(ErrorCode::Forbidden));
        check(&named, &guest, none, Some(ErrorCode::Refused));
        check(&named, &guest, CredentialId(common::bytes("x")), Some(ErrorCode::Refused));
        check(&named, &member, none, None);
        check(&named, &member, id, Some(ErrorCode::Refused));
    }

    #[test]
    fn whose_role_is_to_expose_reaches_nothing() {
        let world = World::new();
        let id = ServiceId(common::bytes("service"));
        let target = "localhost:1".parse().expect("a target");
        let service = Exposed::new("svc".parse().expect("a name"), id, target, BTreeSet::new());
        for (role, expected) in [
            (AgentRole::Member, None),
            (AgentRole::Reacher, None),
            (AgentRole::Exposer, Some(ErrorCode::Forbidden)),
        ] {
            let agent = world.member_as("agent", role);
            let state = world.trust.clone();
            let peer = state.verify_peer(agent.id(), agent.presented.clone(), common::NOW);
            let judged = authorise(&service, &peer.expect("trusted"), &[], CredentialId::NONE);
            assert_eq!(judged.err().map(|refusal| refusal.code), expected, "{role:?}");
        }
    }

    #[test]
    fn repeated_tunnel_ids_are_refused_for_as_long_as_they_are_remembered() {
        let mut door = Door::default();
        let mut now = Instant::now();
        let mut pass = |door: &mut Door, id| {
            now += Duration::from_secs(1);
            let entered = door.enter(PEER, id, now);
            if entered.is_ok() {
                door.leave(PEER);
            }
            entered
        };
        assert!(pass(&mut door, tunnel(0)).is_ok());
        refused(pass(&mut door, tunnel(0)), ErrorCode::Refused);
        let remembered = u32::try_from(REMEMBERED_TUNNELS).expect("small");
        for number in 1..remembered {
            assert!(pass(&mut door, tunnel(number)).is_ok());
        }
        refused(pass(&mut door, tunnel(0)), ErrorCode::Refused);
        assert!(pass(&mut door, tunnel(remembered)).is_ok());
        assert!(pass(&mut door, tunnel(0)).is_ok());
        assert_eq!(door.seen.len(), REMEMBERED_TUNNELS);
    }

    #[test]
    fn handshakes_are_bounded_per_peer_in_all_and_in_time() {
        let mut door = Door::default();
        let now = Instant::now();
        let mut number = 0;
        let mut enter = |door: &mut Door, peer: u8, now| {
            number += 1;
            door.enter(AgentId([peer; 16]), tunnel(number), now)
        };
        for _ in 0..MAX_HALF_OPEN_PER_PEER {
            assert!(enter(&mut door, 0, now).is_ok());
        }
        refused(enter(&mut door, 0, now), ErrorCode::Busy);
        door.leave(AgentId([0; 16]));
        assert!(enter(&mut door, 0, now).is_ok());

        for peer in 1..32 {
            let now = now + Duration::from_secs(peer.into());
            for _ in 0..MAX_HALF_OPEN_PER_PEER {
                assert!(enter(&mut door, peer, now).is_ok());
            }
        }
        refused(enter(&mut door, 99, now + Duration::from_secs(60)), ErrorCode::Busy);

        let mut door = Door::default();
        for _ in 0..MAX_FIRST_MESSAGES_PER_SEC {
            assert!(enter(&mut door, 7, now).is_ok());
            door.leave(AgentId([7; 16]));
        }
        refused(enter(&mut door, 7, now), ErrorCode::Busy);
        assert!(enter(&mut door, 7, now + Duration::from_secs(1)).is_ok());
    }
}
