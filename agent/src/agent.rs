//! A running agent: its link to the hub, the services that it exposes and those that it reaches.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use connect_crypto::names::service_id;
use connect_spec::{
    control::{Request, SessionKind},
    encoding::Encoding,
    ids::{AgentId, CredentialId, ServiceId, ServiceName},
    keys::StaticPublicKey,
    objects::{CredentialKind, UnixTime},
    signed::Signed,
    trust::VerifiedPeer,
};
use tokio::{
    sync::{Notify, mpsc, watch},
    task::{AbortHandle, JoinSet},
    time::MissedTickBehavior,
};

use crate::{
    clock,
    directory::{Directory, FoundService},
    engine::{
        backoff::Backoff,
        freshness::Freshness,
        rekey::RekeyAfter,
        surroundings::{Look, Surroundings},
        tampering::Tampering,
    },
    error::{Error, ErrorKind, Result},
    exposer::{Exposed, Exposer, names_service},
    health,
    home::{Home, HomeLock, Peers, SeenNoiseKey, State},
    identity::Identity,
    io::{
        dial::HubUrl,
        hub::{Ended, Greeted, Incoming, Session},
        tunnel::ChannelHandle,
    },
    keeper, random,
    reacher::Reached,
    workspace::Workspace,
};

/// Between looks at the age of the keys. The clock may be set meanwhile, so it is looked at often.
const LOOK_AT_KEYS: Duration = Duration::from_secs(600);
/// A rotation is reported without the hub's word when that takes longer.
const ANNOUNCE_TIMEOUT: Duration = Duration::from_secs(10);
/// Between looks at clocks and network: of what a sleep or a move costs, the part that is ours.
const LOOK_AROUND: Duration = Duration::from_secs(1);
/// How long [`Agent::stop`] waits for last words.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);

/// How an agent runs.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// How records travel in the tunnels that this agent opens.
    pub encoding: Encoding,
    /// A static key of this age is rotated.
    pub rotate_after: Duration,
    /// The keys of a tunnel are replaced after so much use.
    pub rekey_after: RekeyAfter,
    /// The target of each exposed service is looked at so often.
    pub health_every: Duration,
}

impl Options {
    /// The age at which a static key is rotated, unless another one is asked for.
    pub const ROTATE_AFTER: Duration = Duration::from_secs(30 * 24 * 3600);
    /// How often targets are looked at: the list of services is right within about half a minute.
    pub const HEALTH_EVERY: Duration = Duration::from_secs(30);
}

impl Default for Options {
    fn default() -> Self {
        Self {
            encoding: Encoding::default(),
            rotate_after: Self::ROTATE_AFTER,
            rekey_after: RekeyAfter::default(),
            health_every: Self::HEALTH_EVERY,
        }
    }
}

/// A running agent. Clones share it; it stops when [`Agent::stop`] is called or the last one is dropped.
#[derive(Debug, Clone)]
pub struct Agent {
    core: Arc<Core>,
    _running: Arc<Running>,
}

/// Stops the agent when its last clone is dropped.
#[derive(Debug)]
struct Running {
    core: Arc<Core>,
    _supervisor: AbortOnDrop,
    _key_keeper: AbortOnDrop,
    _judge: AbortOnDrop,
    _watch: AbortOnDrop,
    _health: AbortOnDrop,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.core.stop();
    }
}

/// Aborts a task when dropped, so that no task outlives what it works for.
#[derive(Debug)]
pub(crate) struct AbortOnDrop(pub(crate) AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What became of a rotation.
#[derive(Debug, Clone, Copy, serde::Serialize, serde::Deserialize)]
pub struct Rotated {
    /// Counter of the new key.
    pub counter: u64,
    /// Whether hub and records show it; if not yet, they will after the next login.
    pub announced: bool,
}

/// What all parts of the agent share.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) home: Home,
    pub(crate) workspace: Arc<Workspace>,
    /// What the beats of others say.
    fresh: Mutex<Freshness>,
    /// Counter of the NoiseKey that the hub and every published record show.
    announced: watch::Sender<u64>,
    pub(crate) hub: HubUrl,
    pub(crate) options: Options,
    pub(crate) exposer: Exposer,
    reached: Mutex<BTreeMap<ServiceName, Reached>>,
    link: watch::Sender<Link>,
    state: Mutex<State>,
    peers: Mutex<Peers>,
    tampering: Mutex<Tampering>,
    _lock: HomeLock,
}

