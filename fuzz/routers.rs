//! The router of a hub with agents in two workspaces, who do what they like in any order: four bytes of input
//! are one thing that happens. Beside it runs a model that keeps a plain list.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    sync::OnceLock,
    time::{Duration, Instant},
};

use connect_hub::{
    limits::REVOKED_GRACE,
    relay::Side,
    router::{
        Census, Claim, ClaimError, Member, OpenError, Output, Router, SessionId, TunnelKey,
        TunnelSerial,
    },
};
use connect_spec::{
    audit::Event,
    bytes::Blob,
    control::{ErrorCode, ErrorReport, FromHub, Reply, SessionKind, Ticket, TunnelRequest, close},
    encoding::Encoding,
    ids::{AgentId, ChannelId, CredentialId, ServiceId, TunnelId, WorkspaceId},
    keys::IdentityKey,
    limits::HANDSHAKE_TIMEOUT,
    objects::AgentRole,
};

/// Fewer than an agent may open at once, so that rates do not matter.
const MOST_STEPS: usize = 90;
const SHARE: CredentialId = CredentialId([6; 16]);

/// An agent, or a namesake of it in the other workspace.
type Agent = (WorkspaceId, AgentId);

fn agent(number: u8) -> Agent {
    (WorkspaceId([number >> 2 & 1; 32]), AgentId([number & 3; 16]))
}

fn service(number: u8) -> ServiceId {
    ServiceId([number % 3; 16])
}

/// The last one is a guest, who may reach one service; the one before may only expose.
fn member(number: u8) -> Member {
    let role = match number & 3 {
        3 => AgentRole::Guest,
        2 => AgentRole::Exposer,
        _ => AgentRole::Member,
    };
    Member {
        key: agent(number),
        identity: IdentityKey([0; 32]),
        serial: 0,
        role,
        share: (role == AgentRole::Guest).then(|| (SHARE, vec![service(0)])),
    }
}

struct Session {
    id: SessionId,
    member: Member,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Asked,
    Accepted,
    Joined,
}

struct Tunnel {
    key: TunnelKey,
    reacher: AgentId,
    exposer: AgentId,
    encoding: Encoding,
    stage: Stage,
    /// Of a joined one only once an end of it is revoked.
    deadline: Option<Instant>,
    reacher_session: SessionId,
    exposer_session: SessionId,
    request_id: u64,
    /// By the end: what is still worth something, and whether it is here.
    tickets: [Option<Ticket>; 2],
    here: [bool; 2],
    /// As an end that is here learnt it.
    serial: Option<TunnelSerial>,
}

struct World {
    router: Router,
    now: Instant,
    drawn: u32,
    requests: u64,
    sessions: Vec<Session>,
    /// Of each workspace and agent: its session that tunnels are offered to, and its services.
    online: BTreeMap<Agent, (SessionId, BTreeSet<ServiceId>)>,
    tunnels: Vec<Tunnel>,
    /// Every session that there was, and its workspace.
    known: BTreeMap<SessionId, WorkspaceId>,
    /// Every ticket that was given out.
    given: Vec<Ticket>,
    claims: Vec<Claim>,
}

/// What a step must say, and to whom.
#[derive(Default, PartialEq, Eq, Debug)]
struct Expected {
    replies: BTreeSet<(SessionId, u64)>,
    cuts: Vec<u16>,
    closed: BTreeSet<SessionId>,
}

impl World {
    fn new() -> Self {
        static BEGINNING: OnceLock<Instant> = OnceLock::new();
        Self {
            router: Router::default(),
            now: *BEGINNING.get_or_init(Instant::now),
            drawn: 0,
            requests: 0,
            sessions: Vec::new(),
            online: BTreeMap::new(),
            tunnels: Vec::new(),
            known: BTreeMap::new(),
            given: Vec::new(),
            claims: Vec::new(),
        }
    }

    fn random(&mut self) -> [u8; 32] {
        self.drawn += 1;
        let mut random = [0; 32];
        random[..4].copy_from_slice(&self.drawn.to_be_bytes());
        random
    }

    fn pick(&self, number: u8) -> Option<SessionId> {
        let count = self.sessions.len().max(1);
        self.sessions.get(usize::from(number) % count).map(|session| session.id)
    }

