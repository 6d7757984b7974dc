//! What all connections share: the store, the router and the mailboxes of the sessions.

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use connect_spec::{
    control::{ErrorReport, FromHub, Nonce, SessionKind},
    ids::ServiceId,
};
use tokio::sync::{Notify, mpsc, oneshot, watch};

use crate::{
    auth::{Authorities, Context},
    config::Registration,
    limits::MAX_OUTGOING,
    relay::Leg,
    router::{Claim, Member, Output, Router, SessionId, TunnelSerial},
    server::Conn,
    store::Store,
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
    /// Ends of tunnels whose other end is not there yet.
    waiting: HashMap<TunnelSerial, oneshot::Sender<Leg<Conn>>>,
}

/// What came of [`Hub::join`].
#[derive(Debug)]
pub enum Joined {
    /// First here: the other end comes by this way.
    First(Leg<Conn>, oneshot::Receiver<Leg<Conn>>),
    /// The other end was waiting and takes over from here.
    HandedOver,
    /// The other end was waiting, and left.
    TooLate(Leg<Conn>),
}

/// One hub.
#[derive(Debug)]
pub struct Hub {
    store: Store,
    authorities: Authorities,
    registration: Registration,
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

    /// What the checks of a connection depend on.
    #[must_use]
    pub fn context<'a>(&'a self, nonce: &'a Nonce, peer: IpAddr) -> Context<'a> {
        Context {
            store: &self.store,
            authorities: &self.authorities,
            registration: self.registration,
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

    /// Admits a session and gives it a mailbox; true when an older session was displaced.
    pub fn log_in(
        &self,
        member: Member,
        kind: SessionKind,
        services: HashSet<ServiceId>,
    ) -> (SessionId, mpsc::Receiver<Mail>, bool) {
        let (sender, receiver) = mpsc::channel(MAX_OUTGOING);
        let mut state = self.lock();
        let (session, displaced) = self
            .route_in(&mut state, |router, out| router.handle_login(member, kind, services, out));
        state.mailboxes.insert(session, sender);
        (session, receiver, displaced)
    }

    /// Forgets a session.
    pub fn log_out(&self, session: SessionId) {
        let mut state = self.lock();
        self.route_in(&mut state, |router, out| router.handle_logout(session, out));
        state.mailboxes.remove(&session);
    }

    /// Brings the two ends of a tunnel together.
    pub fn join(&self, tunnel: TunnelSerial, leg: Leg<Conn>) -> Joined {
        let mut state = self.lock();
        if let Some(other) = state.waiting.remove(&tunnel) {
            drop(state);
            return match other.send(leg) {
                Ok(()) => Joined::HandedOver,
                Err(leg) => Joined::TooLate(leg),
            };
        }
        let (sender, receiver) = oneshot::channel();
        state.waiting.insert(tunnel, sender);
        Joined::First(leg, receiver)
    }

    /// A tunnel is over, or came to nothing.
    pub fn close_tunnel(&self, claim: &Claim) {
        let mut state = self.lock();
        state.router.handle_closed(claim);
        state.waiting.remove(&claim.serial);
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
