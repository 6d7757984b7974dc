//! The trust log as people use it: who signs, who is ended, and what happens to names and tunnels then.

use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use connect_spec::{
    bytes::Blob,
    control::{ErrorCode, FromAgent, FromHub, Reply, Request, SessionKind},
    log::{Change, Entry, FIRST_OPTIONAL_CHANGE, LogEntry},
};

use connect_tests::{
    PATIENCE,
    client::{Client, Keys, Tunnel, now},
    eventually,
    home::{Home, Workspace},
    hostile_relay::{HostileRelay, Passing, Verdict},
    hub::Hub,
    process::{Outcome, Process},
    random_word, runtime,
    services::Service,
};

fn name() -> String {
    format!("svc-{}", random_word())
}

/// A connection that the service at its other end echoes.
#[track_caller]
fn open_echo(address: SocketAddr) -> TcpStream {
    let mut client = TcpStream::connect(address).expect("a local port");
    client.set_read_timeout(Some(PATIENCE)).expect("our own socket");
    check_echo(&mut client);
    client
}

#[track_caller]
fn check_echo(client: &mut TcpStream) {
    client.write_all(b"ping").expect("a connection");
    let mut read = [0; 4];
    client.read_exact(&mut read).expect("an echo");
    assert_eq!(&read, b"ping");
}

/// The changes of the log, newest last, as people read them.
fn changes(home: &Home) -> Vec<String> {
    let log = home.json(&["trust", "log"]);
    let entries = log.as_array().expect("a list").iter();
    entries
        .flat_map(|entry| entry["changes"].as_array().expect("a list").clone())
        .map(|change| change.as_str().expect("text").to_owned())
        .collect()
}

fn seq(home: &Home) -> u64 {
    home.json(&["status"])["trust"]["seq"].as_u64().expect("a number")
}

#[test]
fn a_revoked_agent_is_gone_within_seconds_and_reads_no_new_name() {
    let hub = Hub::shared();
    let workspace = Workspace::found(hub);
    let (leaver, stayer) = (workspace.join("leaver"), workspace.join("stayer"));
    let _agents = [workspace.founder.up(), leaver.up(), stayer.up()];
    let service = Service::echo();
    let (svc, other) = (&name(), &name());
    workspace.founder.ok(&["expose", &service.address().to_string(), "--name", svc]);
    let mut ended = open_echo(leaver.reach(svc));
    let mut goes_on = open_echo(stayer.reach(svc));

    workspace.founder.fails(&["revoke", "leaver"], 2, "--yes");
    workspace.founder.fails(&["revoke", "nobody", "--yes"], 2, "no agent is called");
    workspace.founder.fails(&["revoke", "founder", "--yes"], 2, "itself");
    let start = Instant::now();
    workspace.founder.ok(&["revoke", "leaver", "--yes"]);
    // Whether the end is a reset or an end of file: no byte comes any more.
    assert!(matches!(ended.read(&mut [0; 1]), Ok(0) | Err(_)), "a revoked agent's connection");
    let took = start.elapsed();
    assert!(took < Duration::from_secs(5), "a revoked agent was served for {took:?}");

    check_echo(&mut goes_on);
    leaver.fails(&["services"], 6, "revoked");
    leaver.fails(&["invite"], 6, "revoked");
    let agents = workspace.founder.json(&["agents"]);
    let listed = agents.as_array().expect("a list").iter();
    let revoked: Vec<_> = listed.filter(|agent| agent["revoked"] == true).collect();
    assert_eq!(revoked.len(), 1);
    assert_eq!(revoked[0]["label"], "leaver");
    assert!(changes(&stayer).iter().any(|change| change.starts_with("revokes agent leaver")));

    // Everybody who stays has the next epoch, and the names in it; who was revoked never gets it.
    eventually("the next epoch reaches who stays", || {
        stayer.json(&["status"])["trust"]["epoch"] == 1
    });
    workspace.founder.ok(&["expose", &service.address().to_string(), "--name", other]);
    open_echo(stayer.reach(other));
    let epochs = |home: &Home| fs::read_to_string(home.dir().join("epochs.key")).expect("a file");
    assert!(epochs(&stayer).contains("epoch-1 "));
    assert!(!epochs(&leaver).contains("epoch-1 "));
    // Who joins now begins with it.
    let joined = workspace.join("joined");
    assert!(epochs(&joined).contains("epoch-1 ") && !epochs(&joined).contains("epoch-0 "));
    let services = joined.json(&["services"]);
    assert_eq!(services.as_array().expect("a list").len(), 2);
}

