//! What all connections share: the store, the router and the mailboxes of the sessions.

use std::{
    collections::{HashMap, HashSet, hash_map::Entry},
    net::IpAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Instant,
};

use connect_spec::{
    audit::Event,
    bytes::Blob,
    control::{ErrorReport, FromHub, Nonce, SessionKind},
    ids::{AgentId, ServiceId, TunnelId, WorkspaceId},
    objects::UnixTime,
};
use tokio::sync::{Notify, mpsc, oneshot, watch};

use crate::{
    audit,
    auth::{Authorities, Context},
    beats::Beats,
    config::Registration,
    doorman::Doorman,
    effects::Queue,
    limits::{MAX_OUTGOING, MAX_WORKSPACE_HELD_BYTES},
    metrics::{Metrics, Moment},
    relay::{Leg, Meter, Sent, Side},
    requests::busy,
    rest::Rates,
    router::{AgentKey, Claim, JoinedTunnel, Member, Output, Router, SessionId, TunnelSerial},
    server::Conn,
    store::Store,
    trust::TrustCache,
};

/// What lies in a session's mailbox. Boxed: a channel allocates room for 32 of them at once.
#[derive(Debug)]
pub enum Mail {
    /// Send this.
    Message(Box<FromHub>),
    /// Say why and close with the code.
    Goodbye(Box<ErrorReport>, u16),
}

/// The state behind the one lock. It is held for memory work only, never across a wait.
#[derive(Debug, Default)]
struct State {
    router: Router,
    mailboxes: HashMap<SessionId, mpsc::Sender<Mail>>,
    /// Tunnels of which an end is there.
    tunnels: HashMap<TunnelSerial, Place>,
    /// Bytes that wait at the hub for slow ends, by workspace, of those that have tunnels.
    held: HashMap<WorkspaceId, Arc<AtomicUsize>>,
    beats: Beats,
}

/// How the end of a tunnel that came first is reached.
#[derive(Debug)]
struct Place {
    /// Until the other end comes.
    other: Option<oneshot::Sender<Leg<Conn>>>,
    cut: oneshot::Sender<u16>,
    meter: Arc<Meter>,
}

/// A tunnel, for whoever looks after the workspace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LiveTunnel {
    /// Who talks about what, since when.
    pub joined: JoinedTunnel,
    /// Payload bytes that the reacher sent so far.
    pub from_reacher: u64,
    /// Payload bytes that the exposer sent so far.
    pub from_exposer: u64,
}

/// What came of [`Hub::join`].
#[derive(Debug)]
pub enum Joined {
    /// First here.
    First(First),
    /// The other end was waiting and takes over from here.
    HandedOver,
    /// The tunnel is over: the other end left, or it was cut.
    TooLate(Leg<Conn>),
}

/// The end of a tunnel that came first.
#[derive(Debug)]
pub struct First {
    /// Its socket.
    pub leg: Leg<Conn>,
    /// The other end comes by this way.
    pub other: oneshot::Receiver<Leg<Conn>>,
    /// Says with which code to close both ends, if the tunnel must end before its ends want it to.
    pub cut: oneshot::Receiver<u16>,
    /// Counts what goes through.
    pub meter: Arc<Meter>,
}

/// How far the hub is on its way to the end; it only goes forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Not at all.
    Serving,
    /// `/readyz` fails, so that nobody new is sent here; all else goes on.
    Draining,
    /// Agents are told to come back later, and connections end.
    Stopping,
    /// No agent is connected; health checks end too.
    Ended,
}

/// One hub.
#[derive(Debug)]
pub struct Hub {
    store: Store,
    authorities: Authorities,
    registration: Registration,
    trust: TrustCache,
    doorman: Arc<Doorman>,
    metrics: Metrics,
    /// By the ends of all tunnels so far.
    sent: Arc<Sent>,
    changed: Queue,
    to_judge: Queue,
    audit: audit::Queue,
    rates: Rates,
    state: Mutex<State>,
    /// Told when the router may have an earlier deadline.
    deadline_changed: Notify,
    phase: watch::Sender<Phase>,
}

impl Hub {
    /// A hub without sessions.
    #[must_use]
    pub fn new(store: Store, authorities: Authorities, registration: Registration) -> Self {
        Self {
            store,
            authorities,
            registration,
            trust: TrustCache::default(),
            doorman: Arc::default(),
            metrics: Metrics::default(),
            sent: Arc::default(),
            changed: Queue::default(),
            to_judge: Queue::default(),
            audit: audit::Queue::default(),
            rates: Rates::default(),
            state: Mutex::default(),
            deadline_changed: Notify::new(),
            phase: watch::Sender::new(Phase::Serving),
        }
    }

