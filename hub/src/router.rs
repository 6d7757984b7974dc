//! Who is online and which tunnels there are; messages in, messages out.
//!
//! No IO, no clock and no randomness of its own: the caller passes `now` and random bytes, and delivers
//! the [`Output`]s. The database is not asked here either: opening a tunnel to an agent that is online
//! takes memory only.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    ops::Bound,
    time::Instant,
};

use connect_spec::{
    audit::Event,
    bytes::Blob,
    control::{ErrorCode, ErrorReport, FromHub, Reply, SessionKind, Ticket, TunnelRequest, close},
    encoding::Encoding,
    ids::{AgentId, CredentialId, ServiceId, TunnelId, WorkspaceId},
    keys::IdentityKey,
    limits::{HANDSHAKE_TIMEOUT, MAX_HALF_OPEN},
    objects::AgentRole,
    trust::TrustState,
};

use crate::{
    bucket::Bucket,
    limits::{
        BUSY_RETRY, MAX_SESSIONS_PER_AGENT, MAX_TUNNELS_PER_AGENT, OPENS_PER_SEC, REVOKED_GRACE,
    },
    relay::Side,
};

/// One control socket that has logged in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(u64);

/// An agent, across all workspaces.
pub type AgentKey = (WorkspaceId, AgentId);

/// A tunnel, across all workspaces: ids are chosen by agents, so only the pair is unique.
pub type TunnelKey = (WorkspaceId, TunnelId);

/// What the hub verified of whoever logged in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// The agent in its workspace.
    pub key: AgentKey,
    /// Its identity key.
    pub identity: IdentityKey,
    /// Of its certificate.
    pub serial: u64,
    /// What its certificate allows.
    pub role: AgentRole,
    /// A guest's share, and the services in it.
    pub share: Option<(CredentialId, Vec<ServiceId>)>,
}

impl Member {
    /// Whether a service is within what this member may reach.
    #[must_use]
    pub fn may_reach(&self, service: ServiceId) -> bool {
        self.share.as_ref().is_none_or(|(_, services)| services.contains(&service))
    }
}

/// What the driver must do.
#[derive(Debug, PartialEq, Eq)]
pub enum Output {
    /// Send a message on a control socket.
    Send(SessionId, FromHub),
    /// Say why, then close a control socket with the code.
    Close(SessionId, ErrorReport, u16),
    /// Close the data sockets of a tunnel, those that are there, with the code.
    Cut(TunnelSerial, u16),
    /// Write into the audit log of a workspace.
    Record(WorkspaceId, Event),
}

/// Why a tunnel is not opened.
#[derive(Debug, PartialEq, Eq)]
pub enum OpenError {
    /// No agent that is online exposes the service: the database knows whether it exists at all.
    NotOnline,
    /// Refused for this reason.
    Refused(ErrorReport),
}

/// Why a ticket does not admit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ClaimError {
    /// Never given out, used, or expired.
    #[error("the ticket is not valid")]
    Unknown,
    /// The tunnel was negotiated for the other encoding.
    #[error("the tunnel has another encoding")]
    Encoding,
}

/// Numbers tunnels as the router makes them. Agents choose tunnel ids and may choose one again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TunnelSerial(u64);

/// Who is at the ends of a tunnel, and what it is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parties {
    /// The end that asked for it.
    pub reacher: AgentId,
    /// The end that was asked.
    pub exposer: AgentId,
    /// What the exposer offers.
    pub service: ServiceId,
    /// The share of a guest.
    pub share: Option<CredentialId>,
}

impl Parties {
    /// That a tunnel between them did not come to be.
    #[must_use]
    pub fn refused(&self, code: ErrorCode) -> Event {
        Event::TunnelRefused {
            agent_id: self.reacher,
            peer_id: self.exposer,
            service_id: self.service,
            code,
            count: 1,
        }
    }
}

