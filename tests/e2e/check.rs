//! `connect reach NAME --check`, the health of targets in the list of services, and the names of services
//! that nobody named: against real servers.

use std::{net::SocketAddr, process::Command, sync::LazyLock};

use connect_tests::{
    authority::{Authority, CertificateFiles, Flaw},
    eventually,
    home::{Home, Pair, Workspace},
    hub::Hub,
    postgres::Postgres,
    process::{Outcome, Process},
    random_word,
    services::{Service, Silent, closed_port},
};
use serde_json::Value;

/// Two agents for all tests here that leave them as they were.
static PAIR: LazyLock<Pair> = LazyLock::new(|| Pair::start(Hub::shared()));

/// Exposes a target under a new name.
#[track_caller]
fn expose(pair: &Pair, target: &str) -> String {
    let name = format!("s-{}", random_word());
    pair.exposer().ok(&["expose", target, "--name", &name]);
    name
}

/// Runs a command in a locale that writes what people read.
fn run_utf8(home: &Home, args: &[&str]) -> Outcome {
    let mut command: Command = home.command(args);
    Process::spawn("connect", command.env("LC_ALL", "C.UTF-8")).outcome()
}

/// A text in which every number is `#`.
fn without_numbers(text: &str) -> String {
    let mut plain = String::new();
    for character in text.chars() {
        let is_number = character.is_ascii_digit() || character == '.' && plain.ends_with('#');
        if !is_number {
            plain.push(character);
        } else if !plain.ends_with('#') {
            plain.push('#');
        }
    }
    plain
}

/// The finding of this kind in the JSON of a check.
fn finding<'c>(checked: &'c Value, what: &str) -> &'c Value {
    let findings = checked["findings"].as_array().expect("a list");
    findings
        .iter()
        .find(|finding| finding["what"] == what)
        .unwrap_or_else(|| panic!("no `{what}` in {checked}"))
}

#[test]
fn a_healthy_database_is_shown_line_by_line() {
    let database = Postgres::start();
    let name = expose(&PAIR, &format!("localhost:{}", database.address().port()));
    let Outcome { code, stdout, stderr } =
        run_utf8(&PAIR.reacher, &["reach", &name, "--check", "--speed"]);
    assert_eq!(code, Some(0), "{stdout}{stderr}");
    let addresses = if stdout.contains("1 address,") { "# address" } else { "# addresses" };
    assert_eq!(
        without_numbers(&stdout).replace("GB/s", "MB/s"),
        format!(
            "✓ DNS OK       {addresses}, # ms\n\
             ✓ TCP OK       # ms\n\
             ✓ PostgreSQL   asks for no password\n\
             ✓ Latency      # ms (median of #, encrypted, through the hub)\n\
             ✓ Speed        ↑ # MB/s  ↓ # MB/s\n"
        ),
        "{stdout}"
    );
    assert_eq!(stderr, "");

    let checked = PAIR.reacher.json(&["reach", &name, "--check"]);
    assert_eq!(checked["ok"], true);
    assert_eq!(checked["protocol"], "postgres");
    assert!(checked["latency_ms"].as_f64().expect("a number") > 0.0);
    assert_eq!(checked["speed"], Value::Null, "nobody asked for it");
    let port = database.address().port().to_string();
    assert!(!checked.to_string().contains(&port), "where the target is stays with its exposer");

    // A language that writes ASCII only.
    let mut command = PAIR.reacher.command(&["reach", &name, "--check"]);
    let plain = Process::spawn("connect", command.env("LC_ALL", "C")).outcome();
    assert!(plain.stdout.is_ascii(), "{}", plain.stdout);
    assert!(plain.stdout.contains("ok   PostgreSQL   asks for no password"), "{}", plain.stdout);
}