#[test]
fn names_are_found_while_an_epoch_begins() {
    let hub = Hub::shared();
    let workspace = Workspace::found(hub);
    let (leaver, reacher) = (workspace.join("leaver"), workspace.join("reacher"));
    let exposer = workspace.join("exposer");
    let service = Service::echo();
    let svc = &name();
    let mut exposing = exposer.up();
    let _agents = [workspace.founder.up(), reacher.up()];
    exposer.ok(&["expose", &service.address().to_string(), "--name", svc]);
    // The exposer is away when the epoch changes: its name is found under the one before.
    exposing.kill();
    workspace.founder.ok(&["revoke", "leaver", "--yes"]);
    eventually("the reacher is in the new epoch", || {
        reacher.json(&["status"])["trust"]["epoch"] == 1
    });
    let services = reacher.json(&["services"]);
    assert_eq!(services[0]["name"], svc.as_str());
    // It comes back and is reached at once, by those who have the new epoch and by those who come later.
    let _exposing = exposer.up();
    open_echo(reacher.reach(svc));
    let _ = leaver;
}

#[test]
fn invites_close_themselves_and_keep_who_joined() {
    let hub = Hub::shared();
    let workspace = Workspace::found(hub);
    let member = workspace.join("member");
    assert_eq!(changes(&workspace.founder), [""; 0], "nobody who signs has been online");
    let _agent = workspace.founder.up();
    eventually("the used-up invite is closed", || {
        changes(&workspace.founder).iter().filter(|change| change.contains("keeps 1")).count() == 1
    });
    // The first invite, which `init` printed, is open for an hour.
    let open = workspace.founder.json(&["invites"]);
    assert_eq!(open.as_array().expect("a list").len(), 1);
    assert_eq!(open[0]["used"], 0);
    member.ok(&["services"]);

    // Revoked: nobody joins, who joined stays.
    let code = workspace.founder.ok(&["invite", "--uses", "3"]);
    let early = Home::new();
    early.ok(&["join", &code, "--label", "early"]);
    let open = workspace.founder.json(&["invites"]);
    let id = open.as_array().expect("a list").iter().find(|invite| invite["uses"] == 3);
    let id = id.expect("the invite")["id"].as_str().expect("an id").to_owned();
    workspace.founder.ok(&["invites", "--revoke", &id]);
    workspace.founder.fails(&["invites", "--revoke", &id], 2, "no open invite");
    Home::new().fails(&["join", &code], 6, "closed");
    early.ok(&["services"]);

    // Expired: nobody joins any more, and the next time that a signer signs it is closed.
    let code = workspace.founder.ok(&["invite", "--expires", "1s", "--uses", "1000"]);
    eventually("the invite expires", || {
        let outcome = Home::new().run(&["join", &code]);
        outcome.code == Some(6) && outcome.stderr.contains("expired")
    });
    workspace.founder.ok(&["invite"]);
    let open = workspace.founder.json(&["invites"]);
    assert!(open.as_array().expect("a list").iter().all(|invite| invite["over"] == false));
}