/// A tunnel with both ends, as [`Router::joined_tunnels`] lists it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JoinedTunnel {
    /// The tunnel.
    pub id: TunnelId,
    /// Which of those that had this id.
    pub serial: TunnelSerial,
    /// Who talks about what.
    pub parties: Parties,
    /// How both ends send.
    pub encoding: Encoding,
    /// Since when.
    pub since: Instant,
}

/// One end of one tunnel, admitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Claim {
    /// The tunnel.
    pub tunnel: TunnelKey,
    /// Which of those that had this id.
    pub serial: TunnelSerial,
    /// Who talks about what.
    pub parties: Parties,
    /// Which end.
    pub side: Side,
    /// How both ends send.
    pub encoding: Encoding,
}

#[derive(Debug)]
struct Session {
    member: Member,
    kind: SessionKind,
}

/// An agent session, the only kind that tunnels are offered to.
#[derive(Debug)]
struct Online {
    session: SessionId,
    services: HashSet<ServiceId>,
}

/// What one agent costs.
#[derive(Debug)]
struct Load {
    tunnels: usize,
    /// Asked of this agent and not answered.
    unanswered: usize,
    opens: Bucket,
}

/// Where a tunnel is on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// The exposer has not answered.
    Asked,
    /// The exposer accepted; at least one end has no data socket yet.
    Accepted,
    /// Both ends have their data sockets, since then.
    Joined(Instant),
}

#[derive(Debug)]
struct Tunnel {
    serial: TunnelSerial,
    encoding: Encoding,
    stage: Stage,
    deadline: Instant,
    parties: Parties,
    reacher_session: SessionId,
    request_id: u64,
    reacher_end: End,
    exposer_session: SessionId,
    exposer_end: End,
}

/// The data socket of one end.
#[derive(Debug)]
enum End {
    /// No ticket was given out.
    NotInvited,
    Invited(Ticket),
    Here,
}

/// How many sessions and tunnels there are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Census {
    /// Sessions of both kinds.
    pub sessions: usize,
    /// Workspaces with a session.
    pub workspaces: usize,
    /// Tunnels whose exposer has not answered.
    pub tunnels_asked: usize,
    /// Tunnels that miss an end.
    pub tunnels_accepted: usize,
    /// Tunnels with both ends.
    pub tunnels_open: usize,
}

/// The state of all sessions and tunnels.
#[derive(Debug, Default)]
pub struct Router {
    next_session: u64,
    next_tunnel: u64,
    sessions: HashMap<SessionId, Session>,
    /// The same sessions by workspace and agent.
    members: BTreeSet<(WorkspaceId, AgentId, SessionId)>,
    online: HashMap<AgentKey, Online>,
    loads: HashMap<AgentKey, Load>,
    tunnels: BTreeMap<TunnelKey, Tunnel>,
    tickets: HashMap<Ticket, (TunnelKey, Side)>,
    deadlines: BTreeSet<(Instant, TunnelKey)>,
}

impl Router {
    /// Admits a session; `services` are those that the agent exposed before.
    ///
    /// A second agent session of one agent displaces the first, which is told. True when it did.
    pub fn handle_login(
        &mut self,
        member: Member,
        kind: SessionKind,
        services: HashSet<ServiceId>,
        out: &mut Vec<Output>,
    ) -> (SessionId, bool) {
        self.next_session += 1;
        let session = SessionId(self.next_session);
        let mut displaced = false;
        if kind == SessionKind::Agent
            && let Some(older) = self.online.insert(member.key, Online { session, services })
        {
            displaced = true;
            self.forget_session(older.session, out);
            let report =
                ErrorReport::new(ErrorCode::Displaced, "a newer session of this agent took over");
            out.push(Output::Close(older.session, report, close::DISPLACED));
        }
        self.members.insert((member.key.0, member.key.1, session));
        self.sessions.insert(session, Session { member, kind });
        (session, displaced)
    }

    /// Whether an agent has as many sessions as it may.
    #[must_use]
    pub fn is_crowded(&self, (workspace, agent): AgentKey) -> bool {
        let first = (workspace, agent, SessionId(0));
        let last = (workspace, agent, SessionId(u64::MAX));
        self.members.range(first..=last).count() >= MAX_SESSIONS_PER_AGENT
    }

