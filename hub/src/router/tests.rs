use std::time::Duration;

use super::*;

const WORKSPACE: WorkspaceId = WorkspaceId([0xaa; 32]);
const OTHER_WORKSPACE: WorkspaceId = WorkspaceId([0xbb; 32]);
const REACHER: AgentId = AgentId([1; 16]);
const EXPOSER: AgentId = AgentId([2; 16]);
const SERVICE: ServiceId = ServiceId([3; 16]);

/// A router with a clock, one exposer and one reacher.
struct World {
    router: Router,
    now: Instant,
    reacher: SessionId,
    exposer: SessionId,
    random: u64,
}

fn member(workspace: WorkspaceId, agent: AgentId) -> Member {
    Member {
        key: (workspace, agent),
        identity: IdentityKey([0; 32]),
        serial: 0,
        role: AgentRole::Member,
        share: None,
    }
}

fn request(tunnel: u8) -> TunnelRequest {
    TunnelRequest {
        tunnel_id: TunnelId([tunnel; 16]),
        service_id: SERVICE,
        responder: EXPOSER,
        share_id: CredentialId::NONE,
        channel_id: connect_spec::ids::ChannelId([9; 16]),
        tunnel_no: 0,
        encoding: Encoding::Base64,
        message: vec![1, 2, 3].into(),
    }
}

impl World {
    fn new() -> Self {
        let mut router = Router::default();
        let mut out = Vec::new();
        let services = HashSet::from([SERVICE]);
        let (exposer, _) =
            router.handle_login(member(WORKSPACE, EXPOSER), SessionKind::Agent, services, &mut out);
        let (reacher, _) = router.handle_login(
            member(WORKSPACE, REACHER),
            SessionKind::Agent,
            HashSet::new(),
            &mut out,
        );
        assert_eq!(out, []);
        Self { router, now: Instant::now(), reacher, exposer, random: 0 }
    }

    fn random(&mut self) -> [u8; 32] {
        self.random += 1;
        let mut random = [0; 32];
        random[..8].copy_from_slice(&self.random.to_be_bytes());
        random
    }

    fn log_in(&mut self, member: Member, kind: SessionKind) -> SessionId {
        self.router.handle_login(member, kind, HashSet::new(), &mut Vec::new()).0
    }

    fn open_as(
        &mut self,
        from: SessionId,
        id: u64,
        request: TunnelRequest,
    ) -> Result<Vec<Output>, OpenError> {
        let (random, mut out) = (self.random(), Vec::new());
        self.router.handle_open(from, id, request, random, self.now, &mut out)?;
        self.invariant_loads_match_tunnels();
        Ok(out)
    }

    /// Opens a tunnel and gives the exposer's ticket.
    fn open(&mut self, tunnel: u8) -> Ticket {
        let out = self.open_as(self.reacher, tunnel.into(), request(tunnel)).unwrap();
        match out.as_slice() {
            [Output::Send(to, FromHub::IncomingTunnel { initiator, request, ticket })] => {
                assert_eq!((*to, *initiator), (self.exposer, REACHER));
                assert_eq!(request.tunnel_id, TunnelId([tunnel; 16]));
                ticket.clone()
            }
            other => panic!("{other:?}"),
        }
    }

    /// Accepts a tunnel and gives the reacher's ticket.
    fn accept(&mut self, tunnel: u8) -> Ticket {
        let (random, mut out) = (self.random(), Vec::new());
        let message = vec![4].into();
        self.router.handle_accept(
            self.exposer,
            TunnelId([tunnel; 16]),
            message,
            random,
            self.now,
            &mut out,
        );
        self.invariant_loads_match_tunnels();
        match out.as_slice() {
            [
                Output::Send(
                    to,
                    FromHub::Reply { id, reply: Reply::TunnelAccepted { message, ticket } },
                ),
            ] => {
                assert_eq!(
                    (*to, *id, message.0.as_slice()),
                    (self.reacher, tunnel.into(), [4].as_slice())
                );
                ticket.clone()
            }
            other => panic!("{other:?}"),
        }
    }

    fn claim(&mut self, ticket: &Ticket) -> Result<Side, ClaimError> {
        self.try_claim(ticket).map(|claim| claim.side)
    }

    fn try_claim(&mut self, ticket: &Ticket) -> Result<Claim, ClaimError> {
        let claim = self.router.handle_claim(ticket, Encoding::Base64, self.now);
        self.invariant_loads_match_tunnels();
        claim
    }