/// The hub's own listener is a real web server; behind TLS it shows certificates of every kind.
#[test]
fn web_servers_are_well_and_their_certificates_are_looked_at() {
    let hub = Hub::shared();
    let address = hub.url().trim_start_matches("http://").to_owned();
    let name = expose(&PAIR, &address);
    let checked = PAIR.reacher.json(&["reach", &name, "--check"]);
    assert_eq!(checked["protocol"], "http");
    assert!(finding(&checked, "protocol")["text"].as_str().expect("a text").starts_with("HTTP "));

    let authority = Authority::new();
    for (flaw, certified, state, text) in [
        (Flaw::None, "localhost", "ok", "days left, signed by no authority"),
        (Flaw::None, "db.example", "warn", "not the name that the exposer dials"),
        (Flaw::Expired, "localhost", "warn", "expired on 2020-01-01"),
        (Flaw::NotYetValid, "localhost", "warn", "not valid before 2200-01-01"),
        (Flaw::SelfSigned, "localhost", "ok", "days left, signed by no authority"),
    ] {
        let files = CertificateFiles::new();
        authority.issue(&files, certified, flaw);
        let port = closed_port().port();
        let tls_hub = Hub::start_on(&format!("127.0.0.1:{port}"), &files.options());
        let name = expose(&PAIR, &format!("localhost:{port}"));
        let checked = PAIR.reacher.json(&["reach", &name, "--check"]);
        assert_eq!(checked["protocol"], "https", "{checked}");
        let tls = finding(&checked, "tls");
        assert_eq!(tls["state"], state, "{tls}");
        let said = tls["text"].as_str().expect("a text");
        assert!(
            said.contains(text) && said.starts_with(&format!("TLS 1.3, certificate `{certified}`")),
            "{said}"
        );
        assert_eq!(checked["ok"], true, "a warning is no failure");
        drop(tls_hub);
    }
}

#[test]
fn what_accepts_connections_is_no_failure() {
    let echo = Service::echo();
    let greeting = Service::greeting(b"who goes there?\r\n");
    let closing = Service::start(|tcp| async move { drop(tcp) });
    for (service, text) in
        [(&echo, "not known"), (&greeting, "speaks first"), (&closing, "closes them at once")]
    {
        let name = expose(&PAIR, &service.address().to_string());
        let checked = PAIR.reacher.json(&["reach", &name, "--check"]);
        assert_eq!(
            (&checked["ok"], &checked["protocol"]),
            (&Value::from(true), &Value::from("tcp"))
        );
        assert!(finding(&checked, "protocol")["text"].to_string().contains(text), "{checked}");
    }
}

#[test]
fn each_failure_has_its_exit_code_and_says_what_to_do() {
    let check = |home: &Home, name: &str, code: i32, stdout: &str, stderr: &str| {
        let outcome = run_utf8(home, &["reach", name, "--check"]);
        assert_eq!(outcome.code, Some(code), "{outcome:?}");
        assert!(outcome.stdout.contains(stdout), "{outcome:?}");
        assert!(outcome.stderr.contains(stderr), "{outcome:?}");
    };
    let refused = expose(&PAIR, &closed_port().to_string());
    check(
        &PAIR.reacher,
        &refused,
        8,
        "✗ TCP          the target refuses connections\n               on the exposer's machine:",
        "does not answer its exposer",
    );
    let silent = Silent::start();
    let timed_out = expose(&PAIR, &silent.address().to_string());
    check(&PAIR.reacher, &timed_out, 8, "✗ TCP          the target does not answer", "error: ");
    let nameless = expose(&PAIR, "nowhere.invalid:5432");
    check(
        &PAIR.reacher,
        &nameless,
        8,
        "✗ DNS          the target's name does not resolve",
        "error: ",
    );
    check(&PAIR.reacher, "nobody", 5, "", "no service is called `nobody`");

    let service = Service::echo();
    let name = format!("s-{}", random_word());
    PAIR.exposer().ok(&[
        "expose",
        &service.address().to_string(),
        "--name",
        &name,
        "--allow",
        "ops",
    ]);
    check(&PAIR.reacher, &name, 6, "", "does not allow");

    let workspace = Workspace::found(Hub::shared());
    let exposer = workspace.join("exposer");
    let agent = exposer.up();
    exposer.ok(&["expose", &service.address().to_string(), "--name", "gone"]);
    exposer.ok(&["down"]);
    drop(agent);
    check(&workspace.founder, "gone", 10, "", "is offline");
}