    /// Where workspaces are.
    #[must_use]
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// What the trust logs say.
    #[must_use]
    pub fn trust(&self) -> &TrustCache {
        &self.trust
    }

    /// Who may knock where agents are served.
    #[must_use]
    pub fn doorman(&self) -> &Arc<Doorman> {
        &self.doorman
    }

    /// What is counted.
    #[must_use]
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// What is so at the moment.
    #[must_use]
    pub fn moment(&self, database_up: bool) -> Moment {
        Moment {
            census: self.lock().router.census(),
            strangers: self.doorman.inside(),
            database_up,
            pool: self.store.connections(),
            draining: self.is_draining(),
            relayed: [Side::Reacher, Side::Exposer].map(|side| self.sent.by(side)),
        }
    }

    /// Changes of trust logs that nobody was told of yet.
    #[must_use]
    pub fn changed(&self) -> &Queue {
        &self.changed
    }

    /// Changes after which those who are online are to be judged again.
    #[must_use]
    pub fn to_judge(&self) -> &Queue {
        &self.to_judge
    }

    /// Counts what happens, and writes it into the audit log of its workspace a moment later.
    pub fn note(&self, workspace: WorkspaceId, event: Event) {
        self.metrics.note_event(&event);
        self.audit.add(workspace, event);
    }

    /// Events on their way into the audit logs.
    #[must_use]
    pub fn audit(&self) -> &audit::Queue {
        &self.audit
    }

    /// What API keys may still ask for.
    #[must_use]
    pub fn rates(&self) -> &Rates {
        &self.rates
    }

    /// What the checks of a connection depend on.
    #[must_use]
    pub fn context<'a>(&'a self, nonce: &'a Nonce, address: IpAddr) -> Context<'a> {
        Context {
            store: &self.store,
            authorities: &self.authorities,
            registration: self.registration,
            trust: &self.trust,
            audit: &self.audit,
            nonce,
            address,
        }
    }

    /// No step under the lock can fail half-way, so the state behind a poisoned lock is sound.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the router work, and delivers what comes out of it.
    pub fn route<T>(&self, work: impl FnOnce(&mut Router, &mut Vec<Output>) -> T) -> T {
        self.route_in(&mut self.lock(), work)
    }

    fn route_in<T>(
        &self,
        state: &mut State,
        work: impl FnOnce(&mut Router, &mut Vec<Output>) -> T,
    ) -> T {
        let mut out = Vec::new();
        let before = state.router.poll_timeout();
        let result = work(&mut state.router, &mut out);
        if state.router.poll_timeout() != before {
            self.deadline_changed.notify_one();
        }
        for output in out {
            let (session, mail) = match output {
                Output::Send(session, message) => (session, Mail::Message(message.into())),
                Output::Close(session, report, code) => {
                    (session, Mail::Goodbye(report.into(), code))
                }
                Output::Cut(tunnel, code) => {
                    if let Some(place) = state.tunnels.remove(&tunnel) {
                        // An end that is gone by itself needs no telling.
                        let _ = place.cut.send(code);
                    }
                    continue;
                }
                Output::Record(workspace, event) => {
                    self.note(workspace, event);
                    continue;
                }
            };
            if let Some(mailbox) = state.mailboxes.get(&session)
                && mailbox.try_send(mail).is_err()
            {
                // Full: its agent does not read. Without a mailbox the session ends.
                state.mailboxes.remove(&session);
            }
        }
        result
    }

    /// Admits a session and gives it a mailbox; true when an older session was displaced. `None` when its
    /// agent has too many.
    pub fn log_in(
        &self,
        member: Member,
        kind: SessionKind,
        services: HashSet<ServiceId>,
    ) -> Option<(SessionId, mpsc::Receiver<Mail>, bool)> {
        let (sender, receiver) = mpsc::channel(MAX_OUTGOING);
        let mut state = self.lock();
        // A session of the agent itself takes the place of the one before.
        if kind == SessionKind::Command && state.router.is_crowded(member.key) {
            return None;
        }
        let (session, displaced) = self
            .route_in(&mut state, |router, out| router.handle_login(member, kind, services, out));
        state.mailboxes.insert(session, sender);
        Some((session, receiver, displaced))
    }

    /// Forgets a session.
    pub fn log_out(&self, session: SessionId, workspace: WorkspaceId) {
        let mut state = self.lock();
        self.route_in(&mut state, |router, out| router.handle_logout(session, out));
        state.mailboxes.remove(&session);
        if !state.router.has_sessions(workspace) {
            state.beats.forget(workspace);
        }
    }

