//! A hub that lies about who is a member and what the trust log says: one test for each lie. The lies
//! themselves are in `connect_tests::lies`, for `connect-hostile-hub` tells them too.
//!
//! Whatever the hub says, the agent refuses with exit code 7 or 6, or no tunnel opens; its log names
//! the event, no target is dialled, and no byte of a connection is readable on the wire.

use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use connect_spec::{
    bytes::Blob,
    control::{Reply, Request, SessionKind},
    log::{Change, Entry, LogEntry},
    objects::UnixTime,
    record::CloseCode,
};
use nix::sys::signal::Signal;
use serde_json::Value;

use connect_tests::{
    PATIENCE,
    client::{Client, Keys},
    eventually,
    home::{Home, Workspace},
    hub::Hub,
    lies::{self, Claimed, Help, Lie, LyingHub, SWAPS, Summary, UNSIGNED, What},
    process::{Outcome, Process, program},
    random_word, runtime,
    search::Search,
    services::Service,
};

/// A workspace whose agents all have the lying hub for their hub. Its founder exposes `prod-db`.
struct Stage {
    hub: LyingHub,
    workspace: Workspace,
    reacher: Home,
    service: Service,
    exposing: Process,
    canary: String,
}

impl Stage {
    fn set() -> Self {
        let hub = LyingHub::before(Hub::shared());
        let workspace = Workspace::found_at(&hub.url());
        let reacher = workspace.join("reacher");
        let exposing = workspace.founder.up();
        let service = Service::echo();
        workspace.founder.ok(&["expose", &service.address().to_string(), "--name", "prod-db"]);
        service.probed();
        let canary = format!("canary-{}", random_word());
        Self { hub, workspace, reacher, service, exposing, canary }
    }

    fn founder(&self) -> &Home {
        &self.workspace.founder
    }

    /// Lies with the keys of a member.
    fn tell_with(&self, lie: Lie, accomplice: &Home) {
        let accomplice = Some(Arc::new(Keys::of(accomplice)));
        self.hub.tell(lie, Help { accomplice, ..Help::default() });
    }

    /// No target is dialled while `act` goes on.
    #[track_caller]
    fn without_dialling<T>(&self, act: impl FnOnce() -> T) -> T {
        let before = self.service.accepted();
        let result = act();
        assert_eq!(self.service.accepted(), before, "the target was dialled");
        result
    }

    /// Waits until every knock was answered, always with a refusal; returns how many there were.
    #[track_caller]
    fn knocks_are_refused(&self) -> usize {
        self.without_dialling(|| {
            let before = self.hub.summary();
            self.hub.knock();
            let knocks = self.hub.summary().told - before.told;
            assert!(knocks > 0, "nobody knocked");
            eventually("each knock is answered", || {
                let now = self.hub.summary();
                now.refused + now.believed == before.refused + before.believed + knocks
            });
            let reports = self.hub.reports();
            assert_eq!(self.hub.summary().believed, before.believed, "{reports:?}");
            knocks
        })
    }

    /// The lie was told, and nobody believed it.
    #[track_caller]
    fn nobody_believed(&self) -> Summary {
        let summary = self.hub.summary();
        let reports = self.hub.reports();
        assert!(summary.told > 0, "the lie was not told");
        assert_eq!(summary.believed, 0, "{reports:?}");
        summary
    }

    /// With an honest hub everything is as it was, and the bytes of it all are nowhere on the wire.
    #[track_caller]
    fn is_unharmed(&self) {
        self.hub.be_honest();
        let _agent = self.reacher.up();
        let mut client = self.carry(self.reacher.reach("prod-db"));
        self.echo(&mut client);
        self.wire_is_sealed();
    }

    #[track_caller]
    fn wire_is_sealed(&self) {
        let wire = self.hub.recorded();
        assert!(wire.len() > 1000, "the wire was recorded");
        let found = Search::new([self.canary.as_bytes()]).bytes(&wire);
        assert!(found.is_empty(), "on the wire: {found:?}");
    }

    fn carry(&self, address: SocketAddr) -> TcpStream {
        let mut client = TcpStream::connect(address).expect("the local port is bound");
        client.set_read_timeout(Some(PATIENCE)).expect("our own socket");
        self.echo(&mut client);
        client
    }