    fn is_live(&self, id: SessionId) -> bool {
        self.sessions.iter().any(|session| session.id == id)
    }

    /// Takes tunnels out of the model and says what that must come to.
    fn end(&mut self, expected: &mut Expected, code: u16, which: impl Fn(&Tunnel) -> bool) {
        let (gone, kept) = std::mem::take(&mut self.tunnels).into_iter().partition(which);
        self.tunnels = kept;
        let gone: Vec<Tunnel> = gone;
        for tunnel in gone {
            if tunnel.stage == Stage::Asked && self.is_live(tunnel.reacher_session) {
                expected.replies.insert((tunnel.reacher_session, tunnel.request_id));
            }
            if tunnel.here.contains(&true) {
                expected.cuts.push(code);
            }
        }
    }

    fn forget(&mut self, id: SessionId, expected: &mut Expected) {
        self.sessions.retain(|session| session.id != id);
        self.end(expected, close::PEER_GONE, |tunnel| match tunnel.stage {
            Stage::Asked => tunnel.reacher_session == id || tunnel.exposer_session == id,
            Stage::Accepted => tunnel.reacher_session == id && !tunnel.here[0],
            Stage::Joined => false,
        });
    }

    fn log_out(&mut self, id: SessionId, expected: &mut Expected) {
        if self.is_live(id) {
            self.forget(id, expected);
            self.online.retain(|_, (session, _)| *session != id);
        }
    }

    /// Holds what the router said against what it had to say. Nothing goes to a stranger.
    fn check(&mut self, workspace: Option<WorkspaceId>, out: Vec<Output>, expected: &Expected) {
        let mut found = Expected::default();
        for output in out {
            match output {
                Output::Send(to, message) => {
                    assert!(self.is_live(to), "a message to a session that is over");
                    assert!(workspace.is_none_or(|workspace| self.known[&to] == workspace));
                    if let FromHub::Reply { id, reply: Reply::Error(_) } = message {
                        assert!(found.replies.insert((to, id)), "a request is answered once");
                    } else {
                        panic!("nobody asked for {message:?}");
                    }
                }
                Output::Close(session, ..) => {
                    assert!(workspace.is_none_or(|workspace| self.known[&session] == workspace));
                    assert!(found.closed.insert(session), "a session ends once");
                }
                Output::Cut(serial, code) => {
                    let live = self.tunnels.iter().any(|tunnel| tunnel.serial == Some(serial));
                    assert!(!live, "a tunnel is cut that goes on");
                    found.cuts.push(code);
                }
                Output::Record(of, Event::TunnelRefused { .. }) => {
                    assert!(workspace.is_none_or(|workspace| of == workspace));
                }
                Output::Record(_, event) => panic!("nothing else is to be recorded: {event:?}"),
            }
        }
        found.cuts.sort_unstable();
        assert_eq!(found, *expected);
    }

    fn log_in(&mut self, who: u8, kind: SessionKind, services: u8) {
        let (member, mut out, mut expected) = (member(who), Vec::new(), Expected::default());
        let key = member.key;
        let exposed: BTreeSet<_> =
            (0..3).filter(|bit| services >> bit & 1 == 1).map(service).collect();
        let handed = exposed.iter().copied().collect::<HashSet<_>>();
        let (id, displaced) = self.router.handle_login(member.clone(), kind, handed, &mut out);
        assert!(self.known.insert(id, key.0).is_none(), "a session is numbered once");
        if kind == SessionKind::Agent {
            let older = self.online.insert(key, (id, exposed));
            assert_eq!(older.is_some(), displaced);
            if let Some((older, _)) = older {
                self.forget(older, &mut expected);
                expected.closed.insert(older);
            }
        }
        self.sessions.push(Session { id, member });
        self.check(Some(key.0), out, &expected);
    }