/// The agent's session with the hub, as it comes and goes.
#[derive(Debug, Clone)]
pub(crate) enum Link {
    /// No session; the last error says why, if there was a try.
    Down(Option<Error>),
    /// Logged in, and everything published.
    Up(Arc<Session>),
    /// Another process runs as this agent; this one stays away.
    Displaced,
}

impl Agent {
    /// Starts the agent of a home. It connects in the background, and for ever again.
    ///
    /// # Errors
    /// [`ErrorKind::NotEnrolled`], or what is wrong with the home.
    pub fn start(home: Home, lock: HomeLock, options: Options) -> Result<Self> {
        let workspace = Workspace::open(&home)?;
        let identity = workspace.identity();
        let core = Arc::new(Core {
            hub: HubUrl::parse(&identity.hub, identity.hub_ca.as_ref())?,
            options,
            exposer: Exposer::default(),
            reached: Mutex::default(),
            link: watch::Sender::new(Link::Down(None)),
            state: Mutex::new(home.load_state()?),
            peers: Mutex::new(home.load_peers()?),
            workspace,
            tampering: Mutex::default(),
            fresh: Mutex::new(Freshness::new(Instant::now())),
            announced: watch::Sender::new(0),
            home,
            _lock: lock,
        });
        let supervisor = AbortOnDrop(tokio::spawn(supervise(core.clone())).abort_handle());
        let key_keeper = AbortOnDrop(tokio::spawn(keep_keys_fresh(core.clone())).abort_handle());
        let judge = AbortOnDrop(tokio::spawn(judge_again(core.clone())).abort_handle());
        let watch = AbortOnDrop(tokio::spawn(look_around(core.clone())).abort_handle());
        let health = health::watch(
            core.clone(),
            core.options.health_every,
            core.exposer.health_changed.clone(),
        );
        let health = AbortOnDrop(tokio::spawn(health).abort_handle());
        let running = Running {
            core: core.clone(),
            _supervisor: supervisor,
            _key_keeper: key_keeper,
            _judge: judge,
            _watch: watch,
            _health: health,
        };
        Ok(Self { core, _running: Arc::new(running) })
    }

    pub(crate) fn core(&self) -> &Core {
        &self.core
    }

    pub(crate) fn shared_core(&self) -> Arc<Core> {
        self.core.clone()
    }

    /// A service that is reached already.
    pub(crate) fn reached(&self, name: &ServiceName) -> Option<Reached> {
        self.core.reached().get(name).cloned()
    }

    /// The agent's id.
    #[must_use]
    pub fn agent_id(&self) -> AgentId {
        self.core.identity().agent_id
    }

    /// Waits until the agent is connected to its hub.
    ///
    /// # Errors
    /// Why it is not, once a try to connect has failed; the agent goes on trying.
    pub async fn connected(&self) -> Result<()> {
        self.core.session().await.map(|_| ())
    }

    /// Waits until another process displaced this agent at the hub.
    pub async fn displaced(&self) {
        let mut link = self.core.link.subscribe();
        // The sender lives as long as the agent.
        let _ = link.wait_for(|link| matches!(link, Link::Displaced)).await;
    }

