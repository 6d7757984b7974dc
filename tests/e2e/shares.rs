//! Shares: what a guest reaches, for how long, and what it does not.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    process::Command,
    time::{Duration, Instant},
};

use connect_spec::control::{ErrorCode, Reply, Request, SessionKind};
use connect_tests::{
    PATIENCE,
    client::{Client, Keys, tunnel_request},
    eventually,
    home::{Home, Workspace},
    hub::Hub,
    postgres,
    process::Process,
    random_word, runtime,
    services::Service,
};
use serde_json::Value;

#[track_caller]
fn open_echo(address: SocketAddr) -> TcpStream {
    let mut client = TcpStream::connect(address).expect("a local port");
    client.set_read_timeout(Some(PATIENCE)).expect("our own socket");
    client.write_all(b"ping").expect("a connection");
    let mut read = [0; 4];
    client.read_exact(&mut read).expect("an echo");
    assert_eq!(&read, b"ping");
    client
}

/// Waits until a connection ends, which must be within five seconds.
#[track_caller]
fn ends_within_five_seconds(connection: &mut TcpStream, what: &str) {
    let start = Instant::now();
    // A reset or an end of file: no byte comes any more.
    assert!(matches!(connection.read(&mut [0; 1]), Ok(0) | Err(_)), "{what}");
    let took = start.elapsed();
    assert!(took < Duration::from_secs(5), "{what} was served for {took:?}");
}

fn name() -> String {
    format!("svc-{}", random_word())
}

/// Shares services; returns the code.
#[track_caller]
fn share(giver: &Home, services: &[&str], options: &[&str]) -> String {
    let args = [&["share"], services, options].concat();
    giver.json(&args)["code"].as_str().expect("a code").to_owned()
}

/// Joins by the code of a share of so many services, and waits until their exposers sealed them for guests.
#[track_caller]
fn join(home: &Home, code: &str, services: usize) {
    home.ok(&["join", code, "--label", "contractor"]);
    eventually("the shared services are listed", || {
        let listed = home.json(&["services"]);
        let shared = listed.as_array().expect("a list").iter().filter(|s| s["share"].is_string());
        shared.count() == services
    });
}

/// Starts the agent of a home that is a guest and nothing else.
#[track_caller]
fn guest_up(home: &Home) -> Process {
    let process = Process::spawn("connect up", home.command(&["up"]).env("CONNECT_LOG", "debug"));
    process.stderr_line(" connected as a guest ");
    process
}

fn names_of(services: &Value) -> Vec<&str> {
    let services = services.as_array().expect("a list").iter();
    services.map(|service| service["name"].as_str().expect("a name")).collect()
}

fn audit(home: &Home, kind: &str) -> Vec<Value> {
    let rows = home.ok(&["audit", "--json"]);
    let rows = rows.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON lines"));
    rows.filter(|row| row["kind"] == kind).collect()
}