#[test]
fn a_check_leaves_nothing_behind_with_an_agent_or_without() {
    let workspace = Workspace::found(Hub::shared());
    let exposer_agent = workspace.founder.up();
    let service = Service::echo();
    workspace.founder.ok(&["expose", &service.address().to_string(), "--name", "echo"]);
    let reacher = workspace.join("reacher");
    let kept = |home: &Home| {
        let names = ["ports.json", "state.json", "agent.sock"];
        let kept = |name: &&str| home.dir().join(name).exists();
        names.into_iter().filter(kept).collect::<Vec<_>>()
    };
    let ports = |home: &Home| std::fs::read(home.dir().join("ports.json")).ok();
    assert_eq!(reacher.json(&["reach", "echo", "--check"])["ok"], true);
    assert!(!kept(&reacher).contains(&"ports.json"), "{:?}", kept(&reacher));
    assert!(!kept(&reacher).contains(&"agent.sock"), "{:?}", kept(&reacher));

    let mut agent = reacher.up();
    let before = ports(&reacher);
    assert_eq!(reacher.json(&["reach", "echo", "--check"])["ok"], true);
    assert!(!agent.has_ended(), "the running agent does it");
    assert_eq!(reacher.json(&["status"])["reached"], Value::Array(vec![]));
    assert_eq!(ports(&reacher), before);
    let exposed = || workspace.founder.json(&["status"])["exposed"][0]["streams"].clone();
    eventually("no stream is left at the exposer", || exposed() == 0);

    // A service that is reached stays so.
    let address = reacher.reach("echo");
    assert_eq!(reacher.json(&["reach", "echo", "--check"])["ok"], true);
    assert_eq!(reacher.reach("echo"), address);
    drop(exposer_agent);
}

#[test]
fn only_a_few_checks_run_at_once() {
    // It takes seconds to find out that it says nothing.
    let service = Service::start(|mut tcp| async move {
        let mut rest = Vec::new();
        let _ = tokio::io::AsyncReadExt::read_to_end(&mut tcp, &mut rest).await;
    });
    let name = expose(&PAIR, &service.address().to_string());
    // They share a channel when the service is reached.
    PAIR.reacher.reach(&name);
    let checks: Vec<_> = (0..6)
        .map(|_| Process::spawn("connect", &mut PAIR.reacher.command(&["reach", &name, "--check"])))
        .collect();
    let outcomes: Vec<_> = checks.into_iter().map(Process::outcome).collect();
    let codes = |code| outcomes.iter().filter(|outcome| outcome.code == Some(code)).count();
    assert_eq!((codes(0), codes(6)), (4, 2), "{outcomes:?}");
    let busy = outcomes.iter().find(|outcome| outcome.code == Some(6)).expect("counted");
    assert!(busy.stderr.contains("too many checks"), "{busy:?}");
    assert_eq!(PAIR.reacher.json(&["reach", &name, "--check"])["ok"], true, "and later again");
}

/// Whether a service's target answers, as another agent reads it.
fn target_ok(home: &Home, name: &str) -> Value {
    let services = home.json(&["services"]);
    let services = services.as_array().expect("a list");
    let service = services.iter().find(|service| service["name"] == name);
    service.expect("it is listed")["target_ok"].clone()
}