    fn open(&mut self, from: SessionId, tunnel: u8, responder: u8, how: u8) {
        let session = self.sessions.iter().find(|session| session.id == from);
        let Some(Session { member, .. }) = session else { return };
        let (member, workspace) = (member.clone(), member.key.0);
        let share_id = if how & 0x10 == 0 { CredentialId::NONE } else { SHARE };
        let request = TunnelRequest {
            tunnel_id: TunnelId([tunnel % 6; 16]),
            service_id: service(how & 3),
            responder: AgentId([responder & 3; 16]),
            share_id,
            channel_id: ChannelId([9; 16]),
            tunnel_no: 0,
            encoding: if how & 0x20 == 0 { Encoding::Base64 } else { Encoding::Binary },
            message: Blob(vec![1]),
        };
        let key = (workspace, request.tunnel_id);
        let exposer = self.online.get(&(workspace, request.responder));
        let exposer = exposer.filter(|(_, services)| services.contains(&request.service_id));
        let exposer = exposer.map(|(session, _)| *session);
        let guest = member.role == AgentRole::Guest;
        let wanted = if member.role == AgentRole::Exposer
            || (share_id == SHARE) != guest
            || (guest && request.service_id != service(0))
        {
            Err(Some(ErrorCode::Forbidden))
        } else if exposer.is_none() {
            Err(None)
        } else if self.tunnels.iter().any(|tunnel| tunnel.key == key) {
            Err(Some(ErrorCode::AlreadyExists))
        } else {
            Ok(())
        };
        self.requests += 1;
        let (random, mut out, id) = (self.random(), Vec::new(), self.requests);
        let asked = request.clone();
        let done = self.router.handle_open(from, id, asked, random, self.now, &mut out);
        let found = done.map_err(|error| match error {
            OpenError::NotOnline => None,
            OpenError::Refused(report) => Some(report.code),
        });
        assert_eq!(found, wanted);
        if wanted.is_err() {
            assert_eq!(out, []);
            return;
        }
        let exposer_session = exposer.expect("it is online");
        let [Output::Send(to, FromHub::IncomingTunnel { initiator, request: told, ticket })] =
            &out[..]
        else {
            panic!("the exposer is asked, and nobody else: {out:?}");
        };
        assert_eq!((*to, *initiator, told), (exposer_session, member.key.1, &request));
        let ticket = self.given(ticket);
        self.tunnels.push(Tunnel {
            key,
            reacher: member.key.1,
            exposer: request.responder,
            encoding: request.encoding,
            stage: Stage::Asked,
            deadline: Some(self.now + HANDSHAKE_TIMEOUT),
            reacher_session: from,
            exposer_session,
            request_id: id,
            tickets: [None, Some(ticket)],
            here: [false; 2],
            serial: None,
        });
    }

    fn given(&mut self, ticket: &Ticket) -> Ticket {
        assert!(!self.given.contains(ticket), "a ticket is given out once");
        self.given.push(ticket.clone());
        ticket.clone()
    }

    /// The tunnel that a session is asked for.
    fn asked(&self, from: SessionId, tunnel: TunnelId) -> Option<usize> {
        let workspace = self.known[&from];
        self.tunnels.iter().position(|found| {
            found.key == (workspace, tunnel)
                && found.stage == Stage::Asked
                && found.exposer_session == from
                && self.is_live(from)
        })
    }

    fn accept(&mut self, from: SessionId, tunnel: TunnelId) {
        let (random, mut out) = (self.random(), Vec::new());
        let message = Blob(vec![2]);
        self.router.handle_accept(from, tunnel, message, random, self.now, &mut out);
        let Some(asked) = self.asked(from, tunnel) else {
            assert_eq!(out, []);
            return;
        };
        let [
            Output::Send(
                to,
                FromHub::Reply { id, reply: Reply::TunnelAccepted { message, ticket } },
            ),
        ] = &out[..]
        else {
            panic!("the reacher is told, and nobody else: {out:?}");
        };
        assert!(self.is_live(*to) && message.0 == [2]);
        let ticket = self.given(ticket);
        let deadline = self.now + HANDSHAKE_TIMEOUT;
        let accepted = &mut self.tunnels[asked];
        assert_eq!((*to, *id), (accepted.reacher_session, accepted.request_id));
        accepted.stage = Stage::Accepted;
        accepted.tickets[0] = Some(ticket);
        accepted.deadline = Some(deadline);
    }