#[test]
fn guest_reaches_what_is_shared_and_nothing_else() {
    let hub = Hub::shared();
    let workspace = Workspace::found(hub);
    let giver = &workspace.founder;
    let _giver_agent = giver.up();
    let service = Service::echo();
    let (shared, private) = (&name(), &name());
    for name in [shared, private] {
        giver.ok(&["expose", &service.address().to_string(), "--name", name]);
    }
    giver.fails(&["share", &name()], 5, "no service is called");
    giver.fails(&["share", shared, "--expires", "91d"], 2, "");
    let code = share(giver, &[shared], &["--name", "acme-contractor"]);
    giver.fails(&["share", shared, "--name", "acme-contractor"], 2, "acme-contractor");

    // A home that has nothing becomes that of the guest.
    let guest = Home::new();
    join(&guest, &code, 1);
    Home::new().fails(&["join", &code], 6, "used");
    assert_eq!(names_of(&guest.json(&["services"])), [shared.as_str()]);
    guest.fails(&["agents"], 6, "guest");
    guest.fails(&["invite"], 6, "guest of a share");
    guest.fails(&["share", shared], 6, "guest of a share");
    guest.fails(&["reach", private], 5, "no service is called");
    let guest_agent = guest_up(&guest);
    guest.fails(&["expose", "127.0.0.1:9", "--name", &name()], 6, "guest of a share");
    let _connection = open_echo(guest.reach(shared));
    guest.fails(&["reach", private], 5, "no service is called");

    // With a client of one's own and the ids that the hub would never tell it is the same.
    let status = giver.json(&["status"]);
    let exposed = status["exposed"].as_array().expect("a list");
    let id = |name: &str| {
        let service = exposed.iter().find(|service| service["name"] == name).expect("exposed");
        service["service_id"].as_str().expect("an id").parse().expect("an id")
    };
    let responder = status["agent_id"].as_str().expect("an id").parse().expect("an id");
    let keys = Keys::of(&guest);
    runtime().block_on(async {
        let mut client = Client::login(hub.address(), &keys, SessionKind::Command).await;
        let share_id = keys.presented.credential.as_ref().expect("a share").object().id();
        for (service, share_id, expected) in [
            (id(private), share_id, ErrorCode::Forbidden),
            (id(shared), connect_spec::ids::CredentialId::NONE, ErrorCode::Forbidden),
        ] {
            let request = connect_spec::control::TunnelRequest {
                share_id,
                ..tunnel_request(service, responder)
            };
            let reply = client.request(Request::OpenTunnel(request)).await;
            let Reply::Error(report) = &reply else { panic!("{reply:?}") };
            assert_eq!(report.code, expected);
        }
    });

    // Both sides see it, and the audit log has each use.
    let shares = giver.json(&["shares"]);
    let given = &shares["given"][0];
    assert_eq!(
        (&given["label"], &given["services"][0]),
        (&"acme-contractor".into(), &shared.as_str().into())
    );
    assert_eq!(
        (&given["used"], &given["uses"], &given["over"]),
        (&1.into(), &1.into(), &false.into())
    );
    assert_eq!(given["guests"][0]["label"], "contractor");
    let listed = giver.json(&["agents"]);
    let listed = listed.as_array().expect("a list").iter();
    let roles: Vec<_> = listed.filter(|agent| agent["label"] == "contractor").collect();
    assert_eq!(roles[0]["role"], "guest");
    let joined = guest.json(&["shares"]);
    assert_eq!(joined["joined"][0]["id"], given["id"]);
    assert_eq!(joined["joined"][0]["label"], "acme-contractor");
    assert_eq!(guest.json(&["status"])["share"]["label"], "acme-contractor");
    assert_eq!(audit(giver, "share_created").len(), 1);
    assert!(audit(giver, "agent_enrolled").iter().any(|row| row["credential_id"] == given["id"]));
    let opened = audit(giver, "tunnel_opened");
    assert!(
        opened.iter().any(|row| row["share_id"] == given["id"] && row["agent"] == "contractor")
    );
    giver.fails(&["trust", "add-signer", "contractor"], 2, "guest");
    giver.fails(&["trust", "role", "contractor", "member"], 2, "guest");

    // When the workspace gets new secrets, the guest has no part in it and loses nothing.
    let _leaver = workspace.join("leaver");
    giver.ok(&["revoke", "leaver", "--yes"]);
    let later = &name();
    giver.ok(&["expose", &service.address().to_string(), "--name", later]);
    assert_eq!(names_of(&guest.json(&["services"])), [shared.as_str()]);
    eventually("the guest follows the trust log", || {
        let [status, expected] = [&guest, giver].map(|home| home.json(&["status"]));
        status["trust"]["head"] == expected["trust"]["head"]
    });
    drop(guest_agent);
    let _guest_agent = guest_up(&guest);
    let _connection = open_echo(guest.reach(shared));
}

