//! What all connections share: the store, the router and the mailboxes of the sessions.

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use connect_spec::{
    bytes::Blob,
    control::{ErrorReport, FromHub, Nonce, SessionKind},
    ids::{AgentId, ServiceId, WorkspaceId},
    objects::UnixTime,
};
use tokio::sync::{Notify, mpsc, oneshot, watch};

use crate::{
    auth::{Authorities, Context},
    beats::Beats,
    config::Registration,
    effects::Queue,
    limits::MAX_OUTGOING,
    relay::Leg,
    router::{AgentKey, Claim, Member, Output, Router, SessionId, TunnelSerial},
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
    beats: Beats,
}

/// How the end of a tunnel that came first is reached.
#[derive(Debug)]
struct Place {
    /// Until the other end comes.
    other: Option<oneshot::Sender<Leg<Conn>>>,
    cut: oneshot::Sender<u16>,
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
}

/// One hub.
#[derive(Debug)]
pub struct Hub {
    store: Store,
    authorities: Authorities,
    registration: Registration,
    trust: TrustCache,
    changed: Queue,
    to_judge: Queue,
    state: Mutex<State>,
    /// Told when the router may have an earlier deadline.
    deadline_changed: Notify,
    stopping: watch::Sender<bool>,
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
            changed: Queue::default(),
            to_judge: Queue::default(),
            state: Mutex::default(),
            deadline_changed: Notify::new(),
            stopping: watch::Sender::new(false),
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

    /// What the checks of a connection depend on.
    #[must_use]
    pub fn context<'a>(&'a self, nonce: &'a Nonce, peer: IpAddr) -> Context<'a> {
        Context {
            store: &self.store,
            authorities: &self.authorities,
            registration: self.registration,
            trust: &self.trust,
            nonce,
            peer,
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
        let place = Place { other: Some(other_sender), cut: cut_sender };
        state.tunnels.insert(claim.serial, place);
        Joined::First(First { leg, other, cut })
    }

    /// A tunnel is over, or came to nothing.
    pub fn close_tunnel(&self, claim: &Claim) {
        let mut state = self.lock();
        state.router.handle_closed(claim);
        state.tunnels.remove(&claim.serial);
    }

    /// Tells everybody to go.
    pub fn stop(&self) {
        self.stopping.send_replace(true);
    }

    /// Whether [`Hub::stop`] was called.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        *self.stopping.borrow()
    }

    /// Returns once [`Hub::stop`] is called.
    pub async fn stopped(&self) {
        // The sender lives as long as this hub.
        let _ = self.stopping.subscribe().wait_for(|stopping| *stopping).await;
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