    fn refuse(&mut self, from: SessionId, tunnel: TunnelId) {
        let (mut out, mut expected) = (Vec::new(), Expected::default());
        self.router.handle_refuse(from, tunnel, ErrorCode::Refused, &mut out);
        if let Some(asked) = self.asked(from, tunnel) {
            // An exposer that is here already learns it from its own refusal.
            let refused = self.tunnels.remove(asked);
            expected.replies.insert((refused.reacher_session, refused.request_id));
        }
        self.check(Some(self.known[&from]), out, &expected);
    }

    fn claim(&mut self, ticket: &Ticket, encoding: Encoding) {
        let now = self.now;
        let found = self.tunnels.iter_mut().find_map(|tunnel| {
            let end = tunnel.tickets.iter().position(|held| held.as_ref() == Some(ticket))?;
            tunnel.tickets[end] = None;
            Some((tunnel, end))
        });
        let wanted = match &found {
            None => Err(ClaimError::Unknown),
            Some((tunnel, _)) if tunnel.deadline.is_some_and(|at| now >= at) => {
                Err(ClaimError::Unknown)
            }
            Some((tunnel, _)) if tunnel.encoding != encoding => Err(ClaimError::Encoding),
            Some((tunnel, end)) => Ok((tunnel.key, *end)),
        };
        let claimed = self.router.handle_claim(ticket, encoding, now);
        let end_of = |side| usize::from(side == Side::Exposer);
        let shown = claimed.as_ref().map(|claim| (claim.tunnel, end_of(claim.side)));
        assert_eq!(shown.map_err(|error| *error), wanted);
        let (Ok(claim), Some((tunnel, end))) = (claimed, found) else { return };
        assert!(tunnel.serial.is_none_or(|serial| serial == claim.serial));
        let parties = (claim.parties.reacher, claim.parties.exposer);
        assert_eq!(parties, (tunnel.reacher, tunnel.exposer));
        tunnel.serial = Some(claim.serial);
        tunnel.here[end] = true;
        if tunnel.here == [true; 2] {
            tunnel.stage = Stage::Joined;
            tunnel.deadline = None;
        }
        self.claims.push(claim);
    }

    fn of(agent: Agent) -> impl Fn(&Tunnel) -> bool {
        move |tunnel| {
            tunnel.key.0 == agent.0 && (tunnel.reacher == agent.1 || tunnel.exposer == agent.1)
        }
    }

    /// An agent is revoked, or has to log in again.
    fn close(&mut self, agent: Agent, revoked: bool) {
        let (mut out, mut expected) = (Vec::new(), Expected::default());
        if revoked {
            let report = ErrorReport::new(ErrorCode::Revoked, "revoked");
            self.router.handle_end(agent, &report, self.now, &mut out);
            let later = self.now + REVOKED_GRACE;
            let mine = Self::of(agent);
            for tunnel in &mut self.tunnels {
                if mine(tunnel) && tunnel.stage == Stage::Joined {
                    tunnel.deadline.get_or_insert(later);
                }
            }
            self.end(&mut expected, close::REVOKED, |tunnel| {
                mine(tunnel) && tunnel.stage != Stage::Joined
            });
        } else {
            self.router.handle_recall(agent, &mut out);
        }
        // Of the tunnels that end here, those told to itself are told before its sessions end.
        let own: Vec<_> =
            self.sessions.iter().filter(|session| session.member.key == agent).collect();
        let own: Vec<_> = own.into_iter().map(|session| session.id).collect();
        let told: BTreeSet<_> = own.iter().copied().collect();
        let before: Vec<_> = self.sessions.iter().map(|session| session.id).collect();
        for id in own {
            self.log_out(id, &mut expected);
            expected.closed.insert(id);
        }
        // Checked as of the moment at which it was said.
        let gone: Vec<_> = before.into_iter().filter(|id| told.contains(id)).collect();
        self.check_with(agent.0, out, expected, &gone);
    }