    #[track_caller]
    fn echo(&self, client: &mut TcpStream) {
        client.write_all(self.canary.as_bytes()).expect("open");
        let mut echoed = vec![0; self.canary.len()];
        client.read_exact(&mut echoed).expect("open");
        assert_eq!(echoed, self.canary.as_bytes());
    }
}

/// Waits until a connection ends, and not by a byte.
#[track_caller]
fn ends_within(client: &mut TcpStream, limit: Duration) {
    let start = Instant::now();
    assert!(matches!(client.read(&mut [0; 1]), Ok(0) | Err(_)), "no byte comes");
    let took = start.elapsed();
    assert!(took < limit, "it was served for {took:?}");
}

#[track_caller]
fn fails_with(outcome: &Outcome, code: i32, parts: &[&str]) {
    let Outcome { code: ended, stdout, stderr } = outcome;
    assert_eq!(*ended, Some(code), "{stdout}\n{stderr}");
    for part in parts {
        assert!(stderr.contains(part), "`{part}` is not in: {stderr}");
    }
}

fn seq(home: &Home) -> u64 {
    home.json(&["status"])["trust"]["seq"].as_u64().expect("a number")
}

fn labels(home: &Home, revoked: bool) -> Vec<String> {
    let agents = home.json(&["agents"]);
    let agents = agents.as_array().expect("a list").iter();
    agents
        .filter(|agent| agent["revoked"] == revoked)
        .map(|agent| agent["label"].as_str().expect("a label").to_owned())
        .collect()
}

#[test]
fn forged_agent() {
    let stage = Stage::set();
    let friend = stage.workspace.join("friend");
    for with_a_friend in [false, true] {
        if with_a_friend {
            stage.tell_with(Lie::ForgedAgent, &friend);
        } else {
            stage.hub.tell(Lie::ForgedAgent, Help::default());
        }
        let outcome = stage.reacher.run(&["--json", "agents"]);
        fails_with(&outcome, 0, &["event=\"left_out\"", "issuer is unknown"]);
        assert_eq!(outcome.stdout.matches("agent_id").count(), 3, "{}", outcome.stdout);
        stage.without_dialling(|| {
            stage.reacher.fails(&["reach", "prod-db"], 7, "");
            let agent = stage.reacher.up();
            stage.reacher.fails(&["reach", "prod-db"], 7, "");
            drop(agent);
        });
        assert!(stage.knocks_are_refused() >= 2);
        stage.nobody_believed();
    }
    stage.exposing.stderr_line("event=\"issuer_unknown\"");
    stage.exposing.stderr_line("event=\"certificate\"");
    stage.is_unharmed();
}

#[test]
fn forged_entry() {
    let stage = Stage::set();
    let agent = stage.reacher.up();
    let mut live = stage.carry(stage.reacher.reach("prod-db"));
    let before = seq(&stage.reacher);
    stage.hub.tell(Lie::ForgedEntry, Help::default());
    agent.stderr_line("event=\"hub_log\"");
    let outcome = stage.reacher.run(&["agents"]);
    fails_with(&outcome, 7, &["does not hold", "no signer"]);
    assert_eq!(seq(&stage.reacher), before);
    // What does not need the hub's word goes on.
    stage.echo(&mut live);
    stage.nobody_believed();
    drop((live, agent));
    stage.is_unharmed();
}

#[test]
fn unsigned_signer() {
    let stage = Stage::set();
    let friend = stage.workspace.join("friend");
    let agent = stage.reacher.up();
    // With a member for a friend, then with one that signs, but may not name signers.
    for role in ["member", "admin"] {
        if role == "admin" {
            stage.hub.be_honest();
            stage.founder().ok(&["trust", "add-signer", "friend"]);
        }
        let before = stage.founder().json(&["trust", "log"]);
        stage.tell_with(Lie::UnsignedSigner, &friend);
        for _ in 0..UNSIGNED {
            fails_with(&stage.reacher.run(&["agents"]), 7, &["does not hold"]);
        }
        let told: Vec<_> = stage.hub.reports().into_iter().map(|report| report.detail).collect();
        for how in ["that key itself", "by the accomplice", "and the hub", "something else"] {
            assert!(told.iter().any(|told| told.ends_with(how)), "{how}: {told:?}");
        }
        agent.stderr_line("event=\"hub_log\"");
        stage.nobody_believed();
        stage.hub.be_honest();
        assert_eq!(stage.reacher.json(&["trust", "log"]), before);
    }
    drop(agent);
    stage.is_unharmed();
}