    /// An agent says that its sockets of before lead nowhere: the other ends of its tunnels need not wait
    /// until they notice.
    pub fn handle_moved(&mut self, agent: AgentKey, out: &mut Vec<Output>) {
        for key in self.tunnels_of(agent) {
            self.end_tunnel(key, close::PEER_GONE, out);
        }
    }

    fn tunnels_of(&self, (workspace, id): AgentKey) -> Vec<TunnelKey> {
        let first = (workspace, TunnelId([0; 16]));
        let last = (workspace, TunnelId([u8::MAX; 16]));
        let tunnels = self.tunnels.range(first..=last);
        let own = tunnels
            .filter(|(_, Tunnel { parties, .. })| parties.reacher == id || parties.exposer == id);
        own.map(|(key, _)| *key).collect()
    }

    /// A control socket is gone. Tunnels that are joined go on without it.
    pub fn handle_logout(&mut self, session: SessionId, out: &mut Vec<Output>) {
        let Some(Session { member, kind }) = self.forget_session(session, out) else {
            return;
        };
        if kind == SessionKind::Agent
            && self.online.get(&member.key).is_some_and(|online| online.session == session)
        {
            self.online.remove(&member.key);
        }
    }

    /// Drops a session and what was half-way through it.
    fn forget_session(&mut self, session: SessionId, out: &mut Vec<Output>) -> Option<Session> {
        let gone = self.sessions.remove(&session)?;
        let (workspace, agent) = gone.member.key;
        self.members.remove(&(workspace, agent, session));
        let half_way: Vec<TunnelKey> = self
            .deadlines
            .iter()
            .map(|(_, key)| *key)
            .filter(|key| {
                self.tunnels.get(key).is_some_and(|tunnel| match tunnel.stage {
                    Stage::Asked => {
                        tunnel.reacher_session == session || tunnel.exposer_session == session
                    }
                    // Only a reacher that came so far needs no control socket any more.
                    Stage::Accepted => {
                        tunnel.reacher_session == session
                            && !matches!(tunnel.reacher_end, End::Here)
                    }
                    Stage::Joined(_) => false,
                })
            })
            .collect();
        for key in half_way {
            self.end_tunnel(key, close::PEER_GONE, out);
        }
        Some(gone)
    }

    /// Ends a tunnel wherever it is on its way.
    fn end_tunnel(&mut self, key: TunnelKey, code: u16, out: &mut Vec<Output>) {
        let Some(tunnel) = self.remove_tunnel(key) else {
            return;
        };
        if tunnel.stage == Stage::Asked && self.sessions.contains_key(&tunnel.reacher_session) {
            let report = ErrorReport::new(ErrorCode::Offline, "the exposer went offline");
            tunnel.refuse(key.0, report, out);
        }
        if matches!(tunnel.reacher_end, End::Here) || matches!(tunnel.exposer_end, End::Here) {
            out.push(Output::Cut(tunnel.serial, code));
        }
    }

    /// How much there is of everything.
    #[must_use]
    pub fn census(&self) -> Census {
        let mut census = Census { sessions: self.sessions.len(), ..Census::default() };
        let mut last = None;
        for (workspace, _, _) in &self.members {
            census.workspaces += usize::from(last.replace(workspace) != Some(workspace));
        }
        for tunnel in self.tunnels.values() {
            match tunnel.stage {
                Stage::Asked => census.tunnels_asked += 1,
                Stage::Accepted => census.tunnels_accepted += 1,
                Stage::Joined(_) => census.tunnels_open += 1,
            }
        }
        census
    }

    /// Whether any agent of a workspace has a session.
    #[must_use]
    pub fn has_sessions(&self, workspace: WorkspaceId) -> bool {
        self.members_of(workspace).next().is_some()
    }

    /// The agents of a workspace that have sessions.
    #[must_use]
    pub fn agents_of(&self, workspace: WorkspaceId) -> BTreeSet<AgentId> {
        self.members_of(workspace).map(|(agent, _)| agent).collect()
    }