#[test]
fn signers_come_and_go_and_whom_they_admitted_stays() {
    let hub = Hub::shared();
    let workspace = Workspace::found(hub);
    let second = workspace.join("second");
    second.fails(&["invite"], 6, "no signer");
    second.fails(&["trust", "add-signer", "second"], 6, "no signer");
    workspace.founder.ok(&["trust", "add-signer", "second"]);
    let code = second.ok(&["invite"]);
    let admitted = Home::new();
    admitted.ok(&["join", &code, "--label", "admitted"]);
    // An admin names no signers and sets no policy.
    second.fails(&["trust", "add-signer", "admitted"], 6, "may not make");
    second.fails(&["trust", "policy", "strict"], 6, "may not make");
    second.fails(&["trust", "remove-signer", "founder"], 6, "may not make");
    workspace.founder.fails(&["trust", "remove-signer", "founder"], 6, "last owner");
    workspace.founder.fails(&["trust", "remove-signer", "admitted"], 2, "no signer");

    workspace.founder.ok(&["trust", "remove-signer", "second"]);
    second.fails(&["invite"], 6, "no signer");
    second.ok(&["services"]);
    admitted.ok(&["services"]);

    // An owner can end the founder; what the founder's key signed stays where it is in use.
    workspace.founder.ok(&["trust", "add-signer", "second", "--role", "owner"]);
    second.ok(&["revoke", "founder", "--yes"]);
    workspace.founder.fails(&["services"], 6, "revoked");
    second.fails(&["trust", "remove-signer", "founder"], 2, "no signer");
    admitted.ok(&["services"]);
    let code = second.ok(&["invite"]);
    let later = Home::new();
    later.ok(&["join", &code, "--label", "later"]);
    assert_eq!(later.json(&["agents"]).as_array().expect("a list").len(), 4);
}

#[test]
fn recovery_words_make_a_member_the_only_signer_once() {
    let hub = Hub::shared();
    let founder = Home::new();
    let founded = founder.json(&["init", "--hub", hub.url(), "--label", "founder"]);
    let words = founded["recovery_words"].as_str().expect("words").to_owned();
    let member = Home::new();
    member.ok(&["join", founded["invite"].as_str().expect("a code"), "--label", "member"]);
    let _founding = founder.up();

    let recover = |home: &Home, words: &str| -> Outcome {
        let mut command = home.command(&["--json", "trust", "recover"]);
        command.stdin(std::process::Stdio::piped());
        let mut process = Process::spawn("connect trust recover", &mut command);
        process.feed(format!("{words}\n").as_bytes());
        process.outcome()
    };
    assert_eq!(recover(&member, "one two three").code, Some(2));
    let others = Home::new().json(&["init", "--hub", hub.url()]);
    let foreign = recover(&member, others["recovery_words"].as_str().expect("words"));
    assert_eq!(foreign.code, Some(6), "{}", foreign.stderr);

    let recovered = recover(&member, &words);
    assert_eq!(recovered.code, Some(0), "{}", recovered.stderr);
    let recovered: serde_json::Value = serde_json::from_str(&recovered.stdout).expect("JSON");
    assert_eq!(recovered["kept"], 2);
    // The old words are spent, and everybody heard of it.
    assert_eq!(recover(&founder, &words).code, Some(6));
    founder.fails(&["invite"], 6, "no signer");
    member.ok(&["invite"]);
    founder.ok(&["services"]);
    eventually("the founder's agent follows", || seq(&founder) >= 1);
    // The new words are those in force.
    let again = recover(&founder, recovered["recovery_words"].as_str().expect("words"));
    assert_eq!(again.code, Some(0), "{}", again.stderr);
    founder.ok(&["invite"]);
    member.fails(&["invite"], 6, "no signer");
}

#[test]
fn a_role_takes_effect_at_once_and_an_old_certificate_is_worth_nothing() {
    let hub = Hub::shared();
    let workspace = Workspace::found(hub);
    let member = workspace.join("member");
    let _agents = [workspace.founder.up(), member.up()];
    let service = Service::echo();
    let (svc, own) = (&name(), &name());
    workspace.founder.ok(&["expose", &service.address().to_string(), "--name", svc]);
    let mut live = open_echo(member.reach(svc));

    let before = fs::read(member.dir().join("membership.json")).expect("a file");
    workspace.founder.ok(&["trust", "role", "member", "exposer"]);
    assert!(matches!(live.read(&mut [0; 1]), Ok(0) | Err(_)), "it may reach no more");
    eventually("the agent comes back with its new certificate", || {
        member.run(&["status"]).code == Some(0)
    });
    let agents = member.json(&["agents"]);
    let roles: Vec<_> = agents.as_array().expect("a list").iter().map(|a| &a["role"]).collect();
    assert_eq!(roles, ["member", "exposer"]);
    member.fails(&["reach", svc], 6, "");
    member.ok(&["expose", &service.address().to_string(), "--name", own]);

    // With the old certificate it is what it is now, not what it was.
    member.ok(&["down"]);
    fs::write(member.dir().join("membership.json"), before).expect("our own file");
    let _again = member.up();
    let agents = member.json(&["agents"]);
    assert_eq!(agents[1]["role"], "exposer");
    workspace.founder.fails(&["trust", "role", "founder", "reacher"], 6, "founded");
}