#[test]
fn services_show_that_a_target_stops_and_comes_back() {
    let workspace = Workspace::found(Hub::shared());
    let exposer = workspace.join("exposer");
    let mut up = exposer.command(&["up"]);
    let agent = Process::spawn(
        "connect up",
        up.env("CONNECT_HEALTH_EVERY_MS", "500").env("CONNECT_LOG", "info"),
    );
    agent.stderr_line(" connected hub=");
    let service = Service::echo();
    let address: SocketAddr = service.address();
    exposer.ok(&["expose", &address.to_string(), "--name", "db"]);
    assert_eq!(target_ok(&workspace.founder, "db"), true);
    drop(service);
    eventually("the list says that it is down", || target_ok(&workspace.founder, "db") == false);
    assert_eq!(exposer.json(&["status"])["exposed"][0]["target_ok"], false);
    let _again = Service::start_on(address, |tcp| async move { drop(tcp) });
    eventually("and that it is back", || target_ok(&workspace.founder, "db") == true);
}

#[test]
fn a_client_that_finds_the_target_down_is_news_at_once() {
    // Nobody looks at the targets of this pair meanwhile.
    let service = Service::echo();
    let address = service.address();
    let name = expose(&PAIR, &address.to_string());
    let local = PAIR.reacher.reach(&name);
    drop(service);
    drop(std::net::TcpStream::connect(local).expect("the local port is bound"));
    eventually("the list says that it is down", || target_ok(&PAIR.reacher, &name) == false);
    let _again = Service::start_on(address, |tcp| async move { drop(tcp) });
    drop(std::net::TcpStream::connect(local).expect("the local port is bound"));
    eventually("and that it is back", || target_ok(&PAIR.reacher, &name) == true);
}

#[test]
fn services_without_a_name_are_called_by_what_they_speak() {
    let workspace = Workspace::found(Hub::shared());
    let (first, second) = (&workspace.founder, workspace.join("second"));
    let agents = [first.up(), second.up()];
    let databases = [Postgres::start(), Postgres::start()];
    let at = |index: usize| databases[index].address().to_string();
    assert_eq!(first.ok(&["expose", &at(0)]), "postgres");
    assert_eq!(first.ok(&["expose", &at(0)]), "postgres", "the same again is the same");
    assert_eq!(first.ok(&["expose", &at(1)]), "postgres-2");
    assert_eq!(second.ok(&["expose", &at(0)]), "postgres-3", "another agent's are others'");
    let echo = Service::echo();
    let named = format!("tcp-{}", echo.address().port());
    assert_eq!(first.ok(&["expose", &echo.address().to_string()]), named);
    let closed = closed_port();
    assert_eq!(first.ok(&["expose", &closed.to_string()]), format!("tcp-{}", closed.port()));
    let services = first.json(&["services"]);
    let protocols: Vec<_> = services
        .as_array()
        .expect("a list")
        .iter()
        .filter(|service| service["name"].as_str().is_some_and(|name| name.starts_with("postgres")))
        .map(|service| service["protocol"].clone())
        .collect();
    assert_eq!(protocols, ["postgres"; 3]);

    // It is the same after a restart, also of a name that only the target explains.
    first.ok(&["down"]);
    drop(agents);
    let _agent = first.up();
    assert_eq!(first.ok(&["expose", &at(1)]), "postgres-2");
}

/// Agents that want the same name at the same time get different ones.
#[test]
fn agents_that_race_for_a_name_get_numbers() {
    let workspace = Workspace::found(Hub::shared());
    let homes: Vec<_> = (0..3).map(|number| workspace.join(&format!("racer-{number}"))).collect();
    let _agents: Vec<_> = homes.iter().map(Home::up).collect();
    let database = Postgres::start();
    let target = database.address().to_string();
    let racers: Vec<_> = homes
        .iter()
        .map(|home| Process::spawn("connect expose", &mut home.command(&["expose", &target])))
        .collect();
    let mut names: Vec<_> =
        racers.into_iter().map(|racer| racer.outcome().stdout.trim().to_owned()).collect();
    names.sort();
    assert_eq!(names, ["postgres", "postgres-2", "postgres-3"]);
}