    /// Whether the agent is connected to its hub now.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        matches!(*self.core.link.borrow(), Link::Up(_))
    }

    /// Why it is not, if a try has failed.
    pub(crate) fn not_connected(&self) -> Option<Error> {
        match &*self.core.link.borrow() {
            Link::Up(_) => None,
            Link::Down(error) => error.clone(),
            Link::Displaced => Some(displaced()),
        }
    }

    /// Exposes a service and waits until the hub knows it. `take_over` takes the name from another agent
    /// that is offline.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] when the name is taken; why the hub cannot be reached.
    pub async fn expose(&self, service: Exposed, take_over: bool) -> Result<()> {
        let session = self.core.session().await?;
        let directory = Directory::new(self.core.workspace.clone(), session);
        match directory.find(&service.name).await {
            Ok(other) if other.record.agent_id != self.agent_id() && other.online => {
                return Err(Error::new(
                    ErrorKind::Refused,
                    format_args!(
                        "`{}` is already exposed by agent {}",
                        service.name,
                        other.record.agent_id.short()
                    ),
                )
                .hint("choose another `--name`, or run `connect unexpose` there"));
            }
            Ok(_) => {}
            Err(error) if error.kind == ErrorKind::ServiceNotFound => {}
            Err(error) => return Err(error),
        }
        let service = Arc::new(service);
        self.core.exposer.add(service.clone());
        let published = self.core.publish(directory.session(), &service, take_over).await;
        if published.is_err() {
            self.core.exposer.remove(&service.name);
        }
        published
    }

    /// Withdraws a service; channels to it are closed. A hub that is away hears of it later.
    ///
    /// # Errors
    /// [`ErrorKind::ServiceNotFound`] when this agent does not expose it; why the hub does not know yet.
    pub async fn unexpose(&self, name: &ServiceName) -> Result<()> {
        let service = self.core.exposer.remove(name).ok_or_else(|| {
            Error::new(
                ErrorKind::ServiceNotFound,
                format_args!("this agent exposes no service called `{name}`"),
            )
            .hint("`connect status` lists what it exposes")
        })?;
        self.core.note_withdrawn(service.service_id)?;
        let session = self.core.session().await?;
        self.core.withdraw(&session).await
    }

    /// Reaches a service: keeps a tunnel to it, whatever happens to hub and peer.
    ///
    /// The tunnel is opened in the background; [`Reached::ready`] waits for it.
    #[must_use]
    pub fn reach(&self, name: &ServiceName) -> Reached {
        let mut reached = self.core.reached();
        if let Some(known) = reached.get(name) {
            return known.clone();
        }
        let started = Reached::start(self.core.clone(), name.clone());
        reached.insert(name.clone(), started.clone());
        started
    }

    /// Lets go of a service; its streams are reset.
    pub fn unreach(&self, name: &ServiceName) {
        if let Some(reached) = self.core.reached().remove(name) {
            reached.stop();
        }
    }

    /// The id under which this agent offers the service of a name.
    pub(crate) fn service_id(&self, name: &ServiceName) -> ServiceId {
        service_id(&self.core.identity().signing, name)
    }

    /// Looks a service up: whether its exposer is online, and the port of its target.
    ///
    /// # Errors
    /// [`ErrorKind::ServiceNotFound`], [`ErrorKind::TrustViolation`], or why there is no hub.
    pub(crate) async fn find(&self, name: &ServiceName) -> Result<FoundService> {
        Directory::new(self.core.workspace.clone(), self.core.session().await?).find(name).await
    }

    /// Makes a new static key, and waits a little until the hub and the records show it.
    ///
    /// Tunnels live on. The old key answers for one more day, unless it is rotated again.
    ///
    /// # Errors
    /// The home cannot be written; nothing changed then.
    pub async fn rotate(&self) -> Result<Rotated> {
        let counter = self.core.rotate()?;
        let mut announced = self.core.announced.subscribe();
        let told = announced.wait_for(|announced| *announced >= counter);
        let mut link = self.core.link.subscribe();
        let announced = tokio::select! {
            told = tokio::time::timeout(ANNOUNCE_TIMEOUT, told) => matches!(told, Ok(Ok(_))),
            _ = link.wait_for(|link| matches!(link, Link::Down(Some(_)) | Link::Displaced)) => false,
        };
        Ok(Rotated { counter, announced })
    }

    /// Stops the agent: every tunnel is closed with a word to its peer, for up to two seconds.
    pub async fn stop(&self) {
        let closing = self.core.stop();
        let closed = futures_util::future::join_all(closing.iter().map(ChannelHandle::closed));
        // A hub that does not take the last words must not hold up the end.
        let _ = tokio::time::timeout(STOP_TIMEOUT, closed).await;
    }
}

impl Core {
    /// Closes every channel; returns those whose last words are still to be sent.
    fn stop(&self) -> Vec<ChannelHandle> {
        let reached = std::mem::take(&mut *self.reached());
        let mut closing: Vec<_> =
            reached.into_values().filter_map(|reached| reached.stop()).collect();
        closing.extend(self.exposer.stop());
        closing
    }

    /// What the agent knows of itself at this moment. An operation takes it once.
    pub(crate) fn identity(&self) -> Arc<Identity> {
        self.workspace.identity()
    }

    pub(crate) fn fresh(&self) -> MutexGuard<'_, Freshness> {
        self.fresh.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How old the newest word of a witness is, that of `peer` aside.
    pub(crate) fn beat_age(&self, peer: Option<AgentId>) -> Option<Duration> {
        self.fresh().age(Instant::now(), peer.as_ref())
    }