    fn members_of(&self, workspace: WorkspaceId) -> impl Iterator<Item = (AgentId, SessionId)> {
        let first = (workspace, AgentId([0; 16]), SessionId(0));
        let last = (workspace, AgentId([u8::MAX; 16]), SessionId(u64::MAX));
        self.members.range(first..=last).map(|(_, agent, session)| (*agent, *session))
    }

    /// The trust log of a workspace changed: whom it revokes by name is out, all others are told.
    pub fn handle_log(&mut self, trust: &TrustState, now: Instant, out: &mut Vec<Output>) {
        let workspace = trust.workspace_id();
        let revoked: BTreeSet<AgentId> = self
            .members_of(workspace)
            .filter(|(agent, session)| {
                self.sessions
                    .get(session)
                    .is_some_and(|session| trust.is_revoked(agent, session.member.serial))
            })
            .map(|(agent, _)| agent)
            .collect();
        let report = ErrorReport::new(ErrorCode::Revoked, "the agent was revoked");
        for agent in revoked {
            self.handle_end((workspace, agent), &report, now, out);
        }
        let head = trust.head();
        let told = self.members_of(workspace);
        out.extend(told.map(|(_, session)| Output::Send(session, FromHub::LogGrew { head })));
    }

    /// An agent is a member no more: its sessions end, and its tunnels, whether they need one or not.
    ///
    /// Tunnels that carry streams last a moment longer, in which the peer, who is told too, closes the
    /// channel itself: only its word, inside the encryption, tells the clients at the other end.
    pub fn handle_end(
        &mut self,
        agent: AgentKey,
        report: &ErrorReport,
        now: Instant,
        out: &mut Vec<Output>,
    ) {
        for key in self.tunnels_of(agent) {
            let joined = self
                .tunnels
                .get_mut(&key)
                .filter(|tunnel| matches!(tunnel.stage, Stage::Joined(_)));
            if let Some(tunnel) = joined {
                // Told twice, as by name and by judgement, it ends at the first time.
                if !self.deadlines.contains(&(tunnel.deadline, key)) {
                    tunnel.deadline = now + REVOKED_GRACE;
                    self.deadlines.insert((tunnel.deadline, key));
                }
            } else {
                self.end_tunnel(key, close::REVOKED, out);
            }
        }
        self.close_sessions(agent, report, close::REVOKED, out);
    }

    /// An agent has something to fetch at its next login. Its joined tunnels go on.
    pub fn handle_recall(&mut self, agent: AgentKey, out: &mut Vec<Output>) {
        let report = ErrorReport::new(
            ErrorCode::Restarting,
            "a signer gave the agent a new certificate: log in again",
        );
        self.close_sessions(agent, &report, close::RESTARTING, out);
    }

    fn close_sessions(
        &mut self,
        agent: AgentKey,
        report: &ErrorReport,
        code: u16,
        out: &mut Vec<Output>,
    ) {
        let (workspace, id) = agent;
        let first = (workspace, id, SessionId(0));
        let last = (workspace, id, SessionId(u64::MAX));
        let sessions: Vec<SessionId> =
            self.members.range(first..=last).map(|(_, _, session)| *session).collect();
        for session in sessions {
            self.handle_logout(session, out);
            out.push(Output::Close(session, report.clone(), code));
        }
    }

    /// Tells an agent something, if it is online.
    pub fn tell(
        &self,
        workspace: WorkspaceId,
        agent: AgentId,
        message: &FromHub,
        out: &mut Vec<Output>,
    ) {
        if let Some(online) = self.online.get(&(workspace, agent)) {
            out.push(Output::Send(online.session, message.clone()));
        }
    }

    /// Whether a tunnel is still the one of which an end was claimed.
    #[must_use]
    pub fn is_open(&self, claim: &Claim) -> bool {
        self.tunnels.get(&claim.tunnel).is_some_and(|tunnel| tunnel.serial == claim.serial)
    }