#[test]
fn wrong_genesis() {
    let stage = Stage::set();
    let code = stage.founder().ok(&["invite"]);
    stage.hub.tell(Lie::WrongGenesis, Help::default());
    let home = Home::new();
    home.fails(&["join", &code], 7, "genesis");
    assert!(!home.dir().join("membership.json").exists() && !home.dir().join("agent.key").exists());
    stage.nobody_believed();
    stage.hub.be_honest();
    // It was not used up.
    home.ok(&["join", &code]);
    stage.is_unharmed();
}

#[test]
fn log_older_than_the_invite() {
    let stage = Stage::set();
    stage.founder().ok(&["trust", "add-signer", "reacher"]);
    let code = stage.founder().ok(&["invite"]);
    stage.hub.tell(Lie::LogOlderThanTheInvite, Help::default());
    let home = Home::new();
    home.fails(&["join", &code], 7, "older than the invite");
    assert!(!home.dir().join("membership.json").exists() && !home.dir().join("agent.key").exists());
    stage.nobody_believed();
    stage.hub.be_honest();
    home.ok(&["join", &code]);
    stage.is_unharmed();
}

/// Appends what the command line does not say: an entry that revokes, and begins no epoch.
fn append_revocation(stage: &Stage, owner: &Keys, revoked: &Keys) {
    let head = owner.trust.head();
    let entry = LogEntry::Entry(owner.signer.as_ref().expect("a founder's").sign(&Entry {
        workspace_id: owner.workspace_id,
        seq: head.seq + 1,
        prev: head.hash,
        time: UnixTime::from(1_u32),
        changes: vec![Change::RevokeAgent { agent_id: revoked.agent_id, below_serial: None }],
        abandons: Vec::new(),
    }));
    let appended = runtime().block_on(async {
        let mut client = Client::login(Hub::shared().address(), owner, SessionKind::Command).await;
        client.request(Request::Append { entries: vec![Blob(entry.encode())] }).await
    });
    assert_eq!(appended, Reply::Done);
    eventually("the owner's agent knows", || seq(stage.founder()) == entry.head().seq);
}