#[test]
fn share_ends_at_once_when_it_is_taken_back() {
    let hub = Hub::shared();
    let workspace = Workspace::found(hub);
    let giver = &workspace.founder;
    let member = workspace.join("member");
    let _agents = [giver.up(), member.up()];
    let service = Service::echo();
    let shared = &name();
    giver.ok(&["expose", &service.address().to_string(), "--name", shared]);
    let guest = Home::new();
    join(&guest, &share(giver, &[shared], &["--name", "audit"]), 1);
    let _guest_agent = guest_up(&guest);
    let mut ended = open_echo(guest.reach(shared));
    let mut goes_on = open_echo(member.reach(shared));

    giver.fails(&["unshare", "nobody"], 2, "no open share is called");
    let clock = Instant::now();
    giver.ok(&["unshare", "audit"]);
    ends_within_five_seconds(&mut ended, "a guest whose share was taken back");
    assert!(clock.elapsed() < Duration::from_secs(10));
    goes_on.write_all(b"ping").expect("a connection");
    goes_on.read_exact(&mut [0; 4]).expect("an echo");
    guest.fails(&["services"], 6, "");
    assert_eq!(giver.json(&["shares"])["given"], Value::Array(Vec::new()));
    let listed = giver.json(&["agents"]);
    let mut listed = listed.as_array().expect("a list").iter();
    assert!(listed.any(|agent| agent["role"] == "guest" && agent["revoked"] == true));
}

#[test]
fn share_ends_when_its_time_is_over() {
    let hub = Hub::shared();
    let workspace = Workspace::found(hub);
    let giver = &workspace.founder;
    let _agent = giver.up();
    let service = Service::echo();
    let shared = &name();
    giver.ok(&["expose", &service.address().to_string(), "--name", shared]);
    let guest = Home::new();
    let code = share(giver, &[shared], &["--expires", "12s"]);
    let made = Instant::now();
    join(&guest, &code, 1);
    let _guest_agent = guest_up(&guest);
    let mut connection = open_echo(guest.reach(shared));
    // The time is told in whole seconds.
    std::thread::sleep(Duration::from_secs(12).saturating_sub(made.elapsed()));
    ends_within_five_seconds(&mut connection, "a guest whose time was over");
    assert_eq!(guest.json(&["shares"])["joined"][0]["over"], true);
    let late = share(giver, &[shared], &["--expires", "1s", "--name", "late"]);
    eventually("the share is over", || {
        let shares = giver.json(&["shares"]);
        let given = shares["given"].as_array().expect("a list");
        given.iter().any(|share| share["label"] == "late" && share["over"] == true)
    });
    Home::new().fails(&["join", &late], 6, "expired");
}