    /// Whether this agent has an agent session.
    #[must_use]
    pub fn is_online(&self, agent: &AgentKey) -> bool {
        self.online.contains_key(agent)
    }

    /// The agent exposes a service from now on.
    pub fn handle_expose(&mut self, agent: &AgentKey, service: ServiceId) {
        if let Some(online) = self.online.get_mut(agent) {
            online.services.insert(service);
        }
    }

    /// The agent exposes a service no more. Tunnels to it go on: ending them is the exposer's.
    pub fn handle_unexpose(&mut self, agent: &AgentKey, service: ServiceId) {
        if let Some(online) = self.online.get_mut(agent) {
            online.services.remove(&service);
        }
    }

    /// A session asks for a tunnel. `random` becomes the exposer's ticket.
    ///
    /// # Errors
    /// [`OpenError`]; nothing is sent then.
    pub fn handle_open(
        &mut self,
        from: SessionId,
        id: u64,
        request: TunnelRequest,
        random: [u8; 32],
        now: Instant,
        out: &mut Vec<Output>,
    ) -> Result<(), OpenError> {
        let refuse = |code, message: &str| Err(OpenError::Refused(ErrorReport::new(code, message)));
        let busy = |message: &str| {
            let report = ErrorReport::new(ErrorCode::Busy, message);
            Err(OpenError::Refused(report.retry_in(BUSY_RETRY)))
        };
        let Some(Session { member, .. }) = self.sessions.get(&from) else {
            return refuse(ErrorCode::Displaced, "this session is over");
        };
        let (workspace, reacher) = member.key;
        if !member.role.may_reach() {
            return refuse(
                ErrorCode::Forbidden,
                "the role of this agent does not let it reach services",
            );
        }
        let share = member.share.as_ref().map(|(share, _)| *share);
        if request.share_id != share.unwrap_or(CredentialId::NONE)
            || !member.may_reach(request.service_id)
        {
            return refuse(ErrorCode::Forbidden, "the share does not name this service");
        }
        if let Err(wait) =
            self.load((workspace, reacher), now).opens.take(OPENS_PER_SEC, OPENS_PER_SEC, now)
        {
            let report =
                ErrorReport::new(ErrorCode::RateLimited, "this agent opens too many tunnels");
            return Err(OpenError::Refused(report.retry_in(wait)));
        }
        let exposer_key = (workspace, request.responder);
        let Some(exposer_session) = self
            .online
            .get(&exposer_key)
            .filter(|online| online.services.contains(&request.service_id))
            .map(|online| online.session)
        else {
            return Err(OpenError::NotOnline);
        };
        let key = (workspace, request.tunnel_id);
        if self.tunnels.contains_key(&key) {
            return refuse(ErrorCode::AlreadyExists, "a tunnel of this id exists");
        }
        let reacher_tunnels = self.load((workspace, reacher), now).tunnels;
        let exposer_load = self.load(exposer_key, now);
        if reacher_tunnels >= MAX_TUNNELS_PER_AGENT || exposer_load.tunnels >= MAX_TUNNELS_PER_AGENT
        {
            return busy("one of the two agents has as many tunnels as the hub allows");
        }
        if exposer_load.unanswered >= MAX_HALF_OPEN {
            return busy("too many tunnels wait for the exposer's answer");
        }
        exposer_load.unanswered += 1;
        exposer_load.tunnels += 1;
        self.load((workspace, reacher), now).tunnels += 1;

        self.next_tunnel += 1;
        let ticket = Ticket::new(random);
        let deadline = now + HANDSHAKE_TIMEOUT;
        self.tickets.insert(ticket.clone(), (key, Side::Exposer));
        self.deadlines.insert((deadline, key));
        self.tunnels.insert(
            key,
            Tunnel {
                serial: TunnelSerial(self.next_tunnel),
                encoding: request.encoding,
                stage: Stage::Asked,
                deadline,
                parties: Parties {
                    reacher,
                    exposer: request.responder,
                    service: request.service_id,
                    share,
                },
                reacher_session: from,
                request_id: id,
                reacher_end: End::NotInvited,
                exposer_session,
                exposer_end: End::Invited(ticket.clone()),
            },
        );
        out.push(Output::Send(
            exposer_session,
            FromHub::IncomingTunnel { initiator: reacher, request, ticket },
        ));
        Ok(())
    }