#[test]
fn fork_shown_to_two_members() {
    let stage = Stage::set();
    let second = stage.workspace.join("second");
    let (one, two) = (stage.workspace.join("one"), stage.workspace.join("two"));
    stage.founder().ok(&["trust", "add-signer", "second", "--role", "owner"]);
    for home in [&second, &stage.reacher] {
        home.ok(&["services"]);
    }
    eventually("the founder's agent knows what its command did", || {
        seq(stage.founder()) == Keys::of(&second).trust.head().seq
    });
    let stolen = Keys::of(stage.founder());
    stage.hub.tell(
        Lie::ForkShownToTwoMembers,
        Help {
            accomplice: Some(Arc::new(Keys::of(stage.founder()))),
            fork_revokes: Some(Keys::of(&two).agent_id),
            ..Help::default()
        },
    );
    // Everybody hears that `one` was revoked, but the reacher: it hears that `two` was.
    append_revocation(&stage, &stolen, &Keys::of(&one));
    let reaching = stage.reacher.up();
    assert!(stage.hub.summary().told > 0, "the fork was shown");
    let address = stage.reacher.reach("prod-db");
    let mut live = stage.carry(address);
    for agent in [&reaching, &stage.exposing] {
        agent.stderr_line("event=\"fork\"");
    }
    // The revocations of both branches count for both.
    eventually("the founder follows both branches", || labels(stage.founder(), true).len() == 2);
    for home in [stage.founder(), &stage.reacher] {
        assert_eq!(labels(home, true), ["one", "two"]);
    }
    let evidence = |home: &Home| fs::read_dir(home.dir().join("evidence")).map(Iterator::count);
    assert_eq!(evidence(stage.founder()).expect("kept"), 1);
    assert_eq!(evidence(&stage.reacher).expect("kept"), 1);
    // The honest half of the hub knows of one branch alone, and lets `two` in. The exposer does not.
    stage.without_dialling(|| two.fails(&["reach", "prod-db"], 6, ""));
    stage.exposing.stderr_line("event=\"revoked\"");

    // The second owner hears of the fork from the reacher; an owner that signed both cannot settle.
    let seconding = second.up();
    let other = Service::echo();
    second.ok(&["expose", &other.address().to_string(), "--name", "other"]);
    stage.reacher.ok(&["reach", "other"]);
    seconding.stderr_line("event=\"fork\"");
    stage.founder().fails(&["trust", "settle"], 6, "cannot settle");

    // What is open stays open, and under `strict` nothing new opens.
    stage.founder().ok(&["trust", "policy", "strict"]);
    stage.reacher.ok(&["unreach", "other"]);
    eventually("the second owner knows the policy", || {
        second.json(&["status"])["trust"]["strict"] == true
    });
    let before = other.accepted();
    stage.reacher.fails(&["reach", "other"], 6, "");
    seconding.stderr_line("and the policy is strict");
    assert_eq!(other.accepted(), before);
    stage.echo(&mut live);
    stage.founder().ok(&["trust", "policy", "relaxed"]);

    stage.hub.be_honest();
    second.ok(&["trust", "settle"]);
    for (home, agent) in [(&stage.reacher, Some(&reaching)), (stage.founder(), None)] {
        eventually("the fork is settled", || {
            home.ok(&["services"]);
            home.json(&["status"])["trust"]["forked"] == false
        });
        if let Some(agent) = agent {
            agent.stderr_line("event=\"log_replaced\"");
        }
        assert_eq!(labels(home, true), ["one", "two"], "a revocation stays one");
    }
    stage.echo(&mut live);
    stage.wire_is_sealed();
}

#[test]
fn a_made_up_head() {
    let stage = Stage::set();
    let friend = stage.workspace.join("friend");
    let agent = stage.reacher.up();
    let mut live = stage.carry(stage.reacher.reach("prod-db"));
    let before = seq(stage.founder());
    stage.tell_with(Lie::MadeUpHead, &friend);
    stage.knocks_are_refused();
    stage.nobody_believed();
    stage.exposing.stderr_line("event=\"peer_ended\"");
    stage.exposing.stderr_line("claimed a trust log that it did not show");
    // An endless log is not read beyond the first page that does not hold.
    stage.tell_with(Lie::MadeUpLog, &friend);
    stage.knocks_are_refused();
    stage.nobody_believed();
    stage.exposing.stderr_line("an entry of the trust log does not hold");
    // That tunnel, and nothing else: no fork, no other head, and who lied is a member still.
    assert_eq!(seq(stage.founder()), before);
    assert!(!stage.exposing.stderr().contains("event=\"fork\""));
    stage.echo(&mut live);
    let _friend = friend.up();
    stage.carry(friend.reach("prod-db"));
    drop((live, agent));
    stage.is_unharmed();
}

#[test]
fn a_made_up_head_of_an_exposer() {
    let stage = Stage::set();
    let friend = Arc::new(Keys::of(&stage.workspace.join("friend")));
    for (name, entries) in [("head", 0), ("log", usize::MAX)] {
        let friend = friend.clone();
        let hub = Hub::shared().address();
        let claiming = runtime().spawn(async move {
            let name = name.parse().expect("a name");
            lies::claim_made_up_head_as_exposer(hub, &friend, &name, entries).await
        });
        eventually("it is exposed", || {
            let services = stage.reacher.json(&["services"]);
            services.as_array().expect("a list").iter().any(|service| service["name"] == name)
        });
        stage.reacher.fails(&["reach", name], 7, "trust log");
        let claimed = runtime().block_on(claiming).expect("it ends");
        assert_eq!(claimed, Ok(Claimed { pages: 1, closed: Some(CloseCode::Forbidden) }));
    }
    stage.is_unharmed();
}

/// Everybody behind a hub that withholds, and one whom the founder revokes without anybody hearing of it.
struct Withheld {
    stage: Stage,
    exposer: Home,
    exposing: Process,
    leaver: Home,
    _leaving: Process,
    service: Service,
}