    /// As [`World::check`], where some sessions ended only after they were told.
    fn check_with(
        &mut self,
        workspace: WorkspaceId,
        out: Vec<Output>,
        mut expected: Expected,
        gone: &[SessionId],
    ) {
        let mut kept = Vec::new();
        for output in out {
            if let Output::Send(to, FromHub::Reply { id, reply: Reply::Error(_) }) = &output
                && gone.contains(to)
            {
                assert!(expected.replies.remove(&(*to, *id)), "a request is answered once");
            } else {
                kept.push(output);
            }
        }
        expected.cuts.sort_unstable();
        self.check(Some(workspace), kept, &expected);
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        let (now, mut out, mut expected) = (self.now, Vec::new(), Expected::default());
        self.router.handle_timeout(now, &mut out);
        let due = |tunnel: &Tunnel| tunnel.deadline.is_some_and(|at| at <= now);
        let mut replies = BTreeSet::new();
        for tunnel in self.tunnels.iter().filter(|tunnel| due(tunnel)) {
            match tunnel.stage {
                Stage::Asked => {
                    replies.insert((tunnel.reacher_session, tunnel.request_id));
                }
                // Whoever is here notices by itself that nobody comes.
                Stage::Accepted => {}
                Stage::Joined => expected.cuts.push(close::REVOKED),
            }
        }
        expected.replies = replies;
        self.tunnels.retain(|tunnel| !due(tunnel));
        self.check(None, out, &expected);
    }

    /// The router and the model agree on everything that can be seen.
    fn invariant_the_model_agrees(&self) {
        let count = |stage| self.tunnels.iter().filter(|tunnel| tunnel.stage == stage).count();
        let workspaces: BTreeSet<_> =
            self.sessions.iter().map(|session| session.member.key.0).collect();
        let census = Census {
            sessions: self.sessions.len(),
            workspaces: workspaces.len(),
            tunnels_asked: count(Stage::Asked),
            tunnels_accepted: count(Stage::Accepted),
            tunnels_open: count(Stage::Joined),
        };
        assert_eq!(self.router.census(), census);
        let next = self.tunnels.iter().filter_map(|tunnel| tunnel.deadline).min();
        assert_eq!(self.router.poll_timeout(), next);
        for number in 0..8 {
            let agent = agent(number);
            assert_eq!(self.router.is_online(&agent), self.online.contains_key(&agent));
        }
        for workspace in [agent(0).0, agent(4).0] {
            let of_it =
                |tunnel: &&Tunnel| tunnel.key.0 == workspace && tunnel.stage == Stage::Joined;
            let mut joined: Vec<_> =
                self.tunnels.iter().filter(of_it).map(|tunnel| tunnel.key.1).collect();
            joined.sort_unstable();
            let listed = self.router.joined_tunnels(workspace, None, 100);
            assert_eq!(listed.iter().map(|tunnel| tunnel.id).collect::<Vec<_>>(), joined);
            assert_eq!(self.router.has_sessions(workspace), workspaces.contains(&workspace));
        }
        for claim in &self.claims {
            let is_open = self.tunnels.iter().any(|tunnel| tunnel.serial == Some(claim.serial));
            assert_eq!(self.router.is_open(claim), is_open);
        }
    }