    /// Takes the beat of an agent, if it left one, and gives those of others.
    pub fn exchange_beats(
        &self,
        (workspace, agent): AgentKey,
        mine: Option<(UnixTime, Blob)>,
    ) -> Vec<(AgentId, Blob)> {
        let mut state = self.lock();
        if let Some((time, beat)) = mine {
            state.beats.keep(workspace, agent, time, beat);
        }
        state.beats.of_others(workspace, agent)
    }

    /// Brings the two ends of a tunnel together.
    pub fn join(&self, claim: &Claim, leg: Leg<Conn>) -> Joined {
        let mut state = self.lock();
        if !state.router.is_open(claim) {
            return Joined::TooLate(leg);
        }
        if let Some(other) =
            state.tunnels.get_mut(&claim.serial).and_then(|place| place.other.take())
        {
            return match other.send(leg) {
                Ok(()) => Joined::HandedOver,
                Err(leg) => Joined::TooLate(leg),
            };
        }
        let (other_sender, other) = oneshot::channel();
        let (cut_sender, cut) = oneshot::channel();
        let held = state.held.entry(claim.tunnel.0).or_default();
        let meter = Arc::new(Meter::new(Arc::clone(&self.sent), Arc::clone(held)));
        let place = Place { other: Some(other_sender), cut: cut_sender, meter: Arc::clone(&meter) };
        state.tunnels.insert(claim.serial, place);
        Joined::First(First { leg, other, cut, meter })
    }

    /// Why a workspace gets no new tunnel now, whoever in it asks for one.
    ///
    /// # Errors
    /// What the reacher is told.
    pub fn check_load(&self, workspace: WorkspaceId) -> Result<(), ErrorReport> {
        let held = self.lock().held.get(&workspace).map(|held| held.load(Ordering::Relaxed));
        let why = if held.is_some_and(|held| held >= MAX_WORKSPACE_HELD_BYTES) {
            "too much of this workspace waits at the hub for agents that do not take it"
        } else if self.audit.is_full(workspace) {
            "the hub cannot record what happens in this workspace, so nothing new may"
        } else {
            return Ok(());
        };
        Err(busy(why))
    }

    /// Up to `limit` tunnels of a workspace whose id follows `after`, in ascending order.
    pub fn live_tunnels(
        &self,
        workspace: WorkspaceId,
        after: Option<TunnelId>,
        limit: usize,
    ) -> Vec<LiveTunnel> {
        let state = self.lock();
        let joined = state.router.joined_tunnels(workspace, after, limit);
        let live = joined.into_iter().map(|joined| {
            let sent = |side| {
                state.tunnels.get(&joined.serial).map_or(0, |place| place.meter.sent.by(side))
            };
            let (from_reacher, from_exposer) = (sent(Side::Reacher), sent(Side::Exposer));
            LiveTunnel { joined, from_reacher, from_exposer }
        });
        live.collect()
    }

    /// A tunnel is over, or came to nothing.
    pub fn close_tunnel(&self, claim: &Claim) {
        let mut state = self.lock();
        state.router.handle_closed(claim);
        state.tunnels.remove(&claim.serial);
        // Each tunnel of the workspace has a share in it, as long as it lives.
        if let Entry::Occupied(held) = state.held.entry(claim.tunnel.0)
            && Arc::strong_count(held.get()) == 1
        {
            held.remove();
        }
    }

    /// Goes on to the next phase.
    pub fn enter(&self, phase: Phase) {
        self.phase.send_replace(phase);
    }

    /// Whether the hub is on its way to its end.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        *self.phase.borrow() >= Phase::Draining
    }

    /// Returns once the hub is in this phase or a later one.
    pub async fn reached(&self, phase: Phase) {
        // The sender lives as long as this hub.
        let _ = self.phase.subscribe().wait_for(|current| *current >= phase).await;
    }

    /// Returns once everybody has to go.
    pub async fn stopped(&self) {
        self.reached(Phase::Stopping).await;
    }

    /// Runs the router's clock; never returns.
    pub async fn run_clock(&self) {
        loop {
            let next = self.lock().router.poll_timeout();
            let due = async {
                match next {
                    Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = due => self.route(|router, out| router.handle_timeout(Instant::now(), out)),
                () = self.deadline_changed.notified() => {}
            }
        }
    }
}

/// Random bytes from the operating system; `None` when it has none to give.
#[must_use]
pub fn random() -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).ok().map(|()| bytes)
}