impl Withheld {
    fn set() -> Self {
        let stage = Stage::set();
        let (exposer, leaver) = (stage.workspace.join("exposer"), stage.workspace.join("leaver"));
        let (exposing, leaving) = (exposer.up(), leaver.up());
        let service = Service::echo();
        exposer.ok(&["expose", &service.address().to_string(), "--name", "web"]);
        service.probed();
        Self { stage, exposer, exposing, leaver, _leaving: leaving, service }
    }

    fn revoke(&self) {
        self.stage.hub.tell(Lie::RevocationWithheld, Help::default());
        self.stage.founder().ok(&["revoke", "leaver", "--yes"]);
        assert!(self.stage.nobody_believed().told > 0);
    }
}

#[test]
fn revocation_withheld() {
    let withheld = Withheld::set();
    let Withheld { stage, exposer, exposing, leaver, service, .. } = &withheld;
    let mut live = stage.carry(leaver.reach("web"));
    let before = seq(exposer);
    withheld.revoke();
    // Nobody knows, so the revoked agent is served.
    stage.echo(&mut live);
    assert_eq!(seq(exposer), before);

    // The first who knows tells the exposer, inside the tunnel.
    let accepted = service.accepted();
    stage.founder().ok(&["reach", "web"]);
    ends_within(&mut live, Duration::from_secs(5));
    exposing.stderr_line("event=\"log_from_peer\"");
    exposing.stderr_line("event=\"peer_ended\" code=\"revoked\"");
    assert!(seq(exposer) > before);
    let again = leaver.run(&["reach", "web"]);
    assert!(matches!(again.code, Some(6 | 7)), "{again:?}");
    leaver.ok(&["unreach", "web"]);
    leaver.fails(&["reach", "web"], 6, "");
    exposing.stderr_line("event=\"revoked\"");
    assert_eq!(service.accepted(), accepted, "the target was dialled");
    stage.hub.be_honest();
    stage.wire_is_sealed();
}

#[test]
fn revocation_withheld_from_who_reaches() {
    let withheld = Withheld::set();
    let Withheld { stage, leaver, exposing, .. } = &withheld;
    let target = Service::echo();
    leaver.ok(&["expose", &target.address().to_string(), "--name", "leaving"]);
    let reaching = stage.reacher.up();
    let mut live = stage.carry(stage.reacher.reach("leaving"));
    withheld.revoke();
    // An exposer that knows.
    stage.founder().ok(&["reach", "web"]);
    exposing.stderr_line("event=\"log_from_peer\"");
    stage.echo(&mut live);

    // It tells the reacher, which reaches something else entirely.
    stage.reacher.ok(&["reach", "web"]);
    ends_within(&mut live, Duration::from_secs(5));
    reaching.stderr_line("event=\"log_from_peer\"");
    reaching.stderr_line("event=\"peer_ended\"");
    let dialled = target.accepted();
    stage.reacher.ok(&["unreach", "leaving"]);
    stage.reacher.fails(&["reach", "leaving"], 7, "revoked");
    reaching.stderr_line("event=\"untrusted\"");
    assert_eq!(target.accepted(), dialled, "the target was dialled");
    stage.hub.be_honest();
    stage.wire_is_sealed();
}

#[test]
fn rollback_after_restart() {
    let stage = Stage::set();
    let leaver = stage.workspace.join("leaver");
    stage.founder().ok(&["revoke", "leaver", "--yes"]);
    let agent = stage.reacher.up();
    let known = seq(stage.founder());
    eventually("the reacher knows", || seq(&stage.reacher) == known);
    drop(agent);
    // The hub comes back with an empty log, and keeps it empty.
    stage.hub.tell(Lie::RollbackAfterRestart, Help::default());
    let agent = stage.reacher.up();
    assert_eq!(seq(&stage.reacher), known);
    agent.stderr_line("event=\"hub_healed\"");
    stage.carry(stage.reacher.reach("prod-db"));
    // The exposer knows what it knew, even if its hub lets the revoked agent in.
    let summary = stage.nobody_believed();
    assert!(summary.refused > 0, "the hub was brought what it lacks");
    assert_eq!(seq(stage.founder()), known);
    assert!(labels(stage.founder(), true).contains(&"leaver".to_owned()));
    leaver.fails(&["reach", "prod-db"], 6, "revoked");
    drop(agent);
    stage.is_unharmed();
}