    /// Makes a new static key; returns its counter. The supervisor tells the hub.
    fn rotate(&self) -> Result<u64> {
        let identity = self.workspace.change_identity(|identity| {
            let rotated = identity.rotated(clock::now());
            self.home.save_noise(&rotated)?;
            Ok(rotated)
        })?;
        let counter = identity.noise.counter();
        tracing::info!(counter, "made a new static key");
        Ok(counter)
    }

    /// Does what the age of the static keys asks for.
    fn look_at_keys(&self, now: UnixTime) -> Result<()> {
        let identity = self.identity();
        let age = now.saturating_sub(identity.noise.made);
        if age >= self.options.rotate_after.as_secs() {
            self.rotate()?;
        } else if identity.retired_noise.as_ref().is_some_and(|retired| retired.until <= now) {
            self.workspace.change_identity(|identity| {
                let changed = Identity { retired_noise: None, ..identity.clone() };
                self.home.save_noise(&changed)?;
                Ok(changed)
            })?;
        }
        Ok(())
    }

    /// What the agent knows of itself, as it changes.
    pub(crate) fn identity_changes(&self) -> watch::Receiver<Arc<Identity>> {
        self.workspace.changes()
    }

    /// The session, once there is one.
    ///
    /// # Errors
    /// Why there is none, as soon as a try has failed.
    pub(crate) async fn session(&self) -> Result<Arc<Session>> {
        let mut link = self.link.subscribe();
        let settled = link
            .wait_for(|link| !matches!(link, Link::Down(None)))
            .await
            .map_err(|_| Error::new(ErrorKind::Other, "the agent is stopping"))?;
        match &*settled {
            Link::Up(session) => Ok(session.clone()),
            Link::Down(error) => Err(error
                .clone()
                .unwrap_or_else(|| Error::new(ErrorKind::HubUnreachable, "not connected"))),
            Link::Displaced => Err(displaced()),
        }
    }

    /// The session as it comes and goes.
    pub(crate) fn link(&self) -> watch::Receiver<Link> {
        self.link.subscribe()
    }

    fn reached(&self) -> MutexGuard<'_, BTreeMap<ServiceName, Reached>> {
        self.reached.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The counter of the next sealed record: above every one before, even when an older copy of the
    /// home was restored in between.
    fn next_counter(&self) -> Result<u32> {
        let mut state = self.state();
        let by_clock = u32::try_from(clock::now()).unwrap_or(u32::MAX);
        state.record_counter = by_clock.max(state.record_counter.saturating_add(1));
        self.home.save_state(&state)?;
        Ok(state.record_counter)
    }

    /// Remembers that the hub must be told, whatever happens to this process before.
    pub(crate) fn note_withdrawn(&self, service: ServiceId) -> Result<()> {
        let mut state = self.state();
        if !state.withdrawn.contains(&service) {
            state.withdrawn.push(service);
            self.home.save_state(&state)?;
        }
        Ok(())
    }

    /// Tells the hub of every service that is withdrawn and not exposed again.
    async fn withdraw(&self, session: &Session) -> Result<()> {
        let exposed: Vec<_> = self.exposer.all().iter().map(|service| service.service_id).collect();
        let withdrawn = self.state().withdrawn.clone();
        for service_id in withdrawn.into_iter().filter(|service| !exposed.contains(service)) {
            match session.request(Request::Unexpose { service_id }).await {
                // The hub never knew of it, or does not any more.
                Err(error) if error.kind != ErrorKind::ServiceNotFound => return Err(error),
                Ok(_) | Err(_) => {}
            }
            let mut state = self.state();
            state.withdrawn.retain(|told| *told != service_id);
            self.home.save_state(&state)?;
        }
        Ok(())
    }

    async fn publish(&self, session: &Session, service: &Exposed, take_over: bool) -> Result<()> {
        // A session that comes and goes is no reason to knock at every target each time.
        let target_ok = if service.health.is_due(self.options.health_every) {
            service.health.look(&service.target).await
        } else {
            service.health.is_ok()
        };
        self.publish_as(session, service, target_ok, take_over).await
    }