    /// The exposer accepts. `random` becomes the reacher's ticket. Too late or not asked: nothing happens.
    pub fn handle_accept(
        &mut self,
        from: SessionId,
        tunnel: TunnelId,
        message: Blob,
        random: [u8; 32],
        now: Instant,
        out: &mut Vec<Output>,
    ) {
        let Some((key, tunnel)) = self.asked(from, tunnel) else {
            return;
        };
        let ticket = Ticket::new(random);
        let (before, deadline) = (tunnel.deadline, now + HANDSHAKE_TIMEOUT);
        tunnel.stage = Stage::Accepted;
        tunnel.deadline = deadline;
        tunnel.reacher_end = End::Invited(ticket.clone());
        let exposer = tunnel.parties.exposer;
        let reply = Reply::TunnelAccepted { message, ticket: ticket.clone() };
        out.push(Output::Send(
            tunnel.reacher_session,
            FromHub::Reply { id: tunnel.request_id, reply },
        ));
        self.deadlines.remove(&(before, key));
        self.deadlines.insert((deadline, key));
        self.tickets.insert(ticket, (key, Side::Reacher));
        self.load((key.0, exposer), now).unanswered -= 1;
    }

    /// The exposer refuses. Too late or not asked: nothing happens.
    pub fn handle_refuse(
        &mut self,
        from: SessionId,
        tunnel: TunnelId,
        code: ErrorCode,
        out: &mut Vec<Output>,
    ) {
        let Some((key, _)) = self.asked(from, tunnel) else {
            return;
        };
        if let Some(tunnel) = self.remove_tunnel(key) {
            let report = ErrorReport::new(code, "the exposer refused the tunnel");
            tunnel.refuse(key.0, report, out);
        }
    }

    /// A tunnel of which the agent of session `from` is asked.
    fn asked(&mut self, from: SessionId, tunnel: TunnelId) -> Option<(TunnelKey, &mut Tunnel)> {
        let key = (self.sessions.get(&from)?.member.key.0, tunnel);
        self.tunnels
            .get_mut(&key)
            .filter(|tunnel| tunnel.stage == Stage::Asked && tunnel.exposer_session == from)
            .map(|tunnel| (key, tunnel))
    }

    /// A data socket shows a ticket, which is spent by that.
    ///
    /// # Errors
    /// [`ClaimError`].
    pub fn handle_claim(
        &mut self,
        ticket: &Ticket,
        encoding: Encoding,
        now: Instant,
    ) -> Result<Claim, ClaimError> {
        let (key, side) = self.tickets.remove(ticket).ok_or(ClaimError::Unknown)?;
        let tunnel = self.tunnels.get_mut(&key).ok_or(ClaimError::Unknown)?;
        if now >= tunnel.deadline {
            return Err(ClaimError::Unknown);
        }
        if encoding != tunnel.encoding {
            return Err(ClaimError::Encoding);
        }
        match side {
            Side::Reacher => tunnel.reacher_end = End::Here,
            Side::Exposer => tunnel.exposer_end = End::Here,
        }
        if let (End::Here, End::Here) = (&tunnel.reacher_end, &tunnel.exposer_end) {
            tunnel.stage = Stage::Joined(now);
            self.deadlines.remove(&(tunnel.deadline, key));
        }
        let (serial, parties) = (tunnel.serial, tunnel.parties);
        Ok(Claim { tunnel: key, serial, parties, side, encoding })
    }

    /// A tunnel has ended, or an end that claimed its place is gone again.
    pub fn handle_closed(&mut self, claim: &Claim) {
        if self.is_open(claim) {
            self.remove_tunnel(claim.tunnel);
        }
    }