#[test]
fn strict_workspaces_want_a_witness_and_no_change_of_hands() {
    let hub = Hub::shared();
    let workspace = Workspace::found(hub);
    let (second, reacher) = (workspace.join("second"), workspace.join("reacher"));
    workspace.founder.ok(&["trust", "add-signer", "second", "--role", "owner"]);
    workspace.founder.ok(&["trust", "policy", "strict"]);
    let _founding = workspace.founder.up();
    let service = Service::echo();
    let svc = &name();
    workspace.founder.ok(&["expose", &service.address().to_string(), "--name", svc]);
    // The other signer could have revoked the exposer, and nobody but the exposer says it did not.
    let mut reaching = reacher.up();
    reacher.fails(&["reach", svc], 6, "witness");
    assert_eq!(reacher.json(&["status"])["trust"]["strict"], true);
    reaching.kill();
    // Nor does the exposer let in whom the other signer could have revoked, whatever that one's policy is.
    let member = Keys::of(&reacher);
    let services = reacher.json(&["services"]);
    let service_id = services[0]["service_id"].as_str().and_then(|id| id.parse().ok());
    let knocked = runtime().block_on(Tunnel::open(
        hub.address(),
        &member,
        service_id.expect("an id"),
        member.trust.head(),
    ));
    let refused = knocked.expect_err("no witness for the exposer either");
    assert!(refused.contains("Refused"), "{refused}");
    // A signer bears witness whenever it is online.
    let seconding = second.up();
    let _reaching = reacher.up();
    eventually("the beat is there", || reacher.json(&["status"])["trust"]["beat_age_s"].is_u64());
    open_echo(reacher.reach(svc));

    // The name changes hands.
    workspace.founder.ok(&["unexpose", svc]);
    second.ok(&["expose", &service.address().to_string(), "--name", svc]);
    eventually("the change is refused", || {
        let outcome = reacher.run(&["reach", svc]);
        outcome.code == Some(7) && outcome.stderr.contains("--accept-new")
    });
    reacher.ok(&["reach", svc, "--accept-new"]);
    workspace.founder.ok(&["trust", "policy", "relaxed"]);
    drop(seconding);
}

/// A change of a later version that must not be passed over: whoever cannot read it opens no tunnel and
/// accepts none, until it is updated. What is open goes on.
#[test]
fn an_entry_that_cannot_be_read_ends_new_tunnels_at_both_ends() {
    let hub = Hub::shared();
    let workspace = Workspace::found(hub);
    let reacher = workspace.join("reacher");
    let _founding = workspace.founder.up();
    let service = Service::echo();
    let svc = &name();
    workspace.founder.ok(&["expose", &service.address().to_string(), "--name", svc]);
    let _reaching = reacher.up();
    let mut client = open_echo(reacher.reach(svc));

    let (founder, member) = (Keys::of(&workspace.founder), Keys::of(&reacher));
    let head = founder.trust.head();
    let entry = founder.signer.as_ref().expect("a founder's").sign(&Entry {
        workspace_id: founder.workspace_id,
        seq: head.seq + 1,
        prev: head.hash,
        time: now(),
        changes: vec![Change::Unknown(FIRST_OPTIONAL_CHANGE - 1)],
        abandons: Vec::new(),
    });
    let entries = vec![Blob(LogEntry::Entry(entry).encode())];
    let service_id = runtime().block_on(async {
        let mut client = Client::login(hub.address(), &founder, SessionKind::Command).await;
        assert_eq!(client.request(Request::Append { entries }).await, Reply::Done);
        let reply = client.request(Request::Services { after: None }).await;
        let Reply::Services { services, .. } = reply else { panic!("{reply:?}") };
        services[0].service_id
    });
    for home in [&workspace.founder, &reacher] {
        eventually("it hears of the entry", || home.json(&["status"])["trust"]["frozen"] == true);
    }
    check_echo(&mut client);
    reacher.ok(&["unreach", svc]);
    reacher.fails(&["reach", svc], 6, "this version cannot read");
    let opened = runtime().block_on(Tunnel::open(hub.address(), &member, service_id, head));
    let refused = opened.expect_err("the exposer is frozen too");
    assert!(refused.contains("UpgradeNeeded"), "{refused}");
}