    /// Puts right what the hub says of a service that changed while it was published.
    pub(crate) async fn publish_or_withdraw(&self, session: &Session, service_id: ServiceId) {
        let exposed =
            self.exposer.all().into_iter().find(|service| service.service_id == service_id);
        let done = match exposed {
            Some(service) => self.publish(session, &service, false).await,
            None => session.request(Request::Unexpose { service_id }).await.map(|_| ()),
        };
        if let Err(error) = done {
            tracing::debug!(%error, "the next login tells the hub");
        }
    }

    /// Publishes the agent's own record and those of its services.
    pub(crate) async fn publish_all(&self, session: &Arc<Session>) -> Result<()> {
        let counter = self.next_counter()?;
        let directory = Directory::new(self.workspace.clone(), session.clone());
        directory.publish_agent(counter).await?;
        for service in self.exposer.all() {
            match self.publish(session, &service, false).await {
                // One service that is refused must not keep the others away.
                Err(error) if error.kind != ErrorKind::HubUnreachable => {
                    tracing::error!(service = %service.name, %error, "not exposed");
                }
                other => other?,
            }
        }
        Ok(())
    }

    pub(crate) async fn publish_as(
        &self,
        session: &Session,
        service: &Exposed,
        target_ok: bool,
        take_over: bool,
    ) -> Result<()> {
        let counter = self.next_counter()?;
        let identity = self.identity();
        let epoch = identity.epochs.current();
        let record = service
            .record(&identity, epoch, counter, target_ok)
            .map_err(|error| Error::new(ErrorKind::Other, error))?;
        let tag = epoch.names.tag(&service.name);
        let service_id = service.service_id;
        let expose = Request::Expose { service_id, tag, record, take_over };
        session.request(expose).await?;
        service.health.published(target_ok);
        for share_id in self.exposer.shares_of(service_id) {
            self.publish_to_share(session, service, share_id, target_ok).await?;
        }
        Ok(())
    }

    /// Lets the guests of a share find a service.
    async fn publish_to_share(
        &self,
        session: &Session,
        service: &Exposed,
        share_id: CredentialId,
        target_ok: bool,
    ) -> Result<()> {
        let counter = self.next_counter()?;
        let identity = self.identity();
        let epoch = identity.share_epoch(&share_id);
        let record = service
            .record(&identity, &epoch, counter, target_ok)
            .map_err(|error| Error::new(ErrorKind::Other, error))?;
        let tag = epoch.names.tag(&service.name);
        let service_id = service.service_id;
        let publish = Request::ExposeToShare { share_id, service_id, tag, record };
        match session.request(publish).await {
            // Closed since it was listed.
            Err(error) if error.kind == ErrorKind::ServiceNotFound => {
                tracing::debug!(share = %share_id, %error, "not shared");
                Ok(())
            }
            published => published.map(|_| ()),
        }
    }

    /// Learns which shares name services of this agent, and publishes those services to the new ones.
    ///
    /// # Errors
    /// As a request to the hub.
    pub(crate) async fn look_at_shares(&self, session: &Arc<Session>) -> Result<()> {
        if self.exposer.all().is_empty() {
            return Ok(());
        }
        let services = self.exposer.all();
        let directory = Directory::new(self.workspace.clone(), session.clone());
        let mut open = BTreeMap::new();
        for (share, _) in directory.shares().await? {
            let share = share.object();
            let mine = services.iter().any(|service| names_service(share, service.service_id));
            if mine && share.certs_end >= clock::now() {
                open.insert(share.id(), share.clone());
            }
        }
        let known: BTreeSet<_> = self.exposer.shares().keys().copied().collect();
        for (id, share) in open.iter().filter(|(id, _)| !known.contains(id)) {
            for service in &services {
                if names_service(share, service.service_id) {
                    self.publish_to_share(session, service, *id, service.target_ok()).await?;
                }
            }
        }
        *self.exposer.shares() = open;
        Ok(())
    }