#[test]
fn swapped_certificate() {
    // The strongest hub there is: one that has a member for a friend, and so the keys to the names.
    let stage = Stage::set();
    let friend = stage.workspace.join("friend");
    stage.tell_with(Lie::SwappedCertificate, &friend);
    stage.without_dialling(|| {
        for _ in 0..SWAPS {
            stage.reacher.fails(&["reach", "prod-db"], 7, "");
        }
        assert_eq!(stage.nobody_believed().told, SWAPS);
        let agent = stage.reacher.up();
        stage.reacher.fails(&["reach", "prod-db"], 7, "");
        drop(agent);
    });
    stage.nobody_believed();
    stage.is_unharmed();
}

#[test]
fn another_agents_id() {
    let stage = Stage::set();
    let _other = stage.workspace.join("other");
    stage.hub.tell(Lie::AnotherAgentsId, Help::default());
    stage.without_dialling(|| stage.reacher.fails(&["reach", "prod-db"], 7, "does not hold"));
    stage.nobody_believed();
    stage.is_unharmed();
}

#[test]
fn swapped_tag() {
    let stage = Stage::set();
    let other = stage.workspace.join("other");
    let _agent = other.up();
    let wrong = Service::echo();
    other.ok(&["expose", &wrong.address().to_string(), "--name", "other"]);
    let dialled = wrong.probed();
    // What a hub has seen it can show again, in another place.
    stage.reacher.ok(&["services"]);
    stage.hub.tell(Lie::SwappedTag, Help::default());
    stage.without_dialling(|| stage.reacher.fails(&["reach", "prod-db"], 7, "another service"));
    assert_eq!(wrong.accepted(), dialled);
    stage.nobody_believed();
    stage.is_unharmed();
}

/// A thief that holds the code of an invite, which `home` joined by, and has the hub for a friend: it is in
/// until a signer closes the invite, and then nobody lets it in or goes to it.
#[track_caller]
fn check_thief(stage: &Stage, code: &str, id: &str) {
    let code = Some(Arc::new(code.parse().expect("an invite")));
    stage.hub.tell(Lie::InviteReused, Help { code, ..Help::default() });
    // The threat model says so: until the invite is closed, its uses are the hub's to count.
    stage.hub.knock();
    eventually("the thief is let in", || stage.hub.summary().believed > 0);
    assert_eq!(stage.hub.summary().refused, 0);

    stage.hub.be_honest();
    stage.founder().ok(&["invites", "--revoke", id]);
    let closed = Keys::of(stage.founder()).trust.head().seq;
    eventually("the exposer's agent knows", || seq(stage.founder()) >= closed);
}

fn open_invite(home: &Home, uses: u32) -> String {
    let open = home.json(&["invites"]);
    let open = open.as_array().expect("a list").iter();
    let mut ids = open
        .filter(|invite| invite["uses"] == uses)
        .map(|invite| invite["id"].as_str().expect("an id").to_owned());
    ids.next().expect("it is not closed")
}

#[track_caller]
fn check_thief_is_out(stage: &Stage, code: &str) {
    let code = Some(Arc::new(code.parse().expect("an invite")));
    stage.hub.tell(Lie::InviteReused, Help { code, ..Help::default() });
    stage.knocks_are_refused();
    stage.exposing.stderr_line("event=\"closed\"");
    stage.without_dialling(|| stage.reacher.fails(&["reach", "prod-db"], 7, "closed"));
    stage.nobody_believed();
}