#[test]
fn a_signer_signs_one_entry_for_a_place_whatever_the_hub_answers() {
    let hub = Hub::shared();
    // What the hub says of an entry that it keeps to itself; nothing: it takes it.
    let lie: Arc<Mutex<Option<ErrorCode>>> = Arc::default();
    let signed: Arc<Mutex<Vec<Blob>>> = Arc::default();
    let (told, seen) = (lie.clone(), signed.clone());
    let relay = HostileRelay::start(hub, move |passing| {
        let told = *told.lock().unwrap_or_else(PoisonError::into_inner);
        match (passing, told) {
            (
                Passing::ToHub(FromAgent::Request { request: Request::Append { entries }, .. }),
                Some(_),
            ) => {
                // Without entries, the honest hub behind answers with an error, which is changed below.
                let kept = std::mem::take(entries);
                seen.lock().unwrap_or_else(PoisonError::into_inner).extend(kept);
            }
            (Passing::ToAgent(FromHub::Reply { reply: Reply::Error(report), .. }), Some(code)) => {
                report.code = code;
            }
            (Passing::ToHub(_) | Passing::ToAgent(_) | Passing::Data(_), _) => {}
        }
        Verdict::Forward
    });
    let workspace = Workspace::found_at(&relay.url());
    let _leaver = workspace.join("leaver");
    let say = |code| *lie.lock().unwrap_or_else(PoisonError::into_inner) = code;
    for code in [ErrorCode::Conflict, ErrorCode::Busy, ErrorCode::Conflict] {
        say(Some(code));
        workspace.founder.fails(&["revoke", "leaver", "--yes"], 6, "signed and kept");
        workspace.founder.fails(&["trust", "policy", "strict"], 6, "signed and kept");
    }
    let signed = signed.lock().unwrap_or_else(PoisonError::into_inner).clone();
    assert!(signed.len() >= 6, "{}", signed.len());
    assert!(signed.iter().all(|entry| *entry == signed[0]), "two entries for one place");

    say(None);
    workspace.founder.ok(&["revoke", "leaver", "--yes"]);
    let revocations = changes(&workspace.founder);
    let count = revocations.iter().filter(|change| change.starts_with("revokes agent")).count();
    assert_eq!(count, 1, "the entry that was kept is the one: {revocations:?}");
}

#[test]
fn a_hub_restored_from_a_backup_is_healed_by_who_knows_more() {
    let mut hub = Hub::start(&[]);
    let workspace = Workspace::found(&hub);
    let leaver = workspace.join("leaver");
    let founding = workspace.founder.up();
    eventually("the invite is closed", || {
        changes(&workspace.founder).iter().any(|change| change.contains("keeps 1"))
    });
    hub.stop();
    let backup = connect_tests::process::new_dir("backup").join("hub");
    copy(hub.data_dir(), &backup);
    hub.restart();

    // After the backup: one is revoked, one joins and is kept.
    workspace.founder.ok(&["revoke", "leaver", "--yes"]);
    let later = workspace.join("later");
    workspace.founder.ok(&["invite"]);
    let before = changes(&workspace.founder);
    hub.stop();
    fs::remove_dir_all(hub.data_dir()).expect("our own directory");
    copy(&backup, hub.data_dir());
    hub.restart();
    founding.stderr_line("hub_healed");
    assert_eq!(changes(&workspace.founder), before);
    leaver.fails(&["services"], 6, "revoked");
    later.ok(&["services"]);
    assert!(later.json(&["agents"]).as_array().expect("a list").len() >= 2);
}

/// Copies a directory as a backup does, owners and modes included.
fn copy(from: &std::path::Path, to: &std::path::Path) {
    let status = std::process::Command::new("cp").arg("-a").arg(from).arg(to).status();
    assert!(status.expect("cp").success());
}