    /// Compares a peer's static key with what was seen of it before (step 3 of "Verifying a peer").
    ///
    /// # Errors
    /// [`ErrorKind::TrustViolation`] when the counter went down, or names two keys.
    pub(crate) fn check_noise_key(&self, peer: &VerifiedPeer) -> Result<()> {
        let peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(seen) = peers.noise_keys.get(&peer.agent_id()) else {
            return Ok(());
        };
        let same = seen.static_key == peer.static_key();
        match peer.noise_key_counter().cmp(&seen.counter) {
            std::cmp::Ordering::Less => Err(Error::trust(format_args!(
                "agent {} shows an older static key than it did before",
                peer.agent_id().short()
            ))),
            std::cmp::Ordering::Equal if !same => {
                tracing::error!(
                    event = "clone",
                    agent = %peer.agent_id(),
                    counter = seen.counter,
                    "two machines use the identity of one agent: its home was copied; stop the copy, \
                     or let that agent join anew"
                );
                Err(Error::trust(format_args!(
                    "agent {} runs on two machines: one of them is a copy",
                    peer.agent_id().short()
                ))
                .hint("stop the copy; if you made none, somebody has the keys of that agent"))
            }
            std::cmp::Ordering::Equal | std::cmp::Ordering::Greater => Ok(()),
        }
    }

    /// Counts the guests of a share: the hub, which counts them too, could let more join.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] for one more than its signer said.
    pub(crate) fn admit_guest(&self, peer: &VerifiedPeer) -> Result<()> {
        let credential = peer.presented().credential.as_ref().map(Signed::object);
        let Some(share) = credential.filter(|share| share.kind == CredentialKind::Share) else {
            return Ok(());
        };
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        let guests = peers.guests.entry(share.id()).or_default();
        if guests.contains(&peer.agent_id()) {
            return Ok(());
        }
        if guests.len() >= usize::try_from(share.uses).unwrap_or(usize::MAX) {
            tracing::error!(
                event = "share_overused",
                share = %share.id(),
                uses = share.uses,
                "more guests come by a share than it is for: its code is in other hands, and the hub lets \
                 them join"
            );
            return Err(Error::new(
                ErrorKind::Refused,
                "the share has as many guests as it is for",
            ));
        }
        guests.insert(peer.agent_id());
        self.home.save_peers(&peers)
    }

    /// Whether a newer static key of a peer than the one that it shows was seen.
    pub(crate) fn has_newer_key_than(&self, peer: &VerifiedPeer) -> bool {
        let peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        let seen = peers.noise_keys.get(&peer.agent_id());
        seen.is_some_and(|seen| seen.counter > peer.noise_key_counter())
    }

    /// The newest static key that was seen of a peer, which may be newer than what it showed there.
    pub(crate) fn newest_static_key(&self, peer: &VerifiedPeer) -> StaticPublicKey {
        let peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        let seen = peers.noise_keys.get(&peer.agent_id());
        let newer = seen.filter(|seen| seen.counter > peer.noise_key_counter());
        newer.map_or_else(|| peer.static_key(), |seen| seen.static_key)
    }

    /// Remembers a peer whose keys a first record has confirmed.
    pub(crate) fn remember(&self, peer: &VerifiedPeer, name: Option<&ServiceName>) {
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        let seen =
            SeenNoiseKey { counter: peer.noise_key_counter(), static_key: peer.static_key() };
        let new_key = peers.noise_keys.insert(peer.agent_id(), seen) != Some(seen);
        let pinned = name
            .map(|name| peers.pins.insert(name.clone(), peer.agent_id()) != Some(peer.agent_id()));
        if (new_key || pinned == Some(true))
            && let Err(error) = self.home.save_peers(&peers)
        {
            tracing::warn!(%error, "what is known of peers was not saved");
        }
    }

    /// Counts a packet that did not open, and reports it when there are too many. Each ends its tunnel and
    /// never the channel, so connections go on when it stops.
    pub(crate) fn note_altered(&self, peer: AgentId, service: ServiceId, name: &ServiceName) {
        let mut tampering = self.tampering.lock().unwrap_or_else(PoisonError::into_inner);
        if tampering.note(peer, service, Instant::now()) {
            tracing::error!(
                event = "tampering",
                service = %name,
                peer = %peer.short(),
                "packets were altered on the way five times within a minute; nothing of them was \
                 delivered, but the hub or somebody on the way to it is changing what passes"
            );
        }
    }

    /// Forgets which agent a name stood for: whoever exposes it next is taken for the right one.
    pub(crate) fn unpin(&self, name: &ServiceName) {
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        if peers.pins.remove(name).is_some()
            && let Err(error) = self.home.save_peers(&peers)
        {
            tracing::warn!(%error, "what is known of peers was not saved");
        }
    }

    /// The agent that a name stood for when it was last reached.
    pub(crate) fn pinned(&self, name: &ServiceName) -> Option<AgentId> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner).pins.get(name).copied()
    }
}