    /// Up to `limit` tunnels of a workspace whose id follows `after`, in ascending order.
    #[must_use]
    pub fn joined_tunnels(
        &self,
        workspace: WorkspaceId,
        after: Option<TunnelId>,
        limit: usize,
    ) -> Vec<JoinedTunnel> {
        let first = match after {
            Some(after) => Bound::Excluded((workspace, after)),
            None => Bound::Included((workspace, TunnelId([0; 16]))),
        };
        let last = Bound::Included((workspace, TunnelId([u8::MAX; 16])));
        let joined = self.tunnels.range((first, last)).filter_map(|((_, id), tunnel)| {
            let Stage::Joined(since) = tunnel.stage else {
                return None;
            };
            let Tunnel { serial, parties, encoding, .. } = *tunnel;
            Some(JoinedTunnel { id: *id, serial, parties, encoding, since })
        });
        joined.take(limit).collect()
    }

    /// Ends a tunnel that has both ends; false when there is none of this id.
    pub fn handle_cut(&mut self, key: TunnelKey, out: &mut Vec<Output>) -> bool {
        let is_joined = |tunnel: &Tunnel| matches!(tunnel.stage, Stage::Joined(_));
        let found = self.tunnels.get(&key).is_some_and(is_joined);
        if found {
            self.end_tunnel(key, close::CUT, out);
        }
        found
    }

    /// When [`Router::handle_timeout`] has something to do.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.deadlines.first().map(|(deadline, _)| *deadline)
    }

    /// Gives up on the tunnels whose time is over.
    pub fn handle_timeout(&mut self, now: Instant, out: &mut Vec<Output>) {
        while let Some((_, key)) =
            self.deadlines.first().copied().filter(|(deadline, _)| *deadline <= now)
        {
            // Every deadline is that of a tunnel.
            let Some(tunnel) = self.remove_tunnel(key) else {
                self.deadlines.pop_first();
                continue;
            };
            match tunnel.stage {
                Stage::Asked => {
                    let report =
                        ErrorReport::new(ErrorCode::Timeout, "the exposer did not answer in time");
                    tunnel.refuse(key.0, report, out);
                }
                Stage::Accepted => {
                    let refused = tunnel.parties.refused(ErrorCode::Timeout);
                    out.push(Output::Record(key.0, refused));
                }
                Stage::Joined(_) => out.push(Output::Cut(tunnel.serial, close::REVOKED)),
            }
        }
        self.loads.retain(|_, load| load.tunnels > 0 || !load.opens.is_full(now));
    }

    fn load(&mut self, agent: AgentKey, now: Instant) -> &mut Load {
        self.loads.entry(agent).or_insert_with(|| Load {
            tunnels: 0,
            unanswered: 0,
            opens: Bucket::full(now),
        })
    }

    fn remove_tunnel(&mut self, key: TunnelKey) -> Option<Tunnel> {
        let tunnel = self.tunnels.remove(&key)?;
        self.deadlines.remove(&(tunnel.deadline, key));
        for end in [&tunnel.reacher_end, &tunnel.exposer_end] {
            if let End::Invited(ticket) = end {
                self.tickets.remove(ticket);
            }
        }
        let Parties { reacher, exposer, .. } = tunnel.parties;
        if let Some(load) = self.loads.get_mut(&(key.0, reacher)) {
            load.tunnels -= 1;
        }
        if let Some(load) = self.loads.get_mut(&(key.0, exposer)) {
            load.tunnels -= 1;
            load.unanswered -= usize::from(tunnel.stage == Stage::Asked);
        }
        Some(tunnel)
    }
}

impl Tunnel {
    /// Tells the reacher that its request came to nothing.
    fn refuse(&self, workspace: WorkspaceId, report: ErrorReport, out: &mut Vec<Output>) {
        out.push(Output::Record(workspace, self.parties.refused(report.code)));
        out.push(Output::Send(
            self.reacher_session,
            FromHub::Reply { id: self.request_id, reply: Reply::Error(report) },
        ));
    }
}

#[cfg(test)]
mod tests;