    fn pass(&mut self, time: Duration) -> Vec<Output> {
        self.now += time;
        let mut out = Vec::new();
        self.router.handle_timeout(self.now, &mut out);
        self.invariant_loads_match_tunnels();
        out
    }

    fn invariant_loads_match_tunnels(&self) {
        let mut tunnels: HashMap<AgentKey, (usize, usize)> = HashMap::new();
        for (key, tunnel) in &self.router.tunnels {
            tunnels.entry((key.0, tunnel.parties.reacher)).or_default().0 += 1;
            let exposer = tunnels.entry((key.0, tunnel.parties.exposer)).or_default();
            exposer.0 += 1;
            exposer.1 += usize::from(tunnel.stage == Stage::Asked);
            let has_deadline = self.router.deadlines.contains(&(tunnel.deadline, *key));
            assert_eq!(has_deadline, !matches!(tunnel.stage, Stage::Joined(_)));
        }
        for (agent, load) in &self.router.loads {
            let counted = tunnels.remove(agent).unwrap_or_default();
            assert_eq!((load.tunnels, load.unanswered), counted);
        }
        assert!(tunnels.is_empty());
        for (key, _) in self.router.tickets.clone().into_values() {
            assert!(self.router.tunnels.contains_key(&key), "a ticket outlived its tunnel");
        }
    }
}

fn refusal(outcome: Result<Vec<Output>, OpenError>) -> ErrorCode {
    match outcome {
        Err(OpenError::Refused(report)) => report.code,
        other => panic!("{other:?}"),
    }
}