/// Makes a new static key in a home whose agent does not run, and shows it to the hub.
///
/// # Errors
/// [`ErrorKind::NotEnrolled`], or what is wrong with the home; a hub that is away is no error.
pub async fn rotate(home: &Home, _lock: &HomeLock) -> Result<Rotated> {
    let workspace = Workspace::open(home)?;
    let rotated = workspace.change_identity(|identity| {
        let rotated = identity.rotated(clock::now());
        home.save_noise(&rotated)?;
        Ok(rotated)
    })?;
    let counter = rotated.noise.counter();
    match Directory::connect(workspace).await {
        Ok(_) => Ok(Rotated { counter, announced: true }),
        Err(error) if error.kind == ErrorKind::HubUnreachable => {
            Ok(Rotated { counter, announced: false })
        }
        Err(error) => Err(error),
    }
}

fn displaced() -> Error {
    Error::new(
        ErrorKind::Other,
        "another process connected as this agent, and the newest one counts",
    )
    .hint("is a copy of this home in use somewhere? one home is for one machine")
}

/// Keeps the agent connected, for ever.
async fn supervise(core: Arc<Core>) {
    let mut backoff = Backoff::default();
    let mut identities = core.identity_changes();
    let mut cuts = core.hub.sockets().cuts();
    // Whether this process had a session before, and whether the sockets of before are cut.
    let (mut returning, mut moved) = (false, false);
    loop {
        moved |= cuts.has_changed().unwrap_or(false);
        cuts.mark_unchanged();
        // A change from here on is seen when the session is served.
        let identity = identities.borrow_and_update().clone();
        let wait = match connect(&core, identity, moved).await {
            Ok((session, incoming)) => {
                moved = false;
                // After a break the hub may still know the session that was lost.
                if session.has_displaced() && !returning {
                    tracing::warn!(
                        "another process was connected as this agent; it was displaced by this one"
                    );
                }
                returning = true;
                backoff.reset();
                let identity = core.identity();
                if identity.share_id().is_some() {
                    tracing::info!(hub = %core.hub, share = identity.share_name(), "connected as a guest");
                } else {
                    tracing::info!(hub = %core.hub, "connected");
                }
                core.link.send_replace(Link::Up(session.clone()));
                let ended = serve(&core, &session, incoming, &mut identities).await;
                match ended {
                    Ended::Displaced => {
                        tracing::error!("{}", displaced());
                        core.link.send_replace(Link::Displaced);
                        return;
                    }
                    Ended::Restarting(wait) => {
                        tracing::info!("the hub restarts");
                        core.link.send_replace(Link::Down(None));
                        backoff.next_after(Some(wait), random::number())
                    }
                    Ended::Lost(cause) => {
                        tracing::warn!(%cause, "the connection to the hub was lost");
                        core.link.send_replace(Link::Down(None));
                        backoff.next(random::number())
                    }
                }
            }
            Err(error) => {
                tracing::warn!(%error, "not connected");
                let asked = error.retry_in;
                core.link.send_replace(Link::Down(Some(error)));
                backoff.next_after(asked, random::number())
            }
        };
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            // The sender lives as long as the core. Another network is another chance.
            _ = cuts.changed() => {
                backoff.reset();
                moved = true;
            }
        }
    }
}

/// Cuts the sockets to the hub when the machine slept or its network changed, so that everything comes
/// back at once and not when time-outs are over.
async fn look_around(core: Arc<Core>) {
    let mut surroundings = Surroundings::default();
    let mut looks = tokio::time::interval(LOOK_AROUND);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        looks.tick().await;
        let sockets = core.hub.sockets();
        let look =
            Look { monotonic: Instant::now(), wall: clock::since_1970(), way: sockets.way() };
        if let Some(change) = surroundings.look(look) {
            tracing::info!(%change, "connecting anew");
            sockets.cut();
        }
    }
}