#[test]
fn member_of_one_workspace_is_a_guest_of_another() {
    let (hub, other_hub) = (Hub::shared(), Hub::start(&[]));
    let (workspace, own) = (Workspace::found(hub), Workspace::found(&other_hub));
    let (giver, guest) = (&workspace.founder, &own.founder);
    let agents = [giver.up(), guest.up()];
    let [shared, both] = [&name(), &name()];
    let (theirs, ours) = (Service::greeting(b"theirs"), Service::greeting(b"ours__"));
    for name in [shared, both] {
        giver.ok(&["expose", &theirs.address().to_string(), "--name", name]);
    }
    guest.ok(&["expose", &ours.address().to_string(), "--name", both]);
    let code = share(giver, &[shared, both], &["--name", "acme"]);
    join(guest, &code, 2);
    guest.fails(&["join", &code], 2, "already");

    let greeting = |address: SocketAddr| {
        let mut client = TcpStream::connect(address).expect("a local port");
        client.set_read_timeout(Some(PATIENCE)).expect("our own socket");
        let mut read = [0; 6];
        client.read_exact(&mut read).expect("a greeting");
        String::from_utf8(read.to_vec()).expect("text")
    };
    // The agent that runs knows of it at once; a name of the own workspace comes first.
    let address = guest.reach(shared);
    assert_eq!(greeting(address), "theirs");
    assert_eq!(greeting(guest.reach(both)), "ours__");
    guest.fails(&["reach", both, "--share", "nobody"], 2, "no share");
    let by_share = guest.ok(&["reach", both, "--share", "acme"]).parse().expect("an address");
    assert_eq!(greeting(by_share), "theirs");
    let status = guest.json(&["status"]);
    assert_eq!(status["shares"][0]["share"]["label"], "acme");
    assert_eq!(status["shares"][0]["reached"].as_array().expect("a list").len(), 2);
    let mut listed: Vec<String> = Vec::new();
    for service in guest.json(&["services"]).as_array().expect("a list") {
        listed.push(format!("{} {}", service["name"], service["share"]));
    }
    assert_eq!(listed.len(), 3, "{listed:?}");

    // It comes back with its ports.
    let [_giver_agent, guest_agent] = agents;
    guest.ok(&["down"]);
    drop(guest_agent);
    let _guest_agent = guest.up();
    eventually("the share is reached again", || {
        guest.json(&["status"])["shares"][0]["reached"].as_array().is_some_and(|all| {
            !all.is_empty() && all.iter().all(|reached| reached["active"] == true)
        })
    });
    assert_eq!(greeting(address), "theirs");
    assert_eq!(greeting(by_share), "theirs");

    guest.fails(&["leave", "nobody"], 2, "no share");
    guest.ok(&["leave", "acme"]);
    assert!(TcpStream::connect(address).is_err(), "nobody listens there any more");
    assert_eq!(guest.json(&["shares"])["joined"], Value::Array(Vec::new()));
    assert_eq!(guest.json(&["services"]).as_array().expect("a list").len(), 1);
}

#[test]
fn hub_that_lets_more_guests_join_is_caught_by_the_exposer() {
    let hub = Hub::start(&[]);
    let workspace = Workspace::found(&hub);
    let giver = &workspace.founder;
    let giver_agent = giver.up();
    let service = Service::echo();
    let shared = &name();
    giver.ok(&["expose", &service.address().to_string(), "--name", shared]);
    let code = share(giver, &[shared], &[]);
    let (guest, thief) = (Home::new(), Home::new());
    join(&guest, &code, 1);
    let _guest_agent = guest_up(&guest);
    let _connection = open_echo(guest.reach(shared));
    let mut psql = Command::new(postgres::psql());
    psql.args(["-X", "-q", "-v", "ON_ERROR_STOP=1", "-U", "postgres", "-d", "connect"]);
    psql.args(["-c", "UPDATE connect.credentials SET used = 0"]);
    let output = psql.arg("-h").arg(hub.data_dir().join("socket")).output().expect("psql runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    join(&thief, &code, 1);
    let _thief_agent = guest_up(&thief);
    thief.fails(&["reach", shared], 6, "does not allow");
    giver_agent.stderr_line("share_overused");
    // Nothing changed for who was there before.
    let _connection = open_echo(guest.reach(shared));
}

#[test]
fn service_exposed_again_is_still_shared() {
    let hub = Hub::shared();
    let workspace = Workspace::found(hub);
    let giver = &workspace.founder;
    let _agent = giver.up();
    let (first, second) = (Service::greeting(b"first_"), Service::greeting(b"second"));
    let shared = &name();
    giver.ok(&["expose", &first.address().to_string(), "--name", shared]);
    let guest = Home::new();
    join(&guest, &share(giver, &[shared], &[]), 1);
    giver.ok(&["unexpose", shared]);
    assert_eq!(guest.json(&["services"]), Value::Array(Vec::new()));
    giver.ok(&["expose", &second.address().to_string(), "--name", shared]);
    let _guest_agent = guest_up(&guest);
    let mut client = TcpStream::connect(guest.reach(shared)).expect("a local port");
    client.set_read_timeout(Some(PATIENCE)).expect("our own socket");
    let mut read = [0; 6];
    client.read_exact(&mut read).expect("a greeting");
    assert_eq!(&read, b"second");
}