    fn step(&mut self, [action, one, two, three]: [u8; 4]) {
        let tunnel = TunnelId([two % 6; 16]);
        let encoding = if three & 0x20 == 0 { Encoding::Base64 } else { Encoding::Binary };
        let session = self.pick(one);
        match (action % 16, session) {
            (0 | 1, _) => self.log_in(one & 7, SessionKind::Agent, three),
            (2, _) => self.log_in(one & 7, SessionKind::Command, three),
            (3, Some(id)) => {
                let (mut out, mut expected) = (Vec::new(), Expected::default());
                self.router.handle_logout(id, &mut out);
                self.log_out(id, &mut expected);
                expected.cuts.sort_unstable();
                self.check(Some(self.known[&id]), out, &expected);
            }
            (4 | 5, Some(id)) => self.open(id, two, three >> 2, three & 0x30 | three & 3),
            (6 | 7, Some(id)) => self.accept(id, tunnel),
            (8, Some(id)) => self.refuse(id, tunnel),
            (9 | 10, _) if !self.given.is_empty() => {
                // The latest ones first: zero is what a fuzzer likes.
                let at = self.given.len() - 1 - usize::from(two) % self.given.len();
                let ticket = self.given[at].clone();
                self.claim(&ticket, encoding);
            }
            (11, _) if !self.claims.is_empty() => {
                let claim = self.claims[usize::from(two) % self.claims.len()];
                self.router.handle_closed(&claim);
                self.tunnels.retain(|tunnel| tunnel.serial != Some(claim.serial));
            }
            (12, _) => {
                let key = (agent(one & 7).0, tunnel);
                let (mut out, mut expected) = (Vec::new(), Expected::default());
                let joined = |tunnel: &Tunnel| tunnel.key == key && tunnel.stage == Stage::Joined;
                let found = self.tunnels.iter().any(joined);
                assert_eq!(self.router.handle_cut(key, &mut out), found);
                self.end(&mut expected, close::CUT, joined);
                self.check(Some(key.0), out, &expected);
            }
            (13, _) => {
                let agent = agent(one & 7);
                match two % 6 {
                    0 | 1 => {
                        self.router.handle_expose(&agent, service(three));
                        if let Some((_, services)) = self.online.get_mut(&agent) {
                            services.insert(service(three));
                        }
                    }
                    2 => {
                        self.router.handle_unexpose(&agent, service(three));
                        if let Some((_, services)) = self.online.get_mut(&agent) {
                            services.remove(&service(three));
                        }
                    }
                    3 => {
                        let (mut out, mut expected) = (Vec::new(), Expected::default());
                        self.router.handle_moved(agent, &mut out);
                        self.end(&mut expected, close::PEER_GONE, Self::of(agent));
                        self.check(Some(agent.0), out, &expected);
                    }
                    4 => self.close(agent, true),
                    _ => self.close(agent, false),
                }
            }
            (14, _) => self.pass(Duration::from_millis(u64::from(two) * u64::from(three))),
            _ => self.claim(&Ticket::new([three; 32]), encoding),
        }
        self.invariant_the_model_agrees();
    }
}

/// Whatever agents do in whatever order, the router says what the model says, and nothing to strangers.
pub(crate) fn run(input: &[u8]) {
    let (steps, _) = input.as_chunks::<4>();
    if steps.is_empty() {
        return;
    }
    let mut world = World::new();
    steps.iter().take(MOST_STEPS).for_each(|step| world.step(*step));
    // In the end nothing stays behind.
    for id in world.sessions.iter().map(|session| session.id).collect::<Vec<_>>() {
        let (mut out, mut expected) = (Vec::new(), Expected::default());
        world.router.handle_logout(id, &mut out);
        world.log_out(id, &mut expected);
        expected.cuts.sort_unstable();
        world.check(None, out, &expected);
    }
    for claim in world.claims.clone() {
        world.router.handle_closed(&claim);
        world.tunnels.retain(|tunnel| tunnel.serial != Some(claim.serial));
    }
    world.pass(HANDSHAKE_TIMEOUT + REVOKED_GRACE);
    world.invariant_the_model_agrees();
    assert_eq!(world.router.census(), Census::default());
}

/// Sessions and tunnels of different kinds.
pub(crate) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let seed = |steps: &[[u8; 4]]| steps.concat();
    let begin = [[0, 1, 0, 7], [0, 0, 0, 1], [4, 1, 1, 4]];
    let joined = [[9, 0, 0, 0], [6, 0, 1, 0], [9, 0, 0, 0]];
    let with = |more: &[[u8; 4]]| seed(&[&begin[..], &joined[..], more].concat());
    vec![
        ("joined", with(&[[12, 0, 1, 0]])),
        ("closed", with(&[[11, 0, 0, 0]])),
        ("revoked", with(&[[13, 0, 4, 0], [14, 0, 40, 40]])),
        ("moved", with(&[[13, 1, 3, 0]])),
        ("refused", seed(&[&begin[..], &[[8, 0, 1, 0]]].concat())),
        ("late", seed(&[&begin[..], &[[14, 0, 200, 200], [9, 0, 0, 0]]].concat())),
        ("displaced", seed(&[&begin[..], &[[0, 1, 0, 7]]].concat())),
        ("guest", seed(&[[0, 0, 0, 7], [0, 3, 0, 0], [4, 1, 2, 0x10], [9, 0, 0, 0x20]])),
        ("namesake", seed(&[[0, 1, 0, 7], [0, 4, 0, 0], [4, 1, 1, 4], [2, 2, 0, 0], [4, 2, 1, 4]])),
    ]
}