#[test]
fn spent_invite_reused_with_a_thiefs_help() {
    let stage = Stage::set();
    let code = stage.founder().ok(&["invite", "--uses", "2"]);
    let id = open_invite(stage.founder(), 2);
    let members = [Home::new(), Home::new()];
    members[0].ok(&["join", &code]);
    let stolen = Some(Arc::new(code.parse().expect("an invite")));
    stage.hub.tell(Lie::InviteReused, Help { code: stolen, ..Help::default() });
    members[1].ok(&["join", &code]);
    eventually("the thief knocks by what the joiner was shown", || stage.hub.summary().told > 0);
    stage.hub.be_honest();
    Home::new().fails(&["join", &code], 6, "used");
    check_thief(&stage, &code, &id);
    check_thief_is_out(&stage, &code);
    // Who joined in time stays.
    stage.hub.be_honest();
    for member in &members {
        let _agent = member.up();
        stage.carry(member.reach("prod-db"));
    }
    stage.is_unharmed();
}

#[test]
fn expired_invite_reused_with_a_thiefs_help() {
    let stage = Stage::set();
    let code = stage.founder().ok(&["invite", "--expires", "1s", "--uses", "3"]);
    let id = open_invite(stage.founder(), 3);
    eventually("the invite expires", || {
        let outcome = Home::new().run(&["join", &code]);
        outcome.code == Some(6) && outcome.stderr.contains("expired")
    });
    check_thief(&stage, &code, &id);
    check_thief_is_out(&stage, &code);
    stage.is_unharmed();
}

#[test]
fn backdated_certificate_of_a_removed_signer() {
    let stage = Stage::set();
    let signer = stage.workspace.join("signer");
    stage.founder().ok(&["trust", "add-signer", "signer"]);
    let code = signer.ok(&["invite"]);
    let admitted = Home::new();
    admitted.ok(&["join", &code]);
    stage.tell_with(Lie::BackdatedCertificate, &signer);
    stage.hub.knock();
    eventually("what a signer signs holds", || stage.hub.summary().believed == 2);

    stage.hub.be_honest();
    stage.founder().ok(&["trust", "remove-signer", "signer"]);
    let removed = Keys::of(stage.founder()).trust.head().seq;
    eventually("the exposer's agent knows", || seq(stage.founder()) >= removed);
    stage.tell_with(Lie::BackdatedCertificate, &signer);
    assert_eq!(stage.knocks_are_refused(), 2);
    stage.exposing.stderr_line("event=\"issuer_unknown\"");
    stage.exposing.stderr_line("event=\"credential\"");
    stage.nobody_believed();
    // Whom it admitted while it was one stays.
    stage.hub.be_honest();
    let _agent = admitted.up();
    stage.carry(admitted.reach("prod-db"));
    stage.is_unharmed();
}

/// Memory of a process that is in use, in bytes.
fn resident(id: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{id}/status")).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a size");
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().expect("a number");
    kib * 1024
}

#[test]
fn replayed_open_tunnel() {
    let stage = Stage::set();
    let agent = stage.reacher.up();
    let before = resident(stage.exposing.id());
    stage.hub.tell(Lie::ReplayedOpenTunnel, Help::default());
    stage.without_dialling(|| {
        let address = stage.reacher.reach("prod-db");
        assert_eq!(stage.nobody_believed().told, 1);
        // It answers people while the replays come in, and others once they are over.
        let asked = Instant::now();
        stage.founder().ok(&["status"]);
        assert!(asked.elapsed() < Duration::from_secs(5), "{:?}", asked.elapsed());
        address
    });
    stage.exposing.stderr_line("a repeated tunnel id");
    eventually("the exposer hears others again", || {
        stage.hub.tell(Lie::ForgedAgent, Help::default());
        stage.hub.knock();
        let asked = Instant::now();
        while stage.hub.summary().refused == 0 && asked.elapsed() < Duration::from_secs(1) {
            std::thread::yield_now();
        }
        stage.hub.summary().refused > 0
    });
    assert!(stage.hub.reports().iter().all(|report| report.what != What::Believed));
    let grown = resident(stage.exposing.id()).saturating_sub(before);
    assert!(grown < 64 << 20, "the exposer grew by {grown} bytes");
    drop(agent);
    stage.is_unharmed();
}

#[test]
fn stripped_kem() {
    let stage = Stage::set();
    stage.hub.tell(Lie::StrippedKem, Help::default());
    stage.without_dialling(|| {
        for _ in 0..2 {
            stage.reacher.fails(&["reach", "prod-db"], 7, "could not be verified");
        }
        let agent = stage.reacher.up();
        stage.reacher.fails(&["reach", "prod-db"], 7, "could not be verified");
        agent.stderr_line("event=\"untrusted\"");
    });
    stage.nobody_believed();
    stage.is_unharmed();
}