/// The code of the only output: an error reply to the reacher, which is recorded.
fn replied(world: &World, out: &[Output]) -> ErrorCode {
    match out {
        [
            Output::Record(_, Event::TunnelRefused { agent_id: REACHER, code, count: 1, .. }),
            Output::Send(to, FromHub::Reply { reply: Reply::Error(report), .. }),
        ] if *to == world.reacher && *code == report.code => report.code,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_tunnel_is_asked_accepted_and_joined() {
    let mut world = World::new();
    let exposer = world.open(1);
    let reacher = world.accept(1);
    assert_eq!(world.claim(&exposer), Ok(Side::Exposer));
    let claim = world.try_claim(&reacher).unwrap();
    assert_eq!(claim.side, Side::Reacher);
    assert_eq!(world.router.poll_timeout(), None);
    // Joined, it needs neither control socket.
    world.router.handle_logout(world.exposer, &mut Vec::new());
    world.router.handle_logout(world.reacher, &mut Vec::new());
    assert_eq!(world.router.tunnels.len(), 1);
    world.router.handle_closed(&claim);
    world.invariant_loads_match_tunnels();
    assert!(world.router.tunnels.is_empty());
}

#[test]
fn a_ticket_admits_once_in_time_and_in_its_encoding() {
    let mut world = World::new();
    let ticket = world.open(1);
    assert_eq!(world.claim(&ticket), Ok(Side::Exposer));
    assert_eq!(world.claim(&ticket), Err(ClaimError::Unknown));
    assert_eq!(world.claim(&Ticket::new([99; 32])), Err(ClaimError::Unknown));
    let ticket = world.open(2);
    let claim = world.router.handle_claim(&ticket, Encoding::Binary, world.now);
    assert_eq!(claim, Err(ClaimError::Encoding));
    let ticket = world.open(3);
    world.now += HANDSHAKE_TIMEOUT;
    assert_eq!(world.claim(&ticket), Err(ClaimError::Unknown));
}

#[test]
fn an_exposer_that_says_nothing_times_out() {
    let mut world = World::new();
    let ticket = world.open(1);
    assert_eq!(world.pass(HANDSHAKE_TIMEOUT - Duration::from_millis(1)), []);
    let out = world.pass(Duration::from_millis(1));
    assert_eq!(replied(&world, &out), ErrorCode::Timeout);
    assert_eq!(world.claim(&ticket), Err(ClaimError::Unknown));
    // Its answer comes too late and moves nothing.
    let mut out = Vec::new();
    let now = world.now;
    world.router.handle_accept(
        world.exposer,
        TunnelId([1; 16]),
        Blob::default(),
        [7; 32],
        now,
        &mut out,
    );
    assert_eq!(out, []);
}

#[test]
fn an_accepted_tunnel_that_nobody_joins_is_forgotten() {
    let mut world = World::new();
    world.open(1);
    world.pass(HANDSHAKE_TIMEOUT / 2);
    let reacher = world.accept(1);
    // The time runs anew from the acceptance.
    assert_eq!(world.pass(HANDSHAKE_TIMEOUT / 2), []);
    assert_eq!(world.router.tunnels.len(), 1);
    let out = world.pass(HANDSHAKE_TIMEOUT / 2);
    let refused = Event::TunnelRefused {
        agent_id: REACHER,
        peer_id: EXPOSER,
        service_id: SERVICE,
        code: ErrorCode::Timeout,
        count: 1,
    };
    assert_eq!(out, [Output::Record(WORKSPACE, refused)]);
    assert_eq!(world.router.tunnels.len(), 0);
    assert_eq!(world.claim(&reacher), Err(ClaimError::Unknown));
}

#[test]
fn a_refusal_reaches_the_reacher_with_its_code() {
    let mut world = World::new();
    world.open(1);
    let mut out = Vec::new();
    world.router.handle_refuse(
        world.exposer,
        TunnelId([1; 16]),
        ErrorCode::IssuerUnknown,
        &mut out,
    );
    assert_eq!(replied(&world, &out), ErrorCode::IssuerUnknown);
    world.invariant_loads_match_tunnels();
}

#[test]
fn only_the_exposer_that_was_asked_can_answer() {
    let mut world = World::new();
    world.open(1);
    let namesake = world.log_in(member(OTHER_WORKSPACE, EXPOSER), SessionKind::Agent);
    let command = world.log_in(member(WORKSPACE, EXPOSER), SessionKind::Command);
    let now = world.now;
    for from in [world.reacher, namesake, command] {
        let mut out = Vec::new();
        let tunnel = TunnelId([1; 16]);
        world.router.handle_accept(from, tunnel, Blob::default(), [7; 32], now, &mut out);
        world.router.handle_refuse(from, tunnel, ErrorCode::Refused, &mut out);
        assert_eq!(out, []);
    }
    world.accept(1);
}

#[test]
fn when_an_end_goes_half_way_the_other_is_told() {
    let mut world = World::new();
    world.open(1);
    let mut out = Vec::new();
    world.router.handle_logout(world.exposer, &mut out);
    assert_eq!(replied(&world, &out), ErrorCode::Offline);
    world.invariant_loads_match_tunnels();
    assert!(matches!(world.open_as(world.reacher, 2, request(2)), Err(OpenError::NotOnline)));

    let mut world = World::new();
    let ticket = world.open(1);
    world.router.handle_logout(world.reacher, &mut Vec::new());
    world.invariant_loads_match_tunnels();
    assert_eq!(world.claim(&ticket), Err(ClaimError::Unknown));
}

#[test]
fn a_reacher_that_goes_before_its_data_socket_came_ends_the_tunnel() {
    let mut world = World::new();
    let exposer = world.open(1);
    let claim = world.try_claim(&exposer).unwrap();
    let reacher = world.accept(1);
    let mut out = Vec::new();
    world.router.handle_logout(world.reacher, &mut out);
    assert_eq!(out, [Output::Cut(claim.serial, close::PEER_GONE)]);
    world.invariant_loads_match_tunnels();
    assert!(!world.router.is_open(&claim));
    assert_eq!(world.claim(&reacher), Err(ClaimError::Unknown));

    // The exposer's session is not needed once it has accepted.
    let mut world = World::new();
    let exposer = world.open(1);
    let reacher = world.accept(1);
    world.router.handle_logout(world.exposer, &mut Vec::new());
    assert_eq!(world.claim(&reacher), Ok(Side::Reacher));
    assert_eq!(world.claim(&exposer), Ok(Side::Exposer));
}

#[test]
fn an_agent_that_is_ended_loses_its_sessions_and_tunnels_and_no_other_does() {
    let mut world = World::new();
    let command = world.log_in(member(WORKSPACE, REACHER), SessionKind::Command);
    let third = world.log_in(member(WORKSPACE, AgentId([3; 16])), SessionKind::Agent);
    let elsewhere = world.log_in(member(OTHER_WORKSPACE, REACHER), SessionKind::Agent);
    let exposer = world.open(1);
    let joined = world.try_claim(&exposer).unwrap();
    let reacher = world.accept(1);
    world.claim(&reacher).unwrap();
    world.open(2);
    let out = world.open_as(third, 7, request(3)).unwrap();
    assert!(matches!(&out[..], [Output::Send(_, FromHub::IncomingTunnel { .. })]));

    let mut out = Vec::new();
    let report = ErrorReport::new(ErrorCode::Revoked, "revoked");
    world.router.handle_end((WORKSPACE, REACHER), &report, world.now, &mut out);
    let closed = |session| Output::Close(session, report.clone(), close::REVOKED);
    // Its peer has a moment to end the channel by its own word, however often the end is told.
    let cut = Output::Cut(joined.serial, close::REVOKED);
    assert!(!out.contains(&cut));
    let later = world.now + REVOKED_GRACE;
    world.router.handle_end((WORKSPACE, REACHER), &report, later, &mut Vec::new());
    let mut cuts = Vec::new();
    world.router.handle_timeout(later, &mut cuts);
    assert_eq!(cuts, [cut]);
    world.invariant_loads_match_tunnels();
    assert!(out.contains(&closed(world.reacher)) && out.contains(&closed(command)));
    assert!(!out.contains(&closed(third)) && !out.contains(&closed(elsewhere)));
    assert_eq!(world.router.tunnels.len(), 1, "the tunnel of the third goes on");
    assert!(!world.router.is_online(&(WORKSPACE, REACHER)));
    assert!(world.router.is_online(&(OTHER_WORKSPACE, REACHER)));
    assert_eq!(world.router.agents_of(WORKSPACE), [EXPOSER, AgentId([3; 16])].into());

    // The exposer's end tells whoever waits for its answer.
    let mut out = Vec::new();
    world.router.handle_end((WORKSPACE, EXPOSER), &report, world.now, &mut out);
    let [
        Output::Record(WORKSPACE, Event::TunnelRefused { .. }),
        Output::Send(to, FromHub::Reply { id: 7, reply: Reply::Error(told) }),
        closing,
    ] = &out[..]
    else {
        panic!("{out:?}");
    };
    assert_eq!((*to, told.code), (third, ErrorCode::Offline));
    assert_eq!(*closing, closed(world.exposer));
    world.invariant_loads_match_tunnels();
    world.router.handle_logout(third, &mut Vec::new());
    assert!(!world.router.has_sessions(WORKSPACE));
    assert!(world.router.has_sessions(OTHER_WORKSPACE));
}

#[test]
fn tunnels_of_an_agent_that_moved_end_at_once_and_no_others() {
    for moved in [EXPOSER, REACHER] {
        let mut world = World::new();
        let exposer = world.open(1);
        let reacher = world.accept(1);
        world.claim(&exposer).unwrap();
        let joined = world.try_claim(&reacher).unwrap();
        world.open(2);
        let mut out = Vec::new();
        world.router.handle_moved((WORKSPACE, AgentId([0x77; 16])), &mut out);
        world.router.handle_moved((OTHER_WORKSPACE, moved), &mut out);
        assert_eq!(out, []);
        world.router.handle_moved((WORKSPACE, moved), &mut out);
        assert_eq!(out[0], Output::Cut(joined.serial, close::PEER_GONE));
        assert_eq!(replied(&world, &out[1..]), ErrorCode::Offline);
        world.invariant_loads_match_tunnels();
        // The end that was cut reports it, and nothing is left to do.
        world.router.handle_closed(&joined);
        world.open(3);
    }
}

#[test]
fn the_newest_agent_session_displaces_and_commands_do_not() {
    let mut world = World::new();
    world.log_in(member(WORKSPACE, EXPOSER), SessionKind::Command);
    world.open(1);
    let mut out = Vec::new();
    let services = HashSet::from([SERVICE]);
    let (newer, displaced) = world.router.handle_login(
        member(WORKSPACE, EXPOSER),
        SessionKind::Agent,
        services,
        &mut out,
    );
    assert!(displaced);
    let older = world.exposer;
    assert_eq!(replied(&world, &out[..2]), ErrorCode::Offline);
    assert!(matches!(&out[2..], [Output::Close(session, report, close::DISPLACED)]
            if *session == older && report.code == ErrorCode::Displaced));
    // The older one leaving does not take the newer one down.
    world.router.handle_logout(older, &mut Vec::new());
    assert!(world.router.is_online(&(WORKSPACE, EXPOSER)));
    world.exposer = newer;
    world.open(2);
}

#[test]
fn services_come_and_go() {
    let mut world = World::new();
    let exposer = (WORKSPACE, EXPOSER);
    world.router.handle_unexpose(&exposer, SERVICE);
    assert_eq!(world.open_as(world.reacher, 1, request(1)), Err(OpenError::NotOnline));
    world.router.handle_expose(&exposer, SERVICE);
    world.open(1);
}

#[test]
fn another_workspace_finds_nothing_and_learns_nothing() {
    let mut world = World::new();
    world.open(1);
    let stranger = world.log_in(member(OTHER_WORKSPACE, REACHER), SessionKind::Agent);
    assert_eq!(world.open_as(stranger, 1, request(2)), Err(OpenError::NotOnline));
    // Not even whether an id is in use.
    assert_eq!(world.open_as(stranger, 1, request(1)), Err(OpenError::NotOnline));
}

#[test]
fn roles_and_shares_bind() {
    let mut world = World::new();
    let mut exposer_only = member(WORKSPACE, AgentId([5; 16]));
    exposer_only.role = AgentRole::Exposer;
    let exposer_only = world.log_in(exposer_only, SessionKind::Agent);
    assert_eq!(refusal(world.open_as(exposer_only, 1, request(1))), ErrorCode::Forbidden);

    let share = CredentialId([6; 16]);
    let guest = |services: Vec<ServiceId>| Member {
        role: AgentRole::Guest,
        share: Some((share, services)),
        ..member(WORKSPACE, AgentId([6; 16]))
    };
    let outsider = world.log_in(guest(vec![ServiceId([8; 16])]), SessionKind::Agent);
    assert_eq!(
        refusal(world.open_as(outsider, 1, TunnelRequest { share_id: share, ..request(2) })),
        ErrorCode::Forbidden
    );
    let guest = world.log_in(guest(vec![SERVICE]), SessionKind::Agent);
    assert_eq!(refusal(world.open_as(guest, 1, request(3))), ErrorCode::Forbidden);
    world.open_as(guest, 1, TunnelRequest { share_id: share, ..request(4) }).unwrap();
    let member_with_share = TunnelRequest { share_id: share, ..request(5) };
    assert_eq!(refusal(world.open_as(world.reacher, 1, member_with_share)), ErrorCode::Forbidden);
}

#[test]
fn a_tunnel_id_is_used_once_at_a_time() {
    let mut world = World::new();
    world.open(1);
    assert_eq!(refusal(world.open_as(world.reacher, 2, request(1))), ErrorCode::AlreadyExists);
}

#[test]
fn a_tunnel_that_had_the_same_id_before_has_no_say() {
    let mut world = World::new();
    let ticket = world.open(1);
    let before = world.try_claim(&ticket).unwrap();
    world.pass(HANDSHAKE_TIMEOUT);
    let ticket = world.open(1);
    world.router.handle_closed(&before);
    let claim = world.try_claim(&ticket).unwrap();
    assert_ne!(claim.serial, before.serial);
}

#[test]
fn opens_are_limited_and_the_wait_is_told() {
    let mut world = World::new();
    let mut opened = 0;
    let wait = loop {
        let mut next = request(0);
        next.tunnel_id.0[..4].copy_from_slice(&u32::to_be_bytes(opened));
        match world.open_as(world.reacher, 1, next) {
            Ok(_) => opened += 1,
            Err(OpenError::Refused(report)) if report.code == ErrorCode::RateLimited => {
                break report.retry_in_ms.unwrap();
            }
            Err(other) => panic!("{other:?}"),
        }
    };
    assert_eq!(opened, OPENS_PER_SEC);
    world.now += Duration::from_millis(wait.into());
    world.open(200);
    assert_eq!(refusal(world.open_as(world.reacher, 1, request(201))), ErrorCode::RateLimited);
    world.now += Duration::from_secs(1);
    for tunnel in 210..250 {
        world.open(tunnel);
    }
}

#[test]
fn an_exposer_has_a_limit_of_unanswered_tunnels() {
    let mut world = World::new();
    for number in 0..u32::try_from(MAX_HALF_OPEN).unwrap() {
        let mut next = request(0);
        next.tunnel_id.0[..4].copy_from_slice(&number.to_be_bytes());
        world.now += Duration::from_millis(20);
        world.open_as(world.reacher, 1, next).unwrap();
    }
    world.now += Duration::from_millis(20);
    match world.open_as(world.reacher, 1, request(255)) {
        Err(OpenError::Refused(report)) => {
            assert_eq!(report.code, ErrorCode::Busy);
            assert_eq!(report.retry_in_ms, Some(1000));
        }
        other => panic!("{other:?}"),
    }
}