/// Logs in and publishes what this agent exposes.
async fn connect(
    core: &Arc<Core>,
    identity: Arc<Identity>,
    moved: bool,
) -> Result<(Arc<Session>, mpsc::Receiver<Incoming>)> {
    let greeted = Greeted::dial(&core.hub).await?.after_move(moved);
    let shown = identity.noise.counter();
    let (session, incoming) = greeted.login(&core.workspace, SessionKind::Agent, None).await?;
    let session = Arc::new(session);
    // What is published next must be under the newest epoch, and not by a log that is behind.
    match core.workspace.sync(&session).await {
        Err(error) if error.kind == ErrorKind::TrustViolation => {
            tracing::error!(event = "hub_log", %error, "the hub's word does not hold; it is not heeded");
        }
        other => other?,
    }
    core.workspace.fetch_epoch(&session).await?;
    core.withdraw(&session).await?;
    core.publish_all(&session).await?;
    core.announced.send_replace(shown);
    Ok((session, incoming))
}

/// Shows the hub a static key that was made during a session, then everybody else.
///
/// A short session beside the running one proves it, so that no request for a tunnel is missed.
async fn announce(core: &Arc<Core>, session: &Arc<Session>, identity: Arc<Identity>) -> Result<()> {
    let shown = identity.noise.counter();
    Directory::connect(core.workspace.clone()).await?;
    for service in core.exposer.all() {
        // Reachers refuse an old key next to a new one, so no target is waited for.
        match core.publish_as(session, &service, service.target_ok(), false).await {
            Err(error) if error.kind != ErrorKind::HubUnreachable => {
                tracing::error!(service = %service.name, %error, "not exposed");
            }
            other => other?,
        }
    }
    core.announced.send_replace(shown);
    Ok(())
}

/// Rotates the static key when its time has come, and forgets the one before.
async fn keep_keys_fresh(core: Arc<Core>) {
    loop {
        if let Err(error) = core.look_at_keys(clock::now()) {
            tracing::error!(%error, "the static key was not rotated");
        }
        tokio::time::sleep(LOOK_AT_KEYS).await;
    }
}

/// Judges every live peer again whenever the trust log changes, and guests when their time is over.
async fn judge_again(core: Arc<Core>) {
    let mut identities = core.identity_changes();
    let mut judged = identities.borrow_and_update().trust.clone();
    let mut looks = tokio::time::interval(LOOK_AROUND);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            // The sender lives as long as the core, which is here.
            _ = identities.changed() => {
                let identity = identities.borrow_and_update().clone();
                if identity.trust != judged {
                    judged = identity.trust.clone();
                    core.exposer.judge_again(&identity);
                    core.fresh().retain(|witness| !identity.trust.is_revoked(witness, UnixTime::MAX));
                }
            }
            _ = looks.tick() => core.exposer.end_expired(&core.identity()),
        }
    }
}

/// Serves a session until it ends. Tunnels that it brought live on their own sockets, beyond it.
async fn serve(
    core: &Arc<Core>,
    session: &Arc<Session>,
    mut incoming: mpsc::Receiver<Incoming>,
    identities: &mut watch::Receiver<Arc<Identity>>,
) -> Ended {
    // Handshakes die with the session that brought them.
    let mut handshakes = JoinSet::new();
    let mut announcing = JoinSet::new();
    let hint = Arc::new(Notify::new());
    let keeping = tokio::spawn(keeper::keep(core.clone(), session.clone(), hint.clone()));
    let _keeping = AbortOnDrop(keeping.abort_handle());
    loop {
        tokio::select! {
            next = incoming.recv() => match next {
                Some(Incoming::LogGrew(head)) => {
                    if head != core.identity().trust.head() {
                        hint.notify_one();
                    }
                }
                Some(Incoming::WrapStored | Incoming::ShareMade) => hint.notify_one(),
                Some(Incoming::Tunnel { initiator, request, ticket }) => {
                    let (core, session) = (core.clone(), session.clone());
                    handshakes.spawn(async move {
                        core.exposer.answer(&core, &session, initiator, request, ticket).await;
                    });
                }
                Some(Incoming::Closed(ended)) => return ended,
                None => return Ended::Lost("session dropped".into()),
            },
            Some(_) = handshakes.join_next() => {}
            Ok(()) = identities.changed(), if announcing.is_empty() => {
                let identity = identities.borrow_and_update().clone();
                if identity.noise.counter() > *core.announced.borrow() {
                    let (core, session) = (core.clone(), session.clone());
                    announcing.spawn(async move { announce(&core, &session, identity).await });
                }
            }
            Some(announced) = announcing.join_next() => {
                // The next login shows everything again.
                if let Ok(Err(error)) = announced {
                    return Ended::Lost(format!("a new static key was not announced: {error}"));
                }
            }
        }
    }
}