/// The program that tells the lies to anyone's agents.
struct Program {
    process: Process,
    url: String,
}

impl Program {
    fn start(args: &[&str]) -> Self {
        let hub = format!("http://{}", Hub::shared().address());
        let mut command = Command::new(program("connect-hostile-hub"));
        command.args(["--hub", &hub, "--listen", "127.0.0.1:0"]).args(args);
        let process = Process::spawn("connect-hostile-hub", &mut command);
        let url = process.stdout_line(|line| {
            let line: Value = serde_json::from_str(line).expect("a JSON line");
            line["url"].as_str().map(str::to_owned)
        });
        Self { process, url }
    }

    /// Stops it; its exit code, and the summary.
    fn stop(self) -> (Option<i32>, Value) {
        self.process.signal(Signal::SIGINT);
        let Outcome { code, stdout, .. } = self.process.outcome();
        let last = stdout.lines().last().expect("a summary");
        (code, serde_json::from_str(last).expect("a JSON line"))
    }
}

#[test]
fn program_tells_the_lies_and_reports_what_came_of_them() {
    let liar = Program::start(&["--lie", "forged_agent"]);
    let workspace = Workspace::found_at(&liar.url);
    assert_eq!(labels(&workspace.founder, false), ["founder"]);
    let exposing = workspace.founder.up();
    let service = Service::echo();
    workspace.founder.ok(&["expose", &service.address().to_string(), "--name", "svc"]);
    exposing.stderr_line("event=\"issuer_unknown\"");
    liar.process.stdout_line(|line| line.contains("\"refused\"").then_some(()));
    let (code, summary) = liar.stop();
    assert_eq!(code, Some(0), "{summary}");
    assert_eq!(summary["believed"], 0);
    assert!(summary["told"].as_u64() >= Some(2), "{summary}");
    drop(exposing);

    // What is believed is said too: until an invite is closed, its uses are the hub's to count.
    let workspace = Workspace::found(Hub::shared());
    let code = workspace.founder.ok(&["invite"]);
    let member = Home::new();
    member.ok(&["join", &code]);
    let liar = Program::start(&["--lie", "invite_reused", "--code", &code]);
    let membership = member.dir().join("membership.json");
    let text = fs::read_to_string(&membership).expect("enrolled");
    fs::write(&membership, text.replace(Hub::shared().url(), &liar.url)).expect("our own file");
    let _exposing = member.up();
    member.ok(&["expose", &service.address().to_string(), "--name", "svc"]);
    liar.process.stdout_line(|line| line.contains("\"believed\"").then_some(()));
    let (code, summary) = liar.stop();
    assert_eq!((code, &summary["believed"]), (Some(1), &Value::from(1)), "{summary}");
}

#[test]
fn program_wants_a_lie_a_hub_of_this_machine_and_what_the_lie_needs() {
    let run = |args: &[&str]| {
        let mut command = Command::new(program("connect-hostile-hub"));
        Process::spawn("connect-hostile-hub", command.args(args)).outcome()
    };
    let listed = run(&["--list"]);
    assert_eq!(listed.code, Some(0));
    assert_eq!(listed.stdout.lines().count(), Lie::ALL.len());
    for (args, part) in [
        (&[][..], "--lie"),
        (&["--lie", "truth"], "no lie is called"),
        (&["--lie", "swapped_certificate"], "needs --accomplice"),
        (&["--lie", "invite_reused"], "needs --code"),
        (&["--lie", "forged_entry", "--hub", "https://hub.example.com"], "of this machine"),
        (&["--lie", "forged_entry", "--listen", "0.0.0.0:0"], "loopback"),
        (&["--lie", "a_made_up_head", "--accomplice", "/nowhere"], "no agent lives"),
    ] {
        fails_with(&run(args), 2, &[part]);
    }
}

#[test]
fn every_lie_has_a_name_of_its_own() {
    for lie in Lie::ALL {
        assert_eq!(lie.name().parse(), Ok(*lie));
    }
    assert!("truth".parse::<Lie>().is_err());
}
